"""Keras: a CNN for digits from training to the report of its deployment.

python examples/keras_digits.py        needs keras, torch (its backend here) and onnxscript, fastbn[report]
"""

import os

os.environ["KERAS_BACKEND"] = "torch"  # the one that exports to ONNX

import logging
import warnings
from pathlib import Path

import keras
import numpy as np

import fastbn
import fastbn.keras

MODELS = Path(__file__).resolve().parents[1] / "tests" / "models"

with np.load(MODELS / "digits.npz") as digits:
    images, labels = digits["image"].reshape(-1, 28, 28, 1).astype(np.float32), digits["labels"]

keras.utils.set_random_seed(0)
model = keras.Sequential(
    [
        keras.layers.Input((28, 28, 1), name="image"),
        keras.layers.Conv2D(16, 3, activation="relu"),
        fastbn.keras.BatchNormalization(momentum=0.8),
        keras.layers.MaxPooling2D(2),
        keras.layers.Flatten(),
        keras.layers.Dense(10, activation="softmax"),
    ]
)
model.compile("adam", "sparse_categorical_crossentropy")
history = model.fit(images[:300], labels[:300], batch_size=50, epochs=5, verbose=0)
print(f"loss {history.history['loss'][0]:.2f} -> {history.history['loss'][-1]:.2f}")

logging.getLogger("torch.onnx").setLevel(logging.ERROR)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the exporter's own
    model.export("digits.onnx", format="onnx", verbose=False)

data = {"image": images[300:], "labels": labels[300:]}
made = fastbn.deploy("digits.onnx", "deployed.onnx", data=data, quantize=True, goal="size", report="report.html", runs=20, force=True)
print(made.decision)
