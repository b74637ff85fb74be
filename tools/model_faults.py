"""Malformed and malicious models, by seed: sound ones with faults put in, or with nodes that ask for too much."""

import contextlib
import random
from collections.abc import Callable

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from sound_models import sound

__all__ = ["hostile"]

# The name of the data file that lies beside a hostile model, and its bytes.
DATA_FILE, DATA_SIZE = "hostile.data", 4096

ODD = (0, 1, 2, 3, 7, -1, -2, -5, 99, 1 << 31, -(1 << 31), (1 << 63) - 1, -(1 << 63), 1 << 40)
TEXTS = (b"", b"SAME_UPPER", b"VALID", b"NOTSET", b"nearest", b"linear", b"edge", b"constant", b"CRD", b"\xff\xfe")


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


def _names(proto: ModelProto) -> list[str]:
    return [name for node in proto.graph.node for name in (*node.input, *node.output) if name]


def _constant(proto: ModelProto, values: object, kind: str = "int64") -> str:
    """Add an initializer and return its name."""
    name = f"k{len(proto.graph.initializer)}_"
    proto.graph.initializer.append(numpy_helper.from_array(np.array(values, kind), name))
    return name


def _spliced(choose: random.Random, proto: ModelProto, node: NodeProto) -> None:
    """Put a node before all others, and let one reader read what it gives in the place of what it has read."""
    reader = choose.choice(proto.graph.node)
    if reader.input and node.output:
        reader.input[choose.randrange(len(reader.input))] = node.output[0]
    proto.graph.node.insert(0, node)


def _bomb(choose: random.Random, proto: ModelProto) -> None:
    """Let a few bytes ask for terabytes, of constants or when the model runs."""
    big = choose.choice([1 << 16, 1 << 20, 1 << 31, 1 << 40, 1 << 62])
    sizes = _constant(proto, choose.choice([[big], [big, big], [1, 4, big, 1], [big, 1, 1, 1], [4, 1 << 14, 1 << 14, 2]]))
    small = choose.choice([_constant(proto, np.ones((4, 1, 1)), "float32"), "x", choose.choice(_names(proto))])
    zero, one, number = _constant(proto, 0), _constant(proto, 1), _constant(proto, big)
    pads = _constant(proto, choose.choice([[0, 0, 0, 0, 0, 0, big, 0], [0] * 4 + [big] * 4, [-big] * 8, [0, 0, big]]))
    scales = _constant(proto, choose.choice([[1, 1, 1e9, 1e9], [1, 1, 1e30, 1], [float("nan")] * 4, [-1.0] * 4, [1e9] * 3]), "float32")
    node = helper.make_node
    asked = [
        node("ConstantOfShape", [sizes], ["bomb"]), node("Expand", [small, sizes], ["bomb"]), node("Tile", [small, sizes], ["bomb"]),
        node("Range", [zero, number, one], ["bomb"]), node("OneHot", [zero, number, _constant(proto, [0, 1])], ["bomb"]),
        node("Pad", [small, pads], ["bomb"]), node("Resize", [small, "", scales], ["bomb"]), node("Upsample", [small, scales], ["bomb"]),
        node("Resize", [small, "", "", sizes], ["bomb"]), node("RandomNormal", [], ["bomb"], shape=[big, 4]),
        node("EyeLike", [sizes], ["bomb"], dtype=1), node("Reshape", [small, sizes], ["bomb"]),
        node("CumSum", [small, zero], ["bomb"]), node("TopK", [small, sizes], ["bomb", "places"]),
        node("NonZero", [small], ["bomb"]), node("BlackmanWindow", [number], ["bomb"]), node("HannWindow", [number], ["bomb"]),
        node("MelWeightMatrix", [number, number, number, one, one], ["bomb"]), node("Compress", [small, sizes], ["bomb"]),
        node("GatherND", [small, sizes], ["bomb"]), node("ScatterND", [small, sizes, small], ["bomb"]),
        node("Bernoulli", [small], ["bomb"]), node("AffineGrid", [small, sizes], ["bomb"]), node("Col2Im", [small, sizes, sizes], ["bomb"]),
        node("Conv", [small, choose.choice(_names(proto))], ["bomb"], pads=[big] * 4),
        node("MaxPool", [small], ["bomb"], kernel_shape=[1, 1], pads=[0, 0, big, big]),
        node("LpPool", [small], ["bomb"], kernel_shape=[big, big]),
        node("ConvTranspose", [small, "w"], ["bomb"], strides=[big, big]), node("MatMul", ["bomb0", "bomb1"], ["bomb"]),
        node("Loop", [number, ""], ["bomb"], body=GraphProto(name="empty")), node("SplitToSequence", [small, one], ["bomb"]),
    ]  # fmt: skip
    chosen = choose.choice(asked)
    if chosen.op_type == "MatMul":
        side = choose.choice([1 << 10, 1 << 16, 1 << 20])
        for number, shape in enumerate(([side, 1], [1, side])):
            proto.graph.node.insert(0, node("ConstantOfShape", [_constant(proto, shape)], [f"bomb{number}"]))
        proto.graph.node.insert(2, chosen)
        return
    _spliced(choose, proto, chosen)


# The names of ONNX's operators.
OPERATORS = sorted({schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""})


def _any_operator(choose: random.Random, proto: ModelProto) -> None:
    """Insert a node of any operator, with the attributes that it may have and inputs of any kind."""
    schema = onnx.defs.get_schema(choose.choice(OPERATORS))
    lists = [
        _constant(proto, [choose.choice(ODD) if choose.random() < 0.3 else choose.randint(-2, 5) for _ in range(choose.randrange(5))]),
        _constant(proto, choose.choice([0, 1, 2, -1, 7])),
        _constant(proto, np.zeros(choose.choice([(0,), (1, 0), (2, 2), ()])), "float32"),
    ]
    count = choose.randint(schema.min_input, min(schema.max_input, schema.min_input + 3))
    sources = ["x", *_names(proto), *lists, *lists]
    node = helper.make_node(schema.name, [choose.choice(sources) for _ in range(count)], [f"any{len(proto.graph.node)}"])
    node.name = node.output[0]
    for slot in range(1, choose.randint(schema.min_output, max(schema.min_output, min(schema.max_output, 4)))):
        node.output.append(f"{node.output[0]}_{slot}")
    for name, attribute in schema.attributes.items():
        if attribute.required or choose.random() < 0.3:
            _set(choose, node.attribute.add(name=name), int(attribute.type.value))
    place = choose.randrange(len(proto.graph.node) + 1)
    proto.graph.node.insert(place, node)
    readers = [other for other in proto.graph.node[place + 1 :] if other.input]
    if readers and node.output:
        choose.choice(readers).input[0] = node.output[0]


def _cycle(choose: random.Random, proto: ModelProto) -> None:
    nodes = proto.graph.node
    first = choose.choice(nodes)
    if first.input and first.output:
        first.input[0] = choose.choice([first, nodes[-1]]).output[0]


def _chain(choose: random.Random, proto: ModelProto) -> None:
    """Add a chain of many nodes, or one node of many inputs or outputs, or a tree of sums that doubles at each step."""
    kind, last = choose.randrange(4), choose.choice(_names(proto))
    if kind == 0:
        for number in range(choose.choice([100, 1000])):
            proto.graph.node.add(op_type=choose.choice(["Relu", "Identity", "Neg"]), input=[last], output=[f"chain{number}"])
            last = f"chain{number}"
    elif kind == 1:
        proto.graph.node.add(op_type="Concat", input=[last] * 2000, output=["wide"]).attribute.append(helper.make_attribute("axis", 0))
    elif kind == 2:
        proto.graph.node.add(op_type="Split", input=[last], output=[f"part{number}" for number in range(500)])
    else:
        for number in range(choose.choice([10, 40])):
            axis = helper.make_attribute("axis", 0)
            proto.graph.node.add(op_type="Concat", input=[last, last], output=[f"double{number}"]).attribute.append(axis)
            last = f"double{number}"
    choose.choice(proto.graph.node[:3]).input[:1] = [last] if choose.random() < 0.3 else []


def _functions(choose: random.Random, proto: ModelProto) -> None:
    """Add functions that call one another, themselves, or far too often; and a call."""
    depth = choose.choice([1, 3, 30, 200])
    for level in range(depth):
        below = choose.choice([f"F{level + 1}", f"F{level + 1}", "F0", f"F{level}"]) if choose.random() < 0.2 else f"F{level + 1}"
        last = level + 1 == depth
        calls = [helper.make_node("Relu" if last else below, [f"v{each}"], [f"v{each + 1}"], domain="" if last else "f") for each in (0, 1)]
        imports = [helper.make_opsetid("", choose.choice([17, 17, 1, 99])), helper.make_opsetid("f", 1)]
        function = helper.make_function("f", f"F{level}", ["v0"], ["v2"], calls, imports)
        if choose.random() < 0.1:
            function.attribute.append("alpha")
        proto.functions.append(function)
    if choose.random() < 0.2:
        proto.functions.append(FunctionProto(name=choose.choice(["F0", "", "Conv"]), domain=choose.choice(["f", "", "ai.onnx"])))
    if choose.random() < 0.5:
        graph, node = proto.graph, helper.make_node("BatchNormalization", ["x", "s", "t", "m", "v"], ["v1"])
        proto.functions.append(helper.make_function("f", "N", ["x", "s", "t", "m", "v"], ["v1"], [node], [helper.make_opsetid("", 17)]))
        for norm in graph.node:
            if norm.op_type == "BatchNormalization":
                norm.op_type, norm.domain = "N", "f"
    proto.opset_import.append(helper.make_opsetid("f", choose.choice([1, 1, 0, -1, 1 << 62])))
    _spliced(choose, proto, helper.make_node("F0", ["x"], ["called"], domain="f"))


def _sparse(choose: random.Random, proto: ModelProto) -> None:
    name = choose.choice([tensor.name for tensor in proto.graph.initializer] or ["w"])
    values = numpy_helper.from_array(np.ones(choose.choice([0, 1, 3]), np.float32), name)
    indices = numpy_helper.from_array(np.array(choose.choice([[0], [5, 1, 1], [-1, 1 << 62], []]), np.int64), "i")
    sparse = onnx.SparseTensorProto(values=values, indices=indices, dims=[choose.choice(ODD) for _ in range(choose.randrange(4))])
    if choose.random() < 0.5:
        proto.graph.sparse_initializer.append(sparse)
        return
    node = helper.make_node("Constant", [], ["sparse"])
    node.attribute.append(AttributeProto(name="sparse_value", type=AttributeProto.SPARSE_TENSOR, sparse_tensor=sparse))
    _spliced(choose, proto, node)


def _strings(choose: random.Random, proto: ModelProto) -> None:
    """Make strings of a tensor, or other types of an input: sequences, maps, options."""
    if choose.random() < 0.5 and proto.graph.initializer:
        tensor = choose.choice(proto.graph.initializer)
        tensor.ClearField("raw_data")
        tensor.data_type = TensorProto.STRING
        tensor.string_data.extend([b"a", b"", b"\xff"][: choose.randrange(4)])
        return
    kind = choose.choice(proto.graph.input).type
    elements = helper.make_tensor_type_proto(1, None)
    made = [helper.make_sequence_type_proto(elements), helper.make_optional_type_proto(elements), helper.make_map_type_proto(7, elements)]
    kind.CopyFrom(choose.choice(made))


def _external(choose: random.Random, proto: ModelProto) -> None:
    tensor = choose.choice(proto.graph.initializer)
    size = len(tensor.raw_data)
    tensor.data_location = TensorProto.EXTERNAL
    if choose.random() < 0.7:
        tensor.ClearField("raw_data")
    places = [
        DATA_FILE,
        DATA_FILE,
        DATA_FILE,
        "../x",
        "/etc/passwd",
        "",
        ".",
        "a\0b",
        "x" * 5000,
        "hostile.onnx",
        "/dev/zero",
        "HOSTILE.DATA",
    ]
    entries = {"location": choose.choice(places), "offset": choose.choice([0, 0, 4, *ODD]), "length": choose.choice([size, size, *ODD])}
    entries |= {"checksum": "0"} if choose.random() < 0.1 else {}
    for key, value in entries.items():
        for _ in range(1 if choose.random() < 0.9 else choose.choice([0, 2])):
            tensor.external_data.add(key=key, value=str(value))


def _name(choose: random.Random, proto: ModelProto) -> None:
    """Give something another name: empty, long, of control characters, or one that stands for something else."""
    long = choose.choice(["x" * 100_000, "\n\x1b[31m", "a\0b", "", "\u202e", "/../../x", "y", "x", "{{7*7}}<script>"])
    node = choose.choice(proto.graph.node)
    kind = choose.randrange(4)
    if kind == 0:
        node.name = long
    elif kind == 1 and node.output:
        old = node.output[0]
        for other in proto.graph.node:
            other.input[:] = [long if name == old else name for name in other.input]
        node.output[0] = long
    elif kind == 2:
        choose.choice([*proto.graph.input, *proto.graph.output]).name = long
    else:
        proto.graph.name, proto.producer_name, proto.domain = long, long, long
        proto.metadata_props.add(key=long, value=long)


def _outward(choose: random.Random, proto: ModelProto) -> None:
    """Let a body read what does not exist outside, what comes later, or what it gives itself; or hide a name of outside."""
    name = choose.choice([*_names(proto), "nowhere"])
    body = GraphProto(name="body")
    body.node.add(op_type="Identity", input=[name], output=[choose.choice(["inner", name])])
    if choose.random() < 0.3:
        body.initializer.append(numpy_helper.from_array(np.ones(4, np.float32), name))
    body.output.add(name=choose.choice([body.node[0].output[0], name]))
    flag = _constant(proto, True, "bool")
    node = helper.make_node("If", [flag], ["outward"], then_branch=body, else_branch=choose.choice([body, GraphProto(name="none")]))
    if choose.random() < 0.4:
        inner = GraphProto(name="loop")
        for each, kind in (("i", 7), ("c", 9), ("s", 1)):
            inner.input.append(helper.make_tensor_value_info(each, kind, None))
        inner.node.extend(
            [helper.make_node("Identity", ["c"], ["d"]), helper.make_node("BatchNormalization", ["s", "s", "t", "m", "v"], ["e"])]
        )
        inner.output.extend([onnx.ValueInfoProto(name="d"), onnx.ValueInfoProto(name="e")])
        count = _constant(proto, choose.choice([0, 1, 3, 1 << 40]))
        node = helper.make_node(choose.choice(["Loop", "Scan"]), [count, flag, "x"], ["outward"], body=inner)
    proto.graph.node.insert(choose.randrange(len(proto.graph.node) + 1), node)
    if choose.random() < 0.5:
        proto.graph.output.add(name="outward")


FAULTS: list[Callable[[random.Random, ModelProto], None]] = [
    *(_tensor, _tensor, _lost_tensor, _inputs, _inputs, _outputs, _operator, _attribute, _attribute, _attribute),
    *(_info, _info, _model, _nested, _bomb, _bomb, _bomb, _any_operator, _any_operator, _any_operator, _any_operator),
    *(_cycle, _chain, _functions, _functions, _sparse, _strings, _external, _external, _name, _outward, _outward),
]


def hostile(seed: int) -> ModelProto:
    """Return a sound model with up to three faults."""
    choose = random.Random(seed)
    proto = sound(choose)
    for _ in range(choose.choice([1, 1, 1, 2, 3])):
        # One fault may leave nothing for the next one.
        with contextlib.suppress(IndexError, TypeError, ValueError, DecodeError):
            choose.choice(FAULTS)(choose, proto)
    return proto
