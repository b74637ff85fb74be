"""What the rows of operators say besides their two directions: what verifying a fold and asking for lost weights need to know."""

from functools import cache

import numpy as np
import onnx
import pytest
from sketch import model, norm, normal, run

from fastbn.graph.model import storage
from fastbn.graph.model.index import Index
from fastbn.graph.ops.pooling import UNKNOWN_TERMS
from fastbn.graph.ops.registry import OPERATORS, can_be_affine, row_of
from fastbn.graph.planner.view import GraphView


def seen(text, **constants):
    """Return the node named y of a model, its row and the view of the graph."""
    view = GraphView(Index(storage.load(model(text, **constants))))
    (node,) = (node for node in view.index.order if node.label == "y")
    return node, row_of(node, view), view


def text(node, x="2,4,6,6", y="float"):
    return f"(float[{x}] x) => ({y} y) {{ y = {node} }}"


CONV = normal(6, 2, 3, 2)
TRANSPOSED = normal(4, 3, 3, 2)
LSTM = "(float[9,3,5] x) => (float y) { y = LSTM <hidden_size = 2> (x, w, r) }"
UNKNOWN = "(float[2,4,6,6] x, int64[?] to) => (float y) { z = Reshape(x, to) y = %s }"

# case -> (text, constants, terms, shapes to verify with).
SIZES = {
    "Conv": (text("Conv <group = 2, dilations = [2,1], strides = [1,3]> (x, w)"), {"w": CONV}, 2 * 3 * 2, {0: (2, 4, 6, 5)}),
    "Conv plain": (text("Conv(x, w)"), {"w": normal(6, 4, 3, 2)}, 4 * 3 * 2, {0: (2, 4, 4, 3)}),
    "ConvTranspose": (
        text("ConvTranspose <group = 2, pads = [1,0,2,0], strides = [2,1]> (x, w)"),
        {"w": TRANSPOSED},
        2 * 3 * 2,
        {0: (2, 4, 4, 2)},
    ),
    "ConvTranspose plain": (text("ConvTranspose(x, w)"), {"w": TRANSPOSED}, 4 * 3 * 2, {0: (2, 4, 2, 2)}),
    "Gemm": (text("Gemm(x, w)", "9,5"), {"w": normal(5, 7)}, 5, {0: (3, 5)}),
    "Gemm, transB": (text("Gemm <transB = 1> (x, w)", "9,5"), {"w": normal(7, 5)}, 5, {0: (3, 5)}),
    "Gemm, transA": (text("Gemm <transA = 1> (x, w)", "5,9"), {"w": normal(5, 7)}, 5, {0: (5, 3)}),
    "Gemm, one bias": (text("Gemm(x, w, c)", "9,5"), {"w": normal(5, 7), "c": normal(7)}, 5, {0: (3, 5)}),
    "Gemm, one row of biases": (text("Gemm(x, w, c)", "9,5"), {"w": normal(5, 7), "c": normal(1, 7)}, 5, {0: (3, 5)}),
    "Gemm, a bias per row": (text("Gemm(x, w, c)", "2,5"), {"w": normal(5, 7), "c": normal(2, 7)}, 5, {0: (2, 5)}),
    "MatMul": (text("MatMul(x, w)", "2,3,5"), {"w": normal(5, 7)}, 5, {0: (2, 3, 5)}),
    "MatMul of an unknown size": (text("MatMul(x, w)", "N,M"), {"w": normal(5, 7)}, 5, {0: (2, 5)}),
    "MatMul of an unknown rank": (UNKNOWN % "MatMul(z, w)", {"w": normal(5, 7)}, 5, {0: (3, 5)}),
    "MatMul by a stack": (text("MatMul(x, w)", "2,9,5"), {"w": normal(2, 5, 7)}, 5, {0: (2, 3, 5)}),
    "MatMul of more axes by a stack": (text("MatMul(x, w)", "6,2,9,5"), {"w": normal(2, 5, 7)}, 5, {0: (2, 2, 3, 5)}),
    "MatMul by a vector": (text("MatMul(x, w)", "9,5"), {"w": normal(5)}, 5, {0: (9, 5)}),
    "MatMul from the left": (text("MatMul(w, x)", "5,9"), {"w": normal(7, 5)}, 5, {1: (5, 9)}),
    "MatMul of a stack from the left": (text("MatMul(w, x)", "2,5,9"), {"w": normal(2, 7, 5)}, 5, {1: (2, 5, 3)}),
    "MatMul of a vector, from the left": (text("MatMul(w, x)", "5"), {"w": normal(7, 5)}, 5, {1: (5,)}),
    "LSTM": (LSTM, {"w": normal(1, 8, 5), "r": normal(1, 8, 2)}, 8 * (8 + 5), {0: (3, 2, 5)}),
    "BatchNormalization": (text("BatchNormalization(x, s, t, m, v)", "N,4,6"), norm(4), 1, {0: (2, 4, 6)}),
    "BatchNormalization of an unknown rank": (UNKNOWN % "BatchNormalization(z, s, t, m, v)", norm(4), 1, {0: (2, 4, 3)}),
    "BatchNormalization of unknown channels": (text("BatchNormalization(x, s, t, m, v)", "3,C,6"), norm(4), 1, {0: (3, 4, 6)}),
    "DequantizeLinear": (
        "(float[2,4] x) => (float y) { y = DequantizeLinear(q, s) }",
        {"q": np.int8([1, -2]), "s": np.float32(0.5)},
        1,
        {},
    ),
    "Add of a constant": (text("Add(x, k)"), {"k": normal(4, 1, 1)}, 1, {0: (2, 4, 6, 6)}),
    "Mul by a constant before it": (text("Mul(k, x)"), {"k": normal(4, 1, 1)}, 1, {1: (2, 4, 6, 6)}),
    "Add of a constant to an unknown rank": (UNKNOWN % "Add(z, k)", {"k": normal(4, 1, 3)}, 1, {0: (4, 2, 3)}),
    "Add of a number to an unknown rank": (UNKNOWN % "Add(z, k)", {"k": np.float32(3)}, 1, {0: (2,)}),
    "Add of two": (text("Add(x, x)"), {}, 1, {0: (2, 4, 6, 6), 1: (2, 4, 6, 6)}),
    "Mul of two": (text("Mul(x, x)"), {}, 1, {0: (2, 4, 6, 6), 1: (2, 4, 6, 6)}),
    "AveragePool": (text("AveragePool <kernel_shape = [3,2]> (x)"), {}, 6, {0: (2, 4, 6, 6)}),
    "MaxPool": (text("MaxPool <kernel_shape = [3,2]> (x)"), {}, 0, {0: (2, 4, 6, 6)}),
    "GlobalAveragePool": (text("GlobalAveragePool(x)", "2,4,5,7"), {}, 35, {0: (2, 4, 5, 7)}),
    "GlobalAveragePool of unknown sizes": (text("GlobalAveragePool(x)", "2,4,H,W"), {}, UNKNOWN_TERMS, {0: (2, 4, 2, 2)}),
    "ReduceSum of an unknown rank": (UNKNOWN % "ReduceSum(z)", {}, UNKNOWN_TERMS, {0: None}),
    "ReduceMean": (text("ReduceMean <axes = [2]> (x)", "2,4,5,7"), {}, 5, {0: (2, 4, 5, 7)}),
    "ReduceL2": (text("ReduceL2 <axes = [3]> (x)", "2,4,5,7"), {}, 7, {0: (2, 4, 5, 7)}),
    "ReduceMax": (text("ReduceMax <axes = [2]> (x)"), {}, 0, {0: (2, 4, 6, 6)}),
    "Resize": (text("Resize(x, , k)"), {"k": np.float32([1, 1, 2, 2])}, 8, {0: (2, 4, 6, 6)}),
    "a large image": (text("Relu(x)", "9,4,900,800"), {}, 0, {0: (2, 4, 8, 8)}),
    "a long batch of one": (text("Relu(x)", "1,4,5,100000"), {}, 0, {0: (1, 4, 5, 8)}),
    "the largest small value": (text("Relu(x)", "65536"), {}, 0, {0: (65536,)}),
    "the smallest large value": (text("Relu(x)", "65537"), {}, 0, {0: (2,)}),
    "DeformConv": (
        "(float[2,4,9,9] x, float[2,24,5,9] z) => (float y) { y = DeformConv <dilations = [2,1], strides = [1,3], group = 2> (x, w, z) }",
        {"w": CONV, "opset": 19},
        4 * 2 * 3 * 2,
        {0: (2, 4, 6, 5), 2: (2, 12, 2, 2)},
    ),
    "Gemm of a constant": (text("Gemm(w, x)", "5,9"), {"w": normal(7, 5)}, 5, {1: (5, 9)}),
    "Gemm of a constant, transA, transB": (text("Gemm <transA = 1, transB = 1> (w, x)", "9,5"), {"w": normal(5, 7)}, 5, {1: (9, 5)}),
    "Gemm of a constant, unknown": (UNKNOWN % "Gemm(w, z)", {"w": normal(7, 5)}, 5, {1: (5, 3)}),
    "Mean": (text("Mean(x, x, x)"), {}, 3, {0: (2, 4, 6, 6), 1: (2, 4, 6, 6), 2: (2, 4, 6, 6)}),
    "LayerNormalization": (text("LayerNormalization(x, w)"), {"w": normal(6)}, 1, {0: (2, 4, 6, 6)}),
    "Cast": (text("Cast <to = 1> (x)", "3,N"), {}, 0, {0: (3, 2)}),
}


@pytest.mark.parametrize("case", SIZES)
def test_the_length_of_sums_and_the_shapes_to_verify_with(case):
    source, constants, terms, shapes = SIZES[case]
    node, row, view = seen(source, **constants)
    assert row.terms(node, view) == terms
    found = row.probe_shapes(node, view)
    assert {slot: found[slot] for slot, value in enumerate(node.inputs) if slot in found and view.constant(value) is None} == shapes


@pytest.mark.parametrize("op", ["AveragePool", "GlobalAveragePool", "ReduceMean", "ReduceSum", "ReduceL1", "Resize", "Upsample"])
def test_what_averages_may_sum_equal_terms(op):
    assert OPERATORS[op].equal_terms
    assert not OPERATORS["Conv"].equal_terms


X = normal(2, 4, 6, 5)
# case -> (node, its constants); x is normal and has both signs.
BOUNDS = {
    "Add": ("Add(x, k)", {"k": normal(4, 1, 1, seed=1)}),
    "Sub": ("Sub(x, k)", {"k": normal(4, 1, 1, seed=1)}),
    "Sub of two": ("Sub(x, z)", {}),
    "Mul": ("Mul(x, k)", {"k": normal(4, 1, 1, seed=1)}),
    "Neg": ("Neg(x)", {}),
    "Relu": ("Relu(x)", {}),
    "Conv": ("Conv(x, k)", {"k": normal(3, 4, 2, 2, seed=1)}),
    "Gemm": ("Gemm <alpha = -2.0, beta = 0.5> (f, k, b)", {"k": normal(120, 3, seed=1), "b": normal(3)}),
    "MatMul": ("MatMul(x, k)", {"k": normal(5, 3, seed=1)}),
    "ReduceMin": ("ReduceMin <axes = [2]> (x)", {}),
    "ReduceMax": ("ReduceMax <axes = [2]> (x)", {}),
    "ReduceSum": ("ReduceSum(x)", {}),
    "AveragePool": ("AveragePool <kernel_shape = [2,2]> (x)", {}),
    "MaxPool": ("MaxPool <kernel_shape = [2,2]> (x)", {}),
    "DequantizeLinear": ("DequantizeLinear(q, s)", {"q": np.int8([[3, -100], [-7, 4]]), "s": np.float32(0.5)}),
    "BatchNormalization": ("BatchNormalization(x, s, t, m, v)", norm(4)),
    "LayerNormalization": ("LayerNormalization(x, k, b)", {"k": normal(5, seed=1), "b": normal(5, seed=2)}),
    "LayerNormalization without a bias": ("LayerNormalization(x, k)", {"k": normal(5, seed=1)}),
    "InstanceNormalization": ("InstanceNormalization(x, k, b)", {"k": normal(4, seed=1), "b": normal(4, seed=2)}),
    "Mean": ("Mean(x, z)", {}),
    "LpPool": ("LpPool <kernel_shape = [2,2]> (x)", {}),
}


@pytest.mark.parametrize("case", BOUNDS)
def test_absolute_values_bound_what_a_node_rounds(case):
    """The node as its row edits it, run on absolute values, gives at least the size of each result on the values themselves."""
    nodes, constants = BOUNDS[case]
    source = f"(float[2,4,6,5] x, float[2,4,6,5] z) => (float y) {{ f = Flatten(x) y = {nodes} }}"
    feeds = {"x": X, "z": normal(2, 4, 6, 5, seed=5)}
    proto = model(source, **constants)
    (plain,) = run(proto, feeds)
    row = OPERATORS[case.split()[0]]
    slots = {name: slot for slot, name in enumerate(proto.graph.node[-1].input)}
    magnitudes = {name: row.magnitude(slots[name], values) if values.dtype.kind == "f" else values for name, values in constants.items()}
    bounded = model(source, **magnitudes)
    bounded.graph.node.extend(row.bound(bounded.graph.node[-1]))
    (size,) = run(bounded, {name: np.abs(values) for name, values in feeds.items()})
    assert size.shape == plain.shape
    assert (size * (1 + 1e-5) >= np.abs(plain)).all()
    assert (size > 0).all()


def rows_of(array, axis):
    """Return one flat row for each output channel, taken out one by one."""
    return np.stack([np.take(array, at, axis).reshape(-1) for at in range(array.shape[axis])])


MATRICES = {
    "Conv": (text("Conv <group = 2> (x, w)"), CONV, rows_of(CONV, 0)),
    "ConvTranspose": (
        text("ConvTranspose <group = 2> (x, w)"),
        TRANSPOSED,
        np.vstack([rows_of(TRANSPOSED[:2], 1), rows_of(TRANSPOSED[2:], 1)]),
    ),
    "Gemm": (text("Gemm(x, w)", "9,5"), normal(5, 7), normal(5, 7).T),
    "Gemm, transB": (text("Gemm <transB = 1> (x, w)", "9,5"), normal(7, 5), normal(7, 5)),
    "MatMul": (text("MatMul(x, w)", "9,5"), normal(5, 7), normal(5, 7).T),
    "Gemm from the left": (text("Gemm(w, x)", "5,9"), normal(7, 5), normal(7, 5)),
    "Gemm from the left, transA": (text("Gemm <transA = 1> (w, x)", "5,9"), normal(5, 7), normal(5, 7).T),
    "MatMul by a vector": (text("MatMul(x, w)", "9,5"), normal(5), normal(5).reshape(1, 5)),
    "MatMul from the left": (text("MatMul(w, x)", "5,9"), normal(7, 5), normal(7, 5)),
    "MatMul by a stack": (text("MatMul(x, w)", "2,9,5"), normal(2, 5, 7), np.vstack([part.T for part in normal(2, 5, 7)])),
    "LSTM": (LSTM.replace(", r", ", w"), normal(2, 8, 5), np.vstack([*normal(2, 8, 5)])),
}


@pytest.mark.parametrize("case", MATRICES)
def test_a_weight_as_a_matrix_has_a_row_of_terms_for_each_output_channel(case):
    source, weight, matrix = MATRICES[case]
    node, row, _ = seen(source, w=weight)
    slot = 0 if "left" in case else 1
    np.testing.assert_array_equal(row.weight_matrix(node, slot, weight), matrix)
    if "MatMul" not in case:
        assert row.weight_matrix(node, 2, weight) is None


def test_states_of_a_gru_count_as_numbers_up_to_one():
    assert [OPERATORS[op].least_magnitude for op in ("GRU", "LSTM", "RNN", "Conv")] == [1, 0, 0, 0]


def test_who_may_be_an_affine():
    yes = {op for op in OPERATORS if can_be_affine(op)}
    assert yes == {"Add", "Sub", "Mul", "Div", "BatchNormalization"}
    assert not can_be_affine("NoSuchOperator")


def test_which_inputs_are_read_by_shape_or_type_alone():
    reads = {op: dict(row.reads) for op, row in OPERATORS.items() if row.reads}
    like = ("Shape", "Size", "EyeLike", "RandomNormalLike", "RandomUniformLike")
    assert reads == {**{op: {0: "shape"} for op in like}, "CastLike": {1: "type"}}


# What ONNX calls the inputs that an operator reads as sizes, factors, axes or counts.
SIZE_NAMES = {"K", "axes", "axis", "delta", "depth", "ends", "limit", "pads", "repeats", "roi", "scales", "shape", "sizes", "split"}
SIZE_NAMES |= {"start", "starts", "steps", "tiles"}


@cache
def inputs_of_schemas():
    """Return (operator, slot, what ONNX calls that input) for every version of every operator."""
    schemas = [schema for schema in onnx.defs.get_all_schemas_with_history() if schema.domain == ""]
    return {(schema.name, slot, given.name) for schema in schemas for slot, given in enumerate(schema.inputs)}


def slots_named(op, names):
    """Return the slots of the inputs that ONNX gives these names to in any version of an operator."""
    return {slot for name, slot, given in inputs_of_schemas() if name == op and given in names}


@pytest.mark.parametrize("op", sorted(OPERATORS))
def test_the_slots_that_are_read_as_sizes_are_those_that_onnx_names_so(op):
    expected = {"Flatten": {1}, "ConstantOfShape": {0}}.get(op, slots_named(op, SIZE_NAMES))  # a Flatten counts as a Reshape
    assert set(OPERATORS[op].size_slots) == expected


def having(fact):
    return {op for op, row in OPERATORS.items() if fact(row)}


def test_whose_results_depend_on_the_sizes_of_what_they_read():
    """A fold over these is verified in the sizes of the model first."""
    moving = {"Reshape", "Flatten", "Squeeze", "Split", "DepthToSpace", "Expand", "Slice", "Gather", "Resize", "Upsample"}
    moving |= {"Tile", "ReverseSequence", "DeformConv", "SpaceToDepth", "GatherND", "GatherElements"}
    moving |= {"SplitToSequence", "SequenceAt"}
    assert having(lambda row: row.sized) == moving
    first = {"Reshape", "Squeeze", "Unsqueeze", "Split", "Slice", "Gather", "Transpose"}
    assert having(lambda row: row.moved_inputs == "first") == first
    assert having(lambda row: row.moved_inputs == "all") == {"Concat"}
    assert having(lambda row: row.reshape_target is not None) == {"Expand", "Reshape", "Flatten"}
    assert having(lambda row: row.list_elements is not None) == {"Shape", "Identity", "Cast", "Mul", "ReduceProd"}
    assert having(lambda row: row.parts) == {"Split"}
    assert having(lambda row: row.apart) == {"Dropout"}
    assert having(lambda row: row.takes_skip) == {"Conv", "Add", "Sub", "Sum"}
    weighted = {"Gemm", "MatMul", "Conv", "ConvTranspose", "DeformConv", "LSTM", "GRU", "RNN", "BatchNormalization"}
    assert having(lambda row: row.demanded_size is not None) == weighted


def test_the_bias_of_an_operator():
    normalizations = {"BatchNormalization", "GroupNormalization", "InstanceNormalization", "LayerNormalization"}
    assert having(lambda row: row.bias_slot is not None) == {"Conv", "ConvTranspose", "DeformConv", "Gemm"} | normalizations
    assert {OPERATORS[op].bias_slot for op in normalizations} == {2}
    assert {slot for op in ("Conv", "ConvTranspose") for slot in slots_named(op, "B")} == {OPERATORS["Conv"].bias_slot}
    assert slots_named("Gemm", "C") == {OPERATORS["Gemm"].bias_slot}
    assert having(lambda row: row.has_no_place_for_shift) == {"MatMul", "Einsum"}
    gemm, _, _ = seen(text("Gemm <beta = 3.0> (x, w)", "9,5"), w=normal(5, 7))
    plain, _, _ = seen(text("Gemm(x, w)", "9,5"), w=normal(5, 7))
    assert [OPERATORS["Gemm"].bias_factor(node) for node in (gemm, plain)] == [3, 1]
    assert OPERATORS["Conv"].bias_factor(plain) == 1


def test_the_axis_whose_size_a_weight_fixes():
    axes = {op: row.channel_axis for op, row in OPERATORS.items() if row.channel_axis is not None}
    assert axes == {"Conv": 1, "ConvTranspose": 1, "DeformConv": 1, "Gemm": 1}


def test_operands_that_broadcast_and_constants_among_them():
    two = {"Add", "Sub", "Mul", "Div"}
    assert having(lambda row: row.broadcasts) == two | {"Sum", "Max", "Min", "Mean", "Where"}
    assert having(lambda row: row.with_constant is not None) == two
    for op, constant, is_affine in (("Add", "k", True), ("Sub", "k", True), ("Mul", "k", True), ("Add", "i", False), ("Add", "x", False)):
        node, row, view = seen(text(f"{op}(x, {constant})"), k=normal(4, 1, 1), i=np.ones((4, 1, 1), np.int64))
        assert (row.lift is not None) == is_affine
        assert row.transfers
        assert (view.affine(node) is not None) == is_affine
        assert row.broadcasts
    before, row, view = seen(text("Sub(k, x)"), k=normal(4, 1, 1))
    assert (view.data_slot(before), row.bound is OPERATORS["Sub"].bound) == (1, True)
    assert not OPERATORS["Shape"].transfers
    assert (OPERATORS["LSTM"].transfers, OPERATORS["LSTM"].backward) == (True, None)


def test_before_opset_7_nothing_broadcasts_by_shape():
    _, row, _ = seen(text("Add(x, k)"), k=normal(2, 4, 6, 6), opset=6)
    assert row.lift is None
    _, row, _ = seen(text("Add(x, k)"), k=normal(2, 4, 6, 6), opset=7)
    assert row.lift is not None


LIFTED = {
    "Add(x, k)": lambda k: (np.ones(4), k),
    "Add(k, x)": lambda k: (np.ones(4), k),
    "Sub(x, k)": lambda k: (np.ones(4), -k),
    "Sub(k, x)": lambda k: (-np.ones(4), k),
    "Mul(x, k)": lambda k: (k, np.zeros(4)),
    "Div(x, k)": lambda k: (1 / k, np.zeros(4)),
}


@pytest.mark.parametrize("source", LIFTED)
def test_a_node_with_a_constant_as_an_affine(source):
    constant = normal(4, 1, 1, seed=3)
    node, _, view = seen(text(source), k=constant)
    affine = view.affine(node)
    scale, shift = LIFTED[source](constant.reshape(-1).astype(np.float64))
    np.testing.assert_array_equal(affine.scale, scale)
    np.testing.assert_array_equal(affine.shift, shift)
    assert (affine.axis, affine.rank) == (-3, 3)
    np.testing.assert_array_equal(affine.abs_terms, np.abs(shift))


def lifted(source, **constants):
    node, _, view = seen(text(source), **constants)
    return view.affine(node)


def test_constants_that_are_no_affine():
    assert lifted("Add(x, k)", k=normal(4, 1, 6)) is None, "two axes"
    assert lifted("Add(x, k)", k=normal(1, 4, 1, 1)).rank == 4
    assert lifted("Add(x, k)", k=np.float32(3)).axis is None
    assert lifted("Add(x, k)", k=normal(1, 1)).axis is None
    assert lifted("Mul(x, k)", k=np.float32([1, 2, np.inf, 3, 4, 5])) is None
    assert lifted("Add(x, k)", k=np.float32([1, 2, np.nan, 3, 4, 5])) is None
    assert lifted("Div(x, k)", k=np.float32([1, 2, 0, 3, 4, 5])) is None
    assert lifted("Div(k, x)", k=normal(6)) is None


def test_a_batch_normalization_as_an_affine():
    parameters = norm(4)
    affine = lifted("BatchNormalization(x, s, t, m, v)", **parameters)
    s, t, m, v = (parameters[name].astype(np.float64) for name in "stmv")
    scale = s / np.sqrt(v + np.float32(1e-5))
    np.testing.assert_allclose(affine.scale, scale, rtol=1e-12)
    np.testing.assert_allclose(affine.shift, t - m * scale, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(affine.abs_terms, np.abs(t) + np.abs(m * scale), rtol=1e-12)
    assert (affine.axis, affine.rank) == (1, 0)
