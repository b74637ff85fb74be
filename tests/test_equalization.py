"""Cross-layer equalization: the model computes the same, its channels are more alike, and int8 loses less of them."""

import numpy as np
import onnx
import pytest
from shell import quick
from sketch import model, norm, normal, run

import fastbn
from fastbn.deployment import data_free
from fastbn.deployment.equalization import equalized, rescaled

HEAD = "(float[N,3,8,8] x) => (float[N,5] y)"
END = "p = GlobalAveragePool(d) q = Flatten(p) y = Gemm <transB: int = 1> (q, g, h) }"

FEEDS = [{"x": normal(4, 3, 8, 8, seed=seed)} for seed in range(3)]


def constants(**changes):
    weight = normal(6, 3, 3, 3)
    weight *= np.float32([100, 1, 0.01, 3, 0.3, 1]).reshape(6, 1, 1, 1)
    return {"w": weight, "b": normal(6), "v": normal(4, 6, 3, 3), "g": normal(5, 4), "h": normal(5), **changes}


def written(tmp_path, text, **changes):
    """Return (the model, the equalized one or None, scales by layer)."""
    proto = model(f"{HEAD} {{ {text} {END}", **constants(**changes))
    onnx.save(proto, tmp_path / "in.onnx")
    scales = equalized(tmp_path / "in.onnx", tmp_path / "out.onnx", FEEDS, True)
    return proto, onnx.load(tmp_path / "out.onnx") if scales else None, scales


def same(proto, other):
    for feed in FEEDS:
        (before,), (after,) = run(proto, feed), run(other, feed)
        assert np.abs(after - before).max() <= 64 * 2.0**-24 * np.abs(before).max() * 3


@pytest.mark.parametrize(("text", "more"), [
    ("c = Conv(x, w, b) r = Relu(c) d = Conv(r, v)", {}),
    ("c = Conv(x, w) r = LeakyRelu <alpha: float = 0.1> (c) m = MaxPool <kernel_shape: ints = [2, 2]> (r) d = Conv(m, v)", {}),
    ("c = Conv(x, w, b) r = PRelu(c, a) d = Conv(r, v)", {"a": np.full((6, 1, 1), 0.2, np.float32)}),
    ("c = Conv(x, w, b) r = Relu(c) m = AveragePool <kernel_shape: ints = [3, 3]> (r) d = Conv(m, v)", {}),
    ("c = Conv(x, w, b) r = Relu(c) d1 = Conv(r, v) d2 = Conv(r, u) d = Add(d1, d2)", {"u": normal(4, 6, 3, 3, seed=1)}),
    ("c = Conv(x, w, b) r = Relu(c) e = Conv <group: int = 6> (r, u) d = Conv(e, v)", {"u": normal(6, 1, 3, 3, seed=1)}),
    ("c = Conv(x, w, b) e = ConvTranspose(c, u) d = Conv(e, v)", {"u": normal(6, 6, 2, 2, seed=1)}),
])  # fmt: skip
def test_the_model_computes_the_same_with_channels_more_alike(text, more, tmp_path):
    proto, other, scales = written(tmp_path, text, **more)
    assert other is not None
    assert "c" in scales
    same(proto, other)
    spread = []
    for each in (proto, other):
        watched = onnx.ModelProto.FromString(each.SerializeToString())
        watched.graph.output.add(name="c")
        most = np.abs(run(watched, FEEDS[0])[1]).max(axis=(0, 2, 3))
        spread.append(most.max() / most.min())
    assert spread[1] < spread[0] ** 0.8  # the rest is evened out in the weights behind
    assert [node.op_type for node in other.graph.node] == [node.op_type for node in proto.graph.node]
    assert {tensor.name for tensor in other.graph.initializer} == {name for node in other.graph.node for name in node.input if name in
        {tensor.name for tensor in other.graph.initializer}}  # fmt: skip


@pytest.mark.parametrize("text", [
    "c = Conv(x, w, b) r = Sigmoid(c) d = Conv(r, v)",
    "c = Conv(x, w, b) r = Clip(c, zero, six) d = Conv(r, v)",
    "c = Conv(x, w, b) r = Relu(c) s = Exp(c) t = Mul(r, s) d = Conv(t, v)",
])  # fmt: skip
def test_what_lets_no_scale_pass_stays_as_it_is(text, tmp_path):
    _, other, scales = written(tmp_path, text, zero=np.float32(0), six=np.float32(6))
    assert "c" not in scales
    assert other is None or all(name in ("d",) for name in scales)


def test_dead_channels_keep_their_scale(tmp_path):
    weight = constants()["w"]
    weight[2] = 0
    proto, other, scales = written(tmp_path, "c = Conv(x, w) r = Relu(c) d = Conv(r, v)", w=weight)
    assert scales["c"][2] == 1
    same(proto, other)


def test_the_same_scales_go_into_a_model_with_other_weights(tmp_path):
    text = "c = Conv(x, w, b) r = Relu(c) d = Conv(r, v)"
    _, _, scales = written(tmp_path, text)
    other = model(f"{HEAD} {{ {text} {END}", **constants(b=normal(6, seed=5), w=normal(6, 3, 3, 3, seed=6)))
    onnx.save(other, tmp_path / "other.onnx")
    assert rescaled(tmp_path / "other.onnx", tmp_path / "made.onnx", scales)
    same(other, onnx.load(tmp_path / "made.onnx"))
    assert not rescaled(tmp_path / "other.onnx", tmp_path / "none.onnx", {"unknown": np.ones(6)})
    assert not (tmp_path / "none.onnx").exists()


def test_weights_in_data_files_are_read_there(tmp_path):
    proto = model(f"{HEAD} {{ c = Conv(x, w, b) r = Relu(c) d = Conv(r, v) {END}", **constants())
    onnx.save(proto, tmp_path / "in.onnx", save_as_external_data=True, location="in.data", size_threshold=0)
    assert equalized(tmp_path / "in.onnx", tmp_path / "out.onnx", FEEDS, False)
    same(model(f"{HEAD} {{ c = Conv(x, w, b) r = Relu(c) d = Conv(r, v) {END}", **constants()), onnx.load(tmp_path / "out.onnx"))


@pytest.mark.parametrize("per_tensor", [False, True])
def test_int8_loses_less_of_channels_that_are_alike(per_tensor, monkeypatch):
    quick(monkeypatch)
    text = f"{HEAD} {{ c = Conv(x, w, b) n = BatchNormalization(c, s, t, m, var) r = Relu(n) d = Conv(r, v) {END}"
    bn = norm(6)
    bn["var"] = bn.pop("v")
    bn["s"] = np.float32([30, 1, 0.1, 0.3, 1, 0.1])
    proto = model(text, **{**constants(w=normal(6, 3, 3, 3)), **bn})
    for tensor in proto.graph.initializer:  # the small channels count as much as the large one
        if tensor.name == "v":
            tensor.CopyFrom(onnx.numpy_helper.from_array(normal(4, 6, 3, 3) / bn["s"].reshape(1, 6, 1, 1), "v"))

    def error():
        made = fastbn.deploy(proto, quantize=True, data_free=True, max_drop=1, float_nodes=0, runs=1, goal="size", per_tensor=per_tensor)
        (after,), (before,) = run(onnx.load_from_string(made.quantized), FEEDS[0]), run(proto, FEEDS[0])
        return np.linalg.norm(after - before) / np.linalg.norm(before), made.quantization.equalization

    loss, trial = error()
    assert (trial.layers, trial.kept) == (2, True)
    monkeypatch.setattr(data_free, "equalized", lambda *arguments: {})
    other, trial = error()
    assert trial is None
    assert loss < other / 2
