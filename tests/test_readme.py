"""README.md and docs/: every block of README.md runs as printed, and what both say is what happens."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from shell import as_json, classifier_folder

import fastbn
from fastbn import cli, commands
from fastbn.cli import main
from fastbn.deployment.result import STATUS
from fastbn.graph.reasons import REASONS
from fastbn.graph.report import wrapped

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
INSTALL = re.compile(r'^python3 -m venv \.venv && \.venv/bin/pip install -e "\.\[([a-z]+)\]" && ', re.MULTILINE)
BLOCKS = re.findall(r"^```(sh|python)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)

# Rounding and time differ from one machine to another: the measured numbers may, nothing else.
NUMBERS = r"worst \S+ at \S+ \(.*?\)|(error|allowed) [0-9.e+-]+|of [0-9.e+-]+ allowed|[0-9.]+ s$"


def page(name):
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


def bare(text):
    return re.sub(NUMBERS, "#", text, flags=re.MULTILINE)


def indented(lines):
    return "".join(f"    {line}\n" for line in lines)


# ---- README.md ----


def test_the_readme_is_short():
    lines = README.splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) <= 140


@pytest.fixture(scope="module", name="clone")
def _clone(tmp_path_factory, environment):
    """A folder as the first command leaves it: the models, and the commands of .venv, those of the environment under test."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "tests").symlink_to(ROOT / "tests")
    (folder / ".venv" / "bin").mkdir(parents=True)
    for name, module in {"fastbn": " -m fastbn", "python": ""}.items():
        script = folder / ".venv" / "bin" / name
        script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)}{module} "$@"\n', encoding="utf-8")
        script.chmod(0o755)
    path = f"{folder / '.venv' / 'bin'}{os.pathsep}{environment['PATH']}"
    return lambda block: subprocess.run(
        ["bash", "-ec", block], cwd=folder, env={**environment, "PATH": path}, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_a_block_runs_as_printed(number, clone):
    """But for the installation, which .ci/run does, and the suite, which would run itself."""
    language, block = BLOCKS[number]
    if "-m pytest" in block:
        pytest.skip("this is the suite")
    if "torch" in block and language == "python":
        pytest.importorskip("torch", reason="PyTorch is not installed")
    if "--report" in block:
        pytest.importorskip("jinja2", reason="the HTML report needs jinja2")
    done = clone(f"python - <<'END'\n{block}\nEND" if language == "python" else INSTALL.sub("", block))
    assert done.returncode == 0, done.stderr
    if "fold-all" in block:
        shown = done.stdout[done.stdout.index("  ok  ") :]
        assert bare(indented(shown.splitlines())) in bare(README)


def test_there_are_blocks():
    assert [language for language, _ in BLOCKS] == ["sh", "sh", "python", "sh", "python", "sh"]


def fold_here(name, small_cnn, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["fold", str(small_cnn.with_name(f"{name}.onnx")), "folded.onnx"]) == 0
    return capsys.readouterr().out.splitlines()


def test_the_run_is_a_real_one(small_cnn, tmp_path, capsys, monkeypatch):
    shown = wrapped(fold_here("small_cnn", small_cnn, tmp_path, capsys, monkeypatch), 120)
    assert bare(indented(shown)) in bare(README)


def test_the_error_is_a_real_one(small_cnn, tmp_path, capsys, monkeypatch):
    name = "tests/models/small_cnn.onnx"
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_bytes(small_cnn.read_bytes())
    monkeypatch.chdir(tmp_path)
    assert f"    $ fastbn fold {name} {name}\n" in README
    assert main(["fold", name, name]) == 2
    assert f"    {capsys.readouterr().err}" in README


def test_ci_runs_the_command_of_the_readme():
    script = ROOT / ".ci" / "run"
    if not script.exists():
        pytest.skip("no .ci/run in a source distribution")
    assert '.venv/bin/pip install -e ".[test]" && .venv/bin/python -m pytest' in README
    assert 'pip install --quiet -e ".[test]" && python -m pytest' in script.read_text(encoding="utf-8")


# ---- docs/ ----


@pytest.mark.parametrize("name", ["torch_digits", "keras_digits"])
def test_the_runs_of_the_digits_are_real_ones(name, small_cnn, tmp_path, capsys, monkeypatch):
    shown = indented(fold_here(name, small_cnn, tmp_path, capsys, monkeypatch))
    assert bare(shown) in bare(page("benchmarks"))


def test_every_reason_is_in_the_table():
    rows = re.findall(r"^\| \[`([a-z-]+)`\]\(#([a-z-]+)\) \| (.*) \|$", page("reasons"), re.MULTILINE)
    assert [(code, meaning) for code, _, meaning in rows] == list(REASONS.items())
    assert all(code == anchor for code, anchor, _ in rows)


def test_the_changelog_knows_the_version():
    assert f"## {fastbn.__version__}\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_page_of_deploy_knows_every_option(capsys):
    with pytest.raises(SystemExit):
        main(["deploy", "--help"])
    options = set(re.findall(r"--[a-z-]+", capsys.readouterr().out)) - {"--help", "--quiet"}
    usage = re.search(r"^    fastbn deploy IN OUT \[--data.*?\n\n", page("deploy"), re.DOTALL | re.MULTILINE)[0]
    assert set(re.findall(r"--[a-z-]+", usage)) == options


@pytest.mark.parametrize("command", [command for command in cli.COMMANDS if command != "deploy"])
def test_a_page_knows_every_option(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    options = set(re.findall(r"--[a-z-]+", capsys.readouterr().out)) - {"--help", "--quiet", "--debug", "--output", "--out"}
    assert options
    text = page({"reestimate": "reestimate", "fold-all": "cluster"}.get(command, "command"))
    usages = re.findall(rf"^ {{4}}fastbn {command} .*(?:\n {{8,}}.*)*", text, re.MULTILINE)
    assert options == set(re.findall(r"--[a-z-]+", usages[-1])) - {"--output"}


def test_the_page_of_json_knows_every_field(tmp_path, capsys, monkeypatch):
    classifier_folder(tmp_path, monkeypatch)
    report = as_json(capsys, "--data", "data.npz", "--quantize", "--max-drop", "1")
    named = set(re.findall(r"`([a-z0-9_]+)`", page("json").split("\nThat of `deploy`")[1].split("\n\n")[0]))

    def fields(value):
        for key, inside in value.items() if isinstance(value, dict) else ():
            yield key
            if key not in ("fold", "versions", "float_ops"):
                yield from fields(inside)
        for inside in value if isinstance(value, list) else ():
            yield from fields(inside)

    assert set(fields(report)) <= named
    assert set(STATUS) <= named


def test_the_page_of_the_command_knows_every_exit_code():
    table = page("command").split("| exit code | meaning |\n")[1].split("\n\n")[0]
    codes = [int(code) for code in re.findall(r"^\| (\d+) \| ", table, re.MULTILINE)]
    assert codes == [
        *(commands.DONE, commands.FAILED, commands.UNUSABLE, commands.LEFT, commands.PARTIAL, commands.UNVERIFIED),
        *(cli.FAULT, cli.INTERRUPTED),
    ]


def links(text):
    """Yield the targets of the links of a page, without those on the network."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    yield from (target for target in re.findall(r"\]\(([^)\s]+)\)", text) if not target.startswith("http"))


def anchors(path):
    """Return the anchors that GitHub and MyST give to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^a-z0-9 _-]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "path", [*(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY")), *sorted((ROOT / "docs").glob("*.md"))]
)
def test_links_lead_somewhere(path):
    for link in links(path.read_text(encoding="utf-8")):
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_drawings_are_those_that_the_code_makes():
    pytest.importorskip("jinja2", reason="drawings need jinja2")
    import draw_fold

    for name, what in draw_fold.DRAWINGS.items():
        drawn = draw_fold.picture(*draw_fold.fold_of(*what))
        assert (ROOT / "docs" / "images" / name).read_text(encoding="utf-8") == drawn, f"python tools/draw_fold.py --docs ({name})"
