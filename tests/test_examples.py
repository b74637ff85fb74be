"""examples/: each script and each cell of the notebook runs as it stands and says what it should."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

# Example -> (what it needs, what it prints).
SCRIPTS = {
    "ci_gate": ([], r"^gate open: quantized, \d+ bytes$"),
    "keras_digits": (["keras", "torch", "onnxscript", "jinja2"], r"^loss \d\.\d\d -> 0\.\d\d$"),
    "mobilenet": (["torch"], r"^0 left, outputs differ by \de-0[6-9] of the largest$"),
    "numpy_only": ([], r"^accuracy 0\.9\d\d$"),
    "torch_training": (["torch"], r"^fastbn's +0\.[89]\d\d right, "),
}


def run(arguments, folder, environment):
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_every_example_is_here():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs(name, tmp_path, environment):
    needed, said = SCRIPTS[name]
    for module in needed:
        pytest.importorskip(module, reason=f"examples/{name}.py needs {module}")
    done = run([str(EXAMPLES / f"{name}.py")], tmp_path, environment)
    assert done.returncode == 0, done.stderr
    assert re.search(said, done.stdout, re.MULTILINE), done.stdout


def test_the_gate_closes(tmp_path, environment, small_cnn):
    """On random numbers, and with a batch normalization left."""
    script = "import sys, runpy, numpy; sys.argv = ['gate', {model!r}, 'data.npz']; runpy.run_path({path!r})"
    code = "import numpy; numpy.savez('data.npz', image=numpy.random.default_rng(0).random((8, 3, 32, 32), numpy.float32))"
    assert run(["-c", code], tmp_path, environment).returncode == 0
    done = run(["-c", script.format(model=str(small_cnn), path=str(EXAMPLES / "ci_gate.py"))], tmp_path, environment)
    assert done.returncode == 1
    assert "gate closed: a batch normalization is left" in done.stderr
    assert not (tmp_path / "deployed.onnx").exists()


def test_the_notebook_runs(tmp_path, environment):
    cells = json.loads((EXAMPLES / "fold.ipynb").read_text(encoding="utf-8"))["cells"]
    code = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    (tmp_path / "tests").symlink_to(EXAMPLES.parent / "tests")
    done = run(["-c", code], tmp_path, environment)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "6 folded, 1 kept"
    assert lines[-1] == "0 left"
    assert (tmp_path / "small_cnn.folded.onnx").stat().st_size > 10_000
