"""The torch backend: the custom operators of fastbn.torch, and for masks an autograd function around the callbacks."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastbn.keras import callbacks
from fastbn.torch import batch_norm

__all__ = ["infer", "train"]

# momentum, eps and axis
_Options: TypeAlias = tuple[float, float, int]


def infer(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, axis: int) -> Tensor:
    """Return y."""
    # An exported graph gets ONNX's BatchNormalization.
    exporting = torch.onnx.is_in_onnx_export() and (torch.compiler.is_compiling() or torch.jit.is_tracing())
    function = torch.nn.functional.batch_norm if exporting else batch_norm
    axis %= x.dim()  # an exporter would write a negative axis as it is
    return function(x.movedim(axis, 1), mean, var, weight, bias, eps=eps).movedim(1, axis)


def train(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    momentum: float,
    eps: float,
    axis: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (y, running_mean, running_var); only y has a gradient."""
    if mask is not None:
        single = x.float() if x.itemsize == 2 else x
        y, running_mean, running_var = _Masked.apply(single, running_mean, running_var, weight, bias, mask, (momentum, eps, axis))
        return y.to(x.dtype), running_mean, running_var
    x = x.movedim(axis, 1)
    y, mean, m2 = torch.ops.fastbn.batch_norm_train(x, weight, bias, eps)
    count = x.numel() // max(x.shape[1], 1)
    if count:
        running = ((running_mean, mean), (running_var, m2 / count))
        running_mean, running_var = (torch.lerp(old.double(), batch, momentum).to(old.dtype) for old, batch in running)
    return y.movedim(1, axis), running_mean, running_var


class _Masked(torch.autograd.Function):
    @staticmethod
    # Any: torch makes the context an object of a class of its own, to which each function adds what it needs.
    def forward(
        ctx: Any,
        x: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mask: Tensor,
        options: _Options,
    ) -> tuple[Tensor, ...]:
        momentum, ctx.eps, ctx.axis = options
        arrays = [_array(tensor) for tensor in (x, running_mean, running_var, weight, bias, mask)]
        *results, ctx.statistics = callbacks.train(*arrays, momentum=momentum, eps=ctx.eps, axis=ctx.axis)
        ctx.save_for_backward(x, weight, bias, mask)
        y, *running = [torch.from_numpy(result) for result in results]
        ctx.mark_non_differentiable(*running)
        return y, *running

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mask = map(_array, ctx.saved_tensors)
        results = callbacks.train_backward(_array(dy), x, weight, bias, ctx.statistics, mask, eps=ctx.eps, axis=ctx.axis)
        dx, dweight, dbias = (None if gradient is None else torch.from_numpy(gradient) for gradient in results)
        return dx, None, None, dweight, dbias, None, None


# Any: an array where there is a tensor, None where there is none.
def _array(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.detach().numpy()
