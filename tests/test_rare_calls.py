"""What only few callers and few data make the command, re-estimation and the reference do."""

import errno
import io
import sys
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
from fastbn.deployment.options import Options
from fastbn.graph import report
from fastbn.graph.model import storage
from fastbn.graph.model.index import Index
from fastbn.reestimation import work
from fastbn.reestimation.files import arrays_in
from fastbn.reestimation.levels import find_levels


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
