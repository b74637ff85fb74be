"""Shape inference: the sizes behind constants, however they are written, and models that would end the process.

The oracle of the shapes is a run in onnxruntime.
"""

import os
import re
import subprocess
import sys
import textwrap

import numpy as np
import onnx
import pytest
from onnx import helper
from sketch import folds, model, norm, normal, run

from fastbn.graph.model import storage
from fastbn.graph.model.index import Index


def ints(*values):
    return np.array(values, np.int64)


def floats(*values):
    return np.array(values, np.float32)


# name -> (nodes that give y from x, which is 1x3x8x8; the constants that they read by value; opset).
READERS = {
    "Resize by scales": ("y = Resize(x, none, k)", {"k": floats(1, 1, 2, 2)}, 12),
    "Resize to sizes": ("y = Resize(x, none, empty, k)", {"k": ints(1, 3, 16, 16)}, 12),
    "Resize of opset 10": ("y = Resize(x, k)", {"k": floats(1, 1, 2, 2)}, 10),
    "Resize of opset 18": ("y = Resize <axes = [2,3]> (x, none, k)", {"k": floats(2, 3)}, 18),
    "Upsample": ("y = Upsample(x, k)", {"k": floats(1, 1, 2, 2)}, 9),
    "Pad": ("y = Pad(x, k)", {"k": ints(0, 0, 1, 1, 0, 0, 2, 2)}, 13),
    "Pad of axes": ("y = Pad(x, k, value, a)", {"k": ints(1, 1, 2, 2), "a": ints(2, 3)}, 18),
    "Slice": ("y = Slice(x, k, e, a, s)", {"k": ints(1), "e": ints(7), "a": ints(-1), "s": ints(2)}, 13),
    "Tile": ("y = Tile(x, k)", {"k": ints(1, 2, 3, 1)}, 13),
    "Expand": ("y = Expand(x, k)", {"k": ints(2, 3, 8, 8)}, 13),
    "Reshape": ("y = Reshape(x, k)", {"k": ints(0, -1, 16)}, 13),
    "TopK": ("y, i = TopK(x, k)", {"k": ints(5)}, 13),
    "OneHot": ("i = Cast <to = 7> (x) y = OneHot(i, k, v)", {"k": ints(5)}, 13),
    "Range": ("m = ReduceMax <keepdims = 0> (x) y = Range(s, k, d)", {"k": np.float32(7), "s": np.float32(0), "d": np.float32(2)}, 13),
    "Squeeze": ("y = Squeeze(x, k)", {"k": ints(-4)}, 13),
    "Unsqueeze": ("y = Unsqueeze(x, k)", {"k": ints(-1, 0)}, 13),
    "ReduceSum": ("y = ReduceSum(x, k)", {"k": ints(-1, 1)}, 13),
    "ReduceMean": ("y = ReduceMean(x, k)", {"k": ints(-1, 1)}, 18),
    "Split": ("y, i = Split <axis = 1> (x, k)", {"k": ints(1, 2)}, 13),
}

# Lists that are computed from shapes; the constants among them as onnxruntime's own inference takes them.
COMPUTED = {
    "Reshape of computed": (
        "h = Shape(x) g = Gather(h, k) u = Concat <axis = 0> (g, r) y = Reshape(x, u)",
        {"k": ints(1), "r": ints(-1)},
        13,
    ),
    "Resize to computed": (
        "h = Shape(x) g = Slice(h, k, e) u = Concat <axis = 0> (g, r) y = Resize(x, none, empty, u)",
        {"k": ints(0), "e": ints(2), "r": ints(16, 16)},
        13,
    ),
    "Resize by computed scales": (
        """h = Shape(x) g = Slice(h, k, e) i = Cast <to = 1> (g) j = Mul(i, t) l = Floor(j) o = Div(l, i) u = Concat <axis = 0> (p, o)
        y = Resize(x, none, u)""",
        {"k": ints(2), "e": ints(4), "t": floats(2, 2), "p": floats(1, 1)},
        13,
    ),
}
ALL = READERS | COMPUTED
WAYS = ("initializer", "Identity", "Concat", "arithmetic")
OTHERS = {"none": np.zeros(0, np.float32), "empty": np.zeros(0, np.float32), "value": np.float32(0), "v": floats(0, 1)}


def written(name, how):
    """Return the model of a reader whose constants are written in one of the ways."""
    nodes, constants, opset = ALL[name]
    before = ""
    kept = {key: value for key, value in OTHERS.items() if f" {key}," in nodes or f" {key})" in nodes}
    for key, value in constants.items():
        if how == "initializer":
            kept[key] = value
            continue
        kept[f"{key}_0"] = value
        before += {
            "Identity": f"{key} = Identity({key}_0) ",
            "Concat": f"{key} = Concat <axis = 0> ({key}_0) " if value.ndim else f"{key} = Identity({key}_0) ",
            "arithmetic": f"{key}_1 = Neg({key}_0) {key} = Neg({key}_1) ",
        }[how]
    return model(f"(float[1,3,8,8] x) => (y) {{ {before} {nodes} }}", opset=opset, **kept)


@pytest.mark.parametrize(("name", "how"), [(name, how) for name in ALL for how in (WAYS if name in READERS else WAYS[:1])])
def test_a_small_constant_reaches_every_operator_that_reads_it(name, how):
    proto = written(name, how)
    (result,) = run(proto, {"x": normal(1, 3, 8, 8)})
    index = Index(storage.load(proto))
    assert index.shape(index.main.find("y")) == result.shape


@pytest.mark.parametrize("name", ALL)
def test_a_small_constant_node_reaches_every_operator_that_reads_it(name):
    proto = written(name, "initializer")
    for tensor in proto.graph.initializer:
        node = helper.make_node("Constant", [], [tensor.name], value=tensor)
        proto.graph.node.insert(0, node)
    del proto.graph.initializer[:]
    (result,) = run(proto, {"x": normal(1, 3, 8, 8)})
    index = Index(storage.load(proto))
    assert index.shape(index.main.find("y")) == result.shape


def test_outer_constants_reach_a_body():
    text = """(float[1,3,8,8] x, bool flag) => (float y) {
        y = If (flag) < then_branch = yes () => (a) { z = Resize(x, none, k) a = Relu(z) }, else_branch = no () => (c) { c = Identity(x) } >
    }"""
    index = Index(storage.load(model(text, none=np.zeros(0, np.float32), k=floats(1, 1, 2, 2))))
    assert index.shape(index.scopes[1].find("z")) == (1, 3, 16, 16)


UPSAMPLED = """(float[N,3,8,8] x, float[N,2,16,16] skip) => (float y) {
    c = Conv(x, w)
    l = LeakyRelu(c)
    n = BatchNormalization(l, s, t, m, v)
    %s
    j = Concat <axis = 1> (u, skip)
    y = Conv(j, w2)
}"""


@pytest.mark.parametrize(
    ("nodes", "constants", "op"),
    [
        ("u = Resize(n, none, k)", {"k": floats(1, 1, 2, 2)}, "Resize"),
        ("h = Shape(n) g = Slice(h, o, two) k = Concat <axis = 0> (g, r) u = Resize(n, none, none, k)", {"r": ints(16, 16)}, "Resize"),
    ],
)
def test_a_norm_passes_a_resize(nodes, constants, op):
    more = {"o": ints(0), "two": ints(2)} if "two" in nodes else {}
    weights = {"w": normal(4, 3, 1, 1), "w2": normal(5, 6, 1, 1), "none": np.zeros(0, np.float32), **norm(4)}
    result = folds(model(UPSAMPLED % nodes, opset=13, **weights, **constants, **more), f"Conv LeakyRelu {_before(nodes)}{op} Concat Conv")
    assert not result.kept


def _before(nodes):
    return "Shape Slice Concat " if "Shape" in nodes else ""


@pytest.fixture
def passes(monkeypatch):
    """The sizes in bytes of the models that inference is given, one after the other."""
    seen = []
    infer = onnx.shape_inference.infer_shapes

    def watched(proto, **options):
        seen.append(proto.ByteSize())
        return infer(proto, **options)

    monkeypatch.setattr(onnx.shape_inference, "infer_shapes", watched)
    return seen


# While inference follows the elements of lists, a Mul or Add of unknown rank is left out, so ranks must be inferred before that.
@pytest.mark.parametrize("x", ["2,4,6", "N,4,6"])
def test_a_long_chain_of_computed_reshapes_takes_few_passes(x, passes):
    blocks, value = "", "x"
    for at in range(40):
        blocks += f"""h{at} = Shape({value}) g{at} = Gather(h{at}, zero) u{at} = Concat <axis = 0> (g{at}, sizes)
            f{at} = Reshape({value}, u{at})
            m{at} = Mul(f{at}, k) a{at} = Add(m{at}, m{at}) """
        value = f"a{at}"
    proto = model(f"(float[{x}] x) => (float y) {{ {blocks} y = Identity({value}) }}", zero=ints(0), sizes=ints(4, 6), k=np.float32(2))
    index = Index(storage.load(proto))
    assert index.shape(index.main.find("y")) == (2 if x[0] == "2" else None, 4, 6)
    assert len(passes) <= 6


SLICED = """(float[N,3,H,W] x) => (float y) {
    c = Conv(x, w) l = Slice(c, zero, end, two) d = Conv(l, w2) e = Slice(d, zero, one, two) y = Relu(e)
}"""


@pytest.mark.parametrize(("size", "shape"), [(40, (1, 4, 1, 24)), (12, None), (4, None)])
def test_sizes_that_are_too_small_leave_shapes_open(size, shape):
    lists = {"zero": ints(0), "end": ints(20), "one": ints(1), "two": ints(2)}
    proto = model(SLICED, w=normal(4, 3, 9, 9), w2=normal(4, 4, 9, 9), **lists)
    index = Index(storage.load(proto), input_shapes={"x": (1, 3, size, size)})
    found = index.shape(index.main.find("y"))
    assert found == shape or (shape is None and (found is None or None in found))


def test_a_large_constant_travels_as_a_type(passes):
    weight = normal(64, 64, 3, 3)
    proto = model("(float[1,64,8,8] x) => (float y) { c = Conv(x, w) y = Relu(c) }", w=weight)
    node = helper.make_node("Constant", [], ["w"], value=proto.graph.initializer[0])
    index = Index(storage.load(proto))
    assert index.shape(index.main.find("y")) == (1, 64, 6, 6)
    del proto.graph.initializer[:]
    proto.graph.node.insert(0, node)
    index = Index(storage.load(proto))
    assert index.shape(index.main.find("y")) == (1, 64, 6, 6)
    assert max(passes) < 1000


# Each of these ended the process, ran out of memory or never ended.
DEADLY = """
    import resource, sys
    import numpy as np, onnx
    from onnx import TensorProto, helper
    from fastbn import FastbnError
    from fastbn.graph.model import storage
    from fastbn.graph.model.index import Index

    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    HUGE = 1 << 31

    def index(nodes, inputs, constants=(), opset=17):
        infos = [helper.make_tensor_value_info(name, kind, dims) for name, kind, dims in inputs]
        tensors = [helper.make_tensor(name, TensorProto.INT64, [len(values)], values) for name, values in constants]
        graph = helper.make_graph(nodes, "g", infos, [onnx.ValueInfoProto(name="y")], tensors)
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid("other", 1)])
        found = Index(storage.load(proto))
        return [found.shape(value) for node in found.order for value in node.outputs]

    N, X, S = helper.make_node, ("x", 1, [1, 3, 4, 4]), ("s", 7, [HUGE])
    UNKNOWN = N("Mystery", ["x"], ["u"], domain="other")
    CASES = {
        "concat": lambda: index([N("Concat", ["s", "s"], ["k"], axis=0), N("Reshape", ["x", "k"], ["y"])], [X, S]),
        "a huge list": lambda: index([N("Expand", ["x", "s"], ["y"])], [X, S]),
        "a huge rank": lambda: index([N("ConstantOfShape", ["s"], ["y"])], [S]),
        "computed": lambda: index(
            [N("Tile", ["a", "b"], ["c"]), N("Concat", ["c", "c"], ["d"], axis=0), N("Cast", ["d"], ["e"], to=7),
             N("Expand", ["x", "e"], ["y"])],
            [X], [("a", [1]), ("b", [HUGE])]),
        "behind a shape": lambda: index(
            [N("Shape", ["x"], ["h"]), N("Mul", ["h", "big"], ["b"]), N("ConstantOfShape", ["b"], ["c"]),
             N("Flatten", ["c"], ["f"]), N("Reshape", ["f", "rest"], ["r"]), N("Cast", ["r"], ["i"], to=7),
             N("Add", ["i", "i"], ["j"]), N("Expand", ["x", "j"], ["y"])],
            [("x", 1, [64])], [("big", [1 << 24]), ("rest", [-1])]),
        "EyeLike": lambda: index([UNKNOWN, N("EyeLike", ["u"], ["y"], dtype=1)], [X]),
        "RegexFullMatch": lambda: index([UNKNOWN, N("RegexFullMatch", ["u"], ["y"], pattern="a")], [X], opset=20),
        "Split": lambda: index([N("Split", ["x"], ["y", "z", "w"], num_outputs=2)], [X], opset=18),
        "Einsum": lambda: index([N("Einsum", ["x", "x"], ["y"], equation="ij...k...,")], [X]),
        "GatherND": lambda: index([N("GatherND", ["x", "i"], ["y"], batch_dims=-100)], [X, ("i", 7, [1])]),
        "a window too large": lambda: index(
            [N("AveragePool", ["x"], ["a"], kernel_shape=[9, 9]), N("Slice", ["a", "o", "o", "two"], ["y"])],
            [X], [("o", [1]), ("two", [2])]),
        "a window too large behind a Slice": lambda: index(
            [N("AveragePool", ["x"], ["a"], kernel_shape=[3, 3]), N("Slice", ["a", "zero", "one", "two"], ["b"]),
             N("Relu", ["b"], ["e"]), N("MaxPool", ["e"], ["c"], kernel_shape=[5, 5]), N("Concat", ["c", "c"], ["d"], axis=1),
             N("Slice", ["d", "zero", "one", "two"], ["y"])],
            [X], [("zero", [0]), ("one", [1]), ("two", [2])]),
        "a negative Expand": lambda: index(
            [N("Expand", ["x", "m"], ["e"]), N("Slice", ["e", "o", "o", "o"], ["y"])], [X], [("m", [-4, 1, 1, 1, 1]), ("o", [0])]),
        "a computed Expand": lambda: index(
            [N("Shape", ["x"], ["h"]), N("Sub", ["h", "m"], ["k"]), N("Expand", ["u", "k"], ["e"]),
             N("Slice", ["e", "o", "o", "o"], ["y"])],
            [X, ("u", 1, [1])], [("m", [9, 9, 9, 9]), ("o", [0])]),
        "negative": lambda: index([N("Slice", ["q", "o", "o"], ["k"]), N("Reshape", ["x", "k"], ["y"])], [X, ("q", 7, [-1])], [("o", [1])]),
    }
    try:
        CASES[sys.argv[1]]()
    except FastbnError:
        pass
    with open("/proc/self/status") as status:
        print(next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) >> 10)
"""

# What the imports take, twice.
MOST_MEGABYTES = 400


@pytest.mark.skipif(sys.platform != "linux", reason="reads the most memory that a process had")
@pytest.mark.skipif("san.so" in os.environ.get("LD_PRELOAD", ""), reason="a sanitizer needs terabytes of addresses")
@pytest.mark.parametrize("case", re.findall(r'"([\w ]+)": lambda', DEADLY))
def test_no_model_ends_the_process(case, environment):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(DEADLY), case], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout) < MOST_MEGABYTES


def test_a_negative_size_is_refused():
    proto = model("(float[1,3,4,4] x) => (float y) { y = Reshape(x, k) }", k=ints(4))
    proto.graph.initializer[0].dims[0] = -1
    with pytest.raises(storage.ModelError, match=r"Expected sizes that are not negative, got \[-1\] - at `k`"):
        Index(storage.load(proto))
