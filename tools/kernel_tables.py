"""The figures of bench_kernels as text: a line for each case, means over shapes, the table of docs/benchmarks.md, a chart."""

import itertools
import math
from pathlib import Path

OPERATIONS = ("train", "backward", "backward new", "infer", "fused")


LETTERS = {
    "fastbn": "f",
    "numpy": "n",
    "torch": "t",
    "onnxruntime": "o",
    "onednn": "d",
    "onednn blocked": "b",
    "jax": "j",
    "tensorflow": "k",
}


# What fastbn and the best of the peers are compared at; a backward pass of a peer that allocates its result counts as one that does not.
BEST_OF = ("train", "backward", "infer")


LARGE = 16 << 20  # bytes of a tensor above which the summary counts it as larger than the cache


ROOFS = ("copy", "streaming copy", "read")


def find(records, side, operation, **where):
    wanted = {"side": side, "operation": operation, **where}
    times = [record["us"] for record in records if all(record[key] == value for key, value in wanted.items())]
    return times[0] if times else None


def print_case(records, case):
    """A line per thread count: the copy in microseconds, then fastbn and the peers as multiples of it."""
    threads = sorted({record["threads"] for record in records})
    for count in threads:
        where = {"shape": case.shape, "layout": case.layout, "dtype": case.dtype.name, "threads": count}
        copy = find(records, "copy", "roof", **where)
        cells = [f"{case.shape!s:22} {case.layout} {case.dtype.name:8} {count} copy {copy:9.1f}us"]
        for roof in ROOFS[1:]:
            us = find(records, roof, "roof", **where)
            if us:
                cells.append(f"{roof} {us / copy:.2f}")
        for operation in OPERATIONS:
            times = {letter: find(records, side, operation, **where) for side, letter in LETTERS.items()}
            cells.append(f"{operation} " + " ".join(f"{letter}{us / copy:.2f}" for letter, us in times.items() if us))
        print(" | ".join(cells), flush=True)


def best_peer(records, record, any_layout):
    """The least time of a peer at what a record of fastbn times, in its layout or in any, and its name; None where no peer has it."""
    names = ("backward", "backward new") if record["operation"] == "backward" else (record["operation"],)
    same = ("shape", "dtype", "threads") if any_layout else ("shape", "dtype", "threads", "layout")
    times = [
        (other["us"], other["side"])
        for other in records
        if other["side"] not in ("fastbn", *ROOFS)
        and (any_layout or other["side"] != "onednn blocked")
        and other["operation"] in names
        and all(other[key] == record[key] for key in same)
    ]
    return min(times, default=(None, None))


def markdown(records):
    """The table of docs/benchmarks.md: float32, fastbn and the best peers as multiples of a copy, a row for each number of threads."""
    lines = [
        "| shape | layout | threads | copy us | train: fastbn / same layout / any | backward: fastbn / same layout / any "
        "| infer: fastbn / same layout / any | infer+residual+relu: fastbn / torch |",
        "|---|---|---|---|---|---|---|---|",
    ]
    cases = dict.fromkeys((record["shape"], record["layout"], record["threads"]) for record in records if record["dtype"] == "float32")
    for shape, layout, threads in cases:
        where = {"shape": shape, "layout": layout, "dtype": "float32", "threads": threads}
        copy = find(records, "copy", "roof", **where)

        def multiples(operation, where=where, copy=copy):
            own = {**where, "operation": operation, "us": find(records, "fastbn", operation, **where)}
            peers = [best_peer(records, own, any_layout) for any_layout in (False, True)]
            cells = [f"{own['us'] / copy:.2f}", *(f"{us / copy:.2f} {LETTERS[side]}" if us else "-" for us, side in peers)]
            return " / ".join(cells)

        fused = [find(records, side, "fused", **where) for side in ("fastbn", "torch")]
        cells = [
            "x".join(map(str, shape)),
            layout if len(shape) > 2 else "NC",
            str(threads),
            f"{copy:.0f}" if copy > 20 else f"{copy:.1f}",
            *(multiples(operation) for operation in BEST_OF),
            " / ".join(f"{us / copy:.2f}" if us else "-" for us in fused),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    lines.append("Best peers: " + ", ".join(f"{letter} {side}" for side, letter in LETTERS.items() if side != "fastbn") + ".")
    return "\n".join(lines)


def against_best(records):
    """Per number of threads, how often a peer is faster, the geometric mean and the worst cases of best peer over fastbn."""
    lines = []
    for threads in sorted({record["threads"] for record in records}):
        for any_layout in (False, True):
            ratios = []
            for record in records:
                if record["side"] == "fastbn" and record["threads"] == threads and record["operation"] in BEST_OF:
                    peer, _ = best_peer(records, record, any_layout)
                    if peer:
                        ratios.append((peer / record["us"], record))
            ratios.sort(key=lambda item: item[0])
            if not ratios:
                continue
            mean = math.exp(sum(math.log(ratio) for ratio, _ in ratios) / len(ratios))
            where = "any layout" if any_layout else "the same layout"
            slower = [item for item in ratios if item[0] < 1]
            lines.append(f"{threads} threads, best peer of {where}: {mean:.2f}x in the mean, {len(slower)} of {len(ratios)} cases slower")
            lines += [f"  {ratio:.2f}x {case['shape']} {case['layout']} {case['dtype']} {case['operation']}" for ratio, case in slower]
    return lines


def scaling(records):
    """Per number of threads above the least, the geometric mean of fastbn's time on the least over that on these, and the cases that are
    slower than on any fewer threads."""
    counts = sorted({record["threads"] for record in records})
    times = {}
    for record in records:
        if record["side"] == "fastbn" and record["operation"] in BEST_OF:
            case = record["shape"], record["layout"], record["dtype"], record["operation"]
            times.setdefault(case, {})[record["threads"]] = record["us"]
    lines = []
    for threads in counts[1:]:
        gains = {case: min(us[count] for count in counts if count < threads) / us[threads] for case, us in times.items()}
        mean = math.exp(sum(math.log(us[counts[0]] / us[threads]) for us in times.values()) / len(times))
        slower = sorted((gain, case) for case, gain in gains.items() if gain < 1)
        lines.append(
            f"fastbn on {threads} threads: {mean:.2f}x {counts[0]} in the mean, {len(slower)} of {len(gains)} cases slower than on fewer"
        )
        lines += [f"  {gain:.2f}x {shape} {layout} {dtype} {operation}" for gain, (shape, layout, dtype, operation) in slower]
    return lines


def summary(records):
    """The figures of the project's targets: geometric means over shapes against each peer."""
    lines = against_best(records) + scaling(records)
    for operation, layout, large in itertools.product(OPERATIONS, ("NCHW", "NHWC"), (True, False)):
        multiples = []
        for record in records:
            if (record["side"], record["operation"], record["layout"]) != ("fastbn", operation, layout) or record["threads"] != 1:
                continue
            if record["dtype"] == "float32" and (record["bytes"] >= LARGE) == large:
                same = {key: record[key] for key in ("shape", "layout", "dtype", "threads")}
                multiples.append(record["us"] / find(records, "copy", "roof", **same))
        if multiples:
            where = "above" if large else "below"
            mean = math.exp(sum(map(math.log, multiples)) / len(multiples))
            lines.append(
                f"float32 {operation} {layout}, tensors {where} {LARGE >> 20} MB: {mean:.2f}x copy "
                f"({min(multiples):.2f} to {max(multiples):.2f}, {len(multiples)} shapes)"
            )
    for dtype in sorted({record["dtype"] for record in records}):
        for peer in ("torch", "onnxruntime", "numpy"):
            for operation in OPERATIONS:
                for layout in ("NCHW", "NHWC"):
                    ratios = []
                    for record in records:
                        same = {key: record[key] for key in ("shape", "layout", "dtype", "threads")}
                        if record["side"] != peer or record["operation"] != operation or record["layout"] != layout:
                            continue
                        if record["dtype"] == dtype and record["threads"] == 1:
                            ratios.append(record["us"] / find(records, "fastbn", operation, **same))
                    if ratios:
                        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
                        lines.append(f"{dtype} {operation} {layout}: {mean:.1f}x {peer} (least {min(ratios):.1f}x, {len(ratios)} shapes)")
    return lines


def chart(records, path):
    """Bars of training forward at one thread, each side as a multiple of a copy, on a logarithmic axis."""
    colors = {"fastbn": "#1b7f5c", "torch": "#d1603d", "numpy": "#8a8f98"}
    kept = [
        record
        for record in records
        if record["dtype"] == "float32" and record["threads"] == 1 and record["operation"] == "train" and record["side"] in colors
    ]
    cases = list(dict.fromkeys((record["shape"], record["layout"]) for record in kept))
    left, width, line = 190, 620, 12
    height = len(cases) * (line * 3 + 10) + 60
    first, decades = 0.5, math.log10(500 / 0.5)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 60}" height="{height}" font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{left}" y="16" font-size="13">Training, float32, one thread: copies, logarithmic from 0.5 (less is better)</text>',
    ]
    for number, (side, color) in enumerate(colors.items()):
        parts.append(f'<rect x="{left + number * 90}" y="24" width="10" height="10" fill="{color}"/>')
        parts.append(f'<text x="{left + number * 90 + 14}" y="33">{side}</text>')
    y = 48
    for shape, layout in cases:
        parts.append(f'<text x="{left - 6}" y="{y + 20}" text-anchor="end">{"x".join(map(str, shape))} {layout}</text>')
        copy = find(records, "copy", "roof", shape=shape, layout=layout, dtype="float32", threads=1)
        for side, color in colors.items():
            us = find(records, side, "train", shape=shape, layout=layout, dtype="float32", threads=1)
            if us:
                length = width * math.log10(max(us / copy, first * 1.02) / first) / decades
                parts.append(f'<rect x="{left}" y="{y}" width="{length:.0f}" height="{line - 2}" fill="{color}"/>')
                parts.append(f'<text x="{left + length + 4:.0f}" y="{y + 9}" font-size="9">{us / copy:.1f}</text>')
            y += line
        y += 10
    parts.append("</svg>")
    Path(path).write_text("\n".join(parts) + "\n")
