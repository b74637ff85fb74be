"""tools/bench_quantization.py puts each way of calibrating into its column."""

import json
import subprocess
import sys
from pathlib import Path

from test_equalization_trial import gaining, losing

TOOL = Path(__file__).resolve().parent.parent / "tools" / "bench_quantization.py"


def test_what_is_kept_is_the_one_that_loses_less(tmp_path, environment):
    for make in (gaining, losing):
        (tmp_path / f"{make.__name__}.onnx").write_bytes(make().SerializeToString())
    command = [sys.executable, str(TOOL), "gaining.onnx", "losing.onnx", "--json", "out.json"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=True)
    lines = [line for line in done.stdout.splitlines() if "(synthetic)" in line]
    assert [line.count("|") for line in lines] == [8, 8]
    gained, lost = json.loads((tmp_path / "out.json").read_text()).values()
    assert gained["kept"] == gained["equalized"] != gained["data-free"]
    assert lost["kept"] == lost["data-free"] != lost["equalized"]
    assert gained["kept"][0] < gained["data-free"][0]
    assert lost["kept"][0] < lost["equalized"][0]
    said = [line for line in done.stderr.splitlines() if line.startswith("    channels of ")]
    assert ["not equalized" in line for line in said] == [False, True]
    assert "kept loses" in done.stdout
