"""Accuracy of the statistics, and of y, against long double: any mean/std, and data made to break one-pass sums."""

import numpy as np
import pytest

import fastbn
from fastbn import reference


def truth(x):
    """(mean, var, y) of channels on axis 1, in long double; rescaled, so that squares neither overflow nor vanish."""
    values = np.moveaxis(x, 1, 0).reshape(x.shape[1], -1).astype(np.longdouble)
    size = np.abs(values).max(axis=1, keepdims=True)
    size[size == 0] = 1
    values = values / size
    mean = values.mean(1, keepdims=True)
    mean = mean + (values - mean).mean(1, keepdims=True)
    var = ((values - mean) ** 2).mean(1)
    return (mean * size)[:, 0], var * size[:, 0] ** 2


def check(x, axis, y_bound=2e-6, var_bound=1e-6):
    first = np.moveaxis(x, axis, 1)
    mean, var = truth(first)
    y, stats = fastbn.batch_norm_train(x, axis=axis)
    live = var > 0
    assert (stats.var[~live] == 0).all()
    error = np.abs(stats.var[live] - var[live]) / var[live]
    assert error.max(initial=0) <= var_bound
    shape = (1, -1) + (1,) * (x.ndim - 2)
    want = (first.astype(np.longdouble) - mean.reshape(shape)) / np.sqrt(var + np.longdouble(1e-5)).reshape(shape)
    got = np.moveaxis(y, axis, 1)
    assert (np.abs(got - want) / (1 + np.abs(want))).max() <= y_bound


@pytest.mark.parametrize("ratio", [0.0, 1.0, 1e2, 1e4, 1e6, 1e7])
@pytest.mark.parametrize("n", [2, 3, 17, 100, 4000, 300_000])
@pytest.mark.parametrize("axis", [1, -1])
def test_any_mean_over_std(ratio, n, axis):
    rng = np.random.default_rng(n)
    for threads in (1, 2):
        fastbn.set_num_threads(threads)
        for shape in ((n, 3), (1, 3, n)) if axis == 1 else ((1, n, 3),):
            check((rng.standard_normal(shape) + ratio).astype(np.float32), axis)


def test_a_million_values():
    check((np.random.default_rng(0).standard_normal((1, 2, 1_000_000)) + 1e5).astype(np.float32), 1)


def adversaries(n):
    rng = np.random.default_rng(5)
    noise = rng.standard_normal(n)
    yield "outlier first", np.concatenate([[1e6], noise[1:]])
    yield "outlier last", np.concatenate([noise[1:], [1e6]])
    yield "constant", np.full(n, 0.1)
    yield "constant but one", np.concatenate([np.full(n - 1, 3.0), [4.0]])
    yield "two-valued", (noise > 1.5) * 1.0
    yield "two large values", 1e6 + (noise > 0)
    yield "alternating", np.resize([1.0, -1.0], n)
    yield "alternating and tiny", np.resize([1e-30, -1e-30], n)
    yield "sorted", np.sort(noise) + 50
    yield "falling", np.sort(noise)[::-1]
    yield "denormal", noise * 1e-40
    yield "tiny", noise * 1e-25
    yield "huge", noise * 1e30
    yield "huge and apart", noise * 1e30 + 3e36
    yield "relu", np.maximum(noise, 0)
    yield "image", rng.integers(0, 256, n)
    yield "temperatures", 273 + rng.uniform(-0.1, 0.1, n)
    yield "pressures", 101325 + rng.uniform(-10, 10, n)
    yield "rare", (np.arange(n) == n // 2) * 1000.0
    yield "squares", noise**8


@pytest.mark.parametrize("n", [50, 4096, 70_001])
@pytest.mark.parametrize("layout", ["ncs", "nsc", "small planes"])
def test_adversarial_data(n, layout):
    channels = np.array([values for _, values in adversaries(n)], np.float32)
    if layout == "ncs":
        check(channels[None], 1)
    elif layout == "nsc":
        check(np.ascontiguousarray(channels.T), 1)
    else:
        whole = n // 9 * 9
        check(np.ascontiguousarray(channels[:, :whole].reshape(len(channels), -1, 9).transpose(1, 0, 2)), 1)


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("size", [8, 28, 32, 56])
def test_an_image_with_a_border_is_added_up_once(size, axis):
    """The sample of a channel must not lie on the border alone: its mean would be far from the channel's, and everything would be added up
    again in float64, which shows in an error that is too small for one pass."""
    x = np.random.default_rng(size).standard_normal((32, 64, size, size)).astype(np.float32)
    for border in (np.s_[:, :, :, :1], np.s_[:, :, :, -1:], np.s_[:, :, :1, :], np.s_[:, :, -1:, :]):
        image = x.copy()
        image[border] += 6
        exact = truth(image)[1]
        stats = fastbn.batch_stats(image if axis == 1 else np.ascontiguousarray(np.moveaxis(image, 1, -1)), axis=axis)
        error = np.abs(stats.var - exact.astype(np.float64)) / exact.astype(np.float64)
        assert error.max() <= 1e-6
        assert (error > 1e-13).mean() > 0.9


@pytest.mark.parametrize("layout", ["channels first", "channels last", "every other channel"])
@pytest.mark.parametrize(("dtype", "tiny"), [("float32", 2.0**-100), ("float64", 2.0**-1000), ("float16", 2.0**-24)])
@pytest.mark.parametrize("among", [1, 16, 21])
def test_dead_channels_and_channels_whose_squares_vanish(dtype, tiny, layout, among):
    """A constant channel is settled by a look; one that alternates about 0 looks the same to a sum of float32 squares, and is not."""
    alternating = np.resize([tiny, -tiny], 5 * 40).astype(dtype)
    kinds = {"dead": np.zeros(200), "constant": np.full(200, 0.1), "both zeros": np.resize([0.0, -0.0], 200), "alternating": alternating}
    for left_out in (None, *kinds):
        columns = [values.astype(dtype) for name, values in kinds.items() if name != left_out]
        x = np.stack([columns[c % len(columns)] for c in range(among)], 1).reshape(5, 40, among).transpose(0, 2, 1)
        if layout == "every other channel":
            apart = np.full((5, 2 * among, 40), 7, dtype)
            apart[:, ::2] = x
            x = apart[:, ::2]
        x = np.ascontiguousarray(x) if layout == "channels first" else x
        stats = fastbn.batch_stats(x)
        wide = np.moveaxis(x, 1, 0).reshape(among, -1).astype(np.longdouble)
        np.testing.assert_array_equal(stats.mean, wide[:, 0] * (wide[:, 0] == wide[:, 2]) * (wide[:, 0] == wide[:, 1]))
        np.testing.assert_allclose(stats.var, wide.var(1).astype(np.float64), rtol=1e-6)


def test_float64():
    rng = np.random.default_rng(0)
    for ratio in (0.0, 1e4, 1e7):
        check(rng.standard_normal((50, 4, 90)) + ratio, 1, 1e-8 if ratio else 1e-14, 1e-8 if ratio else 1e-14)


def test_sixteen_bit_statistics_are_those_of_the_values():
    rng = np.random.default_rng(0)
    for mean in (0, 3, 100):
        x = (rng.standard_normal((40, 5, 11, 11)) + mean).astype(np.float16)
        stats = fastbn.batch_stats(x)
        _, var = truth(x)
        np.testing.assert_allclose(stats.var, var.astype(np.float64), rtol=1e-6)


def test_gradients_at_a_large_mean():
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((20, 4, 100)) + 1e4).astype(np.float32)
    dy = rng.uniform(0, 1, x.shape).astype(np.float32)
    stats = fastbn.batch_stats(x)
    dx, dweight, dbias = fastbn.batch_norm_backward(dy, x, stats, np.ones(4), np.zeros(4))
    want = reference.batch_norm_backward(dy.astype(float), x.astype(float), stats, np.ones(4), np.zeros(4))
    for mine, twin in zip((dx, dweight, dbias), want, strict=True):
        np.testing.assert_allclose(mine, twin, rtol=1e-5, atol=1e-5)
