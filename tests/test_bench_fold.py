"""tools/bench_fold.py measures what it says: a fold is compared with its original, on the shipped model."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

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
