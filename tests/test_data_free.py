"""Calibration without data: synthetic inputs, what batch normalizations remember, and what int8 loses by it on real digits."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from shell import classifier_folder
from sketch import classifier, model, norm, normal, run

import fastbn
from fastbn.cli import main
from fastbn.deployment import stages
from fastbn.deployment.bn_statistics import Moments, Remembered
from fastbn.deployment.data_free import data_free, feeds_wanted
from fastbn.deployment.synthetic import KINDS, synthetic
from fastbn.graph.model import storage
from fastbn.graph.model.index import Index

MODELS = Path(__file__).resolve().parent / "models"

TWO = """(float[N,3,8,8] x) => (float[N,4,4,4] y) {
    c = Conv(x, w, b)
    n = BatchNormalization(c, s, t, m, v)
    r = Relu(n)
    k = Conv(r, w2)
    y = BatchNormalization(k, s2, t2, m2, v2)
}"""


def two(**changes):
    return model(TWO, **{"w": normal(4, 3, 3, 3), "b": normal(4), "w2": normal(4, 4, 3, 3), **norm(4), **norm(4, "2", seed=2), **changes})


def remembered(proto):
    return Remembered(Index(storage.load(proto)))


def feeds(count, *shape, name="x"):
    return [{name: np.zeros((1, *shape), np.float32)} for _ in range(count)]


@pytest.mark.parametrize("shape", [(3, 16, 16), (16, 16, 3), (20, 4), (4, 20), (9,), (2, 3, 8, 8)])
def test_synthetic_inputs_of_each_kind_have_mean_0_and_deviation_1(shape):
    made = synthetic(feeds(12, *shape), np.random.default_rng(0))
    for kind in range(len(KINDS)):
        values = np.stack([feed["x"] for feed in made[kind :: len(KINDS)]])
        assert (values.dtype, values.shape[1:]) == (np.float32, (1, *shape))
        assert abs(values.mean()) < 1e-4
        assert values.std() == pytest.approx(1, abs=1e-3)


def test_neighbors_are_alike_along_the_axes_of_a_picture():
    for shape, axes in (((3, 32, 32), (2, 3)), ((32, 32, 3), (1, 2)), ((40, 3), (1,)), ((3, 40), (2,)), ((40,), (1,))):
        made = synthetic(feeds(30, *shape), np.random.default_rng(0))
        for kind, least in enumerate((-1, 0.5, 0.5)):
            values = np.concatenate([feed["x"] for feed in made[kind :: len(KINDS)]])
            for axis in axes:
                one, other = np.take(values, range(1, values.shape[axis]), axis), np.take(values, range(values.shape[axis] - 1), axis)
                correlation = np.corrcoef(one.ravel(), other.ravel())[0, 1]
                assert correlation > least
                assert kind or abs(correlation) < 0.2


def test_what_is_no_float_stays():
    tokens = np.arange(6).reshape(2, 3)
    made = synthetic([{"x": np.zeros((1, 4), np.float32), "tokens": tokens, "scalar": np.float32(3).reshape(())}], np.random.default_rng(0))
    assert made[0]["tokens"] is tokens
    assert made[0]["scalar"].shape == ()


def test_every_batch_normalization_gives_what_it_gives_on_real_data():
    proto = two()
    inputs = [{"x": 5 + 3 * normal(1, 3, 8, 8, seed=seed)} for seed in range(40)]
    restated = remembered(proto).restated(inputs)
    for output, suffix in (("n", ""), ("y", "2")):
        watched = onnx.ModelProto.FromString(restated.SerializeToString())
        watched.graph.output.add(name="n")
        constants = norm(4, suffix, seed=2 if suffix else 1)
        together = np.concatenate([run(watched, feed)[output == "n"] for feed in inputs])
        var = constants[f"v{suffix}"]
        assert together.mean((0, 2, 3)) == pytest.approx(constants[f"t{suffix}"], abs=1e-3)
        assert together.std((0, 2, 3)) == pytest.approx(np.abs(constants[f"s{suffix}"]) * np.sqrt(var / (var + 1e-5)), rel=1e-3)
    assert [node.output for node in restated.graph.node] == [node.output for node in proto.graph.node]
    assert proto.SerializeToString() == two().SerializeToString(), "the model itself is not changed"


def test_a_channel_that_is_dead_on_the_inputs_keeps_its_scale():
    w = normal(4, 3, 3, 3)
    w[1] = 0
    restated = remembered(two(w=w)).restated([{"x": normal(8, 3, 8, 8)}])
    (y,) = run(restated, {"x": normal(8, 3, 8, 8, seed=1)})
    assert np.isfinite(y).all()
    assert np.abs(y).max() < 100


def test_what_the_first_remember_is_measured():
    proto = two()
    x = normal(16, 3, 8, 8)
    ((told, found),) = remembered(proto).first()([{"x": x[:8]}, {"x": x[8:]}])
    watched = onnx.ModelProto.FromString(proto.SerializeToString())
    watched.graph.output.add(name="c")
    c = run(watched, {"x": x})[1]
    assert (told.mean == norm(4)["m"]).all()
    assert (told.var == norm(4)["v"]).all()
    assert found.mean == pytest.approx(c.mean((0, 2, 3)), abs=1e-5)
    assert found.var == pytest.approx(c.var((0, 2, 3)), rel=1e-4)
    assert told.distance(told) == 0
    assert told.distance(Moments(told.mean + 1, told.var, 1)) > told.distance(Moments(told.mean + 0.1, told.var, 1)) > 0


def test_one_that_has_seen_no_data_remembers_nothing():
    fresh = {"m": np.zeros(4, np.float32), "v": np.ones(4, np.float32)}
    assert len(remembered(two())) == 2
    assert len(remembered(two(**fresh))) == 1
    proto = classifier(**fresh)
    found = data_free(Index(storage.load(proto)), [{"x": normal(1, 3, 8, 8)}], 0)
    assert found.restated == []
    assert (found.feeds[0]["x"] == normal(1, 3, 8, 8)).all()
    assert found.notes == ("no batch normalization says what real inputs are like: calibrated on random numbers",)


@pytest.mark.parametrize(("mean", "deviation"), [(0, 1), (110, 60), (0.3, 0.2), (-1, 0.05)])
def test_the_scale_of_real_inputs_is_found(mean, deviation):
    w = normal(16, 3, 3, 3) + 0.2
    rest = {"b": normal(16), "w2": normal(4, 16, 3, 3), **norm(4, "2", seed=2)}
    proto = two(w=w, **rest, **norm(16))
    real = synthetic(feeds(60, 8, 8, 3), np.random.default_rng(7))[1::3]
    real = [{"x": (mean + deviation * feed["x"].transpose(0, 3, 1, 2)).astype(np.float32)} for feed in real]
    found = remembered(proto).first()(real)[0][1]
    proto = two(
        w=w, **rest, s=np.ones(16, np.float32), t=np.zeros(16, np.float32), m=found.mean.astype(np.float32), v=found.var.astype(np.float32)
    )
    made = data_free(Index(storage.load(proto)), feeds(48, 3, 8, 8), 0)
    values = np.stack([feed["x"] for number, feed in enumerate(made.feeds) if number % 3])
    assert abs(values.mean() - mean) < 0.6 * deviation
    assert 0.5 < values.std() / deviation < 2


def test_a_batch_normalization_of_the_input_itself_tells_the_scale_of_each_channel():
    parameters = {"m": np.array([100, -3, 0.1], np.float32), "v": np.array([400, 1, 0.01], np.float32)}
    text = "(float[N,3] x) => (float[N,2] y) { n = BatchNormalization(x, s, t, m, v) y = MatMul(n, w) }"
    proto = model(text, s=np.ones(3, np.float32), t=np.zeros(3, np.float32), w=normal(3, 2), **parameters)
    made = data_free(Index(storage.load(proto)), [{"x": np.zeros((8, 3), np.float32)} for _ in range(12)], 0)
    values = np.concatenate([feed["x"] for feed in made.feeds])
    assert values.mean(0) == pytest.approx(parameters["m"], rel=0.2, abs=0.6)
    assert values.std(0) == pytest.approx(np.sqrt(parameters["v"]), rel=0.3)


def test_one_feed_of_many_rows_is_enough():
    made = data_free(Index(storage.load(two())), [{"x": normal(64, 3, 8, 8)}], 0)
    assert len(made.feeds) == 1
    assert np.isfinite(made.feeds[0]["x"]).all()
    assert "that fit the first batch normalizations" in made.notes[0]


def test_large_inputs_make_few_feeds():
    assert feeds_wanted({"x": np.zeros((1, 3, 32, 32))}) == 96
    assert feeds_wanted({"x": np.zeros((1, 3, 224, 224))}) == 13
    assert feeds_wanted({"x": np.zeros((1, 3, 1024, 1024))}) == 12


def ran(*options):
    """Deploy in.onnx, whatever is shipped."""
    assert main(["deploy", "in.onnx", "out.onnx", "--runs", "2", *options]) in (0, 4)


def test_the_command_says_what_it_calibrates_on(tmp_path, monkeypatch, capsys):
    classifier_folder(tmp_path, monkeypatch)
    ran("--quantize", "--data-free", "--max-drop", "1")
    out = capsys.readouterr().out
    assert "WARNING no --data: compared and calibrated on synthetic inputs; what they say of real inputs is little\n" in out
    assert "        synthetic inputs that fit the first batch normalizations: 'x' of mean " in out
    assert "96 samples from synthetic inputs, seed 0\n" in out
    ran("--quantize", "--data-free", "--data", "data.npz", "--max-drop", "1")
    out = capsys.readouterr().out
    assert "16 samples from data.npz\n" in out
    assert "synthetic inputs that fit" in out


def loss_on_digits(path, quantized, images):
    """Return (relative error of the outputs, decisions that agree) of a quantized model on the digits."""
    outputs = []
    for each in (str(path), quantized):
        session = onnxruntime.InferenceSession(each, providers=["CPUExecutionProvider"])
        outputs.append(session.run(None, {session.get_inputs()[0].name: images})[0])
    before, after = outputs
    return np.linalg.norm(after - before) / np.linalg.norm(before), np.mean(before.argmax(1) == after.argmax(1))


@pytest.mark.parametrize("net", ["torch", "keras"])
def test_digits_lose_less_than_half_of_what_random_calibration_loses(net, monkeypatch):
    monkeypatch.setattr(stages, "resident_mb", lambda paths: {})
    path = MODELS / f"{net}_digits.onnx"
    with np.load(MODELS / "digits.npz") as arrays:
        images = np.expand_dims(arrays["image"], 1 if net == "torch" else -1)
    options = {"quantize": True, "max_drop": 1, "runs": 1, "goal": "size"}
    random, free, real = (
        loss_on_digits(path, fastbn.deploy(path, **options, **more).quantized, images)
        for more in ({}, {"data_free": True}, {"data": MODELS / "digits.npz", "most_samples": 360})
    )
    assert free[0] < 0.5 * random[0]
    assert free[1] >= real[1] - 0.003
