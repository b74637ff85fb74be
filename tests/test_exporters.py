"""What the exporters of PyTorch, Keras and Paddle really write (tools/export_samples.py): as much folds as of the plain networks."""

import gzip
from pathlib import Path

import numpy as np
import onnx
import pytest
from sketch import assert_same, codes
from test_make_models import NETS

import fastbn
from fastbn.graph.reasons import REASONS

FOLDER = Path(__file__).resolve().parent / "models" / "exporters"
FILES = sorted(path.name.removesuffix(".onnx.gz") for path in FOLDER.glob("*.onnx.gz"))

# The forms in which a network lies there.
TORCH = [f"{exporter}{plain}{sizes}" for exporter in ("script", "dynamo") for plain in ("", "_plain") for sizes in ("", "_dynamic")]
TRAINING = ["script_training", "dynamo_training"]
PADDLE = ["paddle", "paddle_dynamic"]
KERAS = ["keras_tensorflow", "keras_torch"]
FORMS = {
    "small_cnn": [*TORCH, *TRAINING, *PADDLE],
    "levit_like": TORCH,
    "tabular_mlp": [*TORCH, *TRAINING, *KERAS],
    "tdnn": [*TORCH, *KERAS],
    "repvgg": TORCH,
    "unet": [*TORCH, *PADDLE, *KERAS],
    "resnet_v2": [*TORCH, *PADDLE, *KERAS],
    "densenet_like": TORCH,
    "keras_cnn": KERAS,
}

# A BatchNormalization of Keras's comes as a Mul and an Add. The Mul alone may go, and an Add is no batch normalization.
LEFT = {"tdnn.keras_tensorflow": 0, "tdnn.keras_torch": 0}


def load(name):
    return onnx.load_from_string(gzip.decompress((FOLDER / f"{name}.onnx.gz").read_bytes()))


def feeds(proto):
    """Return random inputs: open sizes are 24, but for the batch, and integers are categories of the smaller embedding."""
    rng, found = np.random.default_rng(2), {}
    for info in proto.graph.input:
        kind = info.type.tensor_type
        shape = [dim.dim_value or (24 if axis else 2) for axis, dim in enumerate(kind.shape.dim)]
        is_integer = kind.elem_type == onnx.TensorProto.INT64
        found[info.name] = rng.integers(0, 4, shape) if is_integer else rng.standard_normal(shape).astype(np.float32)
    return found


def test_every_network_is_there_in_every_form():
    assert sorted(f"{net}.{form}" for net, forms in FORMS.items() for form in forms) == FILES
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 1_000_000


@pytest.mark.parametrize("name", FILES)
def test_as_much_folds_as_of_the_plain_network(name):
    proto, (net, form) = load(name), name.split(".")
    result = fastbn.fold(proto, as_inference=form in TRAINING)
    assert len(result.kept) == LEFT.get(name, NETS[net][1]), [str(kept) for kept in result.kept]
    assert set(codes(result)) <= set(REASONS) - {"parity"}
    assert result.parity is None or result.parity.status == "ok", result.parity
    if form not in TRAINING:
        assert_same(proto, result.model, feeds(proto), units=1 << 10)


# The dynamo exporter writes inference batch normalizations in training mode too, with Dropouts that drop.
IN_TRAINING = {
    "small_cnn.script_training": (7, 0),
    "small_cnn.dynamo_training": (0, 0),
    "tabular_mlp.script_training": (4, 3),
    "tabular_mlp.dynamo_training": (0, 3),
}


@pytest.mark.parametrize("name", IN_TRAINING)
def test_a_model_in_training_mode_becomes_an_inference_one(name):
    norms, dropouts = IN_TRAINING[name]
    proto = load(name)
    assert codes(fastbn.fold(proto, verify=False))["training"] == norms
    result = fastbn.fold(proto, as_inference=True, verify=False)
    ops = {node.name: node.op_type for node in proto.graph.node}
    changed = [ops[node] for node in result.to_dict()["inference"]["changed"]]
    assert changed == ["BatchNormalization"] * norms + ["Dropout"] * dropouts
    assert "training" not in codes(result)
