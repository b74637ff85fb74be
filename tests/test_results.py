"""Results of fold and verify as text of one line and as data."""

import json

import pytest
from sketch import conv_bn, model, norm

import fastbn
from fastbn.graph.results import Fold, Kept, Parity, json_number

TWO_NORMS = """(float[N,3,8,8] x) => (float[N,4,6,6] y) {
    c = Conv(x, w, b)
    n = BatchNormalization(c, s, t, m, v)
    r = Tanh(n)
    k = Sin(r)
    p = BatchNormalization(k, s, t, m, v)
    y = Cos(p)
}"""


def test_a_fold_result_in_one_line(tmp_path):
    result = fastbn.fold(conv_bn(TWO_NORMS))
    assert repr(result) == "<FoldResult 'model': 1 of 2 BatchNormalization folded, parity ok>"
    path = tmp_path / "some model.onnx"
    path.write_bytes(conv_bn(TWO_NORMS).SerializeToString())
    result = fastbn.fold(path, verify=False)
    assert repr(result) == "<FoldResult 'some model.onnx': 1 of 2 BatchNormalization folded, not verified>"


def test_elementwise_nodes_are_not_counted_as_batch_normalizations():
    text = "(float[1,4] x) => (float[1,4] y) { c = Gemm(x, w) d = Mul(c, s) y = BatchNormalization(d, s, t, m, v) }"
    result = fastbn.fold(model(text, w=norm(4)["s"] * norm(4)["m"][:, None], **norm(4)))
    assert [fold.ops for fold in result.folded] == [("Mul", "BatchNormalization")]
    assert repr(result).startswith("<FoldResult 'model': 1 of 1 BatchNormalization folded,")


def test_a_parity_in_one_line():
    assert repr(Parity("not-run", reason="x")) == "<Parity not-run>"
    parity = Parity("ok", 3, "y", (0, 2), (1.0, 1.5), 0.5, 0.75, notes=("note",) * 1000)
    assert repr(parity) == "<Parity ok: worst 0.5 at y[0,2], allowed 0.75>"


@pytest.mark.parametrize("value", [0.5, None])
def test_results_as_json(value):
    fold = Fold("n", ("BatchNormalization",), "c", "Conv", 4, value, value)
    assert json.loads(json.dumps(fold.to_dict())) == {**vars(fold), "ops": ["BatchNormalization"]}
    kept = Kept("n", ("BatchNormalization",), "unused", "nothing reads it")
    assert json.loads(json.dumps(kept.to_dict())) == {**vars(kept), "ops": ["BatchNormalization"]}
    parity = Parity("failed", values=(float("inf"), 1.0), error=float("nan"))
    shown = {name: value for name, value in vars(parity).items() if name != "where"}  # which is for the sentence alone
    assert parity.to_dict() == {**shown, "values": ["inf", 1.0], "error": "nan"}
    assert json_number(value) == value
