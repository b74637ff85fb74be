"""The command as people use it: its words in any order, its sizes, its hints, its lines on terminals of any width."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from shell import Terminal, files
from sketch import conv_bn, ops

import fastbn
from fastbn import terminal
from fastbn.arguments import parsed
from fastbn.cli import COMMANDS, main
from fastbn.confinement import limits_in
from fastbn.errors import ArgumentError
from fastbn.graph.bench import latency_table
from fastbn.graph.ranges import size_in_bytes
from fastbn.graph.timing import Latency
from fastbn.sizes import bytes_in
from fastbn.terminal import Steps, Tally

MODELS = Path(__file__).resolve().parent / "models"


@pytest.fixture(name="here")
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.onnx").write_bytes(conv_bn().SerializeToString())
    return tmp_path


@pytest.fixture(name="refused")
def _refused(here, capsys):
    """Run the command, demand exit code 2 and one line; return the line."""

    def run(*words):
        before = files(here)
        assert main([*words]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n"), files(here)) == ("", 1, before)
        return err

    return run


# ---- words ----


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"fastbn {fastbn.__version__}\n"


def test_the_bare_command_shows_its_help(capsys):
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("usage: fastbn ")
    assert all(command in err for command in COMMANDS)


ORDERS = [
    "fold a.onnx b.onnx --freeze-inputs --only x",
    "fold a.onnx --freeze-inputs b.onnx --only x",
    "fold --only x a.onnx b.onnx --freeze-inputs",
    "fold --only=x --freeze-inputs -- a.onnx b.onnx",
    "fold a.onnx --on x --freeze-inputs -o b.onnx",
    "fold a.onnx --freeze-inputs --only x -ob.onnx",
    "fold -o b.onnx --freeze a.onnx --only x",
    "fold a.onnx --output b.onnx --only=x --freeze-inputs",
]


@pytest.mark.parametrize("line", ORDERS)
def test_options_stand_anywhere(line):
    found = parsed(COMMANDS, line.split())
    assert (found.input, found.output, found.freeze_inputs, found.only) == ("a.onnx", "b.onnx", True, ["x"])


def test_options_stand_anywhere_in_other_commands():
    found = parsed(COMMANDS, ["bench", "A", "--runs", "3", "B"])
    assert (found.original, found.other, found.runs) == ("A", "B", 3)
    found = parsed(COMMANDS, ["reestimate", "A", "--data", "1.npz", "2.npz", "--unbiased", "B"])
    assert (found.input, found.output, found.paths) == ("A", "B", [["1.npz", "2.npz"]])
    found = parsed(COMMANDS, ["fold-all", "A", "-o", "out", "B", "--again", "C"])
    assert (found.sources, found.out, found.again) == (["A", "B", "C"], "out", True)
    found = parsed(COMMANDS, ["deploy", "A", "-qo", "B", "--seed", "-1"])
    assert (found.input, found.output, found.quiet, found.seed) == ("A", "B", True, -1)
    found = parsed(COMMANDS, ["fold", "--strict", "--", "-a.onnx", "--quiet"])
    assert (found.input, found.output, found.quiet) == ("-a.onnx", "--quiet", False)
    found = parsed(COMMANDS, ["fold", "-", "--json", "-", "-"])
    assert (found.input, found.json, found.output) == ("-", "-", "-")


@pytest.mark.parametrize("option", ["-o", "--output"])
def test_output(option, here):
    assert main(["fold", option, "out.onnx", "in.onnx", "-q"]) == 0
    assert ops(onnx.load("out.onnx")) == "Conv"


def test_an_output_that_is_missing_or_given_twice(refused):
    assert "OUT is given twice, as out.onnx and with --output (fastbn fold --help" in refused("fold", "in.onnx", "out.onnx", "-o", "b.onnx")
    assert "required: OUT (fastbn deploy --help shows them)" in refused("deploy", "in.onnx")


HINTS = {
    "fold in.onnx --freze-inputs": "unrecognized arguments: --freze-inputs; did you mean --freeze-inputs?",
    "fold --freze-inputs": "unrecognized arguments: --freze-inputs; did you mean --freeze-inputs?",
    "deploy in.onnx x.onnx --max-dorp=1": "unrecognized arguments: --max-dorp=1; did you mean --max-drop?",
    "fold in.onnx x.onnx more.onnx": "unrecognized arguments: more.onnx",
    "bench in.onnx --zzzz": "unrecognized arguments: --zzzz",
    "vrify in.onnx": "verify, bench, bench-kernels, show-config); did you mean verify?",
    "--dbug fold": "unrecognized arguments: --dbug; did you mean --debug?",
    "deploy in.onnx x.onnx --metric eror": "(choose from auto, top-1, error, accuracy); did you mean error?",
}


@pytest.mark.parametrize("line", HINTS)
def test_hints_name_the_command_and_what_was_meant(line, refused):
    known = [word for word in line.split()[:1] if word in COMMANDS]
    assert refused(*line.split()).endswith(f"{HINTS[line]} ({' '.join(['fastbn', *known])} --help shows them)\n")


# An error about an argument of Python's function names the option that gives it.
NAMED = {
    "fold in.onnx --input-shape nope=1,2": "--input-shape",
    "fold in.onnx --input-shape x=1,2": "--input-shape",
    "fold in.onnx --only layer*": "--only",
    "deploy in.onnx x.onnx --max-drop 7": "--max-drop",
    "deploy in.onnx x.onnx --samples 0": "--samples",
    "deploy in.onnx x.onnx --labels y": "--data",
    "deploy in.onnx x.onnx --runs 0": "--runs",
    "deploy in.onnx x.onnx --metric accuracy": "--metric",
    "bench in.onnx --runs 0": "--runs",
    "reestimate in.onnx --data a.npz --samples 0": "--samples",
    "reestimate in.onnx --data a.npz --memory much": "--memory",
    "fold-all in.onnx -o out --timeout 0": "--timeout",
    "fold-all in.onnx -o out --memory 1": "--memory",
}


@pytest.mark.parametrize("line", NAMED)
def test_errors_name_the_option(line, refused):
    assert refused(*line.split()).endswith(f" - at `{NAMED[line]}`\n")


def test_python_names_its_own_arguments(here):
    with pytest.raises(ArgumentError, match=r"- at `input_shapes`$"):
        fastbn.fold("in.onnx", input_shapes={"nope": (1, 2)})
    pytest.importorskip("jinja2", reason="the HTML report needs jinja2")
    (here / "report.html").write_text("old")
    with pytest.raises(fastbn.errors.StorageError, match=r"it exists; force=True replaces it$"):
        fastbn.deploy("in.onnx", report="report.html")


def test_a_report_that_exists(here, refused):
    pytest.importorskip("jinja2", reason="the HTML report needs jinja2")
    (here / "report.html").write_text("old")
    assert refused("deploy", "in.onnx", "x.onnx", "--report", "report.html").endswith("it exists; --force replaces it\n")


def test_a_model_from_stdin_in_every_place(here, environment):
    model = (here / "in.onnx").read_bytes()
    for words in (["verify", "in.onnx", "-"], ["verify", "-", "in.onnx"], ["bench", "in.onnx", "-", "--runs", "1"]):
        command = [sys.executable, "-m", "fastbn", *words]
        done = subprocess.run(command, env=environment, input=model, capture_output=True, timeout=120)
        assert (done.returncode, done.stderr) == (0, b"")


def test_show_config_to_a_file(here, capsys):
    assert main(["show-config", "--json", "config.json"]) == 0
    assert json.loads((here / "config.json").read_text()) == fastbn.show_config()
    assert re.search(rf"^version +{re.escape(fastbn.__version__)}$", capsys.readouterr().out, re.MULTILINE)


# ---- sizes ----

SIZES = {"2G": 2 << 30, "2GiB": 2 << 30, "2gb": 2 * 10**9, "2 GB": 2 * 10**9, "512K": 512 << 10, "1.5MB": 1_500_000, "7": 7, "7B": 7}


@pytest.mark.parametrize("text", SIZES)
def test_a_size_means_the_same_everywhere(text):
    assert bytes_in(text, "x") == size_in_bytes(text, "x") == SIZES[text]
    if SIZES[text] >= 256 << 20:
        assert limits_in(f"memory={text}").memory == SIZES[text]


@pytest.mark.parametrize("text", ["", "G", "2X", "-1", "2GG", "1e9", "0x10", "\u0662G", "2 G B", "nan"])
def test_what_is_no_size(text):
    for where, read in (("--memory", bytes_in), ("--limits", lambda text, where: limits_in(f"memory={text}"))):
        with pytest.raises(ArgumentError, match=rf"^Expected .* - at `{where}`$"):
            read(text, where)


# ---- lines ----


def test_a_dumb_terminal_gets_plain_lines(here, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    for term, plain in (("xterm", False), ("dumb", True)):
        monkeypatch.setenv("TERM", term)
        out, err = Terminal(), Terminal()
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        assert main(["fold", "in.onnx", "out.onnx", "--force"]) == 0
        assert ("\x1b" in out.getvalue(), "\r" in err.getvalue()) == (not plain, not plain)


class Narrow(io.StringIO):
    """A terminal that has its own width, whatever stdout has."""

    def isatty(self):
        return True

    def fileno(self):
        return 99


@pytest.mark.parametrize("columns", [12, 30, 79])
def test_the_status_line_fits_the_terminal(columns, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(os, "get_terminal_size", lambda number: os.terminal_size((columns if number == 99 else 200, 24)))
    screen = Narrow()
    monkeypatch.setattr(sys, "stderr", screen)
    with Steps(False) as steps:
        steps(2, 7, "folding and verifying", "\u6f22\u5b57" * 60)
        steps(3, 7, "quantizing", "a\u0301" * 60)
        steps(4, 7, "writing")
    for line in screen.getvalue().split("\r"):
        assert terminal._cut(line, 10**6)[1] < columns
    assert len(screen.getvalue().split("\r")[-2]) < columns, "and is cleared"


def test_the_first_step_is_told_with_the_second(monkeypatch):
    """What is wrong with the arguments turns up in the first one: then nothing but the error is printed."""
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    steps = Steps(False)
    steps(1, 3, "reading")
    steps(1, 3, "reading", "more")
    assert screen.getvalue() == ""
    steps(2, 3, "working")
    steps(3, 3, "writing")
    assert screen.getvalue() == "fastbn: 1/3 reading\nfastbn: 2/3 working\nfastbn: 3/3 writing\n"


def test_a_usage_error_is_all_that_is_printed(here, refused):
    np.save(here / "wrong.npy", np.zeros((4, 5), np.float32))
    for command in ("deploy", "reestimate"):
        assert "Expected shape" in refused(command, "in.onnx", "x.onnx", "--data", "wrong.npy")
    for option in ("--only", "--skip", "--exclude-nodes"):
        assert "Expected a glob that names a node" in refused("deploy", "in.onnx", "x.onnx", "--quantize", option, "none*")


def test_a_tally_counts_what_is_done(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    tally = Tally(False)
    for done in range(3):
        tally(done, 2, f"model {done}")
    assert screen.getvalue() == "fastbn: 1/2 model 1\nfastbn: 2/2 model 2\n"


def test_the_files_that_were_written_are_named_and_counted(here, capsys):
    proto = onnx.load(MODELS / "torch_digits.onnx")
    onnx.save(proto, "big.onnx", save_as_external_data=True, location="big.data", size_threshold=0)
    assert main(["fold", "big.onnx", "out.onnx"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    size = (here / "out.onnx").stat().st_size + (here / "out.onnx.data").stat().st_size
    assert line == f"wrote   out.onnx with out.onnx.data   {size / 1e6:.1f} MB"


def row(model, median, ratio=1.0, low=None, high=None, difference="none"):
    return Latency(
        threads=1, model=model, runs=9, median_ms=median, p90_ms=1e3 * median, ratio=ratio, low=low, high=high, difference=difference
    )


def test_the_table_of_latencies():
    rows = [row("original", 1.23456), row("folded", 0.61234, 0.496, 0.4912, 0.501, "less")]
    lines = [re.split("  +", line) for line in latency_table(rows)]
    assert lines[0] == ["threads", "model", "median", "p90", "times the original's", "99 % interval", "difference"]
    assert lines[1] == ["1", "original", "1.23 ms", "1.23 s"], "it is compared with nothing"
    assert lines[2] == ["1", "folded", "0.612 ms", "612 ms", "0.50", "0.49 to 0.50", "faster"]
    for low, high, said in ((None, None, "too few runs to tell"), (0.3, 2.7, "too noisy to tell")):
        assert latency_table([row("folded", 1, 1, low, high, "unknown")])[1].endswith(said)
