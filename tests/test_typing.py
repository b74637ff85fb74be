"""The types of the package, as a type checker reads them: the package itself, and user programs with and without mistakes."""

import ast
import inspect
import json
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
REPORT = re.compile(r"(?P<path>[^:]+):(?P<line>\d+): error: .*\[(?P<code>[a-z-]+)\]$")
PLANTED = re.compile(r"# error: ([a-z-]+)$")
CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]


@pytest.fixture(name="mypy", scope="module")
def _mypy(tmp_path_factory):
    """What mypy reports of the package and of the programs, as a set of (path, line, code)."""
    pytest.importorskip("mypy", reason="mypy is not installed")
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path_factory.mktemp("mypy")), "--no-pretty", "--hide-error-context"]
    command += ["--show-error-codes", "--no-color-output", "fastbn", *(str(path.relative_to(ROOT)) for path in PROGRAMS)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    errors = [line for line in done.stdout.splitlines() if ": error: " in line]
    matches = [REPORT.fullmatch(line) for line in errors]
    assert all(matches), [line for line, match in zip(errors, matches, strict=True) if not match]
    return {(Path(match["path"]).as_posix(), int(match["line"]), match["code"]) for match in matches}


@pytest.fixture(name="pyright", scope="module")
def _pyright():
    """What pyright reports of the package and of the programs, as a set of (path, line, rule)."""
    pytest.importorskip("pyright", reason="pyright is not installed")
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["summary"]["filesAnalyzed"] > 100, "the package and the programs"
    return {
        (Path(each["file"]).relative_to(ROOT).as_posix(), each["range"]["start"]["line"] + 1, each.get("rule", "syntax"))
        for each in report["generalDiagnostics"]
        if each["severity"] in ("error", "warning")
    }


def planted_in(path):
    """Return {(path, line, code of mypy)} of the mistakes that a program names."""
    lines = enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
    return {(path.relative_to(ROOT).as_posix(), number, match[1]) for number, line in lines if (match := PLANTED.search(line))}


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_the_package_has_no_errors(checker, request):
    assert {error for error in request.getfixturevalue(checker) if error[0].startswith("fastbn/")} == set()


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_a_program_has_the_errors_that_it_names_and_no_other(mypy, path):
    planted = planted_in(path)
    assert {error for error in mypy if error[0] == path.relative_to(ROOT).as_posix()} == planted
    assert bool(planted) == (path.stem == "mistakes")


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_pyright_reports_the_same_lines(pyright, path):
    name = path.relative_to(ROOT).as_posix()
    assert {line for file, line, _ in pyright if file == name} == {line for _, line, _ in planted_in(path)}


def test_no_module_is_excused():
    assert CONFIG["mypy"]["strict"]
    assert not any(override.get("ignore_errors") for override in CONFIG["mypy"]["overrides"])
    assert not {"ignore", "exclude"} & {*CONFIG["pyright"]}


def public():
    """Yield (name, value) of everything public: `fastbn.__all__`, and the public attributes of its classes."""
    for name in fastbn.__all__:
        value = getattr(fastbn, name)
        yield name, value
        for key, attribute in vars(value).items() if isinstance(value, type) and value.__module__.startswith("fastbn") else ():
            if not key.startswith("_") and (isinstance(attribute, property | classmethod | staticmethod) or inspect.isfunction(attribute)):
                yield f"{name}.{key}", attribute


def test_every_public_name_has_a_docstring_and_types():
    for name, value in public():
        if isinstance(value, str):  # __version__
            continue
        assert inspect.getdoc(value), name
        function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        if inspect.isfunction(function):
            untyped = [key for key in inspect.signature(function).parameters if key not in ("self", "cls", *function.__annotations__)]
            assert untyped == [], f"{name} has parameters without a type"
            assert "return" in function.__annotations__, name


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
    """Return the same of a function in the stub, which here has no positional-only parameters."""
    either, spread, keyword = (getattr(inspect.Parameter, kind) for kind in ("POSITIONAL_OR_KEYWORD", "VAR_POSITIONAL", "KEYWORD_ONLY"))
    required = len(arguments.args) - len(arguments.defaults)
    parameters = [(arg.arg, either, place >= required) for place, arg in enumerate(arguments.args)]
    parameters += [(arguments.vararg.arg, spread, False)] if arguments.vararg else []
    keywords = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    return parameters + [(arg.arg, keyword, default is not None) for arg, default in keywords]


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
    assert "*.pyi" in CONFIG["setuptools"]["package-data"]["fastbn"]


def test_signatures_name_every_argument_at_run_time():
    """Overloads are for checkers: `help` and `inspect` see the one function with all its defaults."""
    parameters = inspect.signature(fastbn.batch_norm_backward).parameters
    assert [*parameters][:5] == ["dy", "x", "stats", "weight", "bias"]
    assert {"eps", "axis", "training", "activation", "residual", "out"} == set([*parameters][5:])
