"""docs/recipes.md and docs/ci.yml: every block runs as it stands and does what the text says."""

import re
import shutil
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from sketch import assert_same, classifier, normal, run

from fastbn.deployment.measure import kernels_of

DOCS = Path(__file__).resolve().parent.parent / "docs"
RECIPES = (DOCS / "recipes.md").read_text(encoding="utf-8")


def block(heading, language="python"):
    """Return the code under a heading."""
    section = RECIPES.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.search(rf"```{language}\n(.*?)```", section, re.DOTALL)[1]


@pytest.fixture(name="here")
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.onnx").write_bytes(classifier().SerializeToString())
    np.savez(tmp_path / "samples.npz", x=normal(16, 3, 8, 8))
    return tmp_path


def execute(code):
    names = {"__name__": "recipe"}
    exec(compile(code, "docs/recipes.md", "exec"), names)
    return names


def test_quantization_after_folding(here):
    execute(block("Quantize with onnxruntime after folding"))
    count = Counter(node.op_type for node in onnx.load("quantized.onnx").graph.node)
    assert count["BatchNormalization"] == 0
    assert count["QuantizeLinear"] > 2
    x = np.load("samples.npz")["x"]
    assert kernels_of("quantized.onnx", {"x": x[:1]}, here).float == 0
    before, after = (run(onnx.load(name), {"x": x})[0] for name in ("in.onnx", "quantized.onnx"))
    assert np.linalg.norm(after - before) < 0.05 * np.linalg.norm(before)


def test_a_pass_of_onnx_ir(here):
    pytest.importorskip("onnx_ir", reason="onnx_ir is not installed")
    names = execute(block("As a pass of onnx_ir"))
    assert names["done"].modified
    folded = onnx.load("folded.onnx")
    assert [node.op_type for node in folded.graph.node] == ["Conv", "Relu", "GlobalAveragePool", "Flatten", "Gemm"]
    assert_same(classifier(), folded)
    assert not names["passes"](names["onnx_ir"].load("folded.onnx")).modified


@pytest.mark.filterwarnings("default::DeprecationWarning")  # of what Olive uses
def test_a_pass_of_olive(here, monkeypatch):
    pytest.importorskip("olive", reason="Olive is not installed")
    monkeypatch.setenv("OLIVE_DISABLE_TELEMETRY", "1")
    execute(block("As a pass of Olive"))
    (path,) = (here / "out").rglob("*.onnx")
    folded = onnx.load(path)
    assert [node.op_type for node in folded.graph.node] == ["Conv", "Relu", "GlobalAveragePool", "Flatten", "Gemm"]
    assert_same(classifier(), folded)


def test_right_after_the_export_of_pytorch(here, capsys):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    pytest.importorskip("onnxscript", reason="PyTorch's exporter needs onnxscript")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        names = execute(block("Right after torch.onnx.export"))
    result = names["result"]
    assert result.parity.ok
    assert len(result.folded) >= 1
    count = Counter(node.op_type for node in onnx.load("folded.onnx").graph.node)
    assert count["BatchNormalization"] == len(result.kept)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = names["network"](x).numpy()
    (found,) = run(onnx.load("folded.onnx"), {onnx.load("folded.onnx").graph.input[0].name: x.numpy()})
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def commands(text):
    return re.findall(r"^ *(fastbn deploy .*?)(?: \|\| .*)?$", text, re.MULTILINE)


def gate(text):
    (found,) = re.findall(r"<<'END'\n(.*?)\n *END\n", text, re.DOTALL)
    indent = re.match(" *", found)[0]
    return found.replace(f"\n{indent}", "\n").removeprefix(indent)


def deploy(command, here, environment):
    pytest.importorskip("jinja2", reason="the HTML report needs jinja2")
    arguments = [sys.executable, "-m", *command.split()]
    return subprocess.run(arguments, cwd=here, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_the_lines_for_any_ci(here, environment):
    text = block("In CI", "sh")
    (command,) = commands(text)
    done = deploy(command, here, environment)
    assert done.returncode in (0, 4), done.stderr
    execute(gate(text))
    assert {"out.onnx", "report.html", "deploy.json"} <= {path.name for path in here.iterdir()}


def test_the_gates_can_close(here):
    found = [command for text in (RECIPES, (DOCS / "ci.yml").read_text(encoding="utf-8")) for command in commands(text)]
    assert len(found) == 2
    for command in found:
        assert 0 < float(re.search(r"--max-drop (\S+)", command)[1]) <= 0.05, "1 lets every decision change"


def test_the_workflow(here, environment):
    text = (DOCS / "ci.yml").read_text(encoding="utf-8")
    (command,) = commands(text)
    shutil.copy("in.onnx", "model.onnx")
    done = deploy(command, here, environment)
    assert done.returncode in (0, 4), done.stderr
    execute(gate(text))
    codes = dict(re.findall(r"^#   (\d+)  (.*)$", text, re.MULTILINE))
    assert set(codes) == {"0", "1", "2", "4", "5"}
    assert 'pip install "./fastbn[report]"' in text, "of a clone, not of the index"
