"""What only few data, machines or callers make the array part, the command, deployment and re-estimation do."""

import logging
import pickle
import subprocess
import sys
from importlib import metadata
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from shell import files
from sketch import conv_bn, model, norm, normal
from statistics_truth import branches, images

import fastbn
from fastbn import confinement, reestimate, reference, terminal
from fastbn.cli import main
from fastbn.cluster import connection
from fastbn.deployment import bn_statistics, compare, labels, measure, quantize, quantizer, synthetic
from fastbn.deployment.recipe import Recipe
from fastbn.deployment.result import Stage
from fastbn.deployment.samples import Samples
from fastbn.graph.model import storage
from fastbn.graph.model.index import Index
from fastbn.reestimation import collections, pieces, work, writing
from fastbn.reestimation.levels import find_levels
from fastbn.zoo.job import killed_by

# ---- arrays and the command ----


def test_the_reference_writes_into_an_output():
    x, out = normal(2, 3, 4), np.empty((2, 3, 4), np.float32)
    options = {"mean": np.zeros(3), "var": np.ones(3)}
    assert reference.batch_norm(x, out=out, **options) is out
    np.testing.assert_array_equal(out, reference.batch_norm(x, **options))


def test_a_package_that_is_not_installed_has_no_version(monkeypatch):
    def version(package):
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(metadata, "version", version)
    assert fastbn.show_config()["numpy"] == np.__version__
    assert fastbn.show_config()["onnx"] is None


def test_signals_without_a_name():
    assert (confinement._signal_name(9), confinement._signal_name(40)) == ("SIGKILL", "signal 40")
    assert (quantizer._ended(-9), quantizer._ended(-40), quantizer._ended(3)) == (
        "was ended by SIGKILL",
        "was ended by signal 40",
        "ended with exit code 3",
    )


def test_the_middle_of_a_long_complaint_is_left_out(capsys):
    terminal.complain(f"fastbn: {'a' * 1000} and {'z' * 1000}")
    said = capsys.readouterr().err
    assert len(said) < 810
    assert " ... " in said
    assert (said[:9], said[-2:]) == ("fastbn: a", "z\n")


def test_arrays_of_bfloat16_are_timed(capsys):
    pytest.importorskip("ml_dtypes")
    assert main(["bench-kernels", "2,4,8", "--dtype", "bfloat16", "--seconds", "0.01"]) == 0
    assert "bfloat16" in capsys.readouterr().out


def test_two_reports_do_not_share_stdout(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    onnx.save(conv_bn(), "in.onnx")
    assert main(["deploy", "in.onnx", "out.onnx", "--report", "/dev/stdout", "--json", "-"]) == 2
    assert "Cannot write the page to stdout: the model or the JSON report goes there" in capsys.readouterr().err
    assert files(tmp_path) == ["in.onnx"]


def test_what_ended_no_worker_is_another_error():
    assert killed_by(ValueError("no")) is None


# ---- deployment ----


def test_labels_are_looked_for_by_name_and_shape():
    assert not labels._is_one_hot(np.array(["a"]))
    assert not labels._is_one_hot(np.zeros((0, 3)))
    assert labels._is_one_hot(np.eye(3))
    assert labels.names_of_labels("a", {"a": 0, "labels": 0}, ()) == "a"
    assert labels.names_of_labels("b", {"a": 0, "labels": 0}, ()) is None
    assert labels.names_of_labels(None, {"x": 0, "labels": 0}, {"x"}) == "labels"
    assert labels.names_of_labels(None, {"x": 0, "labels": 0}, {"x", "labels"}) is None
    # Axes of one element behind the classes are none.
    assert labels._kind(normal(4, 3, 1, 1), (4,), False) == labels._kind(normal(4, 3), (4,), False)


def test_accuracy_of_what_did_not_run_or_has_no_labels():
    marks = labels.Marks(SimpleNamespace(output="y", right=lambda outputs, given: np.full(len(given), np.nan)), [np.full(3, -1)])
    assert marks.accuracy("folded", "original") is None
    marks.note("folded", 0, [])
    assert marks.accuracy("folded", "original") is None
    assert marks.loss("folded", "original") is None


def test_memory_and_latency_that_no_system_tells(monkeypatch, tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    assert measure.quick_ms(tmp_path / "bad.onnx", {}) is None
    monkeypatch.setattr(sys, "executable", str(tmp_path / "gone"))
    assert measure.resident_mb({"original": tmp_path / "bad.onnx"}) == {}
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: SimpleNamespace(stdout="0 many"))
    assert measure.resident_mb({"original": tmp_path / "bad.onnx"}) == {}


def test_loading_is_measured_in_turn(tmp_path):
    onnx.save(conv_bn(), tmp_path / "in.onnx")
    said = []
    assert set(measure.load_times({"original": tmp_path / "in.onnx"}, said.append)) == {"original"}
    assert said == [f"original, {turn + 1} of {measure.LOADS}" for turn in range(measure.LOADS)]


def test_large_pictures_are_small_ones_twice_as_large(monkeypatch):
    monkeypatch.setattr(synthetic, "LARGE", 64)
    large = synthetic._leaves(np.random.default_rng(3), 2, 15, 16)
    small = synthetic._leaves(np.random.default_rng(3), 2, 8, 8)
    assert large.shape == (2, 15, 16)
    np.testing.assert_array_equal(large, small.repeat(2, axis=1).repeat(2, axis=2)[:, :15])


def test_values_that_bodies_capture_are_read():
    text = """(bool c, float[4] x) => (float[4] y) { y = If (c) <
        then_branch = g () => (float[4] p) <float[1] k = {2}> { n = Mul(x, k) p = Sin(n) },
        else_branch = h () => (float[4] x) { q = Cos(z) }
    > }"""
    assert sorted(bn_statistics._reads(model(text).graph.node[0])) == ["c", "x", "x", "z"]


def test_what_stages_and_samples_are_called():
    assert repr(Stage("folded", size=2000, drop=0.25)).startswith("<Stage folded: 2.0 kB, drop 0.25")
    samples = Samples([{"x": normal(2, 3)}], 2, 2, "two", True)
    assert repr(samples) == f"<Samples: {samples}>"


def quantized(tmp_path, proto, feeds, recipe, **options):
    """Return (what the quantizer made, the model) of a model and feeds, in this process."""
    onnx.save(proto, tmp_path / "in.onnx")
    for number, feed in enumerate(feeds):
        quantize.feed_path(tmp_path, number).write_bytes(pickle.dumps(feed))
    before = logging.getLogger().handlers
    try:
        made = quantize.quantize_file(tmp_path / "in.onnx", tmp_path / "out.onnx", tmp_path, len(feeds), recipe=recipe, **options)
    finally:
        logging.getLogger().handlers = before
    return made, onnx.load(tmp_path / "out.onnx")


CHAIN = "(float[1,3,8,8] x) => (float[1,4,4,4] y) { a = Conv(x, w) r = Relu(a) y = Conv(r, u) }"
WEIGHTS = {"w": normal(4, 3, 3, 3), "u": normal(4, 4, 3, 3, seed=1)}
FEEDS = [{"x": normal(1, 3, 8, 8, seed=seed)} for seed in range(2)]
PLAIN = Recipe("QUInt8", "QInt8", False)


def test_the_quantizer_leaves_in_float_what_is_named(tmp_path):
    made, _ = quantized(tmp_path, model(CHAIN, **WEIGHTS), FEEDS, PLAIN)
    assert len(made.nodes) == 2
    recipe = Recipe("QUInt8", "QInt8", False, exclude=("y", "gone*"))
    some, _ = quantized(tmp_path, model(CHAIN, **WEIGHTS), FEEDS, recipe)
    assert len(some.nodes) == 1
    assert some.notes == ("the folded model has no node 'gone*' to leave in float",)
    with pytest.raises(quantize.QuantizerRefused, match="every node that has an integer form stays in float"):
        quantized(tmp_path, model(CHAIN, **WEIGHTS), FEEDS, Recipe("QUInt8", "QInt8", False, exclude=("*",)))


def test_the_quantizer_takes_old_models_and_initializers_that_are_inputs(tmp_path):
    proto = model(CHAIN, opset=10, ir_version=4, **WEIGHTS)
    proto.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [4, 3, 3, 3]))
    made, after = quantized(tmp_path, proto, FEEDS, PLAIN)
    assert [note.split(" ", 1)[0] for note in made.notes] == ["initializers", "opset"]
    assert after.opset_import[0].version >= quantize.PER_CHANNEL_OPSET


def test_ranges_of_other_models_count_too(tmp_path):
    other = model(CHAIN, w=3 * WEIGHTS["w"], u=WEIGHTS["u"])
    onnx.save(other, tmp_path / "other.onnx")
    scales = []
    for restated in ((), [(tmp_path / "other.onnx", range(2))]):
        _, after = quantized(tmp_path, model(CHAIN, **WEIGHTS), FEEDS, PLAIN, restated=restated)
        (name,) = (each.input[1] for each in after.graph.node if each.op_type == "QuantizeLinear" and each.input[0].startswith("y"))
        scales.append(next(float(numpy_helper.to_array(each)) for each in after.graph.initializer if each.name == name))
    assert scales[1] > 2 * scales[0]


@pytest.mark.parametrize(
    ("factor", "message"),
    [(0, "calibration collapses: every output is 0 on all samples"), (3e38, "calibration gives no range: activation '.*' is Inf or NaN")],
)
def test_samples_that_say_nothing(factor, message, tmp_path):
    feeds = [{"x": np.full((1, 3, 8, 8), factor, np.float32)}]
    positive = {name: np.abs(weight) for name, weight in WEIGHTS.items()}
    with np.errstate(all="ignore"), pytest.raises(quantize.QuantizerRefused, match=message):
        quantized(tmp_path, model(CHAIN, **positive), feeds, PLAIN)


def test_whatever_the_quantizer_raises_is_a_refusal(tmp_path, monkeypatch):
    from onnxruntime.quantization import qdq_quantizer

    def fails(*arguments, **options):
        logging.getLogger().error("first\nlast")
        raise KeyError

    monkeypatch.setattr(qdq_quantizer, "QDQQuantizer", fails)
    with pytest.raises(quantize.QuantizerRefused, match=r"refuses the model: KeyError: last$"):
        quantized(tmp_path, model(CHAIN, **WEIGHTS), FEEDS, PLAIN)


# ---- re-estimation ----

NORMED = "(float[N,4,6] x) => (float[N,4,6] y) { y = BatchNormalization(x, s, t, m, v) }"


def levels_of(**changes):
    """Return the levels of a model whose statistics are changed."""
    proto = model(NORMED, **{**norm(4), **changes})
    return find_levels(Index(storage.load(proto)), None, None)


def test_statistics_that_cannot_be_replaced():
    assert [site.node.label for site in levels_of().sites] == ["y"]
    (shaped,) = levels_of(m=normal(4, 1), v=normal(4, 1)).left
    assert (shaped.code, shaped.reason) == ("training", "its mean has shape [4, 1] and its variance [4, 1]: none per channel")
    (typed,) = levels_of(m=np.zeros(4, np.int64)).left
    assert (typed.code, typed.reason) == ("unsupported-type", "its mean is int64")


def test_statistics_that_a_caller_may_give_have_defaults_that_are_replaced():
    proto = model(NORMED, ir_version=4, **norm(4))
    proto.graph.input.append(helper.make_tensor_value_info("m", TensorProto.FLOAT, [4]))
    (site,) = find_levels(Index(storage.load(proto)), None, None).sites
    np.testing.assert_array_equal(site.mean, norm(4)["m"])


def test_data_of_other_versions_and_sizes():
    with pytest.raises(fastbn.FastbnError, match=r"^Cannot use the worker: it has fastbn .*, and the client 0\.0$"):
        work.Setting(1, "0.0").check()
    assert str(work.out_of_memory("samples 0 to 3")).startswith("Cannot go on with samples 0 to 3: the memory of a worker does not suffice")
    text = np.array(["a"], object)
    assert work._copied(text) is text


def test_folders_of_protobuf(tmp_path):
    x = images(8)
    named, listed, empty = (tmp_path / name / "test_data_set_0" for name in ("named", "listed", "empty"))
    for folder in (named, listed, empty):
        folder.mkdir(parents=True)
    (named / "input_0.pb").write_bytes(numpy_helper.from_array(x, "another name").SerializeToString())
    assert reestimate(branches(), tmp_path / "named").samples == 8
    with pytest.raises(fastbn.FastbnError, match=r"there is no input_0\.pb in"):
        reestimate(branches(), tmp_path / "empty")
    for number in range(2):
        (listed / f"input_{number}.pb").write_bytes(numpy_helper.from_array(x, "another name").SerializeToString())
    with pytest.raises(fastbn.FastbnError, match=r"^Expected 1 inputs \(x\), got 2 - at "):
        reestimate(branches(), tmp_path / "listed")
    whole = tmp_path / "whole"
    whole.mkdir()
    (whole / "x.pb").write_bytes(numpy_helper.from_array(x, "x").SerializeToString())
    assert reestimate(branches(), whole).samples == 8


def test_what_a_reestimation_is_called():
    result = reestimate(branches(), images(16))
    assert repr(result).startswith("<Reestimation 'model': ")
    again = reestimate(result.model, images(16))
    assert again.fit.startswith("the data are like those behind the old statistics: no channel moved by more than ")


def test_collections_that_are_none():
    dask = pytest.importorskip("dask.array")
    with pytest.raises(fastbn.FastbnError, match=r"^Expected dask\.arrays, got ndarray - at `data\['x'\]`$"):
        collections._of_arrays({"x": np.zeros(2)}, None, 4, None)
    with pytest.raises(fastbn.FastbnError, match=r"^Expected at least one sample, got none - at `data`$"):
        reestimate(branches(), dask.zeros((0, *images(1).shape[1:]), chunks=4))


def test_types_of_values_on_the_way():
    assert (pieces._kind_of("tensor(float)"), pieces._kind_of("seq(tensor(float))")) == (TensorProto.FLOAT, 0)
    node = helper.make_node("Cast", ["x"], ["y"], to=TensorProto.BFLOAT16)
    assert pieces._widen_attribute(node.attribute[0], node, storage.load(conv_bn()))
    assert node.attribute[0].i == TensorProto.FLOAT
    assert not pieces._widen_attribute(node.attribute[0], node, storage.load(conv_bn()))


SEQUENCE = """(float[N,4,6] x) => (float[N,4,6] y) {
    r = Tanh(x)
    q = SplitToSequence <axis = 1, keepdims = 1> (r, four)
    n = BatchNormalization(x, s, t, m, v)
    k = ReduceMax <keepdims = 0> (n)
    f = Mul(k, zero)
    i = Cast <to = 7> (f)
    c = SequenceAt(q, i)
    a = Add(n, c)
    y = BatchNormalization(a, s, t, m, v)
}"""


def test_a_sequence_on_the_way_of_the_data():
    result = reestimate(model(SEQUENCE, four=np.array(4), zero=np.float32(0), **norm(4)), normal(8, 4, 6))
    assert {each.bn for each in result.moved} == {"n", "y"}


def test_new_statistics_take_no_name_and_keep_their_text():
    names = {"m", "m_2"}
    assert (writing._new_name("m", names), writing._new_name("m", names), writing._new_name("v", names)) == ("m_3", "m_4", "v")
    tensor = TensorProto(doc_string="of a camera")
    writing._fill(tensor, "m", np.ones(3, np.float32))
    assert (tensor.name, tensor.doc_string, [*tensor.dims]) == ("m", "of a camera", [3])


def test_outputs_that_are_neither_tensors_nor_maps():
    for value in ("text", [], [{1: 2.0}, {2: 2.0}], [{1: "a"}]):
        assert compare._Output.of(value) is None
    assert compare._Output.of([{1: 2.0, 0: 3.0}]).values.tolist() == [[3, 2]]


class Cluster:
    """A client of workers that answer as they are told."""

    def __init__(self, **answers):
        self.answers = answers

    def wait_for_workers(self, count, timeout):
        pass

    def run(self, function, on_error):
        return self.answers


def test_workers_that_cannot_work():
    connection._check_workers(Cluster(a=(fastbn.__version__, "1.0"), b=(fastbn.__version__, "1.0")), "there")
    for answers, message in (
        ({"a": OSError("first\nlast")}, r"Cannot use the worker at a: it cannot load fastbn \(first\)"),
        ({"a": OSError()}, r"Cannot use the worker at a: it cannot load fastbn \(OSError\)"),
        ({"a": (fastbn.__version__, "1.0"), "b": (fastbn.__version__, "2.0")}, r"several versions of onnxruntime.*: 1\.0 at a, 2\.0 at b$"),
    ):
        with pytest.raises(fastbn.FastbnError, match=message):
            connection._check_workers(Cluster(**answers), "there")


def test_a_run_that_the_cluster_has_lost():
    with pytest.raises(fastbn.FastbnError, match=r"^Cannot go on: the cluster has lost the run; was its scheduler ended?"):
        connection.wait_for(SimpleNamespace(status="lost"), [], lambda done, count: None)


def test_a_file_is_no_folder_for_many_models(tmp_path):
    onnx.save(conv_bn(), tmp_path / "in.onnx")
    with pytest.raises(fastbn.StorageError, match=r"it is no folder$"):
        fastbn.fold_all(tmp_path / "in.onnx", tmp_path / "in.onnx")
