"""Recipes: the published one to the letter, and overrides that are typed, checked and explained."""

import contextlib
import json
import math
from typing import Literal, get_args, get_origin

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from cifar_ft import CifarFtError
from cifar_ft.recipes import RECIPES, Recipe, RecipeError, get_recipe


def find(field, bound):
    """The field's bound of this name, "ge" or "le", if it has one."""
    return [getattr(part, bound) for part in field.metadata if hasattr(part, bound)]


FIELDS = {key: field for key, field in Recipe.model_fields.items() if key != "name"}
KEYS = list(FIELDS)
CHOICES = {key: get_args(field.annotation) for key, field in FIELDS.items() if get_origin(field.annotation) is Literal}
BOUNDS = {key: (*find(field, "ge"), *find(field, "le")) for key, field in FIELDS.items()}
RANGES = {key: bounds for key, bounds in BOUNDS.items() if bounds and key != "train_sizes"}

PUBLISHED = {  # what the public code of the published recipe does, field by field
    "backbone": "resnet50", "weights": "imagenet", "stem": "cifar_random", "max_pool": True, "last_stage": None,
    "head_init": "default", "freeze": "none", "image_size": 32,
    "train_sizes": [], "normalization": "cifar10_published", "crop_padding": 4,
    "cutout": 0, "flip": True, "train_images": None, "val_images": None, "test_images": None, "validation": False,
    "epochs": 60, "batch_size": 32, "head_fit_images": 0, "lr": 0.01, "head_lr_factor": 1.0, "momentum": 0.9,
    "nesterov": False, "weight_decay": 5e-4, "schedule": "constant", "label_smoothing": 0.0, "ema_decay": 0.0,
    "select": "last", "track_test": True, "flip_tta": False, "precision": "fp32", "checkpoint_steps": 0, "seed": 0,
    "accumulation": 1, "compile": False, "freeze_batchnorm": False, "optimizer": "sgd", "degrade": 0.0,
}  # fmt: skip


def without(recipe, *keys):
    return {key: value for key, value in recipe.to_dict().items() if key not in keys}


def test_reference_b32_is_the_published_recipe_in_every_field():
    # a warm-up belongs to one_cycle alone, so its value does not matter here
    assert without(RECIPES["reference_b32"], "name", "warmup") == PUBLISHED


@pytest.mark.parametrize(("name", "key", "value"), [("b64", "batch_size", 64), ("b32_cosine", "schedule", "cosine")])
def test_the_other_references_differ_from_it_in_one_field(name, key, value):
    other = RECIPES[f"reference_{name}"]
    assert getattr(other, key) == value
    assert without(other, "name", key) == without(RECIPES["reference_b32"], "name", key)


@pytest.mark.parametrize(
    ("name", "promised"),
    [
        (
            "modern",
            {"backbone": "resnet50", "image_size": 128, "stem": "pretrained", "normalization": "imagenet",
             "schedule": "one_cycle", "nesterov": True, "head_lr_factor": 10, "epochs": 10, "validation": True},
        ),
        ("cpu", {"backbone": "efficientnet_lite0", "image_size": 192, "stem": "pretrained", "validation": True}),
        ("quick", {"backbone": "auto", "image_size": 112, "freeze": "early", "validation": True}),
        ("speedrun", {"backbone": "efficientnet_lite0"}),
        ("smoke", {"backbone": "auto", "image_size": 32, "train_images": 512}),
    ],
)  # fmt: skip
def test_named_recipes_are_what_their_table_says(name, promised):
    assert {key: getattr(RECIPES[name], key) for key in promised} == promised


def test_modern_smooths_labels_and_averages_weights_and_cpu_resizes_progressively():
    assert RECIPES["modern"].label_smoothing > 0
    assert RECIPES["modern"].ema_decay > 0
    sizes = RECIPES["cpu"].train_sizes
    assert list(sizes) == sorted(sizes)
    assert sizes[0] < sizes[-1] == RECIPES["cpu"].image_size


def test_no_recipe_lets_the_test_set_choose_and_only_references_log_it():
    assert all(recipe.validation for recipe in RECIPES.values() if recipe.select == "best")
    assert {name for name, recipe in RECIPES.items() if recipe.track_test} == {
        "reference_b32", "reference_b64", "reference_b32_cosine"
    }  # fmt: skip


def test_every_recipe_stands_under_its_own_name():
    assert all(name == recipe.name for name, recipe in RECIPES.items())


def test_the_three_forms_of_overrides_are_one():
    forms = [
        "epochs=1 lr=0.1 flip=false",
        ["epochs=1", "lr=0.1", "flip=false"],
        {"epochs": 1, "lr": 0.1, "flip": False},
    ]
    first, second, third = (get_recipe("quick", form) for form in forms)
    assert first == second == third
    assert (first.epochs, first.lr, first.flip) == (1, 0.1, False)
    assert get_recipe("quick", "") == get_recipe("quick", []) == get_recipe("quick", {}) == RECIPES["quick"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("epochs=3", 3), ("lr=1e-3", 1e-3), ("lr=1", 1.0), ("flip=False", False), ("nesterov=true", True),
        ("train_images=none", None), ("train_images=all", None), ("train_images=500", 500), ("last_stage=2", 2),
        ("last_stage=none", None), ("train_sizes=32,64", (32, 64)), ("train_sizes=(32, 64)", (32, 64)),
        ("train_sizes=none", ()), ("weights=none", "none"), ("weights='/a b/w.pt'", "/a b/w.pt"),
        ("weights=C:\\data\\w.pt", "C:\\data\\w.pt"), ("freeze=stage2", "stage2"), ("freeze=none", "none"),
    ],
)  # fmt: skip
def test_text_becomes_a_value_of_the_fields_type(text, value):
    key = text.partition("=")[0]
    form = [text, "backbone=resnet50"] if "(" in text else f"{text} backbone=resnet50"  # a space needs the list form
    parsed = getattr(get_recipe("smoke", form), key)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    "bad",
    [
        {"epochs": "two"}, {"epochs": 1.5}, {"epochs": "1.5"}, {"epochs": True}, {"epochs": None}, {"lr": "fast"},
        {"lr": "nan"}, {"lr": math.inf}, {"lr": True}, {"lr": []}, {"flip": "yes"}, {"flip": 1}, {"flip": None},
        {"train_sizes": "big"}, {"train_sizes": 64}, {"train_sizes": [64.5]}, {"weights": 3}, {"weights": None},
        {"train_images": "many"}, {"seed": "0x1"},
    ],
)  # fmt: skip
def test_a_value_of_the_wrong_type_is_refused_by_name(bad):
    key, value = next(iter(bad.items()))
    with pytest.raises(RecipeError) as caught:
        get_recipe("quick", bad)
    assert key in str(caught.value)
    assert repr(value) in str(caught.value) or "64.5" in str(caught.value)
    assert "is not" in str(caught.value)


@pytest.mark.parametrize("key", RANGES)
def test_a_value_out_of_range_is_refused_with_the_range(key):
    low, high = RANGES[key]
    for value in (low - 1, high + 1):
        with pytest.raises(RecipeError, match=key) as caught:
            get_recipe("modern", {key: value})
        assert str(low) in str(caught.value)
        assert str(high) in str(caught.value)


@pytest.mark.parametrize("key", CHOICES)
def test_a_value_that_is_no_choice_is_refused_with_the_choices(key):
    with pytest.raises(RecipeError) as caught:
        get_recipe("modern", {key: 9 if key == "last_stage" else "blue"})
    assert key in str(caught.value)
    assert all(str(choice).lower() in str(caught.value).lower() for choice in CHOICES[key])


@pytest.mark.parametrize(
    ("name", "overrides", "near"),
    [
        ("quik", "", "quick"), ("moderm", "", "modern"), ("reference_b46", "", "reference_b64"),
        ("quick", "epoch=1", "epochs"), ("quick", "learning_rate_factor=1", None),
        ("quick", "lr_head_factor=2", "head_lr_factor"),
        ("quick", "backbone=resnet5", "resnet50"), ("quick", "freeze=stages2", "stage2"),
        ("quick", "schedule=cosin", "cosine"),
    ],
)  # fmt: skip
def test_an_unknown_name_is_answered_with_the_nearest(name, overrides, near):
    with pytest.raises(RecipeError, match="choose from") as caught:
        get_recipe(name, overrides)
    assert near is None or f"did you mean '{near}'?" in str(caught.value)


def test_a_recipe_error_is_a_user_error_and_a_value_error():
    assert issubclass(RecipeError, CifarFtError)
    assert issubclass(RecipeError, ValueError)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("epochs", "no value"), ("epochs=1 epochs=2", "twice"), (["lr=1", "lr =2"], "twice"), ("lr='0.1", "quotation"),
        ("name=mine", "unknown recipe key"), ("momentum=0 nesterov=true", "nesterov"),
        ({"backbone": "efficientnet_lite0", "last_stage": 2}, "ResNets"),
        ({"backbone": "efficientnet_lite0", "max_pool": False}, "ResNets"),
        ({"train_sizes": (64,)}, "one size an epoch"), ({"train_sizes": (64, 8)}, "16 to 512"),
    ],
)  # fmt: skip
def test_overrides_that_make_no_sense_are_refused_with_the_reason(overrides, words):
    with pytest.raises(RecipeError, match=words):
        get_recipe("quick", overrides)


def test_select_best_needs_validation():
    with pytest.raises(RecipeError, match="never used to choose"):
        get_recipe("quick", "select=best validation=false")
    with pytest.raises(RecipeError, match="validation=true"):
        get_recipe("reference_b32", "select=best")
    assert get_recipe("quick", "select=best").select == "best"


def test_a_recipe_cannot_be_changed_in_place():
    with pytest.raises(ValidationError):
        RECIPES["quick"].epochs = 3


@given(epochs=st.integers(1, 40))
def test_train_sizes_stretch_with_the_epochs(epochs):
    recipe = RECIPES["cpu"]
    stretched = recipe.replace(epochs=epochs)
    assert len(stretched.train_sizes) == epochs
    assert stretched.train_sizes[-1] == recipe.train_sizes[-1] == recipe.image_size  # trained as it will be tested
    assert list(stretched.train_sizes) == sorted(stretched.train_sizes)
    for size in set(recipe.train_sizes):  # each size keeps its share of the epochs to within one
        share = recipe.train_sizes.count(size) / len(recipe.train_sizes)
        assert abs(stretched.train_sizes.count(size) - share * epochs) <= 1
    assert [stretched.size_at(epoch) for epoch in range(epochs)] == list(stretched.train_sizes)


def test_train_sizes_given_with_the_epochs_are_kept():
    assert get_recipe("cpu", "epochs=2 train_sizes=32,48").train_sizes == (32, 48)
    assert get_recipe("cpu", "train_sizes=none").size_at(0) == RECIPES["cpu"].image_size


def test_fewer_epochs_end_at_the_size_that_is_tested():
    assert get_recipe("quick", "epochs=1").train_sizes == (112,)
    assert get_recipe("speedrun", "epochs=2").train_sizes[-1] == RECIPES["speedrun"].image_size


@pytest.mark.parametrize("stem", ["cifar_random", "cifar_resampled"])
def test_a_new_stem_that_would_stay_frozen_is_refused(stem):
    with pytest.raises(RecipeError, match=f"stem={stem} is new and freeze=early would never train it; use freeze=none"):
        get_recipe("quick", {"stem": stem})


@pytest.mark.timeout(20)
@pytest.mark.parametrize("epochs", [0, -3, 10**12])
def test_an_impossible_number_of_epochs_is_refused_at_once(epochs):
    with pytest.raises(RecipeError, match="epochs"):
        get_recipe("cpu", {"epochs": epochs})


def a_value(key):
    """Strategy of the values that a field may have."""
    if key in CHOICES:
        return st.sampled_from(CHOICES[key])
    if key in RANGES:
        low, high = RANGES[key]
        optional = st.none() if key.endswith("_images") and key != "head_fit_images" else st.nothing()
        whole = FIELDS[key].annotation is not float
        return optional | (st.integers(low, high) if whole else st.floats(low, high, allow_nan=False))
    if key == "weights":
        return st.sampled_from(["none", "imagenet", "/models/my weights.pt", "C:\\w.pth", "it's.safetensors"])
    if key == "train_sizes":
        return st.just(())
    return st.booleans()


@st.composite
def recipes(draw):
    values = {key: draw(a_value(key)) for key in KEYS}
    values["validation"] |= values["select"] == "best"
    values["nesterov"] &= values["momentum"] > 0
    if values["stem"] != "pretrained":
        values["freeze"] = "none"
    if values["backbone"] == "efficientnet_lite0":
        values |= {"last_stage": None, "max_pool": True}
    if values["epochs"] <= 5 and draw(st.booleans()):
        values["train_sizes"] = tuple(draw(st.integers(16, 512)) for _ in range(values["epochs"]))
    return Recipe(draw(st.text(max_size=8)), **values)


@given(recipe=recipes())
def test_to_dict_and_from_dict_are_inverse_also_through_json(recipe):
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


@given(recipe=recipes())
def test_every_recipe_can_be_written_as_text_overrides(recipe):
    values = {key: getattr(recipe, key) for key in KEYS}
    words = [f"{key}={','.join(map(str, v)) if isinstance(v, tuple) else v}" for key, v in values.items()]
    assert get_recipe("quick", words).replace(name=recipe.name) == recipe
    assert get_recipe("quick", values).replace(name=recipe.name) == recipe
    line = " ".join(f'"{word}"' for word in words)
    assert get_recipe("quick", line).replace(name=recipe.name) == recipe


def test_from_dict_refuses_keys_it_does_not_know():
    with pytest.raises(RecipeError, match="did you mean 'epochs'"):
        Recipe.from_dict({**RECIPES["quick"].to_dict(), "epoch": 3})


texts = st.text() | st.from_regex(r"[\[\(]?[-+0-9.,e_ \\'\"]{0,12}[\]\)]?", fullmatch=True)


@settings(max_examples=300)
@given(name=st.sampled_from(list(RECIPES)), text=texts)
@example(name="cpu", text="epochs=99999999999")
@example(name="quick", text="lr=\x00")
@example(name="quick", text="seed=" + "9" * 5000)
def test_no_text_raises_anything_but_a_recipe_error(name, text):
    for form in (text, [text]):
        with contextlib.suppress(RecipeError):
            recipe = get_recipe(name, form)
            assert isinstance(recipe, Recipe)


@settings(max_examples=300)
@given(name=st.sampled_from(list(RECIPES)), key=st.sampled_from(KEYS), text=texts)
@example(name="cpu", key="train_sizes", text="-,")
def test_no_value_raises_anything_but_a_recipe_error(name, key, text):
    for form in ([f"{key}={text}"], {key: text}):
        with contextlib.suppress(RecipeError):
            recipe = get_recipe(name, form)
            assert Recipe.from_dict(recipe.to_dict()) == recipe


@given(name=st.text())
def test_no_recipe_name_raises_anything_but_a_recipe_error(name):
    if name not in RECIPES:
        with pytest.raises(RecipeError, match="choose from"):
            get_recipe(name)
