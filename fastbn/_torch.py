"""The kernels under `fastbn.torch`, as functions of tensors that have memory of their own."""

import numpy as np
import torch

from fastbn import _check, _native, memory, sync
from fastbn.errors import ArgumentError, TensorError, expected
from fastbn.stats import BatchStats

__all__ = [
    "backward",
    "backward_input",
    "backward_sums",
    "check_input",
    "check_statistics",
    "check_vector",
    "infer",
    "move",
    "plain",
    "stats_of",
    "train",
    "transformed",
    "values_per_channel",
    "watched",
    "wide",
]

# dtype -> how NumPy sees it and its number in fbn_dtype; bfloat16 by its bits, which needs no other package.
_STORAGE = {
    torch.float32: (np.dtype(np.float32), 0),
    torch.float64: (np.dtype(np.float64), 1),
    torch.float16: (np.dtype(np.float16), 2),
    torch.bfloat16: (np.dtype(np.int16), 3),
}
# Reads plain tensors in compiled code; a torch without these functions takes the general way throughout.
plain = _native.Exchange(getattr(torch.Tensor, "__dlpack_c_exchange_api__", None), torch.empty_like, torch.Tensor, torch.nn.Parameter)
# Found once: looking these up costs a small batch as much as calling them.
forward_ad, transforms_active = torch.autograd.forward_ad, torch._C._are_functorch_transforms_active
modes, _num_threads = torch._C._len_torch_dispatch_stack, torch.get_num_threads
# Elements of a tensor whose pages cost more than keeping its memory does.
_LARGE = 1 << 17


# ---- what may be given ----


def check_input(input):
    """Raise unless the kernels can read this tensor."""
    if input.dtype not in _STORAGE:
        raise TensorError(expected("a tensor of float32, float64, float16 or bfloat16", str(input.dtype), "input"))
    if input.dim() < 2:
        raise ArgumentError(expected("at least 2 dimensions", f"shape {tuple(input.shape)}", "input"))
    if not (input.is_cpu or input.is_meta) or input.layout is not torch.strided:
        raise TensorError(expected("a dense tensor in CPU memory", f"one of layout {input.layout} on {input.device}", "input"))


def check_vector(tensor, where, input):
    """Raise unless these are None or values per channel of the input."""
    if tensor is None:
        return
    if tensor.dtype not in _STORAGE:
        raise TensorError(expected("a tensor of float32, float64, float16 or bfloat16", str(tensor.dtype), where))
    if tensor.shape != input.shape[1:2]:
        raise TensorError(expected(f"shape ({input.shape[1]},), a value per channel of the input", f"shape {tuple(tensor.shape)}", where))
    if tensor.is_cpu is not input.is_cpu:
        raise TensorError(expected(f"a tensor on {input.device}, as the input", f"one on {tensor.device}", where))


def check_statistics(input, running_mean, running_var, training):
    """Raise unless there are statistics to normalise this input with."""
    if training and values_per_channel(input) == 1:
        raise ArgumentError(expected("more than 1 value per channel when training", f"shape {tuple(input.shape)}", "input"))
    if not training and (running_mean is None or running_var is None):
        raise TensorError(expected("running_mean and running_var when not training", "None", "running_mean"))


def values_per_channel(input):
    """Return n, the product of all sizes but the channels'."""
    return input.numel() // max(input.shape[1], 1)


def watched() -> bool:
    """Whether a call is more than that: a transform is at work, or a mode sees every operator."""
    return transforms_active() or forward_ad._current_level >= 0 or modes() > 0


def transformed() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is at work: they know torch's operators alone."""
    return transforms_active() or forward_ad._current_level >= 0


# ---- what the kernels are given where tensors are not plain: addresses of these or of copies ----


def _place(tensor, where, input):
    """Return (address, stride, whether float64, what owns the memory) of checked values per channel; None passes."""
    if tensor is None:
        return None
    owner = tensor
    if tensor.dtype is not torch.float32 or tensor.shape != input.shape[1:2] or not tensor.is_cpu or tensor.is_neg():
        check_vector(tensor, where, input)
        owner = (tensor if tensor.dtype is torch.float64 else tensor.float()).resolve_neg()
    return owner.data_ptr(), owner.stride(0), owner.dtype is torch.float64, owner


def _places(input, **named):
    return [_place(tensor, where, input) for where, tensor in named.items()]


def _arrange(*tensors):
    """Return the view of the kernels and the tensors it is of: those given, or contiguous copies where they have no common view."""
    # The memory of a negative view, such as z.conj().imag, holds the other sign.
    tensors = [tensor.resolve_neg() if tensor.is_neg() else tensor for tensor in tensors]
    view = _check.layout(tensors[0].shape, 1, 1, *[tensor.stride() for tensor in tensors])
    if view is not None:
        return view, tensors
    return _arrange(*[tensor.contiguous() for tensor in tensors])


def _new(tensor):
    """Return a new tensor, as `torch.empty_like` does, but a large one in kept memory."""
    if tensor.numel() < _LARGE:
        return torch.empty_like(tensor)
    dtype, _ = _STORAGE[tensor.dtype]
    if tensor.is_contiguous():
        new = torch.from_numpy(memory.lend(tensor.shape, dtype))
    else:
        strides = torch.empty_like(tensor, device="meta").stride()
        new = torch.from_numpy(memory.lend((tensor.numel(),), dtype)).as_strided(tensor.shape, strides)
    return new.view(torch.bfloat16) if tensor.dtype is torch.bfloat16 else new


def _new_gradients(input, weight, bias, wanted):
    """Return dweight and dbias to fill in, None where not wanted, and the places of these and of weight."""
    # The kernels write float32 and float64.
    wide = [parameter is not None and parameter.dtype is torch.float64 for parameter in (weight, bias)]
    dweight, dbias = (
        torch.empty(input.shape[1], dtype=torch.float64 if is_wide else torch.float32) if fill else None
        for is_wide, fill in zip(wide, wanted[1:3], strict=True)
    )
    return dweight, dbias, [*_places(input, weight=dweight, bias=dbias), _place(weight, "weight", input)]


def wide(tensor):
    """Statistics as a float64 array."""
    return tensor.detach().double().contiguous().numpy()


# ---- the kernels ----


def train(input, weight, bias, running_mean, running_var, momentum, eps, batches=None, single=False):
    """Return (y, mean, m2), the last two as float64 arrays; the running statistics and the number of batches move. One value per channel
    is an error, as in torch, unless `single`."""
    y, threads = _new(input), _num_threads()
    moments = plain.train(input, y, running_mean, running_var, weight, bias, batches, eps, momentum, threads)
    if moments is None:
        check_input(input)
        if not single:
            check_statistics(input, running_mean, running_var, True)
        places = _places(input, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
        moments = _native.new_moments(input.shape[1])
        view, (x, target) = _arrange(input, y)
        _native.train(
            *(x.data_ptr(), target.data_ptr(), None, *places, *moments, view, _STORAGE[input.dtype][1], 0),
            *(eps, momentum, True, threads),
        )
        if target is not y:
            y.copy_(target)
        for place, running in zip(places[:2], (running_mean, running_var), strict=True):
            if running is not None and place[3] is not running:
                running.copy_(place[3])
        if batches is not None:
            batches.add_(1)
    torch.autograd.graph.increment_version([moved for moved in (running_mean, running_var, batches) if moved is not None])
    return y, *moments


def infer(input, mean, var, weight, bias, eps):
    """Return y of given statistics."""
    y, threads = _new(input), _num_threads()
    if plain.infer(input, y, mean, var, weight, bias, eps, threads):
        return y
    check_input(input)
    check_statistics(input, mean, var, False)
    places = _places(input, running_mean=mean, running_var=var, weight=weight, bias=bias)
    view, (x, target) = _arrange(input, y)
    _native.infer(x.data_ptr(), target.data_ptr(), None, *places, view, _STORAGE[input.dtype][1], 0, eps, threads)
    return y if target is y else y.copy_(target)


def backward(grad, input, mean, m2, weight, bias, count, eps, training, wanted=(True, True, True)):
    """Return (dx, dweight, dbias), None where not wanted; mean and m2 are float64 arrays, a count of 0 stands for that of the input."""
    if not wanted[0]:
        return None, *backward_sums(grad, input, mean, m2, weight, bias, count, eps, wanted)[1:]
    dx, threads = _new(input), _num_threads()
    found = plain.backward(input, dx, grad, weight, bias, mean, m2, count, eps, not training, wanted, threads)
    if found is not None:
        return found
    dweight, dbias, places = _new_gradients(input, weight, bias, wanted)
    view, (x, target, dy) = _arrange(input, dx, grad)
    _native.backward(
        *(x.data_ptr(), target.data_ptr(), dy.data_ptr(), None, None, *places, None, mean, m2, count or values_per_channel(input), view),
        *(_STORAGE[input.dtype][1], 0, eps, not training, threads),
    )
    return dx if target is dx else dx.copy_(target), _as(dweight, weight), _as(dbias, bias)


def backward_sums(grad, input, mean, m2, weight, bias, count, eps, wanted):
    """Return (sums, dweight, dbias): the first half of the backward pass."""
    sums, count = np.empty((2, input.shape[1])), count or values_per_channel(input)
    dweight, dbias, places = _new_gradients(input, weight, bias, wanted)
    view, (x, dy) = _arrange(input, grad)
    _native.backward_sums(
        *(x.data_ptr(), dy.data_ptr(), *places, None, mean, m2, count, sums, view, _STORAGE[input.dtype][1], 0),
        *(eps, _num_threads()),
    )
    return sums, _as(dweight, weight), _as(dbias, bias)


def _as(gradient, parameter):
    """A gradient in the type of its parameter."""
    return gradient if gradient is None or parameter is None or gradient.dtype is parameter.dtype else gradient.to(parameter.dtype)


def move(running_mean, running_var, stats, momentum):
    """Move running statistics, tensors, by those of a batch that did not come from `train`; either may be None."""
    moved = [None if running is None else wide(running).copy() for running in (running_mean, running_var)]
    sync.move_running(*moved, stats, momentum)
    for running, array in zip((running_mean, running_var), moved, strict=True):
        if running is not None:
            running.copy_(torch.from_numpy(array))


def stats_of(input: torch.Tensor) -> BatchStats:
    """Return the BatchStats of a batch."""
    view, (x,) = _arrange(input)
    stats = BatchStats._new(values_per_channel(input), input.shape[1])
    _native.stats(x.data_ptr(), stats.mean, stats.m2, view, _STORAGE[input.dtype][1], _num_threads())
    return stats


def backward_input(
    grad: torch.Tensor, input: torch.Tensor, stats: BatchStats, sums: np.ndarray, weight: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """Return dx: the second half of the backward pass, from the sums of all ``stats.count`` values."""
    dx, place = _new(input), _place(weight, "weight", input)
    view, (x, target, dy) = _arrange(input, dx, grad)
    _native.backward_input(
        *(x.data_ptr(), target.data_ptr(), dy.data_ptr(), place, None, stats.mean, stats.m2, stats.count, sums, view),
        *(_STORAGE[input.dtype][1], 0, eps, _num_threads()),
    )
    return dx if target is dx else dx.copy_(target)
