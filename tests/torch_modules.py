"""What tests of fastbn.torch share: tensors, torch's module and ours in the same state, one step, a small network."""

import copy

import numpy as np
import torch
from torch import nn

from fastbn.torch import convert


def tensor(shape, seed=0, dtype=torch.float32, mean=0.5):
    return (torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)) + mean).to(dtype)


def pair(kind, channels=6, **options):
    """torch's module and ours in the same state."""
    theirs = kind(channels, **options)
    with torch.no_grad():
        for seed, parameter in enumerate(theirs.parameters()):
            parameter.copy_(tensor(channels, seed))
    return theirs, convert(copy.deepcopy(theirs))


def step(module, x, dy):
    """y and every gradient of one pass, by name."""
    x = x.detach().requires_grad_()
    y = module(x)
    gradients = torch.autograd.grad(y, [x, *module.parameters()], dy)
    return {"y": y.detach(), "dx": gradients[0]} | {
        f"d{name}": got for (name, _), got in zip(module.named_parameters(), gradients[1:], strict=True)
    }


def assert_same(got, want, **tolerance):
    assert list(got) == list(want)
    for name in want:
        torch.testing.assert_close(got[name], want[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 5), nn.BatchNorm1d(5)
    )
