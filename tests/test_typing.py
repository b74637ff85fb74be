"""The types of the package, as a type checker reads them: the package itself, and user programs with and without mistakes."""

import ast
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import fastbn
from fastbn import _native

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = sorted((ROOT / "tests" / "typing").glob("*.py"))
TYPED = ["_check", "_types", "affine", "config", "errors", "folding", "functional", "geometry", "halves"]
TYPED += ["layers", "memory", "reference", "stats", "sync"]
TYPED += ["graph", *(f"graph.{name}" for name in ("fold_result", "job", "ranges", "reasons", "report", "results", "runtime"))]
TYPED += ["graph.parity", *(f"graph.parity.{path.stem}" for path in (ROOT / "fastbn/graph/parity").glob("[a-z]*.py"))]
REPORT = re.compile(r"(?P<path>[^:]+):(?P<line>\d+): error: .*\[(?P<code>[a-z-]+)\]$")
PLANTED = re.compile(r"# error: ([a-z-]+)$")


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """What mypy reports of the package and of the programs, as a list of (path, line, code)."""
    pytest.importorskip("mypy", reason="mypy is not installed")
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path_factory.mktemp("mypy")), "--no-pretty", "--hide-error-context"]
    command += ["--show-error-codes", "--no-color-output", "fastbn", *(str(path.relative_to(ROOT)) for path in PROGRAMS)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    errors = [line for line in done.stdout.splitlines() if ": error: " in line]
    found = [REPORT.fullmatch(line) for line in errors]
    assert all(found), [line for line, match in zip(errors, found, strict=True) if not match]
    return [(Path(match["path"]).as_posix(), int(match["line"]), match["code"]) for match in found]


def test_the_package_has_no_errors(reported):
    assert [error for error in reported if error[0].startswith("fastbn/")] == []


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_a_program_has_the_errors_that_it_names_and_no_other(reported, path):
    name = path.relative_to(ROOT).as_posix()
    lines = enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
    planted = {(name, number, match[1]) for number, line in lines if (match := PLANTED.search(line))}
    assert {error for error in reported if error[0] == name} == planted
    assert bool(planted) == (path.stem == "mistakes")


def test_typed_modules_are_not_excused():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mypy"]
    assert config["strict"]
    excused = {name for override in config["overrides"] if override.get("ignore_errors") for name in override["module"]}
    files = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "fastbn").rglob("*.py")]
    modules = {".".join(path.parts).removesuffix(".__init__") for path in files}
    assert excused <= modules, "modules that no longer exist"
    assert not excused & {"fastbn", *(f"fastbn.{name}" for name in TYPED)}


def declared():
    """Return the names in the stub of the compiled part: functions with their arguments, classes with their methods."""
    tree = ast.parse((ROOT / "fastbn" / "_native.pyi").read_text(encoding="utf-8"))
    names = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            names[node.name] = {method.name: method.args for method in node.body if isinstance(method, ast.FunctionDef)}
        elif isinstance(node, ast.FunctionDef):
            names[node.name] = node.args
    return names


def parameters_of(function):
    """Return (name, kind, whether it has a default) of each parameter of a compiled function."""
    return [(p.name, p.kind, p.default is not p.empty) for p in inspect.signature(function).parameters.values()]


def parameters_in(arguments):
    """Return the same of a function in the stub, which here has neither keyword-only nor positional-only parameters."""
    plain, spread = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.VAR_POSITIONAL
    without = len(arguments.args) - len(arguments.defaults)
    found = [(arg.arg, plain, place >= without) for place, arg in enumerate(arguments.args)]
    return found + ([(arguments.vararg.arg, spread, False)] if arguments.vararg else [])


def test_the_stub_is_that_of_the_compiled_part():
    names = declared()
    assert set(names) == {name for name in dir(_native) if not name.startswith("__")}
    for name, what in names.items():
        built = getattr(_native, name)
        if isinstance(what, ast.arguments):
            assert parameters_in(what) == parameters_of(built), name
            continue
        # Cython tells nothing of the parameters of a constructor.
        methods = {method for method in dir(built) if not method.startswith("__")}
        assert set(what) == methods | {"__init__"}
        for method in methods:
            assert parameters_in(what[method]) == parameters_of(getattr(built, method)), f"{name}.{method}"


def test_the_stub_is_shipped():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-data"]
    assert "*.pyi" in config["fastbn"]


def test_signatures_name_every_argument_at_run_time():
    """Overloads are for checkers: `help` and `inspect` see the one function with all its defaults."""
    parameters = inspect.signature(fastbn.batch_norm_backward).parameters
    assert [*parameters][:5] == ["dy", "x", "stats", "weight", "bias"]
    assert {"eps", "axis", "training", "activation", "residual", "out"} == set([*parameters][5:])
