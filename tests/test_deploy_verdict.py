"""Which stage is shipped: each of the four verdicts, with a model that leads to it, and the sentence that names all for and against it.

Latency and memory are recorded ones (`taking`, `weighing`): no test depends on how long anything takes.
"""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from shell import as_json, classifier_folder, deploy, files, losing, quick, taking, weighing
from sketch import classifier, model, norm, normal, ops

import fastbn
from fastbn.deployment.evidence import Comparison, between, comparisons
from fastbn.deployment.result import Stage
from fastbn.deployment.verdict import Judge
from fastbn.graph.intervals import Ratio
from fastbn.graph.results import Parity

MODELS = Path(__file__).resolve().parent / "models"


@pytest.fixture(name="here")
def _here(tmp_path, monkeypatch):
    return classifier_folder(tmp_path, monkeypatch)


INT8 = ("--data", "data.npz", "--quantize", "--max-drop", "0.25")


def test_quantized(here, capsys):
    report = as_json(capsys, *INT8)
    assert (report["shipped"], report["status"]) == ("quantized", "done")
    assert report["decision"].startswith("beside folded it is faster on 1 thread (0.50 of its time, 0.50 to 0.50), faster on 2 threads")
    assert "but 250% larger on disk (2.7 kB, not 0.8 kB)" in report["decision"], "the tiny model grows"
    assert "decisions differ from the original's" in report["decision"]
    assert (report["goal"], report["max_slowdown"]) == ("latency", None)
    assert "QuantizeLinear" in ops(onnx.load("out.onnx"))
    latency = report["comparisons"][0]
    assert (latency["stage"], latency["against"], latency["measure"], latency["threads"]) == ("folded", "original", "latency", 1)
    assert {each["measure"] for each in report["comparisons"]} == {"latency", "size", "memory"}
    assert len(report["comparisons"]) == 3 * 4


def test_folded_where_int8_is_slower(here, capsys, monkeypatch):
    taking(monkeypatch, original=1, folded=1, quantized=1.8)
    report = as_json(capsys, *INT8, code=4)
    assert (report["shipped"], report["status"]) == ("folded", "partial")
    why = report["stages"][2]["refused"]
    assert why.startswith("beside folded it is slower on 1 thread (1.80 of its time, 1.80 to 1.80), slower on 2 threads (1.80 ")
    assert report["decision"].startswith(f"quantized is refused: {why}; folded is taken: beside original it is ")
    assert ops(onnx.load("out.onnx")) == "Conv Relu GlobalAveragePool Flatten Gemm"
    deploy(*INT8, code=4)
    out, err = capsys.readouterr()
    assert f"shipped folded: quantized is refused: {why}"[:60] in " ".join(out.split())
    assert err.endswith("fastbn: folded shipped (exit code 4)\n"), "the decision is printed once"
    deploy(*INT8, "-q", code=4)
    assert "fastbn: folded shipped: quantized is refused: beside folded it is slower on 1 thread" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spread", "part", "said"),
    [
        (0.001, 1.0, "as fast"),
        (0.001, 0.99, "as fast"),
        (1.0, 0.9, "not known to be faster"),
        (1.0, 1.1, "not known to be faster"),
    ],
)
def test_folded_where_nothing_says_that_int8_is_faster(spread, part, said, here, capsys, monkeypatch):
    """As fast, as fast within what two sessions of one file differ by, or measured on a machine that is busy on all cores."""
    taking(monkeypatch, spread, original=1, folded=1, quantized=part)
    report = as_json(capsys, *INT8, code=4)
    assert report["shipped"] == "folded"
    assert report["stages"][2]["refused"].startswith(f"beside folded it is {said} on 1 thread (")
    assert ("too noisy to tell" in report["decision"]) == (spread == 1)


def test_original_kept(here, capsys, monkeypatch):
    taking(monkeypatch, original=1, folded=1.3)
    before = (here / "in.onnx").read_bytes()
    report = as_json(capsys, "--data", "data.npz", code=4)
    assert (report["shipped"], report["status"], report["written"]) == ("original", "partial", ["out.onnx"])
    assert report["decision"].startswith(
        "no stage is better than the original; folded is refused: beside original it is slower on 1 thread (1.30 "
    )
    assert "smaller on disk" in report["decision"]
    assert (here / "out.onnx").read_bytes() == before, "byte for byte"
    made = fastbn.deploy("in.onnx", data="data.npz", runs=1, goal="size")
    assert made.shipped == "folded", "it is smaller, and nobody says how slow it may be"


def test_original_kept_where_int8_is_no_better_either(here, capsys, monkeypatch):
    taking(monkeypatch, original=1, folded=1.3, quantized=1.0)
    report = as_json(capsys, *INT8, code=4)
    assert report["shipped"] == "original"
    assert "; quantized is refused: beside original it is as fast on 1 thread" in report["decision"]
    assert "; folded is refused: beside original it is slower on 1 thread" in report["decision"]
    taking(monkeypatch, original=1, folded=1.3, quantized=0.5)
    assert as_json(capsys, *INT8)["shipped"] == "quantized"


def test_the_original_with_data_files_is_kept_with_them(here, monkeypatch):
    taking(monkeypatch, original=1, folded=1.3)
    onnx.save(classifier(), "in.onnx", save_as_external_data=True, location="in.data", size_threshold=0)
    made = fastbn.deploy("in.onnx", "out.onnx", data="data.npz", runs=1)
    assert made.shipped == "original"
    assert files(here) == ["data.npz", "in.data", "in.onnx", "out.onnx", "out.onnx.data"]
    assert (here / "out.onnx.data").read_bytes() == (here / "in.data").read_bytes()
    onnx.checker.check_model("out.onnx")
    again = fastbn.deploy("out.onnx", data="data.npz", runs=1)
    assert again.samples.rows == 16


def test_refused_where_the_fold_is_wrong(here, capsys, monkeypatch):
    fold = fastbn.graph.job.fold

    def fail(*arguments, **options):
        result = fold(*arguments, **options)
        result.parity = Parity("failed", reason="on purpose")
        return result

    monkeypatch.setattr("fastbn.graph.job.fold", fail)
    report = as_json(capsys, *INT8, code=1)
    assert (report["shipped"], report["status"], report["written"]) == (None, "refused", [])
    assert report["provenance"]["output"] == []
    assert "out.onnx" not in files(here)


def test_refused_where_every_stage_loses_too_much(here, capsys, monkeypatch):
    losing(monkeypatch, 0.0, 0.3, 0.3)
    report = as_json(capsys, *INT8, "--float-nodes", "0", code=1)
    assert (report["shipped"], report["status"]) == (None, "refused")
    assert "out.onnx" not in files(here)


def test_by_what_is_really_lost_each_stage_is_refused_in_turn(here, capsys):
    """Nothing is made up but latencies: int8 loses some per mille, and the fold, which onnxruntime does not do itself, rounds."""
    text = "(float[N,3,8,8] x) => (float[N,4,6,6] y) { r = Relu(x) n = BatchNormalization(r, s, t, m, v) y = Conv(n, w) }"
    (here / "in.onnx").write_bytes(model(text, w=normal(4, 3, 3, 3), **norm(3)).SerializeToString())
    options = ("--data", "data.npz", "--quantize", "--metric", "error", "--float-nodes", "0", "--max-drop")
    report = as_json(capsys, *options, "0.5")
    assert (report["shipped"], report["status"]) == ("quantized", "done")
    lost = [stage["drop"] for stage in report["stages"]]
    assert 0 == lost[0] < lost[1] < 1e-6 < 1e-3 < lost[2]
    report = as_json(capsys, *options, "1e-6", "--force", code=4)
    assert (report["shipped"], report["status"]) == ("folded", "partial")
    assert report["decision"].startswith(
        f"quantized is refused: a relative error of {lost[2]:.2g} in the outputs, 1e-06 is allowed; folded "
    )
    (here / "out.onnx").unlink()
    report = as_json(capsys, *options, "0", code=1)
    assert (report["shipped"], report["status"]) == (None, "refused")
    assert f"; folded is refused: a relative error of {lost[1]:.2g} in the outputs, 0 is allowed" in report["decision"]
    assert files(here) == ["data.npz", "in.onnx"]


def test_a_model_in_which_nothing_is_folded_is_not_compared_with_itself(here, capsys, monkeypatch):
    taking(monkeypatch, original=1, folded=1.3)
    (here / "in.onnx").write_bytes(model("(float[N,3,8,8] x) => (float[N,3,8,8] y) { y = Relu(x) }").SerializeToString())
    report = as_json(capsys, "--data", "data.npz")
    assert (report["shipped"], report["status"]) == ("folded", "done")
    assert report["decision"] == "a relative error of 0 in the outputs, 0.1 is allowed"


def test_for_size(monkeypatch):
    quick(monkeypatch)
    taking(monkeypatch, original=1, folded=1, quantized=1.8)
    options = {"data": MODELS / "digits.npz", "quantize": True, "runs": 1}
    path = MODELS / "torch_digits.onnx"
    made = fastbn.deploy(path, goal="size", **options)
    assert (made.shipped, made.status) == ("quantized", "done")
    assert "73% smaller on disk" in made.decision
    assert ", but slower on 1 thread (1.80 of its time, 1.80 to 1.80), slower on 2 threads" in made.decision
    made = fastbn.deploy(path, goal="size", max_slowdown=0.5, **options)
    assert (made.shipped, made.status) == ("folded", "partial")
    assert "--max-slowdown allows 1.5 of its time" in made.stage("quantized").refused
    assert fastbn.deploy(path, goal="size", max_slowdown=0.9, **options).shipped == "quantized"
    taking(monkeypatch, 0.5, original=1, folded=1, quantized=1.8)
    assert fastbn.deploy(path, goal="size", max_slowdown=0.5, **options).shipped == "quantized", "not known to be slower"


def test_for_memory(here, capsys, monkeypatch):
    weighing(monkeypatch, original=10, folded=10, quantized=5)
    taking(monkeypatch, original=1, folded=1, quantized=1.8)
    assert as_json(capsys, *INT8, "--for", "memory")["decision"].startswith("beside folded it is smaller in memory (5.0 MB, not 10.0 MB)")
    weighing(monkeypatch, original=10, folded=10, quantized=9.9)
    report = as_json(capsys, *INT8, "--for", "memory", code=4)
    assert report["stages"][2]["refused"].startswith("beside folded it is as large in memory, but slower")
    weighing(monkeypatch)
    report = as_json(capsys, *INT8, "--for", "memory", code=4)
    assert report["stages"][2]["refused"].startswith("nothing says whether it is better than folded in memory")


def test_a_folded_model_may_be_slower_where_that_is_allowed(here, capsys, monkeypatch):
    taking(monkeypatch, original=1, folded=1.08)
    assert as_json(capsys, "--data", "data.npz", code=4)["shipped"] == "original"
    report = as_json(capsys, "--data", "data.npz", "--max-slowdown", "0.1")
    assert (report["shipped"], report["max_slowdown"]) == ("folded", 0.1)
    assert ", but slower on 1 thread (1.08 " in report["decision"]
    assert as_json(capsys, "--data", "data.npz", "--max-slowdown", "0.05", code=4)["shipped"] == "original"


def test_a_folded_model_that_is_only_larger_is_not_shipped(here, capsys):
    """Two branches with a norm each share a weight: the fold gives each its own."""
    text = "(float[N,3,8,8] x) => (float[N,16,6,6] y) { r = Relu(x) c = Conv(x, w) d = Conv(r, w)"
    text += " n = BatchNormalization(c, s, t, m, v) o = BatchNormalization(d, s2, t2, m2, v2) y = Add(n, o) }"
    second = {f"{name}2": values for name, values in norm(16).items()}
    (here / "in.onnx").write_bytes(model(text, w=normal(16, 3, 3, 3), **norm(16), **second).SerializeToString())
    report = as_json(capsys, "--data", "data.npz", code=4)
    assert report["shipped"] == "original"
    assert "as fast on 1 thread" in report["decision"]
    assert "but 47% larger on disk" in report["decision"]


def test_few_runs_say_nothing(here, capsys, monkeypatch):
    monkeypatch.undo()
    monkeypatch.chdir(here)
    weighing(monkeypatch)
    report = as_json(capsys, *INT8, code=4)
    assert report["stages"][2]["refused"].startswith("beside folded it is not known to be faster on 1 thread (")
    assert "too few runs to tell" in report["decision"]
    assert {row["low"] for row in report["latency"]} == {None}
    assert {row["runs"] for row in report["latency"]} == {2}


def test_the_same_measurements_give_the_same_verdict(here, monkeypatch):
    taking(monkeypatch, 0.01, original=1, folded=1, quantized=0.97)
    made = [fastbn.deploy("in.onnx", data="data.npz", quantize=True, max_drop=1, runs=1) for _ in range(3)]
    assert len({each.decision for each in made}) == 1
    assert len({json.dumps([c.to_dict() for c in each.comparisons]) for each in made}) == 1


def comparison(measure, ratio, stage="folded", against="original", threads=None):
    return Comparison(stage, against, measure, Ratio(ratio, ratio - 0.005, ratio + 0.005), threads, (ratio, 1))


def shipped(found, goal="latency", max_slowdown=None, refused=(), quantization=True):
    names = ["original", "folded", *(["quantized"] if quantization else [])]
    stages = [Stage(name, 1, drop=0.0, refused="loses" if name in refused else None) for name in names]
    judge = Judge("error", 0.1, [], True, goal, max_slowdown)
    asked = None if not quantization else fastbn.deployment.result.Quantization("recipe")
    return judge.verdict(stages, asked, found)


def test_without_measurements_the_folded_model_is_shipped():
    verdict, stages = shipped([])
    assert (verdict.shipped, verdict.status) == ("folded", "partial")
    assert stages[2].refused == "nothing says whether it is better than folded in latency"
    assert shipped([], quantization=False)[0] == dataclasses.replace(
        verdict, status="done", decision=verdict.decision.split("folded is taken: ")[-1]
    )


def test_int8_is_compared_with_what_would_be_shipped_without_it():
    faster = [comparison("latency", 0.5, "quantized", "original", 1), comparison("latency", 1.0, "folded", "original", 1)]
    assert shipped([*faster, comparison("latency", 1.2, "quantized", "folded", 1)])[0].shipped == "folded"
    assert shipped(faster, refused=["folded"])[0].shipped == "quantized"
    assert shipped(faster, refused=["original", "folded"])[0].shipped == "quantized"
    assert shipped(faster, refused=["folded", "quantized"])[0].shipped is None


def test_only_one_thread_decides():
    found = [comparison("latency", 0.5, "quantized", "folded", 4), comparison("latency", 1.0, "quantized", "folded", 1)]
    assert shipped(found)[0].shipped == "folded"


def test_comparisons_of_stages():
    found = comparisons([], {"original": 1000, "folded": 995, "quantized": 300}, {"original": [2.0, 2.1], "folded": [1.0, 1.1]})
    assert [(each.stage, each.against, each.measure) for each in found] == [
        ("folded", "original", "size"),
        ("folded", "original", "memory"),
        ("quantized", "original", "size"),
        ("quantized", "folded", "size"),
    ]
    size, memory = between(found, "folded", "original")
    assert (size.is_less, size.difference) == (True, "none"), "known exactly, and of no weight"
    assert str(size) == "0.5% smaller on disk (0.995 kB, not 1.000 kB)"
    assert (memory.difference, str(memory)) == ("less", "smaller in memory (1.1 MB, not 2.0 MB)")
    assert memory.ratio.low < 0.5 < memory.ratio.high
    (near,) = comparisons([], {"original": 0, "folded": 0}, {"original": [0.644, 0.645], "folded": [0.601, 0.602]})
    assert str(near) == "smaller in memory (0.602 MB, not 0.644 MB)", "what differs looks different"


def test_the_report_names_the_files_by_their_sha256(here, capsys):
    report = as_json(capsys, "--data", "data.npz")
    found = report["provenance"]
    for key in ("input", "output"):
        (one,) = found[key]
        assert one["sha256"] == hashlib.sha256(Path(one["name"]).read_bytes()).hexdigest()
    assert (found["input"][0]["name"], found["output"][0]["name"]) == ("in.onnx", "out.onnx")
    assert found["data"] == {"name": "data.npz", "sha256": hashlib.sha256((here / "data.npz").read_bytes()).hexdigest()}
    assert found["date"].endswith("+00:00")
    assert found["host"]


def test_sha256_of_data_files_of_stdout_and_of_arrays(here, capsysbinary):
    onnx.save(classifier(), "in.onnx", save_as_external_data=True, location="in.data", size_threshold=0)
    made = fastbn.deploy("in.onnx", "out.onnx", runs=1)
    names = [[each.name for each in part] for part in (made.provenance.input, made.provenance.output)]
    assert [[Path(name).name for name in part] for part in names] == [["in.onnx", "in.data"], ["out.onnx", "out.onnx.data"]]
    for each in (*made.provenance.input, *made.provenance.output):
        assert each.sha256 == hashlib.sha256(Path(each.name).read_bytes()).hexdigest()
    (here / "in.onnx").write_bytes(classifier().SerializeToString())
    assert fastbn.cli.main(["deploy", "in.onnx", "-", "--data", "data.npz", "--json", "r.json", "-q"]) == 0
    written = capsysbinary.readouterr().out
    (output,) = json.loads(Path("r.json").read_text())["provenance"]["output"]
    assert output == {"name": "-", "sha256": hashlib.sha256(written).hexdigest()}
    x = np.load("data.npz")["x"]
    one, same, other = (fastbn.deploy(classifier(), data=data, runs=1).provenance for data in (x, x.copy(), x + 1))
    assert one.data == same.data != other.data
    assert one.output[0].sha256 == output["sha256"] or one.output[0].name == "not written yet"
