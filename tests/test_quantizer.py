"""onnxruntime's quantizer in its own process: whatever it does, the folded model is shipped with a reason, and nothing is left behind."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from shell import files, quick
from sketch import classifier, model, normal, ops

import fastbn
from fastbn.cli import main
from fastbn.deployment import quantize, quantizer
from fastbn.deployment.quantize import quantized_already
from fastbn.deployment.recipe import Recipe

# Ways of never returning: in Python, in its pre-processing, and in C++ with the lock of Python held.
FOREVER = {
    "a loop": "def stop(*a, **k):\n    while True: time.sleep(0.01)\nqdq_quantizer.QDQQuantizer = stop",
    "pre-processing": "def stop(*a, **k):\n    while True: pass\nshape_inference.quant_pre_process = stop",
    "C++": "qdq_quantizer.QDQQuantizer = lambda *a, **k: ctypes.PyDLL(None).pause()",
}


@pytest.fixture(name="here")
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quick(monkeypatch)
    (tmp_path / "in.onnx").write_bytes(classifier().SerializeToString())
    np.savez(tmp_path / "data.npz", x=normal(16, 3, 8, 8))
    return tmp_path


def program(spoil, note=None):
    """Return what the process runs when its quantizer is spoiled by some lines of Python; the file `note` gets its number."""
    lines = [
        "import ctypes, os, signal, time",
        "from onnxruntime import quantization",
        "from onnxruntime.quantization import qdq_quantizer, shape_inference",
    ]
    if note is not None:
        lines.append(f"with open({str(note)!r}, 'w') as file: file.write(str(os.getpid()))")
    return quantizer.PROGRAM.replace("; serve()", "\n" + "\n".join([*lines, spoil, "serve()"]))


def decision(capsys, *options, code=4):
    """Deploy with quantization, and return the reason; the folded model is shipped and nothing else is there."""
    assert main(["deploy", "in.onnx", "out.onnx", "--data", "data.npz", "--quantize", "--runs", "2", *options]) == code
    assert ops(onnx.load("out.onnx")) == "Conv Relu GlobalAveragePool Flatten Gemm"
    said = " ".join(capsys.readouterr().out.split()).partition("shipped folded: ")[2]
    return said.partition("; folded is taken: ")[0]


def is_gone(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize("way", FOREVER)
def test_a_quantizer_that_never_returns(way, here, tmp_path_factory, capsys, monkeypatch):
    note = tmp_path_factory.mktemp("note") / "number"
    monkeypatch.setattr(quantizer, "PROGRAM", program(FOREVER[way], note))
    reason = decision(capsys, "--quantize-timeout", "5")
    assert reason == "onnxruntime's quantizer gives no answer in 5 s; --quantize-timeout may give it more"
    assert is_gone(int(note.read_text()))
    assert files(here) == ["data.npz", "in.onnx", "out.onnx"]


def test_what_a_quantizer_leaves_in_the_temporary_folder(here, tmp_path_factory, capsys, monkeypatch):
    """There is nothing: it writes beside the output, in a folder that is removed."""
    temporary = tmp_path_factory.mktemp("temporary")
    monkeypatch.setenv("TMPDIR", str(temporary))
    stop = "def stop(*a, **k):\n    tempfile.mkdtemp(prefix='pre.quant.')\n    signal.pause()\nshape_inference.quant_pre_process = stop"
    monkeypatch.setattr(quantizer, "PROGRAM", program(f"import tempfile\n{stop}"))
    assert "gives no answer in 5 s" in decision(capsys, "--quantize-timeout", "5")
    assert files(here) == ["data.npz", "in.onnx", "out.onnx"]
    assert not [name for name in files(temporary) if not name.startswith(".ses")], "which onnxruntime itself keeps"


BROKEN = {
    "qdq_quantizer.QDQQuantizer = lambda *a, **k: os.kill(os.getpid(), signal.SIGSEGV)": "was ended by SIGSEGV",
    "qdq_quantizer.QDQQuantizer = lambda *a, **k: os._exit(3)": "ended with exit code 3",
    "raise ImportError('no such module')": "ended with exit code 1: ImportError: no such module",
    "def fail(*a, **k): raise KeyError('no such')\nqdq_quantizer.QDQQuantizer = fail": "refuses the model: KeyError: 'no such'",
    "def fail(*a, **k): raise OSError(28, os.strerror(28))\nqdq_quantizer.QDQQuantizer = fail": (
        "cannot use a file: no space left on device"
    ),
    "def fail(*a, **k): raise MemoryError\nqdq_quantizer.QDQQuantizer = fail": "refuses the model: MemoryError:",
}


@pytest.mark.parametrize("spoil", BROKEN)
@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_quantizer_that_breaks(spoil, here, capsys, monkeypatch):
    monkeypatch.setattr(quantizer, "PROGRAM", program(spoil))
    assert decision(capsys).rstrip() == f"onnxruntime's quantizer {BROKEN[spoil]}"
    assert files(here) == ["data.npz", "in.onnx", "out.onnx"]


def test_a_quantizer_that_says_a_lot(here, capfd, monkeypatch):
    loud = (
        "real = qdq_quantizer.QDQQuantizer\n"
        "def say(*a, **k):\n    os.write(1, b'\\x1e{' * 9999); os.write(2, b'\\n' * 9999); print('x' * 99999)\n    return real(*a, **k)\n"
        "qdq_quantizer.QDQQuantizer = say"
    )
    monkeypatch.setattr(quantizer, "PROGRAM", program(loud))
    assert main(["deploy", "in.onnx", "out.onnx", "--data", "data.npz", "--quantize", "--max-drop", "1", "--runs", "1", "-q"]) == 0
    assert tuple(capfd.readouterr()) == ("", "")


def test_the_next_model_has_a_process_again(here, monkeypatch):
    with quantizer.Quantizer(here, [{"x": normal(2, 3, 8, 8)}], 300) as made:
        assert made.quantize(Path("in.onnx"), Path("a.onnx"), recipe=Recipe.here()).notes == ()
        first = made.process.pid
        made.quantize(Path("in.onnx"), Path("b.onnx"), recipe=Recipe.here())
        assert made.process.pid == first, "one process for both"
        with pytest.raises(quantize.QuantizerRefused, match=r"gives no answer in 1e-09 s"):
            made.quantize(Path("in.onnx"), Path("c.onnx"), recipe=Recipe.here(), seconds=1e-9)
        assert is_gone(first)
        made.quantize(Path("in.onnx"), Path("d.onnx"), recipe=Recipe.here())
        last = made.process.pid
    assert is_gone(last)
    assert (here / "a.onnx").read_bytes() == (here / "b.onnx").read_bytes() == (here / "d.onnx").read_bytes()


def test_where_no_process_can_be_started(here, capsys, monkeypatch):
    monkeypatch.setattr(sys, "executable", "")
    assert decision(capsys) == "onnxruntime's quantizer needs a Python process of its own, and this program cannot start one"
    monkeypatch.setattr(sys, "executable", str(here / "none"))
    assert decision(capsys) == "onnxruntime's quantizer has no process: No such file or directory"


def started(here, environment, lines, **options):
    """Return a process that runs a script in the folder, without a guard for __main__."""
    (here / "script.py").write_text(textwrap.dedent(lines), encoding="utf-8")
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen([sys.executable, "script.py"], env=environment, text=True, **streams)


HANGS = """
    import sys
    from fastbn.cli import main
    from fastbn.deployment import quantizer

    quantizer.PROGRAM = {program!r}
    sys.exit(main(["deploy", "in.onnx", "out.onnx", "--data", "data.npz", "--quantize", "-q"]))
"""


def hanging(here, environment, tmp_path_factory, way):
    """Start a deployment whose quantizer never returns; return (process, number of the quantizer's) when it hangs."""
    note = tmp_path_factory.mktemp("note") / "number"
    process = started(here, environment, HANGS.format(program=program(FOREVER[way], note)))
    until(lambda: note.exists() and note.read_text())
    return process, int(note.read_text())


def until(condition):
    """Wait for something that comes; the limit is for a test that fails."""
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come")


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("way", FOREVER)
def test_an_interrupt_ends_it(way, here, environment, tmp_path_factory):
    process, number = hanging(here, environment, tmp_path_factory, way)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "fastbn: interrupted, nothing written\n")
    assert is_gone(number)
    assert files(here) == ["data.npz", "in.onnx", "script.py"]


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("way", ["a loop", "pre-processing"])
def test_it_ends_when_the_one_who_waits_is_killed(way, here, environment, tmp_path_factory):
    process, number = hanging(here, environment, tmp_path_factory, way)
    process.kill()
    process.communicate(timeout=60)
    until(lambda: is_gone(number))


MADE = """
import fastbn
made = fastbn.deploy("small_cnn.onnx", "out.onnx", quantize=True, max_drop=1, metric="error", goal="size", runs=1)
with open("said", "a") as file:
    file.write(made.shipped)
"""

WORK = f"def work():{textwrap.indent(MADE, '    ')}\n"

CALLERS = {
    "a script": MADE,
    "a daemon": f"from multiprocessing import get_context\n{WORK}worker = get_context('fork').Process(target=work, daemon=True)\n"
    "worker.start()\nworker.join()",
    "a thread": f"from threading import Thread\n{WORK}worker = Thread(target=work)\nworker.start()\nworker.join()",
    "without stdin": f"import os\nos.close(0)\n{MADE}",
    "without streams": f"import os\nos.closerange(0, 3)\n{MADE}",
    "with a path of its own": f"import sys\nsys.path.append('elsewhere')\n{MADE}",
}


@pytest.mark.skipif(os.name == "nt", reason="fork")
@pytest.mark.parametrize("caller", CALLERS)
def test_it_works_from_anywhere(caller, here, environment, small_cnn):
    shutil.copy(small_cnn, here)
    for name in ("json", "onnx", "queue"):  # what lies in the folder is not what the process imports
        (here / f"{name}.py").write_text("raise RuntimeError('not this one')", encoding="utf-8")
    process = started(here, environment, CALLERS[caller])
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out, err) == (0, "", "")
    assert (here / "said").read_text() == "quantized", "once: the script runs no second time"
    assert sum(node.op_type == "QuantizeLinear" for node in onnx.load("out.onnx").graph.node) > 2


def test_it_works_from_a_script_that_has_no_file(here, environment, small_cnn):
    shutil.copy(small_cnn, here)
    command = [sys.executable, "-"]
    subprocess.run(command, input=MADE, env=environment, text=True, timeout=120, check=True)
    assert (here / "said").read_text() == "quantized"


QUANTIZED = {
    "QDQ": "(float[4] x) => (float[4] y) { q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z) }",
    "weights": "(float[4] x) => (float[4] y) { w = DequantizeLinear(z, s, z) y = Add(x, w) }",
    "dynamic": "(float[4] x) => (uint8[4] y) { y, a, b = DynamicQuantizeLinear(x) }",
    "integers": "(uint8[2,2] x) => (int32[2,2] y) { y = MatMulInteger(x, x) }",
    "QLinear": "(uint8[2,2] x) => (uint8[2,2] y) { y = QLinearMatMul(x, s, z, x, s, z, s, z) }",
}


@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_quantized_model_is_seen(kind):
    proto = model(QUANTIZED[kind], s=np.float32(0.1), z=np.uint8(3))
    assert quantized_already(proto) is not None
    body = helper.make_graph(proto.graph.node, "body", [], proto.graph.output)
    outer = model("(bool c, float[4] x) => (float[4] y) { y = Identity(x) }")
    outer.graph.node.append(helper.make_node("If", ["c"], ["k"], then_branch=body, else_branch=body))
    assert quantized_already(outer) is not None
    del outer.graph.node[1:]
    outer.functions.append(helper.make_function("local", "f", [], [], proto.graph.node, []))
    assert quantized_already(outer) is not None


def test_what_onnxruntime_quantizes_is_seen(here):
    with quantizer.Quantizer(here, [{"x": normal(2, 3, 8, 8)}], 300) as made:
        made.quantize(Path("in.onnx"), Path("int8.onnx"), recipe=Recipe.here())
    assert quantized_already(onnx.load("int8.onnx")) == "8 DequantizeLinear, 5 QuantizeLinear"
    for op in ("QLinearAdd", "QGemm", "MatMulIntegerToFloat", "QOrderedMatMul", "DynamicQuantizeMatMul", "MatMulNBits", "BipolarQuant"):
        proto = onnx.ModelProto(graph=onnx.GraphProto(node=[helper.make_node(op, ["x"], ["y"], domain="com.microsoft")]))
        assert quantized_already(proto) == f"1 {op}"
    for op in ("Conv", "QuickGelu", "Quantile", "Round", "Cast"):
        proto = onnx.ModelProto(graph=onnx.GraphProto(node=[helper.make_node(op, ["x"], ["y"])]))
        assert quantized_already(proto) is None


def test_a_quantized_model_is_shipped_folded(here, capsys, monkeypatch):
    with quantizer.Quantizer(here, [{"x": normal(2, 3, 8, 8)}], 300) as made:
        made.quantize(Path("in.onnx"), Path("int8.onnx"), recipe=Recipe.here())
    monkeypatch.setattr(quantizer, "PROGRAM", "raise SystemExit('the quantizer was asked')")
    assert main(["deploy", "int8.onnx", "out.onnx", "--data", "data.npz", "--quantize", "--runs", "1"]) == 4
    reason = "the model is quantized already: it has 8 DequantizeLinear, 5 QuantizeLinear"
    assert reason in " ".join(capsys.readouterr().out.split())
    assert onnx.load("out.onnx").graph.output[0].name == "y"


def test_the_limit_is_an_option(here):
    for bad in (0, -1, float("nan"), float("inf"), 1e7):
        with pytest.raises(fastbn.ArgumentError, match=r"Expected seconds, more than 0 and at most 1e\+06, got .* - at `quantize_timeout`"):
            fastbn.deploy("in.onnx", quantize_timeout=bad)
