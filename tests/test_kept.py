"""What stays is reported once, as the batch normalization that it is, with a code that names a condition where there is one."""

import numpy as np
import pytest
from sketch import conv_bn, folds, model, norm, normal, ops, refuses

import fastbn
from fastbn.errors import ModelError

K, ONE = normal(4, 1, 1), np.float32([3])


def reported(nodes, x="2,4,3,3", outputs="float y", **constants):
    """Return the name of each entry of what stays of nodes between two Tanh."""
    text = f"(float[{x}] x) => ({outputs}) {{ r = Tanh(x) {nodes} y = Tanh(d) }}"
    return [kept.bn for kept in fastbn.fold(model(text, **constants), verify=False).kept]


@pytest.mark.parametrize(
    ("nodes", "names"),
    [
        ("a = Mul(r, k) d = Add(a, l)", ["a+d"]),
        ("a = Mul(r, k) d = Add(a, one)", ["a+d"]),
        ("a = Mul(r, one) d = Add(a, l)", ["a+d"]),
        ("a = Mul(r, one) d = Add(a, one)", []),
        ("d = Mul(r, k)", []),
        ("d = Add(r, k)", []),
        ("a = Mul(r, k) d = Add(a, l) z = Sigmoid(a)", []),
        ("a = Mul(r, k) d = Add(a, l) z = Sigmoid(d)", ["a+d"]),
        ("n = BatchNormalization(r, s, t, m, v) z = Sigmoid(n) a = Mul(n, k) d = Add(a, l)", ["n", "a+d"]),
        ("a = Mul(r, k) b = Add(a, l) z = Sigmoid(b) d = BatchNormalization(b, s, t, m, v)", ["a+b", "d"]),
    ],
)
def test_elementwise_nodes_that_are_a_batch_normalization_are_one_entry(nodes, names):
    more = {name: values for name, values in norm(4).items() if "BatchNorm" in nodes}
    constants = {"k": K, "l": normal(4, 1, 1, seed=3), "one": ONE} | more
    used = {name: values for name, values in constants.items() if f", {name}" in nodes}
    outputs = "float y, float z" if "z =" in nodes else "float y"
    assert reported(nodes, outputs=outputs, **used) == names


def test_a_chain_ends_where_the_caller_sees_a_value():
    nodes = "a = Mul(r, k) d = Add(a, l)"
    assert reported(nodes, outputs="float y, float a", k=K, l=K) == []
    assert reported(nodes, outputs="float y, float d", k=K, l=K) == ["a+d"]


def test_the_sentence_says_what_both_directions_met():
    text = "(float[2,4] x) => (float y) { r = Tanh(x) n = BatchNormalization(r, s, t, m, v) y = Relu(n) }"
    sentence = refuses(model(text, **norm(4)), "mixed-sign-through-relu")
    assert sentence.startswith("backwards: it reads Tanh 'r', which cannot take or pass it")
    assert "; forwards: Relu 'y' lets only a positive scale pass" in sentence


def test_a_condition_is_the_better_code_than_nothing_there():
    text = "(float[2,4,6,6] x) => (float y) { c = %s n = BatchNormalization(c, s, t, m, v) y = %s }"
    pad = "Conv <pads = [1,1,1,1]> (n, w)"
    assert fastbn.fold(model(text % ("Tanh(x)", pad), w=normal(4, 4, 3, 3), **norm(4))).kept[0].code == "padding"
    both = fastbn.fold(model(text % ("Relu(x)", pad), w=normal(4, 4, 3, 3), **norm(4))).kept[0]
    assert both.code == "mixed-sign-through-relu"
    assert fastbn.fold(model(text % ("Tanh(x)", "Tanh(n)"), **norm(4))).kept[0].code == "no-absorber"


def test_a_weight_that_holds_nan_already():
    w = normal(4, 3, 3, 3)
    w[1, 0, 0, 0] = np.nan
    assert "holds Inf or NaN already" in refuses(conv_bn(w=w), "bad-parameters", verify=False)


def test_a_weight_that_would_overflow():
    w, parameters = normal(4, 3, 3, 3), norm(4)
    w[2], parameters["s"][2] = 1e30, 1e30
    sentence = refuses(conv_bn(w=w, **parameters), "overflow", verify=False)
    assert "27 values of input 1 of Conv 'c' would become Inf or NaN in float32, channels 2" in sentence


SPLIT = "(float[2,4] x) => (float y) { r = Tanh(x) n = BatchNormalization(r, s, t, m, v) c = MatMul(n, w) y = Tanh(c) }"


def test_before_a_matmul_the_shift_stays():
    folds(model(SPLIT, w=normal(4, 5), **norm(4)), "Tanh Add MatMul Tanh")


def test_a_scale_of_zero_leaves_no_shift_before_a_matmul():
    parameters = norm(4)
    parameters["s"][1] = 0
    refuses(model(SPLIT, w=normal(4, 5), **parameters))


def test_a_shift_stays_only_for_a_matmul():
    """The Gemm has a place for the shift; the Relu behind the MatMul's is what refuses."""
    text = "(float[2,4] x) => (float y) { c = Gemm(x, w) r = Relu(c) n = BatchNormalization(r, s, t, m, v) y = Tanh(n) }"
    refuses(model(text, w=normal(4, 4), **norm(4, positive=True)), "shift-through-relu")
    before = SPLIT.replace("c = MatMul(n, w)", "q = Relu(n) c = Gemm(q, w)")
    refuses(model(before, w=normal(4, 5), **norm(4, positive=True)), "shift-through-relu")


def test_the_add_that_stays_has_the_name_and_the_documentation_of_the_norm():
    proto = model("(float[2,4] x) => (float y) { c = MatMul(x, w) y = BatchNormalization(c, s, t, m, v) }", w=normal(4, 4), **norm(4))
    proto.graph.node[1].doc_string = "what it is for"
    add = fastbn.fold(proto).model.graph.node[1]
    assert (add.op_type, add.name, add.doc_string, list(add.output)) == ("Add", "y", "what it is for", ["y"])
    proto.graph.node[1].ClearField("name")
    proto.graph.node[1].ClearField("doc_string")
    add = fastbn.fold(proto).model.graph.node[1]
    assert not add.HasField("name")
    assert not add.HasField("doc_string")


def test_norms_that_meet_in_one_sum_are_one_fold():
    text = """(float[2,3] x) => (float y) {
        a = Gemm(x, w) b = Gemm(x, w2) n = BatchNormalization(a, s, t, m, v) d = Add(n, b) o = BatchNormalization(d, s2, t2, m2, v2)
        y = Tanh(o)
    }"""
    result = fastbn.fold(model(text, w=normal(3, 4), w2=normal(3, 4, seed=2), **norm(4), **norm(4, "2", seed=8)))
    assert ops(result.model) == "Gemm Gemm Add Tanh"
    assert [fold.bn for fold in result.folded] == ["n+o"]


def test_a_norm_and_a_value_that_is_added_to_it():
    """The value before the norm is read by the sum too: neither direction can tell both apart."""
    text = "(float[2,3] x) => (float y) { c = Gemm(x, w) n = BatchNormalization(c, s, t, m, v) d = Add(c, n) y = Gemm(d, w2) }"
    refuses(model(text, w=normal(3, 4), w2=normal(4, 5), **norm(4)), "other-readers")


def test_a_convolution_without_a_weight():
    with pytest.raises(ModelError, match="Expected"):
        fastbn.fold(model("(float[2,3,6,6] x) => (float y) { c = Conv(x) y = BatchNormalization(c, s, t, m, v) }", **norm(4)), verify=False)


@pytest.mark.parametrize(
    ("outputs", "behind", "used"),
    [
        ("", "", None),
        (", float[4] p", "", "its statistics 'p' are a graph output"),
        (", float[4] z", "z = Tanh(p)", "Tanh 'z' reads its statistics 'p'"),
    ],
)
def test_running_statistics_that_it_hands_out_stay_where_something_takes_them(outputs, behind, used):
    text = f"(float[2,4,3,3] x) => (float[2,4,3,3] y{outputs}) {{ r = Conv(x, w) y, p, q = BatchNormalization(r, s, t, m, v) {behind} }}"
    result = fastbn.fold(model(text, w=normal(4, 4, 1, 1), **norm(4)), verify=False)
    assert [kept.reason for kept in result.kept] == ([] if used is None else [f"it hands out running statistics: {used}"])
    assert len(result.folded) == (used is None)
