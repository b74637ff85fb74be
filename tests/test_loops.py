"""Loop, Scan and SequenceMap of constants: what they are is what onnxruntime computes, and a limit ends those that would take long."""

import numpy as np
import onnx
import pytest
from sketch import assert_same, model, norm, normal, ops, run

import fastbn
from fastbn.graph.model import storage
from fastbn.graph.model.index import Index

KNOWN = {
    "w0": normal(4, 3, 3, 3),
    "half": np.float32(0.5),
    "parts": normal(5, 4, 3, 3, 3, seed=2),
    "big": np.float32(30),
    **{f"n{number}": np.array(number) for number in (0, 1, 2, 3, 5)},
    **{"far": np.array(1 << 40), "yes": np.array(True), "no": np.array(False)},
    **{"to": np.array([4, 27]), "back": np.array([4, 3, 3, 3])},
}

BODY = "<body = g (int64 i, bool k, float[4,3,3,3] u) => (l, o) { l = Identity(k) %s }>"
TWICE = "<body = g (int64 i, bool k, float[4,3,3,3] v) => (l, o, p) { l = Identity(k) o = Neg(v) p = Mul(v, half) }>"
ENDING = "<body = g (int64 i, bool k, float[4,3,3,3] u, float a) => (l, o, r) { r = Add(a, a) l = Less(r, big) o = Mul(u, a) }>"
CHOOSING = "j = Equal(i, n1) o = If (j) <then_branch = t () => (p) { p = Neg(u) }, else_branch = f () => (q) { q = Mul(u, half) }>"
INNER = """o = Loop(i, k, u) <body = h (int64 i2, bool k2, float[4,3,3,3] u2) => (l2, o2) {
    l2 = Identity(k2) a = Mul(u2, half) o2 = Add(a, u)
}>"""
GROWING = """<body = g (int64 i, bool k, seq(float[4,3,3,3]) u) => (l, o) {
    l = Identity(k) f = Cast <to = 1> (i) v = Mul(w0, f) o = SequenceInsert(u, v)
}>"""
SCANNED = "body = g (float[4,3,3,3] u, float[4,3,3,3] v) => (o, p) { h = Mul(u, half) o = Add(h, v) p = Mul(o, v) }> (w0, %s)"
BACKWARD = "scan_input_axes = [2], scan_input_directions = [1], scan_output_axes = [-1], scan_output_directions = [1]"
OF_TWO = "<body = g (float[4,3,3,3] u, float[4,3,3,3] v, float h) => (float[4,3,3,3] o) { p = Mul(u, h) o = Sub(p, v) }>"

# name -> nodes that give w
GIVEN = {
    "a Loop of so many turns": f"w = Loop(n3, yes, w0) {BODY % 'o = Mul(u, half)'}",
    "a Loop without a condition": f"w = Loop(n3, , w0) {BODY % 'o = Mul(u, half)'}",
    "a Loop of no turns": f"w = Loop(n0, yes, w0) {BODY % 'o = Mul(u, half)'}",
    "a Loop that does not begin": f"w = Loop(n3, no, w0) {BODY % 'o = Mul(u, half)'}",
    "a Loop that counts": f"w = Loop(n5, yes, w0) {BODY % 'f = Cast <to = 1> (i) o = Add(u, f)'}",
    "a Loop that ends itself": f"w, e = Loop( , yes, w0, half) {ENDING}",
    "a Loop with what each turn gives": f"d, s = Loop(n2, yes, w0) {TWICE} w = Gather(s, n1)",
    "a Loop with a constant of its own": f"w = Loop(n2, yes, w0) {BODY % 'a = Constant <value_float = 3.0> () d = Exp(a) o = Div(u, d)'}",
    "a Loop with an If": f"w = Loop(n3, yes, w0) {BODY % CHOOSING}",
    "a Loop in a Loop": f"w = Loop(n2, yes, w0) {BODY % INNER}",
    "a Loop with a sequence": f"e = SequenceEmpty() q = Loop(n3, yes, e) {GROWING} w = SequenceAt(q, n2)",
    "a Loop of what the graph computes": f"h = Mul(half, half) w = Loop(n3, yes, w0) {BODY % 'o = Mul(u, h)'}",
    "a Scan": f"w, z = Scan <num_scan_inputs = 1, {SCANNED % 'parts'}",
    "what a Scan gives in each turn": f"d, s = Scan <num_scan_inputs = 1, {SCANNED % 'parts'} w = Gather(s, n2)",
    "a Scan from the end along another axis": f"""m = Transpose <perm = [1,2,0,3,4]> (parts)
        d, s = Scan <num_scan_inputs = 1, {BACKWARD}, {SCANNED % "m"} w = Gather <axis = -1> (s, n3)""",
    "SequenceMap": """q = SequenceConstruct(w0, w0) r = SequenceMap(q) <body = g (float[4,3,3,3] u) => (float[4,3,3,3] o) { o = Neg(u) }>
        w = SequenceAt(r, n1)""",
    "SequenceMap of two": f"q = SequenceConstruct(w0, w0) r = SequenceMap(q, q, half) {OF_TWO} w = SequenceAt(r, n1)",
}


def weighted(nodes):
    """Return nodes that give w, and a convolution with it before a norm."""
    used = {name: value for name, value in KNOWN.items() if any(f"{name}{end}" in nodes for end in "),")}
    text = f"(float[N,3,8,8] x) => (float[N,4,6,6] y) {{ {nodes} c = Conv(x, w, b) y = BatchNormalization(c, s1, t1, m1, v1) }}"
    return model(text, **used, b=normal(4), **norm(4, "1"))


def known(proto, **limits):
    """Return what fastbn says w is, None for no constant, where so much may be left of what bodies may take."""
    index = Index(storage.load(proto))
    for name, most in limits.items():
        setattr(index._constants._bodies, name, most)
    found = index.constant(index.main.find("w"))
    return None if found is None else found.array()


def truth(proto):
    """Return what onnxruntime says w is."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    del copy.graph.output[:]
    copy.graph.output.append(onnx.helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, (4, 3, 3, 3)))
    return run(copy, {"x": normal(2, 3, 8, 8)})[0]


@pytest.mark.parametrize("name", GIVEN)
def test_what_a_body_gives_for_constants_is_a_constant(name):
    proto = weighted(GIVEN[name])
    assert known(proto).tobytes() == truth(proto).tobytes()
    result = fastbn.fold(proto)
    assert ops(result.model) == "Conv"
    assert result.parity.ok
    assert_same(proto, result.model)


NOT_GIVEN = {
    "random numbers": (f"w = Loop(n3, yes, w0) {BODY % 'n = RandomNormalLike(u) o = Add(u, n)'}", "whose graphs cannot be evaluated"),
    "a turn that never comes": (f"d, s = Loop(n0, yes, w0) {TWICE} w = ReduceSum(s, n0)", "whose graphs cannot be evaluated"),
    "a value of the run": (
        f"r = ReduceMax <keepdims = 0> (x) w = Loop(n3, yes, w0) {BODY % 'o = Mul(u, r)'}",
        "is computed when the model runs",
    ),
    "no end": (f"w = Loop( , yes, w0) {BODY % 'o = Mul(u, half)'}", "too large to be evaluated"),
    "very many turns": (f"w = Loop(far, yes, w0) {BODY % 'o = Mul(u, half)'}", "too large to be evaluated"),
    "more and more": (f"w = Loop(far, yes, w0) {BODY.replace('4,3', '?,3') % 'o = Concat <axis = 0> (u, u)'}", "too large to be evaluated"),
}


@pytest.mark.parametrize("name", NOT_GIVEN)
def test_what_stays_says_why(name):
    nodes, part = NOT_GIVEN[name]
    result = fastbn.fold(weighted(nodes), verify=False)
    assert [kept.code for kept in result.kept] == ["dynamic-weight"]
    assert part in result.kept[0].reason


def test_the_nodes_of_all_bodies_are_counted():
    """Two in each of six turns."""
    first = f"d = Loop(n3, yes, w0) {BODY % 'o = Mul(u, half)'}"
    proto = weighted(f"{first} w = Loop(n3, yes, d) {BODY.replace('g (int64 i, bool k', 'h (int64 i, bool k') % 'o = Mul(u, half)'}")
    assert known(proto, nodes_left=12) is not None
    assert known(proto, nodes_left=11) is None


def test_the_elements_and_the_steps_of_bodies_are_added_up():
    """In five turns, 27 x 27 elements and 27 x 4 of two products of 4 and of 27 terms each, and the condition beside them."""
    body = "<body = g (int64 i, bool k, float[27,4] u) => (l, o) { l = Identity(k) p = MatMul(u, m) o = MatMul(p, u) }>"
    proto = weighted(f"m = Reshape(w0, to) v = Transpose(m) q = Loop(n5, yes, v) {body} z = Transpose(q) w = Reshape(z, back)")
    elements, steps = 5 * (27 * 27 + 27 * 4), 5 * (27 * 27 * 4 + 27 * 4 * 27) / 8  # of a product, eight steps at once
    assert known(proto) is not None
    assert known(proto, elements_left=elements) is None
    assert known(proto, elements_left=elements + 5) is not None
    assert known(proto, steps_left=steps) is None
    assert known(proto, steps_left=steps + 5 * 2) is not None


def test_a_body_is_run_once_for_all_that_it_gives(monkeypatch):
    from fastbn.graph.model import loops

    turns = []
    given = loops.Bodies._run
    monkeypatch.setattr(loops.Bodies, "_run", lambda *arguments: turns.append(0) or given(*arguments))
    index = Index(storage.load(weighted(f"d, s = Loop(n2, yes, w0) {TWICE} w = Gather(s, n1)")))
    assert all(index.constant(index.main.find(name)) is not None for name in "dws")
    assert len(turns) == 2
