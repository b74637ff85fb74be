"""What a deployment says when nothing proves it: parity not run or inconclusive, outputs without anything to compare."""

import json

import numpy as np
import onnx
import pytest
from shell import losing, quick
from sketch import classifier, model, normal, ops

import fastbn
from fastbn.cli import main
from fastbn.deployment import report, stages, verdict
from fastbn.graph import job
from fastbn.graph.results import Parity


@pytest.fixture(name="here")
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quick(monkeypatch)
    (tmp_path / "in.onnx").write_bytes(classifier().SerializeToString())
    np.savez(tmp_path / "data.npz", x=normal(16, 3, 8, 8))
    return tmp_path


def deploy(capsys, *options, code=5):
    """Return (report, page, stdout without JSON, stderr) of a deployment."""
    command = ["deploy", "in.onnx", "out.onnx", "--runs", "1", "--json", "report.json", *options]
    assert main(command) == code
    captured = capsys.readouterr()
    with open("report.json", encoding="utf-8") as file:
        return json.load(file), captured.out, captured.err


@pytest.fixture(name="parity", params=["not-run", "inconclusive"])
def _parity(request, monkeypatch):
    """The status of a whole model whose parity proves nothing."""
    real = job.fold

    def fold(*arguments, **options):
        result = real(*arguments, **options)
        result.parity = Parity(request.param, reason="on purpose")
        return result

    monkeypatch.setattr(job, "fold", fold)
    return request.param


def test_what_was_not_verified_is_shipped_and_said(parity, here, capsys):
    found, out, err = deploy(capsys, "--data", "data.npz")
    assert ops(onnx.load("out.onnx")) == "Conv Relu GlobalAveragePool Flatten Gemm"
    assert (found["shipped"], found["status"]) == ("folded", "unverified")
    assert found["decision"].endswith(f"; not verified: parity is {parity}")
    assert found["warnings"][0].startswith("the whole model was not verified")
    assert found["warnings"][0].endswith(": on purpose")
    assert ("--input-shape" in found["warnings"][0]) is (parity == "not-run")
    assert f"not verified: parity is {parity} wrote" in " ".join(out.split())
    assert err.endswith("\nfastbn: folded shipped (exit code 5)\n")
    made = fastbn.deploy("in.onnx", data="data.npz", runs=1)
    assert not made.ok
    assert made.save("again.onnx")


def test_the_page_never_calls_it_verified(parity, here):
    pytest.importorskip("jinja2", reason="the HTML report needs jinja2")
    page = report.render(fastbn.deploy("in.onnx", data="data.npz", runs=1))
    assert '<p class="verdict unverified">Folded model shipped, not verified</p>' in page
    assert "<strong>Not verified:</strong>" in page
    assert "All outputs compared" not in page
    assert 'class="verdict done"' not in page


def test_a_refused_stage_is_partial_and_not_verified(parity, here, capsys, monkeypatch):
    losing(monkeypatch, 0.0, 0.0, 0.5)
    found, _, _ = deploy(capsys, "--data", "data.npz", "--quantize", "--metric", "error", "--float-nodes", "0", code=4)
    assert found["status"] == "partial"
    assert found["decision"].startswith("quantized is refused: a relative error of 0.5 in the outputs, 0.1 is allowed; folded is taken: ")
    assert found["decision"].endswith(f"; not verified: parity is {parity}")


def test_a_fold_that_was_not_run_is_not_called_verified(here, monkeypatch):
    pytest.importorskip("jinja2", reason="the HTML report needs jinja2")
    made = fastbn.deploy("in.onnx", data="data.npz", runs=1)
    assert "1 fold, each verified" in report.render(made)
    made.fold.folded = [fastbn.Fold("n", ("BatchNormalization",), "c", "Conv", 4, note="not run: on purpose")]
    assert "1 fold, none verified" in report.render(made)


NAN = "(float[N,3,8,8] x) => (float[N,4,6,6] y) { c = Conv(x, w, b) n = BatchNormalization(c, s, t, m, v) y = Mul(n, k) }"
CONSTANTS = {"w": normal(4, 3, 3, 3), "b": normal(4), "s": normal(4), "t": normal(4), "m": normal(4), "v": np.ones(4, np.float32)}


def test_outputs_that_are_all_nan_are_no_perfect_score(here, capsys):
    (here / "in.onnx").write_bytes(model(NAN, k=np.float32(np.nan), **CONSTANTS).SerializeToString())
    assert main(["deploy", "in.onnx", "out.onnx", "--runs", "1", "--quantize", "--json", "report.json"]) == 4
    with open("report.json", encoding="utf-8") as file:
        found = json.load(file)
    (output,) = found["stages"][1]["outputs"]
    assert (output["relative"], output["sqnr_db"], output["note"]) == (None, None, "no finite values to compare")
    assert found["stages"][1]["drop"] is None
    assert found["shipped"] == "folded"
    assert "output 'y' is not compared (no finite values to compare)" in found["warnings"]
    if len(found["stages"]) > 2:
        assert found["stages"][2]["refused"] == "no output can be compared by error, so nothing says what it loses"
    assert "inf" not in capsys.readouterr().out.split("shipped")[-1]


def test_random_outputs_are_said(here):
    text = "(float[N,3,8,8] x) => (float[N,4,6,6] y, float[N,3,8,8] z)"
    text += " { c = Conv(x, w, b) y = BatchNormalization(c, s, t, m, v) r = RandomNormalLike(x) z = Add(x, r) }"
    made = fastbn.deploy(model(text, **CONSTANTS), runs=1, quantize=True, max_drop=1)
    (note,) = [warning for warning in made.warnings if "'z'" in warning]
    assert note == "output 'z' is not compared (random: it differs between two runs of the original)"
    assert made.stage("folded").drop < 1e-5
    assert made.stage("folded").worst.output == "y"


def test_outputs_that_are_not_compared_are_one_line(here):
    outputs = "".join(f", float[N,6] o{number}" for number in range(9))
    text = f"(float[N,6] x) => (float[N,6] y{outputs}) {{ z = Mul(x, k) y = BatchNormalization(x, s, t, m, v) "
    text += " ".join(f"o{number} = Div(z, z)" for number in range(9)) + " }"
    norms = {name: np.ones(6, np.float32) for name in "stmv"}
    made = fastbn.deploy(model(text, k=np.float32(0), **norms), runs=1)
    (warning,) = [warning for warning in made.warnings if "not compared" in warning]
    assert warning == "9 outputs are not compared (no finite values to compare): 'o0', 'o1', 'o2', 'o3', ..."


def test_what_top_1_does_not_judge_is_said(here, monkeypatch):
    text = "(float[N,6] x) => (float[N,6] p, float[N,6] v) { n = BatchNormalization(x, s, t, m, w) p = Softmax(n) v = Mul(n, k) }"
    norms = {name: np.ones(6, np.float32) for name in "stmw"}
    made = fastbn.deploy(model(text, k=normal(6), **norms), runs=1)
    assert made.metric == "top-1"
    assert not any("top-1 does not judge" in warning for warning in made.warnings)
    monkeypatch.setitem(verdict.METRICS, "error", -1.0)
    made = fastbn.deploy(model(text, k=normal(6), **norms), runs=1)
    assert any("output 'v' of folded has a relative error of" in warning for warning in made.warnings)


def test_the_metric_is_named_where_a_stage_is_refused(here, monkeypatch):
    losing(monkeypatch, 0.0, 0.2, 0.0, 0.2, 0.0, 0.2)
    decision = fastbn.deploy("in.onnx", data="data.npz", runs=1).decision
    assert decision.endswith("1.0% may) (--metric error judges it by the error of the outputs)")
    decision = fastbn.deploy("in.onnx", data="data.npz", runs=1, metric="error").decision
    assert decision.endswith("a relative error of 0.2 in the outputs, 0.1 is allowed"), "chosen by the caller"
    three = "(float[N,3] x) => (float[N,3] y) { y = Tanh(x) }"
    decision = fastbn.deploy(model(three), runs=1).decision
    assert decision.endswith("0.1 is allowed (--metric top-1 judges a classifier by its decisions)")
    losing(monkeypatch, 0.0, 0.2)
    decision = fastbn.deploy(model("(float[N,3,8,8] x) => (float[N,3,8,8] y) { y = Tanh(x) }"), runs=1).decision
    assert decision.endswith("0.1 is allowed"), "images have no decisions"


def test_a_reconstruction_is_judged_by_its_error(here):
    text = "(float[N,6] z) => (float[N,40] x_recon) { n = BatchNormalization(z, s, t, m, v) x_recon = Gemm(n, w) }"
    norms = {name: np.ones(6, np.float32) for name in "stmv"}
    proto = model(text, w=normal(6, 40), **norms)
    made = fastbn.deploy(proto, quantize=True, runs=1)
    assert (made.metric, made.shipped) == ("error", "quantized")
    assert fastbn.deploy(proto, metric="top-1", runs=1).metric == "top-1", "on request"


def test_where_no_stage_loads_nothing_is_shipped(here, capsys, monkeypatch):
    real = stages.session

    def session(path, **options):
        if options.get("optimize"):
            raise RuntimeError("the optimizer broke")
        return real(path, **options)

    monkeypatch.setattr(stages, "session", session)
    found, _, err = deploy(capsys, "--data", "data.npz", code=1)
    assert found["decision"] == "folded is refused: onnxruntime cannot load it: the optimizer broke"
    assert found["latency"] == []
    assert "Traceback" not in err


def test_outputs_without_elements_prove_nothing(here):
    proto = model("(float[N,3] x) => (float[N,0] y) { y = MatMul(x, w) }", w=np.zeros((3, 0), np.float32))
    made = fastbn.deploy(proto, data=normal(9, 3), runs=1)
    assert (made.shipped, made.status) == ("folded", "unverified")
    assert made.decision == "no output can be compared by error, so nothing says what it loses, for every output is empty"
