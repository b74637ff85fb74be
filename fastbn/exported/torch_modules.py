"""The modules of a PyTorch model: which of their parameters may change, which of them may leave, and a copy in which that has happened."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch

from fastbn import torch as ours
from fastbn._torch.inventory import entries_of
from fastbn._torch.replacements import Shift, Zeros
from fastbn.exported.variables import Changes, Norm

if TYPE_CHECKING:
    from fastbn._types import Array

__all__ = ["Calls", "Modules"]

nn = torch.nn

# The children of a class derived from torch's that its forward calls behind the normalization, in this order: (package, class) -> names.
BEHIND = {("timm", "BatchNormAct2d"): ("drop", "act")}


class Calls:
    """What a run of a model shows of its modules.

    Attributes
    ----------
    counts : dict of torch.nn.Module -> int
        How often each is called.
    writers : dict of torch.nn.Module -> list of torch.nn.Module
        Batch normalization -> those that write over what it gives (inplace=True).
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.counts: dict[torch.nn.Module, int] = {}
        self.writers: dict[torch.nn.Module, list[torch.nn.Module]] = {}
        self._given: list[tuple[torch.Tensor, torch.nn.Module]] = []
        self._handles = [module.register_forward_pre_hook(self._before) for module in model.modules()]
        norms = (module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))
        self._handles += [module.register_forward_hook(self._after) for module in norms]

    def _before(self, module: torch.nn.Module, args: tuple[Any, ...]) -> None:  # Any: the arguments of a call
        self.counts[module] = self.counts.get(module, 0) + 1
        if getattr(module, "inplace", False) and args:
            for output, norm in self._given:
                if output is args[0]:
                    self.writers.setdefault(norm, []).append(module)

    def _after(self, module: torch.nn.Module, _: tuple[Any, ...], output: torch.Tensor) -> None:  # Any: the arguments of a call
        self._given.append((output, module))

    def end(self) -> None:
        """Take all hooks away."""
        for handle in self._handles:
            handle.remove()
        self._given.clear()


class Modules:
    """A copy of a model, prepared for its export: convolutions and linear layers without a bias have one of zeros.

    Parameters
    ----------
    model : torch.nn.Module
        The copy; it is changed.
    calls : Calls
        Of a run of it.

    Attributes
    ----------
    objections : dict of str -> str or None
        Name of a parameter or buffer -> why it may not change.
    norms : dict of str -> Norm
        Name of the running mean of a batch normalization -> its name, and why it may not leave.
    """

    def __init__(self, model: torch.nn.Module, calls: Calls) -> None:
        self.model = model
        self.made = [name for name, module in model.named_modules() if _give_bias(module)]
        names = {module: name for name, module in model.named_modules()}
        self._writers = {names[norm]: [names[each] for each in writers] for norm, writers in calls.writers.items()}
        self._owners: dict[str, tuple[str, str]] = {}
        self.objections: dict[str, str | None] = {}
        self.norms: dict[str, Norm] = {}
        holders: dict[torch.Tensor, set[torch.nn.Module]] = {}
        for module in model.modules():
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    holders.setdefault(tensor, set()).add(module)
        for path, module in model.named_modules():
            objection = _objection(path, module)
            for attribute, tensor in (*module._parameters.items(), *module._buffers.items()):
                name = f"{path}.{attribute}" if path else attribute
                self._owners[name] = path, attribute
                is_shared = tensor is not None and len(holders[tensor]) > 1
                self.objections[name] = f"'{name}' is shared by {len(holders[tensor])} modules" if is_shared else objection
        for entry in entries_of(model, ours.TORCH_CLASSES, ours.FASTBN_CLASSES):
            name = f"{entry.name}.running_mean" if entry.name else "running_mean"
            self.norms[name] = Norm(entry.name, self.objections.get(name) or _norm_objection(entry.module, calls, entry.reason))

    def class_of(self, label: str) -> str:
        """Return the class of a module by its name; of a name that is none, itself."""
        try:
            return type(self.model.get_submodule(label)).__name__ if label else label
        except AttributeError:
            return label

    def owner_of(self, variable: str) -> str | None:
        """Return the name of the module of a parameter or buffer."""
        return self._owners[variable][0] if variable in self._owners else None

    def folded(self, changes: Changes) -> torch.nn.Module:
        """Return a copy with these changes in it."""
        model = copy.deepcopy(self.model)
        for name, array in changes.values.items():
            path, attribute = self._owners[name]
            module = model.get_submodule(path)
            if module._parameters.get(attribute) is not None:
                old = module._parameters[attribute]
                module._parameters[attribute] = nn.Parameter(_like(old, array), old.requires_grad)
            else:
                module._buffers[attribute] = _like(module._buffers[attribute], array)
        for path in self.made:
            if (f"{path}.bias" if path else "bias") not in changes.values:
                model.get_submodule(path).register_parameter("bias", None)
        for name in changes.aliases:
            behind = (f"{name}.{child}" for child in _behind(model.get_submodule(name)))
            for writer in (*self._writers.get(name, ()), *behind):
                if getattr(model.get_submodule(writer), "inplace", False):
                    model.get_submodule(writer).inplace = False
        new = {model.get_submodule(name): self._replacement(name, model.get_submodule(name), changes) for name in changes.gone}
        for parent in [*model.modules()]:
            for name, child in parent._modules.items():
                if child in new:
                    parent._modules[name] = new[child]
        return new.get(model, model)

    def _replacement(self, name: str, norm: torch.nn.Module, changes: Changes) -> torch.nn.Module:
        """Return what stands in the place of a batch normalization."""
        stays: torch.nn.Module = nn.Identity()
        if name in changes.shifts:
            stays = Shift(
                _tensor(changes.shifts[name]).to(norm.running_mean.device),
                any(each.requires_grad for each in norm.parameters(recurse=False)),
            )
        elif name in changes.zeros:
            stays = Zeros()
        behind = _behind(norm)
        if behind:
            children = [(child, norm.get_submodule(child)) for child in behind]
            stays = nn.Sequential(OrderedDict(children if type(stays) is nn.Identity else [("norm", stays), *children]))
        return stays.train(norm.training)


def _give_bias(module: torch.nn.Module) -> bool:
    """Give a convolution or a linear layer without a bias one of zeros; say whether that was done."""
    if not isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)) or "bias" not in module._parameters or module.bias is not None:
        return False
    if not isinstance(getattr(module, "weight", None), torch.Tensor):
        return False
    weight = module.weight
    size = module.out_features if isinstance(module, nn.Linear) else module.out_channels
    module.bias = nn.Parameter(torch.zeros(size, dtype=weight.dtype, device=weight.device), weight.requires_grad)
    return True


def _objection(path: str, module: torch.nn.Module) -> str | None:
    """Return why the parameters of a module may not change, or None."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return f"'{path}' has hooks, which would see other values" if any(hooks) else None


def _norm_objection(norm: torch.nn.Module, calls: Calls, reason: str | None) -> str | None:
    if reason is not None and not _behind(norm):
        return reason
    count = calls.counts.get(norm, 0)
    if count == 0:
        return "it is not called as a module, so taking the module out would change nothing"
    return f"it is called {count} times" if count > 1 else None


def _behind(norm: torch.nn.Module) -> tuple[str, ...]:
    kind = type(norm)
    return BEHIND.get((kind.__module__.split(".")[0], kind.__name__), ())


def _tensor(array: Array) -> torch.Tensor:
    """Return a copy of an array as a tensor."""
    if array.dtype.name == "bfloat16":  # which torch does not read
        return torch.from_numpy(array.view("int16").copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def _like(old: torch.Tensor, array: Array) -> torch.Tensor:
    """Return the values of an array as a tensor of the type, device and memory order of another one."""
    return torch.empty_like(old.detach()).copy_(_tensor(array))
