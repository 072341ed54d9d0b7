"""Promises of `predictions.explanations`: maps lie where the evidence is, neighbours are near, models stay as is."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import nn

from cifar_ft.data import CLASSES, Split
from cifar_ft.models import build_model, stages
from cifar_ft.predictions import (
    ExplanationError,
    FeatureBank,
    ImageError,
    Predictor,
    explanations,
    grad_cam,
    occlusion,
    overlay,
    sensitivity,
    square,
    variants,
)
from cifar_ft.recipes import get_recipe
from cifar_ft.transforms import eval_transform

pytestmark = pytest.mark.usefixtures("one_thread")
SHIP, CAT = CLASSES.index("ship"), CLASSES.index("cat")
RECIPE = get_recipe("smoke", "weights=none backbone=resnet18 last_stage=2 image_size=64 freeze=early")


class Colours(nn.Module):
    """Red patches speak for a ship and green ones for a cat; the parts have a ResNet's names."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 2, 4, stride=4, bias=False), nn.Identity()
        self.layer1, self.fc = nn.Sequential(nn.ReLU(inplace=True)), nn.Linear(2, 10, bias=False)
        self.layer2, self.layer3, self.layer4 = nn.Identity(), nn.Identity(), nn.Identity()
        with torch.no_grad():
            self.conv1.weight.zero_()
            self.fc.weight.zero_()
            self.conv1.weight[0, 0] = self.conv1.weight[1, 1] = self.fc.weight[SHIP, 0] = self.fc.weight[CAT, 1] = 1

    def forward(self, images):
        return self.fc(self.layer1(self.bn1(self.conv1(images))).mean((2, 3)))


@pytest.fixture(scope="module")
def colours():
    return Predictor(Colours(), get_recipe("smoke", "weights=none backbone=resnet18 image_size=32"), "a rule")


@pytest.fixture(scope="module")
def predictor():
    return Predictor(build_model(RECIPE), RECIPE, "a random model")


@pytest.fixture
def corners():
    """Black, with a large red square in the upper left and a small green one in the lower right: uint8 [3, 32, 32]."""
    picture = torch.zeros(3, 32, 32, dtype=torch.uint8)
    picture[0, :12, :12] = 255
    picture[1, 24:, 24:] = 255
    return picture


def state_of(model):
    """Everything that an explanation might leave changed."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return (
        [module.training for module in model.modules()],
        [len(getattr(module, name)) for module in model.modules() for name in hooks],
        [p.requires_grad for p in model.parameters()],
        [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
        {name: values.tolist() for name, values in model.state_dict().items()},
    )


def test_the_map_is_highest_where_the_evidence_of_the_class_lies(colours, corners):
    ship, cat = grad_cam(colours, corners, "ship"), grad_cam(colours, corners, CAT)
    assert ship.shape == cat.shape == (32, 32)
    assert ship.dtype == np.float32
    assert ship.min() == cat.min() == 0
    assert ship[2:10, 2:10].min() > 0.9 * ship.max() > 0
    assert ship[16:, 16:].max() == 0
    assert cat[28:, 28:].min() > 0.9 * cat.max() > 0
    assert cat[:16, :16].max() == 0


def test_the_maps_of_all_classes_of_a_picture_have_one_scale(colours, corners):
    """Each place of a map is what it adds to the logit: less green is less heat."""
    corners[1] //= 2
    ship, cat = grad_cam(colours, corners, "ship"), grad_cam(colours, corners, "cat")
    assert 0 < cat.max() < 0.5 * ship.max()
    with torch.inference_mode():
        logits = colours.model(eval_transform(colours.recipe)(corners[None]))[0]
    assert ship.mean() * 64 == pytest.approx(logits[SHIP].item(), rel=0.05)  # 8 x 8 places
    cold, hot = (overlay(corners, cat, highest=highest)[30, 30].astype(int) for highest in (ship.max(), None))
    assert hot[0] > cold[0] + 20


def test_a_padded_picture_is_explained_as_it_is_predicted(colours):
    wide = torch.zeros(3, 32, 96, dtype=torch.uint8)
    wide[0, :, :16] = 255  # red at the left edge, which only the padded picture shows
    heat = grad_cam(colours, wide, "ship", fit="pad")
    assert heat[11:21, :5].mean() > 0.5 * heat.max() > heat[:, 16:].max()
    assert not grad_cam(colours, wide, "ship").any()
    assert overlay(wide, heat, fit="pad").shape == (96, 96, 3)
    assert torch.equal(variants(wide, fit="pad")["unchanged"], square(wide, "pad"))


def test_without_a_target_the_predicted_class_is_explained(colours, corners):
    assert colours.predict(corners)[0].label == "ship"
    np.testing.assert_array_equal(grad_cam(colours, corners), grad_cam(colours, corners, "ship"))
    more_green = corners[[1, 0, 2]]  # the colours of the two squares exchanged
    assert colours.predict(more_green)[0].label == "cat"
    heat, red = grad_cam(colours, more_green), grad_cam(colours, corners, "ship")
    np.testing.assert_allclose(heat / heat.max(), red / red.max(), atol=1e-6)


def test_a_mirrored_picture_has_the_mirrored_map(colours, corners):
    heat, mirrored = grad_cam(colours, corners, "cat"), grad_cam(colours, corners.flip(2), "cat")
    np.testing.assert_allclose(mirrored, heat[:, ::-1], atol=1e-6)
    assert np.abs(mirrored - heat).max() > 0.9 * heat.max()


def test_the_map_is_the_logit_place_by_place(predictor, samples):
    """After the last stage come only an average and the head, so that the map can be had without gradients."""
    seen = []
    handle = stages(predictor.model)["stage2"][-1].register_forward_hook(lambda *given: seen.append(given[2]))
    predictor.predict(samples.images[7])
    handle.remove()
    shown = 0
    for target, name in enumerate(CLASSES):
        places = (seen[0][0] * predictor.model.fc.weight.detach()[target][:, None, None]).sum(0).relu()
        places /= places.numel()
        heat = F.interpolate(places[None, None], (32, 32), mode="bilinear", align_corners=False)[0, 0]
        shown += bool(heat.any())
        np.testing.assert_allclose(grad_cam(predictor, samples.images[7], name), heat, rtol=1e-3, atol=1e-7)
    assert shown >= 3


def test_a_map_that_is_the_same_everywhere_stays_so(colours, samples):
    black, white = (torch.full((3, 32, 32), value, dtype=torch.uint8) for value in (0, 255))
    assert not grad_cam(colours, black, "ship").any()
    heat = grad_cam(colours, white, "ship")
    assert heat.min() > 0
    np.testing.assert_allclose(heat, heat[0, 0], rtol=1e-5)
    assert len(np.unique(overlay(white, heat).reshape(-1, 3), axis=0)) == 1  # no difference is made up


def test_occlusion_is_what_covering_a_place_takes_from_the_logit(colours, corners):
    def logit(picture):
        with torch.inference_mode():
            return colours.model(eval_transform(colours.recipe)(picture[None]))[0, SHIP].item()

    fall = occlusion(colours, corners, "ship")
    assert fall.shape == (32, 32)
    assert fall.dtype == np.float32
    covered = corners.clone()
    covered[:, :8, :8] = corners.float().mean((1, 2)).round().byte()[:, None, None]
    assert fall[0, 0] == pytest.approx(logit(corners) - logit(covered), rel=1e-4)  # the only square on that corner
    assert fall[0, 0] == fall.max() > 0
    assert fall[20, 4] == 0
    red = torch.zeros_like(corners)
    red[0, :, 8:] = 255
    assert occlusion(colours, red, "ship")[16, 3] < 0  # black there, and the mean colour has much red
    whole = occlusion(colours, corners, "ship", side=32)
    np.testing.assert_allclose(whole, whole[0, 0])
    for side in (1, 33, True, 8.0):
        with pytest.raises(ExplanationError, match="choose 2 to 32 pixels"):
            occlusion(colours, corners, side=side)


@pytest.mark.parametrize("learning", [False, True])
def test_an_explanation_leaves_the_model_as_it_was_and_does_not_depend_on_it(predictor, samples, learning):
    image = samples.images[3]
    reference, answers = grad_cam(predictor, image, "dog"), sensitivity(predictor, image)
    other = Predictor(build_model(RECIPE), RECIPE, "the same model, otherwise")
    for i, parameter in enumerate(other.model.parameters()):
        parameter.requires_grad_(learning and i % 2 == 0)
        parameter.grad = torch.full_like(parameter, 3.0) if parameter.requires_grad else None
    for i, module in enumerate(other.model.modules()):
        module.training = learning and i % 3 > 0
    before = state_of(other.model)
    np.testing.assert_allclose(grad_cam(other, image, "dog"), reference, atol=1e-5)
    np.testing.assert_allclose(sensitivity(other, image).probability, answers.probability, atol=1e-5)
    FeatureBank(other, samples.take(torch.arange(5))).nearest(image)
    with torch.no_grad():
        np.testing.assert_allclose(grad_cam(other, image, "dog"), reference, atol=1e-5)
    assert state_of(other.model) == before


def test_hooks_and_modes_are_put_back_when_an_explanation_fails(samples):
    model = build_model(RECIPE)
    predictor = Predictor(model, RECIPE, "a broken model")
    model.fc.weight.data[:] = torch.nan
    with pytest.raises(ExplanationError, match="a broken model gives values that are not finite"):
        grad_cam(predictor, samples.images[0], "cat")
    model.fc = nn.Linear(3, 10)  # does not fit what comes before it
    before = state_of(model)[:4]
    with pytest.raises(RuntimeError):
        grad_cam(predictor, samples.images[0], "cat")
    assert state_of(model)[:4] == before


def test_an_earlier_stage_has_a_finer_map(predictor, samples):
    def places(heat):  # corners of the enlarged map, where its slope changes
        return int((np.abs(np.diff(heat, 2)) > 1e-4).sum())

    last, early = (grad_cam(predictor, samples.images[0], stage=stage) for stage in (None, "stage1"))
    assert last.any()
    coarse, fine = last / last.max(), early / early.max()
    np.testing.assert_array_equal(last, grad_cam(predictor, samples.images[0], stage="stage2"))
    assert places(fine) > places(coarse)


@pytest.mark.parametrize("target", ["lorry", 10, -1, True, 2.0, None])
def test_an_unknown_class_or_stage_is_refused_with_what_is_allowed(predictor, samples, target):
    if target is None:
        with pytest.raises(ExplanationError, match=r"unknown stage 'head'; choose from stem, stage1, stage2$"):
            grad_cam(predictor, samples.images[0], stage="head")
    else:
        with pytest.raises(ExplanationError, match=r"unknown class .*choose from airplane, .*truck, or 0 to 9"):
            grad_cam(predictor, samples.images[0], target)


def test_pictures_of_any_kind_are_explained_as_they_are_predicted(colours, corners, tmp_path):
    from PIL import Image

    large = corners.repeat_interleave(5, 1).repeat_interleave(5, 2)
    wide = F.pad(large, (40, 40))  # black bars that the square leaves out
    Image.fromarray(wide.permute(1, 2, 0).numpy()).save(tmp_path / "wide.png")
    heat = grad_cam(colours, corners, "ship")
    np.testing.assert_allclose(grad_cam(colours, tmp_path / "wide.png", "ship"), heat, atol=0.15 * heat.max())
    for explain in (grad_cam, occlusion, sensitivity):
        with pytest.raises(ImageError, match="there is no file"):
            explain(colours, tmp_path / "none.png")


def test_the_maps_of_the_shipped_model_lie_where_covering_the_picture_hurts(shipped, samples):
    agreement = []
    for image in samples.images[::20]:
        heat, fall = grad_cam(shipped, image), occlusion(shipped, image, side=16)
        agreement.append(spearmanr(heat.ravel(), fall.ravel()).statistic)
    assert np.mean(agreement) > 0.1  # a map without meaning has 0
    image = samples.images[0]
    np.testing.assert_array_equal(grad_cam(shipped, image), grad_cam(shipped, image, stage="top"))


def test_the_overlay_shows_the_heat_in_blue_and_yellow_and_the_picture_below(corners):
    heat = np.zeros((32, 32), np.float32)
    heat[:, 16:] = 1
    picture = torch.full((3, 32, 32), 128, dtype=torch.uint8)
    picture[:, :8] = 200
    shown = overlay(picture, heat).astype(int)
    assert overlay(picture, heat).dtype == np.uint8
    assert shown.shape == (32, 32, 3)
    cold, hot = shown[20, 2], shown[20, -2]
    assert cold[2] > cold[0] + 20  # blue
    assert hot[0] > hot[2] + 50  # yellow
    assert hot.sum() > cold.sum() + 100  # and brighter, for eyes that see no colours
    assert (shown[2, ::8].sum(1) > shown[20, ::8].sum(1) + 60).all()  # the bright band of the picture, under both


def test_an_overlay_with_black_bars_takes_no_more_than_its_picture_could():
    long = torch.full((3, 60_000, 1), 255, dtype=torch.uint8)
    shown = overlay(long, np.zeros((4, 4)), fit="pad")
    assert shown.shape == (2048, 2048, 3)
    assert (shown[:, 1023] > shown[:, 0]).all()  # the picture, in the middle


def test_the_overlay_has_the_middle_square_of_the_picture_and_refuses_what_is_no_map():
    wide = torch.zeros(3, 40, 90, dtype=torch.uint8)
    wide[:, :, 25:65] = 255
    shown = overlay(wide, np.zeros((4, 4)))
    assert shown.shape == (40, 40, 3)
    assert len(np.unique(shown.reshape(-1, 3), axis=0)) == 1  # white below, all of it
    for bad in (np.full((4, 4), -0.5), np.full((4, 4), np.nan), np.zeros((4, 4, 3)), np.zeros((0, 4))):
        with pytest.raises(ExplanationError, match=r"not a map \[h, w\] of finite values, 0 or more"):
            overlay(wide, bad)
    for highest in (-1.0, np.nan):
        with pytest.raises(ExplanationError, match="give the heat to be drawn yellow"):
            overlay(wide, np.zeros((4, 4)), highest=highest)


@pytest.fixture(scope="module")
def bank(predictor, samples):
    return FeatureBank(predictor, samples)


def test_a_picture_of_the_bank_is_its_own_nearest_with_similarity_1(bank, samples):
    for position in (0, 57, 199):
        found = bank.nearest(samples.images[position], k=3)
        assert list(found.columns) == ["position", "index", "label", "similarity"]
        first = found.iloc[0]
        assert first.position == position
        assert first["index"] == samples.indices[position]
        assert first.label == CLASSES[samples.labels[position]]
        assert first.similarity == pytest.approx(1, abs=1e-3)
        assert found.similarity.is_monotonic_decreasing
        assert found.similarity[1] < first.similarity


def test_neighbours_are_those_of_the_cosine_of_what_enters_the_head(bank, predictor, samples):
    with torch.inference_mode():
        given = []
        handle = predictor.model.avgpool.register_forward_hook(lambda *call: given.append(call[2].flatten(1)))
        predictor.model.eval()(eval_transform(RECIPE)(samples.images))
        handle.remove()
    cosine = F.cosine_similarity(given[0][20:21].double(), given[0].double())
    found = bank.nearest(samples.images[20], k=200)
    assert sorted(found.position) == list(range(200))
    np.testing.assert_allclose(found.similarity, cosine[found.position.to_numpy()], atol=1e-3)


def test_the_bank_does_not_depend_on_how_many_pictures_are_computed_and_compared_at_a_time(
    bank, predictor, samples, monkeypatch
):
    whole = bank.nearest(samples.images[9], k=20)
    monkeypatch.setattr(explanations, "BATCH", 7)
    monkeypatch.setattr(explanations, "ROWS", 13)
    other = FeatureBank(predictor, samples)
    assert len(other) == 200
    assert other.features.dtype == torch.float16
    assert other.features.shape == (200, 128)
    np.testing.assert_allclose(other.features.float(), bank.features.float(), atol=1e-3)
    pd.testing.assert_frame_equal(bank.nearest(samples.images[9], k=20), whole)  # products of parts may round apart


def test_a_bank_refuses_what_it_cannot_give(bank, predictor, samples):
    for k in (0, 201, True, 1.5):
        with pytest.raises(ExplanationError, match="choose 1 to 200"):
            bank.nearest(samples.images[0], k)
    empty = Split(samples.images[:0], samples.labels[:0])
    with pytest.raises(ExplanationError, match="no pictures in this split"):
        FeatureBank(predictor, empty)


def test_the_variants_are_what_they_are_called(corners):
    made = variants(corners)
    assert all(picture.shape == (3, 32, 32) and picture.dtype == torch.uint8 for picture in made.values())
    assert torch.equal(made["unchanged"], corners)
    assert torch.equal(made["4 pixels right"][:, :, 4:], corners[:, :, :-4])
    assert not made["4 pixels right"][:, :, :4].any()
    assert torch.equal(made["2 pixels left"][:, :, :-2], corners[:, :, 2:])
    assert torch.equal(made["2 pixels up"][:, :-2], corners[:, 2:])
    assert torch.equal(made["4 pixels down"][:, 4:], corners[:, :-4])
    assert torch.equal(made["mirrored"], corners.flip(2))
    red, green = (made[name].float().flatten(1).sum(1)[:2].tolist() for name in ("zoomed in by 4/3", "unchanged"))
    assert red[0] == pytest.approx(64 * 255 * 16 / 9, rel=0.1)  # 8 x 8 of 12 x 12 red pixels, enlarged
    assert green[0] == 144 * 255
    assert not made["zoomed out by 4/5"][:, :3].any()
    assert made["blurred, 0.5 pixels"][0, 0, 12] < made["blurred, 1.0 pixels"][0, 0, 13] * 10
    assert made["blurred, 1.0 pixels"][0, 0, 13] > made["blurred, 0.5 pixels"][0, 0, 13]
    assert made["darker, x 0.6"].max() == 153
    assert made["grey"][:, 0, 0].tolist() == [85, 85, 85]
    mild = torch.full((3, 32, 32), 100, dtype=torch.uint8)
    assert variants(mild)["brighter, x 1.5"].unique().tolist() == [150]


def test_sensitivity_tells_the_probability_of_the_first_answer_under_each_change(predictor, samples):
    image = samples.images[11]
    found = sensitivity(predictor, image)
    assert list(found.columns) == ["change", "label", "probability", "difference"]
    assert found.change.tolist() == list(variants(image))
    (answer,) = predictor.predict(image)
    assert found.label[0] == answer.label
    assert found.probability[0] == pytest.approx(answer.probability, abs=1e-5)
    assert found.difference[0] == 0
    assert found.difference[1:].abs().max() > 1e-6
    for row in found.itertuples():
        (now,) = predictor.predict(variants(image)[row.change])
        assert row.label == now.label
        assert row.probability == pytest.approx(now.probabilities[answer.label], abs=1e-5)
        assert row.difference == pytest.approx(row.probability - answer.probability, abs=2e-5)


def test_sensitivity_finds_the_change_that_matters_and_not_the_others(colours):
    """The rule sees colours alone: without them ship and cat are level, and mirroring changes nothing."""
    picture = torch.zeros(3, 32, 32, dtype=torch.uint8)
    picture[0, 8:24, 8:24] = 255
    found = sensitivity(colours, picture).set_index("change")
    assert found.label["unchanged"] == "ship"
    assert found.difference.idxmin() == "grey"
    assert found.difference["grey"] < -0.1
    for change in ("mirrored", "4 pixels left", "4 pixels down"):
        assert found.difference[change] == pytest.approx(0, abs=1e-6)
    assert found.difference["zoomed in by 4/3"] > 0  # more red
    assert found.difference["darker, x 0.6"] < 0
