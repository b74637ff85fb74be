"""The command: every option, exit codes, streams, the table and the JSON report."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from shell import Terminal, files
from sketch import CONV_BN, assert_same, conv_bn, model, norm, ops

import fastbn
from fastbn import arguments, cli
from fastbn.cli import main
from fastbn.graph.reasons import REASONS
from fastbn.graph.results import SCHEMA


@pytest.fixture(name="here")
def _here(tmp_path, monkeypatch):
    """A working folder with in.onnx (Conv, BN) and stuck.onnx (a BN between two Tanh)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NO_COLOR", raising=False)
    (tmp_path / "in.onnx").write_bytes(conv_bn().SerializeToString())
    stuck = "(float[2,4] x) => (float[2,4] y) { a = Tanh(x) b = BatchNormalization(a, s, t, m, v) y = Tanh(b) }"
    (tmp_path / "stuck.onnx").write_bytes(model(stuck, **norm(4)).SerializeToString())
    return tmp_path


def test_fold_writes_beside_and_reports(here, capsys):
    assert main(["fold", "in.onnx"]) == 0
    assert files(here) == ["in.folded.onnx", "in.onnx", "stuck.onnx"]
    assert ops(onnx.load("in.folded.onnx")) == "Conv"
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = captured.out.splitlines()
    assert re.fullmatch(r"in\.onnx   opset 17, 2 nodes, 1 BatchNormalization, \d+\.\d kB", lines[0])
    assert re.fullmatch(r"  folded  y  into c  4 channels  error \d\.\de-\d\d of \d\.\de-\d\d allowed", lines[1])
    assert lines[2] == "BatchNormalization 1 -> 0, nodes 2 -> 1"
    assert re.fullmatch(r"parity  3 inputs, optimizer off on both sides: worst .* at y\[[\d,]+\] \(.* / .*\), allowed .*   ok", lines[3])
    assert re.fullmatch(r"wrote   in\.folded\.onnx   \d+\.\d kB", lines[4])
    assert len(lines) == 5


def test_a_kept_norm_is_reported_with_its_reason(here, capsys):
    assert main(["fold", "stuck.onnx", "out.onnx"]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("  kept"))
    code = re.search(r"\[([a-z-]+)\]$", line)[1]
    assert code in REASONS
    assert "'a'" in line or "'y'" in line
    assert (here / "out.onnx").read_bytes() == (here / "stuck.onnx").read_bytes()


def test_fold_to_a_name(here):
    assert main(["fold", "in.onnx", "out.onnx", "-q"]) == 0
    assert_same(onnx.load("in.onnx"), onnx.load("out.onnx"))


def test_dry_run_writes_nothing_and_runs_nothing(here, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert main(["fold", "in.onnx", "--dry-run"]) == 0
    assert files(here) == ["in.onnx", "stuck.onnx"]
    out = capsys.readouterr().out
    assert "  folded  y  into c  4 channels" in out
    assert "parity" not in out
    assert "wrote" not in out


def test_no_verify_needs_no_onnxruntime(here, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert main(["fold", "in.onnx", "out.onnx", "--no-verify"]) == 0
    assert "parity" not in capsys.readouterr().out
    assert ops(onnx.load("out.onnx")) == "Conv"
    assert main(["fold", "in.onnx", "out.onnx"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("fastbn: Cannot run models: onnxruntime is not installed")
    assert captured.err.count("\n") == 1
    for command in ("verify", "bench"):
        assert main([command, "in.onnx", "in.onnx"]) == 2
        assert capsys.readouterr().err == captured.err


@pytest.mark.parametrize("option", ["-q", "--quiet"])
def test_quiet(option, here, capsys):
    assert main(["fold", "in.onnx", option]) == 0
    assert tuple(capsys.readouterr()) == ("", "")
    assert "in.folded.onnx" in files(here)


def test_json_to_a_file(here, capsys):
    assert main(["fold", "in.onnx", "out.onnx", "--json", "report.json"]) == 0
    assert "folded" in capsys.readouterr().out
    report = json.loads((here / "report.json").read_text())
    assert report["schema"] == SCHEMA == 1
    assert report["model"] == "in.onnx"
    assert (report["opset"], report["ir_version"]) == (17, 8)
    assert report["nodes"] == {"before": 2, "after": 1}
    assert report["batch_normalizations"] == {"before": 1, "after": 0}
    (fold,) = report["folded"]
    assert (fold["bn"], fold["ops"], fold["into"], fold["op"], fold["channels"]) == ("y", ["BatchNormalization"], "c", "Conv", 4)
    assert 0 <= fold["error"] <= fold["bound"]
    assert report["kept"] == []
    parity = report["parity"]
    assert (parity["status"], parity["inputs"], parity["output"], len(parity["index"])) == ("ok", 3, "y", 4)
    assert parity["error"] <= parity["allowed"]
    assert report["written"] == ["out.onnx"]


def test_json_to_stdout_replaces_the_table(here, capsys):
    assert main(["fold", "stuck.onnx", "--dry-run", "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    (kept,) = report["kept"]
    assert set(kept) == {"bn", "ops", "code", "reason", "not_rewritten"}
    assert kept["code"] in REASONS
    assert (report["written"], report["parity"]) == ([], None)


@pytest.mark.parametrize(
    ("options", "left"), [(["--only", "no*"], 1), (["--skip", "y"], 1), (["--only", "y"], 0), (["--only", "c", "--only", "y"], 0)]
)
def test_only_and_skip(options, left, here, capsys):
    proto = conv_bn()
    proto.graph.node[0].name = "nothing"
    (here / "in.onnx").write_bytes(proto.SerializeToString())
    if "c" in options:
        options = [option.replace("c", "nothing") for option in options]
    assert main(["fold", "in.onnx", "out.onnx", *options, "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["batch_normalizations"]["after"] == left
    assert [kept["code"] for kept in report["kept"]] == ["not-selected"] * left


def test_strict(here, capsys):
    assert main(["fold", "stuck.onnx", "out.onnx", "--strict"]) == 3
    assert (here / "out.onnx").exists(), "the folds that could be made are written"
    assert main(["fold", "in.onnx", "--strict"]) == 0
    assert main(["fold", "stuck.onnx", "--strict", "--dry-run"]) == 3


def test_in_place(here):
    proto = onnx.load("in.onnx")
    assert main(["fold", "in.onnx", "--in-place"]) == 0
    assert ops(onnx.load("in.onnx")) == "Conv"
    assert_same(proto, onnx.load("in.onnx"))
    assert files(here) == ["in.onnx", "stuck.onnx"]


def test_freeze_inputs(here, capsys):
    proto = conv_bn()
    for tensor in proto.graph.initializer:
        proto.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    (here / "in.onnx").write_bytes(proto.SerializeToString())
    assert main(["fold", "in.onnx", "out.onnx"]) == 0
    assert "--freeze-inputs" in capsys.readouterr().out
    assert main(["fold", "in.onnx", "out.onnx", "--freeze-inputs"]) == 0
    assert [info.name for info in onnx.load("out.onnx").graph.input] == ["x"]
    assert ops(onnx.load("out.onnx")) == "Conv"


def test_input_shape_is_used(here, capsys):
    text = "(float[N,C,H,W] x) => (float y) { c = Conv(x, w, b) n = BatchNormalization(c, s, t, m, v) y = Reshape(n, shape) }"
    (here / "in.onnx").write_bytes(conv_bn(text, shape=np.array([1, 4 * 36 * 36])).SerializeToString())
    assert main(["fold", "in.onnx", "out.onnx"]) == 5
    assert "parity  not run" in capsys.readouterr().out
    assert main(["fold", "in.onnx", "out.onnx", "--input-shape", "x=1,3,38,38"]) == 0
    assert capsys.readouterr().out.splitlines()[-2].endswith("ok")


def test_shape_text():
    given = [f"--input-shape={text}" for text in ("x=1,3,224,224", "a=b=2", "scalar=")]
    given = arguments.parsed(cli.COMMANDS, ["verify", "a", "b", *given])
    assert arguments.input_shapes(given) == {"x": (1, 3, 224, 224), "a=b": (2,), "scalar": ()}


def cli_run(arguments, environment, **options):
    return subprocess.run([sys.executable, "-m", "fastbn", *arguments], env=environment, capture_output=True, timeout=120, **options)


def test_the_end_of_the_process_looks_for_no_cycles(environment):
    code = "import atexit, gc, sys; atexit.register(lambda: print(gc.get_freeze_count() > 0)); from fastbn.cli import run; run()"
    done = subprocess.run([sys.executable, "-c", code, "show-config"], env=environment, capture_output=True, timeout=120)
    assert done.stdout.splitlines()[-1] == b"True", done


def test_a_pipe(here, environment):
    data = (here / "in.onnx").read_bytes()
    done = cli_run(["fold", "-", "-"], environment, input=data)
    assert done.returncode == 0
    assert ops(onnx.ModelProto.FromString(done.stdout)) == "Conv"
    assert b"BatchNormalization 1 -> 0" in done.stderr, "the table goes to stderr"
    quiet = cli_run(["fold", "-", "-q"], environment, input=data)
    assert (quiet.stdout, quiet.stderr) == (done.stdout, b"")
    assert files(here) == ["in.onnx", "stuck.onnx"]


def test_stdin_to_a_file(here, environment):
    done = cli_run(["fold", "-", "out.onnx"], environment, input=(here / "in.onnx").read_bytes())
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1].startswith(b"wrote   out.onnx")


def test_a_reader_that_goes_away_is_no_traceback(here, environment):
    process = subprocess.Popen(
        [sys.executable, "-m", "fastbn", "show-config"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    with process.stderr as stderr:
        assert stderr.read() == b""
    process.wait()


def test_colors_on_a_terminal_only_and_not_with_no_color(here, monkeypatch, capsys):
    main(["fold", "in.onnx"])
    assert "\x1b" not in capsys.readouterr().out
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    main(["fold", "in.onnx"])
    assert "\x1b[32m  folded\x1b[0m" in screen.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    main(["fold", "in.onnx"])
    assert "\x1b" not in screen.getvalue()


def test_progress_on_a_terminal_only_and_gone_at_the_end(here, monkeypatch, capsys):
    main(["fold", "in.onnx"])
    assert capsys.readouterr().err == ""
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    main(["fold", "in.onnx"])
    assert "verifying fold 1 of 1: y" in screen.getvalue()
    assert re.search(r"\r +\r$", screen.getvalue())
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    main(["fold", "in.onnx", "-q"])
    assert screen.getvalue() == ""


def changed():
    proto = conv_bn()
    tensor = proto.graph.initializer[0]
    values = numpy_helper.to_array(tensor).copy()
    values.flat[0] += 1
    tensor.raw_data = values.tobytes()
    return proto


def test_verify(here, capsys):
    main(["fold", "in.onnx", "-q"])
    assert main(["verify", "in.onnx", "in.folded.onnx"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("ok")
    (here / "wrong.onnx").write_bytes(changed().SerializeToString())
    assert main(["verify", "in.onnx", "wrong.onnx"]) == 1
    assert capsys.readouterr().out.rstrip().endswith("failed")
    assert main(["verify", "in.onnx", "wrong.onnx", "-q"]) == 1
    assert capsys.readouterr().out == ""
    assert main(["verify", "in.onnx", "wrong.onnx", "--json", "-"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["schema"], report["parity"]["status"]) == (SCHEMA, "failed")


def test_verify_that_cannot_run(here, capsys):
    custom = conv_bn(CONV_BN.replace("}", "z = maker.Op(y) }"), imports=["maker"])
    (here / "custom.onnx").write_bytes(custom.SerializeToString())
    assert main(["verify", "custom.onnx", "custom.onnx"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1), "the sentence is said once"
    assert err.startswith("fastbn: Cannot compare the models: onnxruntime cannot load the original")


def test_verify_names_a_size_that_a_model_does_not_take(small_cnn, capsys):
    assert main(["verify", str(small_cnn), str(small_cnn.with_name("torch_digits.onnx"))]) == 2
    assert re.search(r"invalid dimensions for input: image: \d+ along axis \d, where it has \d+$", capsys.readouterr().err.strip())


def test_bench(here, capsys):
    assert main(["bench", "in.onnx", "--runs", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.split("  +", lines[0]) == ["threads", "model", "median", "p90", "times the original's", "99 % interval", "difference"]
    assert lines[1].split()[:2] == ["1", "original"]
    assert lines[2].split()[:2] == ["1", "folded"]
    assert main(["bench", "in.onnx", "in.onnx", "--runs", "2", "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["schema"] == SCHEMA
    assert set(report["bench"][0]) == {"threads", "model", "runs", "median_ms", "p90_ms", "ratio", "low", "high", "difference"}


def test_bench_of_external_data(tmp_path, capsys):
    path = tmp_path / "m.onnx"
    onnx.save(conv_bn(), path, save_as_external_data=True, location="m.data", size_threshold=0)
    assert main(["bench", str(path), "--runs", "1", "--json", "-"]) == 0
    assert {row["model"] for row in json.loads(capsys.readouterr().out)["bench"]} == {"original", "folded"}


def test_show_config(capsys):
    assert main(["show-config"]) == 0
    assert re.search(rf"^version +{re.escape(fastbn.__version__)}$", capsys.readouterr().out, re.MULTILINE)
    assert main(["show-config", "--json", "-"]) == 0
    config = json.loads(capsys.readouterr().out)
    assert config == fastbn.show_config()
    assert config["numpy"] == np.__version__


@pytest.mark.parametrize("arguments", [["--help"], ["fold", "--help"], ["verify", "-h"], ["bench", "-h"], ["show-config", "-h"]])
def test_help(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 0
    assert "usage: fastbn" in capsys.readouterr().out


def test_the_thin_script_is_the_command(here, environment, request):
    script = request.config.rootpath / "tools" / "fold_onnx.py"
    done = subprocess.run([sys.executable, script, "in.onnx", "out.onnx", "-q"], env=environment, capture_output=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert ops(onnx.load("out.onnx")) == "Conv"


def test_the_model_that_ships(small_cnn, tmp_path, capsys):
    assert main(["fold", str(small_cnn), str(tmp_path / "out.onnx")]) == 0
    out = capsys.readouterr().out
    assert "BatchNormalization 7 -> 1" in out
    assert "/block3/bn/BatchNormalization" in next(line for line in out.splitlines() if line.startswith("  kept"))


def test_names_with_control_characters_cannot_write_to_the_terminal(here, capsys):
    proto = conv_bn()
    proto.graph.node[1].name = "evil\n\x1b[2J"
    (here / "in.onnx").write_bytes(proto.SerializeToString())
    main(["fold", "in.onnx"])
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert len(out.splitlines()) == 5


def test_overridable_names_in_sentences(here, capsys):
    proto = conv_bn()
    proto.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [4, 3, 3, 3]))
    (here / "in.onnx").write_bytes(proto.SerializeToString())
    assert main(["fold", "in.onnx", "--dry-run"]) == 0
    assert "[overridable-weight]" in capsys.readouterr().out


def test_umask_is_honored(here):
    old = os.umask(0o027)
    try:
        main(["fold", "in.onnx", "out.onnx", "-q"])
    finally:
        os.umask(old)
    assert (here / "out.onnx").stat().st_mode & 0o777 == 0o640


def test_a_stream_that_cannot_show_a_name(here, environment):
    proto = conv_bn()
    proto.graph.node[1].name = "Schicht-\u00e4"
    (here / "in.onnx").write_bytes(proto.SerializeToString())
    done = cli_run(["fold", "in.onnx", "out.onnx"], {**environment, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"Schicht-\xe4" in done.stdout
