"""tools/bench_verify.py measures what it says: a run, a fold and a verification of the shipped model, each with its part of the bound."""

import json
import os
import subprocess
import sys
from pathlib import Path

import bench_verify
import pytest

TOOL = Path(bench_verify.__file__)


def test_the_shipped_model(small_cnn, tmp_path, environment):
    command = [sys.executable, str(TOOL), str(small_cnn), "--runs", "1", "--json", str(tmp_path / "out.json")]
    path = os.pathsep.join([environment["PYTHONPATH"], str(TOOL.parent)])  # it takes the parts of another tool
    done = subprocess.run(command, env={**environment, "PYTHONPATH": path}, capture_output=True, text=True, timeout=240, check=True)
    assert "| small_cnn.onnx | 7 -> 1 | ok |" in done.stdout
    assert "fold: 0 of 1 models over 1.3 runs + 200 MB" in done.stdout
    (row,) = json.loads((tmp_path / "out.json").read_text())
    assert (row["fold"]["code"], row["verify"]["code"]) == (0, 0)
    for name in ("fold", "verify"):
        found, run = row[name], row["run"]
        assert found["peak_mb"] > run["peak_mb"] > 10, "the command loads onnx and fastbn as well"
        assert found["peak_mb_part"] == pytest.approx(found["peak_mb"] / (1.3 * run["peak_mb"] + 200))
        assert found["seconds_part"] == pytest.approx(found["seconds"] / (8 * run["seconds"] + 2))


def test_a_model_that_does_not_run_or_takes_too_much_is_said():
    run = {"peak_mb": 100.0, "seconds": 1.0}
    over = bench_verify.parts({"peak_mb": 660.0, "seconds": 5.0, "code": 0}, run)
    rows = [{"model": "good", "run": run, "fold": bench_verify.parts({"peak_mb": 33.0, "seconds": 1.0, "code": 0}, run)}]
    rows += [{"model": "large", "run": run, "fold": over}, {"model": "odd", "run": {"failed": "a | b"}, "fold": {"failed": "a | b"}}]
    lines = bench_verify.tables(rows)
    assert [line.split(" | ")[0] for line in lines[2:5]] == ["| large", "| good", "| odd"], "the worst first"
    assert "660 MB (2.00 OVER) | 5.00 s (0.50)" in lines[2]
    assert "| a / b |" in lines[4]
    assert "fold: 1 of 2 models over 1.3 runs + 200 MB; the worst takes 2.00 of it" in lines
