"""Batches of which each process has a part: a training batch of a process group, and tensors sharded over processes."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from fastbn import sync
from fastbn._torch import kernels
from fastbn.errors import ArgumentError, TensorError, expected

if TYPE_CHECKING:
    from fastbn._types import Exchange, FloatArray

__all__ = [
    "Rule",
    "apply_shared",
    "backward_sharding",
    "exchange_of",
    "infer_sharding",
    "is_sharded",
    "register_sharding",
    "train_sharding",
    "update_running_sharded",
]

# ---- a training batch of a process group ----


@torch.compiler.disable
def apply_shared(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
    process_group: object,
    eager: bool,
) -> Tensor:
    """Batch normalization of a training batch of which each process of a group has a part."""
    if not eager:
        raise TensorError("Cannot share the batch with a process group: the call is traced or transformed, or its tensors are not plain")
    exchange = exchange_of(process_group)
    for where, tensor in {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}.items():
        kernels.check_values(tensor, where, input)
    return _SyncBatchNorm.apply(input, weight, bias, (running_mean, running_var, momentum, eps, exchange))


class _SyncBatchNorm(torch.autograd.Function):
    @staticmethod
    # Any: torch makes the context an object of a class of its own, to which each function adds what it needs.
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        options: tuple[Tensor | None, Tensor | None, float, float, Exchange],
    ) -> Tensor:
        running_mean, running_var, momentum, eps, exchange = options
        stats = sync.merge(kernels.stats_of(input), exchange)
        if stats.count == 1:
            raise ArgumentError(expected("more than 1 value per channel when training", "1 in all processes", "input"))
        kernels.update_running(running_mean, running_var, stats, momentum)
        ctx.save_for_backward(input, weight)
        ctx.saved = stats, bias, eps, exchange
        return kernels.infer(input, torch.from_numpy(stats.mean), torch.from_numpy(stats.var), weight, bias, eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (input, weight), (stats, bias, eps, exchange) = ctx.saved_tensors, ctx.saved
        if not kernels.plain.have_memory(grad):
            # A gradient that an all-reduce is still writing, or zeros without memory: a copy is a plain tensor.
            grad = grad.clone()
        if kernels.is_intercepted() or not kernels.plain.have_memory(grad, input, weight):
            what = f"a {type(grad).__name__} has no memory of its own, or the call is traced or transformed"
            raise TensorError(f"Cannot share the gradient with a process group: {what}")
        wanted = ctx.needs_input_grad
        sums, dweight, dbias = kernels.backward_sums(grad, input, stats.mean, stats.m2, weight, bias, stats.count, eps, wanted)
        if not wanted[0]:
            return None, dweight, dbias, None
        return kernels.backward_input(grad, input, stats, sync.add_up(sums, exchange), weight, eps), dweight, dbias, None


def exchange_of(process_group: object) -> Exchange:
    """Return the exchange of `fastbn.sync` among the processes of a group of torch.distributed."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        raise TensorError("Cannot share the batch with a process group: torch.distributed is not initialized")
    group = distributed.group.WORLD if process_group == "world" else process_group
    size = distributed.get_world_size(group)
    if size < 1:
        raise TensorError("Cannot share the batch with a process group: this process does not belong to it")

    def exchange(array: FloatArray) -> list[FloatArray]:
        mine = torch.from_numpy(np.ascontiguousarray(array))
        rows = [torch.empty_like(mine) for _ in range(size)]
        distributed.all_gather(rows, mine, group=group)
        return [row.numpy() for row in rows]

    return exchange


# ---- tensors sharded over processes (DTensor) ----

# Any: placements are classes of torch.distributed.tensor, which is loaded only by programs that use it.
_Placements: TypeAlias = list[Any]
# What register_sharding takes: placements of outputs and of arguments, None for an argument that is no tensor.
_Placing: TypeAlias = tuple[_Placements, _Placements]
Rule: TypeAlias = Callable[..., list[_Placing]]

_sharded_class: type | None = None


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, in a program that has loaded DTensor."""
    return _sharded_class is not None and isinstance(tensor, _sharded_class)


def register_sharding(rules: dict[Any, Rule]) -> None:
    """Tell torch how custom operators work on DTensor, once the program has loaded that; `rules` is operator -> rule."""
    global _sharded_class
    if _sharded_class is not None or "torch.distributed.tensor" not in sys.modules:
        return
    from torch.distributed.tensor import DTensor

    _sharded_class = DTensor
    with contextlib.suppress(ImportError):  # a torch without it raises for an operator that has no rule
        from torch.distributed.tensor.experimental import register_sharding as register

        for operator, rule in rules.items():
            register(operator._opoverload)(rule)


def _placings(outputs: list[int], arguments: list[tuple[object, int | None]], batch_outputs: _Placements | None = None) -> list[_Placing]:
    """Return the placements that an operator can work on: tensors whole in each process, or split along the channels.

    `outputs` are the channel axes of the outputs, `arguments` pairs of an argument and its channel axis. `batch_outputs` are the placements
    of the outputs where the batch may be split instead; None where it may not.
    """
    from torch.distributed.tensor import Replicate, Shard

    def placing(results: _Placements, place: Callable[[int], Any]) -> _Placing:
        return results, [None if given is None or axis is None else place(axis) for given, axis in arguments]

    placings = [placing([Replicate() for _ in outputs], lambda _: Replicate()), placing([Shard(axis) for axis in outputs], Shard)]
    return placings if batch_outputs is None else [*placings, placing(batch_outputs, lambda axis: Shard(0) if axis else Replicate())]


def train_sharding(input: object, weight: object, bias: object, eps: float) -> list[_Placing]:
    """The rule of the training operator."""
    return _placings([1, 0, 0], [(input, 1), (weight, 0), (bias, 0), (eps, None)])


def infer_sharding(input: object, mean: object, var: object, weight: object, bias: object, eps: float) -> list[_Placing]:
    """The rule of the inference operator, which takes a part of the batch, too."""
    from torch.distributed.tensor import Shard

    return _placings([1], [(input, 1), (mean, 0), (var, 0), (weight, 0), (bias, 0), (eps, None)], [Shard(0)])


def backward_sharding(
    grad: object, input: object, mean: object, m2: object, weight: object, count: int, eps: float, training: bool
) -> list[_Placing]:
    """The rule of the backward operator; with frozen statistics each process may have a part of the batch, and of the sums over it."""
    from torch.distributed.tensor import Partial, Shard

    others: list[tuple[object, None]] = [(count, None), (eps, None), (training, None)]
    batch_outputs = None if training else [Shard(0), Partial(), Partial()]
    return _placings([1, 0, 0], [(grad, 1), (input, 1), (mean, 0), (m2, 0), (weight, 0), *others], batch_outputs)


def update_running_sharded(
    running_mean: Tensor | None, running_var: Tensor | None, mean: Tensor, m2: Tensor, count: int, momentum: float
) -> None:
    """Update running statistics by torch's operators: a rule for an operator could give it a copy of them in another placement."""
    if not count:
        return
    for running, batch in ((running_mean, mean), (running_var, m2 / max(count - 1, 1))):
        if running is not None:
            running.copy_((1 - momentum) * running.double() + momentum * batch)
