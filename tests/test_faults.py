"""Every call of a save fails once, or brings an interrupt: the old file or the new one is there, whole, and the command says which.

tools/faults.py does the same to real calls of the system, and tests/killed.py kills.
"""

import contextlib
import errno
import functools
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import make_models
import onnx
import pytest
from shell import files
from sketch import conv_bn

import fastbn
from fastbn import terminal
from fastbn.cli import main
from fastbn.graph import runtime
from fastbn.graph.rewrite import writer
from fastbn.interrupts import interrupts_deferred, interrupts_ignored, stoppable

CALLS = ("open", "mkdir", "rmdir", "link", "unlink", "replace", "fsync", "chmod", "pwrite", "close")
COMMAND = ["fold", "large.onnx", "--in-place", "-q", "--no-verify", "--json", "report.json"]


@pytest.fixture(name="here")
def _here(tmp_path, monkeypatch):
    """A working folder with large.onnx, a model whose weights stay in a data file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(writer, "LARGEST_INLINE", 0)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # the disk is slow, and a process that ends loses nothing
    make_models.large(tmp_path, layers=1, channels=8)
    return tmp_path


def weights():
    """Return the weights of large.onnx; what is no whole model fails."""
    return b"".join(tensor.raw_data for tensor in onnx.load("large.onnx").graph.initializer)


@contextlib.contextmanager
def at_call(point, fault):
    """Call `fault` before call number `point` of those that change files."""
    count = itertools.count()

    def counted(call):
        @functools.wraps(call)
        def wrapped(*arguments, **options):
            if next(count) == point:
                fault()
            return call(*arguments, **options)

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, counted(getattr(os, name)))
        patch.setattr(Path, "write_bytes", counted(Path.write_bytes))
        yield count


def runs(here, fault, codes, capfd):
    """Run the command with a fault at each call in turn; yield (exit code, stderr, whether the new model stands)."""
    before = {path.name: path.read_bytes() for path in here.iterdir()}
    old = weights()
    assert main(COMMAND) == 0
    new = weights()
    for point in itertools.count():
        for path in here.iterdir():
            path.unlink()
        for name, data in before.items():
            (here / name).write_bytes(data)
        capfd.readouterr()
        with at_call(point, fault) as count:
            code = main(COMMAND)
            is_over = next(count) <= point
        if is_over:
            assert point > 25
            return
        out, err = capfd.readouterr()
        found = weights()
        assert code in codes, (point, code, err)
        assert found in (old, new), point
        assert (out, err.count("\n")) == ("", int(code != 0)), (point, err)
        if code:
            assert (found == new) == err.endswith("large.onnx is written\n"), (point, err)
        yield code, err
        if code == 130:
            assert not list(here.glob(".fastbn-*")), point
        assert main(COMMAND) == 0
        assert weights() == new
        assert len(files(here)) == 3, "a model, its data, the report: a later run removes what was left"


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_interrupts(name, here, capfd):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    for code, err in runs(here, lambda: os.kill(os.getpid(), number), (130,), capfd):
        assert (code, err[: err.index(",")]) == (130, "fastbn: interrupted")
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("name", ["ENOSPC", "EIO", "EROFS", "EDQUOT"])
def test_errors_of_the_system(name, here, capfd):
    def fail():
        raise OSError(getattr(errno, name), os.strerror(getattr(errno, name)))

    said = set()
    for code, err in runs(here, fail, (0, 2), capfd):
        said.add(code)
        if code:
            assert os.strerror(getattr(errno, name)).lower() in err, err
            assert err.startswith("fastbn: Cannot use '"), err
    assert said == {0, 2}


def test_a_journal_that_cannot_be_read_is_read_by_the_next_run(here, monkeypatch):
    load = json.load
    errors = iter([OSError(errno.EIO, os.strerror(errno.EIO))])

    def failing(file):
        for error in errors:
            raise error
        return load(file)

    monkeypatch.setattr(json, "load", failing)
    assert main(COMMAND) == 0
    assert (here / "large.onnx.data").exists()
    assert list(here.glob(".fastbn-*"))
    assert main(COMMAND) == 0
    assert len(files(here)) == 3


def test_an_interrupt_while_python_loads(environment):
    """NumPy would say that it is broken, and fastbn that it is not built."""
    code = """if True:
        import importlib.abc, os, signal, sys

        class Interrupting(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path, target=None):
                if name in ("numpy._core.multiarray", "onnxruntime.capi._pybind_state"):
                    os.kill(os.getpid(), signal.SIGINT)

        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.meta_path.insert(0, Interrupting())
        try:
            import fastbn
        except KeyboardInterrupt:
            from fastbn.graph import runtime
        try:
            runtime._runtime()
        except KeyboardInterrupt:
            print("twice")
    """
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "twice\n", "")


def test_a_second_interrupt_is_too_late_to_matter(here, capfd, monkeypatch):
    """Between the two, the files are removed; while the last words are said, it is ignored."""
    emit = terminal.emit

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        emit(*arguments)

    def stop(*_, **__):
        with interrupts_deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the first of them is an interrupt")

    monkeypatch.setattr(terminal, "emit", interrupted)
    monkeypatch.setattr("fastbn.graph.job.fold", stop)
    assert main(COMMAND) == 130
    assert capfd.readouterr().err == "fastbn: interrupted, nothing written\n"


def test_what_is_ignored_stays_ignored():
    """nohup ignores SIGHUP; what a program handles itself is its own affair."""
    handled = []
    for number, handler in ((signal.SIGHUP, signal.SIG_IGN), (signal.SIGTERM, lambda *_: handled.append(1))):
        old = signal.signal(number, handler)
        try:
            with stoppable(), interrupts_ignored(), interrupts_deferred():
                os.kill(os.getpid(), number)
            assert signal.getsignal(number) is handler
        finally:
            signal.signal(number, old)
    assert handled == []  # it is not said again what came in the last words


def test_threads_leave_signals_alone(here):
    codes = []
    thread = threading.Thread(target=lambda: codes.append(main(COMMAND)))
    thread.start()
    thread.join()
    assert codes == [0]


CHANGES = {
    "another size": lambda path: path.write_bytes(path.read_bytes() + b"more"),
    "other bytes": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "another file": lambda path: (path.rename("old"), path.write_bytes(Path("old").read_bytes()))[0],
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("command", ["fold", "verify", "bench", "deploy"])
def test_a_data_file_that_changes_meanwhile(command, change, here, capfd, monkeypatch):
    """What was read and what was verified are then two things."""
    data = here / "large.onnx.data"
    run = runtime.session

    def changing(*arguments, **options):
        made = run(*arguments, **options)
        if data.exists() and not changes:
            changes.append(CHANGES[change](data))
        return made

    changes = []
    for module in ("graph.runtime", "graph.timing", "deployment.stages", "deployment.quantized_stage"):
        monkeypatch.setattr(f"fastbn.{module}.session", changing)
    monkeypatch.setattr("fastbn.deployment.stages.resident_mb", lambda paths: {})
    onnx.save(conv_bn(), "other.onnx")
    line = {
        "fold": ["large.onnx", "out.onnx", "-q"],
        "verify": ["large.onnx", "large.onnx", "-q"],
        "bench": ["large.onnx", "large.onnx", "--runs", "1"],
        "deploy": ["large.onnx", "out.onnx", "-q", "--runs", "1"],
    }[command]
    assert main([command, *line]) == 2
    assert changes
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1), err
    assert "large.onnx.data" in err
    assert err.startswith("fastbn: Cannot use ") or change == "gone"
    assert not (here / "out.onnx").exists()


def cut_meanwhile(folder, line, environment):
    """Fold large.onnx in a process, and cut its data file when the copy of it has begun; return (exit code, stderr)."""
    make_models.large(folder, layers=8, channels=1024)
    (folder / "out.onnx").write_bytes(b"")
    with subprocess.Popen([sys.executable, "-m", "fastbn", *line], env=environment, stderr=subprocess.PIPE) as run:
        while run.poll() is None and not list(folder.glob(".fastbn-*/data0")):
            time.sleep(0.001)
        os.truncate("large.onnx.data", 4096)
        return run.wait(), run.stderr.read()


@pytest.mark.skipif(sys.platform != "linux", reason="what reads behind the end of a mapped file differs")
@pytest.mark.parametrize("limits", [[], ["--limits", "time=100"]], ids=["", "limits"])
def test_a_data_file_that_becomes_shorter_while_it_is_mapped(limits, here, environment):
    """The system ends the process, unless that is told before: nothing has taken its place, and the next run removes what is left. With
    limits, that process is another one."""
    before = [*files(here), "out.onnx"]
    for _ in range(5):  # a run may be faster than the cut
        code, err = cut_meanwhile(here, ["fold", "large.onnx", "out.onnx", "-q", *limits], environment)
        if code:
            break
        for path in here.glob("out.onnx*"):
            path.unlink()
    assert code in ((2,) if limits else (2, -signal.SIGBUS))
    assert err.count(b"\n") == (code == 2), err
    assert (here / "out.onnx").read_bytes() == b""
    make_models.large(here, layers=1, channels=8)
    assert main(["fold", "large.onnx", "out.onnx", "-q"]) == 0
    assert set(files(here)) - set(before) == {"out.onnx.data"}


@pytest.mark.parametrize(
    ("command", "name"), [("fold", "EIO"), ("verify", "EMFILE"), ("bench", "EDQUOT"), ("deploy", "ENOSPC"), ("deploy", "EROFS")]
)
def test_errors_of_the_system_for_files_that_onnxruntime_opens(command, name, here, capfd, monkeypatch):
    """It fails to open the model or a data file, in each session in turn."""
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    monkeypatch.setattr("fastbn.deployment.stages.resident_mb", lambda paths: {})
    monkeypatch.setattr("fastbn.graph.timing.WARM_UP", 0)
    make, number = onnxruntime.InferenceSession, getattr(errno, name)
    line = {
        "fold": ["large.onnx", "out.onnx", "-q"],
        "verify": ["large.onnx", "large.onnx", "-q"],
        "bench": ["large.onnx", "large.onnx", "--runs", "1", "-q"],
        "deploy": ["large.onnx", "out.onnx", "--runs", "1", "-q"],
    }[command]
    for point in itertools.count():
        calls = itertools.count()

        def failing(model, *arguments, calls=calls, point=point, **options):
            if next(calls) != point:
                return make(model, *arguments, **options)
            if isinstance(model, str):
                raise state.Fail(f"[ONNXRuntimeError] : 1 : FAIL : Load model from {model} failed:system error number {number}")
            raise RuntimeError(f"SystemError : {number}")

        monkeypatch.setattr(onnxruntime, "InferenceSession", failing)
        code = main([command, *line])
        out, err = capfd.readouterr()
        if next(calls) <= point:
            break
        assert (code, out) == (2, ""), (point, err)
        assert err.startswith("fastbn: Cannot use "), err
        assert err.endswith(f": {os.strerror(number).lower()}\n"), err
        assert not (here / "out.onnx").exists()
    assert code == 0
    assert point > 1


def test_what_onnxruntime_says_of_errors_of_the_system(here, environment):
    """No file can be opened: neither the model nor its data file."""
    code = """if True:
        import os, resource
        from fastbn.errors import StorageError
        from fastbn.graph import runtime

        with open("large.onnx", "rb") as file:
            model = file.read()
        runtime.session(model, os.getcwd())
        free = os.open("large.onnx", os.O_RDONLY)
        os.close(free)
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, before[1]))
        for each in ("large.onnx", model):
            try:
                runtime.session(each, os.getcwd())
            except StorageError as error:
                print(str(error).replace(os.getcwd(), "HERE"))
        resource.setrlimit(resource.RLIMIT_NOFILE, before)  # coverage.py writes a file at the end
    """
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    lines = ["Cannot use 'large.onnx': too many open files", "Cannot use a data file in 'HERE': too many open files"]
    assert done.stdout.splitlines() == lines


def test_a_model_that_onnxruntime_cannot_read_to_its_end(here, monkeypatch):
    """It calls that a file that is no model."""
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    make, faults = onnxruntime.InferenceSession, []

    def failing(*arguments, **options):
        for fault in faults[:1]:
            del faults[0]
            raise fault
        return make(*arguments, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", failing)
    faults[:] = [state.InvalidProtobuf("Protobuf parsing failed.")]
    assert runtime.session("large.onnx").get_inputs()[0].name == "x", "a second try has read it"
    faults[:] = [state.InvalidProtobuf("Protobuf parsing failed.")] * 2
    with pytest.raises(state.InvalidProtobuf):
        runtime.session("large.onnx")
    with pytest.raises(fastbn.StorageError, match=r"^Cannot use '.*': is a directory$"):
        runtime.session(str(here))


def test_all_exceptions_of_onnxruntime_are_known():
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    assert {state.EngineError, state.NoSuchFile, state.InvalidGraph} <= set(runtime.runtime_errors())


def test_onnxruntime_says_nothing_of_its_own_in_the_command(here, monkeypatch):
    import onnxruntime

    levels = []
    monkeypatch.setattr(onnxruntime, "set_default_logger_severity", levels.append)
    monkeypatch.setattr(runtime, "_is_log_silent", False)
    assert main(["verify", "large.onnx", "large.onnx", "-q"]) == 0
    assert set(levels) == {4}
    monkeypatch.setattr(runtime, "_is_log_silent", False)
    levels.clear()
    runtime.session(conv_bn().SerializeToString())
    assert levels == [], "a program may want to read it"


def test_onnxruntime_keeps_no_files_of_its_own_in_the_command(here, environment, tmp_path_factory):
    """Its telemetry would, in the home and in the temporary folder."""
    home = tmp_path_factory.mktemp("home")
    environment = {**environment, **dict.fromkeys(("HOME", "TMPDIR", "XDG_CACHE_HOME"), str(home))}
    environment.pop("ORT_DISABLE_TELEMETRY", None)
    line = [sys.executable, "-m", "fastbn", "fold", "large.onnx", "out.onnx", "-q"]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(home.iterdir()) == []


@pytest.mark.parametrize("module", ["numpy", "shlex"])
@pytest.mark.parametrize("how", ["module", "script"])
def test_an_interrupt_while_the_command_is_loaded(module, how, tmp_path, environment):
    """NumPy is loaded by the package, shlex by the command."""
    (tmp_path / f"{module}.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    script = tmp_path / "fastbn"
    script.write_text("from fastbn.__main__ import run\nrun()\n")
    path = os.pathsep.join([str(tmp_path), environment["PYTHONPATH"]])
    command = [sys.executable, *(["-m", "fastbn"] if how == "module" else [str(script)]), "show-config"]
    done = subprocess.run(command, env={**environment, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")
