#!/usr/bin/env python3
"""What `fastbn fold --dry-run` takes for long models, from the shell: the start of Python and all imports are part of it.

    python tools/bench_dry_run.py [--nodes N ...] [--runs N]

Each number is the least of --runs runs: CPU seconds (user and system, of all threads), and seconds by the clock, which other programs of
the machine make longer. The models are those of make_models.py --long; --nodes names their sizes. The package is compiled to bytecode in
a run that does not count, as an installed one is. "numpy + onnx" is the time in which Python imports these two and does nothing.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from make_models import COMPUTED_BLOCK, LONG_BLOCK, computed, long

import fastbn

MODELS = {"long": (long, LONG_BLOCK), "computed": (computed, COMPUTED_BLOCK)}


def environment(folder):
    """Return the environment of a run: this package, its bytecode in a folder."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    paths = [str(Path(fastbn.__file__).resolve().parents[1]), kept.get("PYTHONPATH")]
    return {**kept, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONPYCACHEPREFIX": str(folder / "bytecode")}


def measured(command, variables):
    """Return (CPU seconds, seconds) of a command."""
    before, begin = os.times(), time.monotonic()
    subprocess.run(command, env=variables, stdout=subprocess.DEVNULL, check=True)
    seconds, after = time.monotonic() - begin, os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system, seconds


def least(command, variables, runs):
    """Return (CPU seconds, seconds), each the least of some runs; the one before them does not count."""
    measured(command, variables)
    cpu, seconds = zip(*(measured(command, variables) for _ in range(runs)), strict=True)
    return min(cpu), min(seconds)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1500, 3000, 6000, 12000], metavar="N")
    parser.add_argument("--runs", type=int, default=5, metavar="N")
    options = parser.parse_args()
    print("| model | nodes | CPU s | s | CPU s for each 1000 nodes beyond the start |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        variables = environment(folder)
        start, seconds = least([sys.executable, "-c", "import numpy, onnx"], variables, options.runs)
        print(f"| numpy + onnx | - | {start:.2f} | {seconds:.2f} | - |")
        for model, (build, block) in MODELS.items():
            for nodes in options.nodes:
                path = folder / f"{model}.onnx"
                path.write_bytes(build(nodes // block).SerializeToString(deterministic=True))
                cpu, seconds = least([sys.executable, "-m", "fastbn", "fold", "--dry-run", str(path)], variables, options.runs)
                count = nodes // block * block
                print(f"| {model} | {count} | {cpu:.2f} | {seconds:.2f} | {1000 * (cpu - start) / count:.3f} |", flush=True)


if __name__ == "__main__":
    main()
