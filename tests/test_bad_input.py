"""Bad input: one line on stderr, exit code 2, nothing written, no traceback. Each line of the list that the project keeps."""

import errno
import importlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import make_models
import numpy as np
import onnx
import pytest
from onnx import external_data_helper
from sketch import CONV_BN, conv_bn, model, norm, normal

import fastbn
from fastbn import cli, commands
from fastbn.cli import main


@pytest.fixture(name="here")
def _here(tmp_path, monkeypatch):
    """A working folder with in.onnx."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.onnx").write_bytes(conv_bn().SerializeToString())
    return tmp_path


def tree(folder):
    return {path.relative_to(folder): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture(name="fails")
def _fails(here, capsys):
    """Run the command, demand one line on stderr, exit code 2 and an unchanged folder; return the line."""

    def run(*arguments, code=2):
        before = tree(here)
        capsys.readouterr()
        assert main([*arguments]) == code
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        assert captured.err.startswith(("fastbn: Expected ", "fastbn: Cannot "))
        assert len(captured.err) < 600
        assert tree(here) == before
        return captured.err

    return run


def test_missing_file(fails):
    assert "Cannot use 'nowhere.onnx': no such file or directory\n" in fails("fold", "nowhere.onnx", "out.onnx")
    fails("verify", "nowhere.onnx", "in.onnx")
    fails("verify", "in.onnx", "nowhere.onnx")
    fails("bench", "nowhere.onnx")


def test_folder(here, fails):
    (here / "folder").mkdir()
    assert "got a folder - at `folder`" in fails("fold", "folder", "out.onnx")


def test_file_that_may_not_be_read(here, fails, monkeypatch):
    def denied(self):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.read_bytes", denied)
    with monkeypatch.context() as only:
        only.setattr(sys.modules[__name__], "tree", lambda folder: sorted(os.listdir(folder)))
        assert "permission denied" in fails("fold", "in.onnx", "out.onnx")


def test_name_with_a_null_byte():
    with pytest.raises(fastbn.StorageError, match="Expected a path"):
        fastbn.fold("in\0.onnx")


def test_name_that_is_not_utf_8(fails):
    assert "\\udcff" in fails("fold", os.fsdecode(b"\xff.onnx"), "out.onnx")


def test_name_with_a_line_break(fails):
    fails("fold", "a\nb.onnx", "out.onnx")


def test_empty_file(here, fails):
    (here / "empty.onnx").write_bytes(b"")
    assert "no bytes at all - at `empty.onnx`" in fails("fold", "empty.onnx", "out.onnx")


@pytest.mark.parametrize("text", [b"# a README, no model\n" * 40, b"{}", b"\x80\x02}q\x00.", b"PK\x03\x04" + bytes(60), b"\0" * 100])
def test_other_files(text, here, fails):
    (here / "text.onnx").write_bytes(text)
    assert "Expected an ONNX model" in fails("fold", "text.onnx", "out.onnx")


def test_a_message_of_another_kind(here, fails):
    (here / "tensor.onnx").write_bytes(onnx.numpy_helper.from_array(normal(3)).SerializeToString())
    fails("fold", "tensor.onnx", "out.onnx")
    (here / "bare.onnx").write_bytes(onnx.ModelProto(ir_version=8).SerializeToString())
    assert "without a graph" in fails("fold", "bare.onnx", "out.onnx")


@pytest.mark.parametrize("tenth", range(1, 10))
def test_truncated(tenth, here, fails, small_cnn):
    data = small_cnn.read_bytes()
    (here / "cut.onnx").write_bytes(data[: len(data) * tenth // 10])
    assert "at `cut.onnx`" in fails("fold", "cut.onnx", "out.onnx")


SMALL = [
    conv_bn(),
    model(
        "(float[N,5] x) => (float[N,4] y) { c = MatMul(x, w) d = Add(c, b) y = BatchNormalization(d, s, t, m, v) }",
        **{"w": normal(5, 4), "b": normal(4), **norm(4)},
    ),
    conv_bn("(float[N,3,8,8] x) => (float[N,4,6,6] y) { z = ConstantOfShape(n) c = Conv(x, w, z) y = BatchNormalization(c, s, t, m, v) }",
            b=None, n=np.array([4])),
]  # fmt: skip


@pytest.mark.parametrize("seed", range(12))
def test_bytes_flipped(seed, here, capsys):
    """A flipped byte may leave a valid model: then it is folded or compared; otherwise there is one line and no output."""
    rng = np.random.default_rng(seed)
    for _ in range(15):
        data = bytearray(SMALL[seed % len(SMALL)].SerializeToString())
        for at in rng.integers(0, len(data), rng.integers(1, 4)):
            data[at] ^= 1 << rng.integers(8)
        (here / "flipped.onnx").write_bytes(data)
        code = main(["fold", "flipped.onnx", "out.onnx", "-q"])
        captured = capsys.readouterr()
        assert code in (0, 2)
        assert (here / "out.onnx").exists() == (code == 0)
        assert captured.err.count("\n") == (code == 2)
        assert captured.out == ""
        (here / "out.onnx").unlink(missing_ok=True)


@pytest.fixture(name="external")
def _external(here):
    """in.onnx with its tensors in in.data."""
    onnx.save(conv_bn(), here / "in.onnx", save_as_external_data=True, location="in.data", size_threshold=0)


@pytest.mark.usefixtures("external")
def test_missing_external_file(here, fails):
    (here / "in.data").unlink()
    assert "Cannot use 'in.data': no such file or directory\n" in fails("fold", "in.onnx", "out.onnx")
    assert "in.data" in fails("fold", "in.onnx", "--dry-run")


@pytest.mark.usefixtures("external")
@pytest.mark.parametrize("size", [0, 1, 300])
def test_external_file_too_short(size, here, fails):
    data = (here / "in.data").read_bytes()
    (here / "in.data").write_bytes(data[:size])
    line = fails("fold", "in.onnx", "out.onnx")
    assert f"got {size} - at `in.data`" in line


@pytest.mark.parametrize("place", ["../in.data", "/etc/hostname", "a/../../in.data", "..\\in.data", "C:\\in.data", "", "in.data\0", "in"])
def test_external_file_outside_or_no_file(place, here, fails):
    (here / "in").mkdir()
    proto = conv_bn()
    tensor = proto.graph.initializer[0]
    external_data_helper.set_external_data(tensor, place, 0, len(tensor.raw_data))
    tensor.ClearField("raw_data")
    (here / "in.onnx").write_bytes(proto.SerializeToString())
    (here.parent / "in.data").write_bytes(bytes(4096))
    line = fails("fold", "in.onnx", "out.onnx")
    if place != "in":
        assert "Expected external data inside the model's folder" in line


@pytest.mark.usefixtures("external")
@pytest.mark.parametrize(("key", "value"), [("offset", "-4"), ("offset", "many"), ("length", "-1"), ("length", "3"), ("offset", "9" * 30)])
def test_external_offset_or_length_that_is_none(key, value, here, fails):
    proto = onnx.load(here / "in.onnx", load_external_data=False)
    for entry in proto.graph.initializer[0].external_data:
        if entry.key == key:
            entry.value = value
    (here / "in.onnx").write_bytes(proto.SerializeToString())
    fails("fold", "in.onnx", "out.onnx")


def test_output_folder_missing(fails):
    assert "Cannot write 'nowhere/out.onnx': there is no folder 'nowhere'" in fails("fold", "in.onnx", "nowhere/out.onnx")


def test_output_is_a_folder(here, fails):
    (here / "folder").mkdir()
    fails("fold", "in.onnx", "folder")
    fails("fold", "in.onnx", "out.onnx", "--json", "folder")


def test_output_folder_not_writable(fails, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "Cannot write 'out.onnx': no file can be made in the folder" in fails("fold", "in.onnx", "out.onnx")


def test_output_folder_that_refuses_after_all(fails, monkeypatch):
    opened = os.open

    def denied(path, flags, *rest, **options):
        if flags & os.O_CREAT:
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", denied)
    assert "Cannot use 'out.onnx': permission denied\n" in fails("fold", "in.onnx", "out.onnx")


@pytest.mark.usefixtures("external")
@pytest.mark.parametrize("call", ["pathlib.Path.write_bytes", "os.fsync"])
def test_disk_full(call, fails, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(call, full)
    assert "Cannot use 'out.onnx': no space left on device\n" in fails("fold", "in.onnx", "out.onnx", "--no-verify")


def test_disk_full_in_place_keeps_the_input(fails, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    fails("fold", "in.onnx", "--in-place")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_stdout_full(here, environment):
    for arguments in (["fold", "in.onnx", "-"], ["fold", "in.onnx", "--dry-run"], ["show-config", "--json", "-"]):
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [sys.executable, "-m", "fastbn", *arguments], env=environment, stdout=full, stderr=subprocess.PIPE, timeout=120
            )
        assert done.returncode == 2
        assert done.stderr.count(b"\n") == 1
        assert b"no space left on device" in done.stderr


def test_in_equal_to_out_without_in_place(here, fails):
    assert "--in-place" in fails("fold", "in.onnx", "in.onnx")
    fails("fold", "in.onnx", "./in.onnx")
    fails("fold", "in.onnx", str(here / "in.onnx"))
    (here / "link.onnx").symlink_to("in.onnx")
    fails("fold", "in.onnx", "link.onnx")
    fails("fold", "link.onnx", "in.onnx")


def test_in_place_with_out_or_stdin(fails):
    fails("fold", "in.onnx", "out.onnx", "--in-place")
    fails("fold", "-", "--in-place")


@pytest.mark.usefixtures("external")
def test_output_equal_to_a_data_file_of_the_input(fails):
    fails("fold", "in.onnx", "in.data")


def test_report_equal_to_the_input_or_the_output(fails):
    fails("fold", "in.onnx", "out.onnx", "--json", "in.onnx")
    fails("fold", "in.onnx", "out.onnx", "--json", "./out.onnx")
    fails("verify", "in.onnx", "in.onnx", "--json", "in.onnx")
    fails("bench", "in.onnx", "--json", "in.onnx")


def test_report_and_model_on_stdout(fails):
    fails("fold", "in.onnx", "-", "--json", "-")


def test_report_folder_missing(fails):
    fails("fold", "in.onnx", "out.onnx", "--json", "nowhere/report.json")


def test_unknown_operator_domain_works_and_is_said(here, capsys):
    proto = conv_bn(CONV_BN.replace("y = Batch", "n = Batch").replace("}", "y = com.maker.Magic(n) }"), imports=["com.maker"])
    (here / "in.onnx").write_bytes(proto.SerializeToString())
    assert main(["fold", "in.onnx", "out.onnx"]) == commands.UNVERIFIED == 5
    out, err = capsys.readouterr()
    assert err == "fastbn: done, not verified (exit code 5)\n", "the report says why"
    assert "parity  not run: onnxruntime cannot load the original" in out
    assert "com.maker" in out
    assert main(["fold", "in.onnx", "out.onnx", "-q"]) == commands.UNVERIFIED
    assert re.fullmatch("fastbn: done, not verified: onnxruntime cannot load the original: .*com.maker.*\n", capsys.readouterr().err)
    assert [node.op_type for node in onnx.load("out.onnx").graph.node] == ["Conv", "Magic"]


def test_unknown_globs_name_what_there_is(fails):
    line = fails("fold", "in.onnx", "out.onnx", "--only", "layer*")
    assert "BatchNormalization: y" in line
    assert "'layer*' - at `--only`" in line
    fails("fold", "in.onnx", "out.onnx", "--skip", "z")


BAD_SHAPES = ["x", "x=", "=1,2", "x=1,,2", "x=a", "x=0,3", "x=-1,3", "x=1.5", "x=1,3,8,8,", "nowhere=1,3,8,8", "x=1,3", "x=1,9,8,8"]
BAD_SHAPES += ["x=" + "9" * 5000, "x=1,3,8," + "9" * 19]


@pytest.mark.parametrize("shape", BAD_SHAPES)
def test_bad_input_shape(shape, fails):
    fails("fold", "in.onnx", "out.onnx", "--input-shape", shape)


@pytest.mark.parametrize(
    "arguments",
    [
        ["unknown"],
        ["fold"],
        ["fold", "in.onnx", "out.onnx", "more.onnx"],
        ["fold", "in.onnx", "--unknown"],
        ["fold", "in.onnx", "--only"],
        ["verify", "in.onnx"],
        ["bench", "in.onnx", "--runs", "0"],
        ["bench", "in.onnx", "--runs", "many"],
        ["show-config", "more"],
    ],
    ids=" ".join,
)
def test_usage(arguments, fails):
    fails(*arguments)


def test_memory_that_runs_out(fails, monkeypatch):
    def exhausted(*_, **__):
        raise MemoryError

    monkeypatch.setattr("fastbn.graph.job.fold", exhausted)
    assert "the memory does not suffice" in fails("fold", "in.onnx", "out.onnx")


def test_interrupt_in_process(here, capsys, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module("fastbn.graph.parity.model_parity").Comparison, "check", stop)
    before = tree(here)
    assert main(["fold", "in.onnx", "out.onnx"]) == cli.INTERRUPTED == 130
    assert capsys.readouterr().err == "fastbn: interrupted, nothing written\n"
    assert tree(here) == before


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize("moment", ["reading", "staging", "verifying"])
def test_ctrl_c_during_the_run_leaves_no_partial_file(moment, tmp_path, environment):
    """The signal comes when the first file of the output appears, or after a while: before, while and after the data is written."""
    make_models.large(tmp_path, layers=8, channels=1024)
    before = sorted(path.name for path in tmp_path.iterdir())
    for _ in range(5):  # the run may be faster than the signal
        process = interrupted(moment, tmp_path, before, environment)
        out, err = process.communicate(timeout=60)
        if process.returncode != 0:
            break
        for path in tmp_path.glob("out.onnx*"):
            path.unlink()
    assert process.returncode != 0
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    if moment != "reading":
        assert (process.returncode, out, err) == (130, b"", b"fastbn: interrupted, nothing written\n")


def has_loaded(process):
    """Say whether a fold has imported onnx: what runs when Python starts, as coverage.py may, swallows interrupts."""
    time.sleep(0.15)
    try:
        return "onnx" in Path(f"/proc/{process.pid}/maps").read_text(encoding="utf-8")
    except OSError:  # it has ended, or the system has no such file
        return True


def interrupted(moment, folder, before, environment):
    """Start a fold in a folder, send it SIGINT at a moment, and return the process."""
    process = subprocess.Popen(
        [sys.executable, "-m", "fastbn", "fold", "large.onnx", "out.onnx"],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 30
    while moment != "reading" and sorted(path.name for path in folder.iterdir()) == before and process.poll() is None:
        assert time.monotonic() < deadline
    while moment == "verifying" and not list(folder.glob(".fastbn-*/model.onnx")) and process.poll() is None:
        assert time.monotonic() < deadline
    while moment == "reading" and not has_loaded(process):
        time.sleep(0.01)
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    return process
