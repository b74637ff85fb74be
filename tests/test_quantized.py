"""Weights behind a DequantizeLinear: the scale of a fold goes into its scale, nothing else of it changes."""

import numpy as np
import pytest
from sketch import assert_same, conv_bn, model, norm, normal, refuses

import fastbn

CONV = """(float[N,3,8,8] x) => (float[N,4,6,6] y) {
    w = DequantizeLinear%s(q, sc%s)
    c = Conv(x, w%s)
    y = BatchNormalization(c, s, t, m, v)
}"""
QUANTIZED = np.random.default_rng(0).integers(-127, 128, (4, 3, 3, 3)).astype(np.int8)
PER_TENSOR = {"q": QUANTIZED, "sc": np.float32(0.002), "zp": np.int8(3)}
PER_CHANNEL = {"q": QUANTIZED, "sc": np.linspace(0.001, 0.003, 4, dtype=np.float32), "zp": np.arange(4, dtype=np.int8)}


def folded(proto):
    result = fastbn.fold(proto)
    (fold,) = result.folded
    assert fold.error is not None, fold.note
    assert result.kept == []
    assert result.parity.ok
    assert_same(proto, result.model)
    return result.model


@pytest.mark.parametrize("bias", ["", ", b"])
@pytest.mark.parametrize("zero_point", ["", ", zp"])
def test_a_scale_per_tensor_becomes_one_per_channel(zero_point, bias):
    proto = model(CONV % ("", zero_point, bias), **PER_TENSOR, b=normal(4), **norm(4, positive=True))
    after = folded(proto)
    node = after.graph.node[0]
    assert (node.op_type, [attribute.i for attribute in node.attribute]) == ("DequantizeLinear", [0])
    tensors = {tensor.name: tensor for tensor in after.graph.initializer}
    assert tensors[node.input[0]].raw_data == QUANTIZED.tobytes(), "the quantized weights stay as they are"
    assert [list(tensors[name].dims) for name in node.input[1:]] == [[4]] * (len(node.input) - 1)


def test_a_scale_per_channel_is_multiplied():
    after = folded(model(CONV % ("<axis=0>", ", zp", ""), **PER_CHANNEL, **norm(4, positive=True)))
    node = after.graph.node[0]
    assert node.input[2] == "zp", "the zero points stay as they are"


def test_a_chain_scales_twice():
    text = """(float[N,3,8,8] x) => (float[N,4,6,6] y) {
        w = DequantizeLinear(q, sc, zp)
        c = Conv(x, w)
        d = Mul(c, k)
        y = BatchNormalization(d, s, t, m, v)
    }"""
    after = folded(model(text, **PER_TENSOR, k=np.float32([1, 2, 3, 4]).reshape(4, 1, 1), **norm(4, positive=True)))
    assert [node.op_type for node in after.graph.node] == ["DequantizeLinear", "Conv"]


def test_the_weight_of_a_gemm_and_of_a_matmul():
    constants = {"q": QUANTIZED.reshape(27, 4), "sc": np.float32(0.002), "zp": np.int8(3), **norm(4, positive=True)}
    for op in ("Gemm(x, w)", "MatMul(x, w)"):
        text = f"(float[N,27] x) => (float[N,4] y) {{ w = DequantizeLinear(q, sc, zp) c = {op} y = BatchNormalization(c, s, t, m, v) }}"
        after = folded(model(text, **constants))
        assert after.graph.node[0].attribute[0].i == 1


def test_forwards_a_shift_is_summed_over_the_dequantized_weights():
    text = """(float[N,4,8,8] x) => (float[N,3,6,6] y) {
        r = Relu(x)
        b = BatchNormalization(r, s, t, m, v)
        w = DequantizeLinear(q, sc, zp)
        y = Conv(b, w)
    }"""
    folded(model(text, **{**PER_TENSOR, "q": QUANTIZED.transpose(1, 0, 2, 3).copy()}, **norm(4, positive=True)))


def test_what_it_cannot_take_exactly():
    plain = CONV % ("", ", zp", "")
    assert "positive" in refuses(model(plain, **PER_TENSOR, **norm(4)), "quantised"), "a negative step"
    other_axis = model(CONV % ("<axis=1>", "", ""), q=QUANTIZED, sc=PER_CHANNEL["sc"][:3], **norm(4, positive=True))
    refuses(other_axis, "quantised")
    refuses(model(plain, opset=10, **{**PER_TENSOR, "zp": np.int8(0)}, **norm(4, positive=True)), "dynamic-weight")
    shared = plain.replace("y = B", "z = Relu(w) y = B").replace("y) {", "y, float[4,3,3,3] z) {")
    assert "'w'" in refuses(model(shared, **PER_TENSOR, **norm(4, positive=True)), "other-readers")
    biased = (CONV % ("", ", zp", ", b")).replace("c = Conv", "b = DequantizeLinear(qb, sc) c = Conv")
    refuses(model(biased, **PER_TENSOR, qb=np.arange(4, dtype=np.int32), **norm(4, positive=True)), "quantised")


def test_a_quantized_number_is_no_weight():
    text = """(float[N,3,8,8] x) => (float y) {
        q = DequantizeLinear(k, f) c = Conv(x, q, b) y = BatchNormalization(c, s, t, m, v)
    }"""
    refuses(conv_bn(text, w=None, k=np.int8(3), f=np.float32(0.5)), "dynamic-weight", verify=False)


@pytest.mark.parametrize("zero_points", ["", ", zp"])
def test_forwards_a_shift_is_summed_over_weights_of_several_steps(zero_points):
    text = f"""(float[N,4,8,8] x) => (float[N,3,6,6] y) {{
        r = Relu(x)
        b = BatchNormalization(r, s, t, m, v)
        w = DequantizeLinear <axis = 1> (q, sc{zero_points})
        y = Conv(b, w)
    }}"""
    folded(model(text, **{**PER_CHANNEL, "q": QUANTIZED.transpose(1, 0, 2, 3).copy()}, **norm(4, positive=True)))


@pytest.mark.parametrize("wrong", [{"sc": np.ones(3, np.float32)}, {"zp": np.zeros(3, np.int8)}, {"zp": np.int8(0)}])
def test_scales_and_zero_points_that_do_not_fit(wrong):
    proto = model(CONV % ("<axis=0>", ", zp", ""), **{**PER_CHANNEL, **wrong}, **norm(4, positive=True))
    with pytest.raises(fastbn.ModelError, match=r"Expected scales and zero points of shape \(4,\)"):
        fastbn.fold(proto, verify=False)


def test_a_new_scale_is_called_so():
    """The old one may be read by others, so the new one has a name of its own."""
    text = (CONV % ("", ", zp", "")).replace("y = B", "z = Mul(sc, sc) y = B").replace("y) {", "y, float z) {")
    result = fastbn.fold(model(text, **PER_TENSOR, **norm(4, positive=True)))
    (name,) = (tensor.name for tensor in result.model.graph.initializer if list(tensor.dims) == [4] and "scale" in tensor.name)
    assert result.model.graph.node[0].input[1] == name
