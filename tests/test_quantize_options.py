"""Options of the quantization: calibration, nodes that stay in float, types and scales of weights; and calibrations that give nothing."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from shell import as_json, classifier_folder, deploy, fails, files
from sketch import classifier, model, normal, ops

import fastbn
from fastbn import arguments
from fastbn.deployment import recipe
from fastbn.deployment.quantize import QuantizerRefused
from fastbn.deployment.quantizer import Quantizer
from fastbn.deployment.recipe import Recipe


@pytest.fixture(name="here")
def _here(tmp_path, monkeypatch):
    return classifier_folder(tmp_path, monkeypatch)


def quantized(folder, proto, feeds, **options):
    """Return (quantized model, Made)."""
    onnx.save(proto, folder / "float.onnx")
    with Quantizer(folder, feeds, 300) as quantizer:
        recipe = Recipe.here(
            **{name: options.pop(name) for name in ("weight_type", "per_tensor", "calibration", "exclude") if name in options}
        )
        made = quantizer.quantize(folder / "float.onnx", folder / "int8.onnx", recipe=recipe, **options)
    return onnx.load(folder / "int8.onnx"), made


FEEDS = [{"x": normal(1, 3, 8, 8, seed=seed) * (1 + 9 * (seed == 0))} for seed in range(8)]


def weights(proto):
    """Return the quantized weight of the Conv and its scales as arrays."""
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    node = next(
        node for node in proto.graph.node if node.op_type == "DequantizeLinear" and tensors.get(node.input[0], np.empty(0)).ndim == 4
    )
    return tensors[node.input[0]], tensors[node.input[1]]


def range_of_input(proto):
    """Return what the first QuantizeLinear can hold."""
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    return 255 * float(tensors[next(node for node in proto.graph.node if node.op_type == "QuantizeLinear").input[1]])


def test_types_and_scales_of_weights(tmp_path):
    kinds = {}
    for kind in recipe.WEIGHT_TYPES[1:]:
        values, scales = weights(quantized(tmp_path, classifier(), FEEDS[:1], weight_type=kind)[0])
        kinds[kind] = (values.dtype.name, int(values.min()), int(values.max()), scales.shape)
    assert kinds["int8"][:1] + kinds["int8"][3:] == ("int8", (4,))
    assert max(abs(kinds["int8"][1]), kinds["int8"][2]) == 127
    assert kinds["uint8"][0] == "uint8"
    assert kinds["uint8"][2] > 127
    assert kinds["int7"][0] == "int8"
    assert max(abs(kinds["int7"][1]), kinds["int7"][2]) in (63, 64)
    values, scales = weights(quantized(tmp_path, classifier(), FEEDS[:1], weight_type="int8", per_tensor=True)[0])
    assert (values.dtype, scales.shape) == (np.int8, ())


def test_calibrations(tmp_path):
    proto = model("(float[N,3] x) => (float[N,2] y) { y = MatMul(x, w) }", w=normal(3, 2))
    values = normal(60_000, 3)
    values[0, 0] = 1000
    ranges = {kind: range_of_input(quantized(tmp_path, proto, [{"x": values}], calibration=kind)[0]) for kind in recipe.CALIBRATIONS}
    assert ranges["minmax"] == pytest.approx(np.ptp(values), rel=1e-5)
    assert ranges["percentile"] < 0.1 * ranges["minmax"], "one of 180,000 values is far from the others"
    assert ranges["entropy"] < 0.6 * ranges["minmax"]


def test_a_tensor_of_many_feeds_has_the_same_range_as_of_one(tmp_path):
    together = [{"x": np.concatenate([feed["x"] for feed in FEEDS])}]
    for kind in ("minmax", "percentile"):
        one, many = (range_of_input(quantized(tmp_path, classifier(), feeds, calibration=kind)[0]) for feeds in (together, FEEDS))
        assert one == pytest.approx(many, rel=1e-2), kind


def weights_in_integers(proto):
    """Return the operators that read a constant through a DequantizeLinear."""
    constants = {tensor.name for tensor in proto.graph.initializer}
    floats = {node.output[0] for node in proto.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in constants}
    return {node.op_type for node in proto.graph.node if floats.intersection(node.input)}


def test_excluded_nodes_stay_in_float(here, capsys):
    report = as_json(capsys, "--data", "data.npz", "--quantize", "--max-drop", "1", "--exclude-nodes", "y*", "--exclude-nodes", "n")
    assert weights_in_integers(onnx.load("out.onnx")) == {"Conv"}
    assert report["quantization"]["recipe"].endswith(", 'y*', 'n' in float")
    assert report["quantization"]["notes"] == ["the folded model has no node 'n' to leave in float"], "the fold has removed it"


def test_a_node_that_the_quantizer_fuses_can_be_excluded(tmp_path):
    text = "(float[N,3] x) => (float[N,2] y) { h = MatMul(x, w) a = Add(h, b) r = Relu(a) k = MatMul(r, w2) y = Add(k, b2) }"
    proto = model(text, w=normal(3, 4), b=normal(4), w2=normal(4, 2), b2=normal(2))
    feeds = [{"x": normal(2, 3)}]
    assert quantized(tmp_path, proto, feeds)[1].nodes == ("h/MatMulAddFusion", "k/MatMulAddFusion")
    for name in ("h", "a"):
        assert quantized(tmp_path, proto, feeds, exclude=(name,))[1].nodes == ("k/MatMulAddFusion",)
    assert quantized(tmp_path, proto, feeds, left=["k/MatMulAddFusion"])[1].nodes == ("h/MatMulAddFusion",)
    assert quantized(tmp_path, proto, feeds, only=["k/MatMulAddFusion"])[1].nodes == ("k/MatMulAddFusion",)


def test_nodes_without_names_or_with_the_same_can_be_told_apart(tmp_path):
    proto = model("(float[N,3] x) => (float[N,2] y) { h = MatMul(x, w) r = Relu(h) y = MatMul(r, w2) }", w=normal(3, 4), w2=normal(4, 2))
    for name in ("", "same"):
        for node in proto.graph.node:
            node.name = name
        made = quantized(tmp_path, proto, [{"x": normal(2, 3)}])[1]
        assert len(set(made.nodes)) == len(made.nodes) == 2
        assert quantized(tmp_path, proto, [{"x": normal(2, 3)}], left=made.nodes[:1])[1].nodes == made.nodes[1:]


def test_where_everything_is_excluded_the_folded_model_is_shipped(here, capsys):
    deploy("--data", "data.npz", "--quantize", "--exclude-nodes", "*", code=4)
    reason = "onnxruntime's quantizer refuses the model: every node that has an integer form stays in float"
    assert reason in " ".join(capsys.readouterr().out.split())
    assert ops(onnx.load("out.onnx")) == "Conv Relu GlobalAveragePool Flatten Gemm"


def test_a_node_that_does_not_exist(here, capsys):
    error = fails(capsys, "deploy", "in.onnx", "out.onnx", "--quantize", "--exclude-nodes", "no such", "-q")
    assert error == "fastbn: Expected a glob that names a node (BatchNormalization: n), got 'no such' - at `--exclude-nodes`\n"


def test_calibration_that_collapses(here, capsys):
    proto = classifier(
        w=np.zeros((4, 3, 3, 3), np.float32), b=np.zeros(4, np.float32), t=np.full(4, -9, np.float32), m=np.zeros(4, np.float32)
    )
    proto.graph.output[0].name = "y"
    Path("in.onnx").write_bytes(proto.SerializeToString())
    np.savez("data.npz", x=np.zeros((16, 3, 8, 8), np.float32))
    deploy("--data", "data.npz", "--quantize", code=4)
    assert "calibration collapses: every output is 0 on all samples" in " ".join(capsys.readouterr().out.split())
    assert files(here) == ["data.npz", "in.onnx", "out.onnx"]


def test_activations_without_a_range_refuse_the_model(tmp_path):
    proto = model("(float[N,3] x) => (float[N,2] y) { y = MatMul(x, w) }", w=normal(3, 2))
    with pytest.raises(QuantizerRefused, match=r"^calibration collapses: every output is 0 on all samples$"):
        quantized(tmp_path, proto, [{"x": np.zeros((2, 3), np.float32)}])
    proto = model("(float[N,3] x) => (float[N,2] y) { r = Sqrt(x) y = MatMul(r, w) }", w=normal(3, 2))
    with pytest.raises(QuantizerRefused, match=r"^calibration gives no range: activation '[ry]' is Inf or NaN$"):
        quantized(tmp_path, proto, [{"x": np.full((2, 3), -1, np.float32)}])


def test_activations_that_are_zero_are_named(tmp_path):
    text = (
        "(float[N,3] x) => (float[N,2] y) { n = Neg(x) a = Abs(n) k = Neg(a) r = Relu(k) h = MatMul(r, w) g = MatMul(x, w) y = Add(h, g) }"
    )
    proto = model(text, w=normal(3, 2))
    notes = quantized(tmp_path, proto, [{"x": normal(2, 3)}])[1].notes
    assert notes == ("activations that are 0 on all samples, so that nothing says their range: h, r",)


def test_options_are_checked_before_any_work(here, capsys):
    for name, bad in (("calibration", "mean"), ("weight_type", "int4"), ("weight_type", "AUTO")):
        with pytest.raises(fastbn.ArgumentError, match=rf"^Expected .*, got '{bad}' - at `{name}`$"):
            fastbn.deploy("in.onnx", **{name: bad})
    with pytest.raises(fastbn.ArgumentTypeError, match=r"^Expected minmax or entropy or percentile, got int - at `calibration`$"):
        fastbn.deploy("in.onnx", calibration=1)
    with pytest.raises(fastbn.ArgumentTypeError, match=r"got int - at `exclude_nodes`$"):
        fastbn.deploy("in.onnx", exclude_nodes=1)
    assert "choose from" in fails(capsys, "deploy", "in.onnx", "out.onnx", "--calibration", "mean")


def test_the_command_has_the_same_words():
    assert tuple(recipe.CALIBRATIONS) == arguments.CALIBRATIONS
    assert recipe.WEIGHT_TYPES == arguments.WEIGHT_TYPES


def test_a_recipe_crosses_to_the_process_and_back():
    made = Recipe.here("uint8", True, "entropy", ["a*", "b"])
    assert Recipe.of(made.to_dict()) == made
    assert str(made) == "QDQ, per tensor, UInt8 activations, UInt8 weights, Entropy, 'a*', 'b' in float"


def test_what_a_recipe_says_of_saturation(monkeypatch):
    monkeypatch.setattr(recipe.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(recipe, "_has_vnni", lambda: False)
    assert str(Recipe.here()).endswith("Int8 weights, weights in 7 bits: this CPU has no VNNI, MinMax")
    assert str(Recipe.here("int8")).endswith("Int8 weights, whose sums saturate on this CPU without VNNI, MinMax")
    monkeypatch.setattr(recipe, "_has_vnni", lambda: True)
    assert str(Recipe.here("int7")).endswith("Int8 weights, weights in 7 bits, MinMax")
    monkeypatch.setattr(recipe.platform, "machine", lambda: "aarch64")
    assert (Recipe.here("uint8").activations, Recipe.here("int7").activations) == ("QUInt8", "QInt8")
