"""The model with new statistics: only the means and variances of its sites change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from onnx import ModelProto, TensorProto, helper, numpy_helper

from fastbn.graph.model.index import Index
from fastbn.graph.model.node import Value
from fastbn.graph.rewrite.output import Output, Written
from fastbn.reestimation.levels import MEAN, VAR, Site

if TYPE_CHECKING:
    from fastbn._types import Array

__all__ = ["written"]

# From this IR version on, an initializer need not be a graph input too.
FIRST_IR_OF_CONSTANTS = 4


def written(index: Index, statistics: Mapping[Site, tuple[Array, Array]]) -> tuple[Output, tuple[str, ...]]:
    """Return a copy of the model with new statistics, in the types that its sites have, and notes about what else was changed for them.

    A mean or variance that nothing but its own site reads is replaced where it stands; one that others read, or that is computed, is left,
    and the site reads a new initializer.
    """
    proto = ModelProto()
    proto.CopyFrom(index.proto)
    graph = proto.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    names = {name for scope in index.scopes for name in scope.values}
    notes = []
    for site, arrays in statistics.items():
        for slot, role, array in zip((MEAN, VAR), ("running_mean", "running_var"), arrays, strict=True):
            value = site.node.required_input(slot)
            name = value.name
            if not _is_own(value, site):
                name = _new_name(f"{site.node.label}.{role}", names)
                tensors[name] = graph.initializer.add()
                graph.node[site.node.position].input[slot] = name
                if proto.ir_version < FIRST_IR_OF_CONSTANTS:
                    kind = helper.np_dtype_to_tensor_dtype(array.dtype)
                    graph.input.append(helper.make_tensor_value_info(name, kind, array.shape))
                if len(value.readers) > 1:
                    notes.append(f"'{value.name}' is shared: '{site.node.label}' has a {role} of its own now")
            _fill(tensors[name], name, array)
    return Output(index.source, bool(statistics), lambda: Written(proto, [])), tuple(notes)


def _is_own(value: Value, site: Site) -> bool:
    is_read_here = all(node is site.node for node, _ in value.readers) and len(value.readers) == 1
    return value.initializer is not None and value.scope is site.node.scope and is_read_here and not value.is_output


def _new_name(wanted: str, names: set[str]) -> str:
    name, number = wanted, 1
    while name in names:
        number += 1
        name = f"{wanted}_{number}"
    names.add(name)
    return name


def _fill(tensor: TensorProto, name: str, array: Array) -> None:
    doc = tensor.doc_string
    tensor.CopyFrom(numpy_helper.from_array(array, name))
    if doc:
        tensor.doc_string = doc
