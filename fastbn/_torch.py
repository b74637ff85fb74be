"""The kernels under `fastbn.torch`: as functions of tensors, as custom operators, and as steps of autograd in eager mode."""

import numpy as np
import torch
from torch import Tensor

from fastbn import _check, _native, memory, sync
from fastbn.errors import ArgumentError, TensorError, expected
from fastbn.stats import BatchStats

__all__ = ["apply", "apply_shared", "by_operators", "check_input", "check_statistics", "check_vector"]

# dtype -> how NumPy sees it and its number in fbn_dtype; bfloat16 by its bits, which needs no other package.
_STORAGE = {
    torch.float32: (np.dtype(np.float32), 0),
    torch.float64: (np.dtype(np.float64), 1),
    torch.float16: (np.dtype(np.float16), 2),
    torch.bfloat16: (np.dtype(np.int16), 3),
}
# Reads plain tensors in compiled code; a torch without these functions takes the general way throughout.
_plain = _native.Exchange(getattr(torch.Tensor, "__dlpack_c_exchange_api__", None), torch.empty_like)
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


def _wide(tensor):
    """Statistics as a float64 array."""
    return tensor.detach().double().contiguous().numpy()


# ---- the kernels ----


def _train(input, weight, bias, running_mean, running_var, momentum, eps, batches=None, single=False):
    """Return (y, mean, m2), the last two as float64 arrays; the running statistics and the number of batches move. One value per channel
    is an error, as in torch, unless `single`."""
    y, threads = _new(input), torch.get_num_threads()
    moments = _plain.train(input, y, running_mean, running_var, weight, bias, batches, eps, momentum, threads)
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


def _infer(input, mean, var, weight, bias, eps):
    """Return y of given statistics."""
    y, threads = _new(input), torch.get_num_threads()
    if _plain.infer(input, y, mean, var, weight, bias, eps, threads):
        return y
    check_input(input)
    check_statistics(input, mean, var, False)
    places = _places(input, running_mean=mean, running_var=var, weight=weight, bias=bias)
    view, (x, target) = _arrange(input, y)
    _native.infer(x.data_ptr(), target.data_ptr(), None, *places, view, _STORAGE[input.dtype][1], 0, eps, threads)
    return y if target is y else y.copy_(target)


def _backward(grad, input, mean, m2, weight, bias, count, eps, training, wanted=(True, True, True)):
    """Return (dx, dweight, dbias), None where not wanted; mean and m2 are float64 arrays, a count of 0 stands for that of the input."""
    if not wanted[0]:
        return None, *_backward_sums(grad, input, mean, m2, weight, bias, count, eps, wanted)[1:]
    dx, threads = _new(input), torch.get_num_threads()
    found = _plain.backward(input, dx, grad, weight, bias, mean, m2, count, eps, not training, wanted, threads)
    if found is not None:
        return found
    dweight, dbias, places = _new_gradients(input, weight, bias, wanted)
    view, (x, target, dy) = _arrange(input, dx, grad)
    _native.backward(
        *(x.data_ptr(), target.data_ptr(), dy.data_ptr(), None, None, *places, None, mean, m2, count or values_per_channel(input), view),
        *(_STORAGE[input.dtype][1], 0, eps, not training, threads),
    )
    return dx if target is dx else dx.copy_(target), _as(dweight, weight), _as(dbias, bias)


def _backward_sums(grad, input, mean, m2, weight, bias, count, eps, wanted):
    """Return (sums, dweight, dbias): the first half of the backward pass."""
    sums, count = np.empty((2, input.shape[1])), count or values_per_channel(input)
    dweight, dbias, places = _new_gradients(input, weight, bias, wanted)
    view, (x, dy) = _arrange(input, grad)
    _native.backward_sums(
        *(x.data_ptr(), dy.data_ptr(), *places, None, mean, m2, count, sums, view, _STORAGE[input.dtype][1], 0),
        *(eps, torch.get_num_threads()),
    )
    return sums, _as(dweight, weight), _as(dbias, bias)


def _as(gradient, parameter):
    """A gradient in the type of its parameter."""
    return gradient if gradient is None or parameter is None or gradient.dtype is parameter.dtype else gradient.to(parameter.dtype)


def _move(running_mean, running_var, stats, momentum):
    """Move running statistics, tensors, by those of a batch that did not come from `_train`; either may be None."""
    moved = [None if running is None else _wide(running).copy() for running in (running_mean, running_var)]
    sync.move_running(*moved, stats, momentum)
    for running, array in zip((running_mean, running_var), moved, strict=True):
        if running is not None:
            running.copy_(torch.from_numpy(array))


# ---- the operators: what torch.compile, torch.export and dispatch modes see; anybody may call them, so that they check ----


@torch.library.custom_op("fastbn::batch_norm_train", mutates_args=(), device_types="cpu")
def _train_op(input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    check_input(input)
    y, mean, m2 = _train(input, weight, bias, None, None, 0.0, eps, single=True)
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
    return _infer(input, mean, var, weight, bias, eps)


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
    return _backward(grad, input, _wide(mean), _wide(m2), weight, weight, count, eps, training)


@_backward_op.register_fake
def _(grad, input, mean, m2, weight, count, eps, training):
    dtype = torch.float32 if weight is None else weight.dtype
    return torch.empty_like(input), *(input.new_empty(input.shape[1], dtype=dtype) for _ in range(2))


@torch.library.custom_op("fastbn::update_running", mutates_args=("running_mean", "running_var"), device_types="cpu")
def _update_op(running_mean: Tensor, running_var: Tensor, mean: Tensor, m2: Tensor, count: int, momentum: float) -> None:
    for where, tensor in {"running_mean": running_mean, "running_var": running_var, "m2": m2}.items():
        check_vector(tensor, where, mean[None])
    _move(running_mean, running_var, BatchStats(count, _wide(mean), _wide(m2)), momentum)


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
    dx, dweight, dbias = _backward_op(grad, input, mean, m2, weight, values_per_channel(input), ctx.eps, True)
    return dx, None if weight is None else dweight, dbias if ctx.bias else None, None


def _save_infer(ctx, inputs, output):
    input, mean, var, weight, bias, ctx.eps = inputs
    ctx.bias = bias is not None
    ctx.save_for_backward(input, weight, mean, var)


def _infer_gradients(ctx, grad):
    input, weight, mean, var = ctx.saved_tensors
    dx, dweight, dbias = _backward_op(grad, input, mean.double(), var.double(), weight, 1, ctx.eps, False)
    return dx, None, None, None if weight is None else dweight, dbias if ctx.bias else None, None


def _save_backward(ctx, inputs, output):
    grad, input, mean, m2, weight, ctx.count, ctx.eps, ctx.training = inputs
    ctx.save_for_backward(grad, input, mean, m2, weight)


def _second_gradients(ctx, *grads):
    """The gradient of the backward pass, by differentiating its formula in torch's own operators."""
    grad, input, mean, m2, weight = ctx.saved_tensors
    with torch.enable_grad():
        wanted = [tensor.detach().double().requires_grad_() for tensor in (grad, input, weight) if tensor is not None]
        dy, x, scale = wanted if weight is not None else (*wanted, torch.ones_like(mean))
        along = [1, -1] + [1] * (x.dim() - 2)
        over = [axis for axis in range(x.dim()) if axis != 1]
        if ctx.training:
            center = x - x.mean(over).view(along)
            inverse = (center.square().mean(over) + ctx.eps).rsqrt().view(along)
        else:
            center, inverse = x - mean.view(along), (m2 / ctx.count + ctx.eps).rsqrt().view(along)
        xhat = center * inverse
        dbias, dweight = dy.sum(over), (dy * xhat).sum(over)
        dx = dy - (dbias.view(along) + xhat * dweight.view(along)) / ctx.count if ctx.training else dy
        outputs = (dx * scale.view(along) * inverse, dweight, dbias)
        found = torch.autograd.grad(outputs, wanted, [given.double() for given in grads], allow_unused=True)
    ddy, dx, dweight = (None if got is None else got.to(to.dtype) for got, to in zip((*found, None), (grad, input, weight), strict=False))
    return ddy, dx, None, None, dweight, None, None, None


_train_op.register_autograd(_train_gradients, setup_context=_save_train)
_infer_op.register_autograd(_infer_gradients, setup_context=_save_infer)
_backward_op.register_autograd(_second_gradients, setup_context=_save_backward)


def by_operators(input, running_mean, running_var, weight, bias, training, momentum, eps):
    """Batch normalization by the operators."""
    if not training:
        return _infer_op(input, running_mean, running_var, weight, bias, eps)
    y, mean, m2 = _train_op(input, weight, bias, eps)
    if running_mean is not None:
        _update_op(running_mean, running_var, mean, m2, values_per_channel(input), momentum)
    return y


# ---- eager mode: the same kernels without the operators' dispatch, which costs a small batch several times its arithmetic ----


def apply(input, running_mean, running_var, weight, bias, training, momentum, eps, batches=None):
    """Batch normalization, which checks on the way to the kernels; `batches`, where given, counts one more when training."""
    if torch.is_grad_enabled() and (
        input.requires_grad or (weight is not None and weight.requires_grad) or (bias is not None and bias.requires_grad)
    ):
        return _step(input, weight, bias, (running_mean, running_var, training, momentum, eps, batches))
    if training:
        return _train(input, weight, bias, running_mean, running_var, momentum, eps, batches)[0]
    return _infer(input, running_mean, running_var, weight, bias, eps)


class _BatchNorm(torch.autograd.Function):
    """`options` are (running_mean, running_var, training, momentum, eps, batches): each argument of its own costs a small batch time."""

    @staticmethod
    def forward(ctx, input, weight, bias, options):
        running_mean, running_var, training, momentum, eps, batches = options
        if training:
            y, mean, m2 = _train(input, weight, bias, running_mean, running_var, momentum, eps, batches)
            ctx.save_for_backward(input, weight)
            ctx.saved = mean, m2, bias, eps
        else:
            y = _infer(input, running_mean, running_var, weight, bias, eps)
            ctx.save_for_backward(input, weight, running_mean, running_var)
            ctx.saved = None, None, bias, eps
        return y

    @staticmethod
    def backward(ctx, grad):
        input, weight, *running = ctx.saved_tensors
        mean, m2, bias, eps = ctx.saved
        training, count = not running, 0
        if running:
            mean, m2, count = _wide(running[0]), _wide(running[1]), 1
        if torch.is_grad_enabled():  # create_graph: through the operator, which has a gradient itself
            count = count or values_per_channel(input)
            found = _backward_op(grad, input, torch.from_numpy(mean), torch.from_numpy(m2), weight, count, eps, training)
            return *(got if wanted else None for got, wanted in zip(found, ctx.needs_input_grad[:3], strict=True)), None
        return *_backward(grad, input, mean, m2, weight, bias, count, eps, training, ctx.needs_input_grad), None


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
        view, (x,) = _arrange(input)
        alone = BatchStats._new(values_per_channel(input), input.shape[1])
        _native.stats(x.data_ptr(), alone.mean, alone.m2, view, _STORAGE[input.dtype][1], torch.get_num_threads())
        stats = sync.merge(alone, exchange)
        if stats.count == 1:
            raise ArgumentError(expected("more than 1 value per channel when training", "1 in all processes", "input"))
        _move(running_mean, running_var, stats, momentum)
        ctx.save_for_backward(input, weight)
        ctx.saved = stats, bias, eps, exchange
        return _infer(input, torch.from_numpy(stats.mean), torch.from_numpy(stats.var), weight, bias, eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (input, weight), (stats, bias, eps, exchange) = ctx.saved_tensors, ctx.saved
        sums, dweight, dbias = _backward_sums(grad, input, stats.mean, stats.m2, weight, bias, stats.count, eps, ctx.needs_input_grad)
        if not ctx.needs_input_grad[0]:
            return None, dweight, dbias, None
        dx, sums, place = _new(input), sync.add_up(sums, exchange), _place(weight, "weight", input)
        view, (x, target, dy) = _arrange(input, dx, grad)
        _native.backward_input(
            *(x.data_ptr(), target.data_ptr(), dy.data_ptr(), place, None, stats.mean, stats.m2, stats.count, sums, view),
            *(_STORAGE[input.dtype][1], 0, eps, torch.get_num_threads()),
        )
        return dx if target is dx else dx.copy_(target), dweight, dbias, None


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
