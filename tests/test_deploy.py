"""The pipeline: stages, what is measured of them, which one is shipped, exit codes and streams."""

import hashlib
import json
import logging
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from make_models import MODELS
from onnx import TensorProto, helper
from shell import Terminal, as_json, classifier_folder, deploy, files, losing, quick, taking
from sketch import CONV_BN, classifier, conv_bn, model, norm, normal, ops, run

import fastbn
from fastbn.deployment import measure, pipeline, quantize, recipe, stages
from fastbn.deployment.quantizer import Quantizer
from fastbn.deployment.result import SCHEMA
from fastbn.graph import job
from fastbn.graph.results import Parity

# A BN that nothing takes in, between two convolutions that quantize.
STUCK = """(float[N,3,8,8] x) => (float[N,4,6,6] y) {
    c = Conv(x, w, b)
    r = Relu(c)
    n = BatchNormalization(r, s, t, m, v)
    k = Relu(n)
    a = Add(k, r)
    y = Conv(a, w1)
}"""


@pytest.fixture(name="here")
def _here(tmp_path, monkeypatch):
    return classifier_folder(tmp_path, monkeypatch)


def test_without_quantization_the_folded_model_is_shipped(here, capsys):
    deploy("--data", "data.npz")
    assert ops(onnx.load("out.onnx")) == "Conv Relu GlobalAveragePool Flatten Gemm"
    assert files(here) == ["data.npz", "in.onnx", "out.onnx"]
    out, err = capsys.readouterr()
    assert "BatchNormalization 1 -> 0" in out
    assert "data    16 samples from data.npz\n" in out
    assert re.search(r"^  stage +size +load ms +RAM MB +ms, 1 thread", out, re.MULTILINE)
    assert re.search(r"^  folded +\d+\.\d kB +\d+\.\d +12\.5 +\d+\.\d{3} \(p90 \d+\.\d{3}\) ", out, re.MULTILINE)
    assert "shipped folded: beside original it is " in out
    assert "0 of 16 decisions differ from the original's (0.0%, at most 1.0% may) wrote" in " ".join(out.split())
    assert re.search(r"^wrote   out\.onnx   \d+\.\d kB$", out, re.MULTILINE)
    assert "WARNING" not in out
    assert err.splitlines() == [f"fastbn: {number + 1}/7 {step}" for number, step in enumerate(pipeline.STEPS) if step != "quantizing"]


def test_quantization_is_shipped_and_runs(here, capsys):
    report = as_json(capsys, "--data", "data.npz", "--quantize", "--max-drop", "0.25")
    assert (report["shipped"], report["status"]) == ("quantized", "done")
    made = onnx.load("out.onnx")
    count = Counter(node.op_type for node in made.graph.node)
    assert count["QuantizeLinear"] > 2
    assert count["BatchNormalization"] == 0
    weight = next(tensor for tensor in made.graph.initializer if tensor.data_type == TensorProto.INT8 and len(tensor.dims) == 4)
    scales = next(node.input[1] for node in made.graph.node if node.op_type == "DequantizeLinear" and node.input[0] == weight.name)
    assert next(list(tensor.dims) for tensor in made.graph.initializer if tensor.name == scales) == [4], "one scale per channel"
    x = np.load("data.npz")["x"]
    before, after = (run(proto, {"x": x})[0] for proto in (classifier(), made))
    error = np.linalg.norm(before - after) / np.linalg.norm(before)
    (found,) = report["stages"][2]["outputs"]
    assert found["relative"] == pytest.approx(error, rel=0.2), "int8 kernels and their emulation in float round differently"
    assert 0 < found["relative"] < 0.1
    assert found["top1"] == np.mean(before.argmax(axis=1) == after.argmax(axis=1))


def test_the_json_report(here, capsys):
    report = as_json(capsys, "--data", "data.npz", "--quantize", "--max-drop", "1")
    assert report["schema"] == SCHEMA == 1
    assert report["command"] == "fastbn deploy in.onnx out.onnx --runs 2 --data data.npz --quantize --max-drop 1 --json -"
    assert (report["metric"], report["max_drop"], report["warnings"]) == ("top-1", 1.0, [w for w in report["warnings"] if "takes" in w])
    digest = hashlib.sha256((here / "data.npz").read_bytes()).hexdigest()
    counts = {"feeds": 16, "rows": 16, "available": 16}
    assert report["data"] == {"origin": "data.npz", "random": False, **counts, "labels": None, "sha256": digest, "notes": []}
    assert [stage["name"] for stage in report["stages"]] == ["original", "folded", "quantized"]
    for stage in report["stages"]:
        assert set(stage) == {"name", "bytes", "load_ms", "resident_mb", "kernels", "outputs", "accuracy", "drop", "refused"}
        assert stage["bytes"] > 500
        assert stage["load_ms"] > 0
        assert set(stage["kernels"]) == {"float", "conversions", "other", "float_ops"}
        (output,) = stage["outputs"]
        fields = {"output", "elements", "max_error", "relative", "sqnr_db", "cosine", "top1", "rows", "note"}
        assert (set(output), output["output"], output["elements"], output["rows"]) == (fields, "y", 80, 16)
    assert report["stages"][1]["bytes"] < report["stages"][0]["bytes"]
    row_fields = {"threads", "model", "runs", "median_ms", "p90_ms", "ratio", "low", "high", "difference"}
    assert all(set(row) == row_fields and row["runs"] == 60 for row in report["latency"])
    assert {row["model"] for row in report["latency"]} == {"original", "folded", "quantized"}
    assert set(report["quantization"]) == {"recipe", "notes", "refused", "float_kernels", "trade_off", "equalization"}
    assert report["fold"]["batch_normalizations"] == {"before": 1, "after": 0}
    assert report["fold"]["parity"]["status"] == "ok"
    assert report["versions"]["fastbn"] == fastbn.__version__
    assert (report["written"], report["report"]) == (["out.onnx"], None)


def test_the_shipped_model_leaves_fewer_kernels_in_float_when_it_is_folded(small_cnn, tmp_path, monkeypatch):
    quick(monkeypatch)
    made = fastbn.deploy(small_cnn, tmp_path / "out.onnx", quantize=True, runs=1)
    floats = made.quantization.float_kernels
    assert floats == {"folded": 1, "unfolded": 2, "unfolded_raw": 7}
    assert made.stage("quantized").kernels.floats == {"BatchNormalization": 1}
    assert "1 kernel left in float; without the fold 2 after onnxruntime's own pre-processing, 7 without it" in str(made)
    assert made.shipped == "quantized"
    assert made.ok


def test_a_sample_model_quantizes_with_fewer_kernels_in_float(monkeypatch):
    quick(monkeypatch)
    made = fastbn.deploy(MODELS["repvgg"](), quantize=True, runs=1, max_drop=1)
    floats = made.quantization.float_kernels
    assert floats["folded"] < floats["unfolded"] <= floats["unfolded_raw"]


def test_without_data_random_inputs_and_that_is_said_loudly(here, capsys):
    deploy()
    out = capsys.readouterr().out
    assert "WARNING no --data: compared on random numbers; what they say of real inputs is little\n" in out
    assert "data    4 samples from normal random numbers, seed 0\n" in out
    report = as_json(capsys, "--quantize", "--seed", "3", "--max-drop", "1")
    assert report["data"]["random"] is True
    assert report["data"]["origin"] == "normal random numbers, seed 3"
    assert report["data"]["rows"] == 32
    assert report["warnings"][0].startswith("no --data: compared and calibrated on random numbers")


def spoil(monkeypatch):
    """Let the quantizer give a model whose decisions are wrong."""

    real = Quantizer.quantize

    def quantize(quantizer, path, target, **options):
        proto = onnx.load(path)
        next(t for t in proto.graph.initializer if t.name == "w2").raw_data = (-normal(4, 5)).tobytes()
        onnx.save(proto, path.with_name("spoiled.onnx"))
        return real(quantizer, path.with_name("spoiled.onnx"), target, **options)

    monkeypatch.setattr(Quantizer, "quantize", quantize)


def test_a_stage_that_loses_too_much_is_not_shipped(here, capsys, monkeypatch):
    spoil(monkeypatch)
    deploy("--data", "data.npz", "--quantize", code=4)
    assert ops(onnx.load("out.onnx")) == "Conv Relu GlobalAveragePool Flatten Gemm"
    out, err = capsys.readouterr()
    hint = r" \(--metric error judges it by the error of the outputs\)"
    reason = rf"quantized is refused: \d+ of 16 decisions differ from the original's \(\d+\.\d%, at most 1\.0% may\){hint}; folded is "
    assert re.search(rf"shipped folded: {reason}", " ".join(out.split()))
    assert err.endswith("\nfastbn: folded shipped (exit code 4)\n")
    assert "wrote   out.onnx" in out
    report = as_json(capsys, "--data", "data.npz", "--quantize", "--metric", "error", code=4)
    assert re.match(
        r"quantized is refused: a relative error of (2|1\.9|2\.1) in the outputs, 0\.1 is allowed; folded is taken: ", report["decision"]
    )
    assert (report["shipped"], report["status"], report["max_drop"]) == ("folded", "partial", 0.1)
    assert report["stages"][2]["refused"] in report["decision"]


def test_nothing_is_shipped_when_nothing_is_good_enough(here, capsys, monkeypatch):
    losing(monkeypatch, 0.0, 0.3, 0.0, 0.3)
    deploy("--data", "data.npz", "--metric", "error", "--json", "report.json", code=1)
    assert files(here) == ["data.npz", "in.onnx", "report.json"]
    out, err = capsys.readouterr()
    assert "shipped nothing: folded is refused: a relative error of 0.3 in the outputs, 0.1 is allowed" in " ".join(out.split())
    assert err.endswith("\nfastbn: nothing shipped (exit code 1)\n")
    assert "wrote" not in out
    report = json.loads((here / "report.json").read_text())
    assert (report["shipped"], report["status"], report["written"]) == (None, "refused", [])
    made = fastbn.deploy("in.onnx", data="data.npz", metric="error", runs=1)
    with pytest.raises(fastbn.ParityError, match="Cannot save a model: nothing is shipped: folded is refused: a relative error"):
        made.save("out.onnx")


def test_a_failed_parity_ships_nothing_and_measures_nothing(here, capsys, monkeypatch):
    fold = job.fold

    def fail(*arguments, **options):
        result = fold(*arguments, **options)
        result.parity = Parity("failed", reason="on purpose")
        return result

    monkeypatch.setattr(job, "fold", fail)
    deploy("-q", code=1)
    err = capsys.readouterr().err
    assert "fastbn: nothing shipped: the folded model differs from the original by more than rounding explains" in err
    assert files(here) == ["data.npz", "in.onnx"]


def test_nan_in_a_stage_is_a_total_loss(here, capsys, monkeypatch):
    real = Quantizer.quantize

    def quantize(quantizer, path, target, **options):
        notes = real(quantizer, path, target, **options)
        proto = onnx.load(target)
        scale = next(tensor for tensor in proto.graph.initializer if tensor.name == "y_scale")
        scale.ClearField("float_data")
        scale.raw_data = np.float32(np.nan).tobytes()
        onnx.save(proto, target)
        return notes

    monkeypatch.setattr(Quantizer, "quantize", quantize)
    report = as_json(capsys, "--data", "data.npz", "--quantize", "--float-nodes", "0", "--max-drop", "1", code=4)
    assert report["decision"].startswith("quantized is refused: Inf or NaN on one side only in output 'y'; folded is taken: ")
    assert report["stages"][2]["drop"] == "inf"


def test_what_the_original_itself_loses_does_not_count(here, capsys, monkeypatch):
    real = stages.drop_of
    monkeypatch.setattr(stages, "drop_of", lambda found, metric: 0.5 + real(found, metric))
    report = as_json(capsys, "--data", "data.npz")
    assert [stage["drop"] for stage in report["stages"]] == [0, 0]
    losing(monkeypatch, np.inf, np.inf)
    assert as_json(capsys, "--data", "data.npz")["shipped"] == "folded", "a model that is random even without us"


def test_a_model_without_anything_to_quantize_is_shipped_folded(here, capsys):
    text = "(float[N,4] x) => (float[N,4] y) { a = Sin(x) y = Cos(a) }"
    (here / "in.onnx").write_bytes(model(text).SerializeToString())
    report = as_json(capsys, "--quantize", code=4)
    refused = "onnxruntime's quantizer refuses the model: none of its operators has an integer form"
    assert report["decision"].startswith(f"{refused}; folded is taken: ")
    assert report["quantization"]["refused"] == refused
    assert [stage["name"] for stage in report["stages"]] == ["original", "folded"]


def test_a_model_of_which_nothing_runs_in_integers_is_shipped_folded(here, capsys):
    text = "(float[N,4] x) => (float[N,4] y) { n = BatchNormalization(x, s, t, m, v) y = Tanh(n) }"
    (here / "in.onnx").write_bytes(model(text, **norm(4)).SerializeToString())
    report = as_json(capsys, "--quantize", code=4)
    assert report["decision"].startswith(
        "onnxruntime's quantizer refuses the model: none of what it made runs in integers; folded is taken: "
    )
    assert files(here) == ["data.npz", "in.onnx", "out.onnx"]


def test_what_the_quantizer_makes_must_load(here, capsys, monkeypatch):
    def broken(quantizer, path, target, **options):
        target.write_bytes(b"no model")
        return quantize.Made((), ("y",))

    monkeypatch.setattr(Quantizer, "quantize", broken)
    report = as_json(capsys, "--data", "data.npz", "--quantize", code=4)
    assert report["decision"].startswith("onnxruntime cannot load what its quantizer made: ")


def test_a_model_that_only_the_data_can_run_is_compared_with_a_warning(here, capsys):
    text = "(float[N,C,H,W] x) => (float y) { c = Conv(x, w, b) n = BatchNormalization(c, s, t, m, v) y = Reshape(n, shape) }"
    (here / "in.onnx").write_bytes(conv_bn(text, shape=np.array([1, 4 * 36 * 36])).SerializeToString())
    np.savez("data.npz", x=normal(9, 3, 38, 38))
    report = as_json(capsys, "--data", "data.npz", code=5)
    assert report["warnings"][0].startswith("the whole model was not verified (--input-shape may help): ")
    assert (report["shipped"], report["status"], report["fold"]["parity"]["status"]) == ("folded", "unverified", "not-run")
    assert report["decision"].endswith("; not verified: parity is not-run")
    assert report["stages"][1]["outputs"][0]["relative"] < 1e-6
    assert as_json(capsys, "--data", "data.npz", "--input-shape", "x=1,3,38,38")["warnings"] == []


@pytest.mark.parametrize("broken", ["original", "folded"])
def test_a_stage_that_the_optimizer_of_onnxruntime_breaks_on_is_not_shipped(broken, here, capsys, monkeypatch):
    real = stages.session

    def session(model, **options):
        if options.get("optimize") and (broken in model or (broken == "original" and model == "in.onnx")):
            raise RuntimeError("the optimizer broke")
        return real(model, **options)

    monkeypatch.setattr(stages, "session", session)
    report = as_json(capsys, "--data", "data.npz", code=1 if broken == "folded" else 0)
    assert report["stages"][broken == "folded"]["refused"] == "onnxruntime cannot load it: the optimizer broke"
    assert report["shipped"] == (None if broken == "folded" else "folded")
    report = as_json(capsys, "--data", "data.npz", "--quantize", "--max-drop", "1")
    assert report["shipped"] == "quantized"


def test_a_custom_operator(here, capsys):
    custom = conv_bn(CONV_BN.replace("}", "z = maker.Op(y) }").replace("=> (float[N,4,6,6] y)", "=> (float z)"), imports=["maker"])
    (here / "in.onnx").write_bytes(custom.SerializeToString())
    report = as_json(capsys, "--quantize", code=4)
    assert ops(onnx.load("out.onnx")) == "Conv Op"
    assert (report["shipped"], report["status"], report["data"], report["stages"], report["latency"]) == ("folded", "partial", None, [], [])
    assert re.match(r"not compared, timed or quantized, for onnxruntime cannot load the original: .*maker", report["decision"])
    assert report["quantization"]["refused"].startswith("onnxruntime cannot load the original")
    deploy(code=4)
    assert "WARNING nothing was measured: onnxruntime cannot load the original" in capsys.readouterr().out


def test_old_models_are_converted_for_the_quantizer_alone(here, capsys):
    proto = classifier(opset=11, ir_version=3)
    for tensor in proto.graph.initializer:
        proto.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    (here / "in.onnx").write_bytes(proto.SerializeToString())
    report = as_json(capsys, "--data", "data.npz", "--quantize", "--max-drop", "1")
    assert report["quantization"]["notes"] == ["opset 11 converted to 13, which has scales per channel"]
    assert [info.name for info in onnx.load("out.onnx").graph.input] == ["x"]
    proto.ir_version = 8
    (here / "in.onnx").write_bytes(proto.SerializeToString())
    report = as_json(capsys, "--data", "data.npz", "--quantize", "--max-drop", "1")
    assert report["quantization"]["notes"][0] == "initializers that were also graph inputs are constants now"


def test_a_fold_that_frees_a_norm_that_stays_otherwise_still_counts(here, capsys):
    (here / "in.onnx").write_bytes(conv_bn(STUCK, w1=normal(4, 4, 1, 1)).SerializeToString())
    report = as_json(capsys, "--quantize", "--max-drop", "1")
    floats = report["quantization"]["float_kernels"]
    assert floats["folded"] == floats["unfolded"] == floats["unfolded_raw"] == 1, "what cannot be folded stays, and is not hidden"
    assert report["fold"]["kept"][0]["code"] in ("other-readers", "mixed-sign-through-relu")


def test_the_api_writes_what_it_is_told_to(here):
    made = fastbn.deploy("in.onnx", "out.onnx", data="data.npz", runs=1)
    assert ops(onnx.load("out.onnx")) == "Conv Relu GlobalAveragePool Flatten Gemm"
    assert made.command == "fastbn.deploy('in.onnx', 'out.onnx', data='data.npz', runs=1)"
    for given in (classifier(), classifier().SerializeToString()):
        made = fastbn.deploy(given, data={"x": np.load("data.npz")["x"]}, quantize=True, max_drop=1, runs=1)
        assert made.shipped == "quantized"
        assert "..." in made.command
    with pytest.raises(fastbn.ArgumentTypeError, match="Expected a dict of name -> sizes, got str - at `input_shapes`"):
        fastbn.deploy("in.onnx", input_shapes="x=1,3,8,8")
    with pytest.raises(fastbn.StorageError, match="Cannot use 'none': no such file or directory"):
        fastbn.deploy("in.onnx", "none/out.onnx")
    made.save("again.onnx")
    assert onnx.load("again.onnx").SerializeToString() == made.quantized
    assert files(here) == ["again.onnx", "data.npz", "in.onnx", "out.onnx"]


def test_external_data(here, monkeypatch):
    taking(monkeypatch, original=1, folded=0.9, quantized=0.5)
    onnx.save(classifier(), "in.onnx", save_as_external_data=True, location="in.data", size_threshold=0)
    made = fastbn.deploy("in.onnx", "out.onnx", quantize=True, max_drop=1, runs=1)
    assert made.shipped == "quantized"
    original, folded = made.stage("original"), made.stage("folded")
    assert original.size == (here / "in.onnx").stat().st_size + (here / "in.data").stat().st_size
    assert folded.size > 400
    fastbn.deploy("in.onnx", "folded.onnx", runs=1)
    assert "BatchNormalization" not in ops(onnx.load("folded.onnx"))
    assert files(here) == ["data.npz", "folded.onnx", "folded.onnx.data", "in.data", "in.onnx", "out.onnx"]


def test_memory_is_measured_in_a_process_of_its_own(small_cnn):
    found = measure.resident_mb({"a": small_cnn, "b": small_cnn, "none": small_cnn.parent / "none.onnx"})
    if not sys.platform.startswith("linux"):
        pytest.skip("only Linux says what is resident")
    assert set(found) == {"a", "b"}, "what does not load takes none"
    assert len(found["a"]) == len(found["b"]) >= measure.FEWEST_MEASUREMENTS
    assert all(0.1 < megabytes < 20 for megabytes in found["a"] + found["b"]), "its weights have 0.08 MB; onnxruntime itself does not count"


def test_kernels_are_counted_as_onnxruntime_runs_them(tmp_path):
    path = tmp_path / "m.onnx"
    text = "(float[N,4] x) => (float[N,4] y, int64[2] z) { a = QuantizeLinear(x, sc, zp) b = DequantizeLinear(a, sc, zp) c = Tanh(b)"
    proto = model(text + " y = Tanh(c) z = Shape(x) }", sc=np.float32(0.1), zp=np.uint8(3))
    path.write_bytes(proto.SerializeToString())
    found = measure.kernels_of(path, {"x": normal(2, 4)}, tmp_path)
    assert (found.float, found.conversions, found.other, found.floats) == (2, 2, 1, {"Tanh": 2})
    assert files(tmp_path) == ["m.onnx"]
    assert measure.kernels_of(path, {"x": normal(2, 5)}, tmp_path) is None


def test_a_profile_that_onnxruntime_could_not_write(small_cnn, tmp_path):
    """It does not say so."""
    feed = {"image": normal(1, 3, 32, 32)}
    with pytest.raises(fastbn.StorageError, match=r"^Cannot use '.*profile.*json', onnxruntime's profile: no such file or directory$"):
        measure.kernels_of(small_cnn, feed, tmp_path / "none")
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(fastbn.StorageError, match=r"onnxruntime's profile: it is not whole$"):
            measure.kernels_of(small_cnn, feed, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_progress_is_a_bar_on_a_terminal(here, monkeypatch, capsys):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    deploy("--data", "data.npz", "--quantize", "--max-drop", "1")
    shown = screen.getvalue()
    assert "[###-----------------] 2/7 folding and verifying: verifying fold 1 of 1: n" in shown
    assert "3/7 quantizing: calibrating on feed 16 of 16" in shown
    assert "4/7 comparing outputs: feed 16 of 16" in shown
    assert re.search(r"\] 5/7 measuring latency: run 1 of 1, 1 thread", shown)
    assert "[#################---] 7/7 writing" in shown
    assert "\n" not in shown
    assert re.search(r"\r +\r$", shown)


def test_quiet(here, capsys):
    deploy("--data", "data.npz", "-q")
    assert tuple(capsys.readouterr()) == ("", "")


def test_a_name_cannot_write_to_the_terminal_through_the_bar(here, monkeypatch):
    proto = classifier()
    proto.graph.node[1].name = "evil\x1b[2J"
    (here / "in.onnx").write_bytes(proto.SerializeToString())
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    deploy("--data", "data.npz")
    assert "verifying fold 1 of 1: evil" in screen.getvalue()
    assert "\x1b" not in screen.getvalue()


def test_the_quantizer_leaves_the_process_as_it_was(here, capfd):
    root = logging.getLogger()
    handlers = list(root.handlers)
    deploy("--data", "data.npz", "--quantize", "--max-drop", "1", "-q")
    assert root.handlers == handlers
    assert tuple(capfd.readouterr()) == ("", "")


def test_the_recipe_follows_the_machine(monkeypatch):
    monkeypatch.setattr(recipe.platform, "machine", lambda: "aarch64")
    assert str(recipe.Recipe.here()) == "QDQ, per channel, Int8 activations, Int8 weights, MinMax"
    monkeypatch.setattr(recipe.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(recipe, "_has_vnni", lambda: False)
    assert recipe.Recipe.here() == recipe.Recipe("QUInt8", "QInt8", True)
    assert "7 bits" in str(recipe.Recipe.here())
    monkeypatch.setattr(recipe, "_has_vnni", lambda: True)
    assert not recipe.Recipe.here().reduce_range


MODELS_FOLDER = Path(__file__).resolve().parent / "models"


@pytest.mark.parametrize("net", ["torch", "keras"])
def test_the_trained_classifiers_decide_the_same_in_int8(net, monkeypatch):
    quick(monkeypatch)
    path, held_out = MODELS_FOLDER / f"{net}_digits.onnx", MODELS_FOLDER / "digits.npz"
    made = fastbn.deploy(path, data=held_out, quantize=True, most_samples=360, runs=1)
    assert (made.shipped, made.metric, made.samples.rows) == ("quantized", "accuracy", 360)
    assert made.stage("folded").top1 == 1
    assert made.stage("quantized").top1 > 0.99
    assert made.quantization.float_kernels["folded"] == 0
    assert made.quantization.float_kernels["unfolded_raw"] > 0
    assert made.stage("quantized").size < 0.4 * made.stage("original").size
