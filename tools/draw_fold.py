#!/usr/bin/env python3
"""Draw folds as the report does, before and after, each as a file of SVG.

    python tools/draw_fold.py MODEL BN FILE.svg     the fold of the batch normalization whose name contains BN
    python tools/draw_fold.py --docs                the drawings of README.md and docs/, again from the models that ship

Needs jinja2. A MODEL may be compressed by gzip.
"""

import gzip
import re
import sys
from pathlib import Path

import onnx

import fastbn
from fastbn.deployment.report import template
from fastbn.graph.drawing import draw_fold
from fastbn.graph.fold_result import planning_of

ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / "tests" / "models"
EXPORTERS = MODELS / "exporters"

# Drawing of docs/images -> model and a part of the name of its batch normalization.
DRAWINGS = {
    "fold.svg": (MODELS / "keras_digits.onnx", "batch_norm"),
    "absorbed.svg": (MODELS / "small_cnn.onnx", "/block2/bn2"),
    "sideways.svg": (EXPORTERS / "repvgg.dynamo.onnx.gz", "training_2__0"),
    "undone.svg": ("", "bn"),
}

# A block with a shortcut: the convolution there reads what the batch normalization reads.
BLOCK = """<ir_version: 8, opset_import: ["" : 17]> block (float[1,3,8,8] x) => (float[1,4,8,8] y)
<float[4,3,1,1] w = {W}, float[4,4,1,1] w2 = {W2}, float[4,4,1,1] w3 = {W2}, float[4] s = {1.5,2,-1,0.5}, float[4] b = {1,2,3,4},
 float[4] m = {1,-1,2,0.5}, float[4] v = {1,2,3,4}> {
 [first] c = Conv (x, w)  [bn] n = BatchNormalization (c, s, b, m, v)  [relu] r = Relu (n)  [second] d = Conv (r, w2)
 [shortcut] e = Conv (c, w3)  [sum] y = Add (d, e) }"""

MARGIN, CAPTION = 12, 26


def read(path):
    """Return a model: the block if no path is given."""
    if not path:
        numbers = {"{W2}": 16, "{W}": 12}
        text = BLOCK
        for mark, count in numbers.items():
            text = text.replace(mark, "{" + ", ".join(str(1 + number % 5) for number in range(count)) + "}")
        return onnx.parser.parse_model(text)
    data = Path(path).read_bytes()
    return gzip.decompress(data) if Path(path).suffix == ".gz" else data


def fold_of(path, name):
    """Return (before, after): the two Drawings of one fold."""
    result = fastbn.fold(read(path), verify=False)
    planning = planning_of(result)
    for fold, plan in zip(result.folded, planning.folds, strict=True):
        if name in fold.bn:
            return draw_fold(plan, planning)
    raise SystemExit(f"Cannot draw '{name}': folded are {', '.join(fold.bn for fold in result.folded)}")


def style():
    """Return what the style sheet of the report says of drawings, with its colors."""
    css = (Path(fastbn.__file__).parent / "deployment" / "report.css").read_text(encoding="utf-8")
    colors, dark = re.findall(r"^ *:root \{.*?\n *\}", css, re.DOTALL | re.MULTILINE)[:2]
    rules = re.findall(r"^svg ([^{].*)$", css, re.MULTILINE)
    return "\n".join([colors, f"@media (prefers-color-scheme: dark) {{\n{dark}\n}}", *rules])


def picture(before, after):
    """Return SVG with both drawings side by side."""
    macro = template("drawing.svg.j2").module.svg
    width = before.width + after.width + 3 * MARGIN
    height = max(before.height, after.height) + CAPTION + 2 * MARGIN
    parts = []
    for number, (drawing, x) in enumerate([(before, MARGIN), (after, before.width + 2 * MARGIN)]):
        parts.append(f'<text x="{x + drawing.width / 2:.1f}" y="{MARGIN + 14}">{drawing.title}</text>')
        drawn = re.sub(r"\n+", "\n", str(macro(drawing, f"part{number}"))).strip()
        parts.append(drawn.replace("<svg ", f'<svg x="{x}" y="{MARGIN + CAPTION}" ', 1))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    font = "font-family=\"system-ui, 'Segoe UI', Roboto, 'Liberation Sans', sans-serif\""
    page = f'<rect class="page" width="{width}" height="{height}" rx="6"/>'
    css = style() + "\n.page { fill: var(--page); stroke: none; }"
    return "\n".join([f"{head} {font}>", f"<style>\n{css}\n</style>", page, *parts, "</svg>\n"])


def main():
    if sys.argv[1:] == ["--docs"]:
        jobs = [(*what, ROOT / "docs" / "images" / name) for name, what in DRAWINGS.items()]
    elif len(sys.argv) == 4:
        jobs = [tuple(sys.argv[1:])]
    else:
        raise SystemExit(__doc__)
    for model, name, target in jobs:
        Path(target).write_text(picture(*fold_of(model, name)), encoding="utf-8")


if __name__ == "__main__":
    main()
