"""The same fine-tuning done with what a user would pick instead, one contender a process, timed and scored alike.

`python -m benchmarks.contenders NAME --out FILE.json` trains one of plain, timm, trainer, fastai and cifar_ft on a CPU.
All get the same images, ImageNet weights, input size, normalisation, batch size and number of passes; augmentation,
loss, optimiser and schedule are each library's defaults, and `--lr` replaces its learning rate. The clock covers the
training call alone. What trains from PIL images gets them ready made, before the clock starts.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer
from accelerate.utils import set_seed
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

from cifar_ft import CifarFtError, log, models, transforms
from cifar_ft.data import CLASSES, Cifar10, Split, load_cifar10
from cifar_ft.files import full_path
from cifar_ft.models import predict_logits
from cifar_ft.recipes import Recipe, get_recipe, parse_overrides
from cifar_ft.training import peak_memory_mb

WORKERS = 0  # loader processes; of 0 and 2, 0 was faster or as fast for every contender on two cores
TORCHVISION = "torchvision RandomCrop(32, padding=4), RandomHorizontalFlip, Resize, an image at a time"


@dataclass(frozen=True)
class Task:
    """What every contender is given; `recipe` holds input size, epochs, batch size, seed and normalisation."""

    data: Cifar10  # `train` is what may be trained on
    recipe: Recipe
    lr: float | None  # None: the contender's own default

    def pictures(self) -> list[Image.Image]:
        """The training images as PIL images."""
        return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in self.data.train.images]

    def model(self) -> nn.Module:
        """A new EfficientNet-Lite0 with ImageNet weights and ten classes, as cifar_ft builds it."""
        return models.build_model(self.recipe)


@dataclass(frozen=True)
class Trained:
    """What a contender gives back: `model` maps float images [B, 3, S, S] to logits [B, 10]."""

    model: nn.Module
    seconds: float  # of the training call
    lr: float
    settings: str
    precision: str = "fp32"


def mean_std(recipe: Recipe) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, for pixels in [0, 1]."""
    return transforms.NORMALIZATIONS[recipe.normalization]


class Pictures(Dataset):
    """PIL images with labels, each image transformed as it is asked for."""

    def __init__(self, task: Task, transform=None):
        self.images, self.labels, self.transform = task.pictures(), task.data.train.labels.tolist(), transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):
        return self.transform(self.images[index]), self.labels[index]


def torchvision_transform(task: Task):
    """Random crop, flip, resize and normalise, image by image."""
    from torchvision import transforms as tv

    size = (task.recipe.image_size, task.recipe.image_size)
    crop = [tv.RandomCrop(32, padding=4), tv.RandomHorizontalFlip()]
    return tv.Compose([*crop, tv.Resize(size), tv.ToTensor(), tv.Normalize(*mean_std(task.recipe))])


def plain(task: Task) -> Trained:
    """The loop of PyTorch's transfer learning tutorial, without its validation phase."""
    lr, batch_size = task.lr or 1e-3, task.recipe.batch_size
    pictures = Pictures(task, torchvision_transform(task))
    loader = DataLoader(pictures, batch_size=batch_size, shuffle=True, num_workers=WORKERS)
    model, criterion = task.model(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=7, gamma=0.1)

    seconds = _epochs(model, loader, criterion, optimizer, task.recipe.epochs, lambda epoch: scheduler.step())
    return Trained(model, seconds, lr, f"SGD momentum 0.9, StepLR(7, 0.1); {TORCHVISION}")


def timm(task: Task) -> Trained:
    """timm's loader, loss, optimiser and scheduler with the defaults of its train.py, but no warm-up."""
    from timm.data import create_loader
    from timm.loss import LabelSmoothingCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2

    recipe, (mean, std) = task.recipe, mean_std(task.recipe)
    lr, epochs = task.lr or 0.1 * recipe.batch_size / 256, recipe.epochs
    shape = {"input_size": (3, recipe.image_size, recipe.image_size), "mean": mean, "std": std}
    options = {"interpolation": "random", "num_workers": WORKERS, "device": torch.device("cpu")}
    loader = create_loader(Pictures(task), batch_size=recipe.batch_size, is_training=True, **shape, **options)
    model, criterion = task.model(), LabelSmoothingCrossEntropy(0.1)
    optimizer = create_optimizer_v2(model, opt="sgd", lr=lr, weight_decay=2e-5, momentum=0.9)
    scheduler, _ = create_scheduler_v2(optimizer, sched="cosine", num_epochs=epochs, warmup_epochs=0)

    seconds = _epochs(model, loader, criterion, optimizer, epochs, scheduler.step)
    text = "SGD Nesterov momentum 0.9, weight decay 2e-5, cosine by epoch, no warm-up, label smoothing 0.1"
    text += "; RandomResizedCrop(0.08, 1), flip, colour jitter 0.4; drops the last partial batch"
    return Trained(model, seconds, lr, text)


def _epochs(model: nn.Module, loader, criterion, optimizer, epochs: int, after_epoch) -> float:
    """Train on all batches `epochs` times, call `after_epoch(1)`, `after_epoch(2)`, ..., and give the seconds taken."""
    start = time.perf_counter()
    for epoch in range(epochs):
        model.train()
        for inputs, labels in loader:
            optimizer.zero_grad()
            loss = criterion(model(inputs), labels)
            loss.backward()
            optimizer.step()
        after_epoch(epoch + 1)
    return time.perf_counter() - start


def trainer(task: Task) -> Trained:
    """Hugging Face's Trainer with its default arguments."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    class ImageTrainer(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            logits = model(inputs["pixel_values"])
            loss = nn.functional.cross_entropy(logits, inputs["labels"])
            return (loss, {"logits": logits}) if return_outputs else loss

    recipe, lr = task.recipe, task.lr or 5e-5
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=recipe.batch_size, num_train_epochs=recipe.epochs, learning_rate=lr,
            seed=recipe.seed, dataloader_num_workers=WORKERS, remove_unused_columns=False, use_cpu=True,
            save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True,
        )  # fmt: skip
        pictures = Pictures(task, torchvision_transform(task))
        trainer = ImageTrainer(task.model(), arguments, data_collator=_collate, train_dataset=pictures)
        trainer.remove_callback(PrinterCallback)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    text = f"{arguments.optim.value}, linear decay, gradients clipped at {arguments.max_grad_norm:g}; {TORCHVISION}"
    return Trained(trainer.model, seconds, lr, text)


def fastai(task: Task) -> Trained:
    """fastai's vision_learner and fine_tune: one pass over the images with a frozen body, the others with all of it."""
    from fastai.vision.all import ImageDataLoaders, Normalize, Resize, aug_transforms, vision_learner

    recipe, lr = task.recipe, task.lr or 2e-3
    labels, size = task.data.train.labels.tolist(), Resize(recipe.image_size)
    tfms = [*aug_transforms(), Normalize.from_stats(*mean_std(task.recipe))]
    options = {"bs": recipe.batch_size, "num_workers": WORKERS, "device": torch.device("cpu")}
    loaders = ImageDataLoaders.from_lists(
        ".", task.pictures(), labels, valid_pct=0, item_tfms=size, batch_tfms=tfms, **options
    )
    weights = {"state_dict": task.model().state_dict()}
    learner = vision_learner(loaders, "tf_efficientnet_lite0", pretrained_cfg_overlay=weights)
    with learner.no_bar(), learner.no_logging():
        start = time.perf_counter()
        learner.fine_tune(recipe.epochs - 1, base_lr=lr)
        seconds = time.perf_counter() - start
    text = f"Adam, fine_tune({recipe.epochs - 1}): 1 frozen + {recipe.epochs - 1} whole passes, one-cycle"
    text += "; fastai's own head; aug_transforms() on batches, Resize an image; drops the last partial batch"
    return Trained(learner.model, seconds, lr, text)


def cifar_ft(task: Task) -> Trained:
    """The course's own `fit`, from building the model to the last file of the run."""
    from cifar_ft.predictions import Predictor
    from cifar_ft.training import fit

    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        run = fit(task.recipe, _unscored(task.data), Path(folder) / "run")
        seconds = time.perf_counter() - start
        model = Predictor.from_run(run.path).model
    default, used = get_recipe("quick").to_dict(), task.recipe.to_dict()
    skipped = ("image_size", "epochs", "batch_size", "seed", "lr", "backbone")
    changed = [f"{key}={used[key]}" for key in used if used[key] != default[key] and key not in skipped]
    text = f"recipe quick with {' '.join(changed)}"
    return Trained(model, seconds, task.recipe.lr, text, run.config["precision"])


CONTENDERS = {function.__name__: function for function in (plain, timm, trainer, fastai, cifar_ft)}
Name = Enum("Name", {name: name for name in CONTENDERS}, type=str)


def score(trained: Trained, split: Split, recipe: Recipe) -> float:
    """The share of a split that the model gets right: images resized and normalised, not cropped."""
    logits = predict_logits(trained.model, split, transforms.eval_transform(recipe))
    return (logits.argmax(1) == split.labels).double().mean().item()


def make_recipe(name: str, lr: float | None, settings: list[str], **options) -> Recipe:
    """`quick` for one size and the whole network. `settings` and `lr` change the recipe that cifar_ft trains."""
    changes = parse_overrides(settings)
    if changes and name != "cifar_ft":
        raise typer.BadParameter("--set changes settings of a recipe and is for cifar_ft alone; use --lr")
    if taken := sorted({*options, "lr", "backbone"} & set(changes)):
        raise typer.BadParameter(f"--set {taken[0]} is not possible; use the option of that name, if there is one")
    base = {"freeze": "none", "train_sizes": (), "backbone": "efficientnet_lite0", **options}
    return get_recipe("quick", {**base, **({"lr": lr} if lr and name == "cifar_ft" else {}), **changes})


def main(
    name: Annotated[Name, typer.Argument(help="What to train with.")],
    out: Annotated[Path, typer.Option(parser=full_path, help="JSON file to write.")],
    images: Annotated[int, typer.Option(help="Training images.")] = 10_000,
    size: Annotated[int, typer.Option(help="Input size in pixels.")] = 64,
    epochs: Annotated[int, typer.Option(help="Passes over the images.")] = 3,
    batch_size: int = 64,
    seed: int = 0,
    lr: Annotated[float | None, typer.Option(min=1e-8, help="Learning rate; default: the contender's own.")] = None,
    settings: Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="For cifar_ft's recipe.")] = (),
    test: Annotated[bool, typer.Option(help="Score the test images too, once tuning is over.")] = False,
) -> None:
    """Train one contender, score it and write what came out."""
    options = {"image_size": size, "epochs": epochs, "batch_size": batch_size, "seed": seed}
    recipe = make_recipe(name.value, lr, list(settings), **options)
    data = load_cifar10()
    set_seed(seed)
    trained = _train(name.value, Task(dataclasses.replace(data, train=data.train.subset(images)), recipe, lr))
    memory = peak_memory_mb()
    speed, val = images * epochs / trained.seconds, score(trained, data.val, recipe)
    text = f"{trained.settings}; {trained.precision}, num_workers {WORKERS}"
    result = {"name": name.value, "images": images, "size": size, "epochs": epochs, "batch_size": batch_size}
    result |= {"lr": trained.lr, "seed": seed, "train_seconds": trained.seconds, "images_per_second": speed}
    result |= {"val_accuracy": val, "test_accuracy": score(trained, data.test, recipe) if test else None}
    result |= {"peak_memory_mb": memory, "settings": text}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    line = f"{name.value} lr {trained.lr:g}: {speed:.0f} images/s, {trained.seconds:.1f} s, {memory:.0f} MB"
    typer.echo(f"{line}, validation {val:.2%}" + (f", test {result['test_accuracy']:.2%}" if test else ""))


def _train(name: str, task: Task) -> Trained:
    try:
        return CONTENDERS[name](task)
    except ModuleNotFoundError as error:
        raise CifarFtError(f"{error.name} is missing; pip install -r benchmarks/requirements.txt") from None


def _collate(batch) -> dict[str, torch.Tensor]:
    images, labels = zip(*batch, strict=True)
    return {"pixel_values": torch.stack(images), "labels": torch.tensor(labels)}


def _unscored(data: Cifar10) -> Cifar10:
    """The same training images with so few others that scoring them costs nothing."""
    first = torch.arange(len(CLASSES))
    return dataclasses.replace(data, val=data.val.take(first), test=data.test.take(first))


if __name__ == "__main__":
    log.setLevel("WARNING")  # what counts is said in one line at the end
    try:
        typer.run(main)
    except CifarFtError as error:
        sys.exit(f"Error: {error}")
