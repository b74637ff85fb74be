#!/usr/bin/env python3
"""Train the two CNNs on handwritten digits with fastbn's layers and with the frameworks' own, export both to ONNX, fold, compare.

    python tools/train_cnns.py [--out DIR] [--seeds 5] [--epochs 10] [--net torch] [--net keras]

needs torch, keras, scikit-learn and onnxscript beside fastbn[onnx]; Keras runs on its torch backend unless KERAS_BACKEND says otherwise,
and only that exports. The data are scikit-learn's 1797 digits (8x8, values 0 to 16, from the UCI test set of optical recognition of
handwritten digits), enlarged to 28x28 bilinearly and divided by 16; the same 360 are held out every time. Each training starts from the
same weights and sees the same batches in the same order with either kind of layers.

DIR receives torch_digits.onnx, keras_digits.onnx, the same folded, digits.npz (the held-out digits as the networks take them, and their
labels) and digits_predicted.npz (what the two networks said about them before they were exported).
"""

import argparse
import logging
import os
import sys
import warnings
from pathlib import Path

import numpy as np

__all__ = ["HELD_OUT", "digits", "enlarge", "keras_net", "predictions", "torch_net", "train_keras", "train_torch"]

HELD_OUT = 360
BATCH = 128


def enlarge(images):
    """Return digits of shape (N, 8, 8) and values 0 to 16 as float32 of shape (N, 28, 28) and values 0 to 1.

    Bilinear: pixel i of 28 lies at (i + 1/2) * 8/28 - 1/2 of the 8, the edge pixels go on outwards.
    """
    at = np.clip((np.arange(28) + 0.5) * 8 / 28 - 0.5, 0, 7)
    weights = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(8)))
    return (weights @ (images / 16) @ weights.T).astype(np.float32)


def digits():
    """Return (images, labels) to train on, and those held out: always the same, images as uint8 of shape (N, 8, 8)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images, labels = digits.images.astype(np.uint8)[order], digits.target[order]
    return (images[HELD_OUT:], labels[HELD_OUT:]), (images[:HELD_OUT], labels[:HELD_OUT])


# ---- PyTorch ----


def torch_net(ours, seed):
    """Return the PyTorch network with weights of that seed."""
    import torch
    from torch import nn

    import fastbn.torch

    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.MaxPool2d(2, 2),
        nn.Flatten(),
        nn.Linear(32 * 14 * 14, 10),
    )
    return fastbn.torch.convert(net) if ours else net


def train_torch(net, images, labels, seed, epochs, report):
    """Train with Adam on the cross-entropy, batches of 128."""
    import torch

    inputs, targets = torch.from_numpy(images[:, None]), torch.from_numpy(labels)
    optimizer, loss_of = torch.optim.Adam(net.parameters()), torch.nn.CrossEntropyLoss()
    generator = torch.Generator().manual_seed(seed)
    net.train()
    for epoch in range(epochs):
        losses = []
        for batch in torch.randperm(len(targets), generator=generator).split(BATCH):
            optimizer.zero_grad()
            loss = loss_of(net(inputs[batch]), targets[batch])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        report(epoch, np.mean(losses))
    return net.eval()


def torch_says(net, images):
    """Return the class of each image."""
    import torch

    with torch.no_grad():
        return net(torch.from_numpy(images[:, None])).argmax(1).numpy()


def export_torch(net, path):
    """Write the network as ONNX, for batches of any size."""
    import torch

    # Without the exporter's optimizer, which would fold a BatchNormalization that follows a Conv itself.
    _export(net, torch.zeros(2, 1, 28, 28), ({0: torch.export.Dim("batch")},), path, "logits", optimize=False)


def _export(net, example, dynamic_shapes, path, output, optimize):
    import torch

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it would warn of packages that nothing here needs
    options = {"dynamic_shapes": dynamic_shapes, "input_names": ["image"], "output_names": [output], "optimize": optimize}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        proto = torch.onnx.export(net.eval(), (example,), dynamo=True, verbose=False, **options).model_proto
    for node in proto.graph.node:
        node.ClearField("metadata_props")  # stack traces, which name folders of this machine
    path.write_bytes(proto.SerializeToString(deterministic=True))


# ---- Keras ----


def keras_net(ours, seed):
    """Return the Keras network with weights of that seed."""
    import keras
    from keras import layers

    import fastbn.keras

    keras.utils.set_random_seed(seed)
    net = keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Conv2D(32, (3, 3), activation="relu"),
            layers.BatchNormalization(axis=-1, momentum=0.9, epsilon=1e-5),
            layers.MaxPooling2D((2, 2)),
            layers.Flatten(),
            layers.Dense(10, activation="softmax"),
        ]
    )
    return fastbn.keras.convert(net) if ours else net


def train_keras(net, images, labels, seed, epochs, report):
    """Train with Adam on the sparse categorical cross-entropy, batches of 128."""
    import keras

    keras.utils.set_random_seed(seed)
    net.compile(optimizer="adam", loss="sparse_categorical_crossentropy")
    progress = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: report(epoch, logs["loss"]))
    net.fit(images[..., None], labels, batch_size=BATCH, epochs=epochs, verbose=0, callbacks=[progress])
    return net


def keras_says(net, images):
    """Return the class of each image."""
    return net.predict(images[..., None], verbose=0).argmax(1)


def export_keras(net, path):
    """Write the network as ONNX, for batches of any size; only the torch backend can."""
    import torch

    _export(net, torch.zeros(2, 28, 28, 1), (({0: torch.export.Dim("batch")},),), path, "probabilities", optimize=True)


# ---- both ----

NETS = {
    "torch": (torch_net, train_torch, torch_says, export_torch),
    "keras": (keras_net, train_keras, keras_says, export_keras),
}


def predictions(path, images):
    """Return what an exported network says in onnxruntime: the class of each image."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    channels_last = session.get_inputs()[0].shape[-1] == 1
    (scores,) = session.run(None, {"image": images[..., None] if channels_last else images[:, None]})
    return scores.argmax(1)


def progress(title, epochs):
    """Return a function that shows an epoch and its loss, in one line of a terminal."""

    def report(epoch, loss):
        last = epoch + 1 == epochs
        if sys.stderr.isatty():
            print(f"\r{title}  epoch {epoch + 1:2}/{epochs}  loss {loss:.4f}", end="\n" if last else "", file=sys.stderr, flush=True)
        elif last or epoch % 5 == 0:
            print(f"{title}  epoch {epoch + 1:2}/{epochs}  loss {loss:.4f}", file=sys.stderr, flush=True)

    return report


def trained(name, seeds, epochs, data, held_out):
    """Train one network with both kinds of layers and print the accuracies; return the first one with ours."""
    make, train, says, _ = NETS[name]
    first = None
    for ours in (True, False):
        kind = "fastbn" if ours else "own"
        accuracies = []
        for seed in range(seeds):
            net = train(make(ours, seed), *data, seed, epochs, progress(f"{name:5}  {kind:6}  seed {seed}", epochs))
            accuracies.append(100 * np.mean(says(net, held_out[0]) == held_out[1]))
            first = first or net
        each = " ".join(f"{accuracy:.2f}" for accuracy in accuracies)
        spread = f"mean {np.mean(accuracies):.2f}, {min(accuracies):.2f} to {max(accuracies):.2f}"
        print(f"{name:5}  BN: {kind:6}  held-out accuracy in %: {each}   {spread}", flush=True)
    return first


def folded(name, net, folder, images):
    """Export and fold a network and compare what each form says; return what the network itself said."""
    import fastbn

    *_, says, export = NETS[name]
    path = folder / f"{name}_digits.onnx"
    export(net, path)
    result = fastbn.fold(path)
    print(result, flush=True)
    result.save(folder / f"{name}_digits.folded.onnx")
    said = says(net, images)
    forms = {"exported": predictions(path, images), "folded": predictions(folder / f"{name}_digits.folded.onnx", images)}
    same = {form: int((labels == said).sum()) for form, labels in forms.items()}
    print(f"the same class as in training: {', '.join(f'{form} {count}' for form, count in same.items())} of {len(said)} held-out digits")
    counts = result.to_dict()["batch_normalizations"]
    if counts != {"before": 1, "after": 0} or not result.parity.ok or min(same.values()) < len(said):
        raise SystemExit(f"{name}: expected 1 BatchNormalization to go, with parity and the same classes")
    return said


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("digits"), metavar="DIR", help="where the files go (digits)")
    parser.add_argument("--seeds", type=int, default=1, help="how many trainings of each kind (1)")
    parser.add_argument("--epochs", type=int, default=10, help="of each training (10)")
    parser.add_argument("--net", action="append", choices=NETS, help="only this one; may be repeated")
    arguments = parser.parse_args()
    if min(arguments.seeds, arguments.epochs) < 1:
        parser.error("--seeds and --epochs are at least 1")
    os.environ.setdefault("KERAS_BACKEND", "torch")
    (images, labels), (held_images, held_labels) = digits()
    data, held_out = (enlarge(images), labels), (enlarge(held_images), held_labels)
    arguments.out.mkdir(parents=True, exist_ok=True)
    said = {}
    for name in arguments.net or NETS:
        net = trained(name, arguments.seeds, arguments.epochs, data, held_out)
        if name == "torch" or os.environ["KERAS_BACKEND"] == "torch":
            said[name] = folded(name, net, arguments.out, held_out[0]).astype(np.uint8)
        else:
            print("not exported: Keras writes BatchNormalization from its torch backend only")
    np.savez_compressed(arguments.out / "digits.npz", image=held_out[0], labels=held_labels.astype(np.uint8))
    np.savez_compressed(arguments.out / "digits_predicted.npz", **said)


if __name__ == "__main__":
    main()
