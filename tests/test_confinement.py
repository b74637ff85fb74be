"""--limits: the command in a process that may take so much time and memory, and no more."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from shell import files
from sketch import conv_bn, model, norm, normal

from fastbn import confinement
from fastbn.cli import main
from fastbn.confinement import Limits, limits_in
from fastbn.errors import ArgumentError

GIB = 1 << 30

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="--limits needs Linux")


@pytest.fixture(name="here")
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.onnx").write_bytes(conv_bn().SerializeToString())
    return tmp_path


def endless():
    """Return a model that runs for years."""
    text = """(float[2,3,8,8] x) => (float y) {
        c = Conv(x, w)
        n = BatchNormalization(c, s, t, m, v)
        y = Loop (many, yes, n) <body = b (int64 i, bool g, float[2,4,8,8] a) => (bool h, float[2,4,8,8] e) {
            h = Identity(g) e = Relu(a) } >
    }"""
    return model(text, w=normal(4, 3, 1, 1), many=np.int64(1 << 50), yes=np.bool_(True), **norm(4))


def greedy():
    """Return a model of a few bytes that makes two gigabytes when it runs, and lets its batch normalization fold."""
    text = """(float[2,3,8,8] x) => (float y) {
        c = Conv(x, w)
        n = BatchNormalization(c, s, t, m, v)
        y = Tile(n, many)
    }"""
    return model(text, w=normal(4, 3, 1, 1), many=np.array([1 << 10, 1 << 10, 1, 1]), **norm(4))


@pytest.mark.parametrize(
    ("text", "limits"),
    [
        ("memory=2G,time=60", Limits(2 * GIB, 60.0)),
        ("time=0.5", Limits(None, 0.5)),
        ("memory=512M", Limits(GIB >> 1, None)),
        ("memory=268435456", Limits(GIB >> 2, None)),
        ("time=1000000,memory=1T", Limits(1 << 40, 1e6)),
    ],
)
def test_limits(text, limits):
    assert limits_in(text) == limits


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "2G",
            "memory",
            "memory=",
            "memory=255M",
            "memory=0",
            "memory=-1",
            "memory=1e9",
            "memory=9999T",
            "memory=\u0662G",
            "memory=2X",
        ),
        *("time=", "time=0", "time=-1", "time=nan", "time=1e3", "time=1000001", "time=9" + "9" * 400, "time=1,time=2"),
        *("cpu=1", "memory=1G;time=1"),
    ],
)
def test_what_is_no_limit(text):
    with pytest.raises(ArgumentError, match=r"^Expected .*, got .* - at `--limits`$"):
        limits_in(text)


@pytest.mark.parametrize("text", [",", "memory=1G,,", "time=1,cpu=1,cpu=1"])
def test_what_is_no_name_is_not_asked_for_once(text):
    with pytest.raises(ArgumentError, match=rf"^Expected memory=SIZE,time=SECONDS, as memory=2G,time=60, got '{text}' - at"):
        limits_in(text)


def test_an_interrupt_before_the_command_has_begun(monkeypatch):
    ends_itself = "import os, signal; signal.signal(signal.SIGINT, signal.SIG_DFL); os.kill(os.getpid(), signal.SIGINT)"
    monkeypatch.setattr(confinement, "PROGRAM", ends_itself)
    with pytest.raises(KeyboardInterrupt):
        confinement.confined(["fold"], Limits(seconds=60), (), "fold")


def test_the_same_result_within_limits(here, capfd):
    assert main(["fold", "in.onnx", "plain.onnx"]) == 0
    plain = capfd.readouterr().out
    assert main(["fold", "in.onnx", "limited.onnx", "--limits", "memory=1G,time=100"]) == 0
    assert capfd.readouterr() == (plain.replace("plain.onnx", "limited.onnx"), "")
    assert Path("plain.onnx").read_bytes() == Path("limited.onnx").read_bytes()
    assert main(["verify", "in.onnx", "limited.onnx", "--limits", "time=100"]) == 0


def test_the_exit_code_and_the_error_are_those_of_the_work(here, capfd):
    assert main(["fold", "none.onnx", "--limits", "time=100"]) == 2
    assert capfd.readouterr() == ("", "fastbn: Cannot use 'none.onnx': no such file or directory\n")
    assert main(["fold", "in.onnx", "--skip", "*", "--strict", "-q", "--limits", "time=100"]) == 3


def test_a_model_that_runs_for_years(here, capfd):
    (here / "in.onnx").write_bytes(endless().SerializeToString())
    start = time.monotonic()
    assert main(["fold", "in.onnx", "out.onnx", "--limits", "time=3"]) == 2
    assert time.monotonic() - start < 60
    assert capfd.readouterr() == ("", "fastbn: Cannot fold 'in.onnx': it took more than 3 s\n")
    assert files(here) == ["in.onnx"]


def test_a_model_that_runs_for_years_over_data(here, capfd):
    """A batch normalization behind the loop: the model must run to show what flows in."""
    text = """(float[2,4,8,8] x) => (float y) {
        n = Loop (many, yes, x) <body = b (int64 i, bool g, float[2,4,8,8] a) => (bool h, float[2,4,8,8] e) {
            h = Identity(g) e = Relu(a) } >
        y = BatchNormalization(n, s, t, m, v)
    }"""
    (here / "in.onnx").write_bytes(model(text, many=np.int64(1 << 50), yes=np.bool_(True), **norm(4)).SerializeToString())
    np.save("data.npy", normal(2, 4, 8, 8))
    line = ["reestimate", "in.onnx", "out.onnx", "--data", "data.npy", "--workers=0", "--batch=2", "-q"]
    assert main([*line, "--limits", "time=3"]) == 2
    assert capfd.readouterr() == ("", "fastbn: Cannot reestimate 'in.onnx': it took more than 3 s\n")
    assert files(here) == ["data.npy", "in.onnx"]


def test_reestimate_within_limits(here, capfd):
    (here / "in.onnx").write_bytes(conv_bn().SerializeToString())
    np.save("data.npy", normal(4, 3, 8, 8))
    line = ["reestimate", "in.onnx", "out.onnx", "--data", "data.npy", "--workers=0", "-q", "--limits", "memory=1G,time=100"]
    assert main(line) == 0
    assert files(here) == ["data.npy", "in.onnx", "out.onnx"]


def test_workers_of_others_are_not_limited(here, capfd):
    np.save("data.npy", normal(4, 3, 8, 8))
    line = ["reestimate", "in.onnx", "--data", "data.npy", "--scheduler", "tcp://localhost:1", "--limits", "time=100"]
    assert main(line) == 2
    assert capfd.readouterr() == ("", "fastbn: Cannot limit time and memory: the workers of a --scheduler are processes of others\n")


def test_a_model_that_asks_for_more_memory(here, capfd):
    (here / "in.onnx").write_bytes(greedy().SerializeToString())
    assert main(["fold", "in.onnx", "out.onnx", "-q", "--limits", "memory=1G,time=100"]) == 5
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("fastbn: done, not verified: onnxruntime cannot run the original: Tile 'y': ")
    assert "allocate memory" in err


@pytest.fixture(name="fake")
def _fake(here, monkeypatch):
    """Return a function that lets the import of onnxruntime run a line of Python, in processes that this one starts."""

    def fake(line):
        (here / "fake").mkdir()
        (here / "fake" / "onnxruntime.py").write_text(f"import os, signal\n{line}\n")
        monkeypatch.syspath_prepend(str(here / "fake"))

    return fake


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT", "SIGKILL", "SIGBUS"])
def test_a_crash_is_one_line(name, here, fake, capfd):
    fake(f"os.write(2, b'terminate called without a sentence'); os.kill(os.getpid(), signal.{name})")
    assert main(["fold", "in.onnx", "out.onnx", "--limits", "time=100"]) == 2
    assert capfd.readouterr() == ("", f"fastbn: Cannot fold 'in.onnx': the work was ended by {name}\n")
    assert files(here) == ["fake", "in.onnx"]


def test_what_a_killed_run_leaves_is_removed(here, fake, capfd):
    fake("open('out.onnx.later', 'w').close(); os.kill(os.getpid(), signal.SIGKILL)")
    left = here / ".fastbn-0123456789abcdef"
    left.mkdir()
    assert main(["fold", "in.onnx", "out.onnx", "--limits", "time=100"]) == 2
    assert not left.exists()


def started(words, environment):
    command = [sys.executable, "-m", "fastbn", *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_an_interrupt_ends_both(here, environment):
    (here / "in.onnx").write_bytes(endless().SerializeToString())
    with started(["fold", "in.onnx", "out.onnx", "--limits", "time=300"], environment) as process:
        worker = child_of(process.pid)
        time.sleep(2)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert process.stderr.read() == "fastbn: interrupted, nothing written\n"
    assert ended(worker)
    assert files(here) == ["in.onnx"]


def test_nobody_is_left_where_the_waiting_process_is_killed(here, environment):
    (here / "in.onnx").write_bytes(endless().SerializeToString())
    with started(["fold", "in.onnx", "out.onnx", "--limits", "time=300"], environment) as process:
        worker = child_of(process.pid)
        process.kill()
    assert ended(worker)


def child_of(pid):
    """Return the number of the first child of a process."""
    for _ in range(600):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        if children:
            return int(children[0])
        time.sleep(0.1)
    raise AssertionError("no child")


def ended(pid):
    """Say whether a process ends within a minute."""
    for _ in range(600):
        try:
            if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.1)
    return False


def test_streams(here, environment):
    """The model through stdin and stdout; a closed stdout is one in the process that works, too."""
    command = [sys.executable, "-m", "fastbn", "fold", "-", "-", "-q", "--limits", "time=100"]
    done = subprocess.run(command, env=environment, input=conv_bn().SerializeToString(), capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    closed = subprocess.run(
        ["sh", "-c", f"'{sys.executable}' -m fastbn fold in.onnx - --limits time=100 >&-"],
        env=environment,
        capture_output=True,
        check=False,
    )
    assert (closed.returncode, closed.stderr) == (2, b"fastbn: Cannot write to stdout: it is closed\n")


def test_files_take_their_places_only_with_leave(here, monkeypatch):
    """A command that is not limited asks nobody; one that is waits for the answer before anything is in its place."""
    seen = []
    monkeypatch.setattr(confinement, "_ask_to_deliver", lambda: seen.append(sorted(name for name in os.listdir() if name[0] != ".")))
    assert main(["fold", "in.onnx", "out.onnx", "--json", "out.json", "-q"]) == 0
    assert seen == [["in.onnx"]]
    assert files(here) == ["in.onnx", "out.json", "out.onnx"]
