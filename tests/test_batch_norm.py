"""The array functions against their float64 twin: shapes, strides, dtypes, activations, gradients and the corners of the definition."""

import doctest

import ml_dtypes
import numpy as np
import pytest

import fastbn
from fastbn import backward_halves, functional, reference

SHAPES = [
    (4, 3, 5, 5),
    (32, 21, 7, 7),
    (2, 3, 40, 41),
    (1, 5, 1000),
    (2, 3, 17000),
    (9, 128),
    (70, 3),
    (3, 7),
    (5, 33, 1, 1),
    (2, 6, 3, 4, 5),
    (1, 1, 1),
    (300, 5),
    (40, 130),
    (6, 1, 9),
    (20, 90, 4, 4),
]
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.float16), BFLOAT16]
ACTIVATIONS = [None, "relu", "leaky_relu", "relu6"]
# Half a unit in the last place of a 16-bit result, with room for the float32 arithmetic before it.
ULP = {"float32": 1e-6, "float64": 1e-14, "float16": 2.0**-11 * 1.02, "bfloat16": 2.0**-8 * 1.02}


def random(shape, dtype, seed=0, mean=1.5):
    return (np.random.default_rng(seed).standard_normal(shape) + mean).astype(dtype)


def parameters(channels, dtype=np.float64):
    rng = np.random.default_rng(7)
    return rng.standard_normal(channels).astype(dtype), rng.standard_normal(channels).astype(dtype)


def assert_close(got, want, dtype, factor=2.0):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    np.testing.assert_array_less(np.abs(got - want), ULP[np.dtype(dtype).name] * factor * (1 + np.abs(want)))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_matches_the_twin(shape, axis, dtype):
    x = random(shape, dtype)
    weight, bias = parameters(shape[axis])
    running = [np.zeros(shape[axis]), np.ones(shape[axis])]
    expected_running = [values.copy() for values in running]
    y, stats = fastbn.batch_norm_train(x, weight, bias, running_mean=running[0], running_var=running[1], axis=axis)
    twin = x.astype(np.float64)
    want, want_stats = reference.batch_norm_train(
        twin, weight, bias, running_mean=expected_running[0], running_var=expected_running[1], axis=axis
    )
    assert y.dtype == dtype
    assert stats.count == want_stats.count
    assert_close(y, want, dtype, 4)
    np.testing.assert_allclose(stats.mean, want_stats.mean, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(stats.m2, want_stats.m2, rtol=1e-6, atol=1e-30)
    np.testing.assert_allclose(running, expected_running, rtol=1e-6, atol=1e-7)
    alone = fastbn.batch_stats(x, axis=axis)
    assert alone.mean.tobytes() == stats.mean.tobytes()
    assert alone.m2.tobytes() == stats.m2.tobytes()
    inferred = fastbn.batch_norm(x, stats.mean, stats.var, weight, bias, axis=axis)
    assert inferred.tobytes() == y.tobytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward_matches_the_twin(shape, axis, training, dtype):
    x, dy = random(shape, dtype), random(shape, dtype, seed=1, mean=0.2)
    weight, bias = parameters(shape[axis])
    stats = fastbn.batch_stats(x, axis=axis) if training else fastbn.BatchStats(1, np.full(shape[axis], 1.4), np.full(shape[axis], 1.1))
    dx, dweight, dbias = fastbn.batch_norm_backward(dy, x, stats, weight, bias, axis=axis, training=training)
    want = reference.batch_norm_backward(dy.astype(np.float64), x.astype(np.float64), stats, weight, bias, axis=axis, training=training)
    # Two or three values in a channel divide by almost nothing: dx is as exact as the magnitudes it is the difference of.
    magnitude = np.abs(weight) / np.sqrt(stats.var + 1e-5)
    tolerance = (
        ULP[dtype.name] * 4 * (np.abs(want[0]) + 4 * np.moveaxis(np.broadcast_to(magnitude, np.moveaxis(x, axis, -1).shape), -1, axis))
    )
    np.testing.assert_array_less(np.abs(dx.astype(np.float64) - want[0]), tolerance + 1e-30)
    scale = np.sqrt(x.size)
    np.testing.assert_allclose(dweight, want[1], rtol=2e-6, atol=2e-6 * scale)
    np.testing.assert_allclose(dbias, want[2], rtol=2e-6, atol=1e-6 * scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("shape", "axis"), [((3, 4, 9, 9), 1), ((5, 37, 6), 1), ((30, 11), 1), ((3, 9, 9, 20), -1), ((8, 30, 3, 3), 1)])
def test_activation_and_residual(shape, axis, activation, with_residual, dtype):
    x, dy = random(shape, dtype), random(shape, dtype, seed=1)
    residual = random(shape, dtype, seed=2, mean=1) if with_residual else None
    wide = [None if array is None else array.astype(np.float64) for array in (x, dy, residual)]
    weight, bias = parameters(shape[axis], np.float32)
    options = {"axis": axis, "activation": activation}
    y, stats = fastbn.batch_norm_train(x, 3 * weight, bias, residual=residual, **options)
    want, _ = reference.batch_norm_train(wide[0], 3 * weight, bias, residual=wide[2], **options)
    assert_close(y, want, dtype, 12)
    inferred = fastbn.batch_norm(x, stats.mean, stats.var, 3 * weight, bias, residual=residual, **options)
    assert inferred.tobytes() == y.tobytes()
    if dtype.itemsize == 2:
        return  # next to a corner the twin may stand on the other side of it
    for training in (True, False):
        got = fastbn.batch_norm_backward(dy, x, stats, 3 * weight, bias, residual=residual, training=training, **options)
        want = reference.batch_norm_backward(wide[1], wide[0], stats, 3 * weight, bias, residual=wide[2], training=training, **options)
        assert len(got) == len(want)
        for mine, twin in zip(got, want, strict=True):
            np.testing.assert_allclose(mine, twin, rtol=2e-5, atol=5e-5)


def test_every_axis_and_parameter_type():
    x = random((4, 5, 6, 7), np.float32)
    for axis in range(-4, 4):
        for dtype in (np.float32, np.float64):
            weight, bias = parameters(x.shape[axis], dtype)
            y, _ = fastbn.batch_norm_train(x, weight, bias, axis=axis)
            want, _ = reference.batch_norm_train(x.astype(np.float64), weight, bias, axis=axis)
            assert_close(y, want, np.float32, 3)
    assert_close(fastbn.batch_stats(x[0, 0, 0], axis=0).mean, x[0, 0, 0], np.float32)


def strided(kind):
    base = random((6, 10, 8, 14), np.float32)
    return {
        "contiguous": base,
        "fortran": np.asfortranarray(base),
        "channels last in channels first": base.transpose(0, 3, 1, 2),
        "every second channel": base[:, ::2],
        "every second sample": base[::2],
        "cropped": base[:, :, 1:-1, 2:-3],
        "cropped channels last": base.transpose(0, 3, 1, 2)[:, :, 2:7, 1:],
        "every second column": base[..., ::2],
        "backwards": base[::-1, ::-1, ::-1, ::-1],
        "backwards samples": base[::-1, ::-1],
        "broadcast samples": np.broadcast_to(base[:1], base.shape),
        "broadcast columns": np.broadcast_to(base[..., :1], base.shape),
        "width before height": base.transpose(0, 1, 3, 2),
        "unaligned": np.frombuffer(b"x" + base.tobytes(), np.uint8)[1:].view(np.float32).reshape(base.shape),
        "swapped bytes": base.astype(">f4"),
    }[kind]


@pytest.mark.parametrize(
    "kind",
    [
        *("contiguous", "fortran", "channels last in channels first", "every second channel", "every second sample", "cropped"),
        *("cropped channels last", "every second column", "backwards", "backwards samples", "broadcast samples", "broadcast columns"),
        *("width before height", "unaligned", "swapped bytes"),
    ],
)
def test_any_strides(kind):
    x = strided(kind)
    before = x.copy()
    weight, bias = parameters(x.shape[1])
    want, _ = reference.batch_norm_train(x.astype(np.float64), weight, bias)
    y, stats = fastbn.batch_norm_train(x, weight, bias)
    assert_close(y, want, np.float32, 3)
    out = np.full((*x.shape[:-1], x.shape[-1] + 3), 9, np.float32)
    fastbn.batch_norm(x, stats.mean, stats.var, weight, bias, out=out[..., 1:-2])
    assert_close(out[..., 1:-2], want, np.float32, 3)
    assert (out[..., 0] == 9).all()
    assert (out[..., -2:] == 9).all()
    dy = random(x.shape, np.float32, seed=3)
    dx, _, _ = fastbn.batch_norm_backward(dy, x, stats, weight, bias)
    twin = reference.batch_norm_backward(dy.astype(np.float64), x.astype(np.float64), stats, weight, bias)
    np.testing.assert_allclose(dx, twin[0], atol=1e-5)
    assert np.array_equal(x, before)


@pytest.mark.parametrize("shape", [(8, 3, 20, 20), (6, 50), (8, 40, 5, 5), (2, 70, 3)])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_in_place_is_out_of_place(shape, activation):
    x, dy, residual = (random(shape, np.float32, seed) for seed in range(3))
    weight, bias = parameters(shape[1])
    y, stats = fastbn.batch_norm_train(x, weight, bias, activation=activation, residual=residual)
    for inside in (0, 1):
        arrays = [x.copy(), residual.copy()]
        result, _ = fastbn.batch_norm_train(arrays[0], weight, bias, activation=activation, residual=arrays[1], out=arrays[inside])
        assert result is arrays[inside]
        assert result.tobytes() == y.tobytes()
    arrays = [x.copy(), residual.copy()]
    result = fastbn.batch_norm(arrays[0], stats.mean, stats.var, weight, bias, activation=activation, residual=arrays[1], out=arrays[0])
    assert result.tobytes() == y.tobytes()
    for training in (True, False):
        options = {"activation": activation, "training": training}
        want = fastbn.batch_norm_backward(dy, x, stats, weight, bias, residual=residual, **options)
        for inside in range(3):
            arrays = [dy.copy(), x.copy(), residual.copy()]
            got = fastbn.batch_norm_backward(*arrays[:2], stats, weight, bias, residual=arrays[2], out=arrays[inside], **options)
            assert got[0] is arrays[inside]
            assert [array.tobytes() for array in got] == [array.tobytes() for array in want]


def test_only_wanted_gradients():
    x, dy = random((4, 3, 5), np.float32), random((4, 3, 5), np.float32, 1)
    stats = fastbn.batch_stats(x)
    weight, bias = parameters(3, np.float32)
    for training in (True, False):
        full = fastbn.batch_norm_backward(dy, x, stats, weight, bias, training=training)
        assert [full[1].dtype, full[2].dtype] == [np.float32, np.float32]
        dx, dweight, dbias = fastbn.batch_norm_backward(dy, x, stats, weight, None, training=training)
        assert dbias is None
        assert (dx.tobytes(), dweight.tobytes()) == (full[0].tobytes(), full[1].tobytes())
        dx, dweight, dbias = fastbn.batch_norm_backward(dy, x, stats, training=training)
        assert (dweight, dbias) == (None, None)
        np.testing.assert_allclose(dx, reference.batch_norm_backward(dy, x, stats, training=training)[0], atol=1e-6)
    assert fastbn.batch_norm_backward(dy, x, stats, residual=x)[3] is dy


def test_empty_batches():
    for shape in [(0, 3), (0, 3, 4), (2, 3, 0), (2, 0, 4), (0, 0)]:
        x = np.empty(shape, np.float32)
        channels = shape[1]
        running = np.full(channels, 3.0)
        weight = np.ones(channels)
        y, stats = fastbn.batch_norm_train(x, weight, weight, running_mean=running, running_var=running.copy())
        assert y.shape == shape
        assert stats.count == 0
        assert stats.mean.tolist() == stats.var.tolist() == [0.0] * channels
        assert running.tolist() == [3.0] * channels
        assert fastbn.batch_norm(x, weight, weight).shape == shape
        dx, dweight, dbias = fastbn.batch_norm_backward(y, x, stats, weight, weight)
        assert dx.shape == shape
        assert dweight.tolist() == dbias.tolist() == [0.0] * channels


def test_one_value_per_channel():
    running_var = np.ones(3)
    x = np.array([[1.0, -2.0, 1e30]], np.float32)
    y, stats = fastbn.batch_norm_train(x, bias=np.array([1.0, 2.0, 3.0]), running_var=running_var, momentum=0.5)
    assert y.tolist() == [[1.0, 2.0, 3.0]]
    assert stats.mean.tolist() == x[0].astype(np.float64).tolist()
    assert running_var.tolist() == [0.5, 0.5, 0.5]


def test_momentum_and_bias_of_running_statistics():
    x = np.array([[1.0], [3.0]])
    for unbiased, var in ((True, 2.0), (False, 1.0)):
        mean, running = np.array([10.0]), np.array([4.0], np.float32)
        fastbn.batch_norm_train(x, running_mean=mean, running_var=running, momentum=0.25, unbiased=unbiased)
        assert mean.tolist() == [0.75 * 10 + 0.25 * 2]
        assert running.tolist() == [0.75 * 4 + 0.25 * var]


@pytest.mark.parametrize("value", [0.1, -3e7, 1e30, 1e-30, 0.0])
@pytest.mark.parametrize("eps", [1e-5, 0.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
def test_constant_channel_is_exactly_bias(value, eps, dtype):
    if dtype == np.float16 and abs(value) > 6e4:
        pytest.skip("not a float16")
    for shape in [(5, 3, 40), (40, 3), (50, 3, 3, 3)]:
        x = random(shape, dtype)
        x[:, 1] = value
        y, stats = fastbn.batch_norm_train(x, np.full(3, 2.0), np.array([0.3, 0.7, 0.9]), eps=eps)
        assert (y[:, 1] == np.array(0.7).astype(dtype)).all()
        assert stats.m2[1] == 0
        assert stats.mean[1] == float(dtype.type(value))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_stay_in_their_channel(poison, activation):
    for shape in [(4, 5, 40), (40, 5), (30, 5, 3, 3)]:
        clean = random(shape, np.float32)
        y_clean, stats_clean = fastbn.batch_norm_train(clean, activation=activation)
        for place in (0, -1, clean[:, 2].size // 2):
            x = clean.copy()
            channel = x[:, 2].copy()
            channel.reshape(-1)[place] = poison
            x[:, 2] = channel
            y, stats = fastbn.batch_norm_train(x, activation=activation)
            assert np.isnan(y[:, 2]).all()
            y[:, 2] = y_clean[:, 2]
            assert y.tobytes() == y_clean.tobytes()
            assert np.isnan(stats.var).tolist() == [False, False, True, False, False]
            assert np.array_equal(np.delete(stats.mean, 2), np.delete(stats_clean.mean, 2))
            given = fastbn.batch_norm(x, np.zeros(5), np.ones(5), activation=activation)
            assert np.isnan(given).sum() == (1 if np.isnan(poison) else 0)


def test_activations_at_infinity():
    x = np.array([[np.inf], [-np.inf], [np.nan]], np.float32)
    ones, zeros = np.ones(1), np.zeros(1)
    for activation, want in (("relu", [np.inf, 0]), ("leaky_relu", [np.inf, -np.inf]), ("relu6", [6, 0]), (None, [np.inf, -np.inf])):
        y = fastbn.batch_norm(x, zeros, ones, activation=activation)
        assert y[:2, 0].tolist() == want
        assert np.isnan(y[2, 0])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("with_residual", [False, True])
def test_gradients_are_the_differences(activation, with_residual):
    rng = np.random.default_rng(3)
    x, dy = rng.standard_normal((3, 2, 4)), rng.standard_normal((3, 2, 4))
    residual = rng.standard_normal(x.shape) if with_residual else None
    weight, bias = np.array([1.5, -0.7]), np.array([0.2, 0.4])

    def loss():
        y, _ = fastbn.batch_norm_train(x, weight, bias, activation=activation, residual=residual)
        return float((y * dy).sum())

    stats = fastbn.batch_stats(x)
    gradients = fastbn.batch_norm_backward(dy, x, stats, weight, bias, activation=activation, residual=residual)
    for values, gradient in zip((x, weight, bias, residual), gradients, strict=False):
        numeric = np.empty_like(gradient)
        for place in np.ndindex(values.shape):
            before = values[place]
            values[place] = before + 1e-6
            above = loss()
            values[place] = before - 1e-6
            numeric[place] = (above - loss()) / 2e-6
            values[place] = before
        np.testing.assert_allclose(gradient, numeric, atol=2e-8)


def test_identities_of_the_gradient():
    x, dy = random((8, 6, 30), np.float64, mean=100), random((8, 6, 30), np.float64, 1, mean=3)
    dx, _, _ = fastbn.batch_norm_backward(dy, x, fastbn.batch_stats(x), np.ones(6), np.zeros(6), eps=0.0)
    xhat, _ = fastbn.batch_norm_train(x, eps=0.0)
    np.testing.assert_allclose(dx.sum((0, 2)), 0, atol=1e-11)
    np.testing.assert_allclose((dx * xhat).sum((0, 2)), 0, atol=1e-11)


@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_pytorch(training):
    torch = pytest.importorskip("torch")
    x, dy = random((5, 4, 6, 6), np.float64), random((5, 4, 6, 6), np.float64, 1)
    weight, bias = parameters(4)
    stats = fastbn.batch_stats(x)
    tensors = [torch.tensor(values, requires_grad=True) for values in (x, weight, bias)]
    mean, var = torch.tensor(stats.mean), torch.tensor(stats.var)
    torch.relu(torch.nn.functional.batch_norm(tensors[0], mean, var, *tensors[1:], training=training)).backward(torch.tensor(dy))
    got = fastbn.batch_norm_backward(dy, x, stats, weight, bias, activation="relu", training=training)
    for mine, theirs in zip(got, tensors, strict=True):
        np.testing.assert_allclose(mine, theirs.grad.numpy(), rtol=1e-9, atol=1e-11)


class OnlyDlpack:
    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def test_objects_that_are_not_ndarrays():
    import array

    x = random((6, 3), np.float32)
    want = fastbn.batch_norm(x, np.zeros(3), np.ones(3))
    assert np.array_equal(fastbn.batch_norm(OnlyDlpack(x), np.zeros(3), np.ones(3)), want)
    assert np.array_equal(fastbn.batch_norm(memoryview(x), array.array("d", [0] * 3), np.ones(3)), want)
    out = OnlyDlpack(np.empty_like(x))
    assert fastbn.batch_norm(x, np.zeros(3), np.ones(3), out=out) is out
    assert np.array_equal(out.array, want)
    running = array.array("f", [0, 0, 0])
    fastbn.batch_norm_train(x, running_mean=running, momentum=1.0)
    np.testing.assert_allclose(running, x.mean(0), rtol=1e-6)


def test_examples():
    result = doctest.testmod(functional)
    assert result.attempted > 10
    assert result.failed == 0


def parts(array, axis=0):
    """Uneven parts of a batch, one of them empty."""
    size = array.shape[axis]
    return np.split(array, sorted({0, 1, size // 3 + 1}), axis=axis)


def in_halves(dys, xs, weight, bias, **options):
    """What processes with a part of the batch each compute: (y, dx) of the parts, and dweight, dbias of the whole."""
    stats = fastbn.merge_stats([fastbn.batch_stats(x, axis=options["axis"]) for x in xs])
    ys = [functional.normalize_with(x, stats, weight, bias, **options) for x in xs]
    found = [backward_halves.backward_sums(dy, x, stats, weight, bias, **options) for dy, x in zip(dys, xs, strict=True)]
    sums = np.sum([half[0] for half in found], axis=0)
    dxs = [backward_halves.backward_input(dy, x, stats, sums, weight, bias, **options) for dy, x in zip(dys, xs, strict=True)]
    return ys, dxs, np.sum([half[1] for half in found], axis=0), np.sum([half[2] for half in found], axis=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[0] > 1], ids=str)
def test_a_batch_in_parts_is_the_whole_batch(shape, axis, dtype):
    # In float64 the twin is no more exact than the kernels are.
    x, dy = random(shape, dtype, mean=1.5 if dtype == np.float64 else 100), random(shape, dtype, seed=1, mean=0.2)
    weight, bias = parameters(shape[axis])
    ys, dxs, dweight, dbias = in_halves(parts(dy), parts(x), weight, bias, axis=axis)
    wide, stats = x.astype(np.float64), reference.batch_stats(x, axis=axis)
    assert_close(np.concatenate(ys), reference.batch_norm(wide, stats.mean, stats.var, weight, bias, axis=axis), dtype, 4)
    want = reference.batch_norm_backward(dy.astype(np.float64), wide, stats, weight, bias, axis=axis)
    magnitude = np.abs(weight) / np.sqrt(stats.var + 1e-5)
    tolerance = (
        ULP[dtype.name] * 4 * (np.abs(want[0]) + 4 * np.moveaxis(np.broadcast_to(magnitude, np.moveaxis(x, axis, -1).shape), -1, axis))
    )
    np.testing.assert_array_less(np.abs(np.concatenate(dxs).astype(np.float64) - want[0]), tolerance + 1e-30)
    np.testing.assert_allclose(dweight, want[1], rtol=2e-6, atol=2e-6 * np.sqrt(x.size))
    np.testing.assert_allclose(dbias, want[2], rtol=2e-6, atol=1e-6 * np.sqrt(x.size))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("shape", "axis"), [((4, 3, 40, 41), 1), ((32, 21, 7, 7), 1), ((9, 128), 1), ((3, 9, 9, 20), -1), ((1, 2, 17000), 1)]
)
def test_one_part_gives_the_bits_of_the_whole_call(shape, axis, activation):
    x, dy = random(shape, np.float32), random(shape, np.float32, seed=1)
    weight, bias = parameters(shape[axis], np.float32)
    options = {"axis": axis, "activation": activation}
    y, stats = fastbn.batch_norm_train(x, weight, bias, **options)
    (got_y,), (got_dx,), *got = in_halves([dy], [x], weight, bias, **options)
    dx, *want = fastbn.batch_norm_backward(dy, x, stats, weight, bias, **options)
    assert got_y.tobytes() == y.tobytes()
    assert got_dx.tobytes() == dx.tobytes()
    assert [array.tobytes() for array in got] == [array.tobytes() for array in want]


def test_parts_of_a_constant_channel_without_eps():
    x = np.full((6, 2, 3), 5, np.float32)
    ys, dxs, *_ = in_halves(parts(x), parts(x), np.ones(2), np.array([3.0, 4.0]), eps=0.0, axis=1)
    assert (np.concatenate(ys) == np.array([3, 4], np.float32)[:, None]).all()
    assert (np.concatenate(dxs) == 0).all()


def test_sums_of_another_shape_are_refused():
    x = np.ones((2, 3), np.float32)
    with pytest.raises(fastbn.ArgumentError, match=r"Expected shape \(2, 3\), got shape \(3, 2\) - at `sums`"):
        backward_halves.backward_input(x, x, fastbn.batch_stats(x), np.zeros((3, 2)))
