"""Batch normalization of torch tensors on CPUs: drop-in modules, and the custom operators under them.

`convert(model)` swaps every batch normalization of a model for one of these modules and back; `batch_norm` stands for
`torch.nn.functional.batch_norm`. Tensors are read and written in place, whatever their strides; results are new tensors in the memory order
of the input, in NumPy's memory, which is backed by huge pages where torch's is not. At most `torch.get_num_threads()` threads work on a
call, and no more than `fastbn.get_num_threads()`.
"""

import numpy as np
import torch
from torch import Tensor

from fastbn import _check, _native, sync
from fastbn.errors import ArgumentError, TensorError, expected
from fastbn.stats import BatchStats

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm", "batch_norm", "convert"]

# dtype -> how NumPy sees it and its number in fbn_dtype; bfloat16 by its bits, which needs no other package.
_STORAGE = {
    torch.float32: (np.dtype(np.float32), 0),
    torch.float64: (np.dtype(np.float64), 1),
    torch.float16: (np.dtype(np.float16), 2),
    torch.bfloat16: (np.dtype(np.int16), 3),
}
# Bytes of a tensor whose pages cost more than what else a tensor in NumPy's memory costs.
_LARGE = 1 << 18


# ---- what may be given ----


def _check_tensors(input, **vectors):
    """Raise unless the kernels can work on these: addresses are all that they get."""
    if input.dtype not in _STORAGE:
        raise TensorError(expected("a tensor of float32, float64, float16 or bfloat16", str(input.dtype), "input"))
    if input.dim() < 2:
        raise ArgumentError(expected("at least 2 dimensions", f"shape {tuple(input.shape)}", "input"))
    if not (input.is_cpu or input.is_meta) or input.layout is not torch.strided:
        raise TensorError(expected("a dense tensor in CPU memory", f"one of layout {input.layout} on {input.device}", "input"))
    shape, on_cpu = input.shape[1:2], input.is_cpu
    for where, tensor in vectors.items():
        if tensor is None or (tensor.shape == shape and tensor.dtype in _STORAGE and tensor.is_cpu is on_cpu):
            continue
        if tensor.dtype not in _STORAGE:
            raise TensorError(expected("a tensor of float32, float64, float16 or bfloat16", str(tensor.dtype), where))
        if tensor.shape != shape:
            wanted = f"shape ({input.shape[1]},), a value per channel of the input"
            raise TensorError(expected(wanted, f"shape {tuple(tensor.shape)}", where))
        raise TensorError(expected(f"a tensor on {input.device}, as the input", f"one on {tensor.device}", where))


# ---- what the kernels are given: addresses, because an array for each tensor would cost more than a small batch's arithmetic ----


def _arrange(*tensors):
    """Return the view of the kernels and the tensors it is of: those given, or contiguous copies where they have no common view."""
    view = _check.layout(tensors[0].shape, 1, 1, *[tensor.stride() for tensor in tensors])
    if view is not None:
        return view, tensors
    return _arrange(*[tensor.contiguous() for tensor in tensors])


def _vector(tensor):
    """Return (address, stride, whether float64, what owns the memory) of values per channel; None passes."""
    if tensor is None:
        return None
    wide = tensor.dtype is torch.float64
    if not wide and tensor.dtype is not torch.float32:
        tensor = tensor.float()
    return tensor.data_ptr(), tensor.stride(0), wide, tensor


def _new(tensor):
    """Return a new tensor, as `torch.empty_like` does, but a large one in NumPy's memory."""
    if tensor.nbytes < _LARGE:
        return torch.empty_like(tensor)
    dtype, _ = _STORAGE[tensor.dtype]
    if tensor.is_contiguous():
        new = torch.from_numpy(np.empty(tensor.shape, dtype))
    else:
        strides = torch.empty_like(tensor, device="meta").stride()
        new = torch.from_numpy(np.empty(tensor.numel(), dtype)).as_strided(tensor.shape, strides)
    return new.view(torch.bfloat16) if tensor.dtype is torch.bfloat16 else new


def _gradient_vector(like, channels):
    """Return a gradient of shape (channels,), and what a kernel fills it in by."""
    wide = like is not None and like.dtype is torch.float64
    new = torch.empty(channels, dtype=torch.float64 if wide else torch.float32)
    return new, (new.data_ptr(), 1, wide)


# ---- the kernels ----


def _forward_train(input, weight, bias, running_mean, running_var, momentum, eps):
    """Return (y, mean, m2), the last two as float64 arrays; the running statistics move."""
    y, channels = _new(input), input.shape[1]
    mean, m2 = np.empty(channels), np.empty(channels)
    moved_mean, moved_var = _vector(running_mean), _vector(running_var)
    view, (x, target) = _arrange(input, y)
    _native.train(
        *(x.data_ptr(), target.data_ptr(), None, moved_mean, moved_var, _vector(weight), _vector(bias), mean, m2, view),
        *(_STORAGE[input.dtype][1], 0, eps, momentum, True, torch.get_num_threads()),
    )
    if target is not y:
        y.copy_(target)
    for running, moved in ((running_mean, moved_mean), (running_var, moved_var)):
        if running is not None and moved[3] is not running:
            running.copy_(moved[3])
        elif running is not None and not running.is_inference():
            torch.autograd.graph.increment_version(running)
    return y, mean, m2


def _forward(input, mean, var, weight, bias, eps):
    """Return y of given statistics."""
    y = _new(input)
    view, (x, target) = _arrange(input, y)
    _native.infer(
        *(x.data_ptr(), target.data_ptr(), None, _vector(mean), _vector(var), _vector(weight), _vector(bias), view),
        *(_STORAGE[input.dtype][1], 0, eps, torch.get_num_threads()),
    )
    return y if target is y else y.copy_(target)


def _backward(grad, input, mean, m2, weight, count, eps, training, wanted=(True, True, True)):
    """Return (dx, dweight, dbias), None where not wanted; mean and m2 are float64 arrays."""
    if not wanted[0]:
        return None, *_backward_sums(grad, input, mean, m2, weight, count, eps, wanted)[1:]
    channels, dx = input.shape[1], _new(input)
    dweight, dweight_place = _gradient_vector(weight, channels) if wanted[1] else (None, None)
    dbias, dbias_place = _gradient_vector(weight, channels) if wanted[2] else (None, None)
    view, (x, target, dy) = _arrange(input, dx, grad)
    _native.backward(
        *(x.data_ptr(), target.data_ptr(), dy.data_ptr(), None, None, dweight_place, dbias_place, _vector(weight), None, mean, m2),
        *(count, view, _STORAGE[input.dtype][1], 0, eps, not training, torch.get_num_threads()),
    )
    if target is not dx:
        dx.copy_(target)
    return dx, dweight, dbias


def _backward_sums(grad, input, mean, m2, weight, count, eps, wanted):
    """Return (sums, dweight, dbias): the first half of the backward pass."""
    channels = input.shape[1]
    dweight, dweight_place = _gradient_vector(weight, channels) if wanted[1] else (None, None)
    dbias, dbias_place = _gradient_vector(weight, channels) if wanted[2] else (None, None)
    sums = np.empty((2, channels))
    view, (x, dy) = _arrange(input, grad)
    _native.backward_sums(
        *(x.data_ptr(), dy.data_ptr(), dweight_place, dbias_place, _vector(weight), None, mean, m2, count, sums),
        *(view, _STORAGE[input.dtype][1], 0, eps, torch.get_num_threads()),
    )
    return sums, dweight, dbias


def _move(running_mean, running_var, count, mean, m2, momentum):
    """Move running statistics by those of a batch that did not come from `_forward_train`; either may be None."""
    moved = [None if running is None else _wide(running).copy() for running in (running_mean, running_var)]
    sync.move_running(*moved, BatchStats(count, mean, m2), momentum)
    for running, array in zip((running_mean, running_var), moved, strict=True):
        if running is not None:
            running.copy_(torch.from_numpy(array))


def _wide(tensor):
    """Statistics as a float64 array."""
    return tensor.detach().double().contiguous().numpy()


def _as(tensor, dtype):
    """A gradient in the type of its parameter."""
    return tensor if tensor is None or dtype is None or tensor.dtype is dtype else tensor.to(dtype)


def _count(input):
    return input.numel() // max(input.shape[1], 1)


# ---- the operators: what torch.compile, torch.export and functional transforms see ----


@torch.library.custom_op("fastbn::batch_norm_train", mutates_args=(), device_types="cpu")
def _train_op(input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    _check_tensors(input, weight=weight, bias=bias)
    y, mean, m2 = _forward_train(input, weight, bias, None, None, 0.0, eps)
    return y, torch.from_numpy(mean), torch.from_numpy(m2)


@_train_op.register_fake
def _(input, weight, bias, eps):
    stats = [input.new_empty(input.shape[1], dtype=torch.float64) for _ in range(2)]
    return torch.empty_like(input), *stats


@torch.library.custom_op("fastbn::batch_norm", mutates_args=(), device_types="cpu")
def _infer_op(input: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    _check_tensors(input, mean=mean, var=var, weight=weight, bias=bias)
    return _forward(input, mean, var, weight, bias, eps)


@_infer_op.register_fake
def _(input, mean, var, weight, bias, eps):
    return torch.empty_like(input)


@torch.library.custom_op("fastbn::batch_norm_backward", mutates_args=(), device_types="cpu")
def _backward_op(
    grad: Tensor, input: Tensor, mean: Tensor, m2: Tensor, weight: Tensor | None, count: int, eps: float, training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    _check_tensors(input, mean=mean, m2=m2, weight=weight)
    if grad.shape != input.shape or grad.dtype is not input.dtype or not grad.is_cpu:
        got = f"{grad.dtype} of shape {tuple(grad.shape)} on {grad.device}"
        raise TensorError(expected(f"{input.dtype} of shape {tuple(input.shape)}, as the input", got, "grad"))
    dx, dweight, dbias = _backward(grad, input, _wide(mean), _wide(m2), weight, count, eps, training)
    dtype = None if weight is None else weight.dtype
    return dx, _as(dweight, dtype), _as(dbias, dtype)


@_backward_op.register_fake
def _(grad, input, mean, m2, weight, count, eps, training):
    dtype = torch.float32 if weight is None else weight.dtype
    return torch.empty_like(input), *(input.new_empty(input.shape[1], dtype=dtype) for _ in range(2))


@torch.library.custom_op("fastbn::update_running", mutates_args=("running_mean", "running_var"), device_types="cpu")
def _update_op(running_mean: Tensor, running_var: Tensor, mean: Tensor, m2: Tensor, count: int, momentum: float) -> None:
    _check_tensors(mean[None], running_mean=running_mean, running_var=running_var, m2=m2)
    _move(running_mean, running_var, count, _wide(mean), _wide(m2), momentum)


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
    dx, dweight, dbias = _backward_op(grad, input, mean, m2, weight, _count(input), ctx.eps, True)
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
        wanted = [tensor.detach().double().requires_grad_() for tensor in (grad, input)]
        wanted += [] if weight is None else [weight.detach().double().requires_grad_()]
        dy, x, scale = *wanted, *([] if weight is not None else [torch.ones_like(mean)])
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


# ---- eager mode: the same kernels without the operators' dispatch, which costs a small batch more than its arithmetic ----


class _BatchNorm(torch.autograd.Function):
    """`options` are (running_mean, running_var, training, momentum, eps): each argument of its own costs a small batch time."""

    @staticmethod
    def forward(ctx, input, weight, bias, options):
        running_mean, running_var, ctx.training, momentum, ctx.eps = options
        ctx.bias_type = None if bias is None else bias.dtype
        if ctx.training:
            y, ctx.mean, ctx.m2 = _forward_train(input, weight, bias, running_mean, running_var, momentum, ctx.eps)
            ctx.save_for_backward(input, weight)
        else:
            y = _forward(input, running_mean, running_var, weight, bias, ctx.eps)
            ctx.save_for_backward(input, weight, running_mean, running_var)
        return y

    @staticmethod
    def backward(ctx, grad):
        input, weight, *running = ctx.saved_tensors
        mean, m2 = (ctx.mean, ctx.m2) if ctx.training else map(_wide, running)
        count = _count(input) if ctx.training else 1
        if torch.is_grad_enabled():  # create_graph: through the operator, which has a gradient itself
            found = _backward_op(grad, input, torch.from_numpy(mean), torch.from_numpy(m2), weight, count, ctx.eps, ctx.training)
            dx, dweight, dbias = [got if wanted else None for got, wanted in zip(found, ctx.needs_input_grad[:3], strict=True)]
        else:
            dx, dweight, dbias = _backward(grad, input, mean, m2, weight, count, ctx.eps, ctx.training, ctx.needs_input_grad)
        return dx, _as(dweight, weight.dtype if weight is not None else None), _as(dbias, ctx.bias_type), None


class _SyncBatchNorm(torch.autograd.Function):
    """A training batch that the processes of a group share: each has a part of it."""

    @staticmethod
    def forward(ctx, input, weight, bias, options):
        running_mean, running_var, momentum, ctx.eps, ctx.exchange = options
        ctx.bias_type = None if bias is None else bias.dtype
        view, (x,) = _arrange(input)
        alone = BatchStats(_count(input), np.empty(input.shape[1]), np.empty(input.shape[1]))
        _native.stats(x.data_ptr(), alone.mean, alone.m2, view, _STORAGE[input.dtype][1], torch.get_num_threads())
        ctx.stats = sync.merge(alone, ctx.exchange)
        if ctx.stats.count == 1:
            raise ArgumentError(expected("more than 1 value per channel when training", "1 in all processes", "input"))
        _move(running_mean, running_var, ctx.stats.count, ctx.stats.mean, ctx.stats.m2, momentum)
        ctx.save_for_backward(input, weight)
        return _forward(input, torch.from_numpy(ctx.stats.mean), torch.from_numpy(ctx.stats.var), weight, bias, ctx.eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (input, weight), stats = ctx.saved_tensors, ctx.stats
        sums, dweight, dbias = _backward_sums(grad, input, stats.mean, stats.m2, weight, stats.count, ctx.eps, ctx.needs_input_grad)
        dx = None
        if ctx.needs_input_grad[0]:
            dx, sums = _new(input), sync.add_up(sums, ctx.exchange)
            view, (x, target, dy) = _arrange(input, dx, grad)
            _native.backward_input(
                *(x.data_ptr(), target.data_ptr(), dy.data_ptr(), _vector(weight), None, stats.mean, stats.m2, stats.count, sums, view),
                *(_STORAGE[input.dtype][1], 0, ctx.eps, torch.get_num_threads()),
            )
            if target is not dx:
                dx.copy_(target)
        return dx, _as(dweight, None if weight is None else weight.dtype), _as(dbias, ctx.bias_type), None


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


@torch.compiler.disable
def _synchronised(input, weight, bias, options, process_group):
    if not _eager(input):
        raise TensorError(expected("no process group in a traced or transformed call", "one", "process_group"))
    return _SyncBatchNorm.apply(input, weight, bias, (*options, _exchange_of(process_group)))


def _eager(input):
    """Whether a call is just that: nothing traces it, wraps its tensors or transforms it."""
    return (
        not torch.compiler.is_compiling()
        and (type(input) is Tensor or type(input) is torch.nn.Parameter)
        and input.is_cpu
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._len_torch_dispatch_stack()
    )


def batch_norm(input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5, *, process_group=None):
    """Batch normalization of a tensor, with the arguments of `torch.nn.functional.batch_norm`, and a process group.

    Parameters
    ----------
    input : Tensor, float32, float64, float16 or bfloat16, on the CPU
        Shape (N, C, ...), any strides.
    running_mean, running_var : Tensor of shape (C,) or None
        Required unless `training`, where they are updated in place with the unbiased variance.
    weight, bias : Tensor of shape (C,) or None
        gamma and beta, of any of the four types; float32 beside bfloat16 data keeps their precision.
    training : bool
        Normalise with the statistics of the batch.
    momentum : float
        The weight of this batch in the running statistics.
    eps : float
        Added to the variance.
    process_group : torch.distributed.ProcessGroup, "world" or None
        Share the statistics of a training batch with the processes of a group whose backend works on the CPU (gloo): each gives its part
        of the batch, of any size and even empty, and gets what one process would compute of the whole, with the same bits for one number
        of processes. One all_gather per forward and one per backward. The gradients of weight and bias are sums over the part of each
        process, as in torch's SyncBatchNorm: DistributedDataParallel brings them together.

    Returns
    -------
    Tensor
        Of the input's shape, type and memory order. First and second derivatives are supported; with a process group the first.

    Raises
    ------
    TensorError
        A RuntimeError, as torch raises: another type, device or number of channels, a process group that cannot be used. A process that
        dies or stays away makes torch's own RuntimeError in the others, at the latest after the timeout of the group.
    ArgumentError
        A ValueError: fewer than two dimensions, or one value per channel in training.

    Examples
    --------
    >>> import torch
    >>> x = torch.tensor([[1.0, 5.0], [3.0, 5.0]], dtype=torch.float64)
    >>> batch_norm(x, None, None, bias=torch.tensor([0.0, 7.0], dtype=torch.float64), training=True, eps=0.0)
    tensor([[-1.,  7.],
            [ 1.,  7.]], dtype=torch.float64)
    """
    return _batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps, process_group, _eager(input))


def _batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps, process_group, eager):
    # In a trace of torch.jit sizes are tensors, and comparing them would freeze them.
    if eager or not torch.jit.is_tracing():
        _check_tensors(input, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
        if training and process_group is None and _count(input) == 1:
            raise ArgumentError(expected("more than 1 value per channel when training", f"shape {tuple(input.shape)}", "input"))
    eps = _check.eps_of(eps)
    if not training and (running_mean is None or running_var is None):
        raise TensorError(expected("running_mean and running_var when not training", "None", "running_mean"))
    if training and process_group is not None:
        return _synchronised(input, weight, bias, (running_mean, running_var, momentum, eps), process_group)
    if eager:
        return _BatchNorm.apply(input, weight, bias, (running_mean, running_var, training, momentum, eps))
    if torch._C._are_functorch_transforms_active():  # torch.func knows the gradients of torch's operators alone
        return torch.nn.functional.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return _by_operators(input, running_mean, running_var, weight, bias, training, momentum, eps)


def _by_operators(input, running_mean, running_var, weight, bias, training, momentum, eps):
    if not training:
        return _infer_op(input, running_mean, running_var, weight, bias, eps)
    y, mean, m2 = _train_op(input, weight, bias, eps)
    if running_mean is not None:
        _update_op(running_mean, running_var, mean, m2, _count(input), momentum)
    return y


# ---- the modules ----


class _Module:
    """What the modules share; it comes before torch's own class of the same name."""

    process_group = None

    def forward(self, input):
        eager = _eager(input)
        if not eager:
            if isinstance(input, torch.fx.Proxy):  # symbolic tracing keeps this module whole, as it keeps torch's
                return input.tracer.create_proxy("call_module", input.tracer.path_of_module(self), (input,), {})
            if torch.onnx.is_in_onnx_export():  # an exported graph gets the operator that everybody knows
                return self._exported(input)
        self._check_input_dim(input)
        momentum, training, buffers = self.momentum, self.training, self._buffers
        tracked = not training or self.track_running_stats
        running_mean, running_var = (buffers["running_mean"], buffers["running_var"]) if tracked else (None, None)
        counted = buffers["num_batches_tracked"] if training and tracked else None
        if momentum is None:
            momentum = 0.0 if counted is None else 1 / (float(counted) + 1)
        by_batch, group = training or (running_mean is None and running_var is None), self._group() if training else None
        y = _batch_norm(input, running_mean, running_var, self.weight, self.bias, by_batch, momentum, self.eps, group, eager)
        if counted is not None:
            counted.add_(1)
        return y

    def _exported(self, input):
        return super().forward(input)

    def _group(self):
        return self.process_group


class _Sized(_Module):
    """The modules of one rank of input: torch's own know no process group."""

    def __init__(self, *args, process_group=None, **kwargs):
        super().__init__(*args, **kwargs)
        if process_group is not None:
            self.process_group = process_group


class BatchNorm1d(_Sized, torch.nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` in fastbn's kernels: the same arguments, state and semantics, and the `process_group` of `batch_norm`."""


class BatchNorm2d(_Sized, torch.nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` in fastbn's kernels: the same arguments, state and semantics, and the `process_group` of `batch_norm`."""


class BatchNorm3d(_Sized, torch.nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` in fastbn's kernels: the same arguments, state and semantics, and the `process_group` of `batch_norm`."""


class SyncBatchNorm(_Module, torch.nn.SyncBatchNorm):
    """`torch.nn.SyncBatchNorm` on CPUs, where torch's own raises: without a process group it takes the whole world, once there is one."""

    def _exported(self, input):
        return torch.nn.modules.batchnorm._BatchNorm.forward(self, input)

    def _group(self):
        distributed = torch.distributed
        return self.process_group or ("world" if distributed.is_available() and distributed.is_initialized() else None)


_OURS = {
    torch.nn.BatchNorm1d: BatchNorm1d,
    torch.nn.BatchNorm2d: BatchNorm2d,
    torch.nn.BatchNorm3d: BatchNorm3d,
    torch.nn.SyncBatchNorm: SyncBatchNorm,
}
_TORCHS = {ours: theirs for theirs, ours in _OURS.items()}


def convert(module, *, back=False, process_group=None):
    """Swap every batch normalization of a model in place: torch's for fastbn's, or back.

    Parameters
    ----------
    module : torch.nn.Module
        A model, or a batch normalization itself. Subclasses of torch's modules that are not torch's own are left alone, and so are lazy
        modules before their first call.
    back : bool
        From fastbn's modules to torch's.
    process_group : torch.distributed.ProcessGroup, "world" or None
        Not with `back`: every batch normalization shares its training batches with the processes of this group; see `batch_norm`.

    Returns
    -------
    torch.nn.Module
        The same object. Modules change their class and nothing else: parameters, buffers, hooks, the training flag and what optimisers
        hold stay as they are.

    Raises
    ------
    ArgumentError
        Both `back` and a process group.

    Examples
    --------
    >>> import torch
    >>> model = convert(torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2)))
    >>> type(model[1]).__module__, isinstance(model[1], torch.nn.BatchNorm2d)
    ('fastbn.torch', True)
    >>> type(convert(model, back=True)[1]).__module__
    'torch.nn.modules.batchnorm'
    """
    if back and process_group is not None:
        raise ArgumentError(expected("no process group on the way back", "one", "process_group"))
    classes = _TORCHS if back else _OURS
    for part in module.modules():
        part.__class__ = classes.get(type(part), type(part))
        if back and type(part) in _OURS and type(part) is not torch.nn.SyncBatchNorm:
            part.__dict__.pop("process_group", None)
        elif process_group is not None and type(part) in _TORCHS:
            part.process_group = process_group
    return module
