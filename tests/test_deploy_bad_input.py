"""What bad input and interrupts do to a deployment: one line, and nothing is written."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from shell import as_json, classifier_folder, deploy, files
from sketch import classifier, conv_bn, model, norm, normal, ops

from fastbn.cli import main
from fastbn.deployment.quantizer import Quantizer
from fastbn.graph.model import storage


@pytest.fixture(name="here")
def _here(tmp_path, monkeypatch):
    return classifier_folder(tmp_path, monkeypatch)


BAD = {
    "the same file": (["in.onnx", "in.onnx"], "Cannot write 'in.onnx': it is the input"),
    "missing model": (["none.onnx", "out.onnx"], "Cannot use 'none.onnx': no such file or directory"),
    "no model": (["data.npz", "out.onnx"], "an ONNX model, got"),
    "missing data": (
        ["in.onnx", "out.onnx", "--data", "none.npz"],
        "Cannot use 'none.npz': no such file or directory",
    ),
    "too few samples": (
        ["in.onnx", "out.onnx", "--data", "few.npz", "--quantize"],
        "at least 8 samples to calibrate on, got 3 - at `few.npz`",
    ),
    "no samples": (["in.onnx", "out.onnx", "--data", "empty.npz"], "at least one sample, got none - at `empty.npz`"),
    "NaN": (["in.onnx", "out.onnx", "--data", "nan.npz"], "finite values, got NaN in 1 of 16 samples of 'x' - at `nan.npz`"),
    "other shape": (["in.onnx", "out.onnx", "--data", "shape.npz"], "shape [?,3,8,8] for 'x', got [16,8,8,3] - at `shape.npz`"),
    "other name": (["in.onnx", "out.onnx", "--data", "name.npz"], "arrays named after the inputs (x), got 'img' - at `name.npz`"),
    "no runs": (["in.onnx", "out.onnx", "--runs", "0"], "at least 1, got 0 - at `--runs`"),
    "negative drop": (["in.onnx", "out.onnx", "--max-drop", "-1"], "a part from 0 to 1, got -1.0 - at `--max-drop`"),
    "NaN drop": (["in.onnx", "out.onnx", "--max-drop", "nan"], "a part from 0 to 1, got nan - at `--max-drop`"),
    "500 %": (["in.onnx", "out.onnx", "--max-drop", "5"], "a part from 0 to 1, got 5.0 - at `--max-drop`"),
    "a negative seed": (["in.onnx", "out.onnx", "--seed", "-1"], "a whole number from 0 to 4294967295, got -1 - at `--seed`"),
    "no decisions": (["images.onnx", "out.onnx", "--metric", "top-1"], "an output of scores [N, C] for the metric 'top-1', got none"),
    "no OUT": (["in.onnx"], "Cannot read the arguments: the following arguments are required: OUT (fastbn deploy --help shows them)"),
    "JSON over IN": (
        ["in.onnx", "out.onnx", "--json", "in.onnx"],
        "Cannot write the JSON report to 'in.onnx': that is an input or another output",
    ),
    "OUT over the data": (
        ["in.onnx", "data.npz", "--data", "data.npz", "--force"],
        "Cannot write 'data.npz': it is an input",
    ),
    "the page over the data": (
        ["in.onnx", "out.onnx", "--data", "data.npz", "--report", "data.npz", "--force"],
        "Cannot write 'data.npz': it is an input",
    ),
    "labels without data": (
        ["in.onnx", "out.onnx", "--labels", "y"],
        "data that hold the labels, got none - at `--data`",
    ),
    "JSON over the data": (
        ["in.onnx", "out.onnx", "--data", "data.npz", "--json", "data.npz"],
        "Cannot write the JSON report to 'data.npz': that is an input or another output",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_writes_nothing(case, here, capsys):
    x = normal(16, 3, 8, 8)
    spoiled = x.copy()
    spoiled[5, 0, 0, 0] = np.nan
    np.savez("few.npz", x=x[:3])
    np.savez("empty.npz", x=x[:0])
    np.savez("nan.npz", x=spoiled)
    np.savez("shape.npz", x=x.transpose(0, 2, 3, 1))
    np.savez("name.npz", img=x)
    (here / "images.onnx").write_bytes(conv_bn().SerializeToString())
    before = {path.name: path.read_bytes() for path in here.iterdir()}
    arguments, message = BAD[case]
    assert main(["deploy", *arguments]) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1, "and no step before it"
    assert lines[0].startswith(f"fastbn: {message}" if message.startswith("Cannot ") else f"fastbn: Expected {message}")
    assert captured.out == ""
    assert {path.name: path.read_bytes() for path in here.iterdir()} == before


def test_few_samples_calibrate_when_that_is_asked_for(here, capsys):
    np.savez("few.npz", x=normal(3, 3, 8, 8))
    report = as_json(capsys, "--data", "few.npz", "--quantize", "--min-samples", "3", "--max-drop", "1")
    assert (report["shipped"], report["data"]["rows"]) == ("quantized", 3)


def folded_is_there(folder, capsys, *options):
    """Deploy with quantization, which ends with the folded model and one line; return the reason why int8 is refused."""
    deploy("--quantize", *options, "-q", code=4)
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert ops(onnx.load("out.onnx")) == "Conv Relu GlobalAveragePool Flatten Gemm"
    assert files(folder) == ["data.npz", "in.onnx", "out.onnx"]
    return err.removeprefix("fastbn: folded shipped: ").partition("; folded is taken: ")[0]


@pytest.mark.parametrize("options", [("--data", "data.npz"), ("--data-free",)])
def test_a_quantized_model_that_loads_and_does_not_run(options, here, capsys, monkeypatch):
    real = Quantizer.quantize

    def quantize(quantizer, path, target, **more):
        made = real(quantizer, path, target, **more)
        proto = onnx.load(target)
        for node in proto.graph.node:
            node.output[:] = ["logits" if name == "y" else name for name in node.output]
        proto.graph.initializer.append(numpy_helper.from_array(np.array([7, 11]), "sizes"))
        proto.graph.node.append(helper.make_node("Reshape", ["logits", "sizes"], ["y"], "spoiled"))
        onnx.save(proto, target)
        return made

    monkeypatch.setattr(Quantizer, "quantize", quantize)
    assert folded_is_there(here, capsys, *options).startswith("quantized is refused: onnxruntime cannot run it: Reshape 'spoiled': ")


@pytest.mark.parametrize("options", [("--data", "data.npz"), ("--data-free",)])
def test_outputs_that_are_zero_whatever_is_fed(options, here, capsys):
    proto = classifier()
    for tensor in proto.graph.initializer:
        if tensor.name == "w2":
            tensor.CopyFrom(numpy_helper.from_array(np.zeros((4, 5), np.float32), "w2"))
    (here / "in.onnx").write_bytes(proto.SerializeToString())
    assert folded_is_there(here, capsys, *options) == "calibration collapses: every output is 0 on all samples"


def test_samples_that_the_model_does_not_run_on(here, capsys):
    text = "(float[N,M] x) => (float[N,K] y) { n = BatchNormalization(x, s, t, m, v) y = MatMul(n, w) }"
    (here / "in.onnx").write_bytes(model(text, w=normal(4, 3), **norm(4)).SerializeToString())
    np.savez("data.npz", x=normal(9, 7))
    deploy("--data", "data.npz", code=2)
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("fastbn: Cannot run the model on the data: ")
    assert files(here) == ["data.npz", "in.onnx"]


def test_a_missing_folder(here, capsys):
    before = files(here)
    assert main(["deploy", "in.onnx", "none/out.onnx"]) == 2
    assert capsys.readouterr().err == "fastbn: Cannot write 'none/out.onnx': there is no folder 'none'\n"
    assert files(here) == before


def test_a_read_only_folder(here, capsys, monkeypatch):
    (here / "locked").mkdir()
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: "locked" not in str(path) and real(path, mode))
    assert main(["deploy", "in.onnx", "locked/out.onnx"]) == 2
    assert "Cannot write 'locked/out.onnx': no file can be made in the folder 'locked'" in capsys.readouterr().err
    assert files(here / "locked") == []


def test_a_folder_that_takes_no_file_after_all(here, capsys, monkeypatch):
    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage.os, "fsync", full)
    deploy("--data", "data.npz", code=2)
    assert "': no space left on device" in capsys.readouterr().err
    assert files(here) == ["data.npz", "in.onnx"]


@pytest.mark.parametrize("step", ["folding", "quantizing", "comparing", "latency", "loading", "writing"])
def test_an_interrupt_anywhere_leaves_nothing(step, here, capsys, monkeypatch):
    what_stood_there = (here / "in.onnx").read_bytes()
    (here / "out.onnx").write_bytes(what_stood_there)

    class Stop:
        def __init__(self, quiet):
            pass

        def __call__(self, number, total, name, detail=""):
            if step in name:
                raise KeyboardInterrupt

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr("fastbn.commands.Steps", Stop)
    deploy("--data", "data.npz", "--quantize", "--max-drop", "1", "--json", "report.json", code=130)
    assert capsys.readouterr().err == "fastbn: interrupted, nothing written\n"
    assert files(here) == ["data.npz", "in.onnx", "out.onnx"]
    assert (here / "out.onnx").read_bytes() == what_stood_there


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_real_interrupt(number, here, environment):
    command = [sys.executable, "-m", "fastbn", "deploy", "in.onnx", "out.onnx", "--runs", "100000000"]
    monkey = {**environment, "PYTHONUNBUFFERED": "1"}
    # A second is timed for each number of threads: long enough to interrupt.
    process = subprocess.Popen(command, env=monkey, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    for line in process.stderr:
        if "measuring latency" in line:
            break
    time.sleep(0.1)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "fastbn: interrupted, nothing written\n")
    assert files(here) == ["data.npz", "in.onnx"]
