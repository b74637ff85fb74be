"""Normalizations other than BatchNormalization: their scale and bias take an affine that stands behind them, nothing passes them."""

import numpy as np
import pytest
from sketch import folds, model, norm, normal, refuses

import fastbn

S, B = normal(4, seed=3), normal(4, seed=4)
NORM = "y = BatchNormalization(c, s, t, m, v)"

# name -> (opset, nodes that give c from x, shape of x).
BEHIND = {
    "InstanceNormalization": (17, "c = InstanceNormalization(x, g, h)", "2,4,5,6"),
    "GroupNormalization": (21, "c = GroupNormalization <num_groups = 2> (x, g, h)", "2,4,5,6"),
    "LayerNormalization": (17, "c = LayerNormalization(x, g, h)", "7,4"),
    "LayerNormalization without bias": (17, "c = LayerNormalization(x, g)", "7,4"),
    "LayerNormalization of tokens": (17, "e = LayerNormalization(x, g, h) c = Transpose <perm = [0,2,1]> (e)", "2,6,4"),
}


def behind(case, dtype=np.float32, **changes):
    opset, nodes, shape = BEHIND[case]
    kind = {"float32": "float", "float16": "float16"}[np.dtype(dtype).name]
    constants = {"g": S.astype(dtype), **({"h": B.astype(dtype)} if "h)" in nodes else {}), **norm(4, dtype=dtype), **changes}
    return model(f"({kind}[{shape}] x) => ({kind} y) {{ {nodes} {NORM} }}", opset=opset, **constants)


@pytest.mark.parametrize("case", BEHIND)
def test_an_affine_goes_into_the_scale_and_bias(case):
    proto = behind(case)
    result = folds(proto, " ".join(node.op_type for node in proto.graph.node if node.op_type != "BatchNormalization"))
    (fold,) = result.folded
    assert fold.error is not None
    assert 0 < fold.error < fold.bound


def test_a_scale_goes_into_an_rms_normalization_and_a_shift_does_not():
    text = "(float[7,4] x) => (float y) { c = RMSNormalization(x, g) y = Mul(c, k) }"
    folds(model(text, opset=23, ir_version=10, g=S, k=B), "RMSNormalization")
    proto = model(f"(float[7,4] x) => (float y) {{ c = RMSNormalization(x, g) {NORM} }}", opset=23, ir_version=10, g=S, **norm(4))
    assert "has no bias to take the shift" in refuses(proto, "shift-cannot-pass")


def test_float16_too():
    folds(behind("LayerNormalization", np.float16), "LayerNormalization")


def test_a_scale_per_group_takes_no_affine():
    text = f"(float[2,4,5,6] x) => (float y) {{ c = GroupNormalization <num_groups = 2> (x, g, h) {NORM} }}"
    refuses(model(text, opset=18, g=S[:2], h=B[:2], **norm(4)))


def test_the_channels_must_be_those_of_the_scale():
    text = f"(float[2,4,6] x) => (float y) {{ c = LayerNormalization(x, g, h) {NORM} }}"
    assert "that the scale of LayerNormalization" in refuses(model(text, g=normal(6), h=normal(6, seed=1), **norm(4)), "axis")


@pytest.mark.parametrize("node", ["InstanceNormalization(n, g, h)", "LayerNormalization(n, g, h)"])
def test_nothing_passes_a_normalization(node):
    """A scale common to all channels vanishes but for eps: that is not exact."""
    text = f"(float[2,4,4] x) => (float y) {{ r = Tanh(x) n = BatchNormalization(r, s, t, m, v) y = {node} }}"
    assert "but for its eps" in refuses(model(text, g=S, h=B, **norm(4)))


def deformable(nodes, *, bias=True, **constants):
    offsets = "o = Conv <pads = [1,1,1,1]> (x, wo)"
    used = {"wo": 0.3 * normal(18, 4, 3, 3), "w": normal(4, 4, 3, 3), **({"b": B} if bias else {}), **constants}
    return model(f"(float[2,4,6,6] x) => (float y) {{ {offsets} {nodes} }}", opset=19, ir_version=9, **used)


@pytest.mark.parametrize("bias", [True, False])
def test_a_deformable_convolution_takes_what_stands_behind_it(bias):
    nodes = f"c = DeformConv <pads = [1,1,1,1]> (x, w, o{', b' if bias else ''}) {NORM}"
    folds(deformable(nodes, bias=bias, **norm(4)), "Conv DeformConv")


def test_a_scale_before_a_deformable_convolution_goes_into_it_and_a_shift_does_not():
    nodes = "r = Tanh(x) n = Mul(r, k) y = DeformConv <pads = [1,1,1,1]> (n, w, o, b)"
    folds(deformable(nodes, k=normal(1, 4, 1, 1)), "Conv Tanh DeformConv")
    nodes = "r = Tanh(x) n = BatchNormalization(r, s, t, m, v) y = DeformConv <pads = [1,1,1,1]> (n, w, o, b)"
    assert "beyond the border" in refuses(deformable(nodes, **norm(4)), "padding")


def per_element(shape, rank_known=True):
    channels = 4
    nodes = "c = Gemm(x, w, b)" if rank_known else "d = Gemm(x, w, b) c = Reshape(d, k)"
    text = f"(float[{shape}] x) => (float y) {{ {nodes} y = BatchNormalization <spatial = 0> (c, s, t, m, v) }}"
    return model(text, opset=8, w=normal(5, channels), b=B, **norm(channels))


def test_per_element_is_per_channel_where_an_element_is_a_channel():
    folds(per_element("N,5"), "Gemm")


def test_per_element_on_images_stays_and_the_repair_is_named():
    text = "(float[2,3,6,6] x) => (float y) { c = Conv(x, w) y = BatchNormalization <spatial = 0> (c, s, t, m, v) }"
    sentence = refuses(model(text, opset=8, w=normal(4, 3, 3, 3), **norm(4)), "per-element")
    assert "spatial=1 is the repair" in sentence


@pytest.mark.parametrize("shape", [(1,), (1, 4), (6, 4)])
def test_a_bias_of_another_shape_than_the_scale(shape):
    text = f"(float[2,6,4] x) => (float y) {{ e = LayerNormalization(x, g, h) c = Transpose <perm = [0,2,1]> (e) {NORM} }}"
    folds(model(text, g=S, h=normal(*shape), **norm(4)), "LayerNormalization Transpose")


def test_a_bias_that_would_outgrow_both():
    text = f"(float[2,6,4] x) => (float y) {{ c = LayerNormalization <axis = 1> (x, g, h) {NORM} }}"
    refuses(model(text, g=normal(6, 1), h=S, **norm(6)), "grows")


@pytest.mark.parametrize("shapes", [((), (4,)), ((4,), (3,)), ((1, 4), (4,))])
def test_scales_and_biases_that_are_no_lists_of_one_length(shapes):
    text = f"(float[2,4,5] x) => (float y) {{ c = InstanceNormalization(x, g, h) {NORM} }}"
    with pytest.raises(fastbn.ModelError):
        fastbn.fold(model(text, g=normal(*shapes[0]), h=normal(*shapes[1]), **norm(4)))


@pytest.mark.parametrize("shape", ["N,4,1,1", "2,4,1", "2,4,1,1,1"])
@pytest.mark.parametrize("node", ["InstanceNormalization(r, g, h)", "GroupNormalization <num_groups = 2> (r, g, h)"])
def test_one_element_per_channel(node, shape):
    """onnxruntime rounds the bias of an InstanceNormalization to the steps of x / sqrt(eps), which is no difference of the fold."""
    text = f"(float[{shape}] x) => (float y) {{ r = Identity(x) c = {node} {NORM} }}"
    proto = model(text, opset=21, ir_version=10, g=normal(4), h=normal(4, seed=1), **norm(4))
    result = fastbn.fold(proto)
    assert (len(result.folded), result.kept, result.parity.status) == (1, [], "ok")
    wrong = fastbn.fold(model(text, opset=21, ir_version=10, g=normal(4), h=normal(4, seed=1), **{**norm(4), "t": norm(4)["t"] * 1.05}))
    assert not fastbn.verify(proto, wrong.model).ok
