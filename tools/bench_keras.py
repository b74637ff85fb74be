#!/usr/bin/env python3
"""Time the Keras layer beside Keras's own, on the backend that KERAS_BACKEND names, and compare the moving statistics of both with float64.

    KERAS_BACKEND=torch python tools/bench_keras.py [--shape 32x56x56x64 ...] [--runs 21] [--batches 100] [--threads 1]

A step is forward and backward in training, compiled where the backend compiles; the two layers take turns, medians are shown. Their results
are compared before they are timed.
"""

import argparse
import os
import statistics
import time

import numpy as np

SHAPES = ["128x26x26x32", "32x56x56x64", "32x14x14x256", "128x64"]
TOLERANCE = 1e-4  # Keras's own layer on TensorFlow needs it


def step_of(layer, x, dy, backend):
    """Return a function that runs one training step of a layer and returns y."""
    if backend == "torch":
        import torch

        given, gradient = torch.from_numpy(x).requires_grad_(), torch.from_numpy(dy)

        def step():
            given.grad = None
            y = layer(given, training=True)
            y.backward(gradient)
            return y.detach()

        return step
    if backend == "tensorflow":
        import tensorflow as tf

        given, gradient = tf.constant(x), tf.constant(dy)

        @tf.function
        def gradients():
            with tf.GradientTape() as tape:
                tape.watch(given)
                y = layer(given, training=True)
            return y, tape.gradient(y, [given, *(weight.value for weight in layer.trainable_weights)], gradient)

        return lambda: gradients()[0]
    import jax

    def total(weights, x, dy):
        y, state = layer.stateless_call(weights, [weight.value for weight in layer.non_trainable_weights], x, training=True)
        return (y * dy).sum(), (y, state)

    gradients = jax.jit(jax.grad(total, (0, 1), has_aux=True))
    arrays = [weight.value for weight in layer.trainable_weights], jax.numpy.asarray(x), jax.numpy.asarray(dy)
    return lambda: jax.block_until_ready(gradients(*arrays))[1][0]


def layers(shape):
    """Return Keras's own layer and ours, built for a shape."""
    import keras

    import fastbn.keras

    layers = [kind(momentum=0.9, epsilon=1e-5) for kind in (keras.layers.BatchNormalization, fastbn.keras.BatchNormalization)]
    for layer in layers:
        layer.build(shape)
    return layers


def time_shape(shape, runs, backend):
    rng = np.random.default_rng(0)
    x, dy = (rng.normal(0.5, 1, shape).astype(np.float32) for _ in range(2))
    steps = [step_of(layer, x, dy, backend) for layer in layers(shape)]
    own, ours = (np.asarray(step()) for step in steps)
    np.testing.assert_allclose(ours, own, rtol=0, atol=TOLERANCE)
    seconds = [[], []]
    for _ in range(runs + 2):
        for step, taken in zip(steps, seconds, strict=True):
            start = time.perf_counter()
            step()
            taken.append(time.perf_counter() - start)
    own, ours = (statistics.median(taken[2:]) for taken in seconds)
    print(f"| {'x'.join(map(str, shape))} | {own * 1e3:.2f} | {ours * 1e3:.2f} | {own / ours:.2f} |", flush=True)


def compare_statistics(shape, batches):
    """Print how far the moving statistics are from float64 after many batches, relative to their value."""
    import keras

    rng, both = np.random.default_rng(0), layers(shape)
    mean, var = np.zeros(shape[-1]), np.ones(shape[-1])
    for _ in range(batches):
        x = np.maximum(rng.normal(0.5, 1, shape), 0).astype(np.float32)
        values = x.reshape(-1, shape[-1]).astype(np.float64)
        mean, var = 0.9 * mean + 0.1 * values.mean(0), 0.9 * var + 0.1 * values.var(0)
        for layer in both:
            layer(x, training=True)
    for name, layer in zip(("Keras", "fastbn"), both, strict=True):
        moving = [keras.ops.convert_to_numpy(weight) for weight in (layer.moving_mean, layer.moving_variance)]
        errors = [np.abs(got / want - 1).max() for got, want in zip(moving, (mean, var), strict=True)]
        print(f"{name:6}  {batches} batches of {'x'.join(map(str, shape))}: moving_mean {errors[0]:.1e}, moving_variance {errors[1]:.1e}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", help=f"channels last; may be repeated ({', '.join(SHAPES)})")
    parser.add_argument("--runs", type=int, default=21, help="timed steps of each layer (21)")
    parser.add_argument("--batches", type=int, default=100, help="of the comparison with float64 (100)")
    parser.add_argument(
        "--threads", type=int, default=1, help="of ours, and of torch (1); OMP_NUM_THREADS and the affinity limit the others"
    )
    arguments = parser.parse_args()
    os.environ.setdefault("KERAS_BACKEND", "torch")
    import keras

    import fastbn

    backend = keras.backend.backend()
    fastbn.set_num_threads(arguments.threads)
    if backend == "torch":
        import torch

        torch.set_num_threads(arguments.threads)
    shapes = [tuple(map(int, shape.split("x"))) for shape in arguments.shape or SHAPES]
    compare_statistics(shapes[0], arguments.batches)
    print(f"| {backend} | Keras ms | fastbn ms | ratio |\n|---|---|---|---|")
    for shape in shapes:
        time_shape(shape, arguments.runs, backend)


if __name__ == "__main__":
    main()
