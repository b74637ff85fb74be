"""Fold a PyTorch model: its graph is exported and planned, the changes go into a copy of its modules."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from fastbn._torch.inventory import module_of
from fastbn.errors import ArgumentError, first_line
from fastbn.exported.job import ModelJob
from fastbn.exported.result import ModelFold
from fastbn.exported.torch_graph import Arguments, exported, moved_copy, on_device
from fastbn.exported.torch_modules import Calls, Modules
from fastbn.exported.torch_parity import Comparison
from fastbn.exported.variables import Changes, Variables
from fastbn.graph.model.storage import Source
from fastbn.graph.parity.reference import Progress

__all__ = ["fold"]


def fold(model: torch.nn.Module, example_inputs: Any, verify: bool, seed: int, progress: Progress | None) -> ModelFold[torch.nn.Module]:
    """Do what `fastbn.torch.fold` says."""
    _check_model(module_of(model, "model"))
    arguments = _arguments(example_inputs)
    try:
        prepared = copy.deepcopy(model)
    except Exception as error:  # tensors that are no leaves, handles of processes, files
        raise ArgumentError(f"Cannot copy the model: {first_line(error)}") from error
    calls = Calls(prepared)
    try:
        arguments = on_device(arguments, _device(prepared))
        args, kwargs = on_device(arguments, _device(prepared))
        with torch.no_grad():
            prepared(*args, **kwargs)
    except Exception as error:  # whatever the model raises
        raise ArgumentError(f"Cannot run the model on its example inputs: {first_line(error)}") from error
    finally:
        calls.end()
    comparison = Comparison(copy.deepcopy(model), arguments, seed) if verify else None
    modules = Modules(prepared, calls)
    on_cpu = moved_copy(prepared)
    _round_eps(on_cpu)
    with exported(on_cpu, on_device(arguments, "cpu"), modules.owner_of) as source:
        del on_cpu
        return _Job(source, modules, comparison, seed, progress).model_fold()


def _check_model(model: torch.nn.Module) -> None:
    compiled = [name for name, module in model.named_modules() if isinstance(module, torch.jit.ScriptModule)]
    if compiled:
        part = f"with a part that torch.jit has compiled, '{compiled[0]}'" if compiled[0] else "that torch.jit has compiled"
        raise ArgumentError(f"Cannot fold a model {part}: fold the module that it was made of, then compile")
    if hasattr(model, "_orig_mod"):
        raise ArgumentError("Cannot fold what torch.compile returns: fold the module that it was made of, then compile")
    if model.training:
        raise ArgumentError("Cannot fold a model in training mode: call model.eval() first")
    lazy = [name for name, module in model.named_modules() if any(map(torch.nn.parameter.is_lazy, module._parameters.values()))]
    if lazy:
        raise ArgumentError(f"Cannot fold a model with lazy modules that were never called: '{lazy[0]}'")
    if _device(model).type == "meta":
        raise ArgumentError("Cannot fold a model on the device 'meta', where parameters have no values")


def _arguments(example_inputs: Any) -> Arguments:
    """Return what a model is called with: one value, several in a tuple or list, or a mapping of names."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    return (tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,)), {}


def _device(model: torch.nn.Module) -> torch.device:
    return next((each.device for each in (*model.parameters(), *model.buffers())), torch.device("cpu"))


def _round_eps(model: torch.nn.Module) -> None:
    """Move what float32, the type of ONNX's attributes, has no place for in eps into variances of float64."""
    for module in model.modules():
        var = module.running_var if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) else None
        if var is not None and var.dtype == torch.float64:
            var += module.eps - float(np.float32(module.eps))


class _Job(ModelJob[torch.nn.Module]):
    """The job on the graph of a PyTorch model."""

    framework = "torch"

    def __init__(self, source: Source, modules: Modules, comparison: Comparison | None, seed: int, progress: Progress | None) -> None:
        super().__init__(source, Variables(modules.objections, modules.norms, may_insert=True), comparison, seed, progress)
        self.modules = modules

    def model_of(self, changes: Changes) -> torch.nn.Module:
        return self.modules.folded(changes)

    def class_of(self, name: str) -> str:
        return self.modules.class_of(name)
