"""The ONNX graph of a PyTorch model, with its weights under their own names: what the planner reads."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import torch
from onnx import ModelProto

from fastbn.errors import ModelError, first_line
from fastbn.exported.variables import MOVES
from fastbn.graph.model import storage
from fastbn.graph.model.storage import Source

__all__ = ["Arguments", "exported", "moved_copy", "on_device"]

# Any: what a model is called with, by position and by name.
Arguments: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]

# In which ReduceMean and Split still have the forms of earlier ones; all that the planner reads is in it.
OPSET = 17


@contextmanager
def exported(model: torch.nn.Module, arguments: Arguments, owner_of: Callable[[str], str | None]) -> Iterator[Source]:
    """Yield the graph of a model on the CPU as a Source, its files in a folder that is removed at the end.

    torch has two exporters. This is the one that traces TorchScript: it keeps the name of every parameter, runs the model as it is, with
    all its Python, needs no package beside torch and onnx, and is the faster one. The other one needs onnxscript and refuses models that
    torch.export cannot follow. Nothing is folded or merged by the exporter: evaluation as it is (PRESERVE), no
    constants folded, and parameters as graph inputs, without which it would merge those of equal values.

    Parameters
    ----------
    model : torch.nn.Module
    arguments : (tuple, dict)
    owner_of : callable of str -> str or None
        The module of a parameter, which names the nodes that read it.

    Raises
    ------
    ModelError
        torch cannot export the model.
    """
    with TemporaryDirectory(prefix="fastbn-") as folder:
        path = Path(folder) / "model.onnx"
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")  # the exporter's own
                traced = _Traced(model, arguments)
                torch.onnx.export(
                    traced,
                    traced.tensors,
                    str(path),
                    dynamo=False,
                    opset_version=OPSET,
                    training=torch.onnx.TrainingMode.PRESERVE,
                    do_constant_folding=False,
                    keep_initializers_as_inputs=True,
                )
        except Exception as error:  # whatever the model raises, and the exporter
            raise ModelError(f"Cannot export the model, so its graph is not known: {first_line(error)}") from error
        source = storage.load(path)
        _own(source.proto, owner_of)
        yield source


class _Traced(torch.nn.Module):
    """A model as a function of the tensors among its arguments, which returns the tensors of its result."""

    def __init__(self, model: torch.nn.Module, arguments: Arguments) -> None:
        super().__init__()
        self.model = model
        self.training = False
        self._leaves, self._form = torch.utils._pytree.tree_flatten(arguments)
        self._places = [place for place, leaf in enumerate(self._leaves) if isinstance(leaf, torch.Tensor)]
        self.tensors = tuple(self._leaves[place] for place in self._places)

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the tensors of the result."""
        leaves = [*self._leaves]
        for place, tensor in zip(self._places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = torch.utils._pytree.tree_unflatten(leaves, self._form)
        result = torch.utils._pytree.tree_leaves(self.model(*args, **kwargs))
        return tuple(leaf for leaf in result if isinstance(leaf, torch.Tensor))


def _own(proto: ModelProto, owner_of: Callable[[str], str | None]) -> None:
    """Make constants of the parameters, which are graph inputs too, and name the nodes that read them after their modules.

    No two nodes may have one name: the first of a module has its name, and any other that name, a slash and its output's.
    """
    prefix = "model."
    for tensor in proto.graph.initializer:
        tensor.name = tensor.name.removeprefix(prefix)
    for info in proto.graph.input:
        info.name = info.name.removeprefix(prefix)
    for node in proto.graph.node:
        node.input[:] = [name.removeprefix(prefix) for name in node.input]
        node.name = node.name.removeprefix("/model")
    constants = {tensor.name for tensor in proto.graph.initializer}
    inputs = [info for info in proto.graph.input if info.name not in constants]
    del proto.graph.input[:]
    proto.graph.input.extend(inputs)
    owners = {name: owner for name in constants if (owner := owner_of(name)) is not None}
    taken: Counter[str] = Counter()
    for node in proto.graph.node:
        owner = next((owners[name] for name in node.input if name in owners), None)
        if owner:
            moves = node.op_type in MOVES
            taken[owner] += not moves
            node.name = owner if taken[owner] == 1 and not moves else f"{owner}/{node.output[0]}"
            if moves:
                owners[node.output[0]] = owner


def on_device(arguments: Arguments, device: torch.device | str, dtype: torch.dtype | None = None) -> Arguments:
    """Return the arguments of a call with their tensors on a device, and those of floating point in a type, if one is given."""

    def moved(value: Any) -> Any:  # Any: a leaf of arguments
        if not isinstance(value, torch.Tensor):
            return value
        return value.detach().to(device, dtype if dtype is not None and value.is_floating_point() else value.dtype, copy=True)

    return torch.utils._pytree.tree_map(moved, arguments)  # type: ignore[no-any-return]  # a tree of the same form


def moved_copy(model: torch.nn.Module, dtype: torch.dtype | None = None) -> torch.nn.Module:
    """Return a copy of a model on the CPU, in a type, if one is given."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of copies of what torch.jit has compiled
        return copy.deepcopy(model).to("cpu", dtype)
