"""Bodies that give no constant, sizes that end a process, branches that prove nothing: what is known then, and what is said."""

import numpy as np
import onnx
import pytest
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto, helper
from sketch import conv_bn, model, norm, normal
from test_loops import BODY, known, weighted

import fastbn
from fastbn.graph.model import storage
from fastbn.graph.model.index import Index
from fastbn.graph.model.shapes import _shallow
from fastbn.graph.parity import branches, difference
from fastbn.graph.parity.survival import reader_of_nothing
from fastbn.graph.rewrite import destination, version

NO_CONSTANTS = {
    "a choice of nothing": "o = If (k) <then_branch = t () => (p) { p = Foo(u) }, else_branch = f () => (q) { q = Neg(u) }>",
    "shapes that do not fit": "z = Flatten <axis = 0> (u) o = Add(z, parts)",
    "another type": "z = Cast <to = 7> (u) o = Add(u, z)",
    "a place behind the end": "q = SequenceConstruct(u, u) o = SequenceAt(q, n5)",
}


@pytest.mark.parametrize("name", NO_CONSTANTS)
def test_a_turn_that_gives_nothing(name):
    assert known(weighted(f"w = Loop(n3, yes, w0) {BODY % NO_CONSTANTS[name]}")) is None


WHOLE = {
    "a tensor instead of a sequence": "q = SequenceMap(w0) <body = g (float[3,3,3] u) => (o) { o = Neg(u) }> w = SequenceAt(q, n0)",
    "sequences of sequences": """s = SequenceConstruct(w0, w0) q = SequenceMap(s)
        <body = g (float[4,3,3,3] u) => (o) { o = SequenceConstruct(u, u) }> w = SequenceAt(q, n0)""",
    "a turn without its input": f"w = Loop(n3, yes, ) {BODY % 'o = Neg(w0)'}",
    "parts that are not all": "q = SplitToSequence <axis = 0> (w0, to) w = SequenceAt(q, n0)",
}


@pytest.mark.parametrize("name", WHOLE)
def test_nodes_with_bodies_that_give_nothing(name):
    assert known(weighted(WHOLE[name])) is None


def test_bodies_of_a_node_are_emptied_all():
    node = NodeProto(op_type="Many", attribute=[AttributeProto(name="all", type=AttributeProto.GRAPHS, graphs=[GraphProto(name="g")] * 2)])
    node.attribute.append(helper.make_attribute("axis", 1))
    shallow = _shallow(node)
    assert [graph.name for graph in shallow.attribute[0].graphs] == ["body", "body"]
    assert shallow.attribute[1].i == 1


def test_sizes_that_only_a_run_tells():
    """The shape comes from a list that the caller gives: the model is run with nodes in the place of those that would not survive."""
    text = """(float[2,N] x, int64[3] l) => (float[A,B,C] y) {
        q = Reshape <allowzero = 1> (x, l) c = InstanceNormalization(q, g, g) y = BatchNormalization(c, s, t, m, v)
    }"""
    index = Index(storage.load(model(text, g=normal(4), **norm(4))))
    for size in (0, 3):
        feed = {"x": np.zeros((2, 2 * size), np.float32), "l": np.int64([1, 4, size])}
        found = reader_of_nothing(index, {"x": (2, 2 * size), "l": (3,)}, feed)
        assert (None if found is None else found.label) == (None if size else "c")
    # What stops here stops the model too.
    assert reader_of_nothing(index, {"x": (2, 6), "l": (3,)}, {"x": np.zeros((2, 6), np.float32), "l": np.int64([5, 5, 5])}) is None


def test_a_gru_whose_weights_are_computed_is_not_tried():
    text = """(float[T,2,4] x, float[1,9,4] w, int64[3] l) => (float[A,B,C,D] y) {
        q = Reshape(x, l) y = GRU <hidden_size = 3> (q, w, u)
    }"""
    index = Index(storage.load(model(text, u=normal(1, 9, 3))))
    found = reader_of_nothing(index, {"x": (5, 2, 4), "w": (1, 9, 4), "l": (3,)}, {})
    assert found is not None
    assert found.label == "y"


CHOICE = """(float[N,3,8,8] x, bool k) => (float[N,4,6,6] y) {
    c = Conv(x, w, b) h = BatchNormalization(c, s, t, m, v)
    y = If (k) <then_branch = g () => (p) { p = Neg(h) }, else_branch = f () => (q) { q = Mul(h, zero) }>
}"""


def test_branches_that_prove_nothing_are_said():
    notes = fastbn.fold(conv_bn(CHOICE, zero=np.zeros(1, np.float32))).parity.notes
    assert any(note.endswith("give nothing that proves anything") for note in notes), notes


def test_branches_of_the_folded_model_that_do_not_run(monkeypatch):
    calls, run = [], branches._run

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == 3:  # the original, the same with noise, the folded one
            raise RuntimeError("no")
        return run(*arguments)

    monkeypatch.setattr(branches, "_run", failing)
    (kept,) = fastbn.fold(conv_bn(CHOICE, zero=np.ones(1, np.float32))).kept
    assert (len(calls), kept.code) == (3, "parity")
    assert kept.reason.endswith("onnxruntime cannot run the then branches of the folded model: no")


def test_outputs_that_are_no_arrays_count_as_equal():
    assert difference.equal([1], [2])
    assert difference.equal(np.array([np.nan, 1]), np.array([np.nan, 1]))
    assert not difference.equal(np.array([0.0, 1]), np.array([np.nan, 1]))


def test_a_data_file_of_the_input_is_not_written_over(tmp_path):
    onnx.save(conv_bn(), tmp_path / "in.onnx", save_as_external_data=True, location="w.data", size_threshold=0)
    before = (tmp_path / "w.data").read_bytes()
    with pytest.raises(fastbn.StorageError, match=r"w\.data': it is a data file of the input$"):
        fastbn.fold(tmp_path / "in.onnx", verify=False).save(tmp_path / "w.data")
    assert (tmp_path / "w.data").read_bytes() == before


def test_a_system_that_does_not_tell_what_is_mounted(tmp_path, monkeypatch):
    def closed(*arguments, **options):
        raise OSError

    monkeypatch.setattr(destination, "open", closed, raising=False)
    assert destination._is_mount_point(tmp_path / "x") is False


def test_inputs_of_another_type_or_rank_are_others():
    def inputs(kind, *sizes):
        return {"x": helper.make_tensor_value_info("x", kind, sizes).type.tensor_type}

    one = inputs(TensorProto.FLOAT, "N", 3)
    assert version._same_inputs(one, inputs(TensorProto.FLOAT, 2, 3))
    for other in (inputs(TensorProto.DOUBLE, "N", 3), inputs(TensorProto.FLOAT, "N", 3, 1), inputs(TensorProto.FLOAT, "N", 4)):
        assert not version._same_inputs(one, other)
