#!/usr/bin/env python3
"""What the command takes for large models: seconds, CPU seconds, and the most memory, its own and mapped from files.

    python tools/bench_size.py FOLDER --layers 144 --channels 2048     2.4 GB of external data
    python tools/bench_size.py FOLDER --layers 120 --channels 4096     8 GB
    python tools/bench_size.py FOLDER --blocks 16667                   50,000 nodes, a third of them batch normalizations, in one file

FOLDER is made, and removed at the end. Needs Linux, and disk for three times the model.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from make_models import large, long

HEAD = "| command | exit code | s | CPU s | own memory, MB | mapped, MB | last line |"

# Seconds between two looks at the memory of the command.
PERIOD = 0.02


def memory_of(process):
    """Return (own, mapped) bytes that a process has in memory now; mapped ones are those of files, which the system may take back."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0, 0
    values = dict(line.split(":", 1) for line in lines)
    return tuple(1024 * int(values.get(name, "0 kB").split()[0]) for name in ("RssAnon", "RssFile"))


def measured(arguments):
    """Run fastbn; return (exit code, last line, seconds, CPU seconds, own, mapped)."""
    before, begin = os.times(), time.monotonic()
    own = mapped = 0
    # Into a file: nobody reads a pipe meanwhile, and a report may be longer than one holds.
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen([sys.executable, "-m", "fastbn", *map(str, arguments)], stdout=said, stderr=said)
        while process.poll() is None:
            found = memory_of(process.pid)
            own, mapped = max(own, found[0]), max(mapped, found[1])
            time.sleep(PERIOD)
        said.seek(0)
        last = (said.read().decode(errors="replace").splitlines() or [""])[-1]
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return process.returncode, last, time.monotonic() - begin, used, own, mapped


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=144, help="convolutions of the model with external data (144)")
    parser.add_argument("--channels", type=int, default=2048, help="their channels (2048)")
    parser.add_argument("--blocks", type=int, help="a model in one file instead: so many times Conv, BatchNormalization, Relu")
    arguments = parser.parse_args()
    folder = arguments.folder
    folder.mkdir(parents=True)
    try:
        if arguments.blocks:
            model = folder / "long.onnx"
            model.write_bytes(long(arguments.blocks).SerializeToString())
        else:
            model = large(folder, arguments.layers, arguments.channels)
        size = sum(path.stat().st_size for path in folder.iterdir())
        print(
            f"{size / 1e9:.2f} GB\n\n| command | exit code | s | CPU s | own memory, MB | mapped, MB | last line |\n|{'---|' * 7}",
            flush=True,
        )
        out = folder / "out.onnx"
        for command in (
            ["fold", model, "--dry-run"],
            ["fold", model, out, "--no-verify"],
            ["fold", model, out],
            ["verify", model, out],
            ["fold", model, "--in-place"],
        ):
            code, last, seconds, used, own, mapped = measured(command)
            name = " ".join("OUT" if word == out else "IN" if word == model else word for word in command)
            print(f"| {name} | {code} | {seconds:.1f} | {used:.1f} | {own / 1e6:.0f} | {mapped / 1e6:.0f} | {last[:90]} |", flush=True)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
