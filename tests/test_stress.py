"""The kernels under load: a few seconds of what tools/stress_kernels.py does for minutes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[1] / "tools" / "stress_kernels.py"


def run(environment, *options):
    command = [sys.executable, str(TOOL), *options]
    path = os.pathsep.join([environment["PYTHONPATH"], str(TOOL.parent)])
    return subprocess.run(command, env={**environment, "PYTHONPATH": path}, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.skipif(sys.platform != "linux", reason="limits and signals as Linux has them")
def test_callers_children_settings_and_signals_at_once(environment):
    kinds = {"random_call", "settings changed", "child, fork", "child, RLIMIT_NPROC: right", "call on the main thread", "SIGINT"}
    done = set()
    for seconds in (5, 20, 60):  # a busy machine needs longer for some of each kind
        result = run(environment, "--seconds", str(seconds), "--callers", "4", "--calls", "24")
        assert result.returncode == 0, result.stdout + result.stderr
        counts = {
            what: (int(count), int(wrong)) for what, count, wrong in re.findall(r"^(.+): (\d+), (\d+) wrong$", result.stdout, re.MULTILINE)
        }
        assert sum(wrong for _, wrong in counts.values()) == 0
        done |= {what for what, (count, _) in counts.items() if count}
        if done >= kinds:
            break
    assert done >= kinds


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.skipif("san.so" in os.environ.get("LD_PRELOAD", ""), reason="a sanitizer keeps what was freed")
def test_memory_does_not_grow_with_calls(environment):
    result = run(environment, "--growth", "60000")
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"60000 calls: .* bytes a call", result.stdout)
