"""A model cut into pieces at its levels: each piece computes what flows into the batch normalizations of one level, from what the pieces
before it have left."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from fastbn.errors import ModelError, expected
from fastbn.graph.model.external import is_external
from fastbn.graph.model.index import Index
from fastbn.graph.model.nesting import bodies, scopes_of
from fastbn.graph.model.node import Node, Value
from fastbn.graph.model.storage import Source, serialize
from fastbn.graph.runtime import Runnable, runtime_errors, said
from fastbn.reestimation.levels import MEAN, VAR, Levels, Site

__all__ = ["Piece", "cut", "parameter_names", "widened"]

# What the names of the graph inputs for new statistics begin with: the rest is the number of the site.
MEAN_PREFIX, VAR_PREFIX = "fastbn/mean/", "fastbn/var/"

_IsGiven: TypeAlias = Callable[[Value], bool]


@dataclass(frozen=True)
class Piece:
    """One piece, as a worker is told of it; its model travels beside it.

    Attributes
    ----------
    level : int
        The level of the sites whose input it computes.
    key : str
        The SHA-256 of its model.
    reads : tuple of str
        Values that it is given, graph inputs and what earlier pieces have left.
    gives : tuple of str
        Values that it computes, in the order of its outputs.
    keeps : tuple of str
        Values that later pieces read, from among those that it is given and those that it computes.
    targets : tuple of (int, str, int)
        Number of each site of the level, the value that it normalizes, and the channels of that.
    parameters : tuple of int
        Numbers of the sites inside: their mean and variance are given with each run.
    """

    level: int
    key: str
    reads: tuple[str, ...]
    gives: tuple[str, ...]
    keeps: tuple[str, ...]
    targets: tuple[tuple[int, str, int], ...]
    parameters: tuple[int, ...]


def parameter_names(number: int) -> tuple[str, str]:
    """Return the names of the graph inputs of a piece for the mean and the variance of a site."""
    return f"{MEAN_PREFIX}{number}", f"{VAR_PREFIX}{number}"


def cut(index: Index, levels: Levels) -> list[tuple[Piece, bytes]]:
    """Return the piece of each level, in order, with its model.

    Raises
    ------
    ModelError
        A piece is above protobuf's 2 GB, or the type of a value at a cut is not known.
    """
    return _Cutter(index, levels).pieces()


class _Cutter:
    """The cuts of one model: what lies before a level and is read behind it."""

    def __init__(self, index: Index, levels: Levels) -> None:
        self.index, self.levels = index, levels
        self.sites = {site.node: site for site in levels.sites}
        self.tensors = {tensor.name: tensor for tensor in index.proto.graph.initializer}
        self.infos = {info.name: info for info in (*index.proto.graph.value_info, *index.proto.graph.output)}
        self.fed = {info.name for info in index.proto.graph.input} - set(self.tensors)
        self._kinds: dict[Value, int] = {}

    def pieces(self) -> list[tuple[Piece, bytes]]:
        frontiers = self._frontiers()
        made = []
        before = [value for value in self.index.main.values.values() if value.name in self.fed]
        for level, frontier in enumerate([*frontiers, []], 1):
            made.append(self._piece(level, before, frontier))
            before = frontier
        return made

    def _frontiers(self) -> list[list[Value]]:
        """Return the frontier of each level but the last: where a value is no tensor, what it is computed from."""
        self._find_kinds({site.input for site in self.levels.sites})
        while True:
            frontiers = [self._frontier(level) for level in range(1, self.levels.depth)]
            unknown = {value for frontier in frontiers for value in frontier} - set(self._kinds)
            if not unknown:
                return frontiers
            self._find_kinds(unknown)

    def _frontier(self, level: int) -> list[Value]:
        """Return the values that are known before a level is, and read behind it to reach a later level."""
        later = [site.input for site in self.levels.sites if site.level > level]
        _, reads = self._walk(later, lambda value: self._stage(value) < level and self._kinds.get(value, 1) != 0)
        return [value for value in self._in_order(reads) if self._stage(value) < level]

    def _in_order(self, values: Iterable[Value]) -> list[Value]:
        known = set(values)
        return [value for value in self.index.main.values.values() if value in known]

    def _stage(self, value: Value) -> int:
        return 0 if value.producer is None else self.levels.stages[value.producer]

    def _walk(self, ends: Sequence[Value], is_given: _IsGiven) -> tuple[list[Node], set[Value]]:
        """Return (nodes, values): what computes some values, back to values that are given, and these."""
        nodes: dict[Node, None] = {}
        given: set[Value] = set()
        pending = list(ends)
        seen = set(ends)
        for value in pending:
            node = value.producer
            if value.name in self.fed or (node is not None and self._is_varying(value) and is_given(value)):
                given.add(value)
                continue
            if node is None or node in nodes:
                continue
            nodes[node] = None
            fresh = [read for read in self.index.reads(node) if read.scope is self.index.main and read not in seen]
            if node in self.sites:
                fresh = [read for read in fresh if read not in node.inputs[MEAN : VAR + 1]]
            seen.update(fresh)
            pending.extend(fresh)
        return sorted(nodes, key=lambda node: node.order), given

    def _is_varying(self, value: Value) -> bool:
        return self.index.constant(value) is None

    def _find_kinds(self, values: set[Value]) -> None:
        """Learn the types of the values at which the model may be cut; 0 for what is no tensor."""
        kinds = {value: self.index.kind(value) for value in values}
        self._kinds.update(kinds)
        unknown = [value for value, kind in kinds.items() if not kind]
        if not unknown:
            return
        copy = ModelProto()
        copy.CopyFrom(self.index.proto)
        copy.graph.output.extend(ValueInfoProto(name=value.name) for value in unknown if not value.is_output)
        try:
            session = Runnable.of(self.index.source).with_proto(copy).session()
        except runtime_errors() as error:
            raise ModelError(f"Cannot load the model in onnxruntime: {said(error)}") from error
        types = {info.name: info.type for info in session.get_outputs()}
        self._kinds.update({value: _kind_of(types[value.name]) for value in unknown})

    def _piece(self, level: int, before: list[Value], frontier: list[Value]) -> tuple[Piece, bytes]:
        sites = self.levels.of(level)
        targets = list(dict.fromkeys(site.input for site in sites))
        known = set(before)
        ends = [value for value in dict.fromkeys([*targets, *frontier]) if value not in known]
        nodes, reads = self._walk(ends, lambda value: value in known)
        inner = [self.sites[node] for node in nodes if node in self.sites]
        data = serialize(self._proto(nodes, self._in_order(reads), ends, inner), f"level {level}")
        piece = Piece(
            level,
            hashlib.sha256(data).hexdigest(),
            tuple(value.name for value in self._in_order(reads)),
            tuple(value.name for value in ends),
            tuple(value.name for value in frontier),
            tuple((site.number, site.input.name, site.mean.size) for site in sites),
            tuple(site.number for site in inner),
        )
        return piece, data

    def _proto(self, nodes: list[Node], reads: list[Value], ends: list[Value], inner: list[Site]) -> ModelProto:
        """Return the model of a piece: its nodes, their constants inside, and graph inputs for what it is given."""
        source, original = self.index.source, self.index.proto
        proto = ModelProto(ir_version=original.ir_version, opset_import=original.opset_import, functions=original.functions)
        graph = proto.graph
        graph.name = "piece"
        graph.node.extend(node.proto for node in nodes)
        position = {node: number for number, node in enumerate(nodes)}
        declared = {info.name: info for info in original.graph.input}
        graph.input.extend(declared[value.name] if value.name in self.fed else self._info(value) for value in reads)
        for site in inner:
            for slot, name, dtype in zip((MEAN, VAR), parameter_names(site.number), site.dtypes, strict=True):
                graph.node[position[site.node]].input[slot] = name
                kind = helper.np_dtype_to_tensor_dtype(dtype)
                graph.input.append(helper.make_tensor_value_info(name, kind, [site.mean.size]))
        named = {name for scope in scopes_of(graph) for node in scope.node for name in node.input}
        names = [name for name in self.tensors if name in named]
        graph.initializer.extend(_inside(self.tensors[name], source) for name in names)
        graph.sparse_initializer.extend(each for each in original.graph.sparse_initializer if each.values.name in named)
        if original.ir_version < 4:  # an initializer must be a graph input too
            graph.input.extend(declared[name] for name in names if name in declared)
        graph.output.extend(self._info(value) for value in ends)
        given = {name for node in graph.node for name in node.output} - {value.name for value in ends}
        graph.value_info.extend(info for name, info in self.infos.items() if name in given)
        return proto

    def _info(self, value: Value) -> ValueInfoProto:
        kind = self._kinds[value]
        if not kind:
            raise ModelError(expected("a tensor at the input of a batch normalization", "something else", value.name))
        shape = self.index.shape(value)
        # Sizes that only a run tells stay open; sizes that shape inference has found help onnxruntime to plan memory.
        return helper.make_tensor_value_info(value.name, kind, None if shape is None else list(shape))


def _inside(tensor: TensorProto, source: Source) -> TensorProto:
    """Return a tensor that holds its values itself."""
    if not is_external(tensor):
        return tensor
    return TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims, raw_data=source.read(tensor))


def _kind_of(text: str) -> int:
    """Return onnxruntime's name of a type, such as "tensor(float)", as a number of TensorProto; 0 for what is no tensor."""
    if not text.startswith("tensor("):  # a sequence of tensors ends like one
        return 0
    return int(TensorProto.DataType.Value(text.removeprefix("tensor(").removesuffix(")").upper()))


def widened(source: Source) -> Source | None:
    """Return a model of bfloat16 with float32 in its place, which onnxruntime has kernels for; None where there is no bfloat16.

    Weights keep their values; what is computed from them is rounded to float32 instead of bfloat16.
    """
    proto = ModelProto()
    proto.CopyFrom(source.proto)
    if not _widen(proto, source):
        return None
    made = source.derived(proto, edited=True)
    made.notes += ("run in float32: onnxruntime has no bfloat16 kernels",)
    return made


def _widen(proto: ModelProto, source: Source) -> bool:
    found = False
    for graph in scopes_of(proto.graph):
        for info in (*graph.input, *graph.output, *graph.value_info):
            if info.type.tensor_type.elem_type == TensorProto.BFLOAT16:
                info.type.tensor_type.elem_type = TensorProto.FLOAT
                found = True
        for tensor in graph.initializer:
            found |= _widen_tensor(tensor, source)
    for graph in (*scopes_of(proto.graph), *proto.functions):
        for node in graph.node:
            found |= any([_widen_attribute(attribute, node, source) for attribute in node.attribute])
    return found


def _widen_attribute(attribute: AttributeProto, node: NodeProto, source: Source) -> bool:
    if attribute.type == AttributeProto.TENSOR:
        return _widen_tensor(attribute.t, source)
    if attribute.name in ("to", "dtype", "output_dtype") and attribute.i == TensorProto.BFLOAT16 and not bodies(node):
        attribute.i = TensorProto.FLOAT
        return True
    return False


def _widen_tensor(tensor: TensorProto, source: Source) -> bool:
    if tensor.data_type != TensorProto.BFLOAT16:
        return False
    name = tensor.name
    tensor.CopyFrom(numpy_helper.from_array(source.array(tensor).astype("float32"), name))
    return True
