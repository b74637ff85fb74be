"""Owner, mode and access list of a replaced file; places and systems that take no file, as they are and not as a test imagines them."""

import contextlib
import errno
import os
import stat
import struct
import subprocess
import sys
import tempfile

import onnx
import pytest
from shell import fails, files
from sketch import conv_bn, ops

import fastbn
from fastbn.cli import main
from fastbn.graph.rewrite import destination
from fastbn.graph.rewrite.replacement import ACCESS_LIST

pytestmark = pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount, and give files away")


@pytest.fixture(name="here")
def _here(tmp_path, monkeypatch):
    """A working folder with in.onnx."""
    monkeypatch.chdir(tmp_path)
    onnx.save(conv_bn(), tmp_path / "in.onnx")
    return tmp_path


def access_list(*entries):
    """Return a POSIX access list of (tag, permissions, user) as the system keeps it."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


# The owner reads and writes, user 4242 too, the group nothing: the bits of the mode say rw for the group all the same, as the mask.
NOBODY = 0xFFFFFFFF
SHARED = access_list((1, 6, NOBODY), (2, 6, 4242), (4, 0, NOBODY), (16, 6, NOBODY), (32, 0, NOBODY))


@pytest.fixture(name="shared")
def _shared(here):
    """The same folder, the model shared with one user by its access list."""
    try:
        os.setxattr("in.onnx", ACCESS_LIST, SHARED)
    except (AttributeError, OSError):
        pytest.skip("no access lists here")
    return here


def mode_of(name):
    return stat.S_IMODE(os.stat(name).st_mode)


def test_an_access_list_stays(shared):
    assert main(["fold", "in.onnx", "--in-place", "-q"]) == 0
    assert ops(onnx.load("in.onnx")) == "Conv"
    assert os.getxattr("in.onnx", ACCESS_LIST) == SHARED
    assert mode_of("in.onnx") == 0o660


def test_an_access_list_that_cannot_stay_leaves_nothing_open(shared, monkeypatch):
    """Its mask would else become what the group may."""

    def refused(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(os, "setxattr", refused)
    assert main(["fold", "in.onnx", "--in-place", "-q"]) == 0
    assert mode_of("in.onnx") == 0o600


def test_the_list_that_a_folder_gives_is_not_that_of_a_replaced_file(shared):
    os.setxattr(".", "system.posix_acl_default", SHARED)
    os.removexattr("in.onnx", ACCESS_LIST)
    os.chmod("in.onnx", 0o640)
    assert main(["fold", "in.onnx", "out.onnx", "-q"]) == 0
    assert os.getxattr("out.onnx", ACCESS_LIST), "a new file gets it"
    assert main(["fold", "in.onnx", "--in-place", "-q"]) == 0
    with pytest.raises(OSError, match="No data"):
        os.getxattr("in.onnx", ACCESS_LIST)
    assert mode_of("in.onnx") == 0o640


@needs_root
@pytest.mark.parametrize(("mode", "narrow"), [(0o664, 0o644), (0o640, 0o600), (0o604, 0o604), (0o770, 0o700)])
def test_a_group_that_cannot_stay_gives_its_rights_to_no_other(mode, narrow, here, monkeypatch):
    os.chown("in.onnx", 0, 5678)
    os.chmod("in.onnx", mode)

    def refused(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "chown", refused)
    assert main(["fold", "in.onnx", "--in-place", "-q"]) == 0
    assert (os.stat("in.onnx").st_gid, mode_of("in.onnx")) == (os.getegid(), narrow)


@needs_root
def test_a_program_that_runs_as_its_owner_stays_none(here):
    os.chown("in.onnx", 1234, 5678)
    os.chmod("in.onnx", 0o6755)
    assert main(["fold", "in.onnx", "--in-place", "-q"]) == 0
    assert (os.stat("in.onnx").st_uid, mode_of("in.onnx")) == (1234, 0o755)


def test_other_attributes_are_those_of_a_new_file(here):
    """A checksum of the old bytes would be wrong."""
    try:
        os.setxattr("in.onnx", "user.checksum", b"old")
    except (AttributeError, OSError):
        pytest.skip("no attributes here")
    assert main(["fold", "in.onnx", "--in-place", "-q"]) == 0
    assert os.listxattr("in.onnx") == []


def test_a_file_in_a_folder_that_gives_its_group(here):
    """A folder with the set-group-ID bit gives its group to every new file."""
    (here / "folder").mkdir()
    if os.geteuid() == 0:
        os.chown("folder", 0, 5678)
    os.chmod("folder", 0o2755)
    assert main(["fold", "in.onnx", "folder/out.onnx", "-q"]) == 0
    assert os.stat("folder/out.onnx").st_gid == os.stat("folder").st_gid


@contextlib.contextmanager
def mounted(*arguments):
    """Mount something while the block runs."""
    done = subprocess.run(["mount", *arguments], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("nothing may be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", arguments[-1]], check=True)


@needs_root
@pytest.mark.skipif(sys.platform != "linux", reason="mounts of Linux")
def test_a_file_that_is_mounted_is_refused_at_once(here, capsys, monkeypatch):
    """As containers mount single files: no other file can take its place."""
    name = "a model.onnx"
    for each in (name, "source.onnx"):
        (here / each).write_bytes((here / "in.onnx").read_bytes())
    with mounted("--bind", str(here / "source.onnx"), str(here / name)):
        monkeypatch.setattr("fastbn.graph.model.storage.load", None)  # nothing is read before
        for line in (["fold", name, "--in-place"], ["fold", "in.onnx", name], ["deploy", "in.onnx", name]):
            assert "Cannot replace 'a model.onnx': it is a mount point" in fails(capsys, *line)
    destination.check_destination(name)


@needs_root
@pytest.mark.skipif(sys.platform != "linux", reason="mounts of Linux")
def test_a_real_disk_that_is_full(here, capsys):
    (here / "small").mkdir()
    with mounted("-t", "tmpfs", "-o", "size=64k", "tmpfs", str(here / "small")):
        (here / "small" / "fill").write_bytes(bytes(1 << 16))
        for line in (["fold", "in.onnx", "small/out.onnx", "-q"], ["fold", "in.onnx", "out.onnx", "-q", "--json", "small/report.json"]):
            assert main(line) == 2
            assert "no space left on device" in capsys.readouterr().err
            assert files(here / "small") == ["fill"]
            assert files(here) == ["in.onnx", "small"]


@needs_root
@pytest.mark.skipif(sys.platform != "linux", reason="mounts of Linux")
def test_a_real_file_system_that_is_read_only(here, capsys):
    (here / "locked").mkdir()
    onnx.save(conv_bn(), "locked/in.onnx")
    with mounted("-t", "tmpfs", "-o", "ro", "tmpfs", str(here / "locked")):
        for line in (["fold", "in.onnx", "locked/out.onnx"], ["deploy", "in.onnx", "locked/out.onnx"]):
            assert "no file can be made in the folder 'locked'" in fails(capsys, *line)


@pytest.mark.parametrize("limit", [0, 100])
def test_a_limit_on_the_size_of_files(limit, here, environment):
    code = f"""if True:
        import resource, sys
        from fastbn.cli import main

        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, before[1]))
        code = main()
        resource.setrlimit(resource.RLIMIT_FSIZE, before)  # coverage.py writes a file at the end
        sys.exit(code)
    """
    line = [sys.executable, "-c", code, "fold", "in.onnx", "out.onnx", "-q"]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "fastbn: Cannot use 'out.onnx': file too large\n")
    assert files(here) == ["in.onnx"]


def test_no_temporary_folder(here, capsys, monkeypatch):
    """It is needed for a model that goes to stdout alone."""

    def none():
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    assert main(["fold", "in.onnx", "out.onnx", "-q"]) == 0
    assert main(["deploy", "in.onnx", "deployed.onnx", "-q", "--runs", "1"]) == 0
    (here / "out.onnx").unlink()
    (here / "deployed.onnx").unlink()
    assert main(["deploy", "in.onnx", "/dev/null", "-q", "--runs", "1"]) == 2
    assert capsys.readouterr().err == "fastbn: Cannot use the temporary folder: no usable temporary directory found in ['/tmp']\n"


def test_no_current_folder(here, capsys, monkeypatch):
    (here / "gone").mkdir()
    monkeypatch.chdir(here / "gone")
    (here / "gone").rmdir()
    for line in (["fold", str(here / "in.onnx"), "out.onnx"], ["fold", "in.onnx"], ["fold", "in.onnx", "--in-place"]):
        assert main([*line, "-q"]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert err.startswith("fastbn: Cannot ")
    assert main(["fold", str(here / "in.onnx"), str(here / "out.onnx"), "-q"]) == 0
    assert fastbn.verify(here / "in.onnx", here / "out.onnx").ok


def test_no_home_and_no_variables(here, environment):
    keep = {name: environment[name] for name in ("PYTHONPATH", "PYTHONSAFEPATH")}
    done = subprocess.run([sys.executable, "-m", "fastbn", "fold", "in.onnx", "-q"], env=keep, capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
