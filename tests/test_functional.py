"""fold_conv and fold_linear: the C kernel against its NumPy twin bit for bit, both against convolutions in float64, and every error."""

import doctest

import ml_dtypes
import numpy as np
import pytest

import fastbn
from fastbn import folding, reference

DTYPES = [np.dtype(kind) for kind in (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)]
CONVS = {
    "conv1d": ((6, 4, 3), {}),
    "conv2d": ((6, 4, 3, 2), {}),
    "conv3d": ((4, 2, 3, 1, 2), {}),
    "groups": ((6, 2, 3, 3), {"groups": 2}),
    "depthwise": ((6, 1, 3, 3), {"groups": 6}),
    "pointwise": ((6, 4, 1, 1), {}),
    "transposed": ((4, 6, 3, 3), {"transposed": True}),
    "transposed groups": ((4, 3, 2, 2), {"transposed": True, "groups": 2}),
    "transposed depthwise": ((4, 1, 2, 2), {"transposed": True, "groups": 4}),
}
LINEARS = {"linear": ((5, 7), {}), "linear transposed": ((7, 5), {"transposed": True})}


def _channels(shape, options):
    if options.get("transposed"):
        return shape[1] * options.get("groups", 1)
    return shape[0]


def _arguments(shape, options, dtype, seed=0):
    rng = np.random.default_rng(seed)
    count = _channels(shape, options)
    weight, bias = rng.standard_normal(shape).astype(dtype), rng.standard_normal(count).astype(dtype)
    mean, gamma, beta = rng.standard_normal((3, count)).astype(np.float32)
    return weight, bias, mean, rng.uniform(0.1, 3, count).astype(np.float32), gamma, beta


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CONVS, *LINEARS])
def test_equals_its_twin_bit_for_bit(case, dtype):
    name = "fold_linear" if case in LINEARS else "fold_conv"
    shape, options = {**CONVS, **LINEARS}[case]
    for seed in range(4):
        weight, bias, mean, var, gamma, beta = _arguments(shape, options, dtype, seed)
        optional = [(None, None, None), (bias, gamma, beta), (None, gamma, beta), (bias, None, None)][seed]
        arguments = (weight, optional[0], mean, var, *optional[1:])
        results = getattr(folding, name)(*arguments, eps=1e-3, **options)
        twins = getattr(reference, name)(*arguments, eps=1e-3, **options)
        for result, twin, width in zip(results, twins, (shape, (mean.size,)), strict=True):
            assert result.dtype == dtype
            assert result.shape == width
            assert result.tobytes() == twin.tobytes()


def _convolve(x, weight, bias, groups=1, transposed=False):
    """Convolve (channels, *spatial) in float64 without padding, by the definition."""
    spatial = weight.ndim - 2
    inner = weight.shape[0 if transposed else 1]
    outer = weight.shape[1] * groups if transposed else weight.shape[0]
    per_in, per_out = x.shape[0] // groups, outer // groups
    kernel = weight.shape[2:]
    change = [k - 1 if transposed else 1 - k for k in kernel]
    result = np.zeros((outer, *(size + c for size, c in zip(x.shape[1:], change, strict=True))))
    assert inner == (x.shape[0] if transposed else per_in)
    for out in range(outer):
        group = out // per_out
        for channel in range(per_in):
            data = x[group * per_in + channel]
            taps = weight[group * per_in + channel, out % per_out] if transposed else weight[out, channel]
            for at in np.ndindex(*kernel):
                if transposed:
                    place = tuple(slice(at[i], at[i] + data.shape[i]) for i in range(spatial))
                    result[(out, *place)] += taps[at] * data
                else:
                    place = tuple(slice(at[i], at[i] + result.shape[1 + i]) for i in range(spatial))
                    result[out] += taps[at] * data[place]
        result[out] += bias[out]
    return result


@pytest.mark.parametrize("case", CONVS)
def test_folded_convolution_equals_convolution_and_norm(case):
    shape, options = CONVS[case]
    weight, bias, mean, var, gamma, beta = (array.astype(np.float64) for array in _arguments(shape, options, np.float64))
    inputs = shape[0] if options.get("transposed") else shape[1] * options.get("groups", 1)
    x = np.random.default_rng(9).standard_normal((inputs, *[5] * (len(shape) - 2)))
    along = (slice(None), *[None] * (len(shape) - 2))
    y = _convolve(x, weight, bias, **options)
    expected = (y - mean[along]) / np.sqrt(var + 1e-2)[along] * gamma[along] + beta[along]
    found = _convolve(x, *fastbn.fold_conv(weight, bias, mean, var, gamma, beta, eps=1e-2, **options), **options)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", LINEARS)
def test_folded_linear_equals_linear_and_norm(case):
    shape, options = LINEARS[case]
    weight, bias, mean, var, gamma, beta = (array.astype(np.float64) for array in _arguments(shape, options, np.float64))
    x = np.random.default_rng(9).standard_normal((4, 7))

    def matrix(weight):
        return weight if options else weight.T

    expected = (x @ matrix(weight) + bias - mean) / np.sqrt(var + 1e-5) * gamma + beta
    new_weight, new_bias = fastbn.fold_linear(weight, bias, mean, var, gamma, beta, **options)
    np.testing.assert_allclose(x @ matrix(new_weight) + new_bias, expected, rtol=1e-12, atol=1e-12)


def test_inputs_stay_and_strides_are_welcome():
    weight, bias, mean, var, gamma, beta = _arguments((6, 4, 3, 3), {}, np.float32)
    strided = np.repeat(weight, 2, axis=2)[:, :, ::2]
    copies = [array.copy() for array in (weight, bias, mean, var, gamma, beta)]
    expected = fastbn.fold_conv(weight, bias, mean, var, gamma, beta)
    for array, copy in zip((weight, bias, mean, var, gamma, beta), copies, strict=True):
        assert array.tobytes() == copy.tobytes()
    found = fastbn.fold_conv(strided, bias, mean, var, gamma, beta)
    assert found[0].tobytes() == expected[0].tobytes()


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_weights_of_another_byte_order_or_at_an_odd_address(dtype):
    weight, *others = _arguments((6, 4, 3, 3), {}, np.float32)
    weight, others = weight.astype(dtype), [array.astype(dtype) for array in others]
    expected = fastbn.fold_conv(weight, *others)
    swapped = [array.astype(array.dtype.newbyteorder()) for array in (weight, *others)]
    odd = [np.frombuffer(b"x" + array.tobytes(), np.uint8)[1:].view(dtype).reshape(array.shape) for array in (weight, *others)]
    for arrays in (swapped, odd):
        for found, want in zip(fastbn.fold_conv(*arrays), expected, strict=True):
            assert (found.dtype, found.tobytes()) == (np.dtype(dtype), want.tobytes())
        linear = fastbn.fold_linear(arrays[0][:, :, 0, 0], *arrays[1:])
        assert linear[0].tobytes() == expected[0][:, :, 0, 0].tobytes()
        twin = reference.fold_conv(*arrays)
        assert all(np.array_equal(found, want) for found, want in zip(twin, expected, strict=True))


def test_lists_and_float64_parameters_beside_float16_weights():
    weight = np.ones((2, 1, 1), np.float16)
    weight, bias = fastbn.fold_conv(weight, None, [0.0, 1.0], [1.0, 4.0], eps=0.0)
    assert weight.dtype == bias.dtype == np.float16
    assert weight.ravel().tolist() == [1.0, 0.5]
    assert bias.tolist() == [0.0, -0.5]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_overflow_flush_and_nan_are_reported(dtype):
    ones, zeros = np.ones(2), np.zeros(2)
    big, small = {"float16": (6e4, 6e-8), "bfloat16": (3e38, 1e-40), "float32": (3e38, 1e-45), "float64": (1e308, 5e-324)}[dtype.name]
    weight = np.array([[1.0], [big]]).astype(dtype)
    with pytest.raises(fastbn.FoldError, match=rf"Expected finite folded weights in {dtype}, got 1 that are Inf or NaN - at `weight`"):
        fastbn.fold_linear(weight, None, zeros, ones, gamma=[1.0, 100.0])
    weight = np.array([[1.0], [small]]).astype(dtype)
    with pytest.raises(fastbn.FoldError, match="1 flushed to zero - at `weight`"):
        fastbn.fold_linear(weight, None, zeros, ones, gamma=[1.0, 0.01])
    with pytest.raises(fastbn.FoldError, match="Inf or NaN"):
        fastbn.fold_linear(np.array([[np.nan], [1]]).astype(dtype), None, zeros, ones)
    with pytest.raises(fastbn.FoldError, match="finite folded bias"):
        fastbn.fold_linear(np.ones((2, 1), dtype), np.array([1.0, big]).astype(dtype), zeros, ones, gamma=[1.0, 100.0])
    assert fastbn.fold_linear(weight, None, zeros, ones, gamma=[1.0, 0.0])[0].ravel().tolist() == [pytest.approx(1, rel=1e-2), 0.0]


ONE = np.ones((2, 3, 1, 1), np.float32)
TWO = np.ones(2, np.float32)
BAD = [
    ({"weight": np.ones((2, 3))}, fastbn.ArgumentError, r"Expected at least 3 axes, got shape \(2, 3\) - at `weight`"),
    ({"weight": ONE.astype(np.int32)}, fastbn.ArgumentTypeError, "got int32 - at `weight`"),
    ({"weight": "text"}, fastbn.ArgumentTypeError, "at `weight`"),
    ({"weight": [[1.0], [1.0, 2.0]]}, fastbn.ArgumentTypeError, "Expected an array, got list - at `weight`"),
    ({"weight": None}, fastbn.ArgumentTypeError, "got NoneType - at `weight`"),
    ({"groups": 0}, fastbn.ArgumentError, "Expected an integer >= 1, got 0 - at `groups`"),
    ({"groups": 3}, fastbn.ArgumentError, "Expected a first axis that 3 groups divide"),
    ({"groups": 2.0}, fastbn.ArgumentTypeError, "Expected an integer, got float - at `groups`"),
    ({"groups": True}, fastbn.ArgumentTypeError, "Expected an integer, got bool - at `groups`"),
    ({"bias": np.ones(3)}, fastbn.ArgumentError, r"Expected shape \(2,\), got shape \(3,\) - at `bias`"),
    ({"bias": np.array([1, np.inf])}, fastbn.ArgumentError, "Expected finite values, got inf - at `bias`"),
    ({"mean": np.ones((2, 1))}, fastbn.ArgumentError, r"got shape \(2, 1\) - at `mean`"),
    ({"mean": None}, fastbn.ArgumentTypeError, "Expected an array, got None - at `mean`"),
    ({"var": None}, fastbn.ArgumentTypeError, "Expected an array, got None - at `var`"),
    ({"var": np.array([1, -1.0])}, fastbn.ArgumentError, r"Expected var \+ eps > 0, got -0.99999 - at `var`"),
    ({"var": np.array([1, np.nan])}, fastbn.ArgumentError, "Expected finite values, got nan - at `var`"),
    ({"var": np.zeros(2), "eps": 0.0}, fastbn.ArgumentError, r"Expected var \+ eps > 0, got 0 - at `var`"),
    ({"gamma": np.ones(1)}, fastbn.ArgumentError, "at `gamma`"),
    ({"beta": np.array([0, np.nan])}, fastbn.ArgumentError, "at `beta`"),
    ({"eps": -1e-5}, fastbn.ArgumentError, "Expected a finite number >= 0, got -1e-05 - at `eps`"),
    ({"eps": float("nan")}, fastbn.ArgumentError, "got nan - at `eps`"),
    ({"eps": float("inf")}, fastbn.ArgumentError, "got inf - at `eps`"),
    ({"eps": "small"}, fastbn.ArgumentTypeError, "Expected a number, got str - at `eps`"),
    ({"eps": None}, fastbn.ArgumentTypeError, "Expected a number, got NoneType - at `eps`"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD, ids=[str(number) for number in range(len(BAD))])
def test_bad_arguments_of_fold_conv(changes, error, message):
    arguments = {"weight": ONE, "bias": None, "mean": TWO, "var": TWO, **changes}
    with pytest.raises(error, match=message) as caught:
        fastbn.fold_conv(**arguments)
    assert isinstance(caught.value, (ValueError, TypeError))
    assert "\n" not in str(caught.value)


def test_bad_arguments_of_fold_linear():
    with pytest.raises(fastbn.ArgumentError, match=r"Expected 2 axes, got shape \(2, 3, 1, 1\)"):
        fastbn.fold_linear(ONE, None, TWO, TWO)
    with pytest.raises(fastbn.ArgumentError, match=r"Expected shape \(3,\), got shape \(2,\) - at `mean`"):
        fastbn.fold_linear(np.ones((2, 3)), None, TWO, TWO, transposed=True)


def test_examples_of_the_docstrings():
    results = doctest.testmod(folding)
    assert results.attempted >= 4
    assert results.failed == 0
