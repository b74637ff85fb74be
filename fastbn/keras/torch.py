"""The torch backend: the custom operators of fastbn.torch, and for masks an autograd function around the callbacks."""

import torch
from torch.autograd.function import once_differentiable

from fastbn.keras import callbacks
from fastbn.torch import batch_norm

__all__ = ["infer", "train"]


def infer(x, mean, var, weight, bias, eps, axis):
    """Return y."""
    # An exported graph gets the operator that everybody knows.
    exporting = torch.onnx.is_in_onnx_export() and (torch.compiler.is_compiling() or torch.jit.is_tracing())
    function = torch.nn.functional.batch_norm if exporting else batch_norm
    axis %= x.dim()  # an exporter would write a negative axis as it is
    return function(x.movedim(axis, 1), mean, var, weight, bias, eps=eps).movedim(1, axis)


def train(x, running_mean, running_var, weight, bias, mask, momentum, eps, axis):
    """Return (y, running_mean, running_var); only y has a gradient."""
    if mask is not None:
        single = x.float() if x.itemsize == 2 else x
        y, *running = _Masked.apply(single, running_mean, running_var, weight, bias, mask, momentum, eps, axis)
        return y.to(x.dtype), *running
    x = x.movedim(axis, 1)
    y, mean, m2 = torch.ops.fastbn.batch_norm_train(x, weight, bias, eps)
    count = x.numel() // max(x.shape[1], 1)
    if count:
        running = ((running_mean, mean), (running_var, m2 / count))
        running_mean, running_var = (torch.lerp(old.double(), batch, momentum).to(old.dtype) for old, batch in running)
    return y.movedim(1, axis), running_mean, running_var


class _Masked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, running_mean, running_var, weight, bias, mask, momentum, eps, axis):
        ctx.options = {"eps": eps, "axis": axis}
        *results, ctx.statistics = callbacks.train(
            *_arrays(x, running_mean, running_var, weight, bias, mask), momentum=momentum, **ctx.options
        )
        ctx.save_for_backward(x, weight, bias, mask)
        results = [torch.from_numpy(result) for result in results]
        ctx.mark_non_differentiable(*results[1:])
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, *_):
        x, weight, bias, mask = _arrays(*ctx.saved_tensors)
        found = callbacks.train_backward(*_arrays(dy), x, weight, bias, ctx.statistics, mask, **ctx.options)
        dx, dweight, dbias = (None if gradient is None else torch.from_numpy(gradient) for gradient in found)
        return dx, None, None, dweight, dbias, None, None, None, None


def _arrays(*tensors):
    return [None if tensor is None else tensor.detach().numpy() for tensor in tensors]
