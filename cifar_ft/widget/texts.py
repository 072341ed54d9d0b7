"""What the prediction widget says, in English and French.

Errors and notes about a picture carry a code and values; the English sentence of each code is `predictions.MESSAGES`.
"""

from __future__ import annotations

from numbers import Real
from string import Formatter

from cifar_ft import CifarFtError
from cifar_ft.data import CLASSES
from cifar_ft.predictions import MESSAGES, ImageError, Note

LANGUAGES = {"en": "English", "fr": "français"}
LABELS = {
    "en": CLASSES,
    "fr": ("avion", "automobile", "oiseau", "chat", "cerf", "chien", "grenouille", "cheval", "bateau", "camion"),
}
# The widget's own words, in English and French.
TEXTS = {
    "language": ("Language", "Langue"),
    "heading_choose": ("Choose a picture", "Choisir une image"),
    "heading_ask": ("Ask the model", "Interroger le modèle"),
    "kind": ("Class", "Classe"),
    "all_kinds": ("all classes", "toutes les classes"),
    "order": ("Order", "Ordre"),
    "stored": ("as stored", "comme enregistré"),
    "random": ("at random", "au hasard"),
    "mistakes": ("most confident mistakes first", "erreurs les plus sûres d'abord"),
    "shuffle": ("Draw others at random", "En tirer d'autres au hasard"),
    "earlier": ("Previous pictures", "Images précédentes"),
    "later": ("Next pictures", "Images suivantes"),
    "page": ("pictures {first} to {last} of {total:,}", "images {first} à {last} sur {total:,}"),
    "page_of_more": (
        "pictures {first} to {last} of {shown:,}, drawn from {total:,}",
        "images {first} à {last} sur {shown:,}, tirées de {total:,}",
    ),
    "no_pictures": ("no such picture", "aucune image de ce genre"),
    "no_mistakes": ("no mistakes here", "aucune erreur ici"),
    "searching": ("asking the model about {total:,} pictures...", "le modèle examine {total:,} images..."),
    "sample": ("Sample image", "Image d'exemple"),
    "choose": ("choose a sample image", "choisir une image d'exemple"),
    "sample_line": ("{number}: {label} (test image {index})", "{number}\xa0: {label} (image de test {index})"),
    "taken_for": ("taken for {label}, {percent}", "prise pour {label}, {percent}"),
    "sample_name": ("sample {line}", "exemple {line}"),
    "upload": ("Upload pictures (at most 10 MiB in all)", "Envoyer des images (10\xa0Mio au plus en tout)"),
    "file": ("Uploaded picture", "Image envoyée"),
    "fit": ("A picture that is not square", "Une image qui n'est pas carrée"),
    "crop": ("is cut to its middle", "est coupée autour de son milieu"),
    "pad": ("is shown whole, with black borders", "est montrée entière, avec des bords noirs"),
    "heat_map": ("Heat map", "Carte de chaleur"),
    "predict": ("Predict", "Prédire"),
    "as_given": ("as given", "telle quelle"),
    "given_size": ("as given, {width} x {height} pixels", "telle quelle, {width} x {height} pixels"),
    "as_seen": ("as the network sees it", "telle que le réseau la voit"),
    "seen_crop": ("{seen}, cut to its middle", "{seen}, coupée autour de son milieu"),
    "seen_pad": ("{seen}, whole with black borders", "{seen}, entière avec des bords noirs"),
    "notes": ("This picture: {notes}.", "Cette image\xa0: {notes}."),
    "predicted": ("{name}: predicted {label}, {percent}", "{name}\xa0: prédiction {label}, {percent}"),
    "true_label": ("; true label {label}, {verdict}", "\xa0; vraie classe {label}, {verdict}"),
    "correct": ("correct", "juste"),
    "wrong": ("wrong", "faux"),
    "model": ("Model: {source}", "Modèle\xa0: {source}"),
    "model_number": ("model {number}", "modèle {number}"),
    "agree": ("The two models agree.", "Les deux modèles sont d'accord."),
    "disagree": ("The two models disagree.", "Les deux modèles ne sont pas d'accord."),
    "unknown": ("Unlike anything in CIFAR-10.", "Ne ressemble à rien de CIFAR-10."),
    "unknown_why": (
        "The model can only answer with one of its ten classes, so do not trust this answer.",
        "Le modèle ne peut répondre que par une de ses dix classes\xa0: ne vous fiez pas à cette réponse.",
    ),
    "false_alarms": (
        "About {percent:.0f} % of CIFAR-10's own pictures get this warning too.",
        "Environ {percent:.0f}\xa0% des images de CIFAR-10 reçoivent aussi cet avertissement.",
    ),
    "colon": (": ", "\xa0: "),
    "class": ("class", "classe"),
    "probability": ("probability", "probabilité"),
    "is_true": ("{label} (true label)", "{label} (vraie classe)"),
    "heat_caption": (
        "heat map: bright parts spoke most for {label}",
        "carte de chaleur\xa0: les parties claires ont le plus parlé pour {label}",
    ),
    "heat_alt": (
        "Heat map of {name} for {label}, brightest {where}",
        "Carte de chaleur de {name} pour {label}, la plus claire {where}",
    ),
    "summary": ("All uploaded pictures", "Toutes les images envoyées"),
    "picture": ("picture", "image"),
    "answer": ("answer", "réponse"),
    "error": ("Error:", "Erreur\xa0:"),
    "preview": (
        "Preview; run the notebook to choose other pictures.",
        "Aperçu\xa0; exécutez le notebook pour choisir d'autres images.",
    ),
    "percent": ("{number:.1f} %", "{number:.1f}\xa0%"),
    # where a heat map is brightest, by thirds: row and column from the top left
    "place_none": ("nowhere", "nulle part"),
    "place_00": ("in the upper left", "en haut à gauche"),
    "place_01": ("at the top", "en haut"),
    "place_02": ("in the upper right", "en haut à droite"),
    "place_10": ("on the left", "à gauche"),
    "place_11": ("in the middle", "au milieu"),
    "place_12": ("on the right", "à droite"),
    "place_20": ("in the lower left", "en bas à gauche"),
    "place_21": ("at the bottom", "en bas"),
    "place_22": ("in the lower right", "en bas à droite"),
    # the codes of WidgetError
    "nothing_chosen": (
        "no picture is chosen; choose a sample image or upload a picture",
        "aucune image n'est choisie\xa0; choisissez une image d'exemple ou envoyez une image",
    ),
    "too_many_files": (
        "{number:,} pictures at a time are too many; choose at most {allowed}",
        "{number:,} images à la fois, c'est trop\xa0; choisissez-en {allowed} au plus",
    ),
    "file_too_large": (
        "{mib:.1f} MiB; at most {allowed} MiB are allowed, make it smaller",
        "{mib:.1f}\xa0Mio\xa0; au plus {allowed}\xa0Mio sont permis, réduisez-la",
    ),
    "browser_failed": (
        "the browser could not read the file: {reason}",
        "le navigateur n'a pas pu lire le fichier\xa0: {reason}",
    ),
    "unexpected": ("unexpected error, {reason}", "erreur inattendue, {reason}"),
}
# The sentences of `MESSAGES`: what was done to a picture, and why one is refused.
FRENCH = {
    "first_frame": "la première de plusieurs vues",
    "one_frame": "la vue {frame} de plusieurs",
    "turned_upright": "redressée selon ses données EXIF",
    "halved": "un pixel sur deux laissé de côté, car elle est très grande",
    "taken_as_8_bits": "luminosité prise pour 8 bits",
    "scaled_to_8_bits": "luminosité ramenée à 8 bits",
    "transparent_on_white": "parties transparentes sur fond blanc",
    "cmyk_converted": "couleurs d'imprimerie (CMJN) converties",
    "cropped": "les {side} x {side} pixels du milieu de {width} x {height}",
    "padded": "tous les {width} x {height} pixels, avec des bords noirs",
    "empty": "vide, 0 octet\xa0; choisissez un fichier d'image",
    "not_a_picture": "ce n'est pas une image lisible ici\xa0; utilisez PNG, JPEG, GIF, WebP, BMP ou TIFF",
    "damaged": "endommagée, incomplète ou d'un genre inconnu ({reason})\xa0; procurez-la-vous à nouveau",
    "no_pixels": "{width} x {height} pixels ne font pas une image\xa0; il en faut au moins 1 de chaque côté",
    "too_large": "trop grande\xa0: {width:,} x {height:,} pixels\xa0; au plus {allowed:,} sont permis",
    "far_too_large": "trop grande\xa0; au plus {allowed:,} pixels sont permis, réduisez-la",
    "too_large_jpeg2000": "trop grande pour JPEG 2000\xa0: {width:,} x {height:,} pixels\xa0; au plus {allowed:,} sont "
    "permis, enregistrez-la en PNG",
    "tile_too_large": "une tuile de {width:,} x {height:,} pixels est trop grande\xa0; au plus {allowed:,} sont permis",
    "too_many_scans": "{scans:,} passes prendraient trop de temps\xa0; au plus {allowed} sont permises, enregistrez-la "
    "à nouveau",
    "missing": "il n'y a pas de fichier {path}",
    "folder": "{path} est un dossier\xa0; donnez une image, ou le dossier à predict_paths",
    "not_a_file": "{path} n'est pas un fichier ordinaire\xa0; choisissez un fichier d'image",
    "address": "{path} est une adresse\xa0; téléchargez l'image et donnez son chemin",
    "opened_as_text": 'l\'image est ouverte comme texte\xa0; ouvrez-la avec le mode "rb"',
    "wrong_type": "{kind} ne se lit pas comme une image\xa0; donnez un chemin, des octets, un fichier, une image "
    "PIL, un tableau ou un tenseur",
    "wrong_shape": "la forme {shape} n'est pas une image\xa0; donnez {wanted}, avec 1, 3 ou 4 canaux",
    "empty_shape": "la forme {shape} n'a pas de pixels\xa0; il en faut au moins 1 de chaque côté",
    "wrong_dtype": "pixels de type {dtype}\xa0; utilisez uint8 (0 à 255), uint16 (0 à 65\u202f535) ou des flottants "
    "de 0 à 1",
    "not_finite": "des pixels sont NaN ou infinis\xa0; utilisez des valeurs finies de 0 à 1",
    "below_0": "des flottants doivent aller de 0 à 1\xa0; ceux-ci vont de {low:.4g} à {high:.4g}, annulez une "
    "normalisation avec transforms.denormalize",
    "above_1": "des flottants doivent aller de 0 à 1\xa0; ceux-ci vont de {low:.4g} à {high:.4g}, divisez par 255 ou "
    "donnez des uint8",
    "unknown_fit": "cadrage {fit!r} inconnu\xa0; choisissez crop ou pad",
    "unreadable_folder": "ce dossier est illisible\xa0: {reason}",
    "no_pictures": "il n'y a pas d'images dans ce dossier\xa0; cherché\xa0: {endings}",
}


class LanguageError(CifarFtError, ValueError):
    """A language that the widget does not speak."""


class WidgetError(CifarFtError, ValueError):
    """Something that the widget cannot do; `code` and `values` say it in either language."""

    def __init__(self, code: str, /, **values):
        super().__init__(text("en", code, **values))
        self.code, self.values = code, values


class _French(Formatter):
    """Fills gaps with 1,234.5 as French writes it, with a narrow space and a comma."""

    def format_field(self, value, spec):
        said = super().format_field(value, spec)
        return said.translate({ord(","): "\u202f", ord("."): ","}) if isinstance(value, Real) else said


def text(lang: str, key: str, **values) -> str:
    """One of the widget's texts, with its gaps filled."""
    return _filled(lang, *TEXTS[key], values)


def _filled(lang: str, english: str, french: str, values: dict) -> str:
    return english.format(**values) if lang == "en" else _French().vformat(french, (), values)


def percent(lang: str, probability: float) -> str:
    """0.912 as "91.2 %", in French "91,2 %" with a space that does not break."""
    return text(lang, "percent", number=100 * probability)


def explained(lang: str, problem: object) -> tuple[str, str]:
    """An error or a note in `lang`, or in English where it has no code; and the language that it is in."""
    if isinstance(problem, WidgetError):
        return text(lang, problem.code, **problem.values), lang
    if isinstance(problem, (ImageError, Note)):
        return _filled(lang, MESSAGES[problem.code], FRENCH[problem.code], problem.values), lang
    return str(problem), "en"
