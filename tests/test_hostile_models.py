"""Malformed models: each fold returns a result or raises one of fastbn's errors, and never ends the process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# hostile.py folds thousands where it is called as a program.
CASES, SECONDS = 400, 500


@pytest.mark.parametrize("first", [0, 100_000])
def test_a_hostile_model_ends_in_a_result_or_an_error(first, environment):
    tests = Path(__file__).parent
    command = [sys.executable, str(tests / "hostile.py"), str(first), str(first + CASES)]
    path = f"{environment['PYTHONPATH']}{os.pathsep}{tests}"
    done = subprocess.run(command, env={**environment, "PYTHONPATH": path}, capture_output=True, text=True, timeout=SECONDS, check=False)
    ended = done.stdout.splitlines()
    assert done.returncode == 0, "\n".join([line for line in ended if not line.endswith(("result", "error", "no model"))] + [done.stderr])
    # Some must fold: models that all fail a check would not test the code behind the checks.
    assert sum(line.endswith("result") for line in ended) > CASES // 5
    assert sum(line.endswith("error") for line in ended) > CASES // 5
