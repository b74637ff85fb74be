"""tools/bench_fold.py measures what it says: a fold is compared with its original, on the shipped model."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parent.parent / "tools" / "bench_fold.py"


def test_fastbn_on_the_shipped_model(small_cnn, tmp_path, environment):
    shutil.copy(small_cnn, tmp_path / "small_cnn.onnx")
    command = [sys.executable, str(TOOL), str(tmp_path), "--tool", "fastbn", "--json", str(tmp_path / "out.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("| small_cnn.onnx | 7 |")]
    assert "| 1 (" in line
    assert "not compared" not in line
    (model,) = json.loads((tmp_path / "out.json").read_text())
    assert 0 < model["tools"]["fastbn"]["error"] < 1e-5


def run(command, folder, environment):
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_a_tool_that_is_asked_for_must_be_there(tmp_path, environment):
    (tmp_path / "onnxslim.py").write_text("raise ImportError('broken')", encoding="utf-8")
    broken = {**environment, "PYTHONPATH": f"{tmp_path}{os.pathsep}{environment['PYTHONPATH']}"}
    done = run([sys.executable, str(TOOL), str(tmp_path), "--tool", "onnxslim"], tmp_path, broken)
    assert done.returncode == 1
    assert done.stderr == f"Cannot compare onnxslim: {sys.executable} does not import onnxslim\n"


def test_fastbn_is_never_left_out(tmp_path, environment):
    """In a folder that shadows it fastbn is compared all the same; where it cannot be imported there is no comparison."""
    (tmp_path / "fastbn").mkdir()
    (tmp_path / "fastbn" / "__init__.py").write_text("raise ImportError('not built')", encoding="utf-8")
    done = run([sys.executable, str(TOOL), str(tmp_path)], tmp_path, environment)
    assert done.returncode == 0
    assert "| fastbn | 0 |" in done.stdout
    done = run([sys.executable, str(TOOL), str(tmp_path)], tmp_path, {**environment, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1
    assert "ImportError: not built" in done.stderr


def test_what_is_no_folder_is_an_error(tmp_path, environment):
    done = run([sys.executable, str(TOOL), "nowhere", "--tool", "fastbn"], tmp_path, environment)
    assert (done.returncode, done.stderr) == (1, "Cannot read 'nowhere': it is no folder\n")


@pytest.mark.parametrize("name", ["shapes.json", "tools/shapes.json"])
def test_the_list_of_shapes_is_found_from_a_clone(name, monkeypatch):
    import bench_kernels

    monkeypatch.chdir(TOOL.parents[1])
    shapes = bench_kernels.read_shapes(name)
    assert len(shapes) == 50
    assert shapes[0] == (50, 64, 112, 112)
