"""What README.md says is what happens: its run, its commands, its reasons."""

import re
from pathlib import Path

import pytest

import fastbn
from fastbn.cli import main
from fastbn.graph.reasons import REASONS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["small_cnn", "torch_digits", "keras_digits"])
def test_the_run_is_a_real_one(name, small_cnn, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["fold", str(small_cnn.with_name(f"{name}.onnx")), "folded.onnx"]) == 0
    shown = "".join(f"    {line}\n" for line in capsys.readouterr().out.splitlines())
    # Rounding differs from one CPU to another: the measured numbers may, nothing else.
    numbers = r"worst \S+ at \S+ \(.*?\)|(error|allowed) [0-9.e+-]+|of [0-9.e+-]+ allowed"
    assert re.sub(numbers, "#", shown) in re.sub(numbers, "#", README)


def test_the_error_is_a_real_one(small_cnn, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small_cnn.onnx").write_bytes(small_cnn.read_bytes())
    assert main(["fold", "small_cnn.onnx", "small_cnn.onnx"]) == 2
    assert f"    {capsys.readouterr().err}" in README


def test_every_reason_is_in_the_table():
    assert re.findall(r"^\| `([a-z-]+)` \| (.*) \|$", README, re.MULTILINE) == list(REASONS.items())


def test_ci_runs_the_command_of_the_readme():
    script = ROOT / ".ci" / "run"
    if not script.exists():
        pytest.skip("no .ci/run in a source distribution")
    assert '.venv/bin/pip install ".[test]" && .venv/bin/python -m pytest' in README
    assert 'pip install --quiet ".[test]" && python -m pytest' in script.read_text(encoding="utf-8")


def test_the_changelog_knows_the_version():
    assert f"## {fastbn.__version__}\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
