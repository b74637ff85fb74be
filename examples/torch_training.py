"""PyTorch on a CPU: train with fastbn's batch normalization, export, fold, and compare with the network.

python examples/torch_training.py
"""

import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

import fastbn.torch

MODELS = Path(__file__).resolve().parents[1] / "tests" / "models"

with np.load(MODELS / "digits.npz") as digits:
    images, labels = torch.from_numpy(digits["image"].reshape(-1, 1, 28, 28)).float(), torch.from_numpy(digits["labels"]).long()
train, test = slice(0, 300), slice(300, None)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * 14 * 14, 10)
    )


def fit(model, epochs=2):
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    began = time.perf_counter()
    for _ in range(epochs):
        for first in range(0, 300, 100):
            batch = slice(first, first + 100)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[train][batch]), labels[train][batch]).backward()
            optimizer.step()
    return time.perf_counter() - began


own, ours = network(), network()
fastbn.torch.convert(ours)  # the one line: weights, buffers, hooks and optimizers stay
for name, model in (("torch's own", own), ("fastbn's", ours)):
    seconds = fit(model)
    model.eval()
    with torch.no_grad():
        right = (model(images[test]).argmax(dim=1) == labels[test]).float().mean()
    print(f"{name:12} {right:.3f} right, {seconds:.2f} s")

fastbn.torch.convert(ours, back=True)  # a plain network again, for whoever has no fastbn
torch.save(ours.state_dict(), "digits.pt")
