"""A file at the destination: a version of the model is replaced, another file only with --force, and a file that is read never."""

from pathlib import Path

import make_models
import onnx
import pytest
from onnx import helper
from shell import fails, quick
from sketch import CONV_BN, conv_bn, normal, ops

import fastbn
from fastbn.cli import main
from fastbn.graph.rewrite import writer
from fastbn.graph.rewrite.version import difference


@pytest.fixture(name="here")
def _here(tmp_path, monkeypatch):
    """A working folder with in.onnx."""
    monkeypatch.chdir(tmp_path)
    quick(monkeypatch)
    (tmp_path / "in.onnx").write_bytes(conv_bn().SerializeToString())
    return tmp_path


@pytest.fixture(name="external")
def _external(here, monkeypatch):
    """The same with a model whose weights stay in a data file: large.onnx, large.onnx.data."""
    monkeypatch.setattr(writer, "LARGEST_INLINE", 0)
    make_models.large(here, layers=1, channels=8)


def other_inputs():
    return conv_bn(CONV_BN.replace("float[N,3,8,8] x", "float[N,3,9,9] x").replace("6,6", "7,7"))


def named(*names):
    proto = conv_bn()
    for node, name in zip(proto.graph.node, names, strict=True):
        node.name = name
    return proto


OTHERS = {
    "other inputs": lambda: conv_bn(CONV_BN.replace("x)", "image)").replace("(x,", "(image,")),
    "other sizes of inputs": other_inputs,
    "other outputs": lambda: conv_bn(CONV_BN.replace(" y)", " z)").replace("y =", "z =")),
    "other nodes": lambda: named("first", "second"),
    "more nodes": lambda: conv_bn(CONV_BN.replace("y = Batch", "n = Batch").replace("}", "y = Relu(n) }")),
    "weights of other sizes": lambda: conv_bn(w=normal(4, 3, 5, 5)),
}


@pytest.mark.parametrize("command", ["fold", "deploy"])
@pytest.mark.parametrize("case", [*OTHERS, "no model"])
def test_what_is_no_version_is_not_replaced_without_force(case, command, here, capsys):
    data = b"a README" if case == "no model" else OTHERS[case]().SerializeToString()
    (here / "out.onnx").write_bytes(data)
    options = ["--runs", "1"] if command == "deploy" else []
    line = fails(capsys, command, "in.onnx", "out.onnx", *options)
    assert line.startswith("fastbn: Cannot replace 'out.onnx': it is no ")
    assert line.endswith("; --force replaces it all the same\n")
    assert (here / "out.onnx").read_bytes() == data
    assert main([command, "in.onnx", "out.onnx", *options, "-q", "--force"]) == 0
    assert ops(onnx.load("out.onnx")) == "Conv"
    assert main([command, "in.onnx", "out.onnx", *options, "-q"]) == 0, "one's own result"


def test_versions_are_replaced(here):
    for data in (b"", (here / "in.onnx").read_bytes(), conv_bn(w=normal(4, 3, 3, 3, seed=5)).SerializeToString()):
        (here / "out.onnx").write_bytes(data)
        assert main(["fold", "in.onnx", "out.onnx", "-q"]) == 0
    assert main(["fold", "in.onnx", "out.onnx", "-q", "--skip", "y"]) == 0
    assert main(["fold", "-", "out.onnx", "-q"]) == 2, "no model on stdin"
    (here / "dangling.onnx").symlink_to("nowhere")
    assert main(["fold", "in.onnx", "dangling.onnx", "-q"]) == 0


def test_a_glob_of_two_models_does_no_harm(here, capsys):
    (here / "other.onnx").write_bytes(OTHERS["other nodes"]().SerializeToString())
    fails(capsys, "fold", *map(str, sorted(Path().glob("*.onnx"))))


def test_the_quantized_form_is_a_version(small_cnn, monkeypatch):
    made = fastbn.deploy(small_cnn, quantize=True, max_drop=1, metric="error", goal="size", runs=1)
    assert made.shipped == "quantized"
    assert difference(onnx.load(small_cnn), onnx.ModelProto.FromString(made.to_bytes())) is None


def test_an_inlined_function_is_a_version():
    proto = conv_bn("(float[N,3,8,8] x) => (float[N,4,6,6] y) { c = Conv(x, w, b) y = own.Norm(c, s, t, m, v) }", imports=["own"])
    node = helper.make_node("BatchNormalization", list("abcde"), ["r"])
    proto.functions.append(helper.make_function("own", "Norm", list("abcde"), ["r"], [node], [helper.make_opsetid("", 17)]))
    folded = fastbn.fold(proto, verify=False)
    assert len(folded.folded) == 1
    assert difference(proto, folded.model) is None
    assert difference(proto, OTHERS["more nodes"]()) == "other nodes"


@pytest.mark.usefixtures("external")
@pytest.mark.parametrize(
    "arguments",
    [
        ["fold", "large.onnx", "large.onnx.data", "--force"],
        ["fold", "large.onnx", "out.onnx", "--json", "large.onnx.data"],
        ["verify", "in.onnx", "large.onnx", "--json", "large.onnx.data"],
        ["deploy", "large.onnx", "large.onnx.data", "--force"],
        ["deploy", "large.onnx", "out.onnx", "--report", "large.onnx.data", "--force"],
        ["deploy", "large.onnx", "out.onnx", "--json", "large.onnx.data"],
        ["fold", "large.onnx", "out.onnx", "--json", "in.onnx"],
        ["verify", "large.onnx", "large.onnx", "--json", "in.onnx"],
    ],
    ids=" ".join,
)
def test_no_report_and_no_model_goes_over_what_is_read(arguments, here, capsys):
    before = {path.name: path.read_bytes() for path in here.iterdir()}
    fails(capsys, *arguments)
    assert {path.name: path.read_bytes() for path in here.iterdir()} == before
