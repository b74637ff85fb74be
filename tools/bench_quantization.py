#!/usr/bin/env python3
"""What int8 loses: calibrated on random numbers, without data (--data-free) before its layers are equalized, after that, and with the
better of these two as `deploy` finds it on synthetic inputs of a seed of its own, and on real data.

    python tools/bench_quantization.py MODEL[=DATA] ... [--samples N] [--per-tensor] [--json FILE]

Every model is quantized in each of these ways by `fastbn deploy`, whatever it loses, and run beside the original with onnxruntime's
optimizer off: on the data, or, where there are none, on synthetic inputs of another seed, which say less. The cells are the relative error
of the worst output, its SQNR in dB, the decisions that agree and, with labels, the accuracy. The last column is what `deploy` ships without
being forced, and the latency of int8 beside the original on one thread, with its 99 % interval. Then come geometric means of the errors, as
parts of what random calibration loses.
"""

import argparse
import json
import math
import platform
import sys
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import onnxruntime

import fastbn
from fastbn.deployment import data_free
from fastbn.deployment.compare import REFERENCE, Original, compare
from fastbn.deployment.equalization_trial import EqualizationTrial
from fastbn.deployment.options import Options
from fastbn.deployment.samples import random_samples, read_samples
from fastbn.deployment.stages import marks_for
from fastbn.deployment.verdict import Judge
from fastbn.graph.model import storage
from fastbn.graph.model.index import Index
from fastbn.graph.runtime import Runnable, session

WAYS = ("random", "data-free", "equalized", "kept", "data")


def inputs(index, reference, data, samples):
    """Return what a model is compared on: its data, or synthetic inputs that are not those of the calibration."""
    if data:
        return read_samples(data, index, samples, ignore_unknown=True)
    like = random_samples(reference, index, {}, 1, 1)
    like = random_samples(reference, index, {}, 1, data_free.feeds_wanted(like.feeds[0]))
    like.feeds[:] = data_free.data_free(index, like.feeds, 1).feeds
    return like


def quantized(model, data, options):
    """Return {way: bytes of the model that is calibrated in this way}, without those that int8 refuses, and the trial of equalization."""

    def made(**more):
        return fastbn.deploy(model, quantize=True, max_drop=1, float_nodes=0, runs=1, **options, **more)

    kept = made(data_free=True)
    trial = kept.quantization.equalization
    found = {"random": made().quantized, "data-free": kept.quantized, "equalized": kept.quantized, "kept": kept.quantized}
    if trial is not None:
        other, is_kept = ("data-free", False) if trial.kept else ("equalized", True)
        with mock.patch.object(EqualizationTrial, "kept", is_kept):
            found[other] = made(data_free=True).quantized
    if data:
        found["data"] = made(data=data, ignore_unknown=True).quantized
    return {way: proto for way, proto in found.items() if proto is not None}, trial


def measured(model, data, samples, per_tensor):
    """Return {way: (relative error, decisions that agree or None, accuracy or None)} of a model, the trial of equalization, and what is
    shipped."""
    index = Index(storage.load(model), True)
    reference = Runnable.of(index.source).session()
    given = inputs(index, reference, data, samples)
    options = {"freeze_inputs": True, "per_tensor": per_tensor, "most_samples": samples}
    judge = Judge.of(Options(), index, given.labels is not None)
    marks = marks_for(reference, index, given, judge)
    with tempfile.TemporaryDirectory() as folder:
        stages = {}
        protos, trial = quantized(model, data, options)
        for way, proto in protos.items():
            path = Path(folder) / f"{way}.onnx"
            path.write_bytes(proto)
            stages[way] = session(str(path), optimize=True)
        compared = compare(Original(reference), stages, given.feeds, judge.scores, None, None if marks is None else marks.note)
    found = {}
    for way, agreements in compared.items():
        errors = [] if isinstance(agreements, str) else [each.relative for each in agreements if each.relative is not None]
        if not errors:  # onnxruntime cannot run it, or no output can be compared
            continue
        decisions = [each.top1 for each in agreements if each.top1 is not None]
        accuracy = None if marks is None else marks.accuracy(way, REFERENCE).part
        found[way] = max(errors), min(decisions, default=None), accuracy
    more = {"data": data, "ignore_unknown": True} if data else {"data_free": True}
    return found, trial, shipped(fastbn.deploy(model, quantize=True, **options, **more))


def shipped(made):
    """Return what is shipped, and the latency of int8."""
    rows = [row for row in made.latency if row["model"] == "quantized" and row["threads"] == 1]
    times = [f"int8 {row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f})" for row in rows if row["low"] is not None]
    refused = made.quantization.refused or next((stage.refused for stage in made.stages if stage.name == "quantized"), "")
    reason = "" if made.shipped == "quantized" else "too large a loss" if refused and "beside" not in refused else "no faster"
    return "; ".join(filter(None, [made.shipped, *times, reason]))


def cell(found):
    if found is None:
        return "-"
    relative, decisions, accuracy = found
    text = f"{relative:.2g}, {-20 * math.log10(relative):.0f} dB" + ("" if decisions is None else f", {decisions:.1%}")
    return text + ("" if accuracy is None else f", accuracy {accuracy:.1%}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", metavar="MODEL[=DATA]", nargs="+")
    parser.add_argument("--samples", type=int, default=360)
    parser.add_argument("--per-tensor", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = {}
    print(f"onnxruntime {onnxruntime.__version__}, {platform.machine()}\n")
    print(f"| | {' | '.join(WAYS)} | shipped |", "|---" * (len(WAYS) + 2) + "|", sep="\n")
    for text in options.models:
        model, _, data = text.partition("=")
        name = f"{Path(model).stem}{'' if data else ' (synthetic)'}"
        try:
            rows[name], trial, what = measured(model, data or None, options.samples, options.per_tensor)
        except fastbn.FastbnError as error:
            print(f"| {name} | {error} |", flush=True)
            continue
        print(f"| {name} | {' | '.join(cell(rows[name].get(way)) for way in WAYS)} | {what} |", flush=True)
        print(f"    {trial or 'nothing equalized'}", file=sys.stderr, flush=True)
    for way in WAYS[1:]:
        whole = [found for found in rows.values() if way in found and "random" in found and ("data" in found or way != "data")]
        real = [found for found in whole if "data" in found]
        for kind, some in (("all", whole), ("those with real data", real)):
            logs = [math.log(found[way][0] / found["random"][0]) for found in some]
            if logs:
                print(f"\n{way} loses {np.exp(np.mean(logs)):.2f} of what random calibration loses, geometric mean of {len(logs)} ({kind})")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
