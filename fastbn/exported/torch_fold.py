"""Fold a PyTorch model: its graph is exported and planned, the changes go into a copy of its modules."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from fastbn._torch.inventory import module_of
from fastbn.errors import ArgumentError, ParityError
from fastbn.exported.result import ModelFold, named
from fastbn.exported.torch_graph import Arguments, exported, first_line, moved_copy, on_device
from fastbn.exported.torch_modules import Calls, Modules
from fastbn.exported.torch_parity import Comparison
from fastbn.exported.variables import Variables
from fastbn.graph.job import Job, Options, fold_of
from fastbn.graph.model.storage import Source
from fastbn.graph.ops.normalization import BATCH_NORM
from fastbn.graph.parity.reference import Progress, silent
from fastbn.graph.planner.planning import Planning
from fastbn.graph.results import Fold, Parity
from fastbn.graph.rewrite.draft import Draft
from fastbn.graph.rewrite.output import Output
from fastbn.graph.rewrite.writer import rewrite

__all__ = ["fold"]


def fold(model: torch.nn.Module, example_inputs: Any, verify: bool, seed: int, progress: Progress | None) -> ModelFold[torch.nn.Module]:
    """Do what `fastbn.torch.fold` says."""
    _check_model(module_of(model, "model"))
    arguments = _arguments(example_inputs)
    try:
        prepared = copy.deepcopy(model)
    except Exception as error:  # tensors that are no leaves, handles of processes, files
        raise ArgumentError(f"Cannot copy the model: {first_line(error)}") from error
    arguments = on_device(arguments, _device(prepared))
    calls = Calls(prepared)
    try:
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
        return _Job(source, modules, comparison, seed, progress or silent).model_fold()


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


class _Job(Job):
    """The main job on the graph of a PyTorch model, whose whole is compared in torch."""

    def __init__(self, source: Source, modules: Modules, comparison: Comparison | None, seed: int, progress: Progress) -> None:
        self.variables = Variables(modules.objections, modules.norms, may_insert=True)
        verify = comparison is not None
        super().__init__(source, source, Options(None, None, None, verify, {}, False, None, seed, progress, None, self.variables))
        self.modules = modules
        self.beside = comparison

    def _whole(self, planning: Planning) -> tuple[Draft, Output, Parity | None]:
        draft = Draft(self.index, planning)
        output = rewrite(self.index, planning, draft)  # which is written for nobody
        if self.beside is None or not planning.plans:
            return draft, output, None
        self.options.progress("comparing the folded model with the original")
        return draft, output, self.beside.check(self._folded(planning))

    def _folded(self, planning: Planning) -> torch.nn.Module:
        return self.modules.folded(self.variables.changes(planning, self.index))

    def model_fold(self) -> ModelFold[torch.nn.Module]:
        """Plan, compare, and return the result."""
        planning, draft, _, parity = self._finish(self.plan())
        if parity is not None and parity.status == "failed":
            raise ParityError(f"Cannot fold the model: it differs from the original whatever is left out: {parity}")
        changes = self.variables.changes(planning, self.index)
        folded = []
        for plan in planning.folds:
            names = [norm.name for norm in map(self.variables.norm_of, plan.lifted) if norm is not None]
            notes = [f"zeros stay in the place of '{name}'" for name in names if name in changes.zeros]
            folded.append(self._named(fold_of(plan, self.check_of(plan), draft, False), notes))
        kept = [each for each in planning.kept if each.ops == (BATCH_NORM,)]
        return ModelFold(self.modules.folded(changes), folded, kept, parity, "torch")

    def _named(self, fold: Fold, notes: list[str]) -> Fold:
        note = None if fold.note is None else fold.note.replace("an Add keeps", "an addition keeps")
        return named(replace(fold, note=note), self.modules.class_of, notes)
