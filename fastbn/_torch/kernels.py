"""The kernels as functions of tensors that have memory of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from fastbn import memory, sync
from fastbn._native import Job, PlainTensors, new_moments
from fastbn._torch.threads import share_threads
from fastbn.dtypes import DTYPES
from fastbn.errors import ArgumentError, TensorError, expected
from fastbn.geometry import find_layout
from fastbn.stats import BatchStats

if TYPE_CHECKING:
    from fastbn._types import FloatArray, Sizes
    from fastbn.geometry import Layout

__all__ = [
    "as_float64",
    "backward",
    "backward_input",
    "backward_sums",
    "check_input",
    "check_statistics",
    "check_values",
    "infer",
    "is_intercepted",
    "is_transformed",
    "plain",
    "stats_of",
    "train",
    "update_running",
    "values_per_channel",
]

share_threads()


class _ForwardAD(Protocol):
    """The module of forward-mode differentiation, as far as it is used here."""

    _current_level: int


# What `Job` takes: (address, strides, owner of the memory), and for values per channel (address, stride, whether float64, owner).
_Memory: TypeAlias = tuple[int, tuple[int, ...], Tensor]
_Values: TypeAlias = tuple[int, int, bool, Tensor]

# dtype -> its number in fbn_dtype
_CODES: dict[torch.dtype, int] = {getattr(torch, name): code for name, code in DTYPES.items()}
# dtype -> how NumPy sees its memory: bfloat16 by its bits, which needs no other package
_NUMPY = {getattr(torch, name): np.dtype(np.int16 if name == "bfloat16" else name) for name in DTYPES}
# Reads plain tensors in compiled code; with a torch that lacks these functions no tensor is plain.
plain = PlainTensors(getattr(torch.Tensor, "__dlpack_c_exchange_api__", None), torch.empty_like, torch.Tensor, torch.nn.Parameter)
# Looked up once: for a small batch a look-up costs as much as the call.
forward_ad: _ForwardAD = torch.autograd.forward_ad
transforms_active: Callable[[], bool] = torch._C._are_functorch_transforms_active
mode_count: Callable[[], int] = torch._C._len_torch_dispatch_stack
_num_threads: Callable[[], int] = torch.get_num_threads
# Tensors of this many elements and more take memory of the pool: new pages from the system would cost more.
_LARGE = 1 << 17


# ---- checks ----


def check_input(input: Tensor) -> None:
    """Raise unless the kernels can read this tensor."""
    if input.dtype not in _CODES:
        raise TensorError(expected("a tensor of float32, float64, float16 or bfloat16", str(input.dtype), "input"))
    if input.dim() < 2:
        raise ArgumentError(expected("at least 2 dimensions", f"shape {tuple(input.shape)}", "input"))
    if not (input.is_cpu or input.is_meta) or input.layout is not torch.strided:
        raise TensorError(expected("a dense tensor in CPU memory", f"one of layout {input.layout} on {input.device}", "input"))


def check_values(tensor: Tensor | None, where: str, input: Tensor) -> None:
    """Raise unless these are None or values per channel of the input."""
    if tensor is None:
        return
    if tensor.dtype not in _CODES:
        raise TensorError(expected("a tensor of float32, float64, float16 or bfloat16", str(tensor.dtype), where))
    if tensor.shape != input.shape[1:2]:
        raise TensorError(expected(f"shape ({input.shape[1]},), a value per channel of the input", f"shape {tuple(tensor.shape)}", where))
    if tensor.is_cpu is not input.is_cpu:
        raise TensorError(expected(f"a tensor on {input.device}, as the input", f"one on {tensor.device}", where))


def check_statistics(input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, training: bool) -> None:
    """Raise unless there are statistics to normalize this input with."""
    if training and values_per_channel(input) == 1:
        raise ArgumentError(expected("more than 1 value per channel when training", f"shape {tuple(input.shape)}", "input"))
    if not training and (running_mean is None or running_var is None):
        raise TensorError(expected("running_mean and running_var when not training", "None", "running_mean"))


def values_per_channel(input: Tensor) -> int:
    """Return n, the product of all sizes but the channels'."""
    count: int = input.numel() // max(input.shape[1], 1)
    return count


def is_transformed() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is active: they know torch's operators alone."""
    return transforms_active() or forward_ad._current_level >= 0


def is_intercepted() -> bool:
    """Whether a transform or a dispatch mode is active, which must see every operator."""
    return transforms_active() or forward_ad._current_level >= 0 or mode_count() > 0


# ---- the arguments of a `Job` where tensors are not plain ----


def _values(tensor: Tensor | None, where: str, input: Tensor) -> _Values | None:
    """Return checked values per channel as `Job` takes them, those of a copy where the kernels cannot read the tensor."""
    if tensor is None:
        return None
    owner = tensor
    if tensor.dtype is not torch.float32 or tensor.shape != input.shape[1:2] or not tensor.is_cpu or tensor.is_neg():
        check_values(tensor, where, input)
        owner = (tensor if tensor.dtype is torch.float64 else tensor.float()).resolve_neg()
    return owner.data_ptr(), owner.stride(0), owner.dtype is torch.float64, owner


def _arrange(*tensors: Tensor) -> tuple[Sizes | Layout, list[_Memory]]:
    """Return the layout of the tensors of a call and these as `Job` takes them, or contiguous copies where they have none in common."""
    # The memory of a tensor with the negative bit, such as z.conj().imag, holds the other sign.
    owners = [tensor.resolve_neg() if tensor.is_neg() else tensor for tensor in tensors]
    arranged = [(owner.data_ptr(), owner.stride(), owner) for owner in owners]
    layout = find_layout(owners[0].shape, 1, 1, *[strides for _, strides, _ in arranged])
    return (layout, arranged) if layout is not None else _arrange(*[owner.contiguous() for owner in owners])


def _empty_like(tensor: Tensor) -> Tensor:
    """Return a new tensor, as `torch.empty_like` does, but a large one in kept memory."""
    if tensor.numel() < _LARGE:
        return torch.empty_like(tensor)
    dtype = _NUMPY[tensor.dtype]
    if tensor.is_contiguous():
        new = torch.from_numpy(memory.lend(tensor.shape, dtype))
    else:
        strides = torch.empty_like(tensor, device="meta").stride()
        new = torch.from_numpy(memory.lend((tensor.numel(),), dtype)).as_strided(tensor.shape, strides)
    return new.view(torch.bfloat16) if tensor.dtype is torch.bfloat16 else new


def _copied_back(result: Tensor, computed: _Memory) -> Tensor:
    """Return the result, after moving into it what was computed in a copy."""
    return result if computed[2] is result else result.copy_(computed[2])


def _empty_gradients(input: Tensor, weight: Tensor | None, bias: Tensor | None, wanted: tuple[bool, ...]) -> list[Tensor | None]:
    """Return dweight and dbias to fill in, of the types that the kernels write; None where not wanted."""
    channels = input.shape[1]
    return [
        torch.empty(channels, dtype=torch.float64 if like is not None and like.dtype is torch.float64 else torch.float32) if fill else None
        for like, fill in zip((weight, bias), wanted[1:3], strict=True)
    ]


def _cast(gradient: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    """Return a gradient in the type of its parameter."""
    return gradient if gradient is None or parameter is None or gradient.dtype is parameter.dtype else gradient.to(parameter.dtype)


def as_float64(values: Tensor | FloatArray) -> FloatArray:
    """Return statistics as a float64 array."""
    if isinstance(values, np.ndarray):
        return values
    array: FloatArray = values.detach().double().contiguous().numpy()
    return array


# ---- the kernels ----


def train(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    batches: Tensor | None = None,
    allow_one_value: bool = False,
) -> tuple[Tensor, FloatArray, FloatArray]:
    """Return (y, mean, m2), the last two as float64 arrays, and update the running statistics and the number of batches.

    One value per channel is an error, as in torch, unless `allow_one_value`.
    """
    if running_mean is not None and running_mean is running_var:
        raise TensorError(expected("a tensor of its own", "running_mean", "running_var"))
    y, threads = _empty_like(input), _num_threads()
    moments = plain.train(input, y, running_mean, running_var, weight, bias, batches, eps, momentum, threads)
    if moments is None:
        check_input(input)
        if not allow_one_value:
            check_statistics(input, running_mean, running_var, True)
        mean, var = _values(running_mean, "running_mean", input), _values(running_var, "running_var", input)
        scale, shift = _values(weight, "weight", input), _values(bias, "bias", input)
        moments = new_moments(input.shape[1])
        layout, (x, out) = _arrange(input, y)
        job = Job(layout, _CODES[input.dtype], 0, eps, threads)
        job.set_running(mean, var, momentum, True)
        job.train(x=x, out=out, residual=None, weight=scale, bias=shift, batch_mean=moments[0], batch_m2=moments[1])
        _copied_back(y, out)
        for running, values in ((running_mean, mean), (running_var, var)):
            if running is not None and values is not None and values[3] is not running:
                running.copy_(values[3])
        if batches is not None:
            batches.add_(1)
    torch.autograd.graph.increment_version([updated for updated in (running_mean, running_var, batches) if updated is not None])
    return y, *moments


def infer(input: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Return y of given statistics."""
    y, threads = _empty_like(input), _num_threads()
    if plain.infer(input, y, mean, var, weight, bias, eps, threads):
        return y
    check_input(input)
    check_statistics(input, mean, var, False)
    layout, (x, out) = _arrange(input, y)
    Job(layout, _CODES[input.dtype], 0, eps, threads).infer(
        x=x,
        out=out,
        residual=None,
        mean=_values(mean, "running_mean", input),
        var=_values(var, "running_var", input),
        weight=_values(weight, "weight", input),
        bias=_values(bias, "bias", input),
    )
    return _copied_back(y, out)


def backward(
    grad: Tensor,
    input: Tensor,
    mean: Tensor | FloatArray,
    m2: Tensor | FloatArray,
    weight: Tensor | None,
    bias: Tensor | None,
    count: int,
    eps: float,
    training: bool,
    wanted: tuple[bool, ...] = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return (dx, dweight, dbias), None where not wanted; a count of 0 stands for that of the input. Without `training` the statistics are
    given ones: `m2` is the variance and the count 1."""
    if not wanted[0]:
        return None, *backward_sums(grad, input, mean, m2, weight, bias, count, eps, wanted)[1:]
    dx, threads = _empty_like(input), _num_threads()
    gradients = plain.backward(input, dx, grad, weight, bias, mean, m2, count, eps, not training, wanted, threads)
    if gradients is not None:
        return gradients
    dweight, dbias = _empty_gradients(input, weight, bias, wanted)
    layout, (x, out, dy) = _arrange(input, dx, grad)
    Job(layout, _CODES[input.dtype], 0, eps, threads).backward(
        x=x,
        dx=out,
        dy=dy,
        residual=None,
        dresidual=None,
        dweight=_values(dweight, "weight", input),
        dbias=_values(dbias, "bias", input),
        weight=_values(weight, "weight", input),
        bias=None,
        batch_mean=as_float64(mean),
        batch_m2=as_float64(m2),
        count=count or values_per_channel(input),
        frozen=not training,
    )
    return _copied_back(dx, out), _cast(dweight, weight), _cast(dbias, bias)


def backward_sums(
    grad: Tensor,
    input: Tensor,
    mean: Tensor | FloatArray,
    m2: Tensor | FloatArray,
    weight: Tensor | None,
    bias: Tensor | None,
    count: int,
    eps: float,
    wanted: tuple[bool, ...],
) -> tuple[FloatArray, Tensor | None, Tensor | None]:
    """Return (sums, dweight, dbias): the first half of the backward pass."""
    sums = np.empty((2, input.shape[1]))
    dweight, dbias = _empty_gradients(input, weight, bias, wanted)
    layout, (x, dy) = _arrange(input, grad)
    Job(layout, _CODES[input.dtype], 0, eps, _num_threads()).backward_sums(
        x=x,
        dy=dy,
        dweight=_values(dweight, "weight", input),
        dbias=_values(dbias, "bias", input),
        weight=_values(weight, "weight", input),
        bias=None,
        batch_mean=as_float64(mean),
        batch_m2=as_float64(m2),
        count=count or values_per_channel(input),
        sums=sums,
    )
    return sums, _cast(dweight, weight), _cast(dbias, bias)


def backward_input(grad: Tensor, input: Tensor, stats: BatchStats, sums: FloatArray, weight: Tensor | None, eps: float) -> Tensor:
    """Return dx: the second half of the backward pass, from the sums of all ``stats.count`` values."""
    dx = _empty_like(input)
    layout, (x, out, dy) = _arrange(input, dx, grad)
    Job(layout, _CODES[input.dtype], 0, eps, _num_threads()).backward_input(
        x=x,
        dx=out,
        dy=dy,
        weight=_values(weight, "weight", input),
        bias=None,
        batch_mean=stats.mean,
        batch_m2=stats.m2,
        count=stats.count,
        sums=sums,
    )
    return _copied_back(dx, out)


def stats_of(input: Tensor) -> BatchStats:
    """Return the BatchStats of a batch."""
    layout, (x,) = _arrange(input)
    stats = BatchStats._new(values_per_channel(input), input.shape[1])
    Job(layout, _CODES[input.dtype], threads=_num_threads()).stats(x=x, batch_mean=stats.mean, batch_m2=stats.m2)
    return stats


def update_running(running_mean: Tensor | None, running_var: Tensor | None, stats: BatchStats, momentum: float) -> None:
    """Update running statistics by those of a batch that did not come from `train`; either may be None."""
    mean, var = (None if running is None else as_float64(running).copy() for running in (running_mean, running_var))
    sync.update_running(mean, var, stats, momentum)
    for running, array in ((running_mean, mean), (running_var, var)):
        if running is not None:
            running.copy_(torch.from_numpy(array))
