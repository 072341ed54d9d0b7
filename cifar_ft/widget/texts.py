"""What the prediction widget says, in English and French.

Texts of the widget itself stand in `TEXTS`; what other modules say about a picture (notes, errors) comes in
English and is translated by `translated` where it is known.
"""

from __future__ import annotations

import re

from cifar_ft import CifarFtError
from cifar_ft.data import CLASSES

LANGUAGES = {"en": "English", "fr": "français"}
LABELS = {
    "en": CLASSES,
    "fr": ("avion", "automobile", "oiseau", "chat", "cerf", "chien", "grenouille", "cheval", "bateau", "camion"),
}


NOTHING_CHOSEN = "no picture is chosen; choose a sample image or upload a picture"
ENGLISH = {
    "language": "Language",
    "heading_choose": "Choose a picture",
    "heading_ask": "Ask the model",
    "kind": "Class",
    "all_kinds": "all classes",
    "order": "Order",
    "stored": "as stored",
    "random": "at random",
    "mistakes": "most confident mistakes first",
    "shuffle": "Draw others at random",
    "earlier": "Previous pictures",
    "later": "Next pictures",
    "page": "pictures {first} to {last} of {total}",
    "page_of_more": "pictures {first} to {last} of {shown}, drawn from {total}",
    "no_pictures": "no such picture",
    "no_mistakes": "no mistakes here",
    "searching": "asking the model about {total} pictures...",
    "sample": "Sample image",
    "choose": "choose a sample image",
    "sample_line": "{number}: {label} (test image {index})",
    "taken_for": "taken for {label}, {percent}",
    "sample_name": "sample {line}",
    "upload": "Upload pictures (at most 10 MiB in all)",
    "file": "Uploaded picture",
    "fit": "A picture that is not square",
    "crop": "is cut to its middle",
    "pad": "is shown whole, with black borders",
    "heat_map": "Heat map",
    "predict": "Predict",
    "as_given": "as given",
    "given_size": "as given, {width} x {height} pixels",
    "as_seen": "as the network sees it",
    "seen_crop": "as the network sees it, cut to its middle",
    "seen_pad": "as the network sees it, whole with black borders",
    "notes": "This picture: {notes}.",
    "predicted": "{name}: predicted {label}, {percent}",
    "true_label": "; true label {label}, {verdict}",
    "correct": "correct",
    "wrong": "wrong",
    "model": "Model: {source}",
    "model_number": "model {number}",
    "agree": "The two models agree.",
    "disagree": "The two models disagree.",
    "unknown": "Unlike anything in CIFAR-10.",
    "unknown_why": "The model can only answer with one of its ten classes, so do not trust this answer.",
    "false_alarms": "About {percent} of CIFAR-10's own pictures get this warning too.",
    "colon": ": ",
    "class": "class",
    "probability": "probability",
    "is_true": "{label} (true label)",
    "heat_caption": "heat map: bright parts spoke most for {label}",
    "heat_alt": "Heat map of {name} for {label}, brightest {where}",
    "summary": "All uploaded pictures",
    "picture": "picture",
    "answer": "answer",
    "error": "Error:",
    "preview": "Preview; run the notebook to choose other pictures.",
}


FRENCH = {
    "language": "Langue",
    "heading_choose": "Choisir une image",
    "heading_ask": "Interroger le modèle",
    "kind": "Classe",
    "all_kinds": "toutes les classes",
    "order": "Ordre",
    "stored": "comme enregistré",
    "random": "au hasard",
    "mistakes": "erreurs les plus sûres d'abord",
    "shuffle": "En tirer d'autres au hasard",
    "earlier": "Images précédentes",
    "later": "Images suivantes",
    "page": "images {first} à {last} sur {total}",
    "page_of_more": "images {first} à {last} sur {shown}, tirées de {total}",
    "no_pictures": "aucune image de ce genre",
    "no_mistakes": "aucune erreur ici",
    "searching": "le modèle examine {total} images...",
    "sample": "Image d'exemple",
    "choose": "choisir une image d'exemple",
    "sample_line": "{number}\xa0: {label} (image de test {index})",
    "taken_for": "prise pour {label}, {percent}",
    "sample_name": "exemple {line}",
    "upload": "Envoyer des images (10\xa0Mio au plus en tout)",
    "file": "Image envoyée",
    "fit": "Une image qui n'est pas carrée",
    "crop": "est coupée autour de son milieu",
    "pad": "est montrée entière, avec des bords noirs",
    "heat_map": "Carte de chaleur",
    "predict": "Prédire",
    "as_given": "telle quelle",
    "given_size": "telle quelle, {width} x {height} pixels",
    "as_seen": "telle que le réseau la voit",
    "seen_crop": "telle que le réseau la voit, coupée autour de son milieu",
    "seen_pad": "telle que le réseau la voit, entière avec des bords noirs",
    "notes": "Cette image\xa0: {notes}.",
    "predicted": "{name}\xa0: prédiction {label}, {percent}",
    "true_label": "\xa0; vraie classe {label}, {verdict}",
    "correct": "juste",
    "wrong": "faux",
    "model": "Modèle\xa0: {source}",
    "model_number": "modèle {number}",
    "agree": "Les deux modèles sont d'accord.",
    "disagree": "Les deux modèles ne sont pas d'accord.",
    "unknown": "Ne ressemble à rien de CIFAR-10.",
    "unknown_why": "Le modèle ne peut répondre que par une de ses dix classes\xa0: ne vous fiez pas à cette réponse.",
    "false_alarms": "Environ {percent} des images de CIFAR-10 reçoivent aussi cet avertissement.",
    "colon": "\xa0: ",
    "class": "classe",
    "probability": "probabilité",
    "is_true": "{label} (vraie classe)",
    "heat_caption": "carte de chaleur\xa0: les parties claires ont le plus parlé pour {label}",
    "heat_alt": "Carte de chaleur de {name} pour {label}, la plus claire {where}",
    "summary": "Toutes les images envoyées",
    "picture": "image",
    "answer": "réponse",
    "error": "Erreur\xa0:",
    "preview": "Aperçu\xa0; exécutez le notebook pour choisir d'autres images.",
}


TEXTS = {"en": ENGLISH, "fr": FRENCH}
PLACES = {
    "en": (
        ("in the upper left", "at the top", "in the upper right"),
        ("on the left", "in the middle", "on the right"),
        ("in the lower left", "at the bottom", "in the lower right"),
    ),
    "fr": (
        ("en haut à gauche", "en haut", "en haut à droite"),
        ("à gauche", "au milieu", "à droite"),
        ("en bas à gauche", "en bas", "en bas à droite"),
    ),
}


NOWHERE = {"en": "nowhere", "fr": "nulle part"}
# Whole messages of `pictures` and of the widget's own logic, and what they are in French.
KNOWN = {
    r"the first of several frames": r"la première de plusieurs vues",
    r"frame (\d+) of several": r"la vue \1 de plusieurs",
    r"turned upright as its EXIF data say": r"redressée selon ses données EXIF",
    r"every second pixel left out, as it is very large": r"un pixel sur deux laissé de côté, car elle est très grande",
    r"brightness scaled to 8 bits": r"luminosité ramenée à 8 bits",
    r"brightness taken as 8 bits": r"luminosité prise pour 8 bits",
    r"transparent parts shown on white": r"parties transparentes sur fond blanc",
    r"printing colours \(CMYK\) converted": r"couleurs d'imprimerie (CMJN) converties",
    re.escape(NOTHING_CHOSEN): r"aucune image n'est choisie ; choisissez une image d'exemple ou envoyez une image",
    r"not a picture that can be read here; use (.+) or (\w+)": (
        r"ce n'est pas une image lisible ici ; utilisez \1 ou \2"
    ),
    r"(?:is )?empty: 0 bytes; choose a picture file": r"vide : 0 octet ; choisissez un fichier d'image",
    r"too large: ([\d,]+) x ([\d,]+) pixels; at most ([\d,]+) are allowed": (
        r"trop grande : \1 x \2 pixels ; au plus \3 sont permis"
    ),
    r"too large; at most ([\d,]+) pixels are allowed, make it smaller": (
        r"trop grande ; au plus \1 pixels sont permis, réduisez-la"
    ),
    r"too large for JPEG 2000: ([\d,]+) x ([\d,]+) pixels; at most ([\d,]+) are allowed, save it as PNG": (
        r"trop grande pour JPEG 2000 : \1 x \2 pixels ; au plus \3 sont permis, enregistrez-la en PNG"
    ),
    r"([\d.]+) MiB; at most (\d+) MiB are allowed, make it smaller": (
        r"\1 Mio ; au plus \2 Mio sont permis, réduisez-la"
    ),
    r"([\d,]+) pictures at a time are too many; choose at most (\d+)": (
        r"\1 images à la fois, c'est trop ; choisissez-en \2 au plus"
    ),
    r"damaged, incomplete or of an unknown kind \((.+)\); get it again": (
        r"endommagée, incomplète ou d'un genre inconnu (\1) ; procurez-la-vous à nouveau"
    ),
    r"unexpected error, (.+)": r"erreur inattendue, \1",
}


class LanguageError(CifarFtError, ValueError):
    """A language that the widget does not speak."""


def checked_language(lang: str) -> str:
    """`lang` itself. Raises LanguageError unless it is one of `LANGUAGES`."""
    if lang not in LANGUAGES:
        raise LanguageError(f"unknown language {lang!r}; choose from {', '.join(LANGUAGES)}")
    return lang


def text(lang: str, key: str, **values) -> str:
    """One of the widget's texts, with its gaps filled."""
    return TEXTS[lang][key].format(**values)


def percent(lang: str, probability: float, digits: int = 1) -> str:
    """0.912 as "91.2 %", in French "91,2 %"."""
    number = f"{100 * probability:.{digits}f}"
    return f"{number} %" if lang == "en" else f"{number.replace('.', ',')}\xa0%"


def count(lang: str, number: int) -> str:
    """1000 as "1,000", in French with a narrow space."""
    return f"{number:,}" if lang == "en" else f"{number:,}".replace(",", "\u202f")


def translated(lang: str, message: str) -> tuple[str, str]:
    """A message that came in English, in `lang` where it is known, and the language that it is in now."""
    if lang == "fr":
        for known, french in KNOWN.items():
            if match := re.fullmatch(known, message, re.DOTALL):
                said = re.sub(r" ([;:])", "\xa0\\1", match.expand(french))
                return said if ".+" in known else _numbers(said), "fr"
    return message, "en"


def _numbers(english: str) -> str:
    """1,000.5 as French writes it, wherever it stands."""
    return re.sub(r"(?<=\d)\.(?=\d)", ",", re.sub(r"(?<=\d),(?=\d{3})", "\u202f", english))
