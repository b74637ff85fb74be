"""tools/bench_deploy.py measures what it says, on the shipped model."""

import json
import re
import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).resolve().parent.parent / "tools" / "bench_deploy.py"


def test_the_shipped_model(small_cnn, tmp_path, environment):
    command = [sys.executable, str(TOOL), str(small_cnn), "--runs", "3", "--json", str(tmp_path / "out.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("| small_cnn |")]
    assert "| 7 -> 1 | 7 | 2 | 1 |" in lines[-1]
    assert re.search(r"\| [^|]+, 100\.0% of 32 \| (quantized|folded|original) \|", lines[-1]), "which one is faster is the machine's"
    (row,) = json.loads((tmp_path / "out.json").read_text())
    assert {each["runs"] for each in row["latency"]} == {3}
    assert row["schema"] == 1
