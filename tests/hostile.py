"""Malformed models, by seed: valid ones with faults put in.

`python tests/hostile.py FIRST LAST` folds those of the seeds from FIRST to LAST and says how each ends.
"""

import random
import signal
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import AttributeProto, GraphProto, ModelProto, TensorProto
from sketch import model, norm, normal

import fastbn

MODELS = Path(__file__).resolve().parent / "models"

# How a fold may end.
EXPECTED = ("result", "error", "no model")

# A fold of a few kilobytes that takes longer than this hangs.
SECONDS = 60

ODD = (0, 1, 2, 3, 7, -1, -2, -5, 99, 1 << 31, -(1 << 31), (1 << 63) - 1, -(1 << 63), 1 << 40)
TEXTS = (b"", b"SAME_UPPER", b"VALID", b"NOTSET", b"nearest", b"linear", b"edge", b"constant", b"CRD", b"\xff\xfe")

# The operators of both tables, beside batch normalizations.
GRAPHS = (
    "c = Conv(x, w, b) n = BatchNormalization(c, s, t, m, v) y = Relu(n)",
    "c = Conv(x, w) e = Mul(c, k) f = Add(e, k) n = BatchNormalization(f, s, t, m, v) y = Identity(n)",
    "r = Relu(x) n = BatchNormalization(r, s3, t3, m3, v3) p = Pad(n, pads) y = Conv(p, w, b)",
    "c = ConvTranspose(x, u, b) n = BatchNormalization(c, s, t, m, v) q = AveragePool <kernel_shape = [2,2]> (n) y = Flatten(q)",
    "c = Conv(x, w, b) g = GlobalAveragePool(c) f = Flatten(g) n = BatchNormalization(f, s, t, m, v) y = Gemm(n, d)",
    "c = Conv(x, w, b) i, j = Split <axis = 1> (c, two2) l = Concat <axis = 1> (i, j) n = BatchNormalization(l, s, t, m, v) "
    "y = MaxPool <kernel_shape = [2,2]> (n)",
    "c = Conv(x, w, b) h = Shape(c) g = Gather(h, zero) o = Unsqueeze(g, zero1) p = Concat <axis = 0> (o, rest) f = Reshape(c, p) "
    "e = Reshape(f, back) n = BatchNormalization(e, s, t, m, v) y = Transpose <perm = [0,2,3,1]> (n)",
    'c = Conv(x, w, b) z = Resize <mode = "nearest"> (c, none, scales) l = Slice(z, zero1, four1, zero1) '
    "n = BatchNormalization(l, s, t, m, v) y = Sigmoid(n)",
    "c = Conv(x, w, b) a = Gather <axis = 1> (c, order) n = BatchNormalization(a, s, t, m, v) y = ReduceMean <axes = [2,3]> (n)",
    "c = Conv(x, w, b) o = ConstantOfShape(four1) e = Expand(o, four1) n = BatchNormalization(c, s, e, m, v) l = PRelu(n, k) "
    "y = DepthToSpace <blocksize = 2> (l)",
    "q = DequantizeLinear <axis = 0> (qw, s) c = Conv(x, q, b) n = BatchNormalization(c, s, t, m, v) y = Clip(n)",
    "c = Conv(x, w, b) i = InstanceNormalization(c, s, t) n = BatchNormalization(i, s, t, m, v) l = Dropout(n) y = Sub(l, c)",
    "y = If (flag) < then_branch = yes () => (a) { c = Conv(x, w, b) a = BatchNormalization(c, s, t, m, v) }, "
    "else_branch = no () => (e) { e = Conv(x, w) } >",
    "a = Transpose <perm = [0,2,3,1]> (x) p = MatMul(a, d3) e = Add(p, b) f = Transpose <perm = [0,3,1,2]> (e) "
    "n = BatchNormalization(f, s, t, m, v) h = Neg(n) y = Squeeze(h)",
    "i = Neg(k) j = Sqrt(i) l = Tile(j, ones3) o = Concat <axis = 1> (l, l) c = Conv(x, w) e = Mul(c, k) "
    "n = BatchNormalization(e, s, t, m, v) y = Div(n, o)",
)


def constants() -> dict:
    """Return name -> array of everything that the graphs read."""
    lists = {"pads": [0, 0, 1, 1, 0, 0, 1, 1], "zero1": [0], "rest": [-1], "back": [0, 4, 6, 6], "four1": [4], "two2": [2, 2]}
    lists |= {"order": [3, 1, 0, 2], "ones3": [1, 1, 1]}
    found = {name: np.array(values, np.int64) for name, values in lists.items()}
    found |= {"zero": np.int64(0), "scales": np.ones(4, np.float32), "none": np.zeros(0, np.float32)}
    found |= {"w": normal(4, 3, 3, 3), "u": normal(3, 4, 3, 3), "qw": np.int8(50 * normal(4, 3, 3, 3)), "b": normal(4)}
    found |= {"k": np.abs(normal(4, 1, 1)), "d": normal(4, 5), "d3": normal(3, 4)}
    return found | norm(4) | norm(3, "3")


def sound(choose: random.Random) -> ModelProto:
    """Return a model that folds."""
    text = choose.choice(GRAPHS)
    used = {name: values for name, values in constants().items() if any(f"{a}{name}{b}" in text for a in " (" for b in ",)")}
    batch = choose.choice(["N", "1", "2"])
    flag = ", bool flag" if "flag" in text else ""
    return model(f"(float[{batch},3,8,8] x{flag}) => (float y) {{ {text} }}", opset=choose.choice([9, 11, 13, 17, 17, 18, 21]), **used)


def hostile(seed: int) -> bytes | ModelProto:
    """Return a sound model with one to three faults, as an object or as bytes; every eighth one has wrong bytes."""
    choose = random.Random(seed)
    if seed % 8 == 0:
        path = choose.choice([*sorted(MODELS.glob("*.onnx")), None, None])
        return _flipped(choose, sound(choose).SerializeToString() if path is None else path.read_bytes())
    proto = sound(choose)
    for _ in range(choose.randint(1, 3)):
        choose.choice(FAULTS)(choose, proto)
    return proto


def _flipped(choose: random.Random, data: bytes) -> bytes:
    wrong = bytearray(data)
    for _ in range(choose.randint(1, 8)):
        wrong[choose.randrange(len(wrong))] = choose.randrange(256)
    if choose.random() < 0.2:
        del wrong[choose.randrange(len(wrong)) :]
    return bytes(wrong)


def _tensor(choose: random.Random, proto: ModelProto) -> None:
    tensor = choose.choice(proto.graph.initializer)
    fault = choose.randrange(7)
    if fault == 0 and tensor.dims:
        tensor.dims[choose.randrange(len(tensor.dims))] = choose.choice(ODD)
    elif fault == 1:
        tensor.dims[:] = choose.sample(list(tensor.dims), choose.randrange(len(tensor.dims) + 1))
    elif fault == 2:
        tensor.dims.append(choose.choice([1, 1, 0, 5, 1 << 40]))
    elif fault == 3:
        tensor.raw_data = tensor.raw_data[: choose.randrange(len(tensor.raw_data) + 1)]
    elif fault == 4:
        tensor.data_type = choose.choice([0, 1, 2, 7, 8, 9, 10, 11, 16, 22, 77])
    elif fault == 5:
        tensor.data_location = TensorProto.EXTERNAL
    else:
        tensor.dims[:] = choose.choice([[], [1], [0], [4], [4, 1], [1, 4], [1 << 33, 4]])


def _lost_tensor(choose: random.Random, proto: ModelProto) -> None:
    at = choose.randrange(len(proto.graph.initializer))
    tensor = proto.graph.initializer[at]
    if choose.random() < 0.5:
        proto.graph.initializer.add().CopyFrom(tensor)
        return
    if choose.random() < 0.7:
        dims = choose.choice([list(tensor.dims), None, [choose.choice(ODD)]])
        proto.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, choose.choice([1, 7, 10]), dims))
    if choose.random() < 0.7 and len(proto.graph.initializer) > 1:
        del proto.graph.initializer[at]


def _graph(choose: random.Random, proto: ModelProto) -> GraphProto:
    inner = [attribute.g for node in proto.graph.node for attribute in node.attribute if attribute.type == AttributeProto.GRAPH]
    return choose.choice([proto.graph, *inner])


def _inputs(choose: random.Random, proto: ModelProto) -> None:
    node = choose.choice(_graph(choose, proto).node)
    names = [name for other in proto.graph.node for name in (*other.input, *other.output)]
    fault = choose.randrange(5)
    if fault == 0 and node.input:
        del node.input[choose.randrange(len(node.input))]
    elif fault == 1 and node.input:
        node.input[choose.randrange(len(node.input))] = ""
    elif fault == 2 and node.input:
        node.input[choose.randrange(len(node.input))] = choose.choice(names)
    elif fault == 3:
        node.input.append(choose.choice([*names, ""]))
    else:
        del node.input[:]


def _outputs(choose: random.Random, proto: ModelProto) -> None:
    node = choose.choice(_graph(choose, proto).node)
    fault = choose.randrange(4)
    if fault == 0:
        del node.output[:]
    elif fault == 1:
        node.output[0] = ""
    elif fault == 2:
        node.output.append("more")
    else:
        node.output[0] = choose.choice(proto.graph.node).output[0]


def _operator(choose: random.Random, proto: ModelProto) -> None:
    node = choose.choice(_graph(choose, proto).node)
    if choose.random() < 0.2:
        node.domain = choose.choice(["ai.onnx", "ai.onnx.ml", "other"])
    else:
        node.op_type = choose.choice([*(other.op_type for other in proto.graph.node), *OTHERS])


# Operators that a node may turn into, its inputs and attributes as they were.
# fmt: off
OTHERS = (
    "Add", "BatchNormalization", "Concat", "Constant", "ConstantOfShape", "Conv", "ConvTranspose", "DepthToSpace", "DequantizeLinear",
    "Einsum", "Expand", "EyeLike", "Flatten", "GRU", "Gather", "GatherND", "Gemm", "GroupNormalization", "If", "Identity",
    "InstanceNormalization", "LSTM", "LayerNormalization", "Loop", "MatMul", "Mod", "Mul", "OneHot", "PRelu", "Pad", "Range",
    "ReduceMean", "Reshape", "Resize", "Scan", "Shape", "Slice", "Split", "Squeeze", "Tile", "TopK", "Transpose", "Unsqueeze", "Upsample",
    "Where", "",
)
NAMES = (
    "alpha", "auto_pad", "axes", "axis", "blocksize", "dilations", "end", "epsilon", "group", "kernel_shape", "keepdims", "mode", "pads",
    "perm", "scales", "split", "start", "strides", "to", "training_mode", "transA", "transB", "value", "value_ints",
)
# fmt: on


def _attribute(choose: random.Random, proto: ModelProto) -> None:
    node = choose.choice(_graph(choose, proto).node)
    is_old = node.attribute and choose.random() < 0.6
    attribute = choose.choice(node.attribute) if is_old else node.attribute.add(name=choose.choice(NAMES))
    fault = choose.random()
    if fault < 0.1:
        attribute.ref_attr_name = "elsewhere"
    elif fault < 0.2:
        node.attribute.add().CopyFrom(attribute)
    else:
        right = onnx.defs.get_schema(node.op_type).attributes if onnx.defs.has(node.op_type) else {}
        known = attribute.name in right and choose.random() < 0.7
        _set(choose, attribute, int(right[attribute.name].type.value) if known else choose.randrange(12))


def _set(choose: random.Random, attribute: AttributeProto, kind: int) -> None:
    name = attribute.name
    attribute.Clear()
    attribute.name, attribute.type = name, kind
    attribute.i = choose.choice(ODD)
    attribute.f = choose.choice([0.0, -1.0, 1e30, float("nan"), float("inf")])
    attribute.s = choose.choice(TEXTS)
    attribute.ints.extend(choose.choice(ODD) if choose.random() < 0.5 else choose.randint(-2, 4) for _ in range(choose.randrange(6)))
    attribute.floats.extend([1.0] * choose.randrange(5))
    attribute.strings.extend([b"a"] * choose.randrange(3))
    attribute.t.CopyFrom(TensorProto(dims=[choose.choice(ODD)], data_type=choose.choice([0, 1, 7])))


def _info(choose: random.Random, proto: ModelProto) -> None:
    graph = _graph(choose, proto)
    infos = [*proto.graph.input, *proto.graph.output, *graph.output]
    if choose.random() < 0.3:
        node = choose.choice(graph.node)
        graph.value_info.add(name=node.output[0] if node.output else "nothing")
        infos = [graph.value_info[-1]]
    info = choose.choice(infos)
    fault = choose.randrange(5)
    shape = info.type.tensor_type.shape
    if fault == 0 and shape.dim:
        choose.choice(shape.dim).dim_value = choose.choice(ODD)
    elif fault == 1:
        del shape.dim[choose.randrange(len(shape.dim) + 1) :]
    elif fault == 2:
        for _ in range(choose.randint(1, 5)):
            shape.dim.add(dim_value=choose.choice([1, 3, 1 << 20, 1 << 31, 1 << 62]))
    elif fault == 3:
        info.type.tensor_type.elem_type = choose.choice([0, 1, 2, 7, 8, 10, 11, 16, 99])
    else:
        info.ClearField("type")


def _model(choose: random.Random, proto: ModelProto) -> None:
    fault = choose.randrange(6)
    if fault == 0:
        proto.opset_import[0].version = choose.choice([*ODD, 1, 6, 7, 10, 13, 23, 30])
    elif fault == 1:
        del proto.opset_import[:]
    elif fault == 2:
        proto.ir_version = choose.choice([0, 1, 2, 3, 4, 99, -1, (1 << 63) - 1])
    elif fault == 3:
        del proto.graph.output[:]
    elif fault == 4:
        proto.graph.node.add().CopyFrom(choose.choice(proto.graph.node))
    else:
        del proto.graph.node[choose.randrange(len(proto.graph.node))]


def _nested(choose: random.Random, proto: ModelProto) -> None:
    """Put the graph into a branch, and that into a branch, and so on."""
    graph = GraphProto()
    graph.CopyFrom(proto.graph)
    infos = list(graph.input)
    del graph.input[:]
    for depth in range(choose.choice([1, 2, 5, 20, 28])):
        outer = GraphProto(name=f"depth{depth}")
        node = outer.node.add(op_type="If", input=["flag"], output=[f"if{depth}"])
        node.attribute.append(AttributeProto(name="then_branch", type=AttributeProto.GRAPH, g=graph))
        node.attribute.append(AttributeProto(name="else_branch", type=AttributeProto.GRAPH, g=GraphProto(name="empty")))
        outer.output.add(name=f"if{depth}")
        graph = outer
    graph.input.extend([*infos, onnx.helper.make_tensor_value_info("flag", TensorProto.BOOL, [])][: len(infos) + 1])
    proto.graph.CopyFrom(graph)


FAULTS: list[Callable[[random.Random, ModelProto], None]] = [
    *(_tensor, _tensor, _lost_tensor, _inputs, _inputs, _outputs, _operator, _attribute, _attribute, _attribute),
    *(_info, _info, _model, _nested),
]


def outcome(seed: int) -> str:
    """Return how the fold of a hostile model ends: "result", "error", "no model", or a sentence about any other end."""
    try:
        proto = hostile(seed)
    except (DecodeError, IndexError, TypeError, ValueError):  # one fault left nothing for the next one
        return "no model"
    try:
        fastbn.fold(proto, verify=False)
    except fastbn.FastbnError as error:
        return f"more than one line: {error}" if "\n" in str(error) else "error"
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in last if "fastbn" in frame.filename][-1]
        return f"{type(error).__name__}: {error} ({Path(own.filename).name}:{own.lineno})"
    return "result"


def main(first: int, last: int) -> int:
    """Fold the models of these seeds, print how each ended; return how many ended in neither a result nor an error."""
    warnings.simplefilter("error")
    ends = Counter()
    for seed in range(first, last):
        print(f"{seed} ", end="", flush=True)  # the seed that ends the process is the last one
        if hasattr(signal, "alarm"):
            signal.alarm(SECONDS)
        end = outcome(seed)
        ends[end if end in EXPECTED else "wrong"] += 1
        print(end)
    print(dict(ends))
    return ends["wrong"]


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])) > 0)
