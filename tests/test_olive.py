"""The pass of Olive; tests/test_recipes.py runs a workflow with it."""

import onnx
import pytest
from sketch import assert_same, classifier, ops

import fastbn

olive = pytest.importorskip("olive")

from olive.model import ONNXModelHandler  # noqa: E402
from olive.passes.olive_pass import create_pass_from_dict  # noqa: E402

from fastbn.graph.olive import FoldBatchNorm  # noqa: E402

FOLDED = "Conv Relu GlobalAveragePool Flatten Gemm"


@pytest.mark.parametrize("is_external", [False, True])
def test_the_pass(is_external, tmp_path):
    onnx.save(classifier(), tmp_path / "in.onnx", save_as_external_data=is_external, location="in.data", size_threshold=0)
    fold = create_pass_from_dict(FoldBatchNorm, {"verify": True}, disable_search=True)
    done = fold.run(ONNXModelHandler(tmp_path / "in.onnx"), str(tmp_path / "folded"))
    assert ops(onnx.load(done.model_path)) == FOLDED
    assert_same(classifier(), onnx.load(done.model_path))
    assert fold.result.parity.ok


def test_options_reach_the_fold(tmp_path):
    onnx.save(classifier(), tmp_path / "in.onnx")
    fold = create_pass_from_dict(FoldBatchNorm, {"skip": ["*"], "verify": False}, disable_search=True)
    done = fold.run(ONNXModelHandler(tmp_path / "in.onnx"), str(tmp_path / "folded"))
    assert len(fold.result.kept) == 1
    assert fold.result.parity is None
    assert ops(onnx.load(done.model_path)) == ops(classifier())


def test_what_is_no_onnx_model(tmp_path):
    fold = create_pass_from_dict(FoldBatchNorm, {}, disable_search=True)
    with pytest.raises(fastbn.ArgumentTypeError, match=r"Expected an ONNX model, got str - at `model`"):
        fold._run_for_config("model", fold.config, str(tmp_path))
