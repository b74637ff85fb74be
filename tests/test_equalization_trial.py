"""Layers are equalized only where int8 then loses less, on inputs that calibrate nothing; every report says what was kept, and why."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from shell import as_json, classifier_folder, deploy, files, quick
from sketch import model, norm, normal, run

import fastbn
from fastbn.deployment import data_free, quantized_stage
from fastbn.deployment.data_free import trial_feeds, trial_seed
from fastbn.deployment.equalization_trial import EqualizationTrial
from fastbn.deployment.quantize import QuantizerRefused
from fastbn.deployment.quantizer import Quantizer
from fastbn.graph.model import storage
from fastbn.graph.model.index import Index

TEXT = """(float[N,3,8,8] x) => (float[N,5] y) {
    c = Conv(x, w, b) n = BatchNormalization(c, s, t, m, v) r = Relu(n) d = Conv(r, u)
    p = GlobalAveragePool(d) q = Flatten(p) y = Gemm <transB: int = 1> (q, g, h)
}"""

OPTIONS = {
    "quantize": True,
    "data_free": True,
    "max_drop": 1,
    "float_nodes": 0,
    "runs": 1,
    "goal": "size",
    "metric": "error",
    "weight_type": "int8",
}


def constants():
    weights = {"w": normal(6, 3, 3, 3, seed=3), "b": normal(6, seed=3), "u": normal(4, 6, 3, 3, seed=3), "g": normal(5, 4, seed=3)}
    return {**weights, "h": 0.01 * normal(5), **norm(6)}


def gaining():
    """A model whose channels differ by much, and so do the weights behind it."""
    rng = np.random.default_rng(3)
    changes = {"t": np.float32(10.0 ** rng.uniform(-2, 1.5, 6))}
    made = constants()
    made["u"] *= np.float32(10.0 ** rng.uniform(-2, 2, (4, 6, 1, 1)))
    return model(TEXT, **{**made, **changes})


def losing():
    """A model with two layers added up, which share a scale and need another one each."""
    added = TEXT.replace("r = Relu(n)", "k = Conv(x, w2, b2) o = BatchNormalization(k, s2, t2, m2, v2) a = Add(n, o) r = Relu(a)")
    rng = np.random.default_rng(3)
    both = {name: np.float32(10.0 ** rng.uniform(-2, 1, 6)) for name in ("s", "s2")}
    second = {"w2": normal(6, 3, 3, 3, seed=7), "b2": normal(6), **norm(6, "2", seed=5)}
    return model(added, **{**constants(), **second, **both})


@pytest.fixture(name="fast", autouse=True)
def _fast(monkeypatch):
    quick(monkeypatch)
    monkeypatch.setattr(data_free, "MOST_FEEDS", 48)


def loss_on_other_inputs(proto, quantized):
    """Return the relative error on synthetic inputs that neither calibrate nor decide."""
    index = Index(storage.load(proto))
    made = data_free.data_free(index, [{"x": np.zeros((1, 3, 8, 8), np.float32)}] * 48, 5)
    x = np.concatenate([feed["x"] for feed in made.feeds])
    (before,), (after,) = run(proto, {"x": x}), run(onnx.load_from_string(quantized), {"x": x})
    return np.linalg.norm(after - before) / np.linalg.norm(before)


@pytest.mark.parametrize(("make", "is_kept"), [(gaining, True), (losing, False)])
def test_the_better_of_the_two_is_kept(make, is_kept, monkeypatch):
    made = fastbn.deploy(make(), **OPTIONS)
    trial = made.quantization.equalization
    assert (trial.kept, trial.layers, trial.refused) == (is_kept, 2 if is_kept else 3, None)
    better, worse = (trial.loss, trial.loss_without) if is_kept else (trial.loss_without, trial.loss)
    assert better < 0.8 * worse
    with monkeypatch.context() as patch:
        patch.setattr(EqualizationTrial, "kept", not is_kept)
        other = fastbn.deploy(make(), **OPTIONS)
    assert loss_on_other_inputs(make(), made.quantized) < loss_on_other_inputs(make(), other.quantized)
    assert made.stage("quantized").drop < other.stage("quantized").drop, "that is what was compared"


def is_equalized(quantized):
    return any(".equalized." in tensor.name for tensor in onnx.load_from_string(quantized).graph.initializer)


@pytest.mark.parametrize(("make", "is_kept"), [(gaining, True), (losing, False)])
def test_nodes_are_left_in_float_of_the_model_that_is_kept(make, is_kept):
    made = fastbn.deploy(make(), **{**OPTIONS, "max_drop": 1e-4, "float_nodes": 1})
    assert is_equalized(made.quantized) == is_kept
    made = fastbn.deploy(make(), **{**OPTIONS, "max_drop": 0.99 * made.stage("quantized").drop, "float_nodes": 1})
    first, last = made.quantization.trade_off
    assert (len(last.left), last.drop) == (1, made.stage("quantized").drop)
    assert last.drop < first.drop
    assert is_equalized(made.quantized) == is_kept


def test_what_decides_calibrates_nothing_and_judges_nothing(monkeypatch):
    """Inputs of another seed than those of the calibration, than those of the next seeds, and than the data."""
    seen = []
    real = quantized_stage.trial_feeds
    monkeypatch.setattr(quantized_stage, "trial_feeds", lambda *arguments: seen.append(real(*arguments)) or seen[-1])
    calibrating = []
    enter = Quantizer.__enter__
    monkeypatch.setattr(Quantizer, "__enter__", lambda self: calibrating.append(self.feeds) or enter(self))
    without = fastbn.deploy(gaining(), **OPTIONS).quantization.equalization
    beside = fastbn.deploy(gaining(), **OPTIONS, data=normal(16, 3, 8, 8)).quantization.equalization
    other = fastbn.deploy(gaining(), **OPTIONS, seed=1).quantization.equalization
    assert without == beside != other
    assert (len(seen), len(calibrating)) == (3, 3)
    first = [feeds[0]["x"] for feeds in (*seen, *calibrating)]
    assert (first[0] == first[1]).all(), "the data have no part in it"
    for one, two in ((0, 2), (0, 3), (0, 5), (2, 3), (2, 5)):
        assert abs(np.corrcoef(first[one].ravel(), first[two].ravel())[0, 1]) < 0.5
    assert len(seen[0]) == len(calibrating[0]) == 48
    assert without.inputs == "48 synthetic inputs of another seed"
    seeds = [trial_seed(seed) for seed in range(1000)]
    assert len({*seeds, *range(1000)}) == 2000
    assert max(seeds) < 2**32


def test_random_numbers_decide_where_no_batch_normalization_says_anything():
    made = constants()
    made |= {"m": np.zeros(6, np.float32), "v": np.ones(6, np.float32)}
    trial = fastbn.deploy(model(TEXT, **made), **OPTIONS).quantization.equalization
    assert trial.inputs == "48 random numbers of another seed"
    free = data_free.DataFree([], [], ())
    assert trial_feeds(None, [{"x": 1}], free, 0) == [{"x": 1}]


def refusing(monkeypatch, refusal):
    """Let the quantizer refuse the model with equalized layers."""
    real = Quantizer.quantize

    def quantize(quantizer, path, target, **options):
        if path.name == "equalized.onnx":
            raise QuantizerRefused(refusal)
        return real(quantizer, path, target, **options)

    monkeypatch.setattr(Quantizer, "quantize", quantize)


def test_where_the_quantizer_refuses_the_equalized_model_the_other_stays(monkeypatch):
    refusing(monkeypatch, "on purpose")
    made = fastbn.deploy(gaining(), **OPTIONS)
    assert made.quantization.refused is None
    assert str(made.quantization.equalization) == "channels of 2 layers not equalized: on purpose"
    assert made.stage("quantized").drop < 0.2


def test_the_time_limit_holds_for_both_together(monkeypatch):
    limits = []
    real = Quantizer.quantize

    def quantize(quantizer, path, target, **options):
        limits.append((path.name, options.get("seconds")))
        return real(quantizer, path, target, **options)

    monkeypatch.setattr(Quantizer, "quantize", quantize)
    fastbn.deploy(gaining(), **OPTIONS, quantize_timeout=200)
    (first, whole), (second, rest), *_ = limits
    assert (first, whole, second) == ("folded.onnx", 200, "equalized.onnx")
    assert 100 < rest < 200
    now = iter(range(0, 10**6, 1000))
    monkeypatch.setattr(quantized_stage, "time", SimpleNamespace(monotonic=lambda: next(now)))
    limits.clear()
    made = fastbn.deploy(gaining(), **OPTIONS, quantize_timeout=200)
    assert "equalized.onnx" not in [name for name, _ in limits]
    assert made.quantization.refused is None
    assert made.quantization.equalization.refused == "no time is left to try; --quantize-timeout may give more"


@pytest.mark.parametrize(("error", "said"), [
    (RuntimeError("it broke"), "onnxruntime cannot run it: it broke"),
    (None, "no output can be compared"),
])  # fmt: skip
def test_what_cannot_be_tried_is_not_equalized(error, said, monkeypatch):
    def session(path, **options):
        if error is not None and "equalized" in path:
            raise error
        return real(path, **options)

    real = quantized_stage.session
    monkeypatch.setattr(quantized_stage, "session", session)
    if error is None:
        monkeypatch.setattr(quantized_stage, "drop_of", lambda found, metric: None)
    made = fastbn.deploy(gaining(), **OPTIONS)
    assert (made.quantization.refused, made.quantization.equalization.refused) == (None, said)
    assert not made.quantization.equalization.kept


@pytest.mark.parametrize("make", [gaining, losing])
def test_every_report_says_what_was_kept_and_both_losses(make, tmp_path, monkeypatch, capsys):
    classifier_folder(tmp_path, monkeypatch)
    Path("in.onnx").write_bytes(make().SerializeToString())
    options = ("--quantize", "--data-free", "--max-drop", "1", "--for", "memory", "--report", "report.html", "--force")
    trial = as_json(capsys, *options, code=4)["quantization"]["equalization"]
    assert trial["kept"] == (make is gaining) == (trial["loss"] < trial["loss_without"])
    assert (trial["layers"], trial["inputs"], trial["refused"]) == (
        2 if make is gaining else 3,
        "48 synthetic inputs of another seed",
        None,
    )
    what = "equalized with the layers behind" if trial["kept"] else "not equalized, for that loses no less"
    losses = f"a relative error of {trial['loss']:.2g}, without {trial['loss_without']:.2g}"
    sentence = f"hannels of {trial['layers']} layers {what}: {losses}, on {trial['inputs']}"
    assert sentence in " ".join(Path("report.html").read_text(encoding="utf-8").split())
    deploy(*options, code=4)
    assert sentence in " ".join(capsys.readouterr().out.split())
    assert files(tmp_path) == ["data.npz", "in.onnx", "out.onnx", "report.html"]


def test_as_text_and_data():
    assert str(EqualizationTrial(1, "x", 0.5, 0.5)) == (
        "channels of 1 layer not equalized, for that loses no less: a relative error of 0.5, without 0.5, on x"
    ), "what loses as much stays as it was verified"
    assert not EqualizationTrial(1, "x", float("inf"), float("inf")).kept
    assert EqualizationTrial(1, "x", 0.5, float("inf")).kept
    fields = EqualizationTrial(3, "x", float("inf"), 0.5).to_dict()
    assert json.loads(json.dumps(fields)) == {
        "kept": False, "layers": 3, "inputs": "x", "loss": "inf", "loss_without": 0.5, "refused": None,
    }  # fmt: skip
