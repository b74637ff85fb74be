#!/usr/bin/env python3
"""What verification costs beside one run of the model: peak memory and seconds, each measurement in a process of its own.

    python tools/bench_verify.py PATH [PATH ...] [--limit SECONDS] [--runs N] [--json FILE]

PATH is a model or a folder that is searched for models. For each: one run of the original in onnxruntime, its optimizer off, at the shapes
that the verification takes; `fastbn fold`; `fastbn verify` of the original and what the fold wrote. Peak memory is that of the process
(VmHWM), the run's with nothing loaded but NumPy and onnxruntime. The seconds of the run are those of the fastest of --runs, without
loading; one by default, because the sessions of the verification have first runs too. Those of the commands include their imports and all
that they write. The largest part of what is allowed stands first: a fold may take 1.3 times the memory of the run + 200 MB, and 8 of its
runs + 2 s. What the fold's own proofs miss, `verify` shows.
"""

import argparse
import json
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

from bench_fold import ask, work

# What a command may take: times the memory of one run and MB, times the seconds of one run and seconds.
MEMORY, MEMORY_MB = 1.3, 200
RUNS, SECONDS = 8, 2.0


def peak_mb() -> float:
    """Return the most memory that this process has had, in MB; a child's ru_maxrss would begin at what its parent had."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024


def write_feed(model: str, target: str) -> dict:
    """Write the normal input of the verification as .npz; return its sizes."""
    import numpy as np

    from fastbn.graph.model.index import Index
    from fastbn.graph.model.storage import load
    from fastbn.graph.parity.reference import feeds_for
    from fastbn.graph.runtime import Runnable

    index = Index(load(model))
    feed = feeds_for(Runnable.of(index.source), index)[0]
    np.savez(target, *feed.values())
    return {"names": list(feed), "shapes": {name: list(values.shape) for name, values in feed.items()}}


def run_once(model: str, feed: str, names: str, runs: str) -> dict:
    """Run the original: nothing of fastbn is loaded, so that its memory does not count."""
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    start = time.perf_counter()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    load = time.perf_counter() - start
    with np.load(feed, allow_pickle=True) as stored:
        inputs = dict(zip(json.loads(names), (stored[name] for name in stored.files), strict=True))
    seconds = []
    for turn in range(int(runs)):
        start = time.perf_counter()
        session.run(None, inputs)
        seconds.append(time.perf_counter() - start)
        if turn == 0:
            peak = peak_mb()
    return {"peak_mb": peak, "seconds": min(seconds), "load_seconds": load}


def command(*arguments: str) -> dict:
    """Run one fastbn command in this process."""
    start = time.perf_counter()
    from fastbn.cli import main

    with redirect_stdout(sys.stderr):
        code = main(list(arguments))
    return {"peak_mb": peak_mb(), "seconds": time.perf_counter() - start, "code": code}


TASKS = {"write_feed": write_feed, "run_once": run_once, "command": command}


def parts(figures: dict, run: dict) -> dict:
    """Return what one command took with its parts of what it may take."""
    if "failed" in figures or "failed" in run:
        return figures
    allowed = {"peak_mb": MEMORY * run["peak_mb"] + MEMORY_MB, "seconds": RUNS * run["seconds"] + SECONDS}
    return figures | {f"{key}_part": figures[key] / most for key, most in allowed.items()}


def measure(path: Path, folder: Path, limit: float, runs: int) -> dict:
    """Return the row of one model."""

    def question(task: str, *arguments: object) -> dict:
        return ask(__file__, sys.executable, limit, task, *arguments)

    feed, folded, report = folder / "feed.npz", folder / "folded.onnx", folder / "report.json"
    for left in (folded, report):
        left.unlink(missing_ok=True)
    given = question("write_feed", path, feed)
    row = {"model": path.name, "shapes": given.get("shapes")}
    row["run"] = given if "failed" in given else question("run_once", path, feed, json.dumps(given["names"]), runs)
    row["fold"] = parts(question("command", "fold", path, folded, "--json", report), row["run"])
    if report.exists():
        facts = json.loads(report.read_text(encoding="utf-8"))
        row["bn"], row["parity"] = facts["batch_normalizations"], (facts["parity"] or {}).get("status")
    if folded.exists():
        row["verify"] = parts(question("command", "verify", path, folded), row["run"])
    return row


def cells(figures: dict | None) -> list[str]:
    """Return the cells of one command: memory and seconds, each with its part of what is allowed."""
    if figures is None or "failed" in figures:
        return ["-" if figures is None else figures["failed"].replace("|", "/")[:60], "-"]
    shown = []
    for key, unit, digits in (("peak_mb", "MB", 0), ("seconds", "s", 2)):
        part = figures.get(f"{key}_part")
        shown.append(f"{figures[key]:.{digits}f} {unit}" + ("" if part is None else f" ({part:.2f}{' OVER' if part > 1 else ''})"))
    return shown


def worst_part(row: dict) -> float:
    return max((row.get(name, {}).get(f"{key}_part", 0) for name in ("fold", "verify") for key in ("peak_mb", "seconds")), default=0)


def tables(rows: list[dict]) -> list[str]:
    """Return the table as lines of Markdown, then how many models keep to what is allowed."""
    lines = [
        "| model | BN | parity | run: MB | s | fold: MB (of allowed) | s (of allowed) | verify: MB (of allowed) | s (of allowed) |",
        "|---" * 9 + "|",
    ]
    for row in sorted(rows, key=worst_part, reverse=True):
        bn = f"{row['bn']['before']} -> {row['bn']['after']}" if "bn" in row else "-"
        shown = [row["model"], bn, row.get("parity") or "-", *cells(row["run"]), *cells(row["fold"]), *cells(row.get("verify"))]
        lines.append(f"| {' | '.join(shown)} |")
    compared = [row for row in rows if "failed" not in row["run"]]
    lines.append("")
    for name in ("fold", "verify"):
        for key, what in (("peak_mb", f"{MEMORY} runs + {MEMORY_MB} MB"), ("seconds", f"{RUNS} runs + {SECONDS:.0f} s")):
            parts_of_limit = [row[name][f"{key}_part"] for row in compared if f"{key}_part" in row.get(name, {})]
            over = sum(part > 1 for part in parts_of_limit)
            lines.append(
                f"{name}: {over} of {len(parts_of_limit)} models over {what}; the worst takes {max(parts_of_limit, default=0):.2f} of it"
            )
    return lines


def main() -> None:
    if sys.argv[1:2] == ["--work"]:
        work(TASKS, *sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", metavar="PATH", nargs="+", type=Path)
    parser.add_argument("--limit", type=float, default=300, metavar="SECONDS", help="of one measurement (300)")
    parser.add_argument("--runs", type=int, default=1, metavar="N", help="runs of the original in its process, the fastest counts (1)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for path in [path for given in options.paths for path in (sorted(given.rglob("*.onnx")) if given.is_dir() else [given])]:
            rows.append(measure(path, Path(folder), options.limit, options.runs))
            print(path.name, *cells(rows[-1]["run"]), *cells(rows[-1]["fold"]), sep="   ", file=sys.stderr, flush=True)
    print("\n".join(tables(rows)))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
