"""deploy --reestimate: new running statistics from half of the samples are used where the accuracy on the other half does not fall."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from shell import as_json, classifier_folder, deploy, fails, quick
from sketch import classifier, normal, run

import fastbn
from fastbn.cli import main
from fastbn.deployment.reestimated import halves
from fastbn.deployment.samples import Samples

MODELS = Path(__file__).resolve().parent / "models"

X = 4 * normal(64, 3, 8, 8) + 3


@pytest.fixture(name="here")
def _here(tmp_path, monkeypatch):
    folder = classifier_folder(tmp_path, monkeypatch)
    np.savez("data.npz", x=X, labels=run(classifier(), {"x": X})[0].argmax(axis=1))
    return folder


def test_digits_with_half_the_exposure_are_recognized_again(tmp_path, monkeypatch, capsys):
    quick(monkeypatch)
    monkeypatch.chdir(tmp_path)
    digits = np.load(MODELS / "digits.npz")
    np.savez("dark.npz", image=digits["image"][:, None] / 2, labels=digits["labels"])
    command = ["deploy", str(MODELS / "torch_digits.onnx"), "out.onnx", "--data", "dark.npz", "--samples", "360", "--reestimate"]
    assert main([*command, "--runs", "1", "--json", "-", "--report", "report.html"]) == 0
    report = json.loads(capsys.readouterr().out)
    found = report["new_statistics"]
    assert (found["used"], found["batch_normalizations"], found["samples"], report["data"]["rows"]) == (True, 1, 180, 180)
    assert found["before"]["accuracy"] < 0.9 < 0.96 < found["after"]["accuracy"]
    assert found["after"]["right"] == report["stages"][0]["accuracy"]["right"] == report["stages"][1]["accuracy"]["right"]
    assert report["shipped"] == "folded"
    scores = run(onnx.load("out.onnx"), {"image": digits["image"][:, None] / 2})[0]
    assert (scores.argmax(axis=1) == digits["labels"]).mean() > 0.95
    page = Path("report.html").read_text(encoding="utf-8")
    assert "New running statistics" in page
    assert "Statistics of 1 batch normalization from 180 samples, used; " in page


def test_statistics_with_which_accuracy_falls_are_not_used(here, capsys):
    report = as_json(capsys, "--reestimate", "--data", "data.npz", code=4)
    found = report["new_statistics"]
    assert (found["used"], found["before"]["accuracy"]) == (False, 1.0)
    assert found["after"]["accuracy"] < 1
    assert (report["shipped"], report["status"]) == ("folded", "partial")
    assert report["decision"].endswith("with its old statistics, for accuracy would fall with new ones")
    scores = run(onnx.load("out.onnx"), {"x": X})[0]
    assert np.array_equal(scores.argmax(axis=1), np.load("data.npz")["labels"])


def test_the_original_that_is_kept_has_the_new_statistics(here):
    fitting = fastbn.reestimate("in.onnx", {"x": X}).model
    labels = run(fitting, {"x": X})[0].argmax(axis=1)
    made = fastbn.deploy("in.onnx", data={"x": X, "labels": labels}, reestimate=True, skip="*", runs=1)
    assert made.new_statistics is not None
    assert made.new_statistics.used
    assert (made.shipped, made.status) == ("folded", "done")  # nothing was folded, so it is the original with new statistics
    made.save("kept.onnx")
    assert made.to_bytes() == Path("kept.onnx").read_bytes()
    right = [(run(proto, {"x": X})[0].argmax(axis=1) == labels).mean() for proto in (classifier(), onnx.load("kept.onnx"))]
    assert right[1] > max(0.9, right[0])


def test_a_model_without_any_is_deployed_as_it_is(here):
    proto = onnx.parser.parse_model('<ir_version: 8, opset_import: ["" : 17]> g (float[N, 5] x) => (float[N, 5] y) { y = Relu (x) }')
    x = normal(16, 5)
    made = fastbn.deploy(proto, data={"x": x, "labels": x.argmax(axis=1)}, reestimate=True, runs=1)
    assert (made.shipped, made.status, str(made.new_statistics)) == (
        "folded",
        "done",
        "no batch normalization has statistics that can be estimated again",
    )


def test_what_cannot_be_judged_is_refused(here, capsys):
    assert "Expected data to estimate statistics from, got none - at `--data`" in fails(
        capsys, "deploy", "in.onnx", "out.onnx", "--reestimate"
    )
    np.savez("data.npz", x=X)
    line = fails(capsys, "deploy", "in.onnx", "out.onnx", "--reestimate", "--data", "data.npz", "-q")
    assert "Expected labels in the data, which tell whether new statistics are better, got none - at `--reestimate`" in line
    np.savez("data.npz", x=X[:1], labels=[0])
    line = fails(capsys, "deploy", "in.onnx", "out.onnx", "--reestimate", "--data", "data.npz", "-q")
    assert "Expected at least two feeds, one to estimate on and one to compare on, got 1" in line


def test_every_sample_is_in_one_half_and_the_seed_says_in_which():
    feeds = [{"x": np.full((1, 2), number)} for number in range(7)]
    samples = Samples(feeds, 7, 7, "here", False, labels=[np.array([number]) for number in range(7)], labels_name="y")

    def numbers(part):
        assert [int(label[0]) for label in part.labels] == [int(feed["x"][0, 0]) for feed in part.feeds]
        return [int(feed["x"][0, 0]) for feed in part.feeds]

    first, second = map(numbers, halves(samples, 0))
    assert (sorted(first + second), len(first)) == (list(range(7)), 4)
    assert (first, second) == tuple(map(numbers, halves(samples, 0)))
    assert any(numbers(halves(samples, seed)[0]) != first for seed in range(1, 5))


def test_tensors_in_data_files_stay_there(here):
    proto = classifier()
    onnx.save(proto, "in.onnx", save_as_external_data=True, location="in.data", size_threshold=0)
    deploy("--reestimate", "--data", "data.npz", "--force", code=4)
    scores = run(onnx.load("out.onnx"), {"x": X})[0]
    assert np.array_equal(scores.argmax(axis=1), np.load("data.npz")["labels"])
