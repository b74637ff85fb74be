"""The two trained CNNs that ship fold to no BatchNormalization and say the same of every held-out digit; and the tool that made them."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import train_cnns

import fastbn

MODELS = Path(__file__).resolve().parent / "models"

# net -> what takes the BatchNormalization in, how many of the held-out digits it recognizes, as docs/benchmarks.md says
NETS = {"torch": ("Conv", 352), "keras": ("MatMul+Add", 357)}


@pytest.fixture(scope="module")
def held_out():
    with np.load(MODELS / "digits.npz") as digits, np.load(MODELS / "digits_predicted.npz") as predicted:
        return {**digits, **predicted}


def operators(path):
    return [node.op_type for node in onnx.load(path).graph.node]


@pytest.mark.parametrize("net", NETS)
def test_a_trained_network_folds_to_nothing(net, held_out, tmp_path):
    absorber, recognized = NETS[net]
    path, after = MODELS / f"{net}_digits.onnx", tmp_path / "folded.onnx"
    images, said = held_out["image"], held_out[net]
    assert len(said) == train_cnns.HELD_OUT
    assert operators(path).count("BatchNormalization") == 1
    assert (said == held_out["labels"]).sum() == recognized
    np.testing.assert_array_equal(train_cnns.predictions(path, images), said)
    result = fastbn.fold(path)
    assert result.kept == []
    assert result.parity.ok, result.parity
    assert [fold["op"] for fold in result.to_dict()["folded"] if "BatchNormalization" in fold["ops"]] == [absorber]
    result.save(after)
    assert "BatchNormalization" not in operators(after)
    np.testing.assert_array_equal(train_cnns.predictions(after, images), said)


@pytest.mark.parametrize("net", NETS)
def test_a_shipped_network_is_sound_and_names_no_folder(net):
    path = MODELS / f"{net}_digits.onnx"
    onnx.checker.check_model(path, full_check=True)
    assert not any(node.metadata_props for node in onnx.load(path).graph.node)
    assert b"/site-packages/" not in path.read_bytes()
    assert path.stat().st_size < 300_000


def test_the_shipped_networks_are_those_of_the_tool():
    known = set(operators(MODELS / "keras_digits.onnx"))
    assert known == {"Transpose", "Conv", "Add", "Relu", "BatchNormalization", "MaxPool", "Reshape", "MatMul", "Softmax"}
    sizes = {}
    for net in NETS:
        shapes = {tuple(tensor.dims) for tensor in onnx.load(MODELS / f"{net}_digits.onnx").graph.initializer}
        sizes[net] = {shape for shape in shapes if len(shape) in (2, 4)}
    assert (32, 1, 3, 3) in sizes["torch"]
    assert sizes["torch"] & {(10, 32 * 14 * 14), (32 * 14 * 14, 10)}
    assert {(32, 1, 3, 3), (32 * 13 * 13, 10)} <= sizes["keras"]


def test_the_same_weights_start_with_either_layers():
    pytest.importorskip("torch")
    ours, own = train_cnns.torch_net(True, 3), train_cnns.torch_net(False, 3)
    assert [type(net[1]).__module__ for net in (ours, own)] == ["fastbn.torch", "torch.nn.modules.batchnorm"]
    for one, other in zip(ours.state_dict().values(), own.state_dict().values(), strict=True):
        assert (one == other).all()


def test_enlarging_is_bilinear():
    ramp = np.broadcast_to(np.arange(8.0), (1, 8, 8))
    at = np.clip((np.arange(28) + 0.5) * 8 / 28 - 0.5, 0, 7)
    np.testing.assert_allclose(train_cnns.enlarge(ramp), np.broadcast_to(at / 16, (1, 28, 28)), atol=1e-7)
    np.testing.assert_array_equal(train_cnns.enlarge(np.full((2, 8, 8), 16)), np.ones((2, 28, 28), np.float32))


def test_enlarging_is_that_of_torch():
    torch = pytest.importorskip("torch")
    images = np.random.default_rng(0).integers(0, 17, (20, 8, 8))
    scaled = torch.from_numpy(images[:, None].astype(np.float32) / 16)
    expected = torch.nn.functional.interpolate(scaled, (28, 28), mode="bilinear", align_corners=False)[:, 0].numpy()
    np.testing.assert_allclose(train_cnns.enlarge(images), expected, atol=1e-6)


def test_the_shipped_digits_are_those_held_out(held_out):
    pytest.importorskip("sklearn")
    (images, labels), (held_images, held_labels) = train_cnns.digits()
    np.testing.assert_array_equal(train_cnns.enlarge(held_images), held_out["image"])
    np.testing.assert_array_equal(held_labels, held_out["labels"])
    assert len(labels) == len(images) == 1797 - train_cnns.HELD_OUT


@pytest.mark.parametrize("net", NETS)
def test_the_tool_trains_exports_and_folds(net, tmp_path, environment):
    packages = ["torch", "sklearn", "onnxscript", *(["keras"] if net == "keras" else [])]
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not installed")
    command = [sys.executable, train_cnns.__file__, "--out", tmp_path, "--epochs", "1", "--net", net]
    variables = {**environment, "KERAS_BACKEND": "torch"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for kind in ("fastbn", "own"):
        assert f"{net:5}  {kind:6}  seed 0  epoch  1/1" in done.stderr
        assert f"{net:5}  BN: {kind:6}  held-out accuracy in %: " in done.stdout
    assert "BatchNormalization 1 -> 0" in done.stdout
    assert "exported 360, folded 360 of 360 held-out digits" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "digits.npz",
        "digits_predicted.npz",
        f"{net}_digits.folded.onnx",
        f"{net}_digits.onnx",
    ]


@pytest.mark.parametrize("wrong", [["--seeds", "0"], ["--epochs", "0"], ["--net", "tensorflow"]])
def test_wrong_usage(wrong):
    done = subprocess.run([sys.executable, train_cnns.__file__, *wrong], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "error: " in done.stderr
