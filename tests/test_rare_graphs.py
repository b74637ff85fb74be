"""What only few models, or none that an exporter writes, make the ONNX part do: refusals, guards, and answers of "not known"."""

import errno
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from rows import affine, assert_refused, case, ints
from sketch import conv_bn, model, norm, normal

import fastbn
from fastbn.graph import captions, digests, drawing
from fastbn.graph.model import cropping, extent, storage
from fastbn.graph.model.constant import Dense, Tensor
from fastbn.graph.model.index import Index
from fastbn.graph.model.sequences import SEQUENCES
from fastbn.graph.ops import normalization, parts, placing
from fastbn.graph.parity import branches, feeds, reference
from fastbn.graph.parity.verdict import ModelsDiffer
from fastbn.graph.planner.view import GraphView
from fastbn.graph.reasons import Refusal
from fastbn.graph.rewrite import version, workdir, writer
from fastbn.graph.rewrite.inference import as_inference

REFUSED = {
    "Gather, from the end": (
        "backward",
        "axis-unknown",
        "the rank before Gather",
        ("Gather <axis = -2> (x, i)", affine(4, 1)),
        {"i": ints(0)},
    ),
    "Slice, from the end": (
        "backward",
        "axis-unknown",
        "the rank before Slice",
        ("Slice (x, k, l, a)", affine(4, 1)),
        {"k": ints(0), "l": ints(2), "a": ints(-1)},
    ),
    "Unsqueeze, from the end": (
        "forward",
        "axis-unknown",
        "the rank of the value at Unsqueeze",
        ("Unsqueeze (x, a)", affine(4, 1)),
        {"a": ints(-1)},
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_rank_that_is_not_known(name):
    direction, code, part, arguments, constants = REFUSED[name]
    assert_refused(case(*arguments, unknown=True, **constants), direction, code, part)


def test_a_batch_norm_of_a_constant_that_hands_out_statistics():
    text = """(float[1] x) => (float[1] z, float[2,4,3] q) {
        z = Relu(x) y, a, b = BatchNormalization <training_mode = 1> (k, s, t, m, v) q = Add(y, a)
    }"""
    result = fastbn.fold(model(text, k=normal(2, 4, 3), **norm(4)))
    assert [(each.code, each.reason) for each in result.kept] == [("training", "it hands out statistics of a constant")]


TENSORS = {
    "a negative size": (TensorProto(data_type=TensorProto.FLOAT, dims=[2, -1], raw_data=b""), "sizes that are not negative"),
    "raw strings": (TensorProto(data_type=TensorProto.STRING, dims=[1], raw_data=b"a"), "strings in their own field"),
    "too few numbers": (TensorProto(data_type=TensorProto.FLOAT, dims=[3], float_data=[1.0]), r"values for shape \[3\]"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_without_its_values(name):
    tensor, message = TENSORS[name]
    source = storage.load(conv_bn())
    with pytest.raises(fastbn.ModelError, match=f"^Expected {message}"):
        source.array(tensor)


@pytest.mark.parametrize(("kind", "dims"), [(TensorProto.STRING, [2]), (TensorProto.FLOAT, [2, -2])])
def test_external_values_that_have_no_size(kind, dims):
    with pytest.raises(fastbn.ModelError, match=r"^Expected external data of numbers, in sizes that are not negative"):
        storage._bytes_of(TensorProto(data_type=kind, dims=dims), "w")


def test_what_is_known_of_no_value_and_of_lists():
    proto = model("(float[2,4] x) => (float[2,4] y) { y = Reshape(x, k) z = Mul(x, f) }", k=ints(2, 4), f=normal(1))
    index = Index(storage.load(proto))
    view = GraphView(index)
    assert index.shape(None) is None
    assert view.shape(None) is None
    assert view.sizes(None) is None
    assert index.elements(index.main.find("k")) == [2, 4]
    assert index.elements(index.main.find("f")) is None


def test_inputs_of_text_and_of_numbers_that_no_model_is_fed():
    rng = np.random.default_rng(0)
    text = helper.make_tensor_value_info("t", TensorProto.STRING, [2])
    assert feeds._values(text, (2,), "normal", rng).tolist() == ["a", "a"]
    with pytest.raises(feeds.ModelNotRun, match="the input 'c' has type complex64"):
        feeds._values(helper.make_tensor_value_info("c", TensorProto.COMPLEX64, [2]), (2,), "normal", rng)


def test_a_large_output_is_kept_in_a_file(monkeypatch):
    monkeypatch.setattr(reference, "LARGEST_IN_MEMORY", 32)
    small, large = np.arange(4.0), np.arange(10.0).reshape(2, 5)
    assert not isinstance(reference.copied(small), np.memmap)
    kept = reference.copied(large)
    assert isinstance(kept, np.memmap)
    assert kept is not large
    np.testing.assert_array_equal(kept, large)


def test_outputs_of_branches_that_cannot_be_compared():
    one = np.ones(3, np.float32)
    for nothing in ([one], np.empty(0, np.float32), np.array(["a"], object)):
        assert branches._judged("y", "then branches", nothing, nothing, nothing, 1e-7) is None
    assert branches._judged("y", "then branches", one, one, one, 1e-7) is not None
    with pytest.raises(ModelsDiffer, match=r"output 'y' of the then branches: shapes \(3,\) and \(1,\) differ"):
        branches._judged("y", "then branches", one, one[:1], one, 1e-7)


def test_an_output_without_elements_proves_nothing():
    text = """(float[1,3,8,8] x) => (float[1,4,6,6] y, float[0,4,6,6] e) {
        c = Conv(x, w, b) y = BatchNormalization(c, s, t, m, v) e = Slice(y, z, z, z)
    }"""
    parity = fastbn.fold(conv_bn(text, z=ints(0))).parity
    assert (parity.status, parity.compared) == ("ok", ("y",))


def renamed(original):
    def rebuild(self):
        original(self)
        self.proto.graph.node[0].name = "another"

    return rebuild


def twice(original):
    def rebuild(self):
        original(self)
        self.proto.graph.initializer.append(self.proto.graph.initializer[0])

    return rebuild


def reshaped(original):
    def write(self, node, slot, constant):
        name = original(self, node, slot, constant)
        next(tensor for tensor in self.proto.graph.initializer if tensor.name == name).dims.append(1)
        return name

    return write


@pytest.mark.parametrize(
    ("step", "change", "message"),
    [
        ("_take_over_names", renamed, "Conv 'another' is in the place of Conv"),
        ("_take_over_names", twice, "two initializers of one name"),
        ("_write_constant", reshaped, "is not the constant that is planned"),
    ],
)
def test_a_written_model_that_is_not_the_planned_one(step, change, message, monkeypatch):
    monkeypatch.setattr(writer._Writer, step, change(getattr(writer._Writer, step)))
    with pytest.raises(fastbn.ModelError, match=message):
        fastbn.fold(conv_bn(), verify=False)


def test_models_with_other_inputs_are_no_versions_of_each_other():
    one, other = ({"x": TensorProto(), name: TensorProto()} for name in ("a", "b"))
    assert not version._same_inputs(one, other)


def test_what_lasts_of_bodies():
    text = """(bool c, float[4] x) => (float[4] y) { y = If (c) <
        then_branch = g () => (float[4] p) <float[1] k = {2}> { n = Mul(k, k) p = Sin(x) },
        else_branch = h () => (float[4] q) { q = Cos(x) }
    > }"""
    assert {op for op, _ in version._lasting(model(text))} == {"Sin", "Cos", "If"}


def test_names_that_differ_in_two_places_are_numbered():
    names = [f"{'p' * 90}{first}{'q' * 90}{last}" for first, last in ("a1", "a2", "b1")]
    shown = captions._apart(names)
    assert len(set(shown.values())) == 3
    assert [name[-2:] for name in shown.values()] == ["~1", "~2", "~3"]


def test_an_input_of_an_operator_without_a_definition():
    assert drawing._slot_name(SimpleNamespace(op="Conv", domain=""), 1, 17) == "W"
    assert drawing._slot_name(SimpleNamespace(op="Conv", domain="com.example"), 1, 17) == "input 1"


def test_a_file_that_is_not_there_has_no_digest(tmp_path):
    with pytest.raises(fastbn.StorageError, match=r"^Cannot use '.*gone': no such file or directory$"):
        digests.Digest.of_file(tmp_path / "gone")


def test_sequences_that_no_operator_takes():
    arrays = [np.zeros(2, dtype) for dtype in (np.float32, np.int64)]
    text = "(float[1] x) => (float[4] y) { q = SequenceConstruct(a, b) y = ConcatFromSequence <axis = 0> (q) }"
    index = Index(storage.load(model(text, a=arrays[0], b=arrays[1])))
    assert not index.is_constant(index.main.find("y"))
    assert "ConcatFromSequence" in SEQUENCES


def test_rows_of_nodes_that_do_not_fit():
    node = SimpleNamespace(op="Unsqueeze", label="y")
    with pytest.raises(fastbn.ModelError, match=r"^Expected axes of a value of rank 3, got \[0\] - at `y`$"):
        placing.axis_beside(node, 3, [0], 3, True)
    with pytest.raises(fastbn.ModelError, match=r"^Expected a scale and a bias that broadcast, got shapes \(\(3,\), \(4,\)\) - at `y`$"):
        normalization._broadcast(node, (3,), (4,))
    with pytest.raises(Refusal, match="5 channels meet a part of 4"):
        parts._extended(affine(5, 1), [4, 2], 0, 1)


def test_constants_and_what_they_meet():
    with pytest.raises(fastbn.ModelError, match=r"^Expected a constant that broadcasts with what it meets"):
        Dense.zeros((3,), np.dtype(np.float32)).affine(np.ones(4), 0.0, 0.0)
    assert Tensor(np.dtype(np.float32), (3,), lambda: np.ones(3, np.float32)).bad_channels() == []


def test_messages_above_2_gb(monkeypatch):
    proto = conv_bn()
    data = proto.SerializeToString()
    monkeypatch.setattr(storage, "PROTOBUF_LIMIT", 64)
    for use in (lambda: storage.load(data), lambda: storage.serialize(proto, "m")):
        with pytest.raises(fastbn.ModelError, match=rf"^Expected a model below 2 GB without its external data, got {len(data)} bytes"):
            use()


def test_an_inference_form_is_its_own():
    text = (
        "(float[1,3,8,8] x) => (float[1,4,6,6] y) { c = Conv(x, w, b) d = Dropout(c) y = BatchNormalization <is_test = 1> (d, s, t, m, v) }"
    )
    source = as_inference(storage.load(conv_bn(text, opset=6)))
    assert as_inference(source) is source
    drop = next(node for node in source.proto.graph.node if node.op_type == "Dropout")
    assert [(each.name, each.i) for each in drop.attribute] == [("is_test", 1)]


def test_a_folder_that_another_run_removes_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(workdir, "_lock", lambda descriptor: False)
    with pytest.raises(fastbn.StorageError, match=r"^Cannot make a working folder in '.*': another process removes it$"):
        workdir.Workdir(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_gone_before_it_is_locked(tmp_path, monkeypatch):
    def gone(path, flags):
        raise FileNotFoundError

    monkeypatch.setattr(workdir.os, "open", gone)
    with pytest.raises(fastbn.StorageError, match="another process removes it"):
        workdir.Workdir(tmp_path)


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def flock(descriptor, operation):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(workdir.fcntl, "flock", flock)
    with workdir.Workdir(tmp_path) as folder:
        assert folder.path.is_dir()
    assert not list(tmp_path.iterdir())


def test_parts_that_are_not_as_many_as_outputs():
    setting = case("Split <axis = 1> (x, k)", affine(4, 1), outputs="y, z", k=ints(1, 1, 2))
    with pytest.raises(fastbn.ModelError, match=r"^Expected 2 sizes of parts, got 3 - at `y`$"):
        setting().answers("forward")


def test_a_matrix_of_three_axes():
    with pytest.raises(fastbn.ModelError, match=r"^Expected a matrix, got shape \(2, 4, 4\) - at `y`$"):
        case("Gemm(w, x)", affine(2, 0), x=(4, 3), w=normal(2, 4, 4))().answers("backward")


def test_one_number_for_all_parts_of_a_sequence():
    number = affine(1, None)
    (transfer,) = case("SequenceAt(q, k)", number, before="q = SplitToSequence <axis = 1> (x, l)", k=ints(0)[0], l=ints(2)[0])().answers(
        "backward"
    )
    assert transfer.passed_on == [(0, number)]


def test_an_operator_that_the_opset_does_not_have_is_no_affine():
    view = GraphView(
        Index(storage.load(model("(float[2,4] x) => (float[2,4] y) { y = Mul <broadcast = 1> (x, k) }", opset=6, k=normal(4))))
    )
    assert view._lift(view.index.order[0]) is None


def test_a_model_that_cannot_be_read_again(tmp_path, monkeypatch):
    onnx.save(conv_bn(), tmp_path / "in.onnx")
    source = storage.load(tmp_path / "in.onnx")

    def closed(path):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", closed)
    with pytest.raises(fastbn.StorageError, match=r"in\.onnx': input/output error$"):
        source.to_bytes()


def test_bytes_that_are_not_all_there():
    with pytest.raises(fastbn.ModelError, match=r"^Expected a file of at least 7 bytes, got 6 - at `w`$"):
        storage._check_length(b"ab", 4, 3, Path("w"))

    def fails():
        raise ValueError("too large")

    with pytest.raises(fastbn.ModelError, match=r"^Expected a model below 2 GB without its external data, got a larger one - at `m`$"):
        storage.serialize(SimpleNamespace(SerializeToString=fails), "m")


def test_what_only_a_run_would_tell():
    assert extent.result_size(None, [np.array(["a"], object)], None, 17) is None
    assert extent.result_size(None, [None], None, 17) is None
    assert cropping._may_be_negative(SimpleNamespace(domain="com.example"), None)
