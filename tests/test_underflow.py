"""Folded weights that round to zero: refused where a run could tell, folded where it could not. The oracle is onnxruntime."""

import math

import ml_dtypes
import numpy as np
import pytest
from sketch import conv_bn, folds, model, norm, normal, ops, refuses, run

import fastbn
from fastbn.dtypes import LEAST_NORMAL, UNIT
from fastbn.graph.model.constant import Dense
from fastbn.graph.planner.representable import LARGEST_INPUT, flushed_channels, flushed_factors

CONV = "({0}[N,3,4,4] x) => ({0}[N,4,4,4] y) {{ c = Conv(x, w, b) y = BatchNormalization(c, s, t, m, v) }}"
BEFORE = "({0}[N,3,4,4] x) => ({0}[N,4,4,4] y) {{ n = BatchNormalization(x, s, t, m, v) y = Conv(n, w, b) }}"


def dead(dtype, weight, scale, bias=0.0, channel=2):
    """Return the constants of Conv and BatchNormalization with one channel whose weights and scale are this small."""
    w, parameters = normal(4, 3, 1, 1).astype(dtype), {name: values.astype(dtype) for name, values in norm(4, positive=True).items()}
    w[channel] = np.asarray([weight, -weight, weight], dtype).reshape(3, 1, 1)
    b = normal(4).astype(dtype)
    b[channel] = 0
    parameters["s"][channel], parameters["t"][channel] = scale, bias
    parameters["m"][channel], parameters["v"][channel] = 0, 1
    return {"w": w, "b": b, **parameters}


@pytest.mark.parametrize("bias", [0.0, 1e-40, 0.25])
def test_a_dead_channel_folds(bias):
    folds(conv_bn(CONV.format("float"), **dead(np.float32, 1e-41, 1e-38, bias)), "Conv")


def test_a_dead_channel_of_a_grouped_transposed_convolution_folds():
    constants = dead(np.float32, 1e-41, 1e-38)
    w = normal(4, 2, 1, 1)
    w[2:, 0] = 1e-41
    text = "(float[N,4,4,4] x) => (float[N,4,4,4] y) { c = ConvTranspose<group = 2>(x, w, b) y = BatchNormalization(c, s, t, m, v) }"
    folds(conv_bn(text, **{**constants, "w": w}), "ConvTranspose")


def test_dead_channels_of_gemm_and_matmul_fold():
    weight = normal(3, 4)
    weight[:, 2] = 1e-41
    parameters = {name: values for name, values in dead(np.float32, 1e-41, 1e-38).items() if name not in "wb"}
    for call, names in (("Gemm(x, w, b)", {"b": normal(4)}), ("Gemm(x, w)", {}), ("MatMul(x, w)", {})):
        shiftless = {"t": np.zeros(4, np.float32), "m": np.zeros(4, np.float32)} if call[0] == "M" else {}
        text = f"(float[5,3] x) => (float[5,4] y) {{ c = {call} y = BatchNormalization(c, s, t, m, v) }}"
        folds(model(text, w=weight, **names, **{**parameters, **shiftless}), call[: call.index("(")])


def test_a_dead_input_channel_folds_forward():
    constants = {"w": normal(4, 3, 1, 1), "b": normal(4), **norm(3)}
    constants["s"][1] = 1e-38
    constants["w"][:, 1] = 1e-41
    folds(conv_bn(BEFORE.format("float"), **constants), "Conv")


@pytest.mark.parametrize(("weight", "scale", "bias"), [(6e-8, 0.125, 0.0), (1e-4, 1e-4, 0.0), (1e-4, 1e-4, 1e-4)])
def test_float16_is_refused_where_it_matters(weight, scale, bias):
    sentence = refuses(conv_bn(CONV.format("float16"), **dead(np.float16, weight, scale, bias)), "flush-to-zero")
    assert "3 values of input 1 of Conv 'c' would become zero or lose digits in float16, channels 2" in sentence


@pytest.mark.parametrize(("scale", "kept"), [(1e-4, True), (2.0**-10, False)])
def test_float16_is_refused_where_weights_lose_digits(scale, kept):
    """9e-4 * 1e-4 becomes 1.2e-7, 32 % more; 9.8e-4 * 2^-10 = 2^-20 is held as it is."""
    weight = 9e-4 if kept else 2.0**-10
    proto = conv_bn(CONV.format("float16"), **dead(np.float16, weight, scale))
    if kept:
        assert "3 values of input 1 of Conv 'c'" in refuses(proto, "flush-to-zero", verify=False)
    else:
        assert ops(fastbn.fold(proto).model) == "Conv"
    assert ops(fastbn.fold(conv_bn(CONV.format("float16"), **dead(np.float16, weight, scale, 16.0))).model) == "Conv"


def test_float16_is_refused_forward_too():
    constants = {"w": normal(4, 3, 1, 1), "b": normal(4), **norm(3)}
    constants = {name: values.astype(np.float16) for name, values in constants.items()}
    constants["s"][:], constants["t"][:], constants["m"][:], constants["v"][:] = 1e-4, 0, 0, 1
    constants["w"][2], constants["b"][2] = 1e-4, 0
    assert "channels 2" in refuses(conv_bn(BEFORE.format("float16"), **constants), "flush-to-zero")


def test_float16_folds_where_the_bias_hides_it_or_another_weight():
    """d X = 3 * 1e-8 * 65536 is 2e-3, a unit roundoff of 4 and more; beside a weight of 1 it is less than that weight's rounding."""
    assert ops(fastbn.fold(conv_bn(CONV.format("float16"), **dead(np.float16, 1e-4, 1e-4, 8.0))).model) == "Conv"
    beside = dead(np.float16, 1e-4, 1e-4)
    beside["w"][2, 0] = 1000
    assert ops(fastbn.fold(conv_bn(CONV.format("float16"), **beside)).model) == "Conv"


def test_float32_is_refused_where_it_matters():
    """Products of 1e-46 times inputs of 65536 are numbers that float32 holds, beside nothing else."""
    assert "channels 2" in refuses(conv_bn(CONV.format("float"), **dead(np.float32, 1e-23, 1e-23)), "flush-to-zero")


def test_onnxruntime_keeps_numbers_below_the_least_normal_one():
    """What the derivation says of the original."""
    proto = conv_bn(CONV.format("float"), **dead(np.float32, 1e-23, 1e-20))
    (y,) = run(proto, {"x": np.full((1, 3, 4, 4), 1.0, np.float32)})
    assert 0.5e-43 < y[0, 2, 0, 0] < 1.5e-43


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_what_is_lost_is_not_more_than_rounding(dtype):
    """The criterion beside its derivation, channel by channel: what passes loses at most u max(A X, |b|, v)."""
    kind, rng = np.finfo(dtype), np.random.default_rng(1)
    sizes = rng.integers(kind.minexp - 120, 4, (4000, 1)) - rng.integers(0, 12, (4000, 6))
    true = np.ldexp(rng.choice([-1.0, 1.0], sizes.shape), sizes)
    bias = np.ldexp(1.0, rng.integers(kind.minexp - 20, 6, 4000)) * (rng.random(4000) < 0.5)
    count, channels = flushed_channels(Dense(np.dtype(dtype), true, np.abs(true)), lambda values: values, bias)
    passed = np.setdiff1d(np.arange(4000), channels)
    with np.errstate(under="ignore"):
        lost = np.where(true.astype(dtype) == 0, np.abs(true), 0)
    allowed = float(kind.eps) / 2 * np.maximum(np.maximum(np.abs(true).max(axis=1) * LARGEST_INPUT, bias), float(kind.tiny))
    assert count == (lost[channels] != 0).sum()
    assert (lost[passed].sum(axis=1) * LARGEST_INPUT <= allowed[passed]).all()
    assert (lost[channels].sum(axis=1) * LARGEST_INPUT > allowed[channels]).all()
    assert min(len(channels), (lost[passed].sum(axis=1) > 0).sum()) > 100


@pytest.mark.parametrize("name", UNIT)
def test_the_rounding_of_each_type(name):
    kind = ml_dtypes.finfo(name)
    assert (UNIT[name], LEAST_NORMAL[name]) == (float(kind.eps) / 2, float(kind.smallest_normal))


def half(values):
    return np.asarray(values, np.float16)


def scaling(channels, scale):
    """Return the parameters of a normalization that only scales."""
    ones, zeros = np.ones(channels), np.zeros(channels)
    return {"s": half(ones * scale), "t": half(zeros), "m": half(zeros), "v": half(ones)}


def test_a_weight_without_a_bias_has_nothing_to_hide_it():
    """3 * 1e-9 * 65536 is 2e-4: more than a unit roundoff of the largest product, less than one of a bias of 1."""
    text = "(float16[5,3] x) => (float16[5,4] y) { c = MatMul(x, w) y = BatchNormalization(c, s, t, m, v) }"
    small = model(text, w=half(np.full((3, 4), 1e-4)), **scaling(4, 1e-5))
    assert "12 values of input 1 of MatMul 'c'" in refuses(small, "flush-to-zero")


@pytest.mark.parametrize(
    ("c", "beta", "left"), [(8.0, 1.0, "Gemm"), (8.0, 0.0, ""), ([[8.0], [0.0]], 1.0, ""), ([[8.0], [9.0]], 1.0, "Gemm")]
)
def test_the_bias_that_hides_is_the_least_of_each_column_times_beta(c, beta, left):
    text = f"(float16[2,3] x) => (float16[2,4] y) {{ n = BatchNormalization(x, s, t, m, v) y = Gemm <beta = {beta}> (n, w, c) }}"
    bias = half(np.broadcast_to(c, (2, 4) if isinstance(c, list) else (4,)))
    result = fastbn.fold(model(text, w=half(np.full((3, 4), 1e-4)), c=bias, **scaling(3, 1e-4)), verify=False)
    assert ops(result.model) == (left or "BatchNormalization Gemm")


# type -> (NumPy's, two scales whose product is zero in it, the largest input)
TINY = {"float16": (np.float16, 1e-4, 1e-4, 6e4), "float": (np.float32, 1e-20, 1e-27, 6e4)}
NORM, SHAPES = "BatchNormalization({}, s, t, m, v)", "({0}[2,4,3,3] x) => ({0}[2,4,3,3] y) {{ {1} }}"


def elementwise(kind, body, scale, factor, opset=17, **more):
    """Return a model whose BatchNormalization only multiplies by `scale`, and the constant k by `factor`, which may be an array."""
    dtype = TINY[kind][0]
    parameters = {name: values.astype(dtype) for name, values in (scaling(4, 1) | {"s": np.full(4, scale)} | more).items()}
    return model(SHAPES.format(kind, body), opset=opset, k=np.asarray(factor, dtype), **parameters)


@pytest.mark.parametrize("shape", [(), (4, 1, 1)])
@pytest.mark.parametrize("body", ["c = Mul(x, k) y = {c}", "c = Mul(k, x) y = {c}", "c = {x} y = Mul(c, k)", "c = {x} y = Mul(k, c)"])
@pytest.mark.parametrize("kind", TINY)
def test_a_factor_is_refused_where_it_would_become_zero(kind, body, shape):
    """What the original gives for large data is a number, not zero."""
    dtype, scale, factor, largest = TINY[kind]
    proto = elementwise(kind, body.format(c=NORM.format("c"), x=NORM.format("x")), scale, np.full(shape, factor))
    assert "would become zero" in refuses(proto, "flush-to-zero", verify=False)
    assert run(proto, {"x": np.full((2, 4, 3, 3), largest, dtype)})[0].all()


def test_a_factor_of_float16_is_refused_where_it_loses_digits():
    proto = elementwise("float16", f"c = Mul(x, k) y = {NORM.format('c')}", 1e-4, np.full((4, 1, 1), 9e-4))
    assert "lose digits" in refuses(proto, "flush-to-zero", verify=False)


@pytest.mark.parametrize("body", ["c = Div(x, k) y = {c}", "c = {x} y = Div(c, k)"])
@pytest.mark.parametrize(("kind", "scale", "divisor"), [("float16", 1e4, 1e-4), ("float", 1e25, 1e-27)])
def test_a_divisor_is_refused_where_it_would_become_zero(kind, scale, divisor, body):
    """However small it is, 1e-52 too: x / 0 is Inf."""
    proto = elementwise(kind, body.format(c=NORM.format("c"), x=NORM.format("x")), scale, divisor)
    assert "of Div" in refuses(proto, "flush-to-zero", verify=False)


@pytest.mark.parametrize("kind", TINY)
def test_what_is_divided_is_a_factor(kind):
    _, scale, factor, _ = TINY[kind]
    proto = elementwise(kind, f"c = Div(k, x) y = {NORM.format('c')}", scale, factor)
    assert "input 0 of Div 'c'" in refuses(proto, "flush-to-zero", verify=False)


def test_a_factor_is_refused_in_its_channel_alone():
    factors = np.asarray([1, 1e-4, 1, 0]).reshape(4, 1, 1)
    sentence = refuses(elementwise("float16", f"c = Mul(x, k) y = {NORM.format('c')}", 1e-4, factors), "flush-to-zero")
    assert "1 values of input 1 of Mul 'c' would become zero or lose digits in float16, channels 1" in sentence


def test_factors_of_a_dead_channel_fold():
    """As dead weights do: 1e-41 * 1e-38 times 65536 is far below the least number of float32; a factor of zero stays one."""
    factors = np.asarray([1, 1e-41, 0, 2]).reshape(4, 1, 1)
    shiftless = {name: np.zeros(4) for name in "tm"}
    proto = elementwise("float", f"c = Mul(x, k) y = {NORM.format('c')}", 1.0, factors, s=np.asarray([1, 1e-38, 1, 0]), **shiftless)
    folds(proto, "Mul")


@pytest.mark.parametrize("bias", [0.0, 8.0])
@pytest.mark.parametrize("norm_op", ["BatchNormalization(x, s1, t1, m1, v1)", "InstanceNormalization(x, s1, t1)"])
@pytest.mark.parametrize("kind", TINY)
def test_the_scale_of_a_normalization_is_refused_unless_its_bias_hides_it(kind, norm_op, bias):
    """1e-8 * 65536 is less than a unit roundoff of 8 in float16."""
    _, scale, factor, _ = TINY[kind]
    ones = np.ones(4)
    first = {"s1": ones * factor, "t1": ones * 0, "m1": ones * 0, "v1": ones}
    proto = elementwise(kind, f"c = {norm_op} y = {NORM.format('c')}", scale, 1, t=ones * bias, **first)
    kept = [each.code for each in fastbn.fold(proto, verify=False).kept]
    assert ("flush-to-zero" in kept) == (bias == 0.0), kept


@pytest.mark.parametrize("bias", [0.0, 8.0])
def test_the_scale_of_a_layer_normalization_is_refused_unless_its_bias_hides_it(bias):
    ones = np.ones((4, 3, 3))
    body = f"c = LayerNormalization <axis = 1> (x, s1, t1) y = {NORM.format('c')}"
    proto = elementwise("float16", body, 1e-4, 1, t=np.full(4, bias), s1=ones * 1e-4, t1=ones * 0)
    assert [each.code for each in fastbn.fold(proto, verify=False).kept] == (["flush-to-zero"] if bias == 0 else [])


@pytest.mark.parametrize("norm_op", ["LayerNormalization <axis = 1> (x, s1)", "RMSNormalization <axis = 1> (x, s1)"])
def test_the_scale_of_a_normalization_without_a_bias_is_refused(norm_op):
    body, shiftless = f"c = {norm_op} y = {NORM.format('c')}", {name: np.zeros(4) for name in "tm"}
    proto = elementwise("float16", body, 1e-4, 1, opset=23, s1=np.full((4, 3, 3), 1e-4), **shiftless)
    refuses(proto, "flush-to-zero", verify=False)


@pytest.mark.parametrize(("variance", "kept"), [(1.0, []), (0.0, ["flush-to-zero"] * 2)])
def test_the_scale_of_a_normalization_counts_with_its_variance(variance, kept):
    """1e-52 times 65536 is below half the least number of float32, which is 7e-46 (u v), but not where it is divided by sqrt(eps)."""
    ones = np.ones(4)
    first = {"s1": ones * 1e-26, "t1": ones * 0, "m1": ones * 0, "v1": ones * variance}
    proto = elementwise("float", f"c = BatchNormalization(x, s1, t1, m1, v1) y = {NORM.format('c')}", 1e-26, 1, **first)
    assert [each.code for each in fastbn.fold(proto, verify=False).kept if each.code == "flush-to-zero"] == kept


@pytest.mark.parametrize(("bias", "left"), [(0.0, "BatchNormalization"), (8.0, "Mul Add")])
def test_the_factor_of_a_rewritten_normalization_is_refused_unless_its_shift_hides_it(bias, left):
    """1e-7 / sqrt(6e4) is 4e-10."""
    more = {"v": np.full(4, 6e4), "t": np.full(4, bias)}
    proto = elementwise("float16", f"y = {NORM.format('x')}", 1e-7, 1, **more)
    assert ops(fastbn.fold(proto, verify=False, rewrite_left="affine").model) == left


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_what_is_lost_of_factors_is_not_more_than_rounding(dtype):
    kind, rng = np.finfo(dtype), np.random.default_rng(2)
    true = np.ldexp(rng.choice([-1.0, 0.0, 1.0], 4000), rng.integers(kind.minexp - 60, 4, 4000))
    reach = np.ldexp(1.0, rng.integers(-20, 20, 4000))
    bias = np.ldexp(1.0, rng.integers(kind.minexp - 20, 6, 4000)) * (rng.random(4000) < 0.5)
    constant = Dense(np.dtype(dtype), true, np.abs(true))
    with np.errstate(under="ignore"):
        lost = np.where(true.astype(dtype) == 0, np.abs(true), 0)
    matters = lost * reach * LARGEST_INPUT > float(kind.eps) / 2 * np.maximum(bias, float(kind.tiny))
    assert flushed_factors(constant, reach, bias) == (matters.sum(), np.flatnonzero(matters).tolist())
    assert flushed_factors(constant, math.inf, 0.0)[0] == (lost > 0).sum()
    assert (
        flushed_factors(constant, 1.0, np.asarray([8.0, 0.0])) == flushed_factors(constant, 1.0, 0.0) != flushed_factors(constant, 1.0, 8.0)
    )
    assert min(matters.sum(), ((lost > 0) & ~matters).sum()) > 100


def test_the_step_of_a_quantized_weight_must_not_become_zero():
    text = """(float16[2,3,4,4] x) => (float16[2,4,4,4] y) {
        w = DequantizeLinear(q, f) c = Conv(x, w) y = BatchNormalization(c, s, t, m, v)
    }"""
    proto = model(text, opset=19, q=np.full((4, 3, 1, 1), 100, np.int8), f=half(1e-4), **scaling(4, 1e-4))
    assert "input 1 of DequantizeLinear" in refuses(proto, "flush-to-zero", verify=False)
