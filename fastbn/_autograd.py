"""Steps of autograd in eager mode: the kernels without the operators' dispatch, which costs a small batch several times its arithmetic.

The tensors of a forward pass are plain ones with memory on the CPU; a gradient may be anything.
"""

import numpy as np
import torch

from fastbn import _operators, _torch, sync
from fastbn._torch import check_vector, values_per_channel
from fastbn.errors import ArgumentError, TensorError, expected

__all__ = ["apply", "apply_shared"]

_is_grad_enabled = torch.is_grad_enabled


def apply(input, running_mean, running_var, weight, bias, training, momentum, eps, batches=None):
    """Batch normalization, which checks on the way to the kernels; `batches`, where given, counts one more when training."""
    if _is_grad_enabled() and (
        input.requires_grad or (weight is not None and weight.requires_grad) or (bias is not None and bias.requires_grad)
    ):
        return _step(input, weight, bias, (running_mean, running_var, training, momentum, eps, batches))
    if training:
        return _torch.train(input, weight, bias, running_mean, running_var, momentum, eps, batches)[0]
    return _torch.infer(input, running_mean, running_var, weight, bias, eps)


class _BatchNorm(torch.autograd.Function):
    """`options` are (running_mean, running_var, training, momentum, eps, batches): each argument of its own costs a small batch time."""

    @staticmethod
    def forward(ctx, input, weight, bias, options):
        running_mean, running_var, training, momentum, eps, batches = options
        if training:
            y, mean, m2 = _torch.train(input, weight, bias, running_mean, running_var, momentum, eps, batches)
            ctx.save_for_backward(input, weight)
            ctx.saved = mean, m2, bias, eps
        else:
            y = _torch.infer(input, running_mean, running_var, weight, bias, eps)
            ctx.save_for_backward(input, weight, running_mean, running_var)
            ctx.saved = None, None, bias, eps
        return y

    @staticmethod
    def backward(ctx, grad):
        input, weight, *running = ctx.saved_tensors
        mean, m2, bias, eps = ctx.saved
        training, wanted = not running, ctx.needs_input_grad
        # Every tensor of the call counts: hooks may have put anything in place of the gradient and of what was saved.
        if _is_grad_enabled() or _torch.watched() or not _torch.plain.have_memory(grad, input, weight, *running):
            moments = (torch.from_numpy(mean), torch.from_numpy(m2)) if training else (each.double() for each in running)
            count = values_per_channel(input) if training else 1
            found = _operators.gradients(grad, input, *moments, weight, count, eps, training)
            return *(got if want else None for got, want in zip(found, wanted[:3], strict=True)), None
        if training:
            return *_torch.backward(grad, input, mean, m2, weight, bias, 0, eps, True, wanted), None
        mean, var = _torch.wide(running[0]), _torch.wide(running[1])
        return *_torch.backward(grad, input, mean, var, weight, bias, 1, eps, False, wanted), None


# What Function.apply comes to where no transform of torch.func is at work, without asking for one again.
_step = super(torch.autograd.Function, _BatchNorm).apply


def apply_shared(input, running_mean, running_var, weight, bias, momentum, eps, process_group):
    """Batch normalization of a training batch of which each process of a group has a part."""
    exchange = _exchange_of(process_group)
    for where, tensor in {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}.items():
        check_vector(tensor, where, input)
    return _SyncBatchNorm.apply(input, weight, bias, (running_mean, running_var, momentum, eps, exchange))


class _SyncBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, bias, options):
        running_mean, running_var, momentum, eps, exchange = options
        stats = sync.merge(_torch.stats_of(input), exchange)
        if stats.count == 1:
            raise ArgumentError(expected("more than 1 value per channel when training", "1 in all processes", "input"))
        _torch.move(running_mean, running_var, stats, momentum)
        ctx.save_for_backward(input, weight)
        ctx.saved = stats, bias, eps, exchange
        return _torch.infer(input, torch.from_numpy(stats.mean), torch.from_numpy(stats.var), weight, bias, eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (input, weight), (stats, bias, eps, exchange) = ctx.saved_tensors, ctx.saved
        if not _torch.plain.have_memory(grad):
            grad = grad.clone()  # of an all-reduce that was still at work, and of zeros without memory, this is a plain tensor
        if _torch.watched() or not _torch.plain.have_memory(grad, input, weight):
            got = f"one of {type(grad).__name__} in a traced or transformed call"
            raise TensorError(expected("a gradient with memory of its own behind a process group", got, "grad"))
        sums, dweight, dbias = _torch.backward_sums(grad, input, stats.mean, stats.m2, weight, bias, stats.count, eps, ctx.needs_input_grad)
        if not ctx.needs_input_grad[0]:
            return None, dweight, dbias, None
        return _torch.backward_input(grad, input, stats, sync.add_up(sums, exchange), weight, eps), dweight, dbias, None


def _exchange_of(process_group):
    """Return the exchange of `fastbn.sync` among the processes of a group of torch.distributed."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        raise TensorError(expected("torch.distributed to be initialised", "a process group without it", "process_group"))
    group = distributed.group.WORLD if process_group == "world" else process_group
    size = distributed.get_world_size(group)
    if size < 1:
        raise TensorError(expected("a group that this process belongs to", "another", "process_group"))

    def exchange(array):
        mine = torch.from_numpy(np.ascontiguousarray(array))
        rows = [torch.empty_like(mine) for _ in range(size)]
        distributed.all_gather(rows, mine, group=group)
        return [row.numpy() for row in rows]

    return exchange
