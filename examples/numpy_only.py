"""NumPy only: train a small network with fastbn.BatchNorm, save its state, and fold the normalization into the weights.

python examples/numpy_only.py
"""

from pathlib import Path

import numpy as np

import fastbn

MODELS = Path(__file__).resolve().parents[1] / "tests" / "models"

with np.load(MODELS / "digits.npz") as digits:
    images = digits["image"].reshape(360, -1).astype(np.float32)
    labels = digits["labels"]
train, test = slice(0, 300), slice(300, None)

random = np.random.default_rng(0)
hidden = random.normal(0, 0.05, (64, images.shape[1])).astype(np.float32)
output = random.normal(0, 0.1, (10, 64)).astype(np.float32)
norm = fastbn.BatchNorm(64, activation="relu")


def probabilities(scores):
    scores = np.exp(scores - scores.max(axis=1, keepdims=True))
    return scores / scores.sum(axis=1, keepdims=True)


for _ in range(30):
    x = images[train]
    z = norm(x @ hidden.T)
    p = probabilities(z @ output.T)
    gradient = (p - np.eye(10, dtype=np.float32)[labels[train]]) / len(p)
    dx, dweight, dbias = norm.backward((gradient @ output).astype(np.float32))
    output -= gradient.T @ z
    hidden -= dx.T @ x
    norm.weight -= dweight
    norm.bias -= dbias

norm.eval()
scores = norm(images[test] @ hidden.T) @ output.T
print(f"accuracy {np.mean(scores.argmax(axis=1) == labels[test]):.3f}")
np.savez("norm.npz", **norm.state_dict())

# In inference the layer is an affine: it goes into the weights, and a product with the images is all that is left.
weight, bias = fastbn.fold_linear(hidden, None, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
folded = np.maximum(images[test] @ weight.T + bias, 0) @ output.T
print(f"folded into the weights, the scores differ by {np.abs(folded - scores).max() / np.abs(scores).max():.0e} of the largest")
