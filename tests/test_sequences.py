"""Constants that come by a sequence, an optional value, an If or a function: what they are, and what stays because it is none."""

import numpy as np
import onnx
import pytest
from sketch import assert_same, model, norm, normal, ops

import fastbn
from fastbn.graph.model import storage
from fastbn.graph.model.index import Index

W, A, B = normal(4, 3, 3, 3), normal(1, 3, 3, 3), normal(3, 3, 3, 3)
KNOWN = {
    **{"w0": W, "a": A, "b3": B, "w9": normal(9, 3, 3, 3), "many": np.array([2, 4, 3]), "four": np.array(4)},
    **{name: np.array(value) for name, value in {"zero": 0, "one": 1, "two": 2, "last": -1, "yes": True, "no": False, "far": 9}.items()},
}


def weighted(nodes, **options):
    """Return nodes that give w, and a convolution with it before a norm."""
    used = {name: value for name, value in KNOWN.items() if any(f"{end}" in nodes for end in (f"{name})", f"{name},", f"{name} "))}
    text = f"(float[N,3,8,8] x) => (float[N,4,6,6] y) {{ {nodes} c = Conv(x, w, b) y = BatchNormalization(c, s, t, m, v) }}"
    return model(text, **used, **options, b=normal(4), **norm(4))


TWO = "q = SequenceConstruct(a, w0, b3)"
# name -> (nodes that give w, what they are)
GIVEN = {
    "an element": (f"{TWO} w = SequenceAt(q, one)", W),
    "an element from the end": ("q = SequenceConstruct(a, w0) w = SequenceAt(q, last)", W),
    "inserted": (f"{TWO} r = SequenceInsert(q, w0, zero) w = SequenceAt(r, zero)", W),
    "inserted at the end": ("e = SequenceEmpty() r = SequenceInsert(e, w0) w = SequenceAt(r, last)", W),
    "erased": (f"{TWO} r = SequenceErase(q, zero) w = SequenceAt(r, zero)", W),
    "erased at the end": ("q = SequenceConstruct(a, w0, b3) r = SequenceErase(q) w = SequenceAt(r, last)", W),
    "joined": ("q = SequenceConstruct(a, b3) w = ConcatFromSequence <axis = 0> (q)", np.concatenate([A, B])),
    "stacked": ("q = SequenceConstruct(a, a) k = ConcatFromSequence <axis = 1, new_axis = 1> (q)", np.stack([A, A], 1)),
    "split": ("q = SplitToSequence <axis = 0> (w9, four) w = SequenceAt(q, one)", KNOWN["w9"][4:8]),
    "split into the rest": ("q = SplitToSequence <axis = 0> (w9, four) k = SequenceAt(q, two)", KNOWN["w9"][8:]),
    "split by a list": ("q = SplitToSequence <axis = 0> (w9, many) w = SequenceAt(q, one)", KNOWN["w9"][2:6]),
    "split one by one": ("q = SplitToSequence <axis = -4, keepdims = 0> (w9) k = SequenceAt(q, one)", KNOWN["w9"][1]),
    "split one by one, keeping": ("q = SplitToSequence <axis = 0> (w9) k = SequenceAt(q, one)", KNOWN["w9"][1:2]),
    "a length": (f"{TWO} k = SequenceLength(q)", np.array(3)),
    "optional": ("o = Optional(w0) w = OptionalGetElement(o)", W),
    "an optional sequence": (f"{TWO} o = Optional(q) r = OptionalGetElement(o) w = SequenceAt(r, one)", W),
    "an optional value that is there": ("o = Optional(w0) k = OptionalHasElement(o)", np.array(True)),
    "then": ("w = If (yes) <then_branch = g () => (u) { u = Neg(w0) }, else_branch = h () => (o) { o = Abs(w0 ) }>", -W),
    "else": ("w = If (no) <else_branch = h () => (o) { o = Abs(w0 ) }, then_branch = g () => (u) { u = Neg(w0) }>", np.abs(W)),
    "a computed condition": (
        "i = Equal(one, two) w = If (i) <then_branch = g () => (u) { u = Neg(w0) }, else_branch = h () => (o) { o = Abs(w0 ) }>",
        np.abs(W),
    ),
    "an If in an If": (
        """w = If (yes) <else_branch = h () => (o) { o = Abs(w0 ) }, then_branch = g () => (u) {
            u = If (no) <then_branch = i () => (p) { p = Neg(w0) }, else_branch = j () => (e) { e = Exp(w0) }>
        }>""",
        np.exp(W),
    ),
}


@pytest.mark.parametrize("name", GIVEN)
def test_what_is_given_is_constant(name):
    nodes, expected = GIVEN[name]
    proto = weighted(nodes if " w = " in nodes or nodes.startswith("w = ") else f"{nodes} w = Identity(w0)")
    index = Index(storage.load(proto))
    given = index.main.find("k" if "k" in index.main.values else "w")
    found = index.constant(given)
    assert found is not None
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    np.testing.assert_allclose(found.array(), expected, rtol=1e-6)
    result = fastbn.fold(proto)
    assert result.parity.ok
    assert ops(result.model).split()[-1] == "Conv"
    assert_same(proto, result.model)
    if given.name == "w":
        assert ops(result.model) == "Conv"
        assert {tensor.name for tensor in result.model.graph.initializer} <= {"w", "b", "c.weight", "c.bias"}


def chosen(then, *, given="yes"):
    """Return an If of two branches, each a text of nodes that give u or o."""
    return f"If ({given}) <then_branch = g () => (u) {{ {then} }}, else_branch = h () => (o) {{ o = Abs(w0 ) }}>"


def test_an_if_leaves_and_another_stays():
    nodes = (
        f"w = {chosen('u = Neg(w0)')} z = If (k) <then_branch = p () => (i) {{ i = Relu(x) }}, else_branch = q () => (e) {{ e = Exp(x) }}>"
    )
    text = f"(float[N,3,8,8] x, bool k) => (float y, float z) {{ {nodes} c = Conv(x, w) y = BatchNormalization(c, s, t, m, v) }}"
    proto = model(text, w0=W, yes=np.array(True), **norm(4))
    result = fastbn.fold(proto)
    assert ops(result.model) == "If Conv"
    assert [node.op_type for node in result.model.graph.node[0].attribute[0].g.node] in (["Relu"], ["Exp"])
    assert {tensor.name for tensor in result.model.graph.initializer} == {"c.weight", "c.bias"}
    feeds = {"x": normal(2, 3, 8, 8), "k": np.array(True)}
    assert_same(proto, result.model, feeds)


@pytest.mark.parametrize(
    ("nodes", "left"),
    [
        (f"w = {chosen('r = Conv(x, w0) e = BatchNormalization(r, s, t, m, v) u = Neg(w0)')} c = Conv(x, w)", "If Conv"),
        (f"w = {chosen('u = Neg(w0)')} d = Conv(x, w) e = Relu(d) c = Conv(x, w)", "If Conv Relu Conv"),
        (f"k = Neg(w0) w = {chosen('u = Neg(k)')} c = Conv(x, w)", "Conv"),
    ],
)
def test_an_if_stays_where_something_reads_it_or_a_norm_stands_in_it(nodes, left):
    text = f"(float[N,3,8,8] x) => (float y{', float e' if 'Relu' in nodes else ''}) {{ {nodes} y = BatchNormalization(c, s, t, m, v) }}"
    result = fastbn.fold(model(text, w0=W, yes=np.array(True), **norm(4)))
    assert ops(result.model) == left
    assert result.parity.ok


NOT_GIVEN = {
    "beyond the end": f"{TWO} w = SequenceAt(q, far)",
    "of no elements": "e = SequenceEmpty() w = SequenceAt(e, zero)",
    "a condition that the caller gives": "i = ReduceMax <keepdims = 0> (x) j = Cast <to = 9> (i) "
    "w = If (j) <then_branch = g () => (u) { u = Neg(w0) }, else_branch = h () => (o) { o = Abs(w0 ) }>",
}


@pytest.mark.parametrize("name", NOT_GIVEN)
def test_what_is_not_given_is_no_constant(name):
    proto = weighted(NOT_GIVEN[name])
    index = Index(storage.load(proto))
    assert index.constant(index.main.find("w")) is None
    result = fastbn.fold(proto, verify=False)
    assert [kept.code for kept in result.kept] == ["dynamic-weight"]


def test_a_sequence_beyond_the_limit_is_not_joined(monkeypatch):
    monkeypatch.setattr("fastbn.graph.model.expressions.LARGEST_RESULT", 100)
    index = Index(storage.load(weighted(GIVEN["joined"][0])))
    assert index.constant(index.main.find("w")) is None
    assert "too large" in index.why_no_constant(index.main.find("w"))


LOOP = "w = Loop (two, yes, w0) <body = g (int64 i, bool k, float[4,3,3,3] u) => (l, o) { l = Identity(k) o = Neg(u) }>"


@pytest.mark.parametrize(
    ("nodes", "imports", "part"),
    [
        (LOOP.replace("Neg", "Bernoulli"), (), "comes from Loop 'w', whose graphs cannot"),
        ("w = q.Quant(w0)", ("q",), "comes from Quant 'w', an operator of 'q', which"),
        ("p = q.Quant(w0) u = Mul(p, p) w = Add(u, w0)", ("q",), "the weight 'w' of Conv 'c' comes from Quant 'p', an operator of 'q'"),
        ("p = q.Quant(w0) u = q.Quant(w0) w = Add(u, p)", ("q",), "the weight 'w' of Conv 'c' is computed when the model runs"),
    ],
)
def test_the_reason_is_what_computes_it(nodes, imports, part):
    result = fastbn.fold(weighted(nodes, imports=imports), verify=False)
    assert part in result.kept[0].reason


def test_a_sparse_tensor_is_said_to_be_one():
    proto = weighted("w = Identity(w0)")
    del proto.graph.node[0]
    places = onnx.numpy_helper.from_array(np.arange(4, dtype=np.int64), "w_places")
    proto.graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(onnx.numpy_helper.from_array(normal(4), "w"), places, W.shape))
    (kept,) = fastbn.fold(proto, verify=False).kept
    assert (kept.code, "is a sparse tensor" in kept.reason) == ("dynamic-weight", True)


FUNCTIONS = """<ir_version: 9, opset_import: ["" : 17, "local" : 1]>
m (float[N,3,8,8] x) => (float[N,4,6,6] y) { NODES y = BatchNormalization(c, s, t, m, v) }
<domain: "local", opset_import: ["" : 17]>
twice (w) => (k) { k = Add(w, w) }
<domain: "local", opset_import: ["" : 17]>
conv (x, w, b) => (c) { c = Conv(x, w, b) }
<domain: "local", opset_import: ["" : 17]>
flat (x) => (c) { c = Tanh(x) }
"""


@pytest.mark.parametrize(
    ("nodes", "left"),
    [
        ("c = local.conv(x, w, b)", "Conv"),
        ("k = local.twice(w) c = Conv(x, k, b)", "Conv"),
        ("d = Conv(x, w, b) c = local.flat(d)", "Conv flat BatchNormalization"),
    ],
)
def test_functions_beside_a_norm_are_inlined_where_that_helps(nodes, left):
    proto = onnx.parser.parse_model(FUNCTIONS.replace("NODES", nodes))
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in {"w": W, "b": normal(4), **norm(4)}.items())
    result = fastbn.fold(proto)
    assert ops(result.model) == left
    assert bool(result.model.functions) == ("flat" in left)
    if left == "Conv":
        assert result.parity.ok
        assert any("inlined" in note for note in result.notes)
        assert_same(proto, result.model)
