"""Constants that make their data wider, and constants that stand where data does: what may be moved then, and what may not.

One number that a model computes, times a constant, becomes one number per channel where that takes a scale in.
"""

import numpy as np
import onnx
import pytest
from sketch import assert_same, folds, model, norm, normal, ops, run

import fastbn


def test_a_constant_that_raises_the_rank_is_not_taken_out():
    text = "(float[3] x) => (float[1,3] y) { h = Relu(x) s0 = Mul(h, k) y = BatchNormalization(s0, s, t, m, v) }"
    proto = model(text, k=normal(1, 3), **norm(3))
    result = fastbn.fold(proto, verify=False)
    assert result.folded == []
    assert_same(proto, result.model)


def test_a_constant_that_raises_the_rank_of_a_matmul_is_not_taken_out():
    text = "(float[5] x) => (float[1,3] y) { h = MatMul(x, w) s0 = Mul(h, k) y = BatchNormalization(s0, s, t, m, v) }"
    proto = model(text, w=normal(5, 3), k=normal(1, 3), **norm(3))
    result = fastbn.fold(proto, verify=False)
    assert ops(result.model) == "MatMul Mul BatchNormalization"
    assert_same(proto, result.model)


@pytest.mark.parametrize("channels", ["1", "c"])
def test_a_constant_that_makes_the_channels_is_not_taken_out(channels):
    text = f"(float[a,{channels},5,5] x) => (float[a,4,5,5] y) {{ s0 = Sub(x, k) y = BatchNormalization(s0, s, t, m, v) }}"
    proto = model(text, k=normal(1, 4, 1, 1), **norm(4))
    result = fastbn.fold(proto, verify=False)
    assert result.folded == []
    feeds = {"x": normal(2, 1, 5, 5)}
    assert_same(proto, result.model, feeds)


def test_a_constant_whose_readers_widen_as_it_does_is_taken_out():
    """The shape of the data is not known, but Div makes of it what Mul made."""
    text = "(float[N,4,2] x, int64[K] to) => (float y) { h = Reshape(x, to) a = Mul(h, k) b = Div(a, c) y = Tanh(b) }"
    proto = model(text, k=np.float32([2, 3]), c=np.float32([0.5, 4]))
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    result = fastbn.fold(proto, verify=False)
    assert ops(result.model) == "Reshape Div Tanh"
    for to in ([-1, 1], [8, -1]):
        feeds = {"x": normal(1, 4, 2), "to": np.array(to, np.int64)}
        before, after = run(proto, feeds), run(result.model, feeds)
        assert before[0].shape == after[0].shape
        assert np.abs(before[0] - after[0]).max() < 1e-5


def test_the_same_constants_fold_where_the_data_has_their_shape():
    text = "(float[2,4,5,5] x) => (float[2,4,5,5] y) { h = Tanh(x) s0 = Sub(h, k) n = BatchNormalization(s0, s, t, m, v) y = Tanh(n) }"
    result = fastbn.fold(model(text, k=normal(1, 4, 1, 1), **norm(4)))
    assert ops(result.model) == "Tanh BatchNormalization Tanh"


CONSTANT = "(float[4,3] x) => (float[4,3] y) {{ q0 = {0} q = BatchNormalization(q0, s, t, m, v) y = Add(x, q) }}"


@pytest.mark.parametrize(
    ("made", "constants"),
    [
        ("Transpose<perm = [1, 0]>(p)", {"p": normal(3, 4)}),
        ("Identity(p)", {"p": normal(4, 3)}),
        ("Neg(p)", {"p": normal(4, 3)}),
        ("Reshape(p, to)", {"p": normal(2, 2, 3), "to": np.array([4, 3], np.int64)}),
    ],
)
def test_a_norm_over_a_constant_folds_into_it(made, constants):
    proto = model(CONSTANT.format(made), **constants, **norm(3))
    result = folds(proto, "Add")
    assert result.folded[0].into == "y"


def test_a_norm_over_an_initializer_becomes_one():
    text = "(float[4,3] x) => (float[4,3] y) { q = BatchNormalization(p, s, t, m, v) y = Add(x, q) }"
    folds(model(text, p=normal(4, 3), **norm(3)), "Add")


@pytest.mark.parametrize("made", ["", "p = Transpose<perm = [1, 0]>(pt)"])
def test_a_norm_over_a_constant_that_goes_forward_leaves_the_constant(made):
    """What it read is read by others then, and must not be buried with it."""
    text = f"(float[5,4] x) => (float[5,2] y) {{ {made} q = BatchNormalization(p, s, t, m, v) g = Gemm(q, w) y = MatMul(x, g) }}"
    data = {"pt": normal(3, 4)} if made else {"p": normal(4, 3)}
    proto = model(text, w=normal(3, 2), **data, **norm(3))
    result = fastbn.fold(proto)
    onnx.checker.check_model(result.model)
    assert "BatchNormalization" not in ops(result.model)
    assert_same(proto, result.model)


def test_a_constant_that_others_read_too_keeps_its_norm():
    text = """(float[4,3] x) => (float[4,3] y, float[4,3] z) {
        p = Transpose<perm = [1, 0]>(pt)
        q = BatchNormalization(p, s, t, m, v)
        y = Add(x, q)
        u = Tanh(x)
        z = Mul(u, p)
    }"""
    proto = model(text, pt=normal(3, 4), **norm(3))
    result = fastbn.fold(proto, verify=False)
    assert_same(proto, result.model)
    assert "Mul" in ops(result.model)


QUANTIZED = "q, step, zero = DynamicQuantizeLinear(x) i = ConvInteger <pads = [1,1,1,1]> (q, w, zero) f = Cast <to = 1> (i)"
WEIGHT = np.random.default_rng(0).integers(-99, 99, (8, 3, 3, 3)).astype(np.int8)
B8 = normal(1, 8, 1, 1)


def quantized(nodes, channels=8, shift=True, **constants):
    """Return a convolution as onnxruntime's dynamic quantizer writes it (f of i, in steps of `step`), `nodes`, and a norm of c."""
    text = f"(float[N,3,6,6] x) => (float[N,8,6,6] y) {{ {QUANTIZED} {nodes} y = BatchNormalization(c, s, t, m, v) }}"
    parameters = {name: values if shift or name in "sv" else np.zeros_like(values) for name, values in norm(channels).items()}
    return model(text, opset=13, w=WEIGHT, **parameters, **constants)


K = np.float32(0.02)
# name -> (model, operators behind the Cast)
ONE_NUMBER = {
    "a scalar": (quantized("k2 = Mul(step, k) m2 = Mul(f, k2) c = Add(m2, b)", k=K, b=B8), "Mul Mul Add"),
    "the other order": (quantized("k2 = Mul(k, step) m2 = Mul(k2, f) c = Add(b, m2)", k=K, b=B8), "Mul Mul Add"),
    "no bias": (quantized("k2 = Mul(step, k) c = Mul(f, k2)", k=K), "Mul Mul Add"),
    "no shift": (quantized("k2 = Mul(step, k) c = Mul(f, k2)", k=K, shift=False), "Mul Mul"),
    "one element of rank 1": (quantized("k2 = Mul(step, k) m2 = Mul(f, k2) c = Add(m2, b)", k=K.reshape(1), b=B8), "Mul Mul Add"),
    "one element of rank 4": (quantized("k2 = Mul(step, k) c = Mul(f, k2)", k=K.reshape(1, 1, 1, 1)), "Mul Mul Add"),
    "by Identity": (quantized("k2 = Mul(step, k) k3 = Identity(k2) c = Mul(f, k3)", k=K), "Mul Identity Mul Add"),
    "a divisor": (quantized("k2 = Div(k, step) c = Div(f, k2)", k=1 / K), "Div Div Add"),
    "a product of three": (quantized("r = Sqrt(step) k2 = Mul(step, k) k3 = Mul(r, k2) c = Mul(f, k3)", k=K), "Sqrt Mul Mul Mul Add"),
    "a mean": (
        model(
            """(float[N,4,6,6] x) => (float[N,4,6,6] y) {
                r = Tanh(x) p = ReduceMax(x) a = Mul(p, k) c = Mul(r, a) y = BatchNormalization(c, s, t, m, v)
            }""",
            k=K.reshape(1),
            **norm(4),
        ),
        "Mul Mul Add",
    ),
}


@pytest.mark.parametrize("name", ONE_NUMBER)
def test_one_number_becomes_one_per_channel(name):
    proto, behind = ONE_NUMBER[name]
    result = fastbn.fold(proto)
    onnx.checker.check_model(result.model, full_check=True)
    assert ops(result.model).split()[-len(behind.split()) :] == behind.split()
    assert "BatchNormalization" not in ops(result.model)
    assert result.parity.ok
    assert_same(proto, result.model)


def test_what_the_file_says_of_the_shape_of_one_number_changes_with_it():
    proto, _ = ONE_NUMBER["a scalar"]
    proto = onnx.shape_inference.infer_shapes(proto)
    assert any(info.name == "k2" and not info.type.tensor_type.shape.dim for info in proto.graph.value_info)
    written = fastbn.fold(proto).model
    onnx.checker.check_model(written, full_check=True)
    (info,) = (info for info in written.graph.value_info if info.name == "k2")
    assert [dim.dim_value for dim in info.type.tensor_type.shape.dim] == [8, 1, 1]
    assert_same(proto, written)


# name -> (nodes, constants, part of the reason)
ONE_NUMBER_STAYS = {
    "others read it": ("k2 = Mul(step, k) o = Mul(f, k2) c = Mul(f, k2)", {"k": K}, "Mul 'o' reads the value 'k2' before it too"),
    "nothing multiplies it": ("k2 = Sqrt(step) c = Mul(f, k2)", {}, "it reads Sqrt 'k2', which cannot take or pass it"),
    "a sum": ("k2 = Add(step, k) c = Mul(f, k2)", {"k": K}, "Add 'k2' gives one number, and 8 channels need one each"),
    "one number per image": ("h = ReduceMax <axes = [1,2,3]> (x) k2 = Mul(h, k) c = Mul(f, k2)", {"k": K}, "Cast 'f' may change the type"),
}


@pytest.mark.parametrize("name", ONE_NUMBER_STAYS)
def test_one_number_stays_one(name):
    nodes, constants, part = ONE_NUMBER_STAYS[name]
    result = fastbn.fold(quantized(nodes, shift=False, **constants))
    assert "BatchNormalization" in ops(result.model)
    assert part in result.kept[0].reason


def test_a_constant_waits_for_the_norm_behind_it():
    """The Mul could go into the norm; then the norm would stay. Where it stays all the same, it takes the Mul in."""
    text = "(float[N,4,6,6] x) => (float y) {{ r = Tanh(x) a = Mul(r, k) y = BatchNormalization(a, s, {t}, {t}, v) }}"
    constants = {"k": normal(4, 1, 1), **norm(4), "z": np.zeros(4, np.float32)}
    without_shift = model(text.format(t="z"), **{name: constants[name] for name in "ksvz"})
    folds(without_shift, "Tanh Mul")
    folds(model(text.format(t="t").replace("t, t, v", "t, m, v"), **{name: constants[name] for name in "kstmv"}), "Tanh BatchNormalization")
