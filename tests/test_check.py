"""Every rule about arguments: one form of message, the right class of error, and nothing written."""

import numpy as np
import pytest

import fastbn
from fastbn import BatchStats, _native
from fastbn.geometry import find_layout

X = np.ones((4, 3, 5), np.float32)
ONES = np.ones(3)


def frozen(array):
    array.flags.writeable = False
    return array


def overlapping(shift):
    memory = np.ones(X.size + 8, np.float32)
    return memory[: X.size].reshape(X.shape), memory[shift : X.size + shift].reshape(X.shape)


WRONG = {
    "x a list": (lambda: fastbn.batch_norm([[1.0]], ONES, ONES), TypeError, "x"),
    "x an object": (lambda: fastbn.batch_stats(object()), TypeError, "x"),
    "x None": (lambda: fastbn.batch_stats(None), TypeError, "x"),
    "x of integers": (lambda: fastbn.batch_stats(X.astype(int)), TypeError, "x"),
    "x complex": (lambda: fastbn.batch_stats(X.astype(complex)), TypeError, "x"),
    "x of long double": (lambda: fastbn.batch_stats(X.astype(np.longdouble)), TypeError, "x"),
    "x without axes": (lambda: fastbn.batch_stats(np.float32(1)), ValueError, "axis"),
    "axis too large": (lambda: fastbn.batch_stats(X, axis=3), ValueError, "axis"),
    "axis too small": (lambda: fastbn.batch_stats(X, axis=-4), ValueError, "axis"),
    "axis an array": (lambda: fastbn.batch_stats(X, axis=np.array([1, 2])), TypeError, "axis"),
    "axis a float": (lambda: fastbn.batch_stats(X, axis=1.5), TypeError, "axis"),
    "eps negative": (lambda: fastbn.batch_norm_train(X, eps=-1e-5), ValueError, "eps"),
    "eps NaN": (lambda: fastbn.batch_norm_train(X, eps=float("nan")), ValueError, "eps"),
    "eps infinite": (lambda: fastbn.batch_norm_train(X, eps=float("inf")), ValueError, "eps"),
    "eps a number that no float holds": (lambda: fastbn.batch_norm_train(X, eps=10**400), ValueError, "eps"),
    "eps a word": (lambda: fastbn.batch_norm_train(X, eps="small"), TypeError, "eps"),
    "momentum": (lambda: fastbn.batch_norm_train(X, momentum=1.5), ValueError, "momentum"),
    "momentum NaN": (lambda: fastbn.batch_norm_train(X, momentum=float("nan")), ValueError, "momentum"),
    "activation": (lambda: fastbn.batch_norm_train(X, activation="gelu"), ValueError, "activation"),
    "activation a list": (lambda: fastbn.batch_norm_train(X, activation=[]), ValueError, "activation"),
    "weight too long": (lambda: fastbn.batch_norm_train(X, np.ones(4)), ValueError, "weight"),
    "weight a matrix": (lambda: fastbn.batch_norm_train(X, np.ones((3, 1))), ValueError, "weight"),
    "weight of integers": (lambda: fastbn.batch_norm_train(X, np.ones(3, int)), TypeError, "weight"),
    "bias float16": (lambda: fastbn.batch_norm_train(X, None, np.ones(3, np.float16)), TypeError, "bias"),
    "mean None": (lambda: fastbn.batch_norm(X, None, ONES), TypeError, "mean"),
    "var None": (lambda: fastbn.batch_norm(X, ONES, None), TypeError, "var"),
    "var too short": (lambda: fastbn.batch_norm(X, ONES, np.ones(2)), ValueError, "var"),
    "var negative": (lambda: fastbn.batch_norm(X, ONES, np.array([1.0, -1.0, 1.0])), ValueError, "var"),
    "var zero and eps zero": (lambda: fastbn.batch_norm(X, ONES, np.zeros(3), eps=0.0), ValueError, "var"),
    "residual of another shape": (lambda: fastbn.batch_norm_train(X, residual=X[:2]), ValueError, "residual"),
    "residual of another dtype": (lambda: fastbn.batch_norm_train(X, residual=X.astype(float)), TypeError, "residual"),
    "out of another shape": (lambda: fastbn.batch_norm_train(X, out=np.ones((4, 3, 6), np.float32)), ValueError, "out"),
    "out of another dtype": (lambda: fastbn.batch_norm_train(X, out=np.ones(X.shape)), TypeError, "out"),
    "out read-only": (lambda: fastbn.batch_norm_train(X, out=frozen(X.copy())), ValueError, "out"),
    "out and x read-only": (lambda: (lambda x: fastbn.batch_norm_train(x, out=x))(frozen(X.copy())), ValueError, "out"),
    "out a list": (lambda: fastbn.batch_norm_train(X, out=[1.0]), TypeError, "out"),
    "out overlaps itself": (
        lambda: fastbn.batch_norm_train(X, out=np.lib.stride_tricks.as_strided(np.ones(99, np.float32), X.shape, (4, 4, 4))),
        ValueError,
        "out",
    ),
    "running_var overlaps itself": (
        lambda: fastbn.batch_norm_train(X, running_var=np.lib.stride_tricks.as_strided(np.ones(3), (3,), (0,))),
        ValueError,
        "running_var",
    ),
    "running_var is running_mean": (
        lambda: (lambda v: fastbn.batch_norm_train(X, running_mean=v, running_var=v))(np.ones(3)),
        ValueError,
        "running_var",
    ),
    "running_mean too long": (lambda: fastbn.batch_norm_train(X, running_mean=np.ones(4)), ValueError, "running_mean"),
    "running_var read-only": (lambda: fastbn.batch_norm_train(X, running_var=frozen(np.ones(3))), ValueError, "running_var"),
    "running_var of integers": (lambda: fastbn.batch_norm_train(X, running_var=np.ones(3, int)), TypeError, "running_var"),
    "running_mean of swapped bytes": (lambda: fastbn.batch_norm_train(X, running_mean=ONES.astype(">f8")), ValueError, "running_mean"),
    "dy of another shape": (lambda: fastbn.batch_norm_backward(X[:, :2], X, STATS), ValueError, "dy"),
    "dy of another dtype": (lambda: fastbn.batch_norm_backward(X.astype(float), X, STATS), TypeError, "dy"),
    "stats a tuple": (lambda: fastbn.batch_norm_backward(X, X, (ONES, ONES)), TypeError, "stats"),
    "stats of another width": (lambda: fastbn.batch_norm_backward(X, X, BatchStats(20, np.ones(2), np.ones(2))), ValueError, "stats"),
    "stats of another count": (lambda: fastbn.batch_norm_backward(X, X, BatchStats(7, ONES, ONES)), ValueError, "stats"),
    "stats of nothing": (lambda: fastbn.batch_norm_backward(X, X, BatchStats(0, ONES, ONES), training=False), ValueError, "stats"),
    "isa": (lambda: fastbn.use_isa("mmx"), ValueError, "name"),
    "isa a number": (lambda: fastbn.use_isa(3), ValueError, "name"),
}
STATS = fastbn.batch_stats(X)


@pytest.mark.parametrize("case", list(WRONG))
def test_bad_arguments(case):
    call, error, where = WRONG[case]
    before = X.tobytes()
    with pytest.raises(error, match=rf"^Expected .*, got .* - at `{where}`$") as caught:
        call()
    assert isinstance(caught.value, fastbn.FastbnError)
    assert X.tobytes() == before


class Foreign:
    """An array of another library whose code fails where it is asked for its memory."""

    def __init__(self, name, error):
        self.name, self.error = name, error

    def __getattr__(self, name):
        if name == self.name:
            raise self.error("no such buffer")
        raise AttributeError(name)


class Exporting(Foreign):
    def __dlpack__(self, **options):
        raise self.error("no such buffer")

    def __dlpack_device__(self):
        return 1, 0


@pytest.mark.parametrize("error", [KeyError, IndexError, OSError, ZeroDivisionError, RecursionError])
@pytest.mark.parametrize(
    "array", [Exporting, lambda name, error: Foreign("__dlpack__", error), lambda name, error: Foreign("__array__", error)]
)
def test_what_foreign_arrays_raise_is_one_error(array, error):
    value = array("__dlpack__", error)
    for where, call in {
        "x": lambda: fastbn.batch_stats(value),
        "mean": lambda: fastbn.batch_norm(X, value, ONES),
        "out": lambda: fastbn.batch_norm_train(X, out=value),
        "running_var": lambda: fastbn.batch_norm_train(X, running_var=value),
    }.items():
        with pytest.raises(TypeError, match=rf"^Expected an array in CPU memory, got \w+ - at `{where}`$") as caught:
            call()
        assert isinstance(caught.value.__cause__, error)


def test_a_lack_of_memory_is_not_the_arguments_fault():
    with pytest.raises(MemoryError):
        fastbn.batch_stats(Exporting(None, MemoryError))


@pytest.mark.parametrize("shape", [(0, 3), (4, 3, 0), (0, 3, 0)])
def test_an_empty_array_overlaps_nothing(shape):
    """NumPy gives arrays without elements any strides, zeros among them."""
    out = np.lib.stride_tricks.as_strided(np.empty(0, np.float32), shape, (0,) * len(shape))
    x = np.empty(shape, np.float32)
    assert fastbn.batch_norm(x, ONES, ONES, out=out) is out
    assert fastbn.batch_norm_train(x, out=out)[0] is out
    assert fastbn.batch_norm_backward(x, x, fastbn.batch_stats(x), out=out)[0] is out


@pytest.mark.parametrize("shift", [1, 2, 7])
def test_partial_overlap_writes_nothing(shift):
    x, out = overlapping(shift)
    running = np.zeros(3)
    other = np.ones_like(X)
    for call in (
        lambda: fastbn.batch_norm_train(x, running_mean=running, out=out),
        lambda: fastbn.batch_norm_train(other, residual=x, running_mean=running, out=out),
        lambda: fastbn.batch_norm(x, ONES, ONES, out=out),
        lambda: fastbn.batch_norm_backward(x, other, STATS, out=out),
        lambda: fastbn.batch_norm_backward(other, x, STATS, out=out),
        lambda: fastbn.batch_norm_backward(x, out, STATS, out=out),
    ):
        with pytest.raises(ValueError, match=r"Expected .*, got an array that overlaps an input - at `out`"):
            call()
    assert (x == 1).all()
    assert (running == 0).all()


def test_running_statistics_overlap_nothing():
    memory = np.ones(X.size, np.float32)
    x = memory.reshape(X.shape)
    with pytest.raises(ValueError, match="at `running_mean`"):
        fastbn.batch_norm_train(x, running_mean=memory[:3])
    shared = np.ones(4)
    with pytest.raises(ValueError, match="at `running_var`"):
        fastbn.batch_norm_train(X, running_mean=shared[:3], running_var=shared[1:])
    assert (memory == 1).all()


def test_interleaved_arrays_do_not_overlap():
    memory = np.ones((4, 6, 5), np.float32)
    y = fastbn.batch_norm(memory[:, ::2], ONES, ONES, out=memory[:, 1::2])
    assert (y == 0).all()
    assert (memory[:, ::2] == 1).all()


@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 4), (2, 3, 4, 5), (1, 4, 2), (3, 2, 1, 1), (4, 1, 6), (0, 3), (3, 2, 0)])
def test_the_layout_of_dense_arrays_is_the_general_one(shape):
    x, transposed = np.zeros(shape, np.float32), np.zeros(shape[::-1], np.float32).T
    for axis in range(len(shape)):
        general = find_layout(shape, axis, 4, x.strides, x.strides)
        dense = _native.dense_layout(axis, (x, None, x))
        if 0 in shape or shape[axis] == 1:
            assert dense is None
            continue
        N, C, S = dense
        assert general[:3] == (N, C, S)
        assert not general.channels_last or S == 1
        axes, contiguous = (general.n_axis, general.c_axis, general.s_axis), (C * S, S, 1)
        assert all(axis < 0 or x.strides[axis] == 4 * stride for axis, stride in zip(axes, contiguous, strict=True))
        assert _native.dense_layout(axis, (x, transposed)) is None or transposed.flags.c_contiguous


def test_tensors_that_require_grad():
    """A fold takes their values; what has gradients elsewhere says so."""
    torch = pytest.importorskip("torch")
    conv, norm, x = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4).eval(), torch.ones(2, 4, 3, 3)
    norm.running_mean[:] = 0.5
    arrays = [conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias]
    want = fastbn.fold_conv(*(each.detach().numpy() for each in arrays))
    got = fastbn.fold_conv(*arrays)
    assert all(type(one) is np.ndarray and np.array_equal(one, other) for one, other in zip(got, want, strict=True))
    for call, where in [
        (lambda: fastbn.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias), "weight"),
        (lambda: fastbn.batch_stats(x.requires_grad_()), "x"),
    ]:
        with pytest.raises(fastbn.ArgumentTypeError, match=rf"requires grad.*detach\(\), or call fastbn.torch - at `{where}`"):
            call()
