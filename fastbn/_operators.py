"""The custom operators: what torch.compile, torch.export, dispatch modes and tensors without memory of their own see.

Anybody may call them, so that they check. Each has a fake implementation, gradients, and a rule for tensors sharded over processes.
"""

import contextlib
import sys
from typing import Any

import torch
from torch import Tensor

from fastbn import _torch
from fastbn._torch import check_input, check_vector, values_per_channel
from fastbn.errors import TensorError, expected
from fastbn.stats import BatchStats

__all__ = ["batch_norm", "gradients"]


@torch.library.custom_op("fastbn::batch_norm_train", mutates_args=(), device_types="cpu")
def _train_op(input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    check_input(input)
    y, mean, m2 = _torch.train(input, weight, bias, None, None, 0.0, eps, single=True)
    return y, torch.from_numpy(mean), torch.from_numpy(m2)


@_train_op.register_fake
def _(input, weight, bias, eps):
    stats = [input.new_empty(input.shape[1], dtype=torch.float64) for _ in range(2)]
    return torch.empty_like(input), *stats


@torch.library.custom_op("fastbn::batch_norm", mutates_args=(), device_types="cpu")
def _infer_op(input: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    check_input(input)
    check_vector(mean, "mean", input)
    check_vector(var, "var", input)
    return _torch.infer(input, mean, var, weight, bias, eps)


@_infer_op.register_fake
def _(input, mean, var, weight, bias, eps):
    return torch.empty_like(input)


@torch.library.custom_op("fastbn::batch_norm_backward", mutates_args=(), device_types="cpu")
def _backward_op(
    grad: Tensor, input: Tensor, mean: Tensor, m2: Tensor, weight: Tensor | None, count: int, eps: float, training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    check_input(input)
    check_vector(mean, "mean", input)
    check_vector(m2, "m2", input)
    if grad.shape != input.shape or grad.dtype is not input.dtype or not grad.is_cpu:
        got = f"{grad.dtype} of shape {tuple(grad.shape)} on {grad.device}"
        raise TensorError(expected(f"{input.dtype} of shape {tuple(input.shape)}, as the input", got, "grad"))
    return _torch.backward(grad, input, _torch.wide(mean), _torch.wide(m2), weight, weight, count, eps, training)


@_backward_op.register_fake
def _(grad, input, mean, m2, weight, count, eps, training):
    dtype = torch.float32 if weight is None else weight.dtype
    return torch.empty_like(input), *(input.new_empty(input.shape[1], dtype=dtype) for _ in range(2))


@torch.library.custom_op("fastbn::update_running", mutates_args=("running_mean", "running_var"), device_types="cpu")
def _update_op(running_mean: Tensor | None, running_var: Tensor | None, mean: Tensor, m2: Tensor, count: int, momentum: float) -> None:
    for where, tensor in {"running_mean": running_mean, "running_var": running_var, "m2": m2}.items():
        check_vector(tensor, where, mean[None])
    _torch.move(running_mean, running_var, BatchStats(count, _torch.wide(mean), _torch.wide(m2)), momentum)


@_update_op.register_fake
def _(running_mean, running_var, mean, m2, count, momentum):
    return None


def _save_train(ctx, inputs, output):
    input, weight, bias, ctx.eps = inputs
    ctx.bias = bias is not None
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(input, weight, output[1], output[2])


def _train_gradients(ctx, grad, *_):
    input, weight, mean, m2 = ctx.saved_tensors
    dx, dweight, dbias = gradients(grad, input, mean, m2, weight, values_per_channel(input), ctx.eps, True)
    return dx, None if weight is None else dweight, dbias if ctx.bias else None, None


def _save_infer(ctx, inputs, output):
    input, mean, var, weight, bias, ctx.eps = inputs
    ctx.bias = bias is not None
    ctx.save_for_backward(input, weight, mean, var)


def _infer_gradients(ctx, grad):
    input, weight, mean, var = ctx.saved_tensors
    dx, dweight, dbias = gradients(grad, input, mean.double(), var.double(), weight, 1, ctx.eps, False)
    return dx, None, None, None if weight is None else dweight, dbias if ctx.bias else None, None


def _save_backward(ctx, inputs, output):
    grad, input, mean, m2, weight, ctx.count, ctx.eps, ctx.training = inputs
    ctx.save_for_backward(grad, input, mean, m2, weight)


def gradients(
    grad: Tensor, input: Tensor, mean: Tensor, m2: Tensor, weight: Tensor | None, count: int, eps: float, training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dx, dweight, dbias) as further derivatives, modes and transforms want them; mean and m2 are float64."""
    if not _torch.transformed():
        return _backward_op(grad, input, mean, m2, weight, count, eps, training)
    scale = torch.ones_like(mean) if weight is None else weight.double()
    found = _formula(grad.double(), input.double(), mean, m2, scale, count, eps, training)
    dtype = torch.float32 if weight is None else weight.dtype
    return tuple(got.to(to) for got, to in zip(found, (input.dtype, dtype, dtype), strict=True))


def _formula(
    dy: Tensor, x: Tensor, mean: Tensor, m2: Tensor, scale: Tensor, count: int, eps: float, training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward pass in torch's own operators on float64, which torch knows how to differentiate and transform."""
    along = [1, -1] + [1] * (x.dim() - 2)
    over = [axis for axis in range(x.dim()) if axis != 1]
    if training:
        center = x - x.mean(over).view(along)
        inverse = (center.square().mean(over) + eps).rsqrt().view(along)
    else:
        center, inverse = x - mean.view(along), (m2 / count + eps).rsqrt().view(along)
    xhat = center * inverse
    dbias, dweight = dy.sum(over), (dy * xhat).sum(over)
    dx = dy - (dbias.view(along) + xhat * dweight.view(along)) / count if training else dy
    return dx * scale.view(along) * inverse, dweight, dbias


def _second_gradients(ctx, *grads):
    """The gradient of the backward pass, by differentiating its formula; where a graph is wanted, it can be differentiated again."""
    grad, input, mean, m2, weight = ctx.saved_tensors
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # As views, which depend on nothing but what they are of: grad may depend on input.
        wide = [tensor.double().view_as(tensor) for tensor in (grad, input, weight) if tensor is not None]
        wanted = [tensor if again and tensor.requires_grad else tensor.detach().requires_grad_() for tensor in wide]
        dy, x, scale = wanted if weight is not None else (*wanted, torch.ones_like(mean))
        outputs = _formula(dy, x, mean, m2, scale, ctx.count, ctx.eps, ctx.training)
        found = torch.autograd.grad(outputs, wanted, [given.double() for given in grads], allow_unused=True, create_graph=again)
    ddy, dx, dweight = (None if got is None else got.to(to.dtype) for got, to in zip((*found, None), (grad, input, weight), strict=False))
    return ddy, dx, None, None, dweight, None, None, None


_train_op.register_autograd(_train_gradients, setup_context=_save_train)
_infer_op.register_autograd(_infer_gradients, setup_context=_save_infer)
_backward_op.register_autograd(_second_gradients, setup_context=_save_backward)


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
        _learn_sharding()
    if not training:
        return _infer_op(input, running_mean, running_var, weight, bias, eps)
    y, mean, m2 = _train_op(input, weight, bias, eps)
    if running_mean is not None or running_var is not None:
        move = _move_sharded if _DTensor is not None and isinstance(mean, _DTensor) else _update_op
        move(running_mean, running_var, mean, m2, values_per_channel(input), momentum)
    return y


# ---- tensors sharded over processes ----


def _learn_sharding() -> None:
    """Tell torch how the operators work on DTensor, once somebody has loaded that."""
    global _DTensor
    if _DTensor is not None or "torch.distributed.tensor" not in sys.modules:
        return
    from torch.distributed.tensor import DTensor as _DTensor

    with contextlib.suppress(ImportError):  # a torch without it says itself that it has no rule for an operator
        from torch.distributed.tensor.experimental import register_sharding

        for operator, rule in ((_train_op, _train_sharding), (_infer_op, _infer_sharding), (_backward_op, _backward_sharding)):
            register_sharding(operator._opoverload)(rule)


_DTensor = None


def _layouts(outputs: list[int], arguments: list[tuple], batch: list | None = None) -> list[tuple[list, list]]:
    """Return what register_sharding takes: placements of outputs and of arguments, None for an argument that is no tensor.

    Tensors may be whole in each process, or each process has a part of the channels; `outputs` and `arguments`, pairs with what was given,
    say which axis the channels are. `batch` has the placements of the outputs where each process may have a part of the batch instead.
    """
    from torch.distributed.tensor import Replicate, Shard

    def placed(results, place):
        return results, [None if given is None or axis is None else place(axis) for given, axis in arguments]

    layouts = [placed([Replicate() for _ in outputs], lambda _: Replicate()), placed([Shard(axis) for axis in outputs], Shard)]
    return layouts if batch is None else [*layouts, placed(batch, lambda axis: Shard(0) if axis else Replicate())]


def _train_sharding(input: Any, weight: Any, bias: Any, eps: float) -> list:
    return _layouts([1, 0, 0], [(input, 1), (weight, 0), (bias, 0), (eps, None)])


def _infer_sharding(input: Any, mean: Any, var: Any, weight: Any, bias: Any, eps: float) -> list:
    from torch.distributed.tensor import Shard

    return _layouts([1], [(input, 1), (mean, 0), (var, 0), (weight, 0), (bias, 0), (eps, None)], [Shard(0)])


def _backward_sharding(grad: Any, input: Any, mean: Any, m2: Any, weight: Any, count: int, eps: float, training: bool) -> list:
    from torch.distributed.tensor import Partial, Shard

    others = [(count, None), (eps, None), (training, None)]
    batch = None if training else [Shard(0), Partial(), Partial()]
    return _layouts([1, 0, 0], [(grad, 1), (input, 1), (mean, 0), (m2, 0), (weight, 0), *others], batch)


def _move_sharded(running_mean: Tensor | None, running_var: Tensor | None, mean: Tensor, m2: Tensor, count: int, momentum: float) -> None:
    """Move running statistics by torch's operators: a rule for an operator could give it a copy of them in another placement."""
    if not count:
        return
    for running, batch in ((running_mean, mean), (running_var, m2 / max(count - 1, 1))):
        if running is not None:
            running.copy_((1 - momentum) * running.double() + momentum * batch)


_learn_sharding()
