"""Sizes that would end the process: onnxruntime's InstanceNormalization and GRU do not survive data without elements."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sketch import model, norm, normal

import fastbn
from fastbn.graph.model import storage
from fastbn.graph.model.index import Index
from fastbn.graph.parity.survival import reader_of_nothing

CROP = {"k": np.array([20]), "l": np.array([1 << 40]), "a": np.array([2])}
INSTANCE = "q = Slice(x, k, l, a) c = InstanceNormalization(q, g, g) y = BatchNormalization(c, s, t, m, v)"
BEHIND = "i = InstanceNormalization(x, g, g) q = Slice(i, k, l, a) c = InstanceNormalization(q, g, g) y = BatchNormalization(c, s, t, m, v)"
GRU = "n = BatchNormalization(x, s, t, m, v) q = Slice(n, k, l, a) p = Transpose <perm = [2,0,1]> (q) y = GRU <hidden_size = 3{}> (p, w, u)"
GATES = {"w": normal(2, 9, 4), "u": normal(2, 9, 3)}
MODELS = {
    "InstanceNormalization": (INSTANCE, {"g": normal(4)}, "c"),
    "behind another": (BEHIND, {"g": normal(4)}, "c"),
    "GRU": (GRU.format(', direction = "bidirectional"'), GATES, "y"),
}


def cropped(name, length="T"):
    nodes, constants, _ = MODELS[name]
    return model(f"(float[2,4,{length}] x) => (float[A,B,C] y) {{ {nodes} }}", **CROP, **constants, **norm(4))


@pytest.mark.parametrize("length", ["T", "30"])
@pytest.mark.parametrize("name", MODELS)
def test_what_reads_nothing_is_found(name, length):
    index = Index(storage.load(cropped(name, length)))
    for size in (16, 20, 21, 64) if length == "T" else (30,):
        shapes = {"x": (2, 4, size)}
        found = reader_of_nothing(index, shapes, {"x": np.zeros(shapes["x"], np.float32)})
        assert (None if found is None else found.label) == (MODELS[name][2] if size <= 20 else None)


@pytest.mark.parametrize("name", MODELS)
def test_a_fold_survives_sizes_that_are_guessed(name, tmp_path):
    """The first guess is 16, and the crop begins at 20."""
    path = tmp_path / "model.onnx"
    path.write_bytes(cropped(name).SerializeToString())
    done = subprocess.run(
        [sys.executable, "-m", "fastbn", "fold", str(path), str(tmp_path / "out.onnx")],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(fastbn.__file__).resolve().parents[1],
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "BatchNormalization 1 -> 0" in done.stdout
    assert "ok" in done.stdout


def test_sizes_with_which_nothing_comes_out_are_the_last_choice():
    text = "(float[2,4,T] x) => (float[A,B,C] y) { q = Slice(x, k, l, a) c = Conv(q, w) y = BatchNormalization(c, s, t, m, v) }"
    result = fastbn.fold(model(text, w=normal(4, 4, 1), **CROP, **norm(4)))
    assert result.parity.ok, result.parity
