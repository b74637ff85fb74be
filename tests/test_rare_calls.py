"""What only few callers and few data make the command, re-estimation and the reference do."""

import errno
import io
import platform
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from sketch import conv_bn, model, norm, normal
from statistics_truth import branches, images

import fastbn
from fastbn import confinement, reestimate, reference
from fastbn.cli import main
from fastbn.delivery import Delivery
from fastbn.deployment import compare, equalization, provenance, quantizer, recipe, stages
from fastbn.deployment.options import Options
from fastbn.exported import job as exported_job
from fastbn.graph import report
from fastbn.graph.model import storage
from fastbn.graph.model.index import Index
from fastbn.reestimation import work
from fastbn.reestimation.files import arrays_in
from fastbn.reestimation.levels import find_levels
from fastbn.zoo import job as zoo_job
from fastbn.zoo import task


def test_batches_without_elements_and_plain_numbers():
    x = np.zeros((0, 3, 4), np.float32)
    running = np.ones(3), np.ones(3)
    y, stats = reference.batch_norm_train(x, running_mean=running[0], running_var=running[1])
    assert (y.shape, stats.count, running[0].tolist()) == ((0, 3, 4), 0, [1, 1, 1])


def test_without_ml_dtypes_there_is_no_bfloat16(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    assert main(["bench-kernels", "2,4,8", "--dtype", "bfloat16"]) == 2
    assert capsys.readouterr().err == "fastbn: Cannot make arrays of bfloat16: ml_dtypes is not installed\n"


def test_limits_need_linux(monkeypatch):
    monkeypatch.setattr(confinement.sys, "platform", "other")
    with pytest.raises(fastbn.FastbnError, match=r"^Cannot limit time and memory: that needs Linux"):
        confinement.confined([], confinement.Limits(None, 1.0), (), "fold 'x'")


def test_a_metric_that_is_none():
    with pytest.raises(fastbn.FastbnError, match=r"^Expected auto, .*, got 'beauty' - at `metric`$"):
        Options(metric="beauty")


def test_sizes_that_differ_by_a_byte_are_told_apart():
    assert report.size_texts([1000, 2000]) == ["1.0 kB", "2.0 kB"]
    assert report.size_texts([1000, 1001]) == ["1.000 kB", "1.001 kB"]
    assert report.size_texts([5_000_000, 5_000_001]) == ["5,000,000 bytes", "5,000,001 bytes"]


@pytest.mark.parametrize(
    ("error", "is_memory"), [(MemoryError(), True), (RuntimeError("failed to allocate"), True), (RuntimeError("no"), False)]
)
def test_a_piece_that_does_not_run(error, is_memory, monkeypatch):
    def get(*arguments):
        raise error

    monkeypatch.setattr(work.SESSIONS, "get", get)
    with pytest.raises(fastbn.FastbnError) as caught:
        reestimate(branches(), images(8))
    assert ("memory of a worker does not suffice" in str(caught.value)) == is_memory
    assert is_memory or str(caught.value).startswith("Cannot run the model on ")


def test_only_so_many_sessions_are_open(monkeypatch):
    wanted = reestimate(branches(), images(16), batch=4).statistics
    monkeypatch.setattr(work, "MOST_SESSIONS", 1)
    found = reestimate(branches(), images(16), batch=4).statistics
    for name, stats in wanted.items():
        assert found[name].mean.tobytes() == stats.mean.tobytes()


def test_random_numbers_in_a_model_are_noted():
    text = "(float[N,4] x) => (float[N,4] y) { r = RandomNormalLike(x) a = Add(x, r) y = BatchNormalization(a, s, t, m, v) }"
    result = reestimate(model(text, **norm(4)), normal(8, 4))
    assert "the model draws random numbers: another run gives other statistics" in result.notes


def test_data_without_the_channels_of_a_model():
    assert work._checked(normal(2, 3), 3, "y").shape == (2, 3)
    for array in (normal(3), normal(2, 4)):
        with pytest.raises(fastbn.ModelError, match=r"^Expected data with 3 channels along axis 1, got shape .* - at `y`$"):
            work._checked(array, 3, "y")


def test_norms_whose_statistics_are_not_those_of_channels():
    per_element = model("(float[N,4,6] x) => (float[N,4,6] y) { y = BatchNormalization <spatial = 0> (x, s, t, m, v) }", opset=7, **norm(4))
    (left,) = find_levels(Index(storage.load(per_element)), None, None).left
    assert left.code == "per-element"


def test_a_file_that_is_no_longer_what_it_was(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((4, 2), np.float32))
    array = arrays_in(str(tmp_path / "x.npy"))["x"]
    assert array.rows(1, 3).shape == (2, 2)
    np.save(tmp_path / "x.npy", np.zeros((4, 3), np.float32))
    with pytest.raises(fastbn.StorageError, match=r"^Expected <f4 \[4, 2\], as before, got <f4 \[4, 3\] - at "):
        array.rows(1, 3)


def test_what_many_models_leave_out(tmp_path):
    (tmp_path / "in" / ".hidden").mkdir(parents=True)
    for path in ("in/a.onnx", "in/.b.onnx", "in/.hidden/c.onnx"):
        onnx.save(conv_bn(), tmp_path / path)
    outcomes = fastbn.fold_all(tmp_path / "in", tmp_path / "out", jobs=1).outcomes
    assert [outcome.output for outcome in outcomes] == [str(tmp_path / "out" / "a.onnx")]


def test_a_line_that_cannot_be_printed_changes_nothing(capsys, monkeypatch):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

    delivery = Delivery()
    assert not delivery.has_left_data(storage.load(conv_bn()))  # nothing has been written
    monkeypatch.setattr(Delivery, "stream", Full())
    delivery.mention("done")
    assert capsys.readouterr().err.startswith("fastbn: ")


def test_layers_of_keras_that_are_not_converted():
    names = dict.fromkeys(("momentum", "epsilon", "center", "scale", "get_weights"))
    with pytest.raises(fastbn.ArgumentError, match=r"^Cannot convert the layer: it has not been built$"):
        fastbn.BatchNorm.from_keras(SimpleNamespace(built=False, axis=-1, **names))
    with pytest.raises(fastbn.ArgumentError, match=r"^Expected one axis, got \[1, 2\] - at `axis`$"):
        fastbn.BatchNorm.from_keras(SimpleNamespace(built=True, axis=[1, 2], **names))


def test_a_folded_module_in_a_notebook_and_as_a_table():
    torch = pytest.importorskip("torch")
    pytest.importorskip("pandas")
    from fastbn.torch import fold

    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3)).eval()
    result = fold(model, torch.zeros(2, 4))
    assert "BatchNormalization 1 -&gt; 0" in result._repr_html_()
    assert len(result.to_dataframe()) == 1


# ---- deployment ----


def closed(*arguments, **options):
    raise OSError(errno.EIO, "Input/output error")


def test_a_stage_that_onnxruntime_does_not_run_is_not_run_again():
    calls = []

    def fails(names, feed):
        calls.append(feed)
        raise RuntimeError("no")

    original = SimpleNamespace(names=["y"], random=[False], told=set(), outputs=lambda number, feed: [np.ones(3)])
    works = SimpleNamespace(run=lambda names, feed: [np.ones(3)])
    found = compare.compare(original, {"folded": SimpleNamespace(run=fails), "quantized": works}, [{}, {}], ())
    assert found["folded"] == "onnxruntime cannot run it: no"
    assert [agreement.output for agreement in found["quantized"]] == ["y"]
    assert len(calls) == 1


def test_layers_that_cannot_be_equalized(tmp_path, monkeypatch):
    onnx.save(conv_bn(), tmp_path / "in.onnx")
    assert not equalization.rescaled(tmp_path / "in.onnx", tmp_path / "out.onnx", {"gone": np.ones(4)})
    assert not (tmp_path / "out.onnx").exists()

    def fails(*arguments):
        raise RuntimeError("no")

    monkeypatch.setattr(equalization, "_largest", fails)
    assert equalization.equalized(tmp_path / "in.onnx", tmp_path / "out.onnx", [], per_channel=True) == {}


def test_a_system_that_does_not_describe_its_cpu(monkeypatch):
    monkeypatch.setattr(Path, "read_text", closed)
    assert provenance._cpu_name() == platform.processor()
    assert not recipe._has_vnni()


def test_feeds_that_the_disk_does_not_take(tmp_path):
    with pytest.raises(fastbn.StorageError, match=r"feed-0\.pickle': (no such file or directory|not a directory)$"):
        quantizer.Quantizer(tmp_path / "gone", [{"x": np.ones(3)}], None)._write(1)


def test_data_that_a_classifier_does_not_take():
    def fails(names, feed):
        raise RuntimeError("no")

    reference = SimpleNamespace(get_outputs=list, run=fails)
    samples = SimpleNamespace(labels=[np.zeros(1)], feeds=[{}])
    with pytest.raises(fastbn.ArgumentError, match=r"^Cannot run the model on the data: no$"):
        stages.marks_for(reference, None, samples, None)
    assert stages.marks_for(reference, None, SimpleNamespace(labels=None), None) is None


def test_models_without_tensors_prove_nothing():
    assert exported_job.parity_of([], 1, "in torch").reason == "no output is a tensor"
    holds = SimpleNamespace(is_wrong=False, holds=True, proves=False)
    doubtful = SimpleNamespace(is_wrong=False, holds=False, why_inconclusive="noise")
    assert exported_job._status([holds]) == ("inconclusive", "every output is constant")
    assert exported_job._status([holds, doubtful]) == ("inconclusive", "noise")


def test_arguments_that_are_no_tensors_stay_as_they_are():
    torch = pytest.importorskip("torch")
    from fastbn.exported.torch_graph import on_device

    (number, tensor, whole), named = on_device(((2, torch.ones(1), torch.ones(1, dtype=torch.int32)), {"how": "so"}), "cpu", torch.float64)
    assert (number, tensor.dtype, whole.dtype, named) == (2, torch.float64, torch.int32, {"how": "so"})


def test_nothing_is_started_after_an_interrupt():
    processes = task._Processes()
    processes._ended = True
    with pytest.raises(fastbn.FastbnError, match=r"^Cannot go on: the run has been interrupted$"), processes.started([], None):
        pass


def test_a_model_that_cannot_be_fetched_is_an_outcome(tmp_path, monkeypatch):
    monkeypatch.setattr(task, "_folded", closed)
    entry = SimpleNamespace(source=str(tmp_path / "in.onnx"), output="out.onnx")
    outcome = task.fold_one(entry, [], None, None)
    assert (outcome.status, outcome.reason) == ("failed", "[Errno 5] Input/output error")


def test_without_dask_nothing_is_known_to_have_ended_a_worker(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert zoo_job.killed_by(ValueError("no")) is None
