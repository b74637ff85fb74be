"""Weights behind a DequantizeLinear: the scale of a fold goes into its scale, nothing else of it changes."""

import ml_dtypes
import numpy as np
import onnx
import pytest
from sketch import assert_same, conv_bn, initializers, model, norm, normal, refuses, run

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
    assert "range of int8" in refuses(model(plain, **PER_TENSOR, **norm(4)), "quantised"), "-127 mirrored at 3 is 133"
    other_axis = model(CONV % ("<axis=1>", "", ""), q=QUANTIZED, sc=PER_CHANNEL["sc"][:3], **norm(4, positive=True))
    refuses(other_axis, "quantised")
    refuses(model(plain, opset=10, **{**PER_TENSOR, "zp": np.int8(0)}, **norm(4, positive=True)), "quantised")
    shared = plain.replace("y = B", "z = Relu(w) y = B").replace("y) {", "y, float[4,3,3,3] z) {")
    assert "'w'" in refuses(model(shared, **PER_TENSOR, **norm(4, positive=True)), "other-readers")
    biased = (CONV % ("", ", zp", ", b")).replace("c = Conv", "b = DequantizeLinear(qb, sc) c = Conv")
    refuses(model(biased, **PER_TENSOR, qb=np.arange(4, dtype=np.int32), **norm(4, positive=True)), "quantised")


def test_a_quantized_number_is_no_weight():
    text = """(float[N,3,8,8] x) => (float y) {
        q = DequantizeLinear(k, f) c = Conv(x, q, b) y = BatchNormalization(c, s, t, m, v)
    }"""
    refuses(conv_bn(text, w=None, k=np.int8(3), f=np.float32(0.5)), "quantised", verify=False)


# ---- negative scales, shifts, and quantizers of constants ----

MIXED = {
    name: np.float32(values)
    for name, values in {"s": [-1, 2, -0.5, 1], "t": [0.1, 0.2, 0.3, 0.4], "m": [0, 1, 0, 1], "v": [1, 2, 1, 2]}.items()
}


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16])
def test_under_a_negative_scale_integers_are_mirrored_at_the_zero_point(dtype):
    held = np.iinfo(dtype)
    zero = (held.min + held.max + 1) // 2
    integers = np.random.default_rng(1).integers(held.min + 1, held.max, (4, 3, 3, 3)).astype(dtype)
    scale = np.linspace(0.001, 0.003, 4, dtype=np.float32)
    opset = 21 if integers.itemsize == 2 else 17
    proto = model(
        CONV % ("<axis=0>", ", zp", ", b"),
        opset=opset,
        ir_version=10,
        q=integers,
        sc=scale,
        zp=np.full(4, zero, dtype),
        b=normal(4),
        **MIXED,
    )
    after = folded(proto)
    stored = initializers(after)
    np.testing.assert_array_equal(stored["q"][[1, 3]], integers[[1, 3]])
    np.testing.assert_array_equal(stored["q"][[0, 2]].astype(np.int64), 2 * zero - integers[[0, 2]].astype(np.int64))
    assert (stored["sc"] > 0).all()


def test_one_step_for_the_whole_weight_and_a_negative_scale():
    after = folded(model(CONV % ("", "", ""), q=np.clip(QUANTIZED, -126, 126), sc=np.float32(0.002), **MIXED))
    assert initializers(after)["sc"].shape == (4,)


def test_a_scale_of_zero_makes_the_integers_the_zero_point():
    changed = {**MIXED, "s": np.float32([0, 1, -1, 2])}
    after = folded(model(CONV % ("", ", zp", ""), q=np.clip(QUANTIZED, -100, 100), sc=np.float32(0.002), zp=np.int8(3), **changed))
    stored = initializers(after)
    assert (stored["q"][0] == 3).all()
    assert np.isfinite(stored["sc"]).all()


def test_what_has_no_negative_stays():
    integers = QUANTIZED.copy()
    integers[2, 0, 0, 0] = -128
    reason = refuses(model(CONV % ("", "", ""), q=integers, sc=np.float32(0.002), **MIXED), "quantised")
    assert "range of int8, channels 2" in reason


def test_one_scale_for_all_channels_needs_no_axis():
    """Before opset 13 there is one step for the whole weight."""
    text = CONV.replace("y = BatchNormalization(c, s, t, m, v)", "y = Mul(c, k)")
    for opset, factor in ((10, 2.0), (12, -0.5), (17, 3.0)):
        proto = model(
            text % ("", ", zp", ""), opset=opset, q=np.clip(QUANTIZED, -120, 120), sc=np.float32(0.002), zp=np.int8(0), k=np.float32(factor)
        )
        after = folded(proto)
        assert not after.graph.node[0].attribute
        assert initializers(after)["sc"].shape == ()


FAKE = """(float[N,3,8,8] x) => (float[N,4,6,6] y) {
    w8 = QuantizeLinear%s(p, sc%s)
    w = DequantizeLinear%s(w8, sc%s)
    c = Conv(x, w, b)
    y = BatchNormalization(c, s, t, m, v)
}"""


@pytest.mark.parametrize("positive", [True, False])
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("zero_point", [np.int8(0), np.uint8(128), np.uint8(117)])
def test_a_weight_of_a_model_trained_for_quantization_keeps_its_quantizer(positive, per_channel, zero_point):
    """The steps of both change, the data with them, and every integer is what it was, or its mirror image."""
    rng = np.random.default_rng(5)
    data = rng.normal(size=(4, 3, 3, 3)).astype(np.float32)
    data[0, 0] = 0.02 * np.arange(9).reshape(3, 3) + 0.01  # in the middle of two steps
    axis = "<axis=0>" if per_channel else ""
    scale = np.float32([0.02, 0.03, 0.025, 0.04]) if per_channel else np.float32(0.02)
    zero = np.full(4, zero_point) if per_channel else zero_point
    parameters = norm(4, positive=True) if positive else MIXED
    data = np.clip(data, -1, 1)
    proto = model(FAKE % (axis, ", zp", axis, ", zp"), p=data, sc=scale, zp=zero, b=normal(4), **parameters)
    after = folded(proto)
    assert [node.op_type for node in after.graph.node] == ["QuantizeLinear", "DequantizeLinear", "Conv"]
    before, behind = onnx.ModelProto(), onnx.ModelProto()
    for copy, source in ((before, proto), (behind, after)):
        copy.CopyFrom(source)
        del copy.graph.output[:]
        copy.graph.output.add(name="w8")
    x = np.zeros((1, 3, 8, 8), np.float32)
    old, new = run(before, {"x": x})[0].astype(int), run(behind, {"x": x})[0].astype(int)
    sign = np.sign(parameters["s"]).astype(int).reshape(4, 1, 1, 1)
    np.testing.assert_array_equal(new - int(zero_point), sign * (old - int(zero_point)))
    assert len(after.SerializeToString()) < len(proto.SerializeToString()) + 200


def test_a_chain_behind_a_quantizer_folds_link_by_link():
    text = (FAKE % ("", "", "", "")).replace("y = Batch", "d = Mul(c, k) y = Batch").replace("(c, s, t", "(d, s, t")
    constants = {"p": np.clip(normal(4, 3, 3, 3), -1, 1), "sc": np.float32(0.02), "b": normal(4)}
    proto = model(text, k=np.float32([1, 2, 3, 4]).reshape(4, 1, 1), **constants, **norm(4, positive=True))
    assert [node.op_type for node in folded(proto).graph.node] == ["QuantizeLinear", "DequantizeLinear", "Conv"]


def test_a_quantizer_with_other_steps_leaves():
    """DequantizeLinear has steps of its own: under a negative scale the integers are stored instead."""
    text = (FAKE % ("", "", "", "")).replace("(w8, sc)", "(w8, other, zp)").replace("(p, sc)", "(p, sc, zp)")
    constants = {
        "p": np.clip(normal(4, 3, 3, 3), -1, 1),
        "sc": np.float32(0.02),
        "other": np.float32(0.03),
        "zp": np.int8(0),
        "b": normal(4),
    }
    kept = folded(model(text, **constants, **norm(4, positive=True)))
    assert [node.op_type for node in kept.graph.node] == ["QuantizeLinear", "DequantizeLinear", "Conv"]
    stored = folded(model(text, **constants, **MIXED))
    assert [node.op_type for node in stored.graph.node] == ["DequantizeLinear", "Conv"]


BIASED = (CONV % ("<axis=0>", "", ", b")).replace("c = Conv", "b = DequantizeLinear <axis=0> (qb, sb) c = Conv")


def biased(t, s=(1, 2, 0.5, 1), sb=(0.5, 0.25, 0.125, 1)):
    constants = {"q": QUANTIZED, "sc": PER_CHANNEL["sc"], "qb": np.int32([10, -20, 30, 40]), "sb": np.float32(sb)}
    normed = {"s": np.float32(s), "t": np.float32(t), "m": np.zeros(4, np.float32), "v": np.full(4, 1 - 1e-5, np.float32)}
    return model(BIASED, **constants, **normed)


def test_a_quantized_bias_takes_a_shift_of_whole_steps():
    after = folded(biased([0, 1, -0.125, 3]))
    stored = initializers(after)
    assert stored["qb"].dtype == np.int32
    assert stored["qb"].tolist() == [10, -18, 28, 43]
    np.testing.assert_allclose(stored["sb"], [0.5, 0.5, 0.0625, 1], rtol=1e-6)
    scaled = initializers(folded(biased([0, 0, 0, 0])))
    assert scaled["qb"].tolist() == [10, -20, 30, 40]


def test_a_quantized_bias_under_a_negative_scale():
    proto = biased([0, 1, 0, 0], s=(-1, 2, -0.5, 1))
    stored = initializers(folded(proto))
    assert stored["qb"].tolist() == [-10, -18, -30, 40]


def test_a_shift_of_broken_steps_is_refused_with_their_number():
    reason = refuses(biased([0, 1, 0.02, 3]), "quantised")
    assert "off by up to 0.32 steps, channels 2" in reason
    assert "up to 0.5 steps" in refuses(biased([0.25, 1, 0, 3]), "quantised")


def test_the_bias_of_a_gemm_stays_quantized():
    text = """(float[N,27] x) => (float y) {
        w = DequantizeLinear(q, sc) b = DequantizeLinear(qb, sb) c = Gemm(x, w, b) y = BatchNormalization(c, s, t, m, v)
    }"""
    constants = {"q": QUANTIZED.reshape(27, 4), "sc": np.float32(0.002), "qb": np.int32([10, -20, 30, 40]), "sb": np.float32(0.5)}
    normed = {
        "s": np.float32([1, 2, -4, 1]),
        "t": np.float32([1, -2, 4, 0]),
        "m": np.zeros(4, np.float32),
        "v": np.full(4, 1 - 1e-5, np.float32),
    }
    after = folded(model(text, **constants, **normed))
    assert [node.op_type for node in after.graph.node] == ["DequantizeLinear", "DequantizeLinear", "Gemm"]
    assert initializers(after)["qb"].tolist() == [12, -22, -28, 40]


def test_a_quantized_weight_behind_other_nodes_is_not_stored_as_floats():
    text = """(float[N,3,8,8] x) => (float[N,4,6,6] y) {
        d = DequantizeLinear(q, sc) w = Abs(d) c = Conv(x, w) y = BatchNormalization(c, s, t, m, v)
    }"""
    assert "no step" in refuses(model(text, q=QUANTIZED, sc=np.float32(0.01), **norm(4)), "quantised")


# name -> (x, nodes behind d = DequantizeLinear, which give c, axis of its steps, shape of the integers)
MOVED = {
    "Transpose of a kernel": ("N,3,8,8", "w = Transpose <perm = [1,0,2,3]> (d) c = Conv(x, w)", 1, (3, 4, 3, 3)),
    "Transpose of a matrix": ("N,6", "w = Transpose(d) p = MatMul(x, w) c = Add(p, b)", 0, (4, 6)),
    "Transpose of a matrix, no bias": ("N,6", "w = Transpose <perm = [1,0]> (d) c = MatMul(x, w)", 0, (4, 6)),
    "Unsqueeze": ("N,3,8", "w = Unsqueeze(d, two) c = Conv(x, w)", 0, (4, 3)),
    "Reshape": ("N,3,8,8", "w = Reshape(d, kernel) c = Conv(x, w)", 0, (4, 27)),
    "two of them": ("N,3,8,8", "e = Transpose(d) w = Reshape(e, kernel) c = Conv(x, w)", 1, (27, 4)),
    "Identity": ("N,3,8,8", "w = Identity(d) c = Conv(x, w)", 0, (4, 3, 3, 3)),
}
MOVING = {"b": normal(4), "two": np.array([2]), "kernel": np.array([4, 3, 3, 3])}


@pytest.mark.parametrize("has_axis", [True, False])
@pytest.mark.parametrize("name", MOVED)
def test_a_quantized_weight_whose_elements_are_moved_takes_the_scale(name, has_axis):
    x, nodes, axis, shape = MOVED[name]
    head = f"d = DequantizeLinear <axis = {axis}> (q, sc)" if has_axis else "d = DequantizeLinear(q, sc)"
    weight = np.random.default_rng(0).integers(-127, 128, shape).astype(np.int8)
    used = {key: value for key, value in MOVING.items() if f"{key})" in nodes}
    scale = np.linspace(0.001, 0.003, 4, dtype=np.float32) if has_axis else np.float32(0.002)
    proto = model(
        f"(float[{x}] x) => (float y) {{ {head} {nodes} y = BatchNormalization(c, s, t, m, v) }}", q=weight, sc=scale, **used, **norm(4)
    )
    after = folded(proto)
    assert not any(node.op_type == "BatchNormalization" for node in after.graph.node)
    assert {tensor.name: list(tensor.dims) for tensor in after.graph.initializer}["sc"] == [4]
    assert [attribute.i for attribute in after.graph.node[0].attribute if attribute.name == "axis"] == [axis]


def test_a_moved_weight_that_others_read_stays():
    text = """(float[N,6] x) => (float y, float z) {
        d = DequantizeLinear(q, sc) w = Transpose(d) c = MatMul(x, w) y = BatchNormalization(c, s, t, m, v) z = Neg(d)
    }"""
    proto = model(text, q=QUANTIZED.reshape(4, 27)[:, :6].copy(), sc=np.float32(0.01), **norm(4))
    assert "Neg 'z' reads the value 'd' before it too" in refuses(proto, "other-readers")


NARROW = [
    ml_dtypes.int4,
    ml_dtypes.uint4,
    np.int16,
    np.uint16,
    *(getattr(ml_dtypes, f"float8_{name}") for name in ("e4m3fn", "e5m2", "e4m3fnuz")),
]


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("has_zero", [False, True])
@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("dtype", NARROW)
def test_weights_of_other_types_behind_a_dequantizer(dtype, positive, has_zero, moved):
    middle = 7 if np.dtype(dtype).name.startswith("u") else 0
    if middle and not positive and not has_zero:
        middle = 0  # nothing mirrors them
    weight = (np.random.default_rng(0).integers(-7, 8, (4, 3, 3, 3)) + middle).clip(0 if middle else None).astype(dtype)
    nodes = "d = DequantizeLinear(q, sc, z) w = Transpose <perm = [0,1,3,2]> (d)" if moved else "w = DequantizeLinear(q, sc, z)"
    text = f"(float[N,3,8,8] x) => (float[N,4,6,6] y) {{ {nodes} c = Conv(x, w) y = BatchNormalization(c, s, t, m, v) }}"
    arrays = {"q": weight, "z": np.asarray(middle).astype(dtype)}
    proto = model(text if has_zero else text.replace(", z", ""), opset=21, ir_version=10, sc=np.float32(0.1), **norm(4, positive=positive))
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(arrays[name], name) for name in ("q", "z")[: 1 + has_zero])
    if np.dtype(dtype).name.startswith("u") and not positive and not has_zero:
        assert "leave the range" in refuses(proto, "quantised")
    else:
        folded(proto)


def test_a_quantized_table_is_not_stored_as_floats():
    text = """(int64[N] i) => (float y) {
        d = DequantizeLinear(q, sc) e = Gather(d, i) y = BatchNormalization(e, s, t, m, v)
    }"""
    table = np.random.default_rng(0).integers(-100, 100, (400, 4)).astype(np.int8)
    assert "would be stored as floats" in refuses(model(text, q=table, sc=np.float32(0.01), **norm(4)), "quantised")


def test_the_shift_that_stays_beside_a_mirrored_matmul_is_a_float():
    text = "(float[N,27] x) => (float y) { w = DequantizeLinear(q, sc) c = MatMul(x, w) y = BatchNormalization(c, s, t, m, v) }"
    after = folded(model(text, q=np.clip(QUANTIZED, -126, 126).reshape(27, 4), sc=np.float32(0.002), **MIXED))
    assert [node.op_type for node in after.graph.node] == ["DequantizeLinear", "MatMul", "Add"]


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


@pytest.mark.parametrize("axis", [0, 1])
def test_a_quantized_bias_of_two_directions_has_a_step_per_step_of_its_axis(axis):
    """The bias of a recurrent network is a matrix; a shift of no whole steps leaves the norm where it is."""
    text = f"""(float[3,2,4] x) => (float y) {{
        r = Tanh(x)
        e = Transpose <perm = [0,2,1]> (r)
        n = BatchNormalization(e, s, t, m, v)
        q = Transpose <perm = [0,2,1]> (n)
        b = DequantizeLinear <axis = {axis}> (qb, sb)
        y = GRU <hidden_size = 1, direction = "bidirectional"> (q, w, u, b)
    }}"""
    steps = np.linspace(0.5, 1, (2, 6)[axis], dtype=np.float32)
    integers = np.random.default_rng(0).integers(-3, 4, (2, 6)).astype(np.int8)
    proto = model(text, w=normal(2, 3, 4), u=normal(2, 3, 1), qb=integers, sb=steps, **norm(4))
    result = fastbn.fold(proto)
    assert [kept.code for kept in result.kept] == ["quantised"]
    assert "whole number of steps" in result.kept[0].reason


def test_where_the_shift_may_stay_the_reason_is_that_of_the_scale():
    """A MatMul has no bias, but an Add could keep the shift: what has no negative is in the way."""
    lowest = np.full((6, 4), -128, np.int8)
    text = "(float[N,6] x) => (float y) { w = DequantizeLinear(q, sc) c = MatMul(x, w) y = BatchNormalization(c, s, t, m, v) }"
    assert "leave the range of int8" in refuses(model(text, q=lowest, sc=np.float32(0.01), **norm(4)), "quantised")
