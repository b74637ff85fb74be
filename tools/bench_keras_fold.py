#!/usr/bin/env python3
"""What fastbn.keras.fold leaves of the batch normalizations of the networks of keras.applications.

    KERAS_BACKEND=torch python tools/bench_keras_fold.py [NETWORK ...] [--json FILE] [--no-verify]

For each network: batch normalizations before and after, the largest difference from the original as a part of its largest output, why those
that are left stay, and seconds of CPU time. Weights are random, statistics as after a training; nothing is downloaded.
"""

import argparse
import collections
import json
import os
import time

import keras
import numpy as np

import fastbn.keras

# Network -> the size of its images.
NETWORKS = {
    "MobileNet": 128,
    "MobileNetV2": 128,
    "MobileNetV3Small": 128,
    "MobileNetV3Large": 128,
    "Xception": 128,
    "ResNet50": 128,
    "ResNet50V2": 128,
    "DenseNet121": 128,
    "EfficientNetB0": 128,
    "EfficientNetV2B0": 128,
    "NASNetMobile": 224,
    "InceptionV3": 128,
}


def norms(model):
    return [layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.BatchNormalization)]


def network(name):
    """Return a network with random weights and statistics as after a training, and its classifier's logits."""
    keras.utils.set_random_seed(0)
    size = NETWORKS[name]
    model = getattr(keras.applications, name)(weights=None, input_shape=(size, size, 3), classifier_activation=None)
    rng = np.random.default_rng(0)
    for layer in norms(model):
        shape = layer.moving_mean.shape
        layer.moving_mean.assign(rng.normal(0, 0.1, shape))
        layer.moving_variance.assign(rng.uniform(0.5, 2, shape))
        if layer.scale:
            layer.gamma.assign(rng.uniform(0.5, 1.5, shape))
        if layer.center:
            layer.beta.assign(rng.normal(0, 0.1, shape))
    return model


def output(model, x):
    return keras.ops.convert_to_numpy(model(keras.ops.convert_to_tensor(x), training=False))


def row(name, verify):
    """Return what comes of folding a network."""
    model = network(name)
    x = np.random.default_rng(1).uniform(0, 1, (1, *model.inputs[0].shape[1:])).astype("float32")
    began = time.process_time()
    result = fastbn.keras.fold(model, x, verify=verify)
    seconds = time.process_time() - began
    want, got = output(model, x), output(result.model, x)
    reasons = collections.Counter(kept.code for kept in result.kept)
    error = float(np.abs(got - want).max() / np.abs(want).max())
    parity = result.parity and result.parity.status
    left = len(norms(result.model))
    return {"network": name, "bn": len(norms(model)), "left": left, "error": error, "kept": reasons, "parity": parity, "seconds": seconds}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"of {', '.join(NETWORKS)}")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there too")
    parser.add_argument("--no-verify", action="store_true", help="fold with verify=False")
    options = parser.parse_args()
    unknown = set(options.networks) - set(NETWORKS)
    if unknown:
        parser.error(f"no network '{min(unknown)}'; there are {', '.join(NETWORKS)}")
    rows = []
    print(f"Keras {keras.__version__} on {keras.config.backend()}, {os.cpu_count()} CPUs\n")
    print("| network | BN | left | error | why they stay | parity | seconds |\n|---|---|---|---|---|---|---|", flush=True)
    for name in options.networks or NETWORKS:
        rows.append(row(name, not options.no_verify))
        each = rows[-1]
        why = ", ".join(f"{count} {code}" for code, count in each["kept"].items())
        numbers = f"{each['bn']} | {each['left']} | {each['error']:.0e} | {why or '-'} | {each['parity'] or '-'} | {each['seconds']:.0f}"
        print(f"| {name} | {numbers} |", flush=True)
        if options.json:
            with open(options.json, "w", encoding="utf-8") as file:
                json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
