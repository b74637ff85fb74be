"""What mutation testing found that no other test looks at: each of these kills a change that had survived (docs/mutation.md)."""

import numpy as np
import onnx
import pytest
from rows import A4, A4S, PER_ELEMENT, affine, assert_refused, case, ints
from sketch import assert_same, conv_bn, model, norm, normal, ops
from test_storage import save_external
from test_transfers import check_backward, check_forward

import fastbn
from fastbn.errors import ModelError
from fastbn.graph.model import storage
from fastbn.graph.model.index import Index
from fastbn.graph.ops.affine import Affine
from fastbn.graph.ops.convolution import _added_to_center
from fastbn.graph.ops.matmul import AT_ONCE
from fastbn.graph.ops.parts import _parts_of
from fastbn.graph.ops.placing import countable
from fastbn.graph.ops.registry import OPERATORS
from fastbn.graph.ops.shape_rules import Dim, product, product_of_elements
from fastbn.graph.planner.advice import FIRST_SIZE, OTHER_SIZE, supposed_shapes
from fastbn.graph.planner.planning import plan
from fastbn.graph.reasons import Refusal

# ---- storage ----


def test_bytes_come_out_as_they_came_in(tmp_path):
    """Fields in another order than protobuf writes them."""
    proto = conv_bn()
    imports = onnx.ModelProto(opset_import=proto.opset_import)
    proto.ClearField("opset_import")
    data = imports.SerializeToString() + proto.SerializeToString()
    (tmp_path / "m.onnx").write_bytes(data)
    assert onnx.ModelProto.FromString(data).SerializeToString() != data
    assert storage.load(tmp_path / "m.onnx").to_bytes() == data


def test_the_size_of_a_model_whose_data_is_gone(tmp_path):
    source = storage.load(save_external(conv_bn(), tmp_path))
    assert source.size() == sum(path.stat().st_size for path in tmp_path.iterdir())
    (tmp_path / "model.data").unlink()
    with pytest.raises(storage.StorageError, match=r"^Cannot .*model\.data"):
        source.size()


def test_a_data_file_that_is_a_folder(tmp_path):
    path = save_external(conv_bn(), tmp_path)
    (tmp_path / "model.data").unlink()
    (tmp_path / "model.data").mkdir()
    with pytest.raises(storage.StorageError, match=r"^Expected a data file, got something that is no file - at "):
        storage.load(path)


def test_a_data_file_that_lacks_one_byte(tmp_path):
    path = save_external(conv_bn(), tmp_path)
    storage.load(path)
    data = (tmp_path / "model.data").read_bytes()
    (tmp_path / "model.data").write_bytes(data[:-1])
    with pytest.raises(ModelError, match=rf"^Expected a file of at least {len(data)} bytes, got {len(data) - 1} - at "):
        storage.load(path)


def test_external_data_at_an_odd_offset_is_aligned(tmp_path):
    """The kernels refuse arrays that are not."""
    path = save_external(conv_bn(), tmp_path)
    proto = onnx.load(path, load_external_data=False)
    (tmp_path / "model.data").write_bytes(b"?" + (tmp_path / "model.data").read_bytes())
    for tensor in proto.graph.initializer:
        place = {entry.key: entry for entry in tensor.external_data}
        place["offset"].value = str(int(place["offset"].value) + 1)
    path.write_bytes(proto.SerializeToString())
    source = storage.load(path)
    for tensor, want in zip(source.proto.graph.initializer, conv_bn().graph.initializer, strict=True):
        array = source.array(tensor)
        assert array.flags.aligned
        np.testing.assert_array_equal(array, onnx.numpy_helper.to_array(want))


def test_a_name_that_holds_a_nul():
    with pytest.raises(storage.StorageError, match=r"^Expected a path, got embedded null byte"):
        storage.load("m\0.onnx")


def test_a_model_beyond_what_protobuf_reads(tmp_path):
    with (tmp_path / "m.onnx").open("wb") as file:
        file.truncate((1 << 31) + 1)
    with pytest.raises(ModelError, match=r"^Expected a model below 2 GB without its external data"):
        storage.load(tmp_path / "m.onnx")


# ---- rows ----


def test_an_affine_that_does_nothing_is_neutral():
    assert Affine(np.ones(3), np.zeros(3), 1, 0).is_neutral
    assert not Affine(np.ones(3), np.float64([0, 1e-3, 0]), 1, 0).is_neutral


BACKWARD = {
    "Squeeze": case("Squeeze(x, k)", A4, x=(2, 1, 4, 6), k=ints(1)),
    "Unsqueeze": case("Unsqueeze(x, k)", affine(4, 2), k=ints(1)),
    "Unsqueeze, one number": case("Unsqueeze(x, k)", PER_ELEMENT, k=ints(1)),
    "Split along another axis, rank unknown": case("Split <axis = 0> (x)", A4, opset=13, outputs="y", x=(2, 4, 6, 6), unknown=True),
}


@pytest.mark.parametrize("name", BACKWARD)
def test_backward(name):
    check_backward(BACKWARD[name]())


FORWARD = {
    "Unsqueeze, one number": case("Unsqueeze(x, k)", PER_ELEMENT, k=ints(1)),
    "Unsqueeze at the front, rank unknown": case("Unsqueeze(x, k)", A4, k=ints(0), unknown=True),
    "GatherElements, one number": case("GatherElements <axis = 2> (x, k)", PER_ELEMENT, k=np.zeros((2, 4, 3, 6), np.int64)),
    "Resize of opset 11": case("Resize (x, r, k)", A4, x=(-2, -4, -6, -6), opset=11, r=np.empty(0, np.float32), k=np.float32([1, 1, 2, 2])),
    "Slice of the first axis, rank unknown": case("Slice(x, k, e, a)", A4, k=ints(0), e=ints(1), a=ints(0), unknown=True),
    "Pad, rank unknown": case("Pad(x, k)", A4S, k=ints(0, 0, 1, 1, 0, 0, 1, 1), unknown=True),
}


@pytest.mark.parametrize("name", FORWARD)
def test_forward(name):
    check_forward(FORWARD[name]())


REFUSED = {
    "Mul of a value of a known rank and one of an unknown": (
        case("Mul(x, z)", A4S, z=(2, 4, 6, 6), unknown=True), "backward", "axis-unknown", "the shapes at Mul 'y' are not known",
    ),
    "Concat, an axis from the end of an unknown rank": (
        case("Concat <axis = 1> (x, z)", affine(4, -3), z=(2, 4, 6, 6), unknown=True), "forward", "axis-unknown", "the rank of 'h'",
    ),
    "Concat along the first axis, rank unknown": (
        case("Concat <axis = 0> (x, x)", affine(4, 0), unknown=True), "backward", "axis-unknown", "the sizes of the parts",
    ),
    "Einsum of dots, rank unknown": (
        case('Einsum <equation = "...c,oc->...o"> (x, w)', affine(5, -1), x=(2, 5, 6), w=normal(4, 6), unknown=True),
        "backward", "axis-unknown", "the rank of the data of Einsum 'y'",
    ),
    "Tile that gives nothing": (
        case("Tile(x, k)", A4, k=ints(1, 0, 1, 1)), "backward", "axis", "which repeats it 0 times",
    ),
    "Slice by lists of which nothing is known": (
        case("Slice(x, u, u)", A4, z=(-8,), before="u = Cast <to = 7> (z)"),
        "forward", "dynamic-index", "the bounds of Slice 'y' are no constants",
    ),
    "Pad by a list of an unknown rank": (
        case("Pad(x, u)", A4, z=(-8,), before="u = Cast <to = 7> (z)", unknown=True),
        "forward", "dynamic-index", "how much Pad 'y' pads is no constant",
    ),
    "GatherElements, count unknown": (
        case("GatherElements <axis = 2> (x, u)", A4, z=(2, -4, 6, 6), before="u = Cast <to = 7> (z)"),
        "forward", "axis-unknown", "do not tell how many of axis 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    assert_refused(*REFUSED[name])


def test_a_squeeze_of_several_channels():
    with pytest.raises(ModelError, match=r"^Expected an axis 1 of size 1, got 4 - at `y`$"):
        case("Squeeze(x, k)", A4, x=(2, -4, 6, 6), k=ints(1))().answers("forward")


@pytest.mark.parametrize(("node", "slot"), [("Gemm(x, w)", 1), ("MatMul(x, w)", 1), ('Einsum <equation = "bc,co->bo"> (x, w)', 1)])
def test_a_shift_alone_leaves_the_weight(node, slot):
    (transfer,) = case(node, affine(6, 1, scale=False), x=(2, 6), w=normal(6, 4))().answers("forward")
    assert slot not in transfer.constants


def test_the_center_of_a_kernel_whose_strides_are_written():
    for strides, is_there in (("[1,1]", True), ("[2,2]", False)):
        setting = case(f"Conv <pads = [1,1,1,1], strides = {strides}> (x, w)", A4, w=normal(4, 4, 3, 3))()
        added = _added_to_center(setting.node, A4, setting.view.weight(setting.node, 1))
        assert (added is not None) == is_there


def test_a_part_of_a_concat_that_is_empty():
    """All of the result comes from the other parts."""
    setting = case("Concat <axis = 1> (x, z)", A4, x=(2, 4, 6, 6), z=(2, 0, 6, 6))()
    (transfer,) = setting.answers("backward")
    assert {slot: given.channels for slot, given in transfer.passed_on} == {0: 4, 1: 0}


def test_the_last_part_is_what_the_others_leave():
    node = case("Concat <axis = 1> (x, x)", A4)().node
    assert _parts_of(node, [4, None], 4) == [4, 0]
    with pytest.raises(Refusal, match="the sizes of the parts"):
        _parts_of(node, [5, None], 4)


def test_a_product_with_a_factor_that_is_not_known():
    assert product([2, None]) is None
    assert product([2, 3]) == 6


@pytest.mark.parametrize("axis", [0, 1])
def test_a_scale_alone_makes_no_bias_of_a_constant_matrix(axis):
    setting = case("Gemm(w, x)", affine((4, 5)[axis], axis, shift=False), x=(6, 5), w=normal(4, 6))()
    (transfer,) = setting.answers("backward")
    assert 2 not in transfer.constants


def test_the_terms_of_the_bias_of_a_gemm():
    given = affine(6, 1)
    (transfer,) = case("Gemm <alpha = -2.0> (x, w)", given, x=(2, 6), w=(matrix := normal(6, 4)))().answers("forward")
    np.testing.assert_allclose(transfer.constants[2].magnitude().ravel(), 2 * given.abs_terms @ np.abs(matrix), rtol=1e-6)


def test_sizes_and_probe_of_an_einsum():
    setting = case('Einsum <equation = "btc,co->bto"> (x, w)', affine(4, 2), x=(-2, 5, -6), w=normal(6, 4))()
    dim = Dim(setting.node.inputs[0], 0)
    assert setting.row.sizes(setting.node, [(dim, 5, None), (6, 4)]) == (dim, 5, 4)
    assert setting.row.probe_shapes(setting.node, setting.view)[0][2] == 6


def test_the_work_of_a_product_and_of_what_moves_elements():
    setting = case("Gemm(x, w)", affine(6, 1), x=(2, 6), w=normal(6, 4))()
    assert setting.row.work(setting.node, [np.ones((2, 6)), normal(6, 4)], 8) == 8 * 6 / AT_ONCE
    moving = ("DepthToSpace", "SpaceToDepth", "ReverseSequence", "CenterCropPad", "QuantizeLinear", "Relu")
    for op in moving:
        assert OPERATORS[op].work(None, [np.ones(6)], 2) == 8


def test_an_average_of_nothing_has_no_terms():
    setting = case("GlobalAveragePool(x)", A4, x=(2, 0, 6, 6))()
    assert setting.row.terms(setting.node, setting.view) == 0
    setting = case("GlobalAveragePool(x)", A4)()
    assert setting.row.terms(setting.node, setting.view) == 36


def test_how_long_an_axis_may_be():
    assert countable(1 << 24) == 1 << 24
    with pytest.raises(Refusal, match=r"^an axis of 16777217 elements is too long"):
        countable((1 << 24) + 1)


def test_a_probe_of_a_product_of_a_number():
    """Which is none; the fold is looked at by itself."""
    setting = case("MatMul(x, w)", affine(4, 1), x=(), w=normal(6, 4))()
    assert setting.row.probe_shapes(setting.node, setting.view) == {0: (3, 6)}


def test_the_work_of_an_average_over_all():
    assert OPERATORS["GlobalAveragePool"].work(None, [np.ones(6)], 2) == 8


def test_the_product_of_elements_of_what_is_no_list_of_sizes():
    node = case("ReduceProd <keepdims = 0> (x)", A4)().node
    listed = np.empty(2, object)
    listed[:] = [Dim(node.inputs[0], 0), 3]
    for wrong in (None, np.ones(2), listed.reshape(2, 1), np.array([2, 3], object)):
        assert product_of_elements(node, None, [wrong]) is None
    assert product_of_elements(node, None, [listed]).item().number == 3


# ---- the planner ----


def test_a_batch_normalization_of_a_constant_is_reported_with_its_channels():
    text = "(float[2,4,3,3] x) => (float y) { n = BatchNormalization(k, s, t, m, v) y = Add(x, n) }"
    (fold,) = fastbn.fold(model(text, k=normal(2, 4, 3, 3), **norm(4)), verify=False).folded
    assert fold.channels == 4


def test_sizes_that_are_supposed_beside_those_that_are_known():
    proto = model("(float[N,1,H] x) => (float y) { y = Relu(x) }")
    assert supposed_shapes(Index(storage.load(proto))) == {"x": (FIRST_SIZE, 1, OTHER_SIZE)}


def test_how_many_batch_normalizations_planning_leaves():
    text = """(float[N,4,6,6] x) => (float y, float z, float u) {
        a = Relu(x) y = BatchNormalization(a, s, t, m, v)
        c = Sigmoid(x) d = Mul(c, k) z = Add(d, l) e = Tanh(x) f = Mul(e, l) u = Add(f, k)
    }"""
    planning = plan(Index(storage.load(model(text, k=normal(4, 1, 1), l=normal(4, 1, 1, seed=5), **norm(4)))))
    assert [kept.ops for kept in planning.kept] == [("BatchNormalization",), ("Mul", "Add"), ("Mul", "Add")]
    assert planning.batch_norms_left == 1


def test_a_scale_that_two_quantized_weights_share_is_written_beside_it():
    text = """(float[N,3,8,8] x) => (float y, float z) {
        w = DequantizeLinear(q, k) c = Conv(x, w) y = BatchNormalization(c, s, t, m, v)
        u = DequantizeLinear(r, k) z = Conv(x, u)
    }"""
    weights = np.arange(4 * 3 * 9).reshape(4, 3, 3, 3).astype(np.int8)
    proto = model(text, q=weights, r=weights, k=np.float32(0.002), **norm(4, positive=True))
    folded = fastbn.fold(proto, verify=False).model
    assert folded.graph.node[0].input[1] == "w.scale"
    assert_same(proto, folded)


def test_a_weight_that_a_caller_may_override():
    proto = conv_bn()
    proto.graph.input.append(onnx.helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, [4, 3, 3, 3]))
    (kept,) = fastbn.fold(proto, verify=False).kept
    assert kept.code == "overridable-weight"


def test_two_neighbors_along_different_axes_stay():
    text = "(float[2,4,6] x) => (float y) { a = Sigmoid(x) d = Mul(a, k) e = Add(d, l) y = Sigmoid(e) }"
    result = fastbn.fold(model(text, k=normal(4, 1), l=normal(6, seed=1)), verify=False)
    assert result.folded == []


def test_a_product_by_channels_is_no_multiple():
    """x + k x is a multiple of x only where k is one number."""
    text = "(float[2,4,5,5] x) => (float y) { p = Mul(x, k) c = Conv(x, w, b) d = Sum(c, x, p) y = BatchNormalization(d, s, t, m, v) }"
    proto = model(text, k=normal(4, 1, 1), w=normal(4, 4, 1, 1), b=normal(4), **norm(4))
    assert_same(proto, fastbn.fold(proto, verify=False).model)


def test_what_a_constant_would_have_to_add_of_the_data():
    """Of the operands of the sum only the convolution can make up for x."""
    text = "(float[2,4,5,5] x) => (float y) { c = Conv(x, w, b) k = Add(h, h) d = Sum(x, k, c) y = BatchNormalization(d, s, t, m, v) }"
    proto = model(text, h=normal(4, 1, 1), w=normal(4, 4, 1, 1), b=normal(4), **norm(4))
    assert_same(proto, fastbn.fold(proto, verify=False).model)


@pytest.mark.parametrize("op", ["Mul", "Div"])
def test_a_product_of_numbers_stays_a_number(op):
    """A joined affine of rank 1 would make a vector of it."""
    text = f"""(float[1,1] x) => (float y) {{
        r = Tanh(x) n = BatchNormalization(r, s, t, m, v) a = Squeeze(n) b = Neg(a) d = {op}(a, b) y = Mul(d, k)
    }}"""
    zero = np.zeros(1, np.float32)
    proto = model(text, k=np.float32(3), **norm(1) | {"t": zero, "m": zero})
    folded = fastbn.fold(proto, verify=False).model
    assert ops(folded) == f"Tanh Squeeze Neg {op} Mul"
    assert_same(proto, folded)


def test_a_sibling_that_is_malformed():
    text = "(float[2,4,6,6] x) => (float y) { n = BatchNormalization(x, s, t, m, v) c = Conv <rate = 3> (x, w) y = Add(c, n) }"
    with pytest.raises(ModelError, match=r"attributes that Conv has at opset .*, got 'rate' - at `c`"):
        fastbn.fold(model(text, w=normal(4, 4, 1, 1), **norm(4)), verify=False)


def test_neighbors_go_into_a_batch_normalization_that_stays():
    """They wait for it, and do not wait for ever."""
    text = """(float[2,4,6,6] x) => (float y) {
        r = Tanh(x) d = Mul(r, k) e = Add(d, l) n = BatchNormalization(e, s, t, m, v) y = Sigmoid(n)
    }"""
    proto = model(text, k=normal(4, 1, 1), l=normal(4, 1, 1, seed=1), **norm(4))
    folded = fastbn.fold(proto, skip="n", verify=False).model
    assert ops(folded) == "Tanh BatchNormalization Sigmoid"
    assert_same(proto, folded)


def test_a_shift_stays_in_an_add_for_a_product_alone():
    """A Relu is no reason, though the model has a MatMul elsewhere."""
    text = """(float[2,4,6,6] x) => (float y) {
        c = Conv(x, w) r = Relu(c) n = BatchNormalization(r, s, t, m, v) q = Sigmoid(n) y = MatMul(q, o)
    }"""
    proto = model(text, w=normal(4, 4, 1, 1), o=normal(6, 6), **norm(4, positive=True))
    assert [kept.code for kept in fastbn.fold(proto, verify=False).kept] == ["shift-through-relu"]


@pytest.mark.parametrize("scale", [1e-20, 1e-14])
def test_a_vector_of_weights_that_two_folds_make_zero(scale):
    """As a matrix, it takes one scale only where both would make all of it zero."""
    text = """(float[2,6] x) => (float[2,1] y) {
        n = BatchNormalization(x, s, t, t, v) a = MatMul(n, w) u = Unsqueeze(a, j) y = BatchNormalization(u, s1, t1, t1, v1)
    }"""
    six, one = np.ones(6, np.float32), np.ones(1, np.float32)
    parameters = {"s": scale * six, "t": 0 * six, "v": six, "s1": scale * one, "t1": 0 * one, "v1": one}
    proto = model(text, w=np.full(6, 1e-10, np.float32), j=ints(1), **parameters)
    result = fastbn.fold(proto, verify=False)
    assert [kept.code for kept in result.kept] == (["flush-to-zero"] if scale == 1e-20 else [])
    assert onnx.numpy_helper.to_array(result.model.graph.initializer[0]).all()
