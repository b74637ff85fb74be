"""What fuzzing found: the smallest model of each fault, folded as the fuzzer did. tools/fuzz_models.py looks for more."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from sketch import conv_bn, model, norm, normal, ops

import fastbn
from fastbn.graph import runtime
from fastbn.graph.model.index import Index
from fastbn.graph.model.storage import load
from fastbn.graph.parity import fold_parity, model_parity, probe


@pytest.mark.parametrize("version", [1 << 31, -(1 << 31) - 1, (1 << 63) - 1, -(1 << 63)])
def test_a_version_of_64_bits(version):
    """onnx's checker takes 32."""
    proto = conv_bn()
    proto.opset_import.append(helper.make_opsetid("own", version))
    proto.functions.append(helper.make_function("own", "F", ["a"], ["b"], [helper.make_node("Relu", ["a"], ["b"])], []))
    assert Index(load(proto)).shape(Index(load(proto)).main.values["y"]) is not None
    assert ops(fastbn.fold(proto, verify=False).model) == "Conv"


def test_an_if_whose_branch_says_that_it_is_a_graph_and_has_none():
    proto = conv_bn(
        """(float[N,3,8,8] x) => (float[N,4,6,6] y) {
            k = If (yes) <then_branch = a () => (p) { p = Identity(b) }, else_branch = e () => (q) { q = Neg(b) }>
            c = Conv(x, w, k)
            y = BatchNormalization(c, s, t, m, v)
        }""",
        yes=np.bool_(True),
    )
    proto.graph.node[0].attribute[1].ClearField("g")
    proto.graph.node[0].attribute.add(name="more", type=onnx.AttributeProto.GRAPHS).graphs.add(name="third")
    with pytest.raises(fastbn.ModelError):
        fastbn.fold(proto, verify=False)
    del proto.graph.node[0].attribute[2]
    fastbn.fold(proto, verify=False)


@pytest.mark.parametrize("kind", [16384, 99, -1, (1 << 31) - 1])
def test_a_type_that_onnx_does_not_have(kind):
    text = """(float[N,3,8,8] x) => (float[N,4,6,6] y) {
        c = Conv(x, w, b) r = Relu(c) n = BatchNormalization(r, s, t, m, v) y = Conv(n, u)
    }"""
    proto = conv_bn(text, u=normal(4, 4, 1, 1))
    for name in ("c", "r", "n"):
        proto.graph.value_info.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, 4, 6, 6]))
        proto.graph.value_info[-1].type.tensor_type.elem_type = kind
    assert len(fastbn.fold(proto, verify=False).folded) == 1
    index = Index(load(proto))
    assert index.kind(index.main.values["c"]) in (0, TensorProto.FLOAT)


def test_a_constant_that_widens_a_product_of_a_vector():
    """The sizes that the caller gives do not fit, so that only the rank of the input is known."""
    proto = model(
        "(float[N] x) => (float[1,3] y) { h = MatMul(x, w) s2 = Mul(h, k) y = BatchNormalization(s2, s, t, m, v) }",
        w=normal(5, 3), k=normal(1, 3), **norm(3),
    )  # fmt: skip
    result = fastbn.fold(proto, verify=False, input_shapes={"x": [1]})
    assert not result.folded
    runtime.session(result.to_bytes())


def test_a_probe_of_gigabytes_is_not_made(monkeypatch):
    """What a transposed convolution cuts off has to be there."""
    made, normal_of = [], probe._normal

    def counted(shapes):
        made.extend(shapes.values())
        return normal_of(shapes)

    monkeypatch.setattr(probe, "_normal", counted)
    text = """(float[N,3,8,8] x) => (float[N,4,6,6] y) {
        c = ConvTranspose <pads = [0,0,0,8388608]> (x, w, b) y = BatchNormalization(c, s, t, m, v)
    }"""
    proto = conv_bn(text, w=normal(3, 4, 3, 3))
    assert fastbn.fold(proto).parity.status == "not-run"
    assert all(np.prod([float(size) for size in shape]) <= probe.TOO_LARGE for shape in made)


def test_where_no_memory_is_left_the_parity_is_not_run(monkeypatch):
    def fail(*arguments, **options):
        raise MemoryError

    monkeypatch.setattr(fold_parity, "_check", fail)
    monkeypatch.setattr(model_parity, "reference_of", fail)
    result = fastbn.fold(conv_bn())
    assert (result.parity.status, result.folded[0].note) == ("not-run", "not run: the memory does not suffice")
    assert result.parity.reason == "the memory does not suffice for its inputs and outputs"
    monkeypatch.undo()
    monkeypatch.setattr(model_parity._Check, "parity", fail)
    assert fastbn.fold(conv_bn()).parity.status == "not-run"


def test_onnxruntime_prints_nothing_where_it_refuses_a_model(monkeypatch, capfd):
    """Its Python part would print that it tries once more."""

    def refuse(*arguments):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(onnxruntime.InferenceSession, "_create_inference_session", refuse)
    assert fastbn.fold(conv_bn()).parity.status == "not-run"
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("head", ["(float[4] x) => (float[1,5] y) { ", "(float x) => (float[1,5] y) { "])
def test_a_batch_normalization_of_a_value_without_channels(head):
    proto = model(head + "e = BatchNormalization(x, s, t, m, v) y = Gemm(e, k) }", k=normal(4, 5), **norm(4))
    assert [each.code for each in fastbn.fold(proto, verify=False).kept] == ["axis"]


def test_a_product_of_one_channel_that_a_batch_normalization_takes_for_more():
    text = "(float[1,1,1,1] x) => (float[1,4,1,1] y) { e = Mul(x, k) y = BatchNormalization(e, s, t, m, v) }"
    assert [each.bn for each in fastbn.fold(model(text, k=normal(1), **norm(4)), verify=False).kept] == ["y"]


@pytest.mark.parametrize("form", ["conv", "affine"])
def test_a_batch_normalization_of_more_channels_than_its_data_has_is_not_rewritten(form):
    """onnxruntime loads it, and no Conv, Mul or Add of these sizes."""
    text = "(float[N,3,5] x) => (float[N,4,5] y) { r = Relu(x) y = BatchNormalization(r, s, t, m, v) }"
    result = fastbn.fold(model(text, **norm(4)), rewrite_left=form, verify=False)
    assert (len(result.rewritten), [each.bn for each in result.kept]) == (0, ["y"])


def test_a_domain_that_is_no_text():
    entry = helper.make_opsetid("ab", 20).SerializeToString().replace(b"ab", b"\xff\xfe")
    data = conv_bn().SerializeToString() + bytes([0x42, len(entry)]) + entry  # opset_import
    assert fastbn.fold(data, verify=False).folded


def test_no_shift_is_left_to_an_add_of_integers():
    """The type of the data is wrong, and no Add of it could have the shift."""
    text = "(uint8[N,4] x) => (float[N,5] y) { e = BatchNormalization(x, s, t, m, v) y = MatMul(e, k) }"
    assert not fastbn.fold(model(text, k=normal(4, 5), **norm(4)), verify=False).folded


def test_statistics_of_a_model_that_onnxruntime_refuses():
    text = """(float[N,3,8,8] x) => (float[N,4,6,6] y) {
        c = Conv <kernel_shape = [3]> (x, w, b) r = Relu(c) y = BatchNormalization(r, s, t, m, v)
    }"""
    with pytest.raises(fastbn.ModelError, match=r"^Cannot load the model in onnxruntime: "):
        fastbn.reestimate(conv_bn(text), np.ones((4, 3, 8, 8), np.float32))


@pytest.mark.parametrize("key", ["location", "offset", "length"])
def test_a_place_of_external_data_that_is_no_text(key, tmp_path):
    proto = conv_bn()
    tensor = TensorProto(name="k", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for name, value in {"location": "k.data", "offset": "0", "length": "16", key: "PLACE"}.items():
        tensor.external_data.add(key=name, value=value)
    proto.graph.initializer.append(tensor)
    (tmp_path / "in.onnx").write_bytes(proto.SerializeToString().replace(b"PLACE", b"\xff\xfe\xff\xfe\xff"))
    with pytest.raises(fastbn.ModelError, match=rf"^Expected a {key} of external data in UTF-8, got b'.* - at `k`$"):
        load(tmp_path / "in.onnx")


def test_a_sequence_of_nothing():
    text = """(float[N,3,8,8] x) => (float[N,4,6,6] y, int64 n) {
        c = Conv(x, w, b) y = BatchNormalization(c, s, t, m, v)
        q = SplitToSequence(e) n = SequenceLength(q)
    }"""
    proto = conv_bn(text, e=np.empty(0, np.float32))
    assert ops(fastbn.fold(proto, verify=False).model) == "Conv SplitToSequence SequenceLength"


def test_bytes_that_are_too_few():
    proto = conv_bn()
    tensor = proto.graph.initializer[0]
    tensor.raw_data = tensor.raw_data[:-1]
    with pytest.raises(fastbn.ModelError, match=r"^Expected \d+ bytes, got \d+ - at "):
        load(proto).array(tensor)
    with pytest.raises(fastbn.ModelError, match=r"^Expected \d+ bytes, got \d+ - at "):
        fastbn.fold(proto, verify=False)


def test_a_type_that_is_wrong_inside_a_function():
    text = """< ir_version: 10, opset_import: ["": 21, "own": 1] >
    main (float[N,4] x) => (float[N,4] y) { y = own.block(x, s, t, m, v) }
    < domain: "own", opset_import: ["": 21] >
    block (x, s, t, m, v) => (y) { b = BatchNormalization(x, s, t, m, v) r = Relu(b) y = Neg(r) }"""
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in norm(4).items())
    proto.functions[0].value_info.append(helper.make_tensor_value_info("r", TensorProto.UINT8, ["N", 4]))
    onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])  # loads it
    result = fastbn.fold(proto, rewrite_left="affine")
    assert (ops(result.model), result.parity.status) == ("Mul Add Relu Neg", "ok")


@pytest.mark.parametrize("rewrite_left", [None, "affine"])
@pytest.mark.parametrize("channels", [0, (1 << 31) + 8, 1 << 57, (1 << 63) - 1])
@pytest.mark.parametrize("body", ["a = Mul(x, k) c = Add(a, k)", "c = Relu(x)", "c = Identity(x)"])
def test_data_that_declares_other_channels(body, channels, rewrite_left):
    """Neither a Mul of all channels nor a constant that gets as many may meet them: onnxruntime would call that invalid."""
    text = f"(float[2,9,5,5] x) => (float y) {{ {body} y = BatchNormalization(c, s, t, m, v) }}"
    proto = model(text, opset=13, k=np.float32([2]), **norm(4))
    proto.graph.input[0].type.tensor_type.shape.dim[1].dim_value = channels
    runtime.session(proto.SerializeToString())
    result = fastbn.fold(proto, verify=False, rewrite_left=rewrite_left)
    assert (len(result.kept), result.rewritten) == (1, [])
    runtime.session(result.to_bytes())


def test_a_value_that_declares_a_negative_size():
    """A Conv of two inputs does not tell its channels; a Mul in the place of the batch normalization would meet those that are declared."""
    text = "(float[2,M,5,5] x, float[C,M,1,1] w) => (float y) { c = Conv(x, w) y = BatchNormalization(c, s, t, m, v) }"
    proto = model(text, opset=13, **norm(4))
    proto.graph.value_info.append(helper.make_tensor_value_info("c", TensorProto.FLOAT, [2, -7, 5, 5]))
    runtime.session(proto.SerializeToString())
    result = fastbn.fold(proto, verify=False, rewrite_left="affine")
    assert ops(result.model) == "Conv Mul Add"
    runtime.session(result.to_bytes())


def test_a_batch_normalization_that_declares_another_batch_than_its_data():
    """onnxruntime goes on with what is declared; without the batch normalization it would see both."""
    text = """(int64[2] i, float[16384,4] x) => (float[2,5] y) {
        e = Gather(table, i) b = BatchNormalization(x, s, t, m, v) j = Concat <axis = 1> (e, b) y = Gemm(j, w, q)
    }"""
    proto = model(text, table=normal(3, 3), w=normal(7, 5), q=normal(5), **norm(4))
    for name, width in (("e", 3), ("b", 4), ("j", 7)):
        proto.graph.value_info.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, width]))
    runtime.session(proto.SerializeToString())
    result = fastbn.fold(proto, verify=False)
    runtime.session(result.to_bytes())
    (kept,) = result.kept
    assert kept.code == "axis"
    assert kept.reason.endswith("; forwards: it is declared to give another shape than that of 'x'")


@pytest.mark.parametrize("factors", ["n, n, n", "n, k"])
def test_a_product_of_sizes_that_is_none(factors):
    text = f"""(float[N,4,H,W] x) => (float y) {{
        n = Shape(x) p = Mul({factors}) r = Reshape(x, p) y = BatchNormalization(r, s, t, m, v)
    }}"""
    assert len(fastbn.fold(model(text, k=np.ones(3, np.int64), **norm(4)), verify=False).kept) == 1


def test_a_computed_size_beyond_64_bits():
    text = """(float[N,3,8,8] x) => (float[N,4,6,6] y, float z) {
        c = Conv(x, w, b) y = BatchNormalization(c, s, t, m, v)
        p = MaxPool <kernel_shape = [1,1], pads = [0,0,4294967296,4294967296]> (x) z = Flatten(p)
    }"""
    assert ops(fastbn.fold(conv_bn(text), verify=False).model) == "Conv MaxPool Flatten"


SIZES = {
    "an average over all": "n = BatchNormalization(x, s, t, m, v) g = GlobalAveragePool(n) y = Conv(g, w)",
    "a rewritten one": "r = Relu(x) n = BatchNormalization(r, s, t, m, v) y = Sigmoid(n)",
    "an average over some": "n = BatchNormalization(x, s, t, m, v) g = AveragePool <kernel_shape = [2,2]> (n) y = Conv(g, w)",
    "a joined one": "c = Conv(x, w) d = Conv(x, w) e = Add(c, d) y = BatchNormalization(e, s, t, m, v)",
    "a softmax behind": "c = Conv(x, w) n = BatchNormalization(c, s, t, m, v) y = Softmax <axis = 2> (n)",
}


@pytest.mark.parametrize("size", [0, 1 << 57, (1 << 63) - 1])
@pytest.mark.parametrize("body", SIZES)
def test_a_plane_that_declares_sizes_that_no_array_has(body, size):
    proto = model(f"(float[2,4,H,8] x) => (float y) {{ {SIZES[body]} }}", w=normal(4, 4, 1, 1), **norm(4))
    proto.graph.input[0].type.tensor_type.shape.dim[2].dim_value = size
    result = fastbn.fold(proto, rewrite_left="affine")
    assert len(result.folded) + len(result.rewritten) == 1
    runtime.session(result.to_bytes())


def test_a_batch_of_0_is_one_that_is_not_known():
    """As exporters write it; a Flatten of nothing would tell no channels."""
    text = "(float[N,4,2,3] x) => (float y) { n = BatchNormalization(x, s, t, m, v) f = Flatten(n) y = Gemm(f, w) }"
    proto = model(text, w=normal(24, 5), **norm(4))
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 0
    assert ops(fastbn.fold(proto, verify=False).model) == "Flatten Gemm"


@pytest.mark.parametrize("size", [1 << 30, (1 << 59) + 3])
@pytest.mark.parametrize("weight", [True, False])
def test_quantized_values_that_are_fewer_than_their_sizes_say(weight, size):
    """A weight, and a bias, that would take terabytes."""
    text = """(float[1,3,8,8] x) => (float[1,4,A,B] y) {
        w = DequantizeLinear <axis = 0> (q, sw) b = DequantizeLinear <axis = 0> (r, sb)
        c = Conv(x, w, b) y = BatchNormalization(c, s, t, m, v)
    }"""
    constants = {
        "q": np.zeros((4, 3, 3, 3), np.int8),
        "r": np.zeros(4, np.int32),
        "sw": np.ones(4, np.float32),
        "sb": np.ones(4, np.float32),
    }
    proto = model(text, **constants, **norm(4, positive=True))
    tensor = next(each for each in proto.graph.initializer if each.name == ("q" if weight else "r"))
    tensor.dims[-1] = size
    with pytest.raises(fastbn.FastbnError, match=r"bytes|bias|shape"):
        fastbn.fold(proto, verify=False)
