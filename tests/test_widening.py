"""Constants that make their data wider, and constants that stand where data does: what may be moved then, and what may not."""

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
