"""Where files go: each is the old one or the new one as a whole, devices and pipes are written into, leftovers of killed runs removed."""

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import make_models
import onnx
import pytest
from shell import fails, files, quick
from sketch import assert_same, conv_bn, normal, ops

import fastbn
from fastbn.cli import main
from fastbn.graph.rewrite import destination, writer
from fastbn.graph.rewrite.workdir import Workdir

ROOT = os.geteuid() == 0
needs_root = pytest.mark.skipif(not ROOT, reason="only root may give files away and make devices")


@pytest.fixture(name="here")
def _here(tmp_path, monkeypatch):
    """A working folder with in.onnx."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.onnx").write_bytes(conv_bn().SerializeToString())
    return tmp_path


@pytest.fixture(name="external")
def _external(here, monkeypatch):
    """The same with a model whose weights stay in a data file: large.onnx, large.onnx.data."""
    monkeypatch.setattr(writer, "LARGEST_INLINE", 0)
    make_models.large(here, layers=1, channels=8)


@pytest.fixture(autouse=True)
def _no_child_that_loads(monkeypatch):
    """Skip the processes in which a deployment measures the memory of its stages."""
    quick(monkeypatch)


def test_a_kill_at_any_point_leaves_the_old_model_or_the_new_one(tmp_path, environment, request):
    paths = os.pathsep.join([environment["PYTHONPATH"], *(str(request.config.rootpath / name) for name in ("tests", "tools"))])
    script = request.config.rootpath / "tests" / "killed.py"
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env={**environment, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    for name, (points, faults, states) in json.loads(done.stdout).items():
        assert faults == [], name
        assert states == ["new", "old"], name
        assert points > 10, name


@pytest.mark.usefixtures("external")
def test_a_second_run_leaves_no_data_of_the_first(here, capsys):
    for data in ("out.onnx.data", "out.onnx.1.data", "out.onnx.data"):
        assert main(["fold", "large.onnx", "out.onnx", "-q"]) == 0
        assert files(here) == ["in.onnx", "large.onnx", "large.onnx.data", "out.onnx", data]
        assert_same(onnx.load("large.onnx"), onnx.load("out.onnx"), {"x": normal(1, 8, 2, 2)})


@pytest.mark.usefixtures("external")
@pytest.mark.parametrize("who", ["another model", "a hard link", "a link to the model", "a link to the data", "nobody"])
def test_data_that_others_read_stays(who, here):
    fastbn.fold("large.onnx").save("out.onnx")
    if who == "another model":
        (here / "copy.onnx.bak").write_bytes((here / "out.onnx").read_bytes())
    elif who == "a hard link":
        os.link("out.onnx", "other")
    elif who == "a link to the model":
        (here / "out.onnx").rename("real")
        (here / "out.onnx").symlink_to("real")
    elif who == "a link to the data":
        (here / "out.onnx.data").rename("real.data")
        (here / "out.onnx.data").symlink_to("real.data")
    fastbn.fold("large.onnx").save("out.onnx")
    assert os.path.lexists("out.onnx.data") == (who != "nobody")
    assert (here / "out.onnx.1.data").exists()


@pytest.mark.usefixtures("external")
def test_data_that_is_not_the_models_own_is_never_touched(here):
    (here / "out.onnx.data").write_text("somebody's")
    fastbn.fold("large.onnx").save("out.onnx")
    assert (here / "out.onnx.data").read_text() == "somebody's"
    assert files(here)[-2:] == ["out.onnx.1.data", "out.onnx.data"]


@pytest.mark.usefixtures("external")
@pytest.mark.parametrize("links", [True, False])
def test_a_name_that_is_taken_meanwhile(links, here, monkeypatch):
    """Another run may take the name of a data file between its choice and its making; a file system may have no hard links."""
    result = fastbn.fold("large.onnx")
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError(1, "Operation not permitted")))
    with pytest.raises(fastbn.StorageError, match="file exists"), result.prepared("out.onnx"):
        (here / "out.onnx.data").write_text("somebody's")
    assert (here / "out.onnx.data").read_text() == "somebody's"
    assert not (here / "out.onnx").exists()
    result.save("out.onnx")
    assert_same(onnx.load("large.onnx"), onnx.load("out.onnx"), {"x": normal(1, 8, 2, 2)})
    assert not list(here.glob(".fastbn-*"))


def test_leftovers_are_removed_and_what_lives_is_not(here):
    dead = here / ".fastbn-0123456789abcdef"
    (dead / "below").mkdir(parents=True)
    (dead / "file").write_text("half")
    others = [".fastbn-0123456789abcdef0", ".fastbn-notes", "fastbn-0123456789abcdef"]
    for name in others:
        (here / name).mkdir()
    (here / ".fastbn-00000000000000ff").symlink_to(others[0])
    (here / ".fastbn-00000000000000fe").write_text("a file")
    with Workdir(here) as alive:
        (alive.path / "file").write_text("at work")
        fastbn.fold("in.onnx").save("out.onnx")
        assert (alive.path / "file").read_text() == "at work"
        assert not dead.exists()
    assert files(here) == sorted([*others, ".fastbn-00000000000000fe", ".fastbn-00000000000000ff", "in.onnx", "out.onnx"])


def test_the_workdir_of_another_process_is_left_alone(here, environment):
    code = "from fastbn.graph.rewrite.workdir import Workdir; workdir = Workdir(); print(workdir.path, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], env={**environment, "TMPDIR": str(here)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        workdir = Path(process.stdout.readline().strip())
        assert workdir.parent == here
        Workdir(here).close()
        assert workdir.exists()
        process.send_signal(signal.SIGKILL)
    Workdir(here).close()
    assert not workdir.exists()


@needs_root
def test_leftovers_of_another_user_stay(here):
    workdir = here / ".fastbn-0123456789abcdef"
    workdir.mkdir()
    os.chown(workdir, 1234, 1234)
    Workdir(here).close()
    assert workdir.exists()


@needs_root
@pytest.mark.usefixtures("external")
def test_in_place_as_root_keeps_owner_group_and_mode(here):
    for name in ("large.onnx", "in.onnx"):
        os.chown(name, 1234, 5678)
        os.chmod(name, 0o640)
        assert main(["fold", name, "--in-place", "-q"]) == 0
        for path in here.glob(f"{name}*"):
            found = path.stat()
            if path.name == "large.onnx.data":  # what it had before, nobody's but the test's
                continue
            assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (1234, 5678, 0o640), path
    assert (here / "large.onnx.1.data").exists() or (here / "large.onnx.data").exists()


def test_an_owner_that_may_not_be_kept_is_no_error(here, monkeypatch):
    asked = []

    def chown(path, user, group):
        asked.append((user, group))
        raise PermissionError(1, "Operation not permitted")

    stat_of = os.stat

    def stranger(path, *rest, **options):
        found = stat_of(path, *rest, **options)
        if str(path).endswith("in.onnx"):
            values = list(found)
            values[4:6] = 1234, 5678
            return os.stat_result(values)
        return found

    monkeypatch.setattr(os, "chown", chown)
    monkeypatch.setattr(os, "stat", stranger)
    (here / "in.onnx").chmod(0o604)
    fastbn.fold("in.onnx").save("in.onnx")
    assert asked == [(1234, 5678), (-1, 5678)]
    assert ops(onnx.load("in.onnx")) == "Conv"
    assert stat.S_IMODE((here / "in.onnx").stat().st_mode) == 0o604


@pytest.mark.parametrize("how", ["out", "in place"])
@pytest.mark.parametrize("kind", ["hard", "symbolic"])
def test_the_name_gets_a_new_file_and_others_keep_the_old(kind, how, here):
    data = (here / "in.onnx").read_bytes()
    (here / "other.onnx").write_bytes(data)
    if kind == "hard":
        os.link("other.onnx", "out.onnx")
    else:
        (here / "out.onnx").symlink_to("other.onnx")
    assert main(["fold", "in.onnx", "out.onnx", "-q"] if how == "out" else ["fold", "out.onnx", "--in-place", "-q"]) == 0
    assert (here / "other.onnx").read_bytes() == data
    assert not (here / "out.onnx").is_symlink()
    assert ops(onnx.load("out.onnx")) == "Conv"


@pytest.mark.usefixtures("external")
@pytest.mark.parametrize("length", [245, 250, 255])
@pytest.mark.parametrize("model", ["in.onnx", "large.onnx"])
def test_long_names(length, model, here, capsys):
    for letter in ("n", "\u00e4"):
        stem = letter * ((length - 5) // len(letter.encode()))
        name = "n" * (length - 5 - len(stem.encode())) + stem + ".onnx"
        assert len(name.encode()) == length
        assert main(["fold", model, name, "-q"]) == 0
        assert main(["fold", model, name, "-q"]) == 0
        assert fastbn.verify(model, name).ok
        assert main(["fold", name, "--in-place", "-q", "--json", "j" * length]) == 0
    assert fails(capsys, "fold", model, "n" * 256).endswith("n': file name too long\n")


@contextlib.contextmanager
def reading(path):
    """Read a FIFO while the block runs; yield a list that holds its bytes afterwards."""
    found = []
    thread = threading.Thread(target=lambda: found.append(Path(path).read_bytes()), daemon=True)
    thread.start()
    yield found
    thread.join(60)
    assert found, "nobody wrote"


@pytest.mark.usefixtures("external")
@pytest.mark.parametrize("model", ["in.onnx", "large.onnx"])
def test_a_pipe_is_written_through(model, here):
    os.mkfifo("fifo")
    (here / "link").symlink_to("fifo")
    for name in ("fifo", "link"):
        with reading("fifo") as found:
            assert main(["fold", model, name, "-q"]) == 0
        assert stat.S_ISFIFO((here / "fifo").stat().st_mode)
        assert (here / "link").is_symlink()
        (here / "through.onnx").write_bytes(found[0])
        assert fastbn.verify(model, "through.onnx").ok
    with reading("fifo") as found:
        assert main(["fold", model, "out.onnx", "-q", "--json", "fifo"]) == 0
    assert json.loads(found[0])["written"][0] == "out.onnx"
    with reading("fifo") as found:
        assert main(["verify", model, "out.onnx", "-q", "--json", "fifo"]) == 0
    assert json.loads(found[0])["parity"]["status"] == "ok"


def test_a_deployment_through_pipes(here):
    pytest.importorskip("jinja2", reason="the HTML report needs jinja2")
    for name in ("model", "page"):
        os.mkfifo(name)
    with reading("model") as model, reading("page") as page:
        assert main(["deploy", "in.onnx", "model", "--report", "page", "--runs", "1", "-q"]) == 0
    assert ops(onnx.ModelProto.FromString(model[0])) == "Conv"
    assert page[0].startswith(b"<!doctype html>")
    assert files(here) == ["in.onnx", "model", "page"]
    (here / "through").symlink_to(os.devnull)
    assert main(["deploy", "in.onnx", "through", "--report", os.devnull, "--json", os.devnull, "--runs", "1", "-q"]) == 0
    assert (here / "through").is_symlink()


def test_a_reader_that_leaves_is_said(here, capsys):
    os.mkfifo("fifo")
    reader = os.open("fifo", os.O_RDONLY | os.O_NONBLOCK)
    threading.Timer(0.3, os.close, [reader]).start()
    proto = conv_bn()
    proto.doc_string = "x" * (1 << 20)
    (here / "in.onnx").write_bytes(proto.SerializeToString())
    assert main(["fold", "in.onnx", "fifo", "-q", "--no-verify"]) == 2
    assert capsys.readouterr().err == "fastbn: Cannot use 'fifo': broken pipe\n"


@needs_root
@pytest.mark.parametrize("option", ["out", "--json", "deploy", "--report"])
def test_devices_stay_devices(option, here, capsys):
    with contextlib.suppress(PermissionError):
        os.mknod("null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        os.mknod("disk", 0o666 | stat.S_IFBLK, os.makedev(7, 250))
    if not os.path.lexists("disk"):
        pytest.skip("no devices may be made here")
    try:
        (here / "probe").write_bytes((here / "null").read_bytes())
    except OSError:
        pytest.skip("devices do not work here")
    (here / "probe").unlink()
    arguments = {
        "out": ["fold", "in.onnx", "{}"],
        "--json": ["fold", "in.onnx", "out.onnx", "--json", "{}"],
        "deploy": ["deploy", "in.onnx", "{}", "--runs", "1"],
        "--report": ["deploy", "in.onnx", "out.onnx", "--runs", "1", "--force", "--report", "{}"],
    }[option]
    assert main([*(each.format("null") for each in arguments), "-q"]) == 0
    assert stat.S_ISCHR((here / "null").stat().st_mode)
    (here / "out.onnx").unlink(missing_ok=True)
    assert "got a disk - at `disk`" in fails(capsys, *(each.format("disk") for each in arguments))


@pytest.mark.parametrize("kind", ["socket", "folder"])
@pytest.mark.parametrize(
    "arguments",
    [
        ["fold", "in.onnx", "it"],
        ["fold", "in.onnx", "out.onnx", "--json", "it"],
        ["verify", "in.onnx", "in.onnx", "--json", "it"],
        ["bench", "in.onnx", "--json", "it"],
        ["deploy", "in.onnx", "it", "--force"],
        ["deploy", "in.onnx", "out.onnx", "--report", "it", "--force"],
    ],
    ids=" ".join,
)
def test_what_is_no_file_is_refused(arguments, kind, here, capsys):
    if kind == "folder":
        (here / "it").mkdir()
    with socket.socket(socket.AF_UNIX) as made:
        if kind == "socket":
            made.bind("it")
        line = fails(capsys, *arguments)
    assert f"got a {kind} - at `it`" in line


def test_names_that_mean_open_streams(here, environment):
    """/dev/stdout means the same as -, whatever it leads to; other open streams are written from their present position."""
    model = fastbn.fold("in.onnx").to_bytes()
    for name in ("/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "-"):
        with open("redirected", "wb") as file:
            done = subprocess.run(
                [sys.executable, "-m", "fastbn", "fold", "in.onnx", name], env=environment, stdout=file, stderr=subprocess.PIPE
            )
        assert done.returncode == 0
        assert (here / "redirected").read_bytes() == model
        assert b"BatchNormalization 1 -> 0" in done.stderr
    assert Path("/dev/stdout").is_symlink()
    with open("third", "wb") as file:
        file.write(b"before")
        file.flush()
        name = f"/dev/fd/{file.fileno()}"
        assert main(["fold", "in.onnx", name, "-q"]) == 0
    assert (here / "third").read_bytes() == b"before" + model
    with open("third", "rb") as file, pytest.raises(fastbn.StorageError, match="open for writing"):
        destination.check_destination(f"/dev/fd/{file.fileno()}")
    with pytest.raises(fastbn.StorageError, match="bad file descriptor"):
        destination.check_destination("/dev/fd/987")


@pytest.mark.parametrize("name", ["-", "/dev/stdin", "fifo"])
def test_a_model_through_a_pipe_is_read_once(name, here, environment):
    os.mkfifo("fifo")
    data = (here / "in.onnx").read_bytes()
    for command in (
        ["fold", name, "out.onnx"],
        ["verify", name, "in.onnx"],
        ["bench", name, "--runs", "1"],
        ["deploy", name, "d.onnx", "--runs", "1"],
    ):
        given = None
        if name == "fifo":
            writer = threading.Thread(target=(here / "fifo").write_bytes, args=[data])
            writer.start()
        else:
            given = data
        done = subprocess.run([sys.executable, "-m", "fastbn", *command], env=environment, input=given, capture_output=True, timeout=120)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["/dev/zero", "/dev/null"])
def test_a_device_is_no_model(name, here, capsys):
    assert "Expected a model file or a pipe, got a device or a socket" in fails(capsys, "fold", name, "out.onnx")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("arguments", [["--json", "/dev/full"], ["--report", "/dev/full"]], ids=" ".join)
def test_a_report_that_cannot_be_written_leaves_no_model(arguments, here, capsys):
    command = "deploy" if "--report" in arguments else "fold"
    assert main([command, "in.onnx", "out.onnx", *arguments, "-q"]) == 2
    assert "Cannot use '/dev/full': no space left on device\n" in capsys.readouterr().err
    assert files(here) == ["in.onnx"]


@pytest.mark.usefixtures("external")
@pytest.mark.parametrize("moment", ["os.link", "os.replace"])
def test_an_interrupt_while_files_take_their_places(moment, here, capsys, monkeypatch):
    """The interrupt waits until all files are in place, and the message says that they are."""
    real = getattr(os, moment.split(".")[1])

    def interrupting(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        real(*arguments)

    monkeypatch.setattr(moment, interrupting)
    assert main(["fold", "large.onnx", "out.onnx", "-q", "--no-verify"]) == 130
    assert capsys.readouterr().err == "fastbn: interrupted, out.onnx is written\n"
    assert files(here) == ["in.onnx", "large.onnx", "large.onnx.data", "out.onnx", "out.onnx.data"]
    assert fastbn.verify("large.onnx", "out.onnx").ok


def test_a_rename_that_fails(here, capsys, monkeypatch):
    """Only this can fail after the table is printed."""

    def refused(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.replace", refused)
    assert main(["fold", "in.onnx", "out.onnx", "--no-verify", "--json", "report.json"]) == 2
    out, err = capsys.readouterr()
    assert err == "fastbn: Cannot use 'out.onnx': operation not permitted\n"
    assert "wrote" not in out
    assert files(here) == ["in.onnx"]


def test_a_sticky_folder_keeps_other_peoples_files(here, monkeypatch):
    os.chmod(here, 0o1777)
    destination.check_destination(here / "in.onnx")
    monkeypatch.setattr(os, "geteuid", lambda: 4321)
    destination.check_destination(here / "new.onnx")
    with pytest.raises(fastbn.StorageError, match="it is another user's, and in this folder only the owner may replace a file"):
        destination.check_destination(here / "in.onnx")


def test_a_prepared_model_that_is_dropped_leaves_nothing(here):
    result = fastbn.fold("in.onnx")
    waiting = result.prepared("out.onnx")
    prepared = waiting.__enter__()
    assert prepared.size == len(result.to_bytes())
    assert waiting.__exit__(ZeroDivisionError, ZeroDivisionError(), None) is False
    assert not prepared.committed
    assert files(here) == ["in.onnx"]
