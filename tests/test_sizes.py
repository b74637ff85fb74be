"""Sizes that a graph computes from shapes: the known shape behind a Reshape to them, and batch normalizations that are folded across it."""

import numpy as np
import onnx
import pytest
from make_models import computed
from sketch import folds, model, norm, normal, refuses

from fastbn.graph.model import storage
from fastbn.graph.model.index import Index
from fastbn.graph.model.sizes import SizeInference


def ints(*values):
    return np.array(values, np.int64)


CONSTANTS = {"zero": ints(0), "one": ints(1), "rest": ints(-1), "first": np.int64(0), "perm": ints(0, 2, 3, 1), "none": ints()}
CONSTANTS |= {"far": ints(1 << 40), "rest32": np.int32([-1]), "two": ints(2), "three": ints(3), "four": ints(4), "pair": ints(1, 2)}

# How exporters write [Shape(v)[0], -1]; {v} is the value.
FLATTENING = {
    "PyTorch's view": "h = Shape({v}) g = Gather(h, first) u = Unsqueeze(g, zero) k = Concat <axis = 0> (u, rest)",
    "Gather of a list": "h = Shape({v}) u = Gather(h, zero) k = Concat <axis = 0> (u, rest)",
    "Slice": "h = Shape({v}) u = Slice(h, zero, one, zero) k = Concat <axis = 0> (u, rest)",
    "Shape of one axis": "u = Shape <start = 0, end = 1> ({v}) k = Concat <axis = 0> (u, rest)",
    "Split": "h = Shape({v}) u, u1, u2, u3 = Split <axis = 0> (h) k = Concat <axis = 0> (u, rest)",
    "TensorFlow's": """h = Shape({v}) i = Cast <to = 6> (h) o = Slice(i, zero, one, zero) q = Squeeze(o, zero)
        u = Unsqueeze(q, zero) p = Concat <axis = 0> (u, rest32) k = Cast <to = 7> (p)""",
    "a product of the rest": """h = Shape({v}) u = Gather(h, zero) i = Slice(h, one, four) o = ReduceProd <axes = [0]> (i)
        k = Concat <axis = 0> (u, o)""",
    "products of two": """h = Shape({v}) u = Gather(h, zero) i = Gather(h, one) j = Gather(h, two) o = Gather(h, three) p = Mul(i, j)
        q = Mul(p, o) k = Concat <axis = 0> (u, q)""",
    "Identity and Reshape": "h = Shape({v}) i = Identity(h) g = Gather(i, first) u = Reshape(g, one) k = Concat <axis = 0> (u, rest)",
}


def sized(text, constants=(), **more):
    """Return the model of a text with those of CONSTANTS that it reads."""
    used = {
        name: values for name, values in CONSTANTS.items() if any(f"{before}{name}{behind}" in text for before in "( " for behind in ",)")
    }
    return model(text, **used, **dict(constants), **more)


def dense(nodes, *, x="N,4,6,6", rows=144, inputs=""):
    """Return Tanh, which gives r, a BatchNormalization, which gives n, `nodes`, which give d, and a Gemm of d."""
    text = f"(float[{x}] x{inputs}) => (float y) {{ r = Tanh(x) n = BatchNormalization(r, s, t, m, v) {nodes} y = Gemm(d, w) }}"
    return sized(text, norm(4, positive=True), w=normal(rows, 3))


# The Slice of the batch behind the Reshape is there so that the rows of the matrix do not determine its sizes.
@pytest.mark.parametrize("case", FLATTENING)
def test_a_norm_passes_a_flattening_of_unknown_batches(case):
    target = FLATTENING[case].format(v="n")
    result = folds(
        dense(f"{target} f = Reshape(n, k) d = Slice(f, zero, far)"), " ".join(["Tanh", *operators_of(target), "Reshape Slice Gemm"])
    )
    assert [fold.into for fold in result.folded] == ["y"]


def operators_of(nodes):
    return [node.op_type for node in sized(f"(float[N,4,6,6] n) => (k) {{ {nodes} }}").graph.node]


@pytest.mark.parametrize("case", FLATTENING)
def test_a_norm_passes_pooling_and_channels_last(case):
    target = FLATTENING[case].format(v="e")
    pool = "pool = MaxPool <kernel_shape = [2,2], strides = [2,2]> (n) e = Transpose <perm = [0,2,3,1]> (pool)"
    proto = dense(f"{pool} {target} f = Reshape(e, k) d = Slice(f, zero, far)", rows=36)
    folds(proto, " ".join(["Tanh MaxPool Transpose", *operators_of(target), "Reshape Slice Gemm"]))


def test_the_shape_may_be_taken_before_a_transpose():
    """tf2onnx moves it there, and chooses the sizes in the order of the other layout."""
    nodes = """e = Transpose <perm = [0,2,3,1]> (n) h = Shape(n) i = Gather(h, perm) j = Cast <to = 6> (i) u = Slice(j, zero, one, zero)
        o = Concat <axis = 0> (u, rest32) k = Cast <to = 7> (o) f = Reshape(e, k) d = Slice(f, zero, far)"""
    folds(dense(nodes), "Tanh Transpose Shape Gather Cast Slice Concat Cast Reshape Slice Gemm")


def test_a_norm_behind_a_flattening_goes_into_what_is_before_it():
    text = """(float[N,3,8,8] x) => (float y) {
        c = Conv(x, w) h = Shape(x) g = Gather(h, first) u = Unsqueeze(g, zero) k = Concat <axis = 0> (u, four, rest) d = Reshape(c, k)
        y = BatchNormalization(d, s, t, m, v)
    }"""
    folds(sized(text, norm(4), w=normal(4, 3, 3, 3)), "Conv Shape Gather Unsqueeze Concat Reshape")


# name -> (code, model whose norm stays).
STAYS = {
    "the batch of another value": (
        "axis-unknown",
        dense(f"{FLATTENING['Slice'].format(v='z')} f = Reshape(n, k) d = Slice(f, zero, far)", inputs=", float[M,5] z"),
    ),
    "the other order": ("axis", dense("h = Shape(n) u = Gather(h, zero) k = Concat <axis = 0> (rest, u) d = Reshape(n, k)", rows=2)),
    "another axis": (
        "axis-unknown",
        dense("h = Shape(n) u = Gather(h, two) k = Concat <axis = 0> (u, rest) d = Reshape(n, k)", x="N,4,H,6", rows=48),
    ),
    "unknown space": (
        "axis-unknown",
        dense(f"{FLATTENING['Slice'].format(v='n')} f = Reshape(n, k) d = Slice(f, zero, far)", x="N,4,H,W", rows=16),
    ),
}


@pytest.mark.parametrize("case", STAYS)
def test_a_norm_stays_where_the_flattening_is_not_certain(case):
    code, proto = STAYS[case]
    refuses(proto, code, verify=False)


@pytest.mark.parametrize("flattening", [*FLATTENING, "Flatten"])
def test_channels_last_pass_with_unknown_space_where_the_matrix_tells_its_rows(flattening):
    target = FLATTENING.get(flattening, "").format(v="e")
    nodes = f"e = Transpose <perm = [0,2,3,1]> (n) {target} d = {'Reshape(e, k)' if target else 'Flatten(e)'}"
    left = operators_of(target) if target else []
    folds(dense(nodes, x="N,4,H,W", rows=16), " ".join(["Tanh", "Transpose", *left, "Reshape" if target else "Flatten", "Gemm"]))


# The way in which most cases below write [Shape(x)[0], -1].
BATCH = "h = Shape(x) u = Gather(h, zero) k = Concat <axis = 0> (u, rest)"

# name -> (shape of x, nodes that give d, shape of d). z has sizes M, 5, other L, 4, 6.
KNOWN = {
    "0 and the rest": ("N,4,6", "k = Concat <axis = 0> (zero, rest) d = Reshape(x, k)", (None, 24)),
    "the rest first": ("N,4,6", "k = Concat <axis = 0> (rest, four) d = Reshape(x, k)", (None, 4)),
    "the rest is the batch, and known behind": (
        "N,4,6",
        "a = Concat <axis = 0> (rest, four, two, three) e = Reshape(x, a) h = Shape(x) u = Gather(h, zero) "
        "k = Concat <axis = 0> (u, rest) d = Reshape(e, k)",
        (None, 24),
    ),
    "in the other order": ("N,4,6", "h = Shape(x) u = Gather(h, zero) k = Concat <axis = 0> (rest, u) d = Reshape(x, k)", (24, None)),
    "of another value": ("N,4,6", "h = Shape(z) u = Gather(h, zero) k = Concat <axis = 0> (u, rest) d = Reshape(x, k)", (None, None)),
    "of another axis": ("N,4,H", "h = Shape(x) u = Gather(h, two) k = Concat <axis = 0> (u, rest) d = Reshape(x, k)", (None, None)),
    "two unknown": ("N,H,6", f"{BATCH} d = Reshape(x, k)", (None, None)),
    "both unknown kept": (
        "N,H,6",
        "h = Shape(x) u = Slice(h, zero, two) k = Concat <axis = 0> (u, rest) d = Reshape(x, k)",
        (None, None, 6),
    ),
    "one batch for two": (
        "N,4,6",
        "h = Shape(x) u = Gather(h, zero) k = Concat <axis = 0> (u, u, rest) d = Reshape(x, k)",
        (None, None, None),
    ),
    "a batch times two": (
        "N,4,6",
        "h = Shape(x) u = Gather(h, zero) a = Mul(u, two) k = Concat <axis = 0> (a, rest) d = Reshape(x, k)",
        (None, 12),
    ),
    "does not divide": (
        "N,2,2",
        "h = Shape(x) u = Gather(h, zero) k = Concat <axis = 0> (u, three, rest) d = Reshape(x, k)",
        (None, 3, None),
    ),
    "of a list of lists": (
        "N,4,6",
        "h = Shape(x) i = Slice(h, zero, two) j = Reshape(i, pair) u = Gather(j, first) k = Concat <axis = 0> (u, rest) d = Reshape(x, k)",
        (None, 4, 6),
    ),
    "a Cast that may change it": (
        "N,4,6",
        "h = Shape(x) u = Gather(h, zero) i = Cast <to = 3> (u) j = Cast <to = 7> (i) k = Concat <axis = 0> (j, rest) d = Reshape(x, k)",
        (None, None),
    ),
    "0 is a size": (
        "N,4,6",
        "h = Shape(x) u = Gather(h, zero) k = Concat <axis = 0> (zero, u) d = Reshape <allowzero = 1> (x, k)",
        (None, None),
    ),
    "behind a convolution": (
        "N,4,6",
        f"e = Conv(x, kernel) {BATCH} d = Reshape(e, k)",
        (None, 12),
    ),
    "another axis of a convolution": (
        "1,4,H",
        "e = Conv(x, kernel3) h = Shape(x) u = Gather(h, two) k = Concat <axis = 0> (rest, u) d = Reshape(e, k)",
        (None, None),
    ),
    "another axis of a convolution that keeps it": (
        "1,4,H",
        "e = Conv <pads = [1, 1]> (x, kernel3) h = Shape(x) u = Gather(h, two) k = Concat <axis = 0> (rest, u) d = Reshape(e, k)",
        (2, None),
    ),
    "behind a sum": (
        "N,4,6",
        f"e = Tanh(x) f = Relu(x) a = Add(e, f) {BATCH} d = Reshape(a, k)",
        (None, 24),
    ),
    "behind a sum of others": (
        "N,4,6",
        f"a = Add(x, other) {BATCH} d = Reshape(a, k)",
        (None, None),
    ),
    "behind a Concat": (
        "N,4,6",
        f"a = Concat <axis = 1> (x, other) {BATCH} d = Reshape(a, k)",
        (None, 48),
    ),
    "behind a Concat of the batch": (
        "N,4,6",
        f"a = Concat <axis = -3> (x, x) {BATCH} d = Reshape(a, k)",
        (None, None),
    ),
    "behind a product": (
        "N,4,6",
        f"e = MatMul(x, c6) {BATCH} d = Reshape(e, k)",
        (None, 20),
    ),
    "behind a Transpose": (
        "4,N,6",
        "e = Transpose <perm = [1,0,2]> (x) h = Shape(x) u = Gather(h, one) k = Concat <axis = 0> (u, rest) d = Reshape(e, k)",
        (None, 24),
    ),
    "another axis of a Transpose": (
        "H,N,6",
        f"e = Transpose <perm = [1,0,2]> (x) {BATCH} d = Reshape(e, k)",
        (None, None),
    ),
    "rows of a matrix": ("H,W,6", "k = Concat <axis = 0> (zero, rest) d = Reshape(x, k) y2 = MatMul(d, c6)", (None, 6)),
    "columns of a matrix": ("H,W,6", "k = Concat <axis = 0> (zero, rest) d = Reshape(x, k) y2 = Gemm <transB = 1> (d, c6)", (None, 5)),
    "a transposed product": ("H,W,6", "k = Concat <axis = 0> (zero, rest) d = Reshape(x, k) y2 = Gemm <transA = 1> (d, c6)", (None, None)),
    "the second of a product": ("6,H,W", "k = Concat <axis = 0> (zero, rest) d = Reshape(x, k) y2 = MatMul(c56, d)", (6, None)),
    "of another value, twice": (
        "N,4,6",
        "h = Shape(z) u = Gather(h, zero) i = Concat <axis = 0> (u, four, two, three) e = Reshape(x, i) "
        "k = Concat <axis = 0> (u, rest) d = Reshape(e, k)",
        (None, None),
    ),
    "behind one that 0 emptied": (
        "N,4,6",
        f"i = Concat <axis = 0> (zero, four) e = Reshape <allowzero = 1> (x, i) {BATCH} d = Reshape(e, k)",
        (None, None),
    ),
    "the rest, more than the batch": (
        "N,4,6",
        f"i = Concat <axis = 0> (rest, four) e = Reshape(x, i) {BATCH} d = Reshape(e, k)",
        (None, 24),
    ),
    "behind a Flatten": (
        "N,4,6",
        f"e = Flatten(x) {BATCH} d = Reshape(e, k)",
        (None, 24),
    ),
    "behind a Flatten of more": (
        "N,4,6",
        f"e = Flatten <axis = 2> (x) {BATCH} d = Reshape(e, k)",
        (None, None),
    ),
    "behind a product of unknown width": (
        "N,4,H",
        "e = Transpose(z) f = MatMul(x, e) h = Shape(x) u = Gather(h, zero) o = Gather(h, two) k = Concat <axis = 0> (u, rest, o) "
        "d = Reshape(f, k)",
        (None, None, None),
    ),
    "a target that is no list": ("N,4,6", "h = Shape(x) g = Gather(h, first) d = Reshape(x, g)", (None,)),
    "behind a sum with a constant": (
        "N,4,6",
        f"a = Add(x, one6) {BATCH} d = Reshape(a, k)",
        (None, 24),
    ),
    "behind a sum of others, the other": (
        "N,4,6",
        "a = Add(x, other) h = Shape(other) u = Gather(h, zero) k = Concat <axis = 0> (u, rest) d = Reshape(a, k)",
        (None, None),
    ),
    "behind a Gemm": (
        "N,4,6",
        f"e = Flatten(x) f = Gemm(e, c24) {BATCH} d = Reshape(f, k)",
        (None, 5),
    ),
    "behind a transposed Gemm": (
        "N,H,6",
        f"i = Concat <axis = 0> (zero, rest) e = Reshape(x, i) f = Gemm <transA = 1> (e, z) {BATCH} d = Reshape(f, k)",
        (None, None),
    ),
}


@pytest.mark.parametrize("case", KNOWN)
def test_what_is_known_of_a_reshape(case):
    x, nodes, shape = KNOWN[case]
    weights = {
        "c6": normal(6, 5),
        "kernel": normal(2, 4, 1),
        "kernel3": normal(2, 4, 3),
        "c56": normal(5, 6),
        "c24": normal(24, 5),
        "one6": normal(6),
    }
    text = f"(float[{x}] x, float[M,5] z, float[L,4,6] other) => (float y) {{ {nodes} y = Identity(d) }}"
    proto = sized(text, {name: values for name, values in weights.items() if name in nodes})
    index = Index(storage.load(proto))
    assert index.shape(index.main.find("d")) == shape


def test_a_product_that_may_not_run_tells_nothing():
    text = """(float[H,W,6] x, bool flag) => (float y) {
        k = Concat <axis = 0> (zero, rest) d = Reshape(x, k)
        y = If (flag) < then_branch = yes () => (a) { a = MatMul(d, w) }, else_branch = no () => (c) { c = Identity(d) } >
    }"""
    index = Index(storage.load(sized(text, w=normal(6, 5))))
    assert index.shape(index.main.find("d")) == (None, None)


def test_a_declared_shape_is_completed_by_what_is_inferred():
    text = "(float[N,4,6] x) => (float y) <float[A,B] d> { k = Concat <axis = 0> (zero, rest) d = Reshape(x, k) y = Identity(d) }"
    index = Index(storage.load(sized(text)))
    assert index.declared_shape(index.main.find("d")) == (None, None)
    assert index.shape(index.main.find("d")) == (None, 24)


def test_a_reshape_of_integers_keeps_its_type():
    text = """(int64[N,4,6] x, float[3,5] w) => (float y) {
        h = Shape(x) u = Gather(h, zero) k = Concat <axis = 0> (u, rest) d = Reshape(x, k) y = Cast <to = 1> (d)
    }"""
    index = Index(storage.load(sized(text)))
    assert index.kind(index.main.find("d")) == 7


def test_a_node_that_gives_nothing_is_passed_over():
    proto = sized(f"(float[N,4,6] x) => (float y) {{ {BATCH} d = Reshape(x, k) y = Identity(d) }}")
    proto.graph.node.add(op_type="Reshape", domain="other", input=["x", "k"], output=[""])
    index = Index(storage.load(proto))
    assert index.shape(index.main.find("d")) == (None, 24)


def test_inference_runs_twice_where_all_lists_are_short(monkeypatch):
    runs = []

    def noted(name, run):
        return lambda *args, **kwargs: runs.append(name) or run(*args, **kwargs)

    monkeypatch.setattr(onnx.shape_inference, "infer_shapes", noted("onnx's", onnx.shape_inference.infer_shapes))
    monkeypatch.setattr(SizeInference, "infer", noted("ours", SizeInference.infer))
    index = Index(storage.load(computed(3)))
    assert index.shape(index.main.values["y"]) == (None, 4, 4, 4)
    assert runs == ["onnx's", "ours", "onnx's"]
