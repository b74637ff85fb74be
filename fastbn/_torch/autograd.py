"""Steps of autograd in eager mode: the kernels without the operators' dispatch, which costs a small batch several times its arithmetic.

The tensors of a forward pass are plain ones with memory on the CPU; a gradient may be anything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from fastbn._torch import kernels, operators
from fastbn._torch.kernels import values_per_channel

if TYPE_CHECKING:
    from fastbn._types import FloatArray

__all__ = ["apply"]

_is_grad_enabled: Callable[[], bool] = torch.is_grad_enabled

# (running_mean, running_var, training, momentum, eps, batches): each argument of its own would cost a small batch time.
_Options: TypeAlias = tuple[Tensor | None, Tensor | None, bool, float, float, Tensor | None]


def apply(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    batches: Tensor | None = None,
) -> Tensor:
    """Batch normalization, with the checks of the kernels; `batches`, where given, counts one more when training."""
    if _is_grad_enabled() and (
        input.requires_grad or (weight is not None and weight.requires_grad) or (bias is not None and bias.requires_grad)
    ):
        return _apply_step(input, weight, bias, (running_mean, running_var, training, momentum, eps, batches))
    if training:
        return kernels.train(input, weight, bias, running_mean, running_var, momentum, eps, batches)[0]
    return kernels.infer(input, running_mean, running_var, weight, bias, eps)


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    # Any: torch makes the context an object of a class of its own, to which each function adds what it needs.
    def forward(ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, options: _Options) -> Tensor:
        running_mean, running_var, training, momentum, eps, batches = options
        if training:
            y, mean, m2 = kernels.train(input, weight, bias, running_mean, running_var, momentum, eps, batches)
            ctx.save_for_backward(input, weight)
            ctx.saved = (mean, m2), bias, eps
        else:
            y = kernels.infer(input, running_mean, running_var, weight, bias, eps)
            ctx.save_for_backward(input, weight, running_mean, running_var)
            ctx.saved = None, bias, eps
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, *running = ctx.saved_tensors
        batch: tuple[FloatArray, FloatArray] | None
        batch, bias, eps = ctx.saved
        wanted = ctx.needs_input_grad
        # Every tensor of the call counts: hooks may have put anything in place of the gradient and of what was saved.
        if _is_grad_enabled() or kernels.is_intercepted() or not kernels.plain.have_memory(grad, input, weight, *running):
            if batch is None:
                results = operators.gradients(grad, input, running[0].double(), running[1].double(), weight, 1, eps, False)
            else:
                mean, m2 = torch.from_numpy(batch[0]), torch.from_numpy(batch[1])
                results = operators.gradients(grad, input, mean, m2, weight, values_per_channel(input), eps, True)
            return *(gradient if want else None for gradient, want in zip(results, wanted[:3], strict=True)), None
        if batch is None:
            return *kernels.backward(grad, input, running[0], running[1], weight, bias, 1, eps, False, wanted), None
        return *kernels.backward(grad, input, batch[0], batch[1], weight, bias, 0, eps, True, wanted), None


# What Function.apply calls where no transform of torch.func is active; the caller has checked that already.
_apply_step: Callable[[Tensor, Tensor | None, Tensor | None, _Options], Tensor] = super(torch.autograd.Function, _BatchNorm).apply
