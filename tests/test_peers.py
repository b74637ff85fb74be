"""Wrong results that other tools gave: each known one is a model here, folded right or left alone."""

import numpy as np
import pytest
from sketch import assert_same, conv_bn, initializers, model, norm, normal, ops

import fastbn


def right(proto, **options):
    """Fold with verification and compare; return the FoldResult."""
    result = fastbn.fold(proto, **options)
    assert result.parity is None or result.parity.status == "ok", result.parity
    assert not [kept for kept in result.kept if kept.code == "parity"], "no rule may lean on the verification"
    assert_same(proto, result.model)
    return result


@pytest.mark.parametrize("between", ["Transpose <perm = [0, 2, 1]> (c)", "Reshape(c, shape)"])
def test_matmul_then_an_axis_move_then_norm_of_a_square(between):
    """onnxruntime 1.17 to 1.31 ignores the axis: with square shapes the result is wrong by 10."""
    text = f"(float[4,4,4] x) => (float[4,4,4] y) {{ c = MatMul(x, w) d = {between} y = BatchNormalization(d, s, t, m, v) }}"
    more = {"shape": np.array([4, 4, 4])} if "Reshape" in between else {}
    right(model(text, w=normal(4, 4), **more, **norm(4)))


def test_the_value_of_a_reshape_that_is_a_graph_output():
    """onnxruntime folds and then cannot create a session."""
    text = """(float[2,3,5] x) => (float[6,4] r, float[6,4] y) {
        c = MatMul(x, w)
        r = Reshape(c, shape)
        y = BatchNormalization(r, s, t, m, v)
    }"""
    result = right(model(text, w=normal(5, 4), shape=np.array([-1, 4]), **norm(4)))
    assert [info.name for info in result.model.graph.output] == ["r", "y"]


def test_training_mode():
    """onnxscript folds it with the frozen statistics."""
    text = """(float[2,3,6,6] x) => (float[2,4,4,4] y) {
        c = Conv(x, w, b)
        y, rm, rv = BatchNormalization <training_mode = 1> (c, s, t, m, v)
    }"""
    result = fastbn.fold(conv_bn(text))
    assert [kept.code for kept in result.kept] == ["training"]


@pytest.mark.parametrize("sign", [1, -1])
def test_relu_between_convolution_and_norm(sign):
    """OpenCV folded across the Relu (opencv#28689)."""
    text = """(float[2,3,6,6] x) => (float[2,4,4,4] y) {
        c = Conv(x, w, b)
        r = Relu(c)
        n = BatchNormalization(r, s, t, m, v)
        y = Tanh(n)
    }"""
    parameters = norm(4)
    right(conv_bn(text, **{**parameters, "s": sign * np.abs(parameters["s"])}))


def test_a_norm_behind_a_residual_sum():
    """OpenCV dropped the scale of one branch (opencv#29160)."""
    text = """(float[2,3,6,6] x) => (float[2,4,4,4] y) {
        c = Conv(x, w, b)
        d = Conv(x, w2)
        a = Add(c, d)
        n = BatchNormalization(a, s, t, m, v)
        y = Tanh(n)
    }"""
    right(conv_bn(text, w2=normal(4, 3, 3, 3, seed=4)))


def test_the_bias_of_a_depthwise_convolution():
    """ncnn did not scale it (ncnn#1339)."""
    text = "(float[2,4,6,6] x) => (float[2,4,4,4] y) { c = Conv <group = 4> (x, w, b) y = BatchNormalization(c, s, t, m, v) }"
    assert len(right(conv_bn(text, w=normal(4, 1, 3, 3))).folded) == 1


@pytest.mark.parametrize("beta", [0.0, 0.5, 3.0])
def test_beta_of_gemm(beta):
    """onnxscript ignored it (PR 3027)."""
    text = f"(float[3,5] x) => (float[3,4] y) {{ c = Gemm <beta = {beta}> (x, w, b) y = BatchNormalization(c, s, t, m, v) }}"
    assert len(right(model(text, w=normal(5, 4), b=normal(4), **norm(4))).folded) == 1


def test_a_name_that_is_taken():
    """onnxoptimizer reused the name of an initializer (optimizer#174)."""
    text = """(float[2,3,6,6] x) => (float[2,4,4,4] y) {
        c = Conv(x, w)
        n = BatchNormalization(c, s, t, m, v)
        y = Mul(n, k)
    }"""
    proto = conv_bn(text, b=None, k=normal(5, 4, 4)[:1])
    proto.graph.node[2].input[1] = "c.bias"
    next(tensor for tensor in proto.graph.initializer if tensor.name == "k").name = "c.bias"
    result = right(proto)
    assert initializers(result.model)["c.bias"].shape == (1, 4, 4)


def test_float16_beside_float32_parameters():
    """onnxscript and onnxslim write a mix that does not load."""
    text = "(float16[2,3,6,6] x) => (float16[2,4,4,4] y) { c = Conv(x, w, b) y = BatchNormalization(c, s, t, m, v) }"
    result = right(conv_bn(text, w=normal(4, 3, 3, 3, dtype=np.float16), b=normal(4, dtype=np.float16)))
    assert {array.dtype for array in initializers(result.model).values()} == {np.dtype(np.float16)}


def test_float16_overflow():
    """Five tools turn 256 of 256 finite outputs into Inf and NaN."""
    text = "(float16[2,3,2,2] x) => (float16[2,4,2,2] y) { c = Conv(x, w) y = BatchNormalization(c, s, t, m, v) }"
    half = {"s": np.full(4, 300, np.float16), "t": np.zeros(4, np.float16), "m": np.zeros(4, np.float16), "v": np.ones(4, np.float16)}
    proto = conv_bn(text, w=np.full((4, 3, 1, 1), 300, np.float16), b=None, **half)
    assert [kept.code for kept in fastbn.fold(proto).kept] == ["overflow"]


def test_a_bias_that_the_dynamo_exporter_computes():
    """onnxruntime, onnxsim and onnxslim then fold nothing."""
    text = """(float[2,3,6,6] x) => (float[2,4,4,4] y) {
        zero = ConstantOfShape(four)
        c = Conv(x, w, zero)
        y = BatchNormalization(c, s, t, m, v)
    }"""
    assert ops(right(conv_bn(text, b=None, four=np.array([4]))).model) == "Conv"


def test_a_weight_shared_with_an_unfolded_node():
    text = """(float[2,3,6,6] x) => (float[2,4,4,4] y, float[2,4,4,4] z) {
        c = Conv(x, w, b)
        y = BatchNormalization(c, s, t, m, v)
        z = Conv(x, w, b)
    }"""
    assert len(right(conv_bn(text)).folded) == 1
