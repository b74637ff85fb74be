"""Folding as a pass of Olive, Microsoft's optimizer of models; importing this loads Olive."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from olive.model import ONNXModelHandler
from olive.model.utils import resolve_onnx_path
from olive.passes import Pass
from olive.passes.pass_config import PassConfigParam

from fastbn.errors import ArgumentTypeError, expected
from fastbn.graph.job import fold

if TYPE_CHECKING:
    from fastbn.graph.fold_result import FoldResult

__all__ = ["FoldBatchNorm"]

# Options of fold that a configuration may have -> type, default, what they do.
OPTIONS: dict[str, tuple[Any, Any, str]] = {
    "only": (list[str] | None, None, "Globs over names of nodes: fold only these."),
    "skip": (list[str] | None, None, "Globs over names of nodes: never fold these."),
    "verify": (bool, True, "Run every fold and the whole model in onnxruntime against the original."),
    "input_shapes": (dict[str, list[int]] | None, None, "Sizes of graph inputs that the model leaves open."),
    "freeze_inputs": (bool, False, "Make constants of initializers that are also graph inputs."),
    "as_inference": (bool, False, "Make inference nodes of BatchNormalization and Dropout in training mode."),
    "rewrite_left": (str | None, None, "conv or affine: what to make of each BatchNormalization that cannot be folded."),
}


class FoldBatchNorm(Pass):
    """Fold every inference batch normalization of an ONNX model that can be folded exactly, as `fastbn.fold` does.

    Its configuration takes only, skip, verify, input_shapes, freeze_inputs, as_inference and rewrite_left. docs/recipes.md has a workflow.

    Attributes
    ----------
    result : FoldResult or None
        What the last run folded, kept and verified.

    Raises
    ------
    ParityError
        When run: the folded model differs from its original by more than rounding explains.
    ArgumentTypeError
        When run: the model is no ONNX model.
    """

    result: FoldResult | None = None

    @classmethod
    def _default_config(cls, accelerator_spec: Any) -> dict[str, Any]:  # Any: of Olive
        return {
            name: PassConfigParam(type_=kind, default_value=default, description=what) for name, (kind, default, what) in OPTIONS.items()
        }

    def _run_for_config(self, model: Any, config: Any, output_model_path: str) -> Any:  # Any: of Olive
        if not isinstance(model, ONNXModelHandler):
            raise ArgumentTypeError(expected("an ONNX model", type(model).__name__, "model"))
        path = Path(resolve_onnx_path(output_model_path, Path(model.model_path).name))
        self.result = fold(model.model_path, **{name: getattr(config, name) for name in OPTIONS})
        written = self.result.save(path)
        # Olive copies the folder of a model whose tensors lie beside it.
        return ONNXModelHandler(path.parent, onnx_file_name=path.name) if len(written) > 1 else ONNXModelHandler(path)
