"""Inputs of a fold's own proof: in the sizes of the model where they matter, small where they do not."""

import os
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from sketch import conv_bn, folds, model, norm, normal

import fastbn
from fastbn.cli import main
from fastbn.graph import runtime
from fastbn.graph.model import storage
from fastbn.graph.model.index import Index
from fastbn.graph.parity import fold_parity, probe
from fastbn.graph.planner.planning import plan

FAULTS = Path(__file__).resolve().parents[2] / "shared" / "cases" / "faults"

# Elements that one input of a probe needs at most where its sizes do not matter.
SMALL = 1 << 16

# Name -> nodes between a convolution of [8, 3, 8, 8] and its norm, constants, operators that stay.
FIXED = {
    "Reshape [1, C, -1]": ("d = Reshape(c, k)", 1, {"k": [1, 4, -1]}, "Conv Reshape"),
    "Reshape [8, C, -1]": ("d = Reshape(c, k)", 8, {"k": [8, 4, -1]}, "Conv Reshape"),
    "Reshape [8, C, 36]": ("d = Reshape(c, k)", 8, {"k": [8, 4, 36]}, "Conv Reshape"),
    "Reshape there and back": ("e = Reshape(c, k) d = Reshape(e, l)", 8, {"k": [8, 4, 36], "l": [8, 4, 6, 6]}, "Conv Reshape Reshape"),
    "Reshape by the batch": ("d = Reshape(c, k)", 3, {"k": [-1, 4, 36]}, "Conv Reshape"),
    "Resize to sizes": ("d = Resize(c, , , k)", 8, {"k": [8, 4, 9, 9]}, "Conv Resize"),
    "Expand": ("p = GlobalAveragePool(c) d = Expand(p, k)", 8, {"k": [8, 4, 3, 3]}, "Conv GlobalAveragePool Expand"),
    "Slice of the batch": ("d = Slice(c, k, l, a)", 8, {"k": [2], "l": [7], "a": [0]}, "Conv Slice"),
}


def between(case):
    """Return a model with a fixed batch, and what stays of it."""
    nodes, batch, constants, stays = FIXED[case]
    text = f"(float[{batch},3,8,8] x) => (float y) {{ c = Conv(x, w, b) {nodes} y = BatchNormalization(d, s, t, m, v) }}"
    return conv_bn(text, **{name: np.array(values) for name, values in constants.items()}), stays


@pytest.mark.parametrize("case", FIXED)
def test_a_fold_over_nodes_with_fixed_sizes_is_proved(case):
    proto, stays = between(case)
    (fold,) = folds(proto, stays).folded
    assert fold.error <= fold.bound
    assert fold.note is None


@pytest.mark.parametrize("batch", [1, 8])
def test_a_norm_before_a_reshape_and_a_gemm(batch):
    text = f"""(float[{batch},3,8,8] x) => (float[{batch},5] y) {{
        c = Conv(x, w, b)
        n = BatchNormalization(c, s, t, m, v)
        r = Tanh(n)
        l = BatchNormalization(r, s, t, m, v)
        f = Reshape(l, k)
        y = Gemm(f, w2)
    }}"""
    result = folds(conv_bn(text, k=np.array([batch, 144]), w2=normal(144, 5)), "Conv Tanh Reshape Gemm")
    assert [fold.error is not None for fold in result.folded] == [True, True]


def test_scales_of_a_resize_with_a_fixed_batch():
    text = (
        '(float[8,3,8,8] x) => (float y) { c = Conv(x, w, b) d = Resize <mode = "linear"> (c, , k) y = BatchNormalization(d, s, t, m, v) }'
    )
    (fold,) = folds(conv_bn(text, k=np.float32([1, 1, 2, 2])), "Conv Resize").folded
    assert fold.error is not None


@pytest.fixture
def sizes(monkeypatch):
    """The number of elements of each input of every probe that is made."""
    found = []
    make = probe.Probe

    def measured(run, *arguments):
        def counting(*options):
            inputs = run(*options)
            found.extend(values.size for values in inputs.values())
            return inputs

        return make(counting, *arguments)

    monkeypatch.setattr(probe, "Probe", measured)
    return found


LARGE = {
    "MatMul of many rows": ("float[40000,20,10] x", "c = MatMul(x, w) y = Mul(c, k)", {"w": normal(10, 6), "k": normal(6)}),
    "MatMul of many rows, Add": (
        "float[40000,20,10] x",
        "c = MatMul(x, w) d = Add(c, k) y = Mul(d, k)",
        {"w": normal(10, 6), "k": normal(6)},
    ),
    "Conv of a large image": ("float[1,3,720,1280] x", "c = Conv(x, w) y = BatchNormalization(c, s, t, m, v)", {"w": normal(4, 3, 3, 3)}),
    "Conv of a large batch": ("float[4096,3,16,16] x", "c = Conv(x, w) y = BatchNormalization(c, s, t, m, v)", {"w": normal(4, 3, 3, 3)}),
    "Conv 1-D of a long signal": ("float[1,3,2000000] x", "c = Conv(x, w) y = BatchNormalization(c, s, t, m, v)", {"w": normal(4, 3, 9)}),
    "Gemm of many rows": ("float[100000,30] x", "c = Gemm(x, w) y = BatchNormalization(c, s, t, m, v)", {"w": normal(30, 4)}),
    "pool of a large image": (
        "float[1,3,720,1280] x",
        "c = Conv(x, w) d = AveragePool <kernel_shape = [2,2]> (c) y = BatchNormalization(d, s, t, m, v)",
        {"w": normal(4, 3, 3, 3)},
    ),
    "two branches of a large image": (
        "float[1,3,720,1280] x",
        "c = Conv(x, w) e = Conv(x, w2) d = Add(c, e) y = BatchNormalization(d, s, t, m, v)",
        {"w": normal(4, 3, 3, 3), "w2": normal(4, 3, 3, 3, seed=2)},
    ),
}


@pytest.mark.parametrize("case", LARGE)
def test_a_probe_is_small_where_sizes_do_not_matter(case, sizes):
    shape, nodes, constants = LARGE[case]
    proto = model(f"({shape}) => (float y) {{ {nodes} }}", **constants, **(norm(4) if "BatchNormalization" in nodes else {}))
    planning = plan(Index(storage.load(proto)))
    assert planning.plans
    for found in planning.plans:
        result = fold_parity.check_fold(found, planning.view)
        assert result.ok
        assert result.error is not None, result.note
    assert sizes
    assert max(sizes) <= SMALL


@pytest.mark.skipif(not FAULTS.is_dir(), reason=f"no files in {os.path.relpath(FAULTS)}")
@pytest.mark.parametrize("name", ["fp16_in_if", "dynamic_channels", "u11conv", "two_scopes", "two_scopes_silent", "all_nan"])
def test_files_of_public_reports(name, tmp_path):
    path = FAULTS / f"{name}.onnx"
    assert main(["fold", str(path), str(tmp_path / "out.onnx"), "-q"]) == 0
    result = fastbn.fold(onnx.load(path))
    assert result.parity is None or result.parity.ok


COMPUTED = {
    "Resize to computed sizes": "h = Shape(x) i = Slice(h, two, four) o = Concat <axis = 0> (pair, i) d = Resize(c, , , o)",
    "Reshape to computed sizes": "h = Shape(c) i = Slice(h, zero, two) o = Concat <axis = 0> (i, rest) d = Reshape(c, o)",
    "Slice to a computed end": "h = Shape(c) i = Slice(h, two, three) d = Slice(c, zero, i, two)",
    "Expand by computed sizes": "p = GlobalAveragePool(c) h = Shape(c) d = Expand(p, h)",
}
LISTS = {"zero": [0], "two": [2], "three": [3], "four": [4], "rest": [-1], "pair": [2, 4]}


@pytest.mark.parametrize("case", COMPUTED)
def test_a_fold_over_computed_sizes_is_proved(case):
    """Its inputs are taken from a run of the original: numbers at random would be no sizes."""
    text = f"(float[2,3,h,w] x) => (float y) {{ c = Conv(x, w, b) {COMPUTED[case]} y = BatchNormalization(d, s, t, m, v) }}"
    lists = {name: np.array(values) for name, values in LISTS.items() if f"{name})" in text or f"{name}," in text}
    (fold,) = fastbn.fold(conv_bn(text, **lists)).folded
    assert 0 < fold.error <= fold.bound
    assert fold.note is None


def test_a_scalar_that_the_model_computes_is_captured():
    """A dynamically quantized convolution, whose result is scaled by what the run finds."""
    text = """(float[n,3,8,8] x) => (float y) {
        q, qs, qz = DynamicQuantizeLinear(x) i = ConvInteger(q, wq, qz, wz) f = Cast <to = 1> (i) g = Mul(qs, k) h = Mul(f, g)
        y = BatchNormalization(h, s, t, m, v)
    }"""
    weights = {"wq": np.arange(108).reshape(4, 3, 3, 3).astype(np.uint8), "wz": np.uint8(50), "k": np.float32(0.02)}
    result = fastbn.fold(model(text, **weights, **norm(4)))
    assert result.folded
    assert all(fold.error is not None and fold.note == "an Add keeps the shift" for fold in result.folded)


SAID = {
    "Resize(x, , , s)": ("float", "Type Error: Type 'tensor(float)' of input parameter (s) of operator (Resize) in node (y) is invalid."),
    "Reshape(x, s)": (
        "int64",
        "Reshape 'y': The input tensor cannot be reshaped to the requested shape. Input shape:{2,3}, requested shape:{7}",
    ),
    "Squeeze(x, s)": ("int64", "Squeeze 'y': "),
    "MatMul(x, s)": ("float", "MatMul"),
}


@pytest.mark.parametrize("node", SAID)
def test_no_message_shows_sources_of_onnxruntime(node):
    kind, message = SAID[node]
    proto = model(f"(float[a,b] x, {kind}[c] s) => (float y) {{ y = {node} }}")
    feed = {"x": normal(2, 3), "s": np.array([7]).astype(np.int64 if kind == "int64" else np.float32)}
    with pytest.raises(runtime.runtime_errors()) as error:
        runtime.session(proto.SerializeToString()).run(None, feed)
    said = runtime.said(error.value)
    assert said.startswith(message)
    assert not re.search(r"\.(h|cc|cpp)\b|onnxruntime|invalid model|status code", said), said
