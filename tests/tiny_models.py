"""Models that are built quickly, and what tests compare of them."""

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from cifar_ft.models import build_model, create_backbone, cut
from cifar_ft.recipes import get_recipe


def recipe(**overrides):
    return get_recipe("smoke", {"backbone": "resnet18", "weights": "none", **overrides})


def build(**overrides):
    return build_model(recipe(**overrides))


def v1_file(path):
    """Write random weights of a ResNet-50 up to stage 2 that were made for the strides of 2015; return the path."""
    state = cut(create_backbone("resnet50", "v1"), 2).state_dict()
    save_file({name: state[name] for name in state if not name.startswith("fc")}, path, {"strides": "v1"})
    return path


def copied(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def moved(before, model, prefixes=("",)):
    """Names of tensors under the prefixes that are no longer bit for bit what they were."""
    after = model.state_dict()
    return {name for name in before if name.startswith(tuple(prefixes)) and not torch.equal(before[name], after[name])}


def numel(module):
    return sum(p.numel() for p in module.parameters())


def train_steps(model, steps=1, size=32, only=None):
    """Real steps of SGD with weight decay, after `model.train()`."""
    model.train()
    parameters = [p for p in model.parameters() if only is None or p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        images = torch.randn(8, 3, size, size, generator=generator) * 2 + 1
        optimizer.zero_grad()
        F.cross_entropy(model(images), torch.arange(8)).backward()
        optimizer.step()
