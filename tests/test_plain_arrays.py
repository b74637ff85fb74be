"""Arrays that are plain are checked and computed in one call of the compiled part, others in Python: with the same bits, and errors."""

import numpy as np
import pytest

import fastbn
from fastbn import any_arrays
from fastbn._native import backward_arrays, infer_arrays, train_arrays

SHAPES = [((4, 6, 5, 7), 1), ((4, 5, 7, 6), -1), ((64, 8), 1), ((3, 2, 300), 1), ((5, 9, 2), 2), ((2, 3, 4), 0)]
EPS = 1e-5


def tensors(shape, dtype, count, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(dtype) for _ in range(count)]


def vectors(channels, dtype=np.float32):
    rng = np.random.default_rng(1)
    return [(rng.random(channels) + 0.5).astype(dtype) for _ in range(4)]


@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu", "relu6"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_plain_arrays_give_the_bits_of_any_arrays(shape, axis, dtype, activation):
    x, dy, residual = tensors(shape, dtype, 3)
    mean, var, weight, bias = vectors(shape[axis])
    for added in (None, residual):
        for out in (None, np.zeros_like(x)):
            plain = infer_arrays(x, mean, var, weight, None, EPS, axis, activation, added, out)
            assert plain is out or out is None
            want = any_arrays.infer(x, mean, var, weight, None, EPS, axis, activation, added, None)
            assert plain.tobytes() == want.tobytes()
        running = [[mean.copy(), var.copy()] for _ in range(2)]
        y, count, batch_mean, batch_m2 = train_arrays(x, weight, bias, *running[0], 0.25, True, EPS, axis, activation, added, None)
        want, stats = any_arrays.train(x, weight, bias, *running[1], 0.25, True, EPS, axis, activation, added, None)
        assert y.tobytes() == want.tobytes()
        assert [values.tobytes() for values in running[0]] == [values.tobytes() for values in running[1]]
        assert not np.array_equal(running[0][0], mean)
        assert count == stats.count == x.size // shape[axis]
        assert (batch_mean.tobytes(), batch_m2.tobytes()) == (stats.mean.tobytes(), stats.m2.tobytes())
    for frozen in (False, True):
        plain = backward_arrays(dy, x, stats.mean, stats.m2, stats.count, weight, bias, EPS, axis, not frozen, activation, None)
        want = any_arrays.backward(dy, x, stats, weight, bias, EPS, axis, not frozen, activation, None, None)
        for got, expected in zip(plain, want, strict=True):
            assert (got.dtype, got.tobytes()) == (expected.dtype, expected.tobytes())
    dx, *nothing = backward_arrays(dy, x, stats.mean, stats.m2, stats.count, None, None, EPS, axis, True, activation, dy)
    assert dx is dy
    assert nothing == [None, None]


def one_call(**changed):
    """The arguments of each function, some changed; x has 4 channels."""
    x, residual, out, dy = tensors((3, 4, 5), np.float32, 4)
    mean, var, weight, bias = vectors(4)
    stats = fastbn.batch_stats(x)
    given = {"x": x, "mean": mean, "var": var, "weight": weight, "bias": bias, "eps": EPS, "axis": 1, "residual": residual, "out": out}
    given |= {"dy": dy, "batch_mean": stats.mean, "batch_m2": stats.m2, "count": 15, "training": True}
    given |= {"running_mean": mean.copy(), "running_var": var.copy(), "momentum": 0.1, "unbiased": True, "activation": None}
    given |= {name: value(given) if callable(value) else value for name, value in changed.items()}
    return given


def infer(given):
    names = ("x", "mean", "var", "weight", "bias", "eps", "axis", "activation", "residual", "out")
    return infer_arrays(*(given[name] for name in names))


def train(given):
    names = ("x", "weight", "bias", "running_mean", "running_var", "momentum", "unbiased", "eps", "axis", "activation", "residual", "out")
    return train_arrays(*(given[name] for name in names))


def backward(given):
    names = ("dy", "x", "batch_mean", "batch_m2", "count", "weight", "bias", "eps", "axis", "training", "activation", "out")
    return backward_arrays(*(given[name] for name in names))


class Subclass(np.ndarray):
    pass


class Count(int):
    """Python code that would run between the checks and the call."""

    def __eq__(self, other):
        raise AssertionError

    __hash__ = int.__hash__


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


def swapped(array):
    return array.astype(array.dtype.newbyteorder(">"))


def unaligned(array):
    memory = np.zeros(array.nbytes + 1, np.uint8)[1:].view(array.dtype).reshape(array.shape)
    memory[...] = array
    return memory


# Inputs that are not plain, from one of shape (3, 4, 5).
INPUTS = {
    "a list": lambda x: x.tolist(),
    "a subclass": lambda x: x.view(Subclass),
    "a masked array": np.ma.masked_array,
    "integers": lambda x: x.astype(np.int32),
    "swapped bytes": swapped,
    "unaligned": unaligned,
    "no elements": lambda x: x[:0],
    "no channels": lambda x: x[:, :0].copy(),
    "one channel": lambda x: x.reshape(3, 1, 20),
    "Fortran order": np.asfortranarray,
    "a slice": lambda x: np.repeat(x, 2, axis=2)[:, :, ::2],
    "no axes": lambda x: np.array(x[0, 0, 0]),
    "a number": lambda x: x[0, 0, 0],
}


def call_over(convert):
    """The arguments of a call over a converted input, with all that goes with it."""
    given = one_call(residual=None, out=None)
    given |= {name: convert(given[name]) for name in ("x", "dy")}
    shape = np.shape(given["x"])
    channels = shape[1] if len(shape) > 1 else 4
    names = ("mean", "var", "weight", "bias", "batch_mean", "batch_m2", "running_mean", "running_var")
    given |= {name: np.resize(given[name], channels) for name in names}
    return given | {"count": int(np.prod(shape)) // max(channels, 1)}


# What else is not plain in any of the three functions.
EVERYWHERE = {
    "an axis behind": {"axis": 3},
    "an axis before": {"axis": -4},
    "a huge axis": {"axis": 1 << 80},
    "a bool axis": {"axis": True},
    "an axis of NumPy": {"axis": np.int64(1)},
    "a negative eps": {"eps": -1e-5},
    "eps NaN": {"eps": float("nan")},
    "eps infinite": {"eps": float("inf")},
    "an integer eps": {"eps": 1},
    "a weight of another length": {"weight": np.ones(3, np.float32)},
    "a weight of another type": {"weight": np.ones(4, np.float16)},
    "a weight with two axes": {"weight": np.ones((4, 1), np.float32)},
    "a bias as a list": {"bias": [0.0] * 4},
    "an unknown activation": {"activation": "gelu"},
    "an activation that has no hash": {"activation": ["relu"]},
    "an out of another type": {"out": np.zeros((3, 4, 5), np.float64)},
    "an out of another shape": {"out": np.zeros((3, 4, 6), np.float32)},
    "an out in another order": {"out": np.zeros((3, 4, 5), np.float32, order="F")},
    "an out that is read-only": {"out": lambda given: read_only(given["out"])},
    "an out that overlaps": {"out": lambda given: overlap(given)},
    "an out that is no array": {"out": bytearray(240)},
}


def overlap(given):
    """An out whose memory begins one element behind that of x."""
    memory = np.zeros(61, np.float32)
    given["x"] = memory[:60].reshape(3, 4, 5)
    return memory[1:].reshape(3, 4, 5)


ONCE = [
    (infer, {"mean": None}),
    (infer, {"mean": np.zeros(3)}),
    (infer, {"var": [1.0] * 4}),
    (infer, {"var": np.float32([1, 1, -1, 1])}),
    (infer, {"var": np.float32([1, 1, -1e-5, 1]), "eps": 1e-6}),
    (infer, {"residual": lambda given: given["residual"].astype(np.float64)}),
    (infer, {"residual": lambda given: given["residual"][:, :, :4]}),
    (infer, {"residual": lambda given: np.asfortranarray(given["residual"])}),
    (train, {"residual": lambda given: given["residual"].tolist()}),
    (train, {"momentum": 1}),
    (train, {"momentum": 1.5}),
    (train, {"momentum": float("nan")}),
    (train, {"running_mean": lambda given: read_only(given["mean"])}),
    (train, {"running_mean": lambda given: np.zeros(8, np.float32)[::2]}),
    (train, {"running_mean": lambda given: given["x"].reshape(-1)[:4]}),
    (train, {"running_mean": lambda given: given["out"].reshape(-1)[:4]}),
    (train, {"running_var": lambda given: given["running_mean"]}),
    (train, {"running_var": [1.0] * 4}),
    (backward, {"dy": None}),
    (backward, {"dy": lambda given: given["dy"].astype(np.float64)}),
    (backward, {"out": lambda given: given["dy"].reshape(-1)[::-1].reshape(3, 4, 5)}),
    (backward, {"count": 14}),
    (backward, {"count": 0, "training": False}),
    (backward, {"count": 1 << 63, "training": False}),
    (backward, {"count": np.int64(15)}),
    (backward, {"count": Count(15)}),
    (backward, {"training": 1}),
    (train, {"unbiased": np.True_}),
    (backward, {"batch_mean": None}),
    (backward, {"batch_mean": lambda given: given["batch_mean"].astype(np.float32)}),
    (backward, {"batch_m2": lambda given: np.repeat(given["batch_m2"], 2)[::2]}),
    (backward, {"batch_m2": lambda given: given["batch_m2"][:3]}),
    (backward, {"batch_m2": "m2"}),
]


@pytest.mark.parametrize("function", [infer, train, backward])
def test_one_call_is_plain(function):
    assert function(one_call()) is not None


def is_left_alone(function, given):
    before = {name: value.tobytes() for name, value in given.items() if isinstance(value, np.ndarray)}
    return function(given) is None and before == {name: given[name].tobytes() for name in before}


@pytest.mark.parametrize("function", [infer, train, backward])
def test_an_input_that_is_not_plain_is_left_alone(function):
    assert function(call_over(lambda x: x)) is not None
    assert [name for name, convert in INPUTS.items() if not is_left_alone(function, call_over(convert))] == []


@pytest.mark.parametrize(("function", "changed"), [(f, c) for c in EVERYWHERE.values() for f in (infer, train, backward)] + ONCE)
def test_what_is_not_plain_is_left_alone(function, changed):
    assert is_left_alone(function, one_call(**changed))


@pytest.mark.parametrize(
    "changed", [{}, {"axis": -1}, {"activation": "relu6", "residual": None}, {"weight": None, "bias": None, "out": None}]
)
def test_the_public_functions_leave_plain_arrays_to_the_compiled_part(changed, monkeypatch):
    for name in ("infer", "train", "backward"):
        monkeypatch.delattr(any_arrays, name)
    given = one_call(**changed)
    x, dy, weight, bias, out, axis = (given[name] for name in ("x", "dy", "weight", "bias", "out", "axis"))
    if axis == -1:
        weight = bias = None
    options = {"axis": axis, "activation": given["activation"], "out": out}
    _, stats = fastbn.batch_norm_train(x, weight, bias, residual=given["residual"], **options)
    fastbn.batch_norm(x, stats.mean, stats.var, weight, bias, residual=given["residual"], **options)
    fastbn.batch_norm_backward(dy, x, stats, weight, bias, **options)
    fastbn.batch_norm_backward(dy, x, stats, weight, bias, training=False, **options)


@pytest.mark.parametrize("training", [False, True])
def test_statistics_that_were_assigned_are_read_again(training):
    x, dy = tensors((3, 4, 5), np.float32, 2)
    want = fastbn.batch_norm_backward(dy, x, fastbn.batch_stats(x), np.ones(4), np.ones(4), training=training)
    for change in (lambda m: np.repeat(m, 2)[::2], lambda m: m[::-1].copy()[::-1], swapped, unaligned):
        stats = fastbn.batch_stats(x)
        stats.mean, stats.m2 = change(stats.mean), change(stats.m2)
        stats.count = np.int64(15)
        got = fastbn.batch_norm_backward(dy, x, stats, np.ones(4), np.ones(4), training=training)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mean", np.zeros(3)),
        ("m2", np.zeros(1)),
        ("m2", None),
        ("mean", "mean"),
        ("mean", np.zeros(4, int)),
        ("count", None),
        ("count", -1),
    ],
)
def test_statistics_that_cannot_be_read_are_refused(name, value):
    x, dy = tensors((3, 4, 5), np.float32, 2)
    stats = fastbn.batch_stats(x)
    setattr(stats, name, value)
    with pytest.raises((fastbn.ArgumentError, fastbn.ArgumentTypeError), match=r"^Expected .* - at `stats(\.mean|\.m2|\.count)?`$"):
        fastbn.batch_norm_backward(dy, x, stats, training=False)


def test_a_count_beyond_64_bits_is_refused():
    x, dy = tensors((3, 4, 5), np.float32, 2)
    stats = fastbn.BatchStats(1 << 63, np.zeros(4), np.ones(4))
    with pytest.raises(
        fastbn.ArgumentError, match=r"^Expected statistics of fewer than 2\*\*63 values, got 9223372036854775808 - at `stats`$"
    ):
        fastbn.batch_norm_backward(dy, x, stats, training=False)
