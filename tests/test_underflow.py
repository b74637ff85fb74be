"""Folded weights that round to zero: refused where a run could tell, folded where it could not. The oracle is onnxruntime."""

import ml_dtypes
import numpy as np
import pytest
from sketch import conv_bn, folds, model, norm, normal, ops, refuses, run

import fastbn
from fastbn.dtypes import LEAST_NORMAL, UNIT
from fastbn.graph.model.constant import Dense
from fastbn.graph.planner.representable import LARGEST_INPUT, flushed_channels

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
    assert "3 values of input 1 of Conv 'c' would become zero in float16, channels 2" in sentence


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
