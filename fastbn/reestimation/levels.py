"""Which batch normalizations are estimated again, and in which order: levels of the data flow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from fastbn.dtypes import DTYPES, dtype_name
from fastbn.graph.model.constant import Tensor, float64_of
from fastbn.graph.model.index import Index
from fastbn.graph.model.nesting import is_standard
from fastbn.graph.model.node import Node, Value
from fastbn.graph.ops.normalization import BATCH_NORM, EPSILON, batch_norm_training, is_batch_norm

if TYPE_CHECKING:
    from fastbn._types import FloatArray

__all__ = ["LEFT", "MEAN", "VAR", "DTypes", "Left", "LeftCode", "Levels", "Site", "find_levels"]

# The slots of the mean and the variance, and their types.
MEAN, VAR = 3, 4
DTypes: TypeAlias = tuple[np.dtype[np.generic], np.dtype[np.generic]]

# Codes are stable: scripts match on them.
LeftCode: TypeAlias = Literal[
    "not-selected", "training", "in-subgraph", "in-function", "per-element", "dynamic-parameters", "unsupported-type", "not-representable"
]

# Why a batch normalization keeps its statistics.
LEFT: dict[LeftCode, str] = {
    "not-selected": "--only or --skip leaves it out",
    "training": "it normalizes with the statistics of the batch, or hands them out",
    "in-subgraph": "it stands in a body of an If, Loop or Scan, which may run never or many times",
    "in-function": "it stands in a model-local function that cannot be inlined, which several calls may share",
    "per-element": "spatial=0: its statistics are per element, not per channel",
    "dynamic-parameters": "its mean or variance is computed when the model runs",
    "unsupported-type": "the type of its mean or variance is none of float32, float64, float16, bfloat16",
    "not-representable": "a new mean or variance is too large for the type of the old one",
}


@dataclass(frozen=True)
class Left:
    """A batch normalization that keeps its statistics.

    Attributes
    ----------
    bn : str
        Its name.
    code : str
        A key of `LEFT`.
    reason : str
        The sentence about this one.
    """

    bn: str
    code: LeftCode
    reason: str


class _Stays(Exception):
    """Why a batch normalization keeps its statistics: a code and a sentence."""

    def __init__(self, code: LeftCode, reason: str) -> None:
        super().__init__(reason)
        self.code: LeftCode = code
        self.reason = reason


@dataclass(frozen=True, eq=False)
class Site:
    """A batch normalization whose statistics are estimated again.

    Attributes
    ----------
    number : int
        Its place among the sites of a model.
    node : Node
    level : int
        One more than the largest number of sites on a way from a graph input to it.
    mean, var : float64 array of shape (C,)
        Its present statistics.
    dtypes : pair of numpy.dtype
        Those of its mean and variance in the model.
    """

    number: int
    node: Node
    level: int
    mean: FloatArray
    var: FloatArray
    dtypes: DTypes

    @property
    def input(self) -> Value:
        """What it normalizes."""
        return self.node.required_input(0)

    @property
    def eps(self) -> float:
        """What it adds to the variance."""
        return float(self.node.attribute("epsilon", EPSILON))


@dataclass(frozen=True)
class Levels:
    """The sites of a model by level, and what stays.

    Attributes
    ----------
    sites : list of Site
        In an order of the data flow.
    stages : dict of Node -> int
        How many levels must be known before a node of the main graph can run: the largest level of a site that it depends on, itself
        included.
    left : list of Left
    """

    sites: list[Site]
    stages: Mapping[Node, int]
    left: list[Left]

    @property
    def depth(self) -> int:
        """The number of levels."""
        return max((site.level for site in self.sites), default=0)

    def of(self, level: int) -> list[Site]:
        """Return the sites of a level."""
        return [site for site in self.sites if site.level == level]


def find_levels(index: Index, only: list[str] | None = None, skip: list[str] | None = None) -> Levels:
    """Return the levels of a model.

    A site's statistics are those of what flows into it once all sites before it have new ones; so those of a level can be taken together,
    when those of all lower levels are known.

    Parameters
    ----------
    index : model.Index
    only, skip : list of str, optional
        Globs over node names.
    """
    sites: list[Site] = []
    left = [
        Left(name, "in-function", f"it stands in the model-local function '{function}', which several calls may share")
        for function, name in _in_functions(index)
    ]
    stages: dict[Node, int] = {}
    for node in index.order:
        if node.scope is not index.main:
            if is_batch_norm(node):
                left.append(Left(node.label, "in-subgraph", "it stands in a body of another node, which may run never or many times"))
            continue
        before = (stages[value.producer] for value in index.reads(node) if value.scope is index.main and value.producer is not None)
        stages[node] = max(before, default=0)
        if not is_batch_norm(node):
            continue
        try:
            if not _is_selected(node.label, only, skip):
                raise _Stays("not-selected", LEFT["not-selected"])
            mean, var = _statistics(node, index)
        except _Stays as stays:
            left.append(Left(node.label, stays.code, stays.reason))
            continue
        stages[node] += 1
        sites.append(Site(len(sites), node, stages[node], float64_of(mean), float64_of(var), (mean.dtype, var.dtype)))
    return Levels(sites, stages, left)


def _in_functions(index: Index) -> list[tuple[str, str]]:
    return [
        (function.name, node.name or node.output[0])
        for function in index.proto.functions
        for node in function.node
        if node.op_type == BATCH_NORM and is_standard(node.domain)
    ]


def _is_selected(label: str, only: list[str] | None, skip: list[str] | None) -> bool:
    is_named = only is None or any(fnmatchcase(label, glob) for glob in only)
    return is_named and not any(fnmatchcase(label, glob) for glob in skip or ())


def _statistics(node: Node, index: Index) -> tuple[Tensor, Tensor]:
    """Return the mean and variance of a batch normalization; raises _Stays where they cannot be replaced."""
    training = batch_norm_training(node, index.opset)
    if training is not None:
        raise _Stays("training", f"{training}; `fastbn fold --as-inference` makes it use the running ones")
    if any(value is not None and (value.readers or value.is_output) for value in node.outputs[1:]):
        raise _Stays("training", "it hands out running statistics")
    shape = index.shape(node.required_input(0))
    if not node.attribute("spatial", 1) and (shape is None or len(shape) != 2):
        raise _Stays("per-element", LEFT["per-element"])
    mean, var = (_parameter(node, slot, index) for slot in (MEAN, VAR))
    if not mean.size == var.size > 0 or len(mean.shape) != 1 or mean.shape != var.shape:
        raise _Stays("training", f"its mean has shape {list(mean.shape)} and its variance {list(var.shape)}: none per channel")
    return mean, var


def _parameter(node: Node, slot: int, index: Index) -> Tensor:
    value = node.required_input(slot)
    tensor = index.constant(value)
    if tensor is None and value.initializer is not None:  # what a caller may override has a default, which is replaced
        initializer = value.initializer
        array = index.source.array(initializer)
        tensor = Tensor(array.dtype, array.shape, lambda: array)
    name = "mean" if slot == MEAN else "variance"
    if tensor is None:
        raise _Stays("dynamic-parameters", f"its {name} '{value.name}' {index.why_no_constant(value)}")
    if dtype_name(tensor.dtype) not in DTYPES:
        raise _Stays("unsupported-type", f"its {name} is {tensor.dtype}")
    return tensor
