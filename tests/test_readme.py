"""What README.md says is what happens: its run, its commands, its reasons, options, fields and exit codes."""

import re
from pathlib import Path

import pytest
from shell import as_json, classifier_folder

import fastbn
from fastbn import cli
from fastbn.cli import main
from fastbn.deployment.result import STATUS
from fastbn.graph.reasons import REASONS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DEPLOY = README.split("\n## Deploy\n")[1].split("\n## ")[0]


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


def test_the_readme_knows_every_option(capsys):
    with pytest.raises(SystemExit):
        main(["deploy", "--help"])
    options = set(re.findall(r"--[a-z-]+", capsys.readouterr().out)) - {"--help", "--quiet"}
    usage = re.search(r"^    fastbn deploy IN OUT \[--data.*?\n\n", DEPLOY, re.DOTALL | re.MULTILINE)[0]
    assert set(re.findall(r"--[a-z-]+", usage)) == options


def test_the_readme_knows_every_field_of_the_json_report(tmp_path, capsys, monkeypatch):
    classifier_folder(tmp_path, monkeypatch)
    report = as_json(capsys, "--data", "data.npz", "--quantize", "--max-drop", "1")
    named = set(re.findall(r"`([a-z0-9_]+)`", README.split("That of `deploy`")[1].split("\n\n")[0]))

    def fields(value):
        for key, inside in value.items() if isinstance(value, dict) else ():
            yield key
            if key not in ("fold", "versions", "float_ops"):
                yield from fields(inside)
        for inside in value if isinstance(value, list) else ():
            yield from fields(inside)

    assert set(fields(report)) <= named
    assert set(STATUS) <= named


def test_the_readme_knows_every_exit_code():
    table = README.split("| exit code | meaning |\n")[1].split("\n\n")[0]
    codes = [int(code) for code in re.findall(r"^\| (\d+) \| ", table, re.MULTILINE)]
    assert codes == [cli.DONE, cli.FAILED, cli.UNUSABLE, cli.LEFT, cli.PARTIAL, cli.UNVERIFIED, cli.FAULT, cli.INTERRUPTED]
