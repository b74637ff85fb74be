"""The custom operators: what torch.compile, torch.export, dispatch modes and tensors without memory of their own see.

Anybody may call them, so that they check. Each has a fake implementation, gradients, and a rule for tensors sharded over processes.
"""

from typing import Any

import torch
from torch import Tensor

from fastbn._torch import distributed, kernels
from fastbn._torch.kernels import check_input, check_values, values_per_channel
from fastbn.errors import TensorError, expected
from fastbn.stats import BatchStats

__all__ = ["batch_norm", "gradients"]

# Any, below: torch makes the contexts of autograd, objects of classes of its own, to which each function adds what it needs.


@torch.library.custom_op("fastbn::batch_norm_train", mutates_args=(), device_types="cpu")
def _train_op(input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    check_input(input)
    y, mean, m2 = kernels.train(input, weight, bias, None, None, 0.0, eps, allow_one_value=True)
    return y, torch.from_numpy(mean), torch.from_numpy(m2)


@_train_op.register_fake
def _(input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    mean, m2 = (input.new_empty(input.shape[1], dtype=torch.float64) for _ in range(2))
    return torch.empty_like(input), mean, m2


@torch.library.custom_op("fastbn::batch_norm", mutates_args=(), device_types="cpu")
def _infer_op(input: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    check_input(input)
    check_values(mean, "mean", input)
    check_values(var, "var", input)
    return kernels.infer(input, mean, var, weight, bias, eps)


@_infer_op.register_fake
def _(input: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return torch.empty_like(input)


@torch.library.custom_op("fastbn::batch_norm_backward", mutates_args=(), device_types="cpu")
def _backward_op(
    grad: Tensor, input: Tensor, mean: Tensor, m2: Tensor, weight: Tensor | None, count: int, eps: float, training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    check_input(input)
    check_values(mean, "mean", input)
    check_values(m2, "m2", input)
    if grad.shape != input.shape or grad.dtype is not input.dtype or not grad.is_cpu:
        got = f"{grad.dtype} of shape {tuple(grad.shape)} on {grad.device}"
        raise TensorError(expected(f"{input.dtype} of shape {tuple(input.shape)}, as the input", got, "grad"))
    statistics = kernels.as_float64(mean), kernels.as_float64(m2)
    dx, dweight, dbias = kernels.backward(grad, input, *statistics, weight, weight, count, eps, training)
    return dx, dweight, dbias


@_backward_op.register_fake
def _(
    grad: Tensor, input: Tensor, mean: Tensor, m2: Tensor, weight: Tensor | None, count: int, eps: float, training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float32 if weight is None else weight.dtype
    dweight, dbias = (input.new_empty(input.shape[1], dtype=dtype) for _ in range(2))
    return torch.empty_like(input), dweight, dbias


@torch.library.custom_op("fastbn::update_running", mutates_args=("running_mean", "running_var"), device_types="cpu")
def _update_op(running_mean: Tensor | None, running_var: Tensor | None, mean: Tensor, m2: Tensor, count: int, momentum: float) -> None:
    for where, tensor in {"running_mean": running_mean, "running_var": running_var, "m2": m2}.items():
        check_values(tensor, where, mean[None])
    stats = BatchStats(count, kernels.as_float64(mean), kernels.as_float64(m2))
    kernels.update_running(running_mean, running_var, stats, momentum)


@_update_op.register_fake
def _(running_mean: Tensor | None, running_var: Tensor | None, mean: Tensor, m2: Tensor, count: int, momentum: float) -> None:
    return None


# ---- gradients ----


def _save_train(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    input, weight, bias, ctx.eps = inputs
    ctx.has_bias = bias is not None
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(input, weight, output[1], output[2])


def _train_gradients(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    input, weight, mean, m2 = ctx.saved_tensors
    dx, dweight, dbias = gradients(grad, input, mean, m2, weight, values_per_channel(input), ctx.eps, True)
    return dx, None if weight is None else dweight, dbias if ctx.has_bias else None, None


def _save_infer(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, mean, var, weight, bias, ctx.eps = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(input, weight, mean, var)


def _infer_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, weight, mean, var = ctx.saved_tensors
    dx, dweight, dbias = gradients(grad, input, mean.double(), var.double(), weight, 1, ctx.eps, False)
    return dx, None, None, None if weight is None else dweight, dbias if ctx.has_bias else None, None


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    grad, input, mean, m2, weight, ctx.count, ctx.eps, ctx.training = inputs
    ctx.save_for_backward(grad, input, mean, m2, weight)


def gradients(
    grad: Tensor, input: Tensor, mean: Tensor, m2: Tensor, weight: Tensor | None, count: int, eps: float, training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dx, dweight, dbias) by operators that can be differentiated and transformed again; mean and m2 are float64."""
    if not kernels.is_transformed():
        results: tuple[Tensor, Tensor, Tensor] = _backward_op(grad, input, mean, m2, weight, count, eps, training)
        return results
    scale = torch.ones_like(mean) if weight is None else weight.double()
    dx, dweight, dbias = _formula(grad.double(), input.double(), mean, m2, scale, count, eps, training)
    dtype = torch.float32 if weight is None else weight.dtype
    return dx.to(input.dtype), dweight.to(dtype), dbias.to(dtype)


def _formula(
    dy: Tensor, x: Tensor, mean: Tensor, m2: Tensor, scale: Tensor, count: int, eps: float, training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward pass in torch's own operators on float64, which torch knows how to differentiate and transform."""
    per_channel = [1, -1] + [1] * (x.dim() - 2)
    reduced = [axis for axis in range(x.dim()) if axis != 1]
    if training:
        centered = x - x.mean(reduced).view(per_channel)
        invstd = (centered.square().mean(reduced) + eps).rsqrt().view(per_channel)
    else:
        centered, invstd = x - mean.view(per_channel), (m2 / count + eps).rsqrt().view(per_channel)
    xhat = centered * invstd
    dbias, dweight = dy.sum(reduced), (dy * xhat).sum(reduced)
    dx = dy - (dbias.view(per_channel) + xhat * dweight.view(per_channel)) / count if training else dy
    return dx * scale.view(per_channel) * invstd, dweight, dbias


def _second_gradients(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient of the backward pass, by differentiating its formula; where a graph is wanted, it can be differentiated again."""
    grad, input, mean, m2, weight = ctx.saved_tensors
    given = [tensor for tensor in (grad, input, weight) if tensor is not None]
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, because grad may depend on input: the derivative is taken with respect to the views alone.
        views = [tensor.double().view_as(tensor) for tensor in given]
        leaves = [tensor if create_graph and tensor.requires_grad else tensor.detach().requires_grad_() for tensor in views]
        dy, x, scale = leaves if weight is not None else (*leaves, torch.ones_like(mean))
        outputs = _formula(dy, x, mean, m2, scale, ctx.count, ctx.eps, ctx.training)
        second = torch.autograd.grad(outputs, leaves, [each.double() for each in grads], allow_unused=True, create_graph=create_graph)
    ddy, dx, *parameters = [None if value is None else value.to(like.dtype) for value, like in zip(second, given, strict=True)]
    return ddy, dx, None, None, parameters[0] if parameters else None, None, None, None


_train_op.register_autograd(_train_gradients, setup_context=_save_train)
_infer_op.register_autograd(_infer_gradients, setup_context=_save_infer)
_backward_op.register_autograd(_second_gradients, setup_context=_save_backward)

_SHARDING: dict[Any, distributed.Rule] = {
    _train_op: distributed.train_sharding,
    _infer_op: distributed.infer_sharding,
    _backward_op: distributed.backward_sharding,
}


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """Batch normalization by the operators."""
    if not torch.compiler.is_compiling():
        distributed.register_sharding(_SHARDING)
    if not training:
        return _infer_op(input, running_mean, running_var, weight, bias, eps)
    y, mean, m2 = _train_op(input, weight, bias, eps)
    if running_mean is not None or running_var is not None:
        update = distributed.update_running_sharded if distributed.is_sharded(mean) else _update_op
        update(running_mean, running_var, mean, m2, values_per_channel(input), momentum)
    return y


distributed.register_sharding(_SHARDING)
