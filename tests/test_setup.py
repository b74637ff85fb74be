"""setup.py and what it packs: a build that fails ends with a line that says why, and nothing of the package is left out."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(name="source")
def _source(tmp_path):
    """A source folder whose extension is empty, so that Cython takes no time."""
    pytest.importorskip("Cython", reason="a build needs Cython")
    pytest.importorskip("setuptools", reason="a build needs setuptools")
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("src_c", "fastbn"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    (tmp_path / "fastbn" / "_native.pyx").write_text("", encoding="utf-8")

    def build(command, compiler="gcc"):
        arguments = [sys.executable, "setup.py", command, "--build-lib", "built"]
        environment = {**os.environ, "CC": compiler}
        return subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False)

    return tmp_path, build


@pytest.mark.parametrize(("compiler", "reason"), [
    ("no-such-compiler", "the C compiler 'no-such-compiler' is not installed, install gcc or clang or name another one in CC"),
    ("false", "the C compiler 'false' failed, its messages stand above"),
])  # fmt: skip
def test_a_build_that_fails_says_why(compiler, reason, source):
    _, build = source
    done = build("build_ext", compiler)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"fastbn: Cannot build: {reason}"


def test_a_wheel_has_no_sources_of_the_extension(source):
    folder, build = source
    done = build("build_py")
    assert done.returncode == 0, done.stderr
    built = {path.relative_to(folder / "built").as_posix() for path in (folder / "built").rglob("*") if path.is_file()}
    assert {"fastbn/py.typed", "fastbn/_native.pyi", "fastbn/deployment/report.html.j2", "fastbn/deployment/drawing.svg.j2"} <= built
    assert {Path(name).suffix for name in built} == {".py", ".pyi", ".typed", ".j2", ".css", ".js", ".json"}


def test_every_folder_of_the_package_is_packed():
    folders = {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in (ROOT / "fastbn").rglob("*.py")}
    assert sorted(folders) == sorted(PYPROJECT["tool"]["setuptools"]["packages"])


def test_every_file_of_the_package_is_packed():
    """But for the sources of the extension, which no wheel needs."""
    listed = PYPROJECT["tool"]["setuptools"]["package-data"].items()
    packed = {path for package, patterns in listed for pattern in patterns for path in (ROOT / package.replace(".", "/")).glob(pattern)}
    sources = {".py", ".pyc", ".pyx", ".pxi", ".c", ".so"}
    assert {path for path in (ROOT / "fastbn").rglob("*") if path.is_file() and path.suffix not in sources} == packed


def test_no_address_is_made_up():
    """While the project has none, it names none, and the workflow does not publish; whoever adds one names all of them."""
    path = ROOT / ".github" / "workflows" / "wheels.yml"
    if not path.exists():
        pytest.skip("no workflows in a source distribution")
    assert 'grep -Fx "[project.urls]" pyproject.toml' in path.read_text(encoding="utf-8")
    assert "urls" not in PYPROJECT["project"]
