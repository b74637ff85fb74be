"""Labels: how an output decides, what a stage gets right, and one line for labels that do not fit."""

import json
from pathlib import Path

import numpy as np
import pytest
from shell import as_json, classifier_folder, deploy, files, losing, quick
from sketch import classifier, conv_bn, model, normal, run

import fastbn
from fastbn import ArgumentError, ArgumentTypeError
from fastbn.cli import main
from fastbn.deployment.labels import Marks, Rule, as_labels, interval_of_loss
from fastbn.deployment.samples import read_samples
from fastbn.graph.model import storage
from fastbn.graph.model.index import Index

MODELS = Path(__file__).resolve().parent / "models"

X = normal(16, 3, 8, 8)


def decided():
    return run(classifier(), {"x": X})[0].argmax(axis=1)


@pytest.fixture(name="here")
def _here(tmp_path, monkeypatch):
    return classifier_folder(tmp_path, monkeypatch)


def save(**arrays):
    np.savez("data.npz", x=X, **arrays)


@pytest.mark.parametrize("net", ["torch", "keras"])
def test_the_shipped_digits_fit_both_shipped_classifiers_from_the_command_line(net, tmp_path, monkeypatch, capsys):
    quick(monkeypatch)
    monkeypatch.chdir(tmp_path)
    command = ["deploy", str(MODELS / f"{net}_digits.onnx"), "out.onnx", "--data", str(MODELS / "digits.npz"), "--samples", "360"]
    assert main([*command, "--quantize", "--runs", "1", "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["metric"], report["max_drop"], report["data"]["labels"], report["data"]["rows"]) == ("accuracy", 0.01, "labels", 360)
    original, folded, quantized = (stage["accuracy"] for stage in report["stages"])
    recognized = {"torch": 352, "keras": 357}[net]
    assert (original["right"], original["labels"], original["lost"]) == (recognized, 360, None)
    assert (folded["right"], folded["lost"]) == (recognized, 0)
    assert abs(quantized["right"] - recognized) <= 3
    assert quantized["low"] < quantized["lost"] < quantized["high"] < 0.02
    assert f"accuracy {quantized['accuracy']:.1%} ({quantized['right']} of 360)" in report["decision"]
    assert len(report["data"]["notes"]) == 1
    assert report["data"]["notes"][0].startswith("'image' was given an axis of size 1")


def test_whole_numbers_may_be_floats():
    for values in (np.float32([0, 2, -1]), np.float64([[0], [2], [-1]]), np.float16([0, 2, -1])):
        labels = as_labels(values, "here")
        assert (labels.dtype, labels.tolist()) == (np.int64, [0, 2, -1])
    for bad in ([0, np.nan], [0, np.inf], [1e19, 0], [0.5, 1]):
        with pytest.raises(ArgumentError, match="labels that are whole numbers"):
            as_labels(np.float64(bad), "here")


def test_accuracy_becomes_the_metric(here, capsys):
    labels = decided()
    labels[:4] = (labels[:4] + 1) % 5
    save(labels=labels.astype(np.uint8))
    report = as_json(capsys, "--data", "data.npz")
    assert report["metric"] == "accuracy"
    assert [stage["accuracy"]["right"] for stage in report["stages"]] == [12, 12]
    assert report["decision"].endswith("accuracy 75.0% (12 of 16), 0.0 points lost (-15.4 to 15.4), 1 may be lost")
    assert report["warnings"] == ["16 labels are too few to prove it: folded may lose up to 15.4 points of accuracy, 1 are allowed"]
    assert as_json(capsys, "--data", "data.npz", "--metric", "top-1")["stages"][1]["accuracy"]["right"] == 12
    deploy("--data", "data.npz")
    out = capsys.readouterr().out
    assert "top-1    accuracy" in out
    assert "16 samples with labels from data.npz" in out


def test_a_stage_that_loses_points_is_not_shipped(here, capsys, monkeypatch):
    save(labels=decided())
    real = Marks.note

    def note(self, stage, number, outputs):
        real(self, stage, number, [-outputs[0]] if stage == "quantized" and number < 4 else outputs)

    monkeypatch.setattr(Marks, "note", note)
    report = as_json(capsys, "--data", "data.npz", "--quantize", code=4)
    assert report["shipped"] == "folded"
    assert report["stages"][2]["drop"] == pytest.approx(4 / 16, abs=0.07)
    assert "points lost (" in report["stages"][2]["refused"]
    assert as_json(capsys, "--data", "data.npz", "--quantize", "--max-drop", "0.4")["shipped"] == "quantized"


@pytest.mark.parametrize("name", ["labels", "y", "targets"])
def test_names_that_are_labels_by_themselves(name, here, capsys):
    save(**{name: decided()[:, None]})
    assert as_json(capsys, "--data", "data.npz")["data"]["labels"] == name


def test_labels_by_a_name_of_their_own_and_other_arrays_that_are_ignored(here, capsys):
    save(digit=decided(), path=np.arange(16.0), torch=np.arange(16))
    deploy("--data", "data.npz", "--labels", "digit", code=2)
    message = "Expected arrays named after the inputs (x) (--ignore-unknown leaves out what is no input), got 'path' - at `data.npz`"
    assert capsys.readouterr().err.splitlines()[-1] == f"fastbn: {message}"
    report = as_json(capsys, "--data", "data.npz", "--labels", "digit", "--ignore-unknown")
    assert report["data"]["notes"] == ["ignored, for no input has the name: 'path', 'torch'"]
    assert (report["data"]["labels"], report["stages"][0]["accuracy"]["right"]) == ("digit", 16)


def test_an_input_called_labels_is_an_input():
    text = "(float[N,4] x, int64[N] labels) => (float[N,4] y) { c = Cast<to=1>(labels) d = Unsqueeze(c, one) y = Add(x, d) }"
    index = Index(storage.load(model(text, one=np.array([1]))))
    samples = read_samples({"x": normal(5, 4), "labels": np.arange(5)}, index, 9)
    assert samples.labels is None
    samples = read_samples({"x": normal(5, 4), "labels": np.arange(5), "targets": np.arange(5)}, index, 9)
    assert np.concatenate(samples.labels).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ArgumentError, match="Expected an array of labels that is no input, got 'labels' - at `labels`"):
        read_samples({"x": normal(5, 4), "labels": np.arange(5)}, index, 9, "labels")


BAD = {
    "another length": ({"labels": np.arange(15) % 5}, [], "16 labels in 'labels', one for each sample, got 15 - at `data.npz`"),
    "floats": ({"labels": np.linspace(0, 1, 16)}, [], "labels that are whole numbers, or rows with one 1 and else 0, got float64"),
    "text": ({"labels": np.array(["a"] * 16)}, [], "labels that are whole numbers, or rows with one 1 and else 0, got <U1"),
    "too large": ({"labels": np.arange(16)}, [], "labels from 0 to 4, as output 'y' has classes, got 15 - at `'labels'`"),
    "another shape": (
        {"labels": np.zeros((16, 3), int)},
        [],
        "an output with classes for labels of shape [1,3], got 'y' [1,5] - at `--data`",
    ),
    "no such array": ({}, ["--labels", "digit"], "labels 'digit', got 'x' - at `data.npz`"),
    "none for the metric": ({}, ["--metric", "accuracy"], "labels in the data for the metric 'accuracy', got none - at `--metric`"),
    "a negative slowdown": ({}, ["--max-slowdown", "-1"], "a part, 0 or more, got -1.0 - at `--max-slowdown`"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_labels_are_one_line_and_write_nothing(case, here, capsys):
    arrays, options, message = BAD[case]
    save(**arrays)
    before = files(here)
    deploy("--data", "data.npz", *options, "-q", code=2)
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"fastbn: Expected {message}")
    assert files(here) == before


def test_labels_of_a_model_without_classes(here, capsys):
    (here / "in.onnx").write_bytes(conv_bn().SerializeToString())
    save(labels=np.arange(16))
    deploy("--data", "data.npz", "-q", code=2)
    message = "Expected an output with classes for labels of shape [1], got 'y' [1,4,6,6] - at `--data`"
    assert capsys.readouterr().err == f"fastbn: {message}\n"


def test_labels_of_some_samples_only(here):
    (here / "many").mkdir()
    np.savez("many/0.npz", x=X[:4], labels=np.arange(4))
    np.savez("many/1.npz", x=X[4:])
    with pytest.raises(ArgumentError, match=r"Expected labels of every sample or of none, got none in many/1.npz - at `many`"):
        read_samples("many", Index(storage.load(classifier())), 99)


def test_options_about_a_verdict():
    with pytest.raises(ArgumentError, match="Expected latency, size or memory, got 'speed' - at `goal`"):
        fastbn.deploy(classifier(), goal="speed")
    with pytest.raises(ArgumentTypeError, match="Expected the name of an array, got int - at `labels`"):
        fastbn.deploy(classifier(), labels=3)
    with pytest.raises(ArgumentTypeError, match="at `max_slowdown`"):
        fastbn.deploy(classifier(), max_slowdown="fast")


def test_labels_as_whole_numbers():
    assert as_labels([3, 1], "x").tolist() == [3, 1]
    assert as_labels(np.array([[3], [1]], np.uint8), "x").tolist() == [3, 1]
    assert as_labels(np.eye(3)[[2, 0]], "x").tolist() == [2, 0]
    assert as_labels(np.array([True, False]), "x").tolist() == [1, 0]
    with pytest.raises(ArgumentError, match=r"Expected labels below 2\*\*63"):
        as_labels(np.array([2**63], np.uint64), "x")


def rule(proto, feed, labels):
    index = Index(storage.load(proto))
    names = [info.name for info in proto.graph.output]
    outputs = run(proto, feed)
    found = Rule.of(index, names, outputs, labels, [])
    return found, found.right(outputs, labels)


def test_a_label_for_each_pixel():
    text = "(float[N,3,8,8] x) => (float[N,4,6,6] y) { y = Conv(x, w) }"
    proto = model(text, w=normal(4, 3, 3, 3))
    labels = run(proto, {"x": X})[0].argmax(axis=1)
    labels[0, 0, :3] += 1
    labels[1] = -1
    labels[2, 0, 0] = -100
    found, right = rule(proto, {"x": X}, labels)
    assert (found.kind, found.axis, found.classes) == ("classes", 1, 4)
    assert right[0] == pytest.approx(33 / 36)
    assert np.isnan(right[1])
    assert right[2:].tolist() == [1] * 14
    marks = Marks(found, [labels])
    for stage in ("original", "folded"):
        marks.note(stage, 0, run(proto, {"x": X}))
    accuracy = marks.accuracy("folded", "original")
    assert (accuracy.labels, accuracy.right, accuracy.lost) == (15 * 36 - 1, 15 * 36 - 4, 0)


def test_classes_in_the_last_axis():
    proto = model("(float[N,T,4] x) => (float[N,T,5] y) { y = MatMul(x, w) }", w=normal(4, 5))
    x = normal(3, 7, 4)
    found, right = rule(proto, {"x": x}, run(proto, {"x": x})[0].argmax(axis=2))
    assert (found.axis, found.classes, right.tolist()) == (2, 5, [1, 1, 1])


@pytest.mark.parametrize("sigmoid", [False, True])
def test_one_score(sigmoid):
    last = "p = Sigmoid(s) y = Squeeze(p, one)" if sigmoid else "y = Identity(s)"
    shape = "float[N] y" if sigmoid else "float[N,1] y"
    proto = model(f"(float[N,4] x) => ({shape}) {{ s = MatMul(x, w) {last} }}", w=normal(4, 1), one=np.array([1]))
    x = normal(50, 4)
    found, right = rule(proto, {"x": x}, (x @ normal(4, 1) > 0).astype(int)[:, 0])
    assert found.kind == ("probability" if sigmoid else "score")
    assert right.tolist() == [1] * 50
    with pytest.raises(ArgumentError, match="Expected labels from 0 to 1, as output 'y' has classes, got 7 - at `z`"):
        found.check([np.array([1, 7])], "z")


def test_labels_of_their_own_for_each_part_of_a_softmax():
    proto = model("(float[N,4] x) => (float[N,4] y) { y = Softmax(x) }")
    x = np.eye(4, dtype=np.float32) * 9
    found, right = rule(proto, {"x": x}, np.ones((4, 4), int))  # no part is negative, so that a sign decides nothing
    assert (found.kind, right.tolist()) == ("probability", [0.25] * 4)


def test_an_output_that_is_the_label():
    proto = model("(float[N,4] x) => (int64[N] y) { y = ArgMax<axis=1, keepdims=0>(x) }")
    x = normal(9, 4)
    found, right = rule(proto, {"x": x}, x.argmax(axis=1))
    assert (found.kind, found.classes, right.tolist()) == ("label", 0, [1] * 9)
    found.check([np.array([99])], "z")


def test_the_output_that_looks_like_scores_comes_first():
    proto = model("(float[N,4] x) => (float[N,4] z, float[N,4] y) { z = Tanh(x) y = Softmax(x) }")
    index = Index(storage.load(proto))
    outputs = run(proto, {"x": normal(2, 4)})
    assert Rule.of(index, ["z", "y"], outputs, np.array([0, 1]), ["y"]).place == 1
    assert Rule.of(index, ["z", "y"], outputs, np.array([0, 1]), []).place == 0


def test_the_interval_of_a_loss():
    random = np.random.default_rng(0)
    for before, after, count in ((0.02, 0.01, 360), (0.1, 0.05, 100), (0.005, 0.005, 200)):
        held = 0
        for _ in range(2000):
            draws = random.random(count)
            lost = (draws < before).astype(float) - (draws > 1 - after)
            low, high = interval_of_loss(lost)
            held += low <= before - after <= high
        assert held >= 0.935 * 2000, (before, after, count)
    low, high = interval_of_loss(np.zeros(360))
    assert -0.02 < low < 0 < high < 0.02
    assert interval_of_loss(np.zeros(10000))[1] < 0.001


def test_what_onnxruntime_changes_in_the_original_is_no_loss(here, monkeypatch):
    save(labels=decided())
    losing(monkeypatch, 0.0, 0.0)
    made = fastbn.deploy("in.onnx", data="data.npz", runs=1)
    assert [stage.drop for stage in made.stages] == [0, 0]
