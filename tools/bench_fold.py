#!/usr/bin/env python3
"""What fastbn and other tools make of a folder of models, each model and tool in a process of its own.

    python tools/bench_fold.py FOLDER [--json FILE] [--limit SECONDS] [--tool NAME ...] [--peers PYTHON] [--latency]

For each model and tool: BatchNormalization left (those decomposed by a tool do not count), nodes left, worst error against the original
(onnxruntime, its optimizer off on both sides; the part of the largest element of that output), CPU seconds to read, optimize and write, all
threads together and without imports, and peak memory. --latency times fastbn's result beside the original in onnxruntime's default options.
Other tools that are not installed are left out, and named on stderr, unless --tool asks for them; --peers names a Python that has them.
"""

import argparse
import importlib
import json
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

LATENCY_RUNS = 30


def fastbn_tool(source, target, freeze_inputs=False):
    import fastbn

    fastbn.fold(source, freeze_inputs=freeze_inputs).save(target)


def fastbn_freeze(source, target):
    fastbn_tool(source, target, freeze_inputs=True)


def ort(level, source, target):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, f"ORT_ENABLE_{level}")
    options.optimized_model_filepath = target
    onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def ort_basic(source, target):
    ort("BASIC", source, target)


def ort_extended(source, target):
    ort("EXTENDED", source, target)


def onnxsim(source, target):
    import onnx
    import onnxsim

    model, equal = onnxsim.simplify(source)
    if not equal:
        raise RuntimeError("its own check failed")
    onnx.save(model, target)


def onnxslim(source, target):
    import onnxslim

    onnxslim.slim(source, target)


def onnxscript(source, target):
    import onnx
    from onnxscript import optimizer, rewriter

    onnx.save(rewriter.rewrite(optimizer.optimize(onnx.load(source))), target)


def onnxoptimizer(source, target):
    import onnx
    import onnxoptimizer

    passes = onnxoptimizer.get_fuse_and_elimination_passes()
    onnx.save(onnxoptimizer.optimize(onnx.load(source), passes), target)


# Name -> (modules to import, function).
TOOLS = {
    "fastbn": (("fastbn", "fastbn.graph.job", "onnxruntime"), fastbn_tool),
    "fastbn --freeze-inputs": (("fastbn", "fastbn.graph.job", "onnxruntime"), fastbn_freeze),
    "ort basic": (("onnxruntime",), ort_basic),
    "ort extended": (("onnxruntime",), ort_extended),
    "onnxsim": (("onnxsim", "onnx"), onnxsim),
    "onnxslim": (("onnxslim", "onnx"), onnxslim),
    "onnxscript": (("onnxscript", "onnxscript.optimizer", "onnxscript.rewriter", "onnx"), onnxscript),
    "onnxoptimizer": (("onnxoptimizer", "onnx"), onnxoptimizer),
}

# What judges the results.
JUDGE = ("fastbn", "fastbn.graph.bench", "fastbn.graph.parity.reference", "onnxruntime")


# What runs in the subprocess of one question (bench_verify.py): the answer is the last line of standard output.
def work(tasks, task, *arguments):
    with redirect_stdout(sys.stderr):
        answer = tasks[task](*arguments)
    print(json.dumps(answer))


def optimize(name, source, target):
    start = sum(os.times()[:4])
    TOOLS[name][1](source, target)
    return {"seconds": sum(os.times()[:4]) - start, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def count(path):
    """Return how many nodes and BatchNormalization a model holds, subgraphs and functions included."""
    import onnx

    from fastbn.graph.model.nesting import is_standard, scopes_of

    proto = onnx.load(path, load_external_data=False)
    nodes = [node for graph in (proto.graph, *proto.functions) for inner in scopes_of(graph) for node in inner.node]
    return {"nodes": len(nodes), "bn": sum(node.op_type == "BatchNormalization" and is_standard(node.domain) for node in nodes)}


def data_files(path):
    """Return the names of a model's data files."""
    import onnx

    from fastbn.graph.model.external import external_tensors, location_of

    return {"names": sorted({location_of(tensor) for tensor in external_tensors(onnx.load(path, load_external_data=False))})}


def runs(path):
    """Fail where onnxruntime cannot run the original: then there is nothing to compare with."""
    from fastbn.graph.model.index import Index
    from fastbn.graph.model.storage import load
    from fastbn.graph.parity.reference import feeds_for
    from fastbn.graph.runtime import Runnable

    index = Index(load(path))
    return {"inputs": len(feeds_for(Runnable.of(index.source), index))}


def compare(original, folded):
    """Return the worst error of any output as a part of that output's largest element, on fastbn's own inputs."""
    import numpy as np

    from fastbn.graph.model.index import Index
    from fastbn.graph.model.storage import load
    from fastbn.graph.parity.reference import feeds_for
    from fastbn.graph.runtime import Runnable, session

    index = Index(load(original))
    worst = 0.0
    reference, candidate = session(original), session(folded)
    known = {entry.name for entry in candidate.get_inputs()}
    for feed in feeds_for(Runnable.of(index.source), index):
        before, after = reference.run(None, feed), candidate.run(None, {name: value for name, value in feed.items() if name in known})
        for one, other in zip(before, after, strict=True):
            if one.shape != other.shape:
                return {"error": float("inf")}
            one, other = one.astype(np.float64), other.astype(np.float64)
            if not (np.isfinite(one) == np.isfinite(other)).all():
                return {"error": float("inf")}
            finite = np.isfinite(one)
            size = np.abs(one[finite]).max(initial=0)
            worst = max(worst, float(np.abs(one - other)[finite].max(initial=0) / size) if size else 0.0)
    return {"error": worst}


def latency(original, folded):
    from fastbn.graph.bench import bench

    return {f"{row['model']} {row['threads']}": row["median_ms"] for row in bench(original, folded, runs=LATENCY_RUNS)}


TASKS = {"optimize": optimize, "count": count, "data_files": data_files, "runs": runs, "compare": compare, "latency": latency}


def ask(script, python, limit, task, *arguments):
    """Return the answer of a task of a script in a process of its own, or {"failed": why}."""
    command = [python, script, "--work", task, *map(str, arguments)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment(), check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"no answer in {limit} s"}
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return {"failed": lines[-1][:200] if lines and done.returncode > 0 else f"stopped by signal {-done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


class Worker:
    """A process of a Python that has imported some modules and forks for each task, so that no task has to import them again."""

    def __init__(self, python, *modules):
        command = [python, __file__, "--serve", *modules]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment())

    def ask(self, limit, task, *arguments):
        """Return the answer of a task, or {"failed": why}."""
        print(json.dumps([limit, task, *map(str, arguments)]), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def end(self):
        self.process.communicate()


def serve(*modules):
    """Answer the tasks that standard input has, a line for each."""
    for module in modules:
        importlib.import_module(module)
    for line in sys.stdin:
        limit, task, *arguments = json.loads(line)
        print(json.dumps(forked(limit, task, arguments)), flush=True)


def forked(limit, task, arguments):
    """Return the answer of a task in a child of this process, or {"failed": why}."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        try:
            answer = TASKS[task](*arguments)
        except BaseException as error:
            answer = {"failed": f"{type(error).__name__}: {error}"[:200]}
        os.write(writing, json.dumps(answer).encode())
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        is_there = select.select([pipe], [], [], limit)[0]
        if not is_there:
            os.kill(child, signal.SIGKILL)
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if not is_there:
        return {"failed": f"no answer in {limit} s"}
    return json.loads(answer) if answer else {"failed": f"stopped by signal {os.WTERMSIG(status)}"}


def environment():
    import fastbn

    entries = [str(Path(fastbn.__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, entries))}


def installed(python, module):
    """Say whether a Python has a module; the current folder, which may be the source tree, does not count."""
    return subprocess.run([python, "-P", "-c", f"import {module}"], capture_output=True, env=environment(), check=False).returncode == 0


def chosen(names, peers):
    """Return name -> a Worker of each tool to run: all of those that are asked for, else those that are there, with fastbn."""
    tools, missing = {}, []
    for name in names or TOOLS:
        module = TOOLS[name][0][0]
        python = sys.executable if module == "fastbn" else peers
        if installed(python, module):
            tools[name] = Worker(python, *TOOLS[name][0])
        elif names or module == "fastbn":
            raise SystemExit(f"Cannot compare {name}: {python} does not import {module}")
        else:
            missing.append(name)
    if missing:
        print(f"left out, not installed: {', '.join(missing)}", file=sys.stderr)
    return tools


def measure(path, tools, judge, folder, limit, with_latency):
    """Return the row of one model."""
    row = {"model": path.name, **judge.ask(limit, "count", path), "tools": {}}
    row["runs"] = "failed" not in judge.ask(limit, "runs", path)
    for name in judge.ask(limit, "data_files", path).get("names", ()):
        shutil.copy(path.parent / name, folder)  # a tool may leave the tensors of its result in them
    for name, worker in tools.items():
        target = folder / "out.onnx"
        target.unlink(missing_ok=True)
        result = worker.ask(limit, "optimize", name, path, target)
        if "failed" not in result:
            result |= judge.ask(limit, "count", target)
            if row["runs"]:
                compared = judge.ask(limit, "compare", path, target)
                result |= compared if "failed" not in compared else {"unusable": compared["failed"]}
            if with_latency and name == "fastbn":
                row["latency_ms"] = judge.ask(limit, "latency", path, target)
        row["tools"][name] = result
    return row


def cell(result):
    """Return what a table says of one tool and one model: BN left, and what was wrong."""
    if "failed" in result:
        return "failed"
    if "unusable" in result:
        return f"{result['bn']} (does not run)"
    return f"{result['bn']} ({result['error']:.0e})" if "error" in result else f"{result['bn']} (not compared)"


def tables(rows, tools):
    """Return the tables as lines of Markdown."""
    lines = [f"| model | BN | nodes | {' | '.join(tools)} |", "|---" * (3 + len(tools)) + "|"]
    for row in rows:
        cells = [cell(row["tools"][name]) for name in tools]
        lines.append(f"| {row['model']} | {row.get('bn', '?')} | {row.get('nodes', '?')} | {' | '.join(cells)} |")
    lines += [
        "",
        "| tool | models | failed | wrong or not running | BN left | nodes left | worst error | CPU seconds | peak MB |",
        "|---" * 9 + "|",
    ]
    for name in tools:
        results = [row["tools"][name] for row in rows]
        good = [each for each in results if "failed" not in each]
        # A model that a tool failed on keeps what it had.
        left = [sum(row["tools"][name].get(key, row.get(key, 0)) for row in rows) for key in ("bn", "nodes")]
        wrong = sum("unusable" in each or each.get("error", 0) > WRONG for each in good)
        worst = max((each["error"] for each in good if "error" in each), default=0.0)
        seconds, peak = sum(each["seconds"] for each in good), max((each["peak_mb"] for each in good), default=0.0)
        cells = [name, len(results), len(results) - len(good), wrong, *left, f"{worst:.1e}", f"{seconds:.1f}", f"{peak:.0f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    timed = [row for row in rows if row.get("latency_ms") and "failed" not in row["latency_ms"]]
    if timed:
        threads = sorted({key.split()[1] for row in timed for key in row["latency_ms"]})
        head = [f"{which}, {number} thread{'s' if number != '1' else ''}" for number in threads for which in ("before", "after")]
        lines += ["", f"| model | {' | '.join(head)} |", "|---" * (1 + len(head)) + "|"]
        for row in timed:
            times = [row["latency_ms"][f"{which} {number}"] for number in threads for which in ("original", "folded")]
            lines.append(f"| {row['model']} | {' | '.join(f'{time:.3f} ms' for time in times)} |")
    return lines


# No rounding explains more than this part of the largest element.
WRONG = 1e-2


def main():
    if sys.argv[1:2] == ["--serve"]:
        serve(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--limit", type=float, default=120)
    parser.add_argument("--tool", action="append", choices=TOOLS)
    parser.add_argument("--peers", default=sys.executable)
    parser.add_argument("--latency", action="store_true")
    options = parser.parse_args()
    tools = chosen(options.tool, options.peers)
    if not options.folder.is_dir():
        raise SystemExit(f"Cannot read '{options.folder}': it is no folder")
    rows, judge = [], Worker(sys.executable, *JUDGE)
    with tempfile.TemporaryDirectory() as folder:
        for path in sorted(options.folder.rglob("*.onnx")):
            rows.append(measure(path, tools, judge, Path(folder), options.limit, options.latency))
            print(path.name, *(f"{name}: {cell(result)}" for name, result in rows[-1]["tools"].items()), sep="   ", file=sys.stderr)
    for worker in (judge, *tools.values()):
        worker.end()
    print("\n".join(tables(rows, list(tools))))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
