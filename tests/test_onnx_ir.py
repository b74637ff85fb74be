"""Models that onnx_ir and torch hold in memory, and the pass of onnx_ir."""

import warnings

import numpy as np
import onnx
import pytest
from sketch import assert_same, classifier, normal, ops

import fastbn

onnx_ir = pytest.importorskip("onnx_ir")

from fastbn.graph.passes import FoldBatchNorm  # noqa: E402

FOLDED = "Conv Relu GlobalAveragePool Flatten Gemm"


def external(folder):
    """The classifier as onnx_ir reads it from a file whose tensors lie beside it."""
    folder.mkdir(exist_ok=True)
    onnx.save(classifier(), folder / "in.onnx", save_as_external_data=True, location="in.data", size_threshold=0)
    return onnx_ir.load(folder / "in.onnx")


def test_models_of_onnx_ir(tmp_path):
    model = onnx_ir.from_proto(classifier())
    before = onnx_ir.to_proto(model).SerializeToString()
    result = fastbn.fold(model)
    assert ops(result.model) == FOLDED
    assert_same(classifier(), result.model)
    assert fastbn.verify(model, result.model).ok
    assert fastbn.verify(result.model, onnx_ir.from_proto(result.model)).ok
    assert onnx_ir.to_proto(model).SerializeToString() == before
    assert fastbn.deploy(model, tmp_path / "out.onnx", runs=1).status == "done"
    assert ops(onnx.load(tmp_path / "out.onnx")) == FOLDED
    moved = fastbn.reestimate(model, normal(16, 3, 8, 8))
    assert len(moved.statistics) == 1


def test_tensors_beside_the_model(tmp_path, monkeypatch):
    model = external(tmp_path / "there")
    monkeypatch.chdir(tmp_path)
    result = fastbn.fold(model)
    assert_same(classifier(), result.model)
    (tmp_path / "there" / "in.data").unlink()
    with pytest.raises(fastbn.ModelError, match=r"Cannot take the model of onnx_ir: .*; save it and give the path"):
        fastbn.fold(external_without_data(tmp_path))


def external_without_data(tmp_path):
    model = external(tmp_path / "other")
    (tmp_path / "other" / "in.data").unlink()
    return model


def test_what_torch_exports():
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnxscript")
    network = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.Conv2d(3, 4, 3)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        program = torch.onnx.export(network, (torch.ones(1, 3, 6, 6),), dynamo=True, verbose=False)
    result = fastbn.fold(program)
    assert result.parity.ok
    assert "BatchNormalization" not in ops(result.model)
    assert fastbn.verify(program, result.model).ok


def test_the_pass(monkeypatch):
    model = onnx_ir.from_proto(classifier())
    step = FoldBatchNorm()
    assert step.result is None
    done = onnx_ir.passes.PassManager([step, FoldBatchNorm(verify=False)], steps=2)(model)
    assert ops(onnx_ir.to_proto(done.model)) == FOLDED
    assert not step(done.model).modified
    assert step.result.kept == []
    np.testing.assert_equal(ops(onnx_ir.to_proto(model)).count("BatchNormalization"), 1)
    with pytest.raises(fastbn.ArgumentError, match="a glob that names a node"):
        FoldBatchNorm(only="nothing")(model)
    from fastbn.graph import passes

    fold = passes.fold
    monkeypatch.setattr(passes, "fold", lambda *_, **__: failed(fold(model)))
    with pytest.raises(onnx_ir.passes.PassError, match="failed"):
        step(model)


def failed(result):
    result.parity = fastbn.Parity("failed", reason="on purpose")
    return result
