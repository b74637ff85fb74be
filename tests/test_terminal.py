"""What the command says and how it ends: closed and full streams, locales, long lines, and exit codes that mean one thing each."""

import os
import re
import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import external_data_helper
from shell import Terminal, files
from sketch import CONV_BN, conv_bn, model, norm, normal

import fastbn
from fastbn import cli, commands
from fastbn.cli import main
from fastbn.graph import job
from fastbn.graph.report import result_rows, wrapped
from fastbn.graph.results import Fold, Kept, Parity


@pytest.fixture(name="here")
def _here(tmp_path, monkeypatch):
    """A working folder with in.onnx."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.onnx").write_bytes(conv_bn().SerializeToString())
    return tmp_path


def shell(line, environment, **variables):
    """Run a line of sh in which fastbn is the command."""
    line = line.replace("fastbn ", f"'{sys.executable}' -m fastbn ")
    return subprocess.run(["sh", "-c", line], env={**environment, **variables}, capture_output=True, timeout=120, check=False)


@pytest.mark.skipif(os.name == "nt", reason="sh")
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams(closed, here, environment):
    """What would be printed goes nowhere, and no file takes the place of a stream."""
    done = shell(f"fastbn fold in.onnx out.onnx --json report.json {closed}", environment)
    assert (done.returncode, done.stderr) == (0, b"")
    assert fastbn.verify("in.onnx", "out.onnx").ok
    assert files(here) == ["in.onnx", "out.onnx", "report.json"]
    assert shell(f"fastbn fold nowhere.onnx {closed}", environment).returncode == 2
    assert shell(f"fastbn show-config {closed}", environment).returncode == 0


@pytest.mark.parametrize("arguments", ["- >&-", "out.onnx --json - >&-"])
def test_what_was_asked_of_a_closed_stdout_is_refused(arguments, here, environment):
    done = shell(f"fastbn fold in.onnx {arguments}", environment)
    assert (done.returncode, done.stderr) == (2, b"fastbn: Cannot write to stdout: it is closed\n")
    assert files(here) == ["in.onnx"]


def test_a_closed_stdin_is_no_model(environment):
    done = shell("fastbn fold - - <&-", environment)
    assert (done.returncode, done.stderr) == (2, b"fastbn: Expected an ONNX model, got no bytes at all - at `model`\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_stderr_changes_nothing(here, environment):
    assert shell("fastbn fold nowhere.onnx 2>/dev/full", environment).returncode == 2
    assert shell("fastbn fold in.onnx - 2>/dev/full >out.onnx -q", environment).returncode == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_stdout_leaves_no_model(here, environment):
    done = shell("fastbn fold in.onnx out.onnx >/dev/full", environment)
    assert (done.returncode, files(here)) == (2, ["in.onnx"])
    assert b"Cannot write to stdout: no space left on device" in done.stderr


def test_a_reader_that_leaves_early_gets_its_model_all_the_same(here, environment):
    done = shell("fastbn fold in.onnx out.onnx | true", environment)
    assert done.stderr == b""
    assert fastbn.verify("in.onnx", "out.onnx").ok


# A name that is no UTF-8, and one that is in a locale that does not know it.
NAMES = [(b"\xff", {}), (b"mod\xc3\xa8le", {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii:strict"})]


@pytest.mark.parametrize(("name", "locale"), NAMES, ids=repr)
def test_names_that_the_locale_cannot_spell(name, locale, here, environment):
    """Of files, folders, data files and nodes: all are bytes to the system, and UTF-8 in a model."""
    proto = conv_bn()
    proto.graph.node[1].name = "Schicht-\u00e4"
    word = os.fsdecode(name)
    (here / word).mkdir()
    (here / word / f"{word}.onnx").write_bytes(proto.SerializeToString())
    (here / word / "Schicht-\u00e4.data").write_bytes(normal(4, 3, 3, 3).tobytes())
    weight = proto.graph.initializer[0]
    external_data_helper.set_external_data(weight, "Schicht-\u00e4.data")
    weight.ClearField("raw_data")
    (here / word / "external.onnx").write_bytes(proto.SerializeToString())
    fold = f"fastbn fold {word}/{word}.onnx"
    for line in (
        f"{fold} {word}.onnx --only 'Schicht-\u00e4' --json {word}.json",
        f"{fold} {word}/out.onnx",
        f"fastbn verify {word}/{word}.onnx {word}/out.onnx",
        f"fastbn bench {word}/{word}.onnx --runs 1",
    ):
        done = shell(line, environment, **locale)
        assert done.returncode == 0, (line, done.stderr)
        assert done.stderr == b""
    done = shell(f"fastbn fold {word}/external.onnx", environment, **locale)
    if name == b"\xff":  # onnxruntime takes no such folder
        assert (done.returncode, done.stderr.count(b"\n")) == (2, 1)
        assert b"its name is not UTF-8" in done.stderr
    else:
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("name", "locale"), NAMES, ids=repr)
def test_a_deployment_with_such_names(name, locale, here, environment, small_cnn):
    pytest.importorskip("jinja2", reason="the HTML report needs jinja2")
    word = os.fsdecode(name)
    (here / word).mkdir()
    (here / word / f"{word}.onnx").write_bytes(small_cnn.read_bytes())
    line = f"fastbn deploy {word}/{word}.onnx {word}/out.onnx --quantize --max-drop 1 --for size --runs 1 -q --report {word}/page.html"
    done = shell(line, environment, **locale)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (here / word / "page.html").exists()


def joined(count):
    names = [f"/backbone/layer{number}/bn/BatchNormalization" for number in range(count)]
    fold = Fold("+".join(names), ("BatchNormalization",) * count, "+".join(names[::-1]), "+".join(["Conv"] * count), 64, 1e-7, 1e-6)
    return names, fold


@pytest.mark.parametrize("width", [40, 80, 160])
def test_rows_of_joined_plans_are_folded_and_their_names_listed_below(width):
    names, fold = joined(60)
    kept = Kept("+".join(names), fold.ops, "axis", "backwards: one; forwards: another")
    lines = wrapped(["m.onnx   opset 17", *result_rows([fold, joined(1)[1]], [kept], [])], width)
    assert max(map(len, lines)) <= width
    text = " ".join(" ".join(lines).split())
    assert "folded 60 nodes into 60 nodes 64 channels error 1.0e-07 of 1.0e-06 allowed" in text
    assert "kept 60 nodes backwards: one [axis]" in text
    if width > 60:
        assert "folded /backbone/layer0/bn/BatchNormalization into /backbone/layer0/bn/BatchNormalization" in text
        for name in names:
            assert len(re.findall(rf"{name}\b", text)) >= 3


def test_short_rows_stay_as_they_are():
    _, fold = joined(1)
    (line,) = result_rows([fold], [], [])
    assert wrapped([line]) == [line]
    assert len(line) < 160


def test_a_name_of_a_thousand_letters():
    lines = wrapped(result_rows([Fold("n" * 1000, ("BatchNormalization",), "conv", "Conv", 3)], [], []), 100)
    assert max(map(len, lines)) <= 100
    assert "".join(lines).replace(" ", "").count("n" * 1000) == 1


def test_the_table_has_the_width_of_the_terminal(here, monkeypatch, capsys):
    proto = conv_bn()
    proto.graph.node[1].name = "/a/b" * 30
    (here / "in.onnx").write_bytes(proto.SerializeToString())
    for columns in (50, 100):
        monkeypatch.setenv("COLUMNS", str(columns))
        screen = Terminal()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", screen)
            assert main(["fold", "in.onnx", "--dry-run"]) == 0
        assert columns - 20 < max(len(re.sub(r"\x1b\[\d+m", "", line)) for line in screen.getvalue().splitlines()) <= columns
    main(["fold", "in.onnx", "--dry-run"])
    assert max(map(len, capsys.readouterr().out.splitlines())) > 100, "no terminal, no terminal's width"


@pytest.mark.parametrize(
    "arguments", [["."], [""], [".."], ["/"], ["in.onnx", ""], ["in.onnx", "a\0b"], ["a\0b"], ["in.onnx", "--json", "a\0b"]], ids=repr
)
def test_names_that_are_none(arguments, here, capsys):
    assert main(["fold", *arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(("fastbn: Expected ", "fastbn: Cannot "))
    assert files(here) == ["in.onnx"]


def test_what_cannot_be_compared_is_2_and_what_differs_is_1(here, capsys):
    (here / "other-input.onnx").write_bytes(conv_bn(CONV_BN.replace("x)", "z)").replace("(x,", "(z,")).SerializeToString())
    (here / "other-output.onnx").write_bytes(conv_bn(CONV_BN.replace(" y)", " z)").replace("y =", "z =")).SerializeToString())
    (here / "other-sizes.onnx").write_bytes(
        conv_bn(CONV_BN.replace("float[N,3,8,8] x", "float[N,5,8,8] x"), w=normal(4, 5, 3, 3)).SerializeToString()
    )
    (here / "other-type.onnx").write_bytes(
        model(
            "(double[N,4] x) => (double[N,4] y) { y = BatchNormalization(x, s, t, m, v) }", **norm(4, dtype=np.float64)
        ).SerializeToString()
    )
    for name in ("other-input", "other-output", "other-sizes", "other-type"):
        assert main(["verify", "in.onnx", f"{name}.onnx"]) == 2, name
        out, err = capsys.readouterr()
        assert out == "", "one sentence, once"
        assert err.count("\n") == 1
        assert err.startswith("fastbn: Cannot compare the models: ")
        assert main(["verify", "in.onnx", f"{name}.onnx", "-q"]) == 2
        assert capsys.readouterr().err == err
        if name != "other-output":
            assert main(["bench", "in.onnx", f"{name}.onnx", "--runs", "1"]) == 2
            said = (
                "Expected the inputs x as the first model has them" if name == "other-input" else f"Cannot time '{name}.onnx': onnxruntime"
            )
            assert capsys.readouterr().err.startswith(f"fastbn: {said}")
    (here / "wrong.onnx").write_bytes(conv_bn(w=normal(4, 3, 3, 3, seed=9)).SerializeToString())
    assert main(["verify", "in.onnx", "wrong.onnx"]) == 1


def test_a_second_model_on_stdin(here, environment):
    for options in ("", "--json -"):
        done = shell(f"fastbn verify in.onnx - {options} <in.onnx", environment)
        assert (done.returncode, done.stderr) == (0, b"")


def test_bench_without_the_data_file(here, capsys):
    onnx.save(conv_bn(), "big.onnx", save_as_external_data=True, location="big.data", size_threshold=0)
    (here / "big.data").unlink()
    for arguments in (["big.onnx"], ["in.onnx", "big.onnx"], ["big.onnx", "in.onnx"]):
        assert main(["bench", *arguments, "--runs", "1"]) == 2
        assert capsys.readouterr().err == "fastbn: Cannot use 'big.data': no such file or directory\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "-1"], "Expected a whole number from 0 to 4294967295, got -1 - at `--seed`"),
        (["--max-drop", "5"], "Expected a part from 0 to 1, got 5.0 - at `--max-drop`"),
        (["--max-drop", "1.0001", "--metric", "error"], "Expected a part from 0 to 1"),
        (["--max-drop", "inf"], "Expected a part from 0 to 1"),
    ],
)
def test_arguments_of_a_deployment(arguments, message, here, capsys):
    assert main(["deploy", "in.onnx", "out.onnx", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert files(here) == ["in.onnx"]


@pytest.mark.parametrize("status", ["not-run", "inconclusive"])
def test_done_and_not_verified_is_5(status, here, capsys, monkeypatch):
    monkeypatch.setattr(job.Comparison, "check", lambda *_, **__: Parity(status, reason="on purpose"))
    for options in ([], ["-q"], ["--strict"]):
        assert main(["fold", "in.onnx", "out.onnx", *options]) == commands.UNVERIFIED == 5
        out, err = capsys.readouterr()
        assert err == ("fastbn: done, not verified: on purpose\n" if "-q" in options else "fastbn: done, not verified (exit code 5)\n")
        assert (out + err).count("on purpose") == 1
    assert main(["fold", "in.onnx", "out.onnx", "--no-verify"]) == 0
    assert main(["fold", "in.onnx", "--dry-run"]) == 0
    assert main(["deploy", "in.onnx", "deployed.onnx", "--runs", "1", "-q"]) == 5
    assert capsys.readouterr().err.endswith(f"; not verified: parity is {status}\n")
    assert main(["verify", "in.onnx", "out.onnx"]) == {"not-run": 2, "inconclusive": 5}[status]
    assert "".join(capsys.readouterr()).count("on purpose") == 1


def test_more_serious_codes_go_before_5(here, capsys, monkeypatch):
    monkeypatch.setattr(job.Comparison, "check", lambda *_, **__: Parity("inconclusive", reason="on purpose"))
    monkeypatch.setattr("fastbn.deployment.stages.drop_of", lambda found, metric: next(losses))
    losses = iter([0.0, 0.9, 0.0, 0.9])
    assert main(["deploy", "in.onnx", "out.onnx", "--runs", "1", "-q"]) == 1
    assert not (here / "out.onnx").exists()


@pytest.mark.parametrize(
    "command",
    [["fold", "in.onnx"], ["deploy", "in.onnx", "o.onnx"], ["verify", "in.onnx", "in.onnx"], ["bench", "in.onnx"]],
    ids=lambda c: c[0],
)
def test_an_unexpected_fault_is_70_in_one_line(command, here, capsys, monkeypatch):
    def broken(*_, **__):
        raise TypeError("something\nunforeseen")

    monkeypatch.setattr("fastbn.graph.model.storage.load", broken)
    assert main(command) == cli.FAULT == 70
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "fastbn: Cannot go on, nothing written: TypeError: something unforeseen (a fault of fastbn: --debug shows where)\n"
    for argv in ([*command, "--debug"], ["--debug", *command]):
        assert main(argv) == 70
        err = capsys.readouterr().err
        assert err.startswith("Traceback (most recent call last):\n")
        assert err.endswith("(a fault of fastbn: --debug shows where)\n")
    assert files(here) == ["in.onnx"]


def test_debug_is_an_option_of_every_command(here, capsys):
    for command in (["fold", "in.onnx", "--dry-run"], ["show-config"], ["verify", "in.onnx", "in.onnx"]):
        assert main([*command, "--debug"]) == 0
