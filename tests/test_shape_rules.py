"""What rows say of sizes: those of a result, how many elements a constant expression gives, lists of sizes; the oracle is onnxruntime."""

import math

import numpy as np
import pytest
from sketch import model, run

from fastbn.graph.model import storage
from fastbn.graph.model.index import Index
from fastbn.graph.ops.registry import OPERATORS, operator_row
from fastbn.graph.ops.shape_rules import Dim, list_of_sizes

LETTERS = "abc"
KINDS = {"float32": "float", "int64": "int64", "int32": "int32"}


def sketched(node, arrays, **options):
    """Return the model of one node named y that reads the inputs a, b, c."""
    inputs = ", ".join(f"{KINDS[array.dtype.name]}[{','.join(map(str, array.shape))}] {name}" for name, array in arrays.items())
    return model(f"({inputs}) => (y) {{ y = {node} }}", **options)


def node_of(proto):
    return next(node for node in Index(storage.load(proto)).order if node.label == "y")


def zeros(*shapes):
    return {name: np.zeros(shape, np.float32) for name, shape in zip(LETTERS, shapes, strict=False)}


ROW = (2, 3, 4, 6)
SAME = ["Relu(a)", "Sigmoid(a)", "Elu(a)", "Softmax(a)", "Identity(a)", "Dropout(a)", "Cast <to = 11> (a)", "Neg(a)", "Sqrt(a)", "Erf(a)"]
SAME += ["LRN <size = 1> (a)", "Clip(a)", "LeakyRelu(a)", "PRelu(a, b)", "HardSwish(a)"]
BATCH = {
    "AveragePool <kernel_shape = [2,2]> (a)": [ROW],
    "MaxPool <kernel_shape = [2,2]> (a)": [ROW],
    "GlobalAveragePool(a)": [ROW],
    "GlobalMaxPool(a)": [ROW],
    "DepthToSpace <blocksize = 2> (a)": [(2, 4, 4, 6)],
    "SpaceToDepth <blocksize = 2> (a)": [ROW],
}
# (node, shapes of its inputs, sizes that the row tells of its output).
RULES = [
    *((node, [ROW, (1,)][: 1 + ("b" in node)], ROW) for node in SAME),
    *((node, shapes, (2, None, None, None)) for node, shapes in BATCH.items()),
    ("Conv(a, b)", [ROW, (5, 3, 2, 2)], (2, 5, None, None)),
    ("Conv <pads = [1,1,1,1]> (a, b)", [ROW, (5, 3, 3, 3)], (2, 5, 4, 6)),
    ("ConvTranspose(a, b)", [ROW, (3, 5, 2, 2)], (2, 5, None, None)),
    ("Add(a, b)", [(4, 1, 3), (2, 1)], (4, 2, 3)),
    ("Div(b, a)", [(4, 1, 3), (2, 1)], (4, 2, 3)),
    ("Max(a, b, c)", [(1,), (1, 1), (1,)], (1, 1)),
    ("Sum(a, b)", [(5, 3), (1,)], (5, 3)),
    ("Transpose <perm = [1,2,0]> (a)", [(2, 3, 4)], (3, 4, 2)),
    ("Transpose(a)", [(2, 3, 4)], (4, 3, 2)),
    ("Concat <axis = 1> (a, b)", [(2, 3, 4), (2, 5, 4)], (2, None, 4)),
    ("Concat <axis = -1> (a, b)", [(2, 3, 4), (2, 3, 5)], (2, 3, None)),
    ("Gemm(a, b)", [(9, 5), (5, 7)], (9, None)),
    ("Gemm <transA = 1> (a, b)", [(5, 9), (5, 7)], (None, None)),
    ("MatMul(a, b)", [(2, 9, 5), (5, 7)], (2, 9, None)),
    ("MatMul(a, b)", [(2, 9, 5), (2, 5, 7)], None),
    ("MatMul(a, b)", [(9, 5), (5,)], None),
]


@pytest.mark.parametrize(("node", "shapes", "expected"), RULES)
def test_sizes_of_a_result(node, shapes, expected):
    proto = sketched(node, zeros(*shapes))
    read = node_of(proto)
    by_name = dict(zip(LETTERS, shapes, strict=False))
    found = operator_row(read).sizes(read, [by_name[value.name] for value in read.inputs])
    assert found == expected
    if found is not None:
        (actual,) = run(proto, zeros(*shapes))
        assert len(actual.shape) == len(found)
        assert all(size in (None, real) for size, real in zip(found, actual.shape, strict=True))


def test_sizes_that_only_a_run_tells_are_kept_where_they_are_the_same():
    proto = sketched("Add(a, b)", zeros((2, 3), (2, 3)))
    node = node_of(proto)
    some, other = (Dim(value, 0) for value in node.inputs)
    rule = operator_row(node).sizes
    assert rule(node, [(some, 3), (some, 1)]) == (some, 3)
    assert rule(node, [(some, 3), (other, 3)]) == (None, 3)
    assert rule(node, [(None, 3), (1,)]) == (None, 3)


@pytest.mark.parametrize(
    "node", ["Relu(a)", "Conv(a, b)", "Add(a, b)", "Transpose(a)", "Concat <axis = 0> (a, b)", "Gemm(a, b)", "MatMul(a, b)"]
)
def test_nothing_is_told_of_what_is_not_known(node):
    read = node_of(sketched(node, zeros((4, 4), (4, 4))))
    rule = operator_row(read).sizes
    assert rule(read, [None] * len(read.inputs)) is None
    if len(read.inputs) > 1 and read.op in ("Add", "MatMul"):
        assert rule(read, [(4, 4), None]) is None


def test_no_sizes_of_ranks_that_do_not_fit():
    gemm, transpose = (
        node_of(sketched("Gemm(a, b)", zeros((4, 4), (4, 4)))),
        node_of(sketched("Transpose <perm = [0,1]> (a)", zeros((4, 4)))),
    )
    assert operator_row(gemm).sizes(gemm, [(2, 4, 4), (4, 4)]) is None
    assert operator_row(transpose).sizes(transpose, [(2, 4, 4)]) is None


def ints(*values):
    return np.array(values, np.int64)


F = np.ones((4, 5), np.float32)
# (node, constants, elements of the result, whether that is exact).
RESULTS = [
    ("Concat <axis = 0> (a, b)", [F, F[:1]], 25),
    ("Gather <axis = 1> (a, b)", [F, ints(1, 2, 0, 1, 4, 1).reshape(2, 3)], 24),
    ("Gather(a, b)", [F, np.int64(2)], 5),
    ("Gather(a, b)", [F[:0], ints()], 0),
    ("Expand(a, b)", [F[:, :1], ints(2, 1, 3)], 24),
    ("Expand(a, b)", [F, ints(1)], 20),
    ("Expand(a, b)", [F[:1], ints(7, 1)], 35),
    ("Tile(a, b)", [F, ints(2, 3)], 120),
    ("ConstantOfShape(a)", [ints(2, 3)], 6),
    ("ConstantOfShape(a)", [ints(0, 3)], 0),
    ("Range(a, b, c)", [np.int64(0), np.int64(10), np.int64(3)], 4),
    ("Range(a, b, c)", [np.int64(1), np.int64(10), np.int64(3)], 3),
    ("Range(a, b, c)", [np.int64(0), np.int64(-10), np.int64(3)], 0),
    ("Add(a, b)", [F, F[:1]], 20),
    ("Div(a, b)", [ints(3, 4), ints(2)], 2),
    ("Div(a, b)", [ints(-(2**63), 4), ints(2)], 2),
    ("Div(a, b)", [ints(3, 4), ints(-1)], 2),
    ("Div(a, b)", [F, F * 0], 20),
    ("Mod(a, b)", [ints(3, 4), ints(2)], 2),
    ("Where(a, b, c)", [np.array([True]), F, F[:, :1]], 20),
    ("Equal(a, b)", [F, F], 20),
    ("Sqrt(a)", [F], 20),
    ("Cos(a)", [F], 20),
    ("Tanh(a)", [F], 20),
    ("Relu(a)", [F], 20),
    ("Transpose(a)", [F], 20),
    ("Reshape(a, b)", [F, ints(2, 10)], 20),
    ("Flatten(a)", [F], 20),
    ("Squeeze(a)", [F[:1]], 5),
    ("Unsqueeze(a, b)", [F, ints(0)], 20),
    ("Cast <to = 7> (a)", [F], 20),
    ("Clip(a)", [F], 20),
    ("Max(a, b)", [F, F[:1]], 20),
]
# At most so many.
AT_MOST = [
    ("Slice(a, b, c)", [F, ints(1), ints(3)], 20),
    ("Split <axis = 0> (a)", [F], 20),
    ("ReduceMean <axes = [1]> (a)", [F], 20),
    ("ReduceProd <axes = [1]> (a)", [F], 20),
    ("ReduceMax <axes = [1]> (a)", [F], 20),
]


@pytest.mark.parametrize(("node", "arrays", "expected"), RESULTS + AT_MOST)
def test_how_many_elements_a_constant_expression_gives(node, arrays, expected):
    text = f"() => (y) {{ y = {node} }}"
    proto = model(text, **dict(zip(LETTERS, arrays, strict=False)))
    read = node_of(proto)
    assert operator_row(read).result_size(read, arrays) == expected
    (actual,) = run(proto, {})
    assert actual.size <= expected
    assert actual.size == expected or (node, arrays, expected) in AT_MOST


def of_constants(node, *arrays):
    """Return the node and its row, with this many elements."""
    read = node_of(model(f"() => (y) {{ y = {node} }}", **dict(zip(LETTERS, arrays, strict=False))))
    return operator_row(read).result_size(read, arrays)


def test_an_integer_division_that_some_processors_cannot_do_has_no_result():
    for node in ("Div(a, b)", "Mod(a, b)"):
        assert of_constants(node, ints(3, 4), ints(2, 0)) is None
        assert of_constants(node, ints(-(2**63), 4), ints(-1)) is None


def test_a_range_without_a_step_never_ends():
    assert of_constants("Range(a, b, c)", np.int64(0), np.int64(3), np.int64(0)) == math.inf


def test_a_list_of_sizes_has_no_negative_number_and_not_more_than_an_array_has_axes():
    assert list_of_sizes(ints(*[1] * 64)) == [1] * 64
    assert list_of_sizes(ints(0, 3)) == [0, 3]
    for wrong in (ints(*[1] * 65), ints(2, -1)):
        with pytest.raises(ValueError, match="no list of sizes"):
            list_of_sizes(wrong)


def test_the_list_that_a_flatten_stands_for():
    flatten = {axis: node_of(sketched(f"Flatten <axis = {axis}> (a)", zeros(ROW))) for axis in (0, 1, 2)}
    found = {axis: operator_row(node).reshape_target(node, ROW, None) for axis, node in flatten.items()}
    assert found == {0: None, 1: [0, -1], 2: None}
    assert OPERATORS["Flatten"].reshape_target(flatten[1], None, None) is None
    assert OPERATORS["Flatten"].reshape_target(flatten[1], (), None) is None


def test_the_sizes_that_an_expand_makes():
    some = Dim(node_of(sketched("Relu(a)", zeros(ROW))).inputs[0], 0)
    expand = node_of(sketched("Expand(a, b)", zeros(ROW, (3,))))
    made = {
        ((some, 1, 5), (4, 3, 1)): [4, 3, 5],
        ((some, 1, 5), (1, some, None)): [some, some, 5],
        ((some, 1), (some, None)): [some, None],
        ((some, 4), (None, None)): [None, 4],
        ((4,), (some, 1, 1)): [some, 1, 4],
        ((1, 4), (2,)): [1, 4],
    }
    for (data, wanted), sizes in made.items():
        assert operator_row(expand).reshape_target(expand, data, lambda value, wanted=wanted: [*wanted]) == sizes, (data, wanted)
    for data, wanted in ((None, (1,)), ((4,), None), ((4,), (0,)), ((4,), (-1,)), ((0,), (1,))):
        assert operator_row(expand).reshape_target(expand, data, lambda value, wanted=wanted: wanted) is None, (data, wanted)


def test_the_size_that_a_weight_demands():
    sizes = {"Gemm(a, b)": 5, "Gemm <transB = 1> (a, b)": 7, "Gemm <transA = 1> (a, b)": None, "MatMul(a, b)": 5}
    for text, demanded in sizes.items():
        node = node_of(sketched(text, zeros((2, 2), (2, 2))))
        assert operator_row(node).demanded_size(node, (5, 7)) == (-1, demanded), text


def test_the_elements_of_a_shape():
    some = Dim(node_of(sketched("Relu(a)", zeros(ROW))).inputs[0], 0)
    expected = {
        "Shape(a)": [some, 3, 4, 6],
        "Shape <start = 1> (a)": [3, 4, 6],
        "Shape <end = 2> (a)": [some, 3],
        "Shape <start = 1, end = -1> (a)": [3, 4],
    }
    for text, elements in expected.items():
        node = node_of(sketched(text, zeros(ROW)))
        found = operator_row(node).list_elements(node, (some, 3, 4, 6), ())
        assert (found.dtype, found.tolist()) == (object, elements)
        assert operator_row(node).list_elements(node, None, ()) is None


def test_a_cast_to_integers_keeps_sizes():
    sizes, numbers = np.array([2, 3], object), ints(2, 3)
    for to, given, expected in ((6, sizes, sizes), (7, sizes, sizes), (1, sizes, None), (7, numbers, None), (7, None, None)):
        node = node_of(sketched(f"Cast <to = {to}> (a)", zeros(ROW)))
        assert operator_row(node).list_elements(node, None, [given]) is expected
    node = node_of(sketched("Identity(a)", zeros(ROW)))
    assert operator_row(node).list_elements(node, None, [sizes]) is sizes


def test_a_norm_demands_as_many_channels_as_it_has_scales():
    demanded = OPERATORS["BatchNormalization"].demanded_size
    assert demanded(None, (4,)) == (1, 4)
    assert demanded(None, (2, 2)) == (1, None)


@pytest.mark.parametrize(
    ("node", "weight", "expected"),
    [
        ("Conv <group = 2> (a, b)", (6, 4, 3, 3), (1, 8)),
        ("ConvTranspose <group = 2> (a, b)", (6, 4, 3, 3), (1, 6)),
        ("Conv(a, b)", (6, None, 3), (1, None)),
        ("Conv(a, b)", (6, 4), (1, None)),
    ],
)
def test_the_channels_that_the_weight_of_a_convolution_demands(node, weight, expected):
    made = node_of(sketched(node, zeros((1, 8, 9, 9), (6, 4, 3, 3))))
    assert operator_row(made).demanded_size(made, weight) == expected


@pytest.mark.parametrize(
    ("attributes", "keeps"),
    [
        ("pads = [1,2,1,2], dilations = [1,2]", True),
        ("pads = [0,2,2,2], dilations = [1,2]", True),
        ("pads = [1,1,1,1], dilations = [1,2]", False),
        ("pads = [1,1,1,1], strides = [1,2]", False),
        ("pads = [1,1,1,1], strides = [1,1]", True),
        ('auto_pad = "SAME_LOWER"', True),
        ('auto_pad = "SAME_UPPER", strides = [2,1]', False),
        ('auto_pad = "VALID"', False),
    ],
)
def test_a_convolution_that_keeps_the_size_of_its_images(attributes, keeps):
    made = node_of(sketched(f"Conv <{attributes}> (a, b)", zeros((1, 2, 9, 8), (3, 2, 3, 3))))
    found = operator_row(made).sizes(made, [(1, 2, 9, 8), (3, 2, 3, 3)])
    assert found == (1, 3, *((9, 8) if keeps else (None, None)))


# Products of a convolution: each element that it gives, or reads in a transposed one, meets the weights of a channel of the other side.
@pytest.mark.parametrize(("op", "expected"), [("Conv(a, b)", 2 * 5 * 4 * 4 * 3 * 9), ("ConvTranspose(a, c)", 2 * 3 * 6 * 6 * 5 * 4)])
def test_how_long_a_convolution_takes_for_constants(op, expected):
    arrays = zeros((2, 3, 6, 6), (5, 3, 3, 3), (3, 5, 2, 2))
    node = node_of(sketched(op, arrays))
    read = [arrays[value.name] for value in node.inputs]
    assert operator_row(node).work(node, read, 2 * 5 * 4 * 4) == expected
