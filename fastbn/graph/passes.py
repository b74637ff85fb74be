"""Folding as a pass of onnx_ir, for its Sequential and PassManager and for all that takes its passes; importing this loads onnx_ir."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnx_ir

from fastbn.graph.job import fold

if TYPE_CHECKING:
    from fastbn.graph.fold_result import FoldResult

__all__ = ["FoldBatchNorm"]


class FoldBatchNorm(onnx_ir.passes.FunctionalPass):
    """Fold every inference batch normalization that can be folded exactly.

    Parameters
    ----------
    **options
        Those of `fastbn.fold`.

    Attributes
    ----------
    result : FoldResult or None
        What the last call folded, kept and verified.

    Raises
    ------
    onnx_ir.passes.PassError
        When called: the folded model differs from its original by more than rounding explains.

    Examples
    --------
    >>> import onnx_ir
    >>> nodes = "{ c = Conv (x, w) y = BatchNormalization (c, s, s, s, s) }"
    >>> tiny = f"(float[1, 1, 3] x) => (float[1, 1, 3] y) <float[1, 1, 1] w = {{2}}, float[1] s = {{1}}> {nodes}"
    >>> model = onnx_ir.from_onnx_text(f'<ir_version: 8, opset_import: ["" : 17]> tiny {tiny}')
    >>> fold_batch_norm = FoldBatchNorm(only="y")
    >>> done = onnx_ir.passes.Sequential(fold_batch_norm)(model)
    >>> done.modified, [node.op_type for node in done.model.graph], fold_batch_norm.result
    (True, ['Conv'], <FoldResult 'model': 1 of 1 BatchNormalization folded, parity ok>)
    """

    def __init__(self, **options: Any) -> None:  # Any: what fold takes, which checks it
        super().__init__()
        self.options = options
        self.result: FoldResult | None = None

    def call(self, model: onnx_ir.Model) -> onnx_ir.passes.PassResult:
        """Return a new model; the given one is not changed."""
        self.result = result = fold(model, **self.options)
        if result.parity is not None and result.parity.status == "failed":
            raise onnx_ir.passes.PassError(str(result.parity))
        return onnx_ir.passes.PassResult(onnx_ir.from_proto(result.model), bool(result.folded or result.rewritten))
