"""Arrays that have no layout in common are copied: only those that are not contiguous, and in parts where the call is elementwise."""

import tracemalloc

import numpy as np
import pytest

import fastbn

BASE = np.random.default_rng(0).standard_normal((30, 14, 20, 22)).astype(np.float32)
VIEWS = {
    "crop": (BASE[..., 1:-1], 1),
    "crop of both": (BASE[:, :, 1:-1, 2:-1], 1),
    "backwards": (BASE[..., ::-1], 1),
    "every other": (BASE[:, :, ::2, ::2], 1),
    "channels last": (BASE[:, 1:-1, 1:-1], 3),
    "channels backwards": (BASE[..., ::-1], 3),
    "samples inside": (BASE.transpose(2, 1, 0, 3)[..., 1:-1], 1),
    "channels outside": (BASE[:, :, :, 1:-1], 0),
    "one sample": (np.concatenate(BASE[:, None], axis=3)[..., 1:-1], 1),
}


def parameters(channels):
    """mean, var, weight and bias."""
    return np.random.default_rng(1).uniform(0.5, 2, (4, channels))


@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("kind", VIEWS)
def test_inference_of_a_view_is_that_of_a_copy(kind, with_residual):
    x, axis = VIEWS[kind]
    mean, var, weight, bias = parameters(x.shape[axis])
    whole = np.ascontiguousarray(x)
    residual = whole[::-1] if with_residual else None
    options = {"axis": axis, "activation": "relu", "residual": residual}
    want = fastbn.batch_norm(whole, mean, var, weight, bias, **options)
    assert fastbn.batch_norm(x, mean, var, weight, bias, **options).tobytes() == want.tobytes()
    room = np.full((*x.shape[:-1], x.shape[-1] + 2), 7, np.float32)
    for out in (np.empty_like(whole), room[..., 1:-1], np.empty(x.shape[::-1], np.float32).T):
        assert fastbn.batch_norm(x, mean, var, weight, bias, out=out, **options) is out
        assert np.array_equal(out, want)
    assert np.all(room[..., [0, -1]] == 7)


def test_parameters_that_lie_in_the_output_are_read_first():
    whole = BASE.copy()
    view = whole[..., 1:-1]
    mean, _, _, bias = parameters(14)
    whole[1, :, 2, 3] = abs(whole[1, :, 2, 3])
    var, weight = whole[1, :, 2, 3], view[-1, :, -1, -1]
    want = fastbn.batch_norm(view.copy(), mean, var.copy(), weight.copy(), bias)
    assert np.array_equal(fastbn.batch_norm(view, mean, var, weight, bias, out=view), want)


def test_a_view_changes_in_place():
    whole = BASE.copy()
    view = whole[..., 1:-1]
    want = fastbn.batch_norm(view.copy(), *parameters(14))
    assert fastbn.batch_norm(view, *parameters(14), out=view) is view
    assert np.array_equal(view, want)
    assert np.array_equal(whole[..., [0, -1]], BASE[..., [0, -1]])


def peak(call):
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_copies_take_no_more_memory_than_they_must():
    x = np.zeros((40, 32, 30, 32), np.float32)[..., 1:-1]
    y, dy = np.empty(x.shape, np.float32), np.zeros(x.shape, np.float32)
    mean, var, weight, bias = np.zeros(32), np.ones(32), np.ones(32), np.ones(32)
    _, stats = fastbn.batch_norm_train(x, weight, bias, out=y)
    assert peak(lambda: fastbn.batch_norm(x, mean, var, weight, bias, out=y)) < x.nbytes / 4
    two = x.reshape(2, 20, 32, 30, 30).transpose(0, 2, 1, 3, 4)
    room = y.reshape(2, 32, 20, 30, 30)
    assert peak(lambda: fastbn.batch_norm(two, mean, var, weight, bias, out=room)) < x.nbytes / 4
    assert x.nbytes < peak(lambda: fastbn.batch_norm_train(x, weight, bias, out=y)) < 1.1 * x.nbytes
    assert x.nbytes < peak(lambda: fastbn.batch_norm_backward(dy, x, stats, weight, bias, out=y)) < 1.1 * x.nbytes
