"""fastbn.keras on each backend that is installed: a backend is chosen when Keras is imported, so that each has a process of its own."""

import importlib.util
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from functools import cache
from pathlib import Path

import pytest

CHECKS, FOLD_CHECKS, GRAPH_CHECKS = (Path(__file__).with_name(f"keras_{name}checks.py") for name in ("", "fold_", "graph_"))
BACKENDS = ("torch", "jax", "tensorflow")


def needs(*packages):
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not installed")


def run(checks, backend, environment, folder):
    """Return the outcome of each check of a file, as {name: [(case, skipped, failure or None)]}."""
    report = folder / "report.xml"
    # The frameworks themselves warn of what they will have to change.
    options = ["-W", "default", "-p", "no:cacheprovider", "-q", "--junitxml", str(report), "-o", "markers=requires_trainable_backend"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(checks)],
        env={**environment, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"},
        cwd=CHECKS.parent.parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        failure = next((child.text for child in case if child.tag in ("failure", "error")), None)
        skip = next((child.get("message") for child in case if child.tag == "skipped"), None)
        found.setdefault(case.get("name").split("[")[0], []).append((case.get("name"), skip, failure))
    return found


@pytest.fixture(scope="module")
def outcomes(environment, tmp_path_factory):
    """A function: the backend -> what comes of our checks."""
    return cache(lambda backend: run(CHECKS, backend, environment, tmp_path_factory.mktemp(backend)))


@pytest.fixture(scope="module")
def folds(environment, tmp_path_factory):
    """A function: a file of checks of folding, the backend -> what comes of them."""
    return cache(lambda checks, backend: run(checks, backend, environment, tmp_path_factory.mktemp(backend)))


def checks_in(file):
    """Return the names of the checks in a file."""
    return re.findall(r"^def (test_\w+)\(", file.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize(("checks", "check"), [(file, name) for file in (FOLD_CHECKS, GRAPH_CHECKS) for name in checks_in(file)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_folding_on_a_backend(backend, checks, check, folds):
    needs("keras", backend)
    for case, _, failure in folds(checks, backend)[check]:
        assert failure is None, f"{case}:\n{failure}"


@pytest.mark.parametrize("check", checks_in(CHECKS))
@pytest.mark.parametrize("backend", BACKENDS)
def test_backend(backend, check, outcomes):
    needs("keras", backend)
    cases = outcomes(backend)[check]
    for case, _, failure in cases:
        assert failure is None, f"{case}:\n{failure}"
    if all(skip for _, skip, _ in cases):
        pytest.skip(cases[0][1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_keras_own_tests_of_the_layer(backend, environment, tmp_path):
    needs("keras", backend, "absl")
    if importlib.util.find_spec("keras.src.layers.normalization.batch_normalization_test") is None:
        pytest.skip("this Keras ships without its tests")
    cases = [case for found in run(CHECKS.with_name("keras_suite.py"), backend, environment, tmp_path).values() for case in found]
    assert len(cases) > 20
    for case, _, failure in cases:  # no difference is by design
        assert failure is None, f"{case}:\n{failure}"


def python(code, environment, **variables):
    return subprocess.run([sys.executable, "-c", code], env={**environment, **variables}, capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the affinity of a process cannot be set here")
def test_jax_calls_back_on_one_cpu(environment):
    needs("keras", "jax")
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "import jax, numpy, fastbn.keras\n"
        "layer = fastbn.keras.BatchNormalization(); layer.build((1, 64))\n"
        "print(float(jax.jit(lambda x: layer(2 * x))(numpy.ones((65536, 64), numpy.float32)).sum()))"
    )
    done = python(code, environment, KERAS_BACKEND="jax")
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(2 * 65536 * 64 / (1 + 1e-3) ** 0.5, rel=1e-6)


def test_another_backend_is_refused_in_one_sentence(environment):
    needs("keras")
    done = python("import fastbn.keras", environment, KERAS_BACKEND="numpy")
    assert "ImportError: Expected torch, jax or tensorflow, got 'numpy' - at `KERAS_BACKEND`" in done.stderr


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_a_backend_loads_no_other_framework(backend, environment):
    needs("keras", backend)
    loaded = "import sys, keras; before = set(sys.modules); import fastbn.keras; print(*(set(sys.modules) - before))"
    done = python(loaded, environment, KERAS_BACKEND=backend)
    assert done.returncode == 0, done.stderr
    assert not {name.split(".")[0] for name in done.stdout.split()} & ({"torch", "jax", "tensorflow"} - {backend})


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_benchmark_compares_before_it_times(backend, environment):
    needs("keras", backend)
    tool = CHECKS.parent.parent / "tools" / "bench_keras.py"
    command = [sys.executable, str(tool), "--shape", "16x8", "--runs", "1", "--batches", "3"]
    variables = {**environment, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    kinds = re.findall(r"^(\w+) +3 batches of 16x8: moving_mean [0-9.]+e-0[78], moving_variance [0-9.]+e-0[78]$", done.stdout, re.MULTILINE)
    assert kinds == ["Keras", "fastbn"]
    assert re.search(r"^\| 16x8 \| [0-9.]+ \| [0-9.]+ \| [0-9.]+ \|$", done.stdout, re.MULTILINE)
