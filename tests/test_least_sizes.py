"""What each step must know of sizes, and no more: a rank, one axis that is kept, two sizes that are equal."""

import numpy as np
import onnx
import pytest
from sketch import assert_same, model, norm, normal, ops, refuses

import fastbn
from fastbn.graph.model import storage
from fastbn.graph.model.index import Index


def ints(*values):
    return np.array(values, np.int64)


LISTS = {"zero": ints(0), "one": ints(1), "two": ints(2), "rest": ints(-1), "pair": ints(2, 3), "five": ints(5), "axis2": np.int64(2)}
LISTS |= {"back": ints(-2), "keep": ints(0, 0, -1), "image": ints(6, 6), "far": ints(1 << 40), "ends": ints(2, 4), "high": ints(8, 8)}


def used(text, constants):
    words = set(text.replace("(", " ").replace(")", " ").replace(",", " ").split())
    return {name: value for name, value in constants.items() if name in words}


def backward(nodes, *, x="n,3,h,w", opset=17, w=None, inputs="", channels=4, **constants):
    """Return a convolution, which gives c, `nodes`, which give d, and a BatchNormalization of d."""
    last = "b = BatchNormalization(d, s, t, m, v) y = Tanh(b)"
    text = f"(float[{x}] x{inputs}) => (float y) {{ c = Conv <pads = [1, 1, 1, 1]> (x, w) {nodes} {last} }}"
    w = normal(4, 3, 3, 3) if w is None else w
    return model(text, opset=opset, w=w, **norm(channels), **used(text, {**LISTS, **constants}))


def forward(nodes, *, x="n,4,h,w", opset=17, inputs="", **constants):
    """Return Tanh, a BatchNormalization, which gives n, and `nodes`, which give y."""
    text = f"(float[{x}] x{inputs}) => (float y) {{ r = Tanh(x) n = BatchNormalization(r, s, t, m, v) {nodes} }}"
    weights = {"k3": normal(5, 4, 1), "k4": normal(5, 4, 1, 1), "k5": normal(5, 4, 1, 1, 1), "g": normal(4, 5), "bias": normal(5)}
    return model(text, opset=opset, **norm(4, positive=True), **used(text, {**LISTS, **weights, **constants}))


GRU = "y = GRU <hidden_size = 3> (q, gw, gr)"
GATES = {"gw": normal(1, 9, 4), "gr": normal(1, 9, 3)}
HEIGHT = "h = Shape(x) hh = Gather(h, axis2)"

# name -> model whose norm goes, although sizes of it are not known.
PASSES = {
    "Squeeze, its axes constants": forward("q = Squeeze(n, two) y = Conv(q, k3)", x="n,4,1,w"),
    "Squeeze of an axis whose size is not declared": forward("q = Squeeze(n, two) y = Conv(q, k3)", x="n,4,u,w"),
    "Squeeze from the end": forward("q = Squeeze(n, back) y = Conv(q, k3)", x="n,4,u,w"),
    "Squeeze, attribute": forward("q = Squeeze <axes = [2]> (n) y = Conv(q, k3)", x="n,4,u,w", opset=11),
    "Squeeze backward": backward("d = Squeeze(c, two)", x="n,3,u,w"),
    "Unsqueeze": forward("q = Unsqueeze(n, two) y = Conv(q, k5)"),
    "Unsqueeze before the channels": forward("q = Unsqueeze(n, zero) f = Squeeze(q, zero) y = Conv(f, k4)"),
    "Unsqueeze backward": backward("d = Unsqueeze(c, two)"),
    "Slice to computed ends": backward(f"{HEIGHT} e = Unsqueeze(hh, zero) d = Slice(c, zero, e, two)"),
    "Slice to computed ends, forward": forward(f"{HEIGHT} e = Unsqueeze(hh, zero) q = Slice(n, zero, e, two) y = Conv(q, k4)"),
    "Slice by inputs": forward("q = Slice(n, a, e, two) y = Conv(q, k4)", inputs=", int64[1] a, int64[1] e"),
    "Slice of the channels, the batch unknown": forward("q = Slice(n, one, far, one) y = Conv(q, k)", k=normal(5, 3, 1, 1)),
    "Slice of all channels": backward("d = Slice(c, zero, far, one)"),
    "Gather along a known axis": forward("q = Gather <axis = 2> (n, i) y = Conv(q, k4)", inputs=", int64[2] i"),
    "Gather of channels": forward("q = Gather <axis = 1> (n, pair) y = Conv(q, k)", k=normal(5, 2, 1, 1)),
    "Pad by computed sizes": backward(
        f"{HEIGHT} e = Unsqueeze(hh, zero) p = Concat <axis = 0> (zero, zero, e, zero, zero, zero, zero, zero)"
        f' d = Pad <mode = "edge"> (c, p)'
    ),
    "Pad of named axes": backward('d = Pad <mode = "edge"> (c, p, , two)', opset=18, inputs=", int64[2] p"),
    "Expand of the space": forward(
        f"{HEIGHT} e = Unsqueeze(hh, zero) o = Concat <axis = 0> (one, one, e, one) q = Expand(n, o) y = Conv(q, k4)", x="n,4,1,w"
    ),
    "Resize to part of a shape and constants": forward(
        "h = Shape(n) k = Slice(h, zero, two) o = Concat <axis = 0> (k, high) q = Resize(n, , , o) y = Conv(q, k4)"
    ),
    "Resize to the space of another": backward(
        "h = Shape(c) k = Slice(h, zero, two) g = Shape(z) l = Slice(g, two, e4) o = Concat <axis = 0> (k, l) d = Resize(c, , , o)",
        inputs=", float[n,1,p,q] z",
        e4=ints(4),
    ),
    "Resize of named axes": forward("q = Resize <axes = [2, 3]> (n, , , o) y = Conv(q, k4)", opset=18, inputs=", int64[2] o"),
    "Reshape of 0, 0 and the rest": forward("q = Reshape(n, keep) f = Transpose <perm = [0,2,1]> (q) e = MatMul(f, g) y = Add(e, bias)"),
    "Reshape of 0, the channels and the rest": forward(
        "q = Reshape(n, o) f = Transpose <perm = [0,2,1]> (q) e = MatMul(f, g) y = Add(e, bias)", o=ints(0, 4, -1)
    ),
    "Reshape to part of a shape and the rest": forward(
        """h = Shape(n) k = Slice(h, zero, two) o = Concat <axis = 0> (k, rest) q = Reshape(n, o) f = Transpose <perm = [0,2,1]> (q)
        e = MatMul(f, g) y = Add(e, bias)"""
    ),
    "from tokens to an image": backward(
        "l = Reshape(c, keep) e = Transpose <perm = [0,2,1]> (l) f = Transpose <perm = [0,2,1]> (e) h = Shape(c) d = Reshape(f, h)"
    ),
    "a sequence as one batch, and back to a GRU": forward(
        f"h = Shape(z) k = Slice(h, zero, two) o = Concat <axis = 0> (k, rest) q = Reshape(n, o) {GRU}",
        x="tn,4",
        inputs=", float[t,b] z",
        **GATES,
    ),
    "points of all events in one row, as DGCNN writes it": forward(
        """e = Transpose <perm = [0,2,1]> (n) h = Shape(n) i = Gather(h, zero) j = Gather(h, two) o = Mul(i, j)
        p = Concat <axis = 0> (o, rest) f = Reshape(e, p) a = Gather(f, points) y = Gemm(a, g)""",
        x="n,4,w",
        points=ints(3, 1, 2, 2),
    ),
    "the same through a Transpose and a Dropout": forward(
        f"""h = Shape(z) k = Slice(h, zero, two) o = Concat <axis = 0> (k, rest) f = Reshape(n, o) e = Transpose <perm = [1,0,2]> (f)
        q = Dropout(e) {GRU}""",
        x="tn,4",
        inputs=", float[t,b] z",
        **GATES,
    ),
    "a flattening whose matrix tells its rows": forward("q = Flatten(n) y = Gemm(q, k)", x="n,4,2,b", k=normal(16, 3)),
    "Split, its sizes constants": forward(
        "q, f = Split <axis = 1> (n, o) a = Conv(q, ka) b = Conv(f, kb) y = Add(a, b)",
        o=ints(3, 1),
        ka=normal(5, 3, 1, 1),
        kb=normal(5, 1, 1, 1),
    ),
    "Split along the batch": forward("q, f = Split <axis = 0> (n) a = Conv(q, k4) b = Conv(f, k4) y = Concat <axis = 0> (a, b)"),
    "ReduceSum of a known number": forward("q = ReduceSum <keepdims = 0> (n, pair) y = Gemm(q, g)", x="n,4,3,2"),
    "ReduceSum of a known number, backward": backward("d = ReduceSum(c, two)", x="n,3,6,w"),
    "ReduceMean over computed sizes": forward("q = ReduceMean <axes = [2, 3], keepdims = 0> (n) y = Gemm(q, g)"),
}


def gone(proto):
    """Return the operators of a model without its BatchNormalization."""
    return " ".join(op for op in ops(proto).split() if op != "BatchNormalization")


# What the names of sizes stand for in a run, and what inputs of integers are.
SIZES = {"n": 2, "h": 4, "w": 6, "u": 1, "t": 3, "b": 2, "tn": 6, "p": 7, "q": 5}
INTEGERS = {"a": ints(0), "e": ints(3), "i": ints(1, 0), "p": ints(1, 2), "o": ints(7, 5)}


def feeds(proto):
    """Return inputs of the sizes in SIZES."""
    made = {}
    for info in proto.graph.input:
        kind = info.type.tensor_type
        shape = [dim.dim_value or SIZES[dim.dim_param] for dim in kind.shape.dim]
        made[info.name] = normal(*shape) if kind.elem_type == onnx.TensorProto.FLOAT else INTEGERS[info.name]
    return made


@pytest.mark.parametrize("case", PASSES)
def test_passes(case):
    proto = PASSES[case]
    result = fastbn.fold(proto)
    assert ops(result.model) == gone(proto), result.kept
    assert result.parity.status != "failed"
    assert_same(proto, result.model, feeds(proto))


def behind_convolution(nodes):
    """Return a model that declares no rank: `nodes` on the output of a ConvTranspose, which give d, and a BatchNormalization of d."""
    text = f"(float[n,3,h,w] x) => (float y) {{ c = ConvTranspose <strides = [2,2]> (x, w) {nodes} y = BatchNormalization(d, s, t, m, v) }}"
    proto = model(text, w=normal(3, 4, 3, 3), **norm(4), **used(text, LISTS))
    proto.graph.input[0].type.tensor_type.ClearField("shape")
    return proto


# The weight tells the rank where the file does not.
@pytest.mark.parametrize(
    "nodes",
    [
        "d = Identity(c)",
        "e = Transpose <perm = [0,2,3,1]> (c) q = Slice(e, zero, five, one) d = Transpose <perm = [0,3,1,2]> (q)",
        "q = Slice(c, zero, five, back) d = Identity(q)",
        "q = Unsqueeze(c, rest) d = Identity(q)",
    ],
)
def test_a_rank_that_no_file_declares(nodes):
    proto = behind_convolution(nodes)
    result = fastbn.fold(proto, verify=False)
    assert ops(result.model) == gone(proto), result.kept
    assert_same(proto, result.model, {"x": normal(2, 3, 4, 4)})


# name -> (code, model whose norm stays).
STAYS = {
    "Squeeze of unknown axes": ("axis-unknown", forward("q = Squeeze(n) y = Conv(q, k3)")),
    "Slice of unknown axes": (
        "dynamic-index",
        forward("q = Slice(n, a, e, i) y = Conv(q, k4)", inputs=", int64[1] a, int64[1] e, int64[1] i"),
    ),
    "Slice of the channels to a computed end": (
        "dynamic-index",
        forward("q = Slice(n, a, e, one) y = Conv(q, k4)", inputs=", int64[1] a, int64[1] e"),
    ),
    "Pad of the channels by computed sizes": (
        "dynamic-index",
        backward(
            'p = Concat <axis = 0> (zero, e, zero, zero, zero, zero, zero, zero) d = Pad <mode = "edge"> (c, p)', inputs=", int64[1] e"
        ),
    ),
    "Pad with zeros by computed sizes": ("padding", backward("d = Pad(c, p, , two)", opset=18, inputs=", int64[2] p")),
    "Resize to an unknown number of channels": ("axis-unknown", backward("d = Resize(c, , , o)", inputs=", int64[4] o")),
    "Resize of the channels": (
        "axis",
        forward("q = Resize(n, , , o) y = Conv(q, k)", o=ints(1, 8, 6, 6), k=normal(5, 8, 1, 1), x="1,4,h,w"),
    ),
    "Resize that keeps the aspect ratio": (
        "axis-unknown",
        backward(
            """h = Shape(c) k = Slice(h, zero, two) o = Concat <axis = 0> (k, high)
            d = Resize <keep_aspect_ratio_policy = "not_larger"> (c, , , o)""",
            opset=18,
        ),
    ),
    "Expand that may repeat": (
        "axis-unknown",
        backward("e = Slice(c, zero, o, one) d = Expand(e, four)", inputs=", int64[1] o", four=ints(1, 4, 1, 1)),
    ),
    "Reshape of the rest before the channels": ("axis-unknown", forward("q = Reshape(n, o) y = Conv(q, k4)", o=ints(-1, 4, 6, 6))),
    "ReduceSum of an unknown number": ("axis-unknown", forward("q = ReduceSum <keepdims = 0> (n, pair) y = Gemm(q, g)")),
}


@pytest.mark.parametrize("case", STAYS)
def test_stays(case):
    code, proto = STAYS[case]
    refuses(proto, code, verify=False)


def test_two_sizes_of_one_name_are_not_taken_for_equal():
    """The file says that both are N; onnxruntime runs it where they are not."""
    text = """(float[N,4,6] x, float[N,5] z) => (float y) {
        r = Tanh(x) n = BatchNormalization(r, s, t, m, v) h = Shape(z) k = Slice(h, zero, one) o = Concat <axis = 0> (k, rest, pair1)
        q = Reshape(n, o) y = Identity(q)
    }"""
    index = Index(storage.load(model(text, **norm(4), **used(text, LISTS), pair1=ints(2))))
    r, q = index.main.values["r"], index.main.values["q"]
    assert index.sizes(r)[0] != index.sizes(q)[0]
    assert index.sizes(index.main.values["n"]) == index.sizes(r)
