"""scale_weight and narrow against NumPy and exact arithmetic: every dtype, one rounding, every layout, the reports."""

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

from fastbn.affine import WeightLayout, batch_norm_affine, narrow, scale_weight
from fastbn.dtypes import DTYPES

DTYPE = {name: np.dtype(getattr(ml_dtypes, name, name)) for name in DTYPES}
LAYOUTS = [
    WeightLayout(1, 1, 5, 7),
    WeightLayout(1, 6, 5, 1),
    WeightLayout(3, 4, 2, 9),
    WeightLayout(2, 1, 3, 1),
    WeightLayout(1, 1, 1, 1),
    WeightLayout(1, 2, 3, 0),
]


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_scale_weight_is_one_rounding_of_the_float64_product(name, layout):
    rng = np.random.default_rng(5)
    weight = rng.standard_normal(layout).astype(DTYPE[name])
    scale = rng.standard_normal(layout.groups * layout.channels)
    expected = narrow(weight.astype(np.float64) * scale.reshape(layout.groups, 1, layout.channels, 1), DTYPE[name])
    result, nonfinite, flushed = scale_weight(weight, scale, layout)
    assert result.dtype == DTYPE[name]
    assert result.tobytes() == expected.tobytes()
    assert (nonfinite, flushed) == (0, 0)


@pytest.mark.parametrize("name", DTYPES)
def test_scale_weight_in_place_and_looking_only(name):
    weight = np.arange(1, 13).reshape(3, 4).astype(DTYPE[name])
    copy, scale = weight.copy(), np.array([0.5, 2.0, -1.0])
    expected = scale_weight(weight, scale, WeightLayout(1, 1, 3, 4))[0]
    assert weight.tobytes() == copy.tobytes()
    assert scale_weight(weight, scale, WeightLayout(1, 1, 3, 4), store=False) == (None, 0, 0)
    assert weight.tobytes() == copy.tobytes()
    assert scale_weight(weight, scale, WeightLayout(1, 1, 3, 4), out=weight)[0] is weight
    assert weight.tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_all_sixteen_bit_values_widen_and_narrow(name):
    weight = np.arange(1 << 16, dtype=np.uint16).view(DTYPE[name])
    result, nonfinite, _ = scale_weight(weight, np.ones(1), WeightLayout(1, 1, 1, weight.size))
    finite = np.isfinite(weight.astype(np.float32))
    assert result[finite].tobytes() == weight[finite].tobytes()
    assert (np.isnan(result.astype(np.float32)) == np.isnan(weight.astype(np.float32))).all()
    assert nonfinite == (~finite).sum()


def _nearest_even(value, mant, bias):
    """Round a float64 by exact arithmetic to a type of `mant` mantissa bits."""
    exact = Fraction(value)
    exponent = max(np.frexp(value)[1] - 1, 1 - bias)
    ulp = Fraction(2) ** int(exponent - mant)
    rounded = round(exact / ulp) * ulp  # Python rounds a Fraction half to even
    largest = (2 - Fraction(1, 2**mant)) * Fraction(2) ** bias
    return float(rounded) if abs(rounded) <= largest else float(np.copysign(np.inf, value))


@pytest.mark.parametrize(("name", "mant", "bias"), [("float16", 10, 15), ("bfloat16", 7, 127), ("float32", 23, 127)])
def test_narrow_and_the_kernel_round_once_to_nearest_even(name, mant, bias):
    rng = np.random.default_rng(7)
    bits = mant + 1
    near_ties = (rng.integers(2**bits, 2 ** (bits + 1), 400) + 0.5) * (1 + rng.choice([-1, 0, 1], 400) * 2.0 ** -(50 - bits))
    values = np.concatenate(
        [
            near_ties * 2.0 ** rng.integers(-6 if name == "float16" else -60, 2, 400) * 2.0**-bits,
            rng.standard_normal(200) * 2.0 ** (1 - bias),  # subnormal results
            2.0 ** (1 - bias - mant) * np.array([0.25, 0.5, 0.5000001, 0.75, 1.0, 1.5, 2.5]),
            2.0**bias * (2 - 2.0**-mant) * np.array([1.0, 1 + 2.0 ** -(mant + 3), 1 + 2.0 ** -(mant + 1)]),
        ]
    )
    expected = np.array([_nearest_even(value, mant, bias) for value in values])
    assert (narrow(values, DTYPE[name]).astype(np.float64) == expected).all()
    ones = np.ones(values.size, DTYPE[name])
    assert (scale_weight(ones, values, WeightLayout(1, 1, values.size, 1))[0].astype(np.float64) == expected).all()


@pytest.mark.parametrize(("name", "big", "small"), [("float16", 6e4, 1e-7), ("bfloat16", 3e38, 1e-40), ("float32", 3e38, 1e-45)])
def test_overflow_and_flush_are_counted(name, big, small):
    weight = np.array([[1, big, 0, big], [1, small, 0, small]]).astype(DTYPE[name])
    assert scale_weight(weight, np.array([4.0, 0.2]), WeightLayout(1, 1, 2, 4))[1:] == (2, 2)
    assert scale_weight(weight, np.array([np.nan, 1.0]), WeightLayout(1, 1, 2, 4))[1] == 4
    assert scale_weight(weight, np.array([0.0, 0.0]), WeightLayout(1, 1, 2, 4))[1:] == (0, 0), "a scale of zero flushes nothing"


def test_overflow_and_flush_of_float64():
    weight = np.array([1e308, 5e-324, 1.0])
    assert scale_weight(weight, np.array([10.0, 0.1, 1.0]), WeightLayout(1, 1, 3, 1))[1:] == (1, 1)


def test_counts_are_right_above_one_block():
    weight = np.full(3 * 4096 + 5, 1e30, np.float32)
    assert scale_weight(weight, np.array([1e30]), WeightLayout(1, 1, 1, weight.size), store=False)[1] == weight.size


@pytest.mark.parametrize("name", DTYPES)
def test_narrow_keeps_the_shape(name):
    assert narrow(np.float64(1.5), DTYPE[name]).shape == ()
    assert narrow(np.ones((2, 0, 3)), DTYPE[name]).shape == (2, 0, 3)


def test_batch_norm_affine_is_the_formula():
    weight, bias, mean, var = (np.random.default_rng(1).uniform(0.5, 2, (4, 3)).astype(np.float32)).astype(np.float64)
    scale, shift = batch_norm_affine(weight, bias, mean, var, 1e-3)
    x = np.linspace(-2, 2, 3)
    np.testing.assert_allclose(scale * x + shift, (x - mean) / np.sqrt(var + 1e-3) * weight + bias, rtol=1e-14)
    scale, shift = batch_norm_affine(None, None, mean, var, 1e-3)
    np.testing.assert_allclose(scale * x + shift, (x - mean) / np.sqrt(var + 1e-3), rtol=1e-14, atol=1e-15)
    assert scale.dtype == shift.dtype == np.float64
