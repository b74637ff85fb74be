"""The HTML report of reestimate: what it says, in order, escaped; where it goes."""

import re
from pathlib import Path

import numpy as np
import pytest
from shell import fails
from sketch import model, norm, normal
from statistics_truth import branches, images
from test_deploy_report import Page

from fastbn import reestimate
from fastbn.cli import main

pytest.importorskip("jinja2")

MODELS = Path(__file__).resolve().parent / "models"


def shown_by(html):
    return " ".join(Page(html).text.split())


def widths(html):
    return re.findall(r'class="bar" style="width:([0-9.]+)%', html)


def test_the_report_of_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["reestimate", str(MODELS / "torch_digits.onnx"), "out.onnx", "--data", str(MODELS / "dark_digits.npz"), "--workers", "0"]
    assert main([*command, "--report", "r.html"]) == 0
    assert "report  r.html" in capsys.readouterr().out
    html = Path("r.html").read_text(encoding="utf-8")
    assert "http" not in re.sub(r"http-equiv", "", html)
    shown = shown_by(html)
    assert "The old statistics did not fit the data" in shown
    assert "1 of 1 moved by more than 0.25 std, on the way of the data first 'node__native_batch_norm" in shown
    assert "by 0.69 std in channel 3 of 32: mean +0.48 std, std x 0.5; typically 0.65; 75264 values" in shown
    assert "fastbn reestimate" in shown
    assert widths(html) == ["100.00"]
    before = Path("out.onnx").read_bytes()
    line = fails(capsys, *command, "--report", "r.html")
    assert "Cannot write the report to 'r.html': it exists; --force replaces it" in line
    assert main([*command, "--report", "r.html", "--force", "--dry-run", "-q"]) == 0
    assert Path("out.onnx").read_bytes() == before
    assert "that is the input or the output" in fails(capsys, *command, "--report", "out.onnx")


def test_norms_stand_in_the_order_of_the_data(tmp_path):
    result = reestimate(branches(), {"x": images()})
    result.save_report(tmp_path / "r.html")
    assert (tmp_path / "r.html").read_text(encoding="utf-8") == result.page()
    levels = [int(level) for level in re.findall(r"level (\d)", shown_by(result.page()))]
    assert levels == sorted(levels)
    assert len(levels) == 5


def test_names_are_escaped_and_what_stays_is_named():
    text = "(float[N, 2] x) => (float[N, 2] y) { z = BatchNormalization (x, s, t, m, v) y = BatchNormalization (z, s, t, m, v) }"
    proto = model(text, **norm(2))
    for node, name in zip(proto.graph.node, ("<script>alert(1)</script>", "b\u202e&"), strict=True):
        node.name = name
    result = reestimate(proto, normal(9, 2), skip="b*")
    html = result.page()
    assert "<script" not in html
    assert "\u202e" not in html
    shown = shown_by(html)
    assert "<script>alert(1)</script>" in shown
    assert "--only or --skip leaves it out" in shown


def test_nothing_to_do_and_statistics_that_were_none():
    nothing = reestimate(model("(float[N, 2] x) => (float[N, 2] y) { y = Relu (x) }"), normal(9, 2))
    assert "Nothing to do" in shown_by(nothing.page())
    broken = {**norm(2), "v": np.float32([np.nan, 1])}
    text = "(float[N, 2] x) => (float[N, 2] y) { y = BatchNormalization (x, s, t, m, v) }"
    html = reestimate(model(text, **broken), normal(9, 2)).page()
    assert widths(html) == ["100.00"]
    assert "by inf std in channel 0" in shown_by(html)
