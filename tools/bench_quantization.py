#!/usr/bin/env python3
"""What int8 loses on real data: calibrated on random numbers, without data (--data-free), and on the data themselves.

    python tools/bench_quantization.py MODEL=DATA ... [--samples N] [--freeze-inputs] [--json FILE]

Every model is quantized three times by `fastbn deploy`, each time whatever it loses, and then run on the data beside the original with
onnxruntime's optimizer off. The cells are the relative error of the worst output, its SQNR in dB and the decisions that agree; the last
rows are geometric means of the errors, as parts of what random calibration loses.
"""

import argparse
import json
import math
import platform
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime

import fastbn
from fastbn.deployment.compare import Original, compare
from fastbn.deployment.samples import read_samples
from fastbn.deployment.scores import score_outputs
from fastbn.graph.model import storage
from fastbn.graph.model.index import Index
from fastbn.graph.runtime import Runnable, session

WAYS = ("random", "data-free", "data")


def measured(model, data, samples, freeze_inputs):
    """Return {way: (relative error, decisions that agree or None)} of a model; a way that int8 refuses is missing."""
    index = Index(storage.load(model), freeze_inputs)
    feeds = read_samples(data, index, samples).feeds
    options = {"quantize": True, "max_drop": 1, "float_nodes": 0, "runs": 1, "freeze_inputs": freeze_inputs}
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        stages = {}
        for way in WAYS:
            more = {"data": data, "most_samples": samples} if way == "data" else {"data_free": way == "data-free"}
            made = fastbn.deploy(model, **options, **more)
            if made.quantized is not None:
                path = Path(folder) / f"{way}.onnx"
                path.write_bytes(made.quantized)
                stages[way] = session(str(path), optimize=True)
        compared = compare(Original(Runnable.of(index.source).session()), stages, feeds, score_outputs(index))
    for way, agreements in compared.items():
        errors = [each.relative for each in agreements if each.relative is not None]
        decisions = [each.top1 for each in agreements if each.top1 is not None]
        found[way] = max(errors), min(decisions, default=None)
    return found


def cell(found):
    if found is None:
        return "refused"
    relative, decisions = found
    return f"{relative:.2g}, {-20 * math.log10(relative):.0f} dB" + ("" if decisions is None else f", {decisions:.1%}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", metavar="MODEL=DATA", nargs="+")
    parser.add_argument("--samples", type=int, default=360)
    parser.add_argument("--freeze-inputs", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = {}
    print(f"onnxruntime {onnxruntime.__version__}, {platform.machine()}\n")
    print(f"| | {' | '.join(WAYS)} |", "|---" * 4 + "|", sep="\n")
    for text in options.models:
        model, _, data = text.partition("=")
        found = rows[Path(model).stem] = measured(model, data, options.samples, options.freeze_inputs)
        print(f"| {Path(model).stem} | {' | '.join(cell(found.get(way)) for way in WAYS)} |", flush=True)
    whole = [found for found in rows.values() if len(found) == len(WAYS)]
    for way in WAYS[1:]:
        logs = [math.log(found[way][0] / found["random"][0]) for found in whole]
        print(f"\n{way} loses {np.exp(np.mean(logs)):.2f} of what random calibration loses, in the geometric mean of {len(logs)}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
