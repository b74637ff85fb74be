#!/usr/bin/env python3
"""What `fastbn deploy --quantize` makes of models: latency of each stage beside the original, kernels left in float, agreement.

    python tools/bench_deploy.py MODEL[=DATA] ... [--for latency|size|memory] [--runs N] [--max-drop X] [--freeze-inputs] [--json FILE]

Every model is deployed on its data, on seeded random inputs without. The stages are timed in blocks of random order, on one thread and on
all: the cells are the median in ms, and how many times as long as the original a stage takes, with the 99 % interval.
"""

import argparse
import json
from pathlib import Path

import fastbn


def row_of(made):
    """Return the figures of a Deployment as a dict that JSON holds; of a file name that spells its path, the last part is the model's."""
    return {"model": Path(made.fold.to_dict()["model"]).stem.rpartition("__")[2], **made.to_dict()}


def latency(row, stage, threads):
    latency = next((each for each in row["latency"] if (each["model"], each["threads"]) == (stage, threads)), None)
    if latency is None:
        return "-"
    interval = "" if latency["low"] is None or stage == "original" else f" ({latency['low']:.2f} to {latency['high']:.2f})"
    return f"{latency['median_ms']:.3f}, {latency['ratio']:.2f}{interval}"


def agreement(row, stage):
    """Return the relative error of the worst output, and the decisions that agree where there are any."""
    record = next((each for each in row["stages"] if each["name"] == stage), None)
    if record is None:
        return "refused"
    relative = max((float(output["relative"]) for output in record["outputs"] if output["relative"] is not None), default=float("nan"))
    if record["accuracy"] is not None:
        return f"{relative:.1e}, accuracy {record['accuracy']['accuracy']:.1%}"
    decisions = [output["top1"] for output in record["outputs"] if output["top1"] is not None]
    return f"{relative:.1e}" + (f", {min(decisions):.1%} of {row['data']['rows']}" if decisions else "")


def tables(rows):
    """Return the tables as lines of Markdown."""
    threads = sorted({each["threads"] for row in rows for each in row["latency"]})
    lines = []
    for number in threads:
        lines += [f"| {number} thread{'s' * (number > 1)} | original, ms | folded | quantized |", "|---" * 4 + "|"]
        for row in rows:
            lines.append(f"| {row['model']} | {' | '.join(latency(row, stage, number) for stage in ('original', 'folded', 'quantized'))} |")
        lines.append("")
    lines += [
        "| | BN | float kernels: raw | pre-processed | folded | folded: error, top-1 | quantized: error, top-1 | shipped |",
        "|---" * 8 + "|",
    ]
    for row in rows:
        counts = row["fold"]["batch_normalizations"]
        floats = row["quantization"]["float_kernels"]
        kernels = [floats.get(key, "-") for key in ("unfolded_raw", "unfolded", "folded")]
        cells = [row["model"], f"{counts['before']} -> {counts['after']}", *kernels, agreement(row, "folded"), agreement(row, "quantized")]
        lines.append(f"| {' | '.join('fails' if cell is None else str(cell) for cell in cells)} | {row['shipped'] or 'nothing'} |")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", metavar="MODEL[=DATA]", nargs="+")
    parser.add_argument("--runs", type=int)
    parser.add_argument("--max-drop", type=float)
    parser.add_argument("--for", dest="goal", default="latency")
    parser.add_argument("--freeze-inputs", action="store_true")
    parser.add_argument("--samples", type=int, default=360)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    for text in options.models:
        model, _, data = text.partition("=")
        made = fastbn.deploy(
            model,
            data=data or None,
            quantize=True,
            runs=options.runs,
            max_drop=options.max_drop,
            goal=options.goal,
            freeze_inputs=options.freeze_inputs,
            most_samples=options.samples,
        )
        rows.append(row_of(made))
    print("\n".join(tables(rows)))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
