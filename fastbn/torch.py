"""Batch normalization of torch tensors on CPUs: drop-in modules over custom operators.

`convert(model)` swaps every batch normalization of a model for one of these modules and back; `batch_norm` stands for
`torch.nn.functional.batch_norm`. Tensors are read in place, whatever their strides; results are new tensors in the memory order of the
input. The memory of large results is kept for the next ones (at most `fastbn.memory.KEPT` bytes of it unused, `fastbn.memory.release`
frees them). At most `torch.get_num_threads()` threads work on a call, and no more than `fastbn.get_num_threads()`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor

from fastbn import _check
from fastbn._torch import autograd, distributed, inventory, kernels, operators, population
from fastbn._torch.inventory import NormEntry
from fastbn._torch.kernels import forward_ad, mode_count, transforms_active
from fastbn.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from fastbn.exported.result import ModelFold

    ModuleT = TypeVar("ModuleT", bound=torch.nn.Module)
    # What torch.distributed takes as a group, or the whole world.
    ProcessGroup: TypeAlias = torch.distributed.ProcessGroup | Literal["world"]

# Looked up once: for a small batch a look-up costs as much as the call.
_Tensor, _Parameter, _is_compiling, _is_tracing = torch.Tensor, torch.nn.Parameter, torch.compiler.is_compiling, torch._C._is_tracing

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "NormEntry",
    "SyncBatchNorm",
    "batch_norm",
    "batch_norms",
    "convert",
    "fold",
    "update_bn",
]


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    process_group: ProcessGroup | None = None,
) -> Tensor:
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
        Normalize with the statistics of the batch.
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
        Of the input's shape, type and memory order. Derivatives of any order are supported, of batched
        gradients too; with a process group the first, of gradients with memory of their own.

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
    return _call(input, running_mean, running_var, weight, bias, training, momentum, eps, process_group, None, _is_eager(input))


def _call(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    process_group: ProcessGroup | None,
    batches: Tensor | None,
    eager: bool,
) -> Tensor:
    """Choose the route of a call and take it; `batches`, where given, counts one more when training.

    1. Plain tensors in eager mode: steps of autograd around the kernels, without the dispatch of operators.
    2. A training batch of several processes: the same, with an exchange of statistics.
    3. torch.func and forward-mode differentiation: torch's own batch normalization, as they know torch's operators alone.
    4. All else, such as compiled and traced calls, dispatch modes and tensors without memory of their own: the custom operators.
    """
    eps = _check.eps_of(eps)
    shared = training and process_group is not None
    eager = eager and kernels.plain.have_memory(input, running_mean, running_var, weight, bias, batches)
    if eager and not shared:
        return autograd.apply(input, running_mean, running_var, weight, bias, training, momentum, eps, batches)
    # In a trace of torch.jit sizes are tensors, and comparing them would freeze them: no checks then.
    tracing = not eager and torch.jit.is_tracing()
    if not tracing:
        kernels.check_input(input)
        if not shared:
            kernels.check_statistics(input, running_mean, running_var, training)
    if shared:
        y = distributed.apply_shared(input, running_mean, running_var, weight, bias, momentum, eps, process_group, eager)
    elif kernels.is_transformed():
        y = torch.nn.functional.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    else:
        if not tracing:
            for where, tensor in {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}.items():
                kernels.check_values(tensor, where, input)
        y = operators.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    if batches is not None:
        batches.add_(1)
    return y


def _is_eager(input: Tensor) -> bool:
    """Whether nothing traces or transforms a call and its input is a tensor of no subclass."""
    kind = type(input)
    return (
        not _is_compiling()
        and (kind is _Tensor or kind is _Parameter)
        and not _is_tracing()
        and not transforms_active()
        and forward_ad._current_level < 0
        and not mode_count()
    )


# ---- the modules ----


class _Module(inventory.Named, torch.nn.modules.batchnorm._BatchNorm):
    """What the modules share; in their order of bases it comes before torch's modules of one rank."""

    process_group: ProcessGroup | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Return the input normalized."""
        eager = _is_eager(input)
        if not eager:
            if isinstance(input, torch.fx.Proxy):  # symbolic tracing keeps this module whole, as it keeps torch's
                inventory.refuse_fusion(input.tracer)
                return input.tracer.create_proxy("call_module", input.tracer.path_of_module(self), (input,), {})
            if torch.onnx.is_in_onnx_export():  # an exported graph gets ONNX's BatchNormalization
                return self._exported(input)
        self._check_input_dim(input)
        momentum, training = self.momentum, self.training
        weight, bias, running_mean, running_var, batches = self._state()
        if not training:
            batches = None
        elif not self.track_running_stats:
            running_mean = running_var = batches = None
        if momentum is None:
            momentum = 0.0 if batches is None else 1 / (float(batches) + 1)
        by_batch, group = training or (running_mean is None and running_var is None), self._group() if training else None
        return _call(input, running_mean, running_var, weight, bias, by_batch, momentum, self.eps, group, batches, eager)

    def _state(self) -> tuple[Tensor | None, ...]:
        """Parameters and buffers, without the detour of Module.__getattr__ where they lie at their places."""
        own, buffers = self._parameters, self._buffers
        try:
            return own["weight"], own["bias"], buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
        except KeyError:  # a parametrization, or an attribute that somebody has replaced
            return self.weight, self.bias, self.running_mean, self.running_var, self.num_batches_tracked

    def _exported(self, input: Tensor) -> Tensor:
        return torch.nn.modules.batchnorm._BatchNorm.forward(self, input)

    def _group(self) -> ProcessGroup | None:
        return self.process_group


class _Sized(_Module):
    """The modules of one rank of input: torch's own know no process group."""

    # Any: the arguments of torch's modules, passed on as they are.
    def __init__(self, *args: Any, process_group: ProcessGroup | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if process_group is not None:
            self.process_group = process_group


class BatchNorm1d(_Sized, torch.nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` in fastbn's kernels: the same arguments, state and semantics, and the `process_group` of `batch_norm`.

    Examples
    --------
    >>> BatchNorm1d(3)(torch.ones(2, 3)).abs().max().item()
    0.0
    """


class BatchNorm2d(_Sized, torch.nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` in fastbn's kernels: the same arguments, state and semantics, and the `process_group` of `batch_norm`.

    Examples
    --------
    >>> BatchNorm2d(3)(torch.ones(2, 3, 4, 4)).abs().max().item()
    0.0
    """


class BatchNorm3d(_Sized, torch.nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` in fastbn's kernels: the same arguments, state and semantics, and the `process_group` of `batch_norm`.

    Examples
    --------
    >>> BatchNorm3d(3)(torch.ones(2, 3, 4, 4, 4)).abs().max().item()
    0.0
    """


class SyncBatchNorm(_Module, torch.nn.SyncBatchNorm):
    """`torch.nn.SyncBatchNorm` on CPUs, where torch's own raises: without a process group it takes the whole world, once there is one.

    Examples
    --------
    >>> SyncBatchNorm(3)(torch.ones(2, 3, 4)).abs().max().item()
    0.0
    """

    def _group(self) -> ProcessGroup | None:
        distributed = torch.distributed
        return self.process_group or ("world" if distributed.is_available() and distributed.is_initialized() else None)


FASTBN_CLASSES: dict[type, type] = {
    torch.nn.BatchNorm1d: BatchNorm1d,
    torch.nn.BatchNorm2d: BatchNorm2d,
    torch.nn.BatchNorm3d: BatchNorm3d,
    torch.nn.SyncBatchNorm: SyncBatchNorm,
}
TORCH_CLASSES = {new: old for old, new in FASTBN_CLASSES.items()}


def convert(module: ModuleT, *, back: bool = False, process_group: ProcessGroup | None = None) -> ModuleT:
    """Swap every batch normalization of a model in place: torch's for fastbn's, or back.

    Parameters
    ----------
    module : torch.nn.Module
        A model, or a batch normalization itself. Classes derived from torch's are left alone, and so are lazy modules before their first
        call, with a warning; `batch_norms` lists what was converted and what was not.
    back : bool
        From fastbn's modules to torch's.
    process_group : torch.distributed.ProcessGroup, "world" or None
        Not with `back`: every batch normalization shares its training batches with the processes of this group; see `batch_norm`.

    Returns
    -------
    torch.nn.Module
        The same object. Modules change their class and nothing else: parameters, buffers, hooks, the training flag and what optimizers
        hold stay as they are.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        Both `back` and a process group; what is no module.

    Warns
    -----
    UserWarning
        A batch normalization stays as it is, and why.

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
        raise ArgumentError("Cannot convert back with a process group: only fastbn's modules share their batches")
    classes = TORCH_CLASSES if back else FASTBN_CLASSES
    entries = inventory.entries_of(inventory.module_of(module, "module"), TORCH_CLASSES, FASTBN_CLASSES)
    inventory.warn_skipped([entry for entry in entries if entry.reason and (not back or isinstance(entry.module, _Module))], 2)
    for part in (entry.module for entry in entries if not entry.reason):
        part.__class__ = classes.get(type(part), type(part))
        if back and type(part) in FASTBN_CLASSES and type(part) is not torch.nn.SyncBatchNorm:
            part.__dict__.pop("process_group", None)
        elif process_group is not None and type(part) in TORCH_CLASSES:
            part.process_group = process_group
    return module


def batch_norms(model: torch.nn.Module) -> list[NormEntry]:
    """List the batch normalizations of a model: which are ours, which are torch's, and why `convert` leaves each other one as it is.

    Parameters
    ----------
    model : torch.nn.Module

    Returns
    -------
    list of NormEntry
        name, module, kind, reason; in the order of `named_modules`.

    Raises
    ------
    ArgumentTypeError
        What is no module.

    Examples
    --------
    >>> import torch
    >>> model = convert(torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2)))
    >>> [(entry.name, entry.kind) for entry in batch_norms(model)]
    [('1', 'fastbn')]
    """
    return inventory.entries_of(inventory.module_of(model, "model"), TORCH_CLASSES, FASTBN_CLASSES)


def fold(
    model: torch.nn.Module, example_inputs: Any, *, verify: bool = True, seed: int = 0, progress: Callable[[str], None] | None = None
) -> ModelFold[torch.nn.Module]:
    """Fold every batch normalization of a model that can be folded exactly into its neighbors' weights; return a copy without them.

    The graph of the model is exported and planned as `fastbn.fold` plans; the new weights go into the parameters of the same names, and a
    batch normalization becomes `torch.nn.Identity`. docs/pytorch.md says what else may change, and why some stay.

    Parameters
    ----------
    model : torch.nn.Module
        In evaluation mode, on any device; it is not changed.
    example_inputs : Tensor, tuple or list of arguments, or dict of named arguments
        What the model is called with, and traced: what its Python decides for these inputs is taken to hold for others.
    verify : bool
        Run every fold in onnxruntime, and the model beside the original in torch, on the example and on random numbers, also in float64.
    seed, progress : int, callable of str, optional
        Seed of random inputs; what is called with a line of text before each step.

    Returns
    -------
    ModelFold
        model, folded, kept, parity, to_dict(); str() is the report.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        What is no module, or one in training mode, lazy, compiled or that cannot be copied; a model that does not run on its example.
    ModelError
        torch cannot export the model.
    ParityError
        The folded model differs from the original whatever is left out.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2, bias=False)).eval()
    >>> result = fold(model, torch.randn(3, 4))
    >>> result
    <ModelFold of torch: 1 of 1 BatchNormalization folded, parity ok>
    >>> result.model
    Sequential(
      (0): Identity()
      (1): Linear(in_features=4, out_features=2, bias=False)
    )
    """
    from fastbn.exported import torch_fold  # which loads onnx

    return torch_fold.fold(model, example_inputs, verify, seed, progress)


def update_bn(
    model: torch.nn.Module,
    loader: Iterable[Any],
    *,
    mode: population.Mode = "population",
    process_group: ProcessGroup | None = None,
    device: torch.device | str | int | None = None,
) -> None:
    """Estimate the running statistics of every batch normalization of a model again, from data: torch's modules and ours.

    In the place of `torch.optim.swa_utils.update_bn` after weights were averaged. That averages the means and variances of batches, each
    with the same weight and each normalized by itself: the last, smaller batch counts too much, and what lies between the means of batches
    is not in the variance. Here moments are merged in float64 (Chan, Golub & LeVeque 1979): they are those of all the data.

    Parameters
    ----------
    model : torch.nn.Module
        Its running statistics, and `num_batches_tracked`, are updated in place; training flags, momenta and all else stay as they are.
    loader : iterable of Tensor, or of lists or tuples whose first entry is one
        The data of this process, in batches of any size. It is gone through once for the order of the batch normalizations and once for
        each of them, so an order that changes changes rounding, and augmentation draws anew.
    mode : "population" or "one-pass"
        "population": each batch normalization sees what flows into it in eval mode, with all before it already updated; a pass ends where
        it is reached. One that only some batches call has the statistics of these. A module that is called several times in a forward has
        the statistics of all its calls, and normalizes each by its own batch meanwhile. "one-pass": each batch is normalized by its own
        statistics, as in training, the rest of the model in eval mode.
    process_group : torch.distributed.ProcessGroup, "world" or None
        Processes that have the data between them, perhaps none in some: all get the same bits.
    device : optional
        Where batches are moved to, as in torch's function.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        No data, one value per channel, or values that are not finite; another mode; a loader that can be gone through only once; what is no
        module or no loader; batch normalizations that torch.jit has compiled, that the model calls in no batch, or that batches call in
        opposite orders ("population" alone). Nothing has changed then.
    TensorError
        A process group that cannot be used.

    Examples
    --------
    >>> import torch
    >>> norm = torch.nn.BatchNorm1d(1)
    >>> update_bn(norm, [torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0]])])
    >>> norm.running_mean.item(), norm.running_var.item(), norm.num_batches_tracked.item()
    (3.0, 4.0, 2)
    """
    population.update(model, loader, mode, process_group, device)
