"""A case for each operator that has a rule for the size of its result: arrays, attributes, and what NumPy makes of them."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from fastbn.graph.model import storage
from fastbn.graph.model.index import Index

LATEST = 23
DTYPES = {"f": np.float32, "d": np.float64, "h": np.float16, "i": np.int64, "j": np.int32, "b": np.bool_}


def single(op, arrays, opset, attributes, constant, outputs=1):
    """Return the model of one node whose inputs are initializers, or graph inputs; None stands for an absent one."""
    names = ["" if array is None else f"i{slot}" for slot, array in enumerate(arrays)]
    given = {name: array for name, array in zip(names, arrays, strict=True) if name}
    node = helper.make_node(op, names, [f"o{slot}" for slot in range(outputs)], **attributes)
    tensors = [numpy_helper.from_array(np.asarray(array), name) for name, array in given.items()]
    inputs = [helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims) for tensor in tensors]
    infos = [onnx.ValueInfoProto(name=name) for name in node.output]
    graph = helper.make_graph([node], "g", [] if constant else inputs, infos, tensors if constant else [])
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", opset)])


def evaluated(op, arrays, opset=17, outputs=1, **attributes):
    """Return the constants that fastbn says the outputs of a node are, None for none."""
    index = Index(storage.load(single(op, arrays, opset, attributes, True, outputs)))
    found = [index.constant(index.main.find(f"o{slot}")) for slot in range(outputs)]
    return [None if constant is None else constant.array() for constant in found]


def ints(*values):
    return np.array(values, np.int64)


def some(choose, *shape, kind="f"):
    """Return random values, none of which is 0."""
    rng = np.random.default_rng(choose.randrange(1 << 30))
    values = rng.uniform(0.5, 3, shape) * rng.choice([-1, 1], shape)
    values = np.round(values * 2) if kind in "ij" else values > 0 if kind == "b" else values
    return np.asarray(values).astype(DTYPES[kind])


def a_shape(choose, least=1, most=4):
    return tuple(choose.choice([1, 1, 2, 3, 4]) for _ in range(choose.randint(least, most)))


def listed(name, values, opset, first):
    """Return (inputs, attributes) of a list that is an input from an opset on and an attribute before."""
    return ([ints(*values)], {}) if opset >= first else ([], {name: list(values)})


# Each case: choose, opset -> (arrays, attributes, the list of outputs as NumPy computes them).


def squeeze(choose, opset):
    shape = [choose.choice([1, 3]) for _ in range(choose.randint(2, 5))]
    ones = [at for at, size in enumerate(shape) if size == 1]
    axes = choose.sample(ones, choose.randint(1, len(ones))) if ones else []
    x = some(choose, *shape)
    expected = x.reshape([size for at, size in enumerate(shape) if at not in (axes or ones)])
    # Negative axes are part of the operator from opset 11 on.
    axes = [at - len(shape) if opset >= 11 and choose.random() < 0.5 else at for at in axes]
    more, attributes = listed("axes", axes, opset, 13) if axes else ([], {})
    return [x, *more], attributes, [expected]


def unsqueeze(choose, opset):
    shape = a_shape(choose, 0, 3)
    count = choose.randint(1, 3)
    rank = len(shape) + count
    axes = choose.sample(range(rank), count)
    rest = iter(shape)
    x = some(choose, *shape)
    expected = x.reshape([1 if at in axes else next(rest) for at in range(rank)])
    axes = [at - rank if opset >= 11 and choose.random() < 0.5 else at for at in axes]
    more, attributes = listed("axes", axes, opset, 13)
    return [x, *more], attributes, [expected]


def transpose(choose, opset):
    x = some(choose, *a_shape(choose))
    perm = choose.sample(range(x.ndim), x.ndim)
    return ([x], {"perm": perm}, [np.transpose(x, perm)]) if choose.random() < 0.8 else ([x], {}, [np.transpose(x)])


def concat(choose, opset):
    shape = a_shape(choose)
    axis = choose.randrange(len(shape))
    parts = [some(choose, *shape[:axis], choose.randint(1, 3), *shape[axis + 1 :]) for _ in range(choose.randint(1, 3))]
    return parts, {"axis": axis - len(shape) * (opset >= 11 and choose.random() < 0.5)}, [np.concatenate(parts, axis)]


def flatten(choose, opset):
    x = some(choose, *a_shape(choose))
    axis = choose.randint(0, x.ndim)
    expected = x.reshape(int(np.prod(x.shape[:axis])), -1)
    return [x], {"axis": axis - x.ndim if opset >= 11 and axis < x.ndim and choose.random() < 0.5 else axis}, [expected]


def reshape(choose, opset):
    x = some(choose, *choose.choice([(2, 3, 4), (4, 6), (24,), (1, 2, 12)]))
    sizes = choose.choice([[24], [-1], [0, -1], [4, 6], [2, -1, 2], [-1, 1, 3], [0, 2, -1]])
    wanted = [x.shape[at] if size == 0 and at < x.ndim else size for at, size in enumerate(sizes)]
    if 0 in wanted or 24 % abs(int(np.prod(wanted))):
        return reshape(choose, opset)
    return [x, ints(*sizes)], {}, [x.reshape(wanted)]


def expand(choose, opset):
    x = some(choose, *a_shape(choose, 0, 3))
    sizes = [choose.choice([1, size] if size > 1 else [1, 2, 3]) for size in (*[1] * choose.randint(0, 2), *x.shape)]
    return [x, ints(*sizes)], {}, [x * np.ones(sizes, np.float32)]


def tile(choose, opset):
    x = some(choose, *a_shape(choose))
    repeats = [choose.randint(0, 3) for _ in x.shape]
    return [x, ints(*repeats)], {}, [np.tile(x, repeats)]


def gather(choose, opset):
    x = some(choose, *a_shape(choose))
    axis = choose.randrange(x.ndim)
    size = x.shape[axis]
    low = -size if opset >= 11 else 0
    indices = np.array([choose.randrange(low, size) for _ in range(6)]).reshape(choose.choice([(6,), (2, 3), (1, 6)]))
    indices = indices.reshape(-1)[0] if choose.random() < 0.3 else indices
    return [x, np.asarray(indices, np.int64)], {"axis": axis - x.ndim * (choose.random() < 0.5)}, [np.take(x, indices, axis)]


def slices(choose, opset):
    x = some(choose, *[choose.randint(2, 5) for _ in range(choose.randint(1, 4))])
    axes = choose.sample(range(x.ndim), choose.randint(1, x.ndim))
    # A negative bound counts from the end, as in Python; a backward slice that includes the first element ends far below 0.
    runs = [choose.choice([(0, 2, 1), (1, 1 << 40, 1), (-2, -1, 1), (-1, -(1 << 40), -1), (3, 0, -2), (0, 1 << 40, 2)]) for _ in axes]
    if opset < 10:
        runs = [choose.choice([(0, 2, 1), (1, 1 << 40, 1), (-2, -1, 1)]) for _ in axes]
    at = [slice(None)] * x.ndim
    for axis, (start, stop, step) in zip(axes, runs, strict=True):
        at[axis] = slice(start, None if stop < -x.ndim and step < 0 else stop, step)
    starts, ends, steps = (list(part) for part in zip(*runs, strict=True))
    if opset < 10:
        return [x], {"axes": axes, "starts": starts, "ends": ends}, [x[tuple(at)]]
    written = [axis - x.ndim * (choose.random() < 0.5) for axis in axes] if opset >= 11 else axes
    return [x, ints(*starts), ints(*ends), ints(*written), ints(*steps)], {}, [x[tuple(at)]]


def constant_of_shape(choose, opset):
    sizes = [choose.randint(0, 3) for _ in range(choose.randint(1, 4))]
    value = choose.choice([np.float32(2.5), np.int64(7), np.array(True)])
    tensor = numpy_helper.from_array(np.asarray(value).reshape(1))
    return [ints(*sizes)], {"value": tensor}, [np.full(sizes, value, np.asarray(value).dtype)]


def cast(choose, opset):
    kind, to = choose.choice("fhijb"), choose.choice("fdhijb")
    x = some(choose, *a_shape(choose), kind=kind)
    return [x], {"to": helper.np_dtype_to_tensor_dtype(np.dtype(DTYPES[to]))}, [x.astype(DTYPES[to])]


def cast_like(choose, opset):
    x, like = some(choose, *a_shape(choose), kind=choose.choice("fi")), some(choose, 1, kind=choose.choice("fdij"))
    return [x, like], {}, [x.astype(like.dtype)]


def split(choose, opset):
    x = some(choose, *[choose.choice([2, 4]) for _ in range(choose.randint(1, 3))])
    axis = choose.randrange(x.ndim)
    sizes = [1, x.shape[axis] - 1]
    more, attributes = listed("split", sizes, opset, 13)
    attributes["axis"] = axis - x.ndim * (opset >= 11 and choose.random() < 0.5)
    return [x, *more], attributes, np.split(x, [1], axis)


def steps(choose, opset):
    start, stop, step = choose.choice([(0, 7, 2), (5, -3, -2), (2, 2, 1), (0.5, 3.0, 0.75)])
    dtype = np.int64 if isinstance(step, int) else np.float32
    return [np.asarray(value, dtype) for value in (start, stop, step)], {}, [np.arange(start, stop, step).astype(dtype)]


def clip(choose, opset):
    x = some(choose, *a_shape(choose))
    if opset < 11:
        return [x], {"min": -1.0, "max": 1.5}, [np.clip(x, np.float32(-1), np.float32(1.5))]
    return [x, np.float32(-1), np.float32(1.5)], {}, [np.clip(x, np.float32(-1), np.float32(1.5))]


def where(choose, opset):
    shape = a_shape(choose)
    condition, a, b = some(choose, *shape, kind="b"), some(choose, *shape[1:]), some(choose, *shape)
    return [condition, a, b], {}, [np.where(condition, a, b)]


def dropout(choose, opset):
    x = some(choose, *a_shape(choose))
    more = [np.float32(0.5), np.array(False)] if opset >= 12 and choose.random() < 0.5 else []
    return [x, *more], {}, [x]


def eye_like(choose, opset):
    shape = choose.choice([1, 2, 4]), choose.choice([1, 3])
    return [some(choose, *shape, kind=choose.choice("fi"))], {"dtype": TensorProto.FLOAT, "k": 1}, [np.eye(*shape, 1, dtype=np.float32)]


def compress(choose, opset):
    x = some(choose, 3, 4)
    chosen = np.array([True, False, True])
    return [x, chosen], {"axis": 0}, [np.compress(chosen, x, 0)]


def non_zero(choose, opset):
    x = some(choose, *a_shape(choose, 1), kind="b")
    return [x], {}, [np.stack(np.nonzero(x))]


def unary(function, positive=False, kind="f"):
    def case(choose, opset):
        x = some(choose, *a_shape(choose, 0), kind=kind)
        x = np.abs(x) if positive else x
        return [x], {}, [np.asarray(function(x)).astype(x.dtype)]

    return case


def bounded(function):
    def case(choose, opset):
        x = some(choose, *a_shape(choose, 0)) / np.float32(4)
        return [x], {}, [np.asarray(function(x)).astype(x.dtype)]

    return case


def binary(function, kinds="fi", positive=False):
    def case(choose, opset):
        kind, shape = choose.choice(kinds), a_shape(choose)
        a = some(choose, *shape, kind=kind)
        b = some(choose, *[choose.choice([1, size]) for size in shape[choose.randrange(len(shape)) :]], kind=kind)
        a = np.abs(a) if positive else a
        result = np.asarray(function(a, b))
        return [a, b], {}, [result if result.dtype == bool else result.astype(a.dtype)]

    return case


def many(function):
    def case(choose, opset):
        shape = a_shape(choose)
        arrays = [some(choose, *shape[choose.randrange(len(shape)) :]) for _ in range(choose.randint(1, 3))]
        return arrays, {}, [function(arrays).astype(np.float32)]

    return case


def reduced(function, first=18):
    def case(choose, opset):
        x = some(choose, *a_shape(choose))
        axes = choose.sample(range(x.ndim), choose.randint(1, x.ndim))
        keep = choose.random() < 0.5
        expected = np.asarray(function(x, tuple(axes), keep)).astype(x.dtype)
        written = [axis - x.ndim * (opset >= 11 and choose.random() < 0.5) for axis in axes]
        more, attributes = listed("axes", written, opset, first)
        return [x, *more], {**attributes, "keepdims": int(keep)}, [expected]

    return case


def softplus(x):
    return np.log1p(np.exp(x.astype(np.float64)))


def erf(x):
    """The series of the error function, for |x| < 1."""
    x = x.astype(np.float64)
    total, power = np.zeros_like(x), x.copy()
    for n in range(30):
        total += power / (2 * n + 1)
        power *= -x * x / (n + 1)
    return 2 / np.sqrt(np.pi) * total


# Operator -> (first opset, case).
CASES = {
    "Abs": (7, unary(np.abs)),
    "Acos": (7, bounded(np.arccos)),
    "Add": (7, binary(np.add)),
    "And": (7, binary(np.logical_and, "b")),
    "Asin": (7, bounded(np.arcsin)),
    "Atan": (7, unary(np.arctan)),
    "Cast": (9, cast),
    "CastLike": (15, cast_like),
    "Ceil": (7, unary(np.ceil)),
    "Clip": (7, clip),
    "Compress": (9, compress),
    "Concat": (7, concat),
    "ConstantOfShape": (9, constant_of_shape),
    "Cos": (7, unary(np.cos)),
    "Div": (7, binary(lambda a, b: a / b, "fd")),
    "Dropout": (7, dropout),
    "Equal": (11, binary(np.equal)),
    "Erf": (9, bounded(erf)),
    "Exp": (7, unary(np.exp)),
    "Expand": (8, expand),
    "EyeLike": (9, eye_like),
    "Flatten": (7, flatten),
    "Floor": (7, unary(np.floor)),
    "Gather": (7, gather),
    "Greater": (9, binary(np.greater)),
    "GreaterOrEqual": (12, binary(np.greater_equal)),
    "Less": (9, binary(np.less)),
    "LessOrEqual": (12, binary(np.less_equal)),
    "Log": (7, unary(np.log, positive=True)),
    "Max": (8, many(lambda arrays: np.max(np.broadcast_arrays(*arrays), 0))),
    "Mean": (8, many(lambda arrays: np.mean(np.broadcast_arrays(*arrays), 0))),
    "Min": (8, many(lambda arrays: np.min(np.broadcast_arrays(*arrays), 0))),
    "Mod": (10, binary(np.mod, "i")),
    "Mul": (7, binary(np.multiply)),
    "Neg": (7, unary(np.negative)),
    "NonZero": (9, non_zero),
    "Not": (7, unary(np.logical_not, kind="b")),
    "Or": (7, binary(np.logical_or, "b")),
    "Pow": (7, binary(np.power, "f", positive=True)),
    "Range": (11, steps),
    "Reciprocal": (7, unary(lambda x: 1 / x)),
    "ReduceL1": (7, reduced(lambda x, axes, keep: np.abs(x).sum(axes, keepdims=keep))),
    "ReduceL2": (7, reduced(lambda x, axes, keep: np.sqrt((x * x).sum(axes, keepdims=keep)))),
    "ReduceMax": (7, reduced(lambda x, axes, keep: x.max(axes, keepdims=keep))),
    "ReduceMean": (7, reduced(lambda x, axes, keep: x.mean(axes, keepdims=keep))),
    "ReduceMin": (7, reduced(lambda x, axes, keep: x.min(axes, keepdims=keep))),
    "ReduceProd": (7, reduced(lambda x, axes, keep: x.prod(axes, keepdims=keep))),
    "ReduceSum": (7, reduced(lambda x, axes, keep: x.sum(axes, keepdims=keep), 13)),
    "ReduceSumSquare": (7, reduced(lambda x, axes, keep: (x * x).sum(axes, keepdims=keep))),
    "Relu": (7, unary(lambda x: np.maximum(x, 0))),
    "Reshape": (7, reshape),
    "Round": (11, unary(np.round)),
    "Sigmoid": (7, unary(lambda x: 1 / (1 + np.exp(-x)))),
    "Sign": (9, unary(np.sign)),
    "Sin": (7, unary(np.sin)),
    "Slice": (7, slices),
    "Softplus": (7, unary(softplus)),
    "Split": (7, split),
    "Sqrt": (7, unary(np.sqrt, positive=True)),
    "Squeeze": (7, squeeze),
    "Sub": (7, binary(np.subtract)),
    "Sum": (8, many(lambda arrays: np.sum(np.broadcast_arrays(*arrays), 0))),
    "Tan": (7, bounded(np.tan)),
    "Tanh": (7, unary(np.tanh)),
    "Tile": (7, tile),
    "Transpose": (7, transpose),
    "Unsqueeze": (7, unsqueeze),
    "Where": (9, where),
    "Xor": (7, binary(np.logical_xor, "b")),
}


def opsets(op):
    """Return the opsets in which an operator changed, and the latest one."""
    first = CASES[op][0]
    versions = {schema.since_version for schema in onnx.defs.get_all_schemas_with_history() if schema.name == op and schema.domain == ""}
    return sorted({first, *(version for version in versions if first < version <= LATEST), LATEST})
