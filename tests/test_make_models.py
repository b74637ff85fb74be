"""The sample models: reproducible, valid, run by onnxruntime, and folded as far as the table says."""

import subprocess
import sys

import make_models
import numpy as np
import onnx
import pytest
from sketch import codes, run

import fastbn
from fastbn.graph.reasons import REASONS

# net -> BatchNormalization before; after, which is the least that any exact fold leaves.
NETS = {
    "small_cnn": (7, 1),
    "levit_like": (15, 0),
    "tabular_mlp": (4, 0),
    "tdnn": (4, 1),
    "repvgg": (12, 0),
    "unet": (5, 0),
    "resnet_v2": (13, 6),
    "densenet_like": (28, 13),
    "keras_cnn": (1, 0),
}


def feeds(proto):
    rng = np.random.default_rng(2)
    found = {}
    for info in proto.graph.input:
        shape = [dim.dim_value or 3 for dim in info.type.tensor_type.shape.dim]
        whole = info.type.tensor_type.elem_type == onnx.TensorProto.INT64
        found[info.name] = rng.integers(0, 7, shape) if whole else rng.standard_normal(shape).astype(np.float32)
    return found


@pytest.mark.parametrize("net", NETS)
def test_net(net):
    proto = make_models.MODELS[net]()
    count, left = NETS[net]
    onnx.checker.check_model(proto, full_check=True)
    result = fastbn.fold(proto)
    assert result.to_dict()["batch_normalizations"] == {"before": count, "after": left}
    assert set(codes(result)) <= set(REASONS) - {"parity"}
    assert result.parity is None or result.parity.status == "ok", result.parity
    for before, after in zip(run(proto, feeds(proto)), run(result.model, feeds(proto)), strict=True):
        assert np.isfinite(before).all()
        assert before.std() > 0
        np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5 * np.abs(before).max())


def test_the_models_are_the_same_every_time(small_cnn):
    again = make_models.MODELS["small_cnn"]().SerializeToString(deterministic=True)
    assert again == make_models.MODELS["small_cnn"]().SerializeToString(deterministic=True)
    shipped = onnx.load(small_cnn)
    built = onnx.ModelProto.FromString(again)
    assert shipped.graph.node == built.graph.node
    for one, other in zip(shipped.graph.initializer, built.graph.initializer, strict=True):
        np.testing.assert_allclose(onnx.numpy_helper.to_array(one), onnx.numpy_helper.to_array(other), rtol=1e-6)
    assert small_cnn.stat().st_size < 100_000


def test_the_command(tmp_path, request):
    script = request.config.rootpath / "tools" / "make_models.py"
    arguments = ["--out", tmp_path, "tdnn", "--large", tmp_path, "--layers", "2", "--channels", "16", "--long", tmp_path]
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["computed.onnx", "large.onnx", "large.onnx.data", "long.onnx", "tdnn.onnx"]
    assert [len(onnx.load(tmp_path / f"{name}.onnx").graph.node) for name in ("long", "computed")] == [6000, 5980]
    wrong = subprocess.run([sys.executable, script, "nothing"], capture_output=True, text=True, timeout=120)
    assert wrong.returncode == 2
    assert "no model is called nothing" in wrong.stderr


def test_long_models_fold_completely():
    result = fastbn.fold(make_models.long(blocks=600), verify=False)
    assert len(result.folded) == 600
    assert {node.op_type for node in result.model.graph.node} == {"Conv", "Relu"}


def test_biases_and_sizes_that_a_graph_computes():
    result = fastbn.fold(make_models.computed(blocks=3))
    assert (len(result.folded), result.kept) == (6, [])
    assert result.parity.ok
