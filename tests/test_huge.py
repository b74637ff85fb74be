"""Arrays of more than 2^31 elements, and of none: every number of elements, and every offset, has 64 bits.

The huge ones take 5 GB and a minute: they run where FASTBN_HUGE is set and the memory is there.
"""

import os

import numpy as np
import pytest

import fastbn

HUGE = 2**31 + 128

# Bytes that must be free: the array, which is read and written in place, and some more.
MEMORY = 2 * HUGE + (1 << 30)

# Name -> (shape, axis, how the array is seen). Two channels of more than 2^30 elements each.
LAYOUTS = {
    "one long plane": ((1, 2, HUGE // 2), 1, lambda x: x),
    "channels last": ((HUGE // 2, 2), -1, lambda x: x),
    "many samples": ((HUGE // 2 // 64, 2, 64), 1, lambda x: x),
    "backwards": ((1, 2, HUGE // 2), 1, lambda x: x[:, :, ::-1]),
    "channels last, backwards": ((HUGE // 2, 2), -1, lambda x: x[::-1]),
}

# What rounding in float32 may do to statistics in one pass: docs/numerics.md, "One-pass variance".
BOUND = 19 * 2.0**-24

# Elements that are looked at in one piece.
PIECE = 1 << 24


def available():
    """Return the bytes of memory that are free."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except OSError:
        return 0


@pytest.fixture(name="array", params=LAYOUTS)
def _array(request):
    """(x, axis): zeros of float16, but for 4 in the first and the last element of each channel."""
    if not os.environ.get("FASTBN_HUGE"):
        pytest.skip("arrays of 4.3 GB: set FASTBN_HUGE to run it")
    if available() < MEMORY:
        pytest.skip(f"{MEMORY >> 30} GB of memory are not free")
    shape, axis, view = LAYOUTS[request.param]
    x = view(np.zeros(shape, np.float16))
    marks(x, axis)[:] = 4
    return x, axis


def marks(x, axis):
    """Return a view of the first and the last element of each channel, of shape (2, 2)."""
    channels = x.reshape(-1, 2).T if axis == -1 else x[0] if x.shape[0] == 1 else None
    return channels[:, :: channels.shape[1] - 1] if channels is not None else x[:: x.shape[0] - 1, :, 0].T


def assert_elsewhere(x, axis, values):
    """Demand that all elements but the marked ones have the value of their channel."""
    found = marks(x, axis).copy()
    marks(x, axis)[:] = np.float16(values)[:, None]
    for channel, value in enumerate(values):
        plane = x[0, channel] if x.shape[0] == 1 else x[:, channel]
        step = PIECE // plane[0].size
        for start in range(0, len(plane), step):
            assert (plane[start : start + step] == np.float16(value)).all(), start
    marks(x, axis)[:] = found


def test_inference_in_place(array):
    x, axis = array
    mean, var = np.float32([1, 2]), np.float32([1, 4])
    y = fastbn.batch_norm(x, mean, var, eps=0.0, axis=axis, out=x)
    assert y is x
    np.testing.assert_array_equal(marks(y, axis), [[3, 3], [1, 1]])
    assert_elsewhere(y, axis, [-1, -1])


def test_training_in_place_and_back(array):
    """Two fours among n zeros: mean 8/n, sum of squares 32 - 64/n; without them, y is minus mean over the standard deviation."""
    x, axis = array
    count = HUGE // 2
    y, stats = fastbn.batch_norm_train(x, eps=0.0, axis=axis, out=x)
    assert y is x
    assert stats.count == count
    np.testing.assert_allclose(stats.mean, 8 / count, rtol=BOUND)
    np.testing.assert_allclose(stats.m2, 32 - 64 / count, rtol=BOUND)
    scale = 1 / np.sqrt(32 / count)
    np.testing.assert_allclose(marks(y, axis).astype(float), 4 * scale, rtol=1e-3)
    y[:] = 0
    marks(y, axis)[:] = 4
    ones = np.ones(2, np.float32)
    dx, dweight, dbias = fastbn.batch_norm_backward(y, y, stats, ones, ones, eps=0.0, axis=axis, out=y)
    np.testing.assert_allclose(dbias, 8, rtol=1e-6)
    np.testing.assert_allclose(dweight, 32 * scale, rtol=1e-6)
    # What is left where dy is x: nothing but rounding, for x is its own normalization times a constant.
    assert np.abs(marks(dx, axis).astype(float)).max() <= 1e-3 * 4 * scale


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 0), (2, 0, 4), (0, 0, 0), (0, 3)])
def test_arrays_of_nothing(shape):
    x = np.zeros(shape, np.float32)
    ones = np.ones(shape[1], np.float32)
    assert fastbn.batch_norm(x, ones, ones).shape == shape
    assert fastbn.batch_stats(x).count == 0
    dx, dweight, dbias = fastbn.batch_norm_backward(x, x, fastbn.BatchStats(1, ones, ones), ones, ones, training=False)
    assert dx.shape == shape
    assert (dweight.tolist(), dbias.tolist()) == ([0.0] * shape[1], [0.0] * shape[1])
