"""Every option of every command with values that are none, and every file argument with what is no such file, as the parser lists them.

A new option is walked by itself: what tells files from numbers is its metavar or its type.
"""

import argparse
import contextlib
import functools
import importlib.util
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import onnx
import pytest
from sketch import classifier, normal

from fastbn import arguments
from fastbn.cli import COMMANDS, main
from fastbn.deployment import stages

pytestmark = pytest.mark.skipif(os.name == "nt", reason="files and users of POSIX")

# Who owns nothing.
NOBODY = 65534

# Seconds that one command may take.
LONGEST = 30

# What an argument is called that names a file: one to read, or one to write.
READ, WRITTEN = {"IN", "A", "B", "PATH"}, {"OUT", "FILE"}

# The least that each command takes beside files, so that it is quick and prints errors alone.
LEAST = {
    "fold": ["-q", "--no-verify"],
    "deploy": ["-q", "--runs", "1", "--force"],
    "reestimate": ["-q", "--workers=0", "--data=data.npz", "--force"],
    "fold-all": ["-q", "--workers=1", "--out=out"],
    "verify": ["-q"],
    "bench": ["--runs", "1"],
    "bench-kernels": ["-q", "--seconds", "0.001"],
    "show-config": [],
}

# Values that no option takes but a name of a file.
VALUES = {
    "empty": "",
    "wrong": "no such thing",
    "negative": "-1",
    "negative and long": "-" + "9" * 400,
    "zero": "0",
    "huge": "9" * 30,
    "longer than int() takes": "9" * 5000,
    "a fraction": "2.5",
    "infinite": "1e400",
    "no number": "nan",
    "in other digits": "\u0663",
    "a NUL": "a\0b",
    "a line break": "a\nb\x1b[2J",
    "no UTF-8": os.fsdecode(b"\xff\xfe"),
}

# Names of no file, for reading as for writing.
NAMES_OF_NONE = ["in.onnx/", "new.onnx/", "in.onnx/below", "", "n" * 300, "nowhere/x", "a\0b", os.fsdecode(b"nowhere/\xff")]

# (command, option, value) that can be used, and why.
USABLE = {
    **{("deploy", "--seed", value): "a seed" for value in ("zero", "in other digits")},
    **{("deploy", "--max-drop", value): "a part from 0 to 1" for value in ("zero",)},
    **{("deploy", "--max-slowdown", value): "how much slower" for value in ("zero", "a fraction", "in other digits")},
    ("deploy", "--samples", "huge"): "as many as there are",
    **{("deploy", option, "in other digits"): "a number" for option in ("--runs", "--samples")},
    **{("reestimate", option, "in other digits"): "a number" for option in ("--batch", "--samples", "--threads")},
    **{("reestimate", option, "huge"): "as many as there are" for option in ("--batch", "--samples")},
    **{("reestimate", "--memory", value): "some bytes" for value in ("zero", "a fraction")},
    ("reestimate", "--workers", "zero"): "this process alone",
    ("deploy", "--runs", "huge"): "as many as a second takes",
    ("bench", "--runs", "in other digits"): "a number",
    **{("bench-kernels", "--axis", value): "an axis" for value in ("negative", "zero")},
    ("bench-kernels", "--seconds", "in other digits"): "a number",
    ("bench-kernels", "--seconds", "a fraction"): "a number",
}
if importlib.util.find_spec("distributed"):
    USABLE["reestimate", "--workers", "in other digits"] = "three of them"


@functools.cache
def commands():
    """Return command -> its parser."""
    return arguments.parsers(COMMANDS)[1]


def name_of(action):
    return action.option_strings[-1] if action.option_strings else action.metavar


def actions(kind):
    """Return (command, action) of every positional argument and option of a kind."""
    found = []
    for command, each in commands().items():
        for action in each._actions:
            takes_value = action.nargs != 0 or not action.option_strings
            is_file = action.metavar in READ | WRITTEN
            what = "a flag" if not takes_value else "a file" if is_file else "a value"
            if what == kind and not isinstance(action, argparse._HelpAction):
                found.append((command, action))
    return found


def named(found):
    return [pytest.param(command, action, id=f"{command} {name_of(action)}") for command, action in found]


def line_of(command, action=None, *values):
    """Return the arguments of a command on good files, one of them replaced; an option without values stands at the end."""
    places = []
    is_named = action is not None and action.dest == "named_output"
    for each in commands()[command]._actions:
        needed = each.nargs != "?" or (command == "deploy" and each.dest == "output" and not is_named)
        if not each.option_strings and (each is action or needed) and (each is not action or values):
            places.append(
                values[0] if each is action else "2,3" if each.metavar == "SHAPE" else "in.onnx" if each.metavar in READ else "out.onnx"
            )
    words = [command, *LEAST[command]]
    if action is None or not action.option_strings:
        return [*words, "--", *places]
    return [*words, *places, f"{name_of(action)}={values[0]}" if values else name_of(action)]


def state(folder):
    """Return what lies in a folder and below: names, kinds, modes, owners, links and bytes."""
    found = {}
    for path in [folder, *folder.rglob("*")]:
        status = path.lstat()
        what = os.readlink(path) if path.is_symlink() else path.read_bytes() if stat.S_ISREG(status.st_mode) else None
        found[os.fspath(path.relative_to(folder))] = (status.st_mode, status.st_uid, status.st_nlink, status.st_ino, what)
    return found


@contextlib.contextmanager
def in_time(line):
    def late(*_):
        raise TimeoutError(f"{line} takes too long")

    old = signal.signal(signal.SIGALRM, late)
    signal.alarm(LONGEST)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


@pytest.fixture(name="here")
def _here(monkeypatch):
    """A folder that every user reaches, as the working one, with in.onnx and samples for it."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(stages, "resident_mb", lambda paths: {})
    proto = classifier()
    (folder / "in.onnx").write_bytes(proto.SerializeToString())
    onnx.save(proto, folder / "big.onnx", save_as_external_data=True, location="big.data", size_threshold=0)
    np.savez(folder / "data.npz", x=normal(8, 3, 8, 8))
    yield folder
    os.chdir("/")
    shutil.rmtree(folder)


@pytest.fixture(name="refused")
def _refused(here, capfd):
    """Run the command, and return what is wrong with its refusal: exit code 2, one line of the house, nothing changed."""

    def run(line, user=contextlib.nullcontext):
        before = state(here)
        capfd.readouterr()
        with in_time(line), user():
            code = main(line)
        out, err = capfd.readouterr()
        faults = []
        if code != 2:
            faults.append(f"exit code {code}")
        if out or err.count("\n") != 1 or not err.startswith(("fastbn: Expected ", "fastbn: Cannot ")) or len(err) > 1000:
            faults.append(f"says {out!r} {err[:1000]!r}")
        if "Error" in err or "\x1b" in err or "/onnxruntime" in err:
            faults.append(f"says {err!r}")
        if state(here) != before:
            faults.append(f"left {sorted(set(state(here).items() ^ before.items()), key=str)}")
        return faults

    return run


def assert_none(faults):
    """Demand that nothing was wrong with any case."""
    wrong = [f"{case[:40]!r}: {'; '.join(each)[:300]}" for case, each in faults.items() if each]
    assert wrong == [], "\n".join(wrong)


@pytest.mark.parametrize(("command", "action"), named(actions("a value")))
def test_values_that_are_none(command, action, here, refused):
    data = ["--data", "data.npz"] if command == "deploy" else []
    faults = {}
    for kind, value in VALUES.items():
        if (command, name_of(action), kind) not in USABLE:
            faults[kind] = refused([*line_of(command, action, value), *data])
    faults["missing"] = refused([*data, *line_of(command, action)])
    assert_none(faults)


@pytest.mark.parametrize(("command", "name", "kind"), USABLE)
def test_values_that_are_usable(command, name, kind, here, capfd):
    (action,) = (each for of, each in actions("a value") if of == command and name_of(each) == name)
    data = ["--data", "data.npz"] if command == "deploy" else []
    with in_time(command):
        assert main([*line_of(command, action, VALUES[kind]), *data]) in (0, 5)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(("command", "action"), named(actions("a flag")))
def test_flags_take_no_value(command, action, here, refused):
    command, *rest = line_of(command)
    values = [f"{option}=x" if option.startswith("--") else f"{option}1" for option in action.option_strings]
    assert_none({value: refused([command, value, *rest]) for value in values})


def odd_files(folder):
    """Make files of every kind that is none; return their names, and those of no file."""
    (folder / "a folder").mkdir()
    (folder / "dangling").symlink_to("nowhere/at all")
    (folder / "loop").symlink_to("loop")
    (folder / "to a folder").symlink_to("a folder")
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("socket")
    with contextlib.suppress(OSError):
        os.mknod("disk", 0o666 | stat.S_IFBLK, os.makedev(7, 250))
    made = sorted(path.name for path in folder.iterdir() if path.suffix not in (".onnx", ".data", ".npz"))
    return [*made, *NAMES_OF_NONE]


@pytest.mark.parametrize(("command", "action"), named(actions("a file")))
def test_files_that_are_none(command, action, here, refused):
    names = odd_files(here)
    if action.metavar in READ:
        names += ["nowhere", "/dev/null", "/dev/zero", os.fsdecode(b"\xff")]
    else:
        names.remove("dangling")  # a link to no file is replaced like one to a file
    faults = {name: refused(line_of(command, action, name)) for name in names}
    faults["missing"] = refused(line_of(command, action)) if action.option_strings else []
    assert_none(faults)


@pytest.mark.parametrize(("command", "action"), named(actions("a file")))
def test_pipes(command, action, here, refused):
    """A model is read from a pipe and everything is written through one; samples are in files."""
    if action.metavar == "PATH":
        for name in ("fifo.npz", "fifo.npy", "fifo.pb"):
            os.mkfifo(name)
            assert_none({name: refused(line_of(command, action, name))})
        return
    os.mkfifo("fifo")
    model, found = (here / "in.onnx").read_bytes(), []

    def peer():
        found.append((here / "fifo").write_bytes(model) if action.metavar in READ else (here / "fifo").read_bytes())

    thread = threading.Thread(target=peer, daemon=True)
    thread.start()
    with in_time(command):
        assert main(line_of(command, action, "fifo")) == 0
        thread.join()
    assert found[0]
    assert stat.S_ISFIFO(os.stat("fifo").st_mode)
    assert (here / "in.onnx").read_bytes() == model


@pytest.mark.parametrize(("command", "action"), named(each for each in actions("a file") if each[1].metavar in WRITTEN))
def test_devices_and_links_that_are_written(command, action, here, refused):
    (here / "dangling").symlink_to("nowhere")
    for name in ("/dev/null", "dangling", os.fsdecode(b"\xff")):
        with in_time(command):
            assert main(line_of(command, action, name)) == 0
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert stat.S_ISREG(os.lstat("dangling").st_mode)
    assert not os.path.lexists("nowhere")
    if os.path.exists("/dev/full") and command not in ("bench", "bench-kernels", "show-config"):  # whose table is printed by then
        for path in here.glob("*out*"):
            path.unlink()
        assert_none({"/dev/full": refused(line_of(command, action, "/dev/full"))})


@contextlib.contextmanager
def as_nobody():
    """Be a user to whom permissions apply."""
    if os.geteuid() != 0:
        yield
        return
    os.setresuid(NOBODY, NOBODY, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user, and look at what that one may not read")
@pytest.mark.parametrize(("command", "action"), named(actions("a file")))
def test_what_is_not_permitted(command, action, here, refused):
    """A file that may not be read, a data file that may not, folders that may not be entered or written to."""
    assert main(line_of(command)) == 0  # everything is imported
    (here / "out.onnx").unlink(missing_ok=True)
    (here / "in.folded.onnx").unlink(missing_ok=True)
    for name in ("in.onnx", "data.npz"):
        shutil.copy(name, f"secret.{name}")
        os.chmod(f"secret.{name}", 0)
    for mode in (0o444, 0o555):
        folder = here / f"{mode:o}"
        folder.mkdir()
        shutil.copy("in.onnx", folder)
        folder.chmod(mode)
    os.chmod("big.data", 0)
    names = ["big.onnx", "secret.in.onnx", "444/in.onnx"] if action.metavar in READ else ["444/x", "555/x", "555/in.onnx"]
    if action.metavar == "PATH":
        names = ["secret.data.npz", "444/in.onnx"]
    assert_none({name: refused(line_of(command, action, name), as_nobody) for name in names})


def test_through_the_shell(here, environment):
    """The same of processes: no warning and no traceback of the interpreter either."""
    lines = [
        ["fold", "--no-such-option"],
        ["fold", os.fsdecode(b"\xff"), "out.onnx"],
        ["verify", "in.onnx", "/dev/null"],
        ["deploy", "in.onnx", "out.onnx", "-q", "--data", ""],
        ["fold", "in.onnx", "a" * 5000],
    ]
    runs = [
        subprocess.Popen([sys.executable, "-m", "fastbn", *line], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for line in lines
    ]
    faults = {}
    for line, run in zip(lines, runs, strict=True):
        out, err = run.communicate(timeout=60)
        err = err.decode(errors="replace")
        good = (run.returncode, out, err.count("\n")) == (2, b"", 1) and err.startswith(("fastbn: Expected ", "fastbn: Cannot "))
        faults[" ".join(line)] = [] if good else [f"exit code {run.returncode}, says {out!r} {err!r}"]
    assert_none(faults)
