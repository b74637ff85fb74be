"""A model in training mode as an inference one: batch normalizations by their running statistics, no Dropout that drops."""

from __future__ import annotations

from collections.abc import Mapping

from onnx import ModelProto, NodeProto, helper

from fastbn.graph.model.index import Index
from fastbn.graph.model.nesting import scopes_of
from fastbn.graph.model.node import Node, Value
from fastbn.graph.model.storage import InferenceForm, Source
from fastbn.graph.ops.identity import DROPOUT, TRAINING_MODE, dropout_training
from fastbn.graph.ops.normalization import BATCH_NORM, batch_norm_training, is_batch_norm, used_statistics
from fastbn.graph.planner.view import GraphView
from fastbn.graph.reasons import first_few

__all__ = ["as_inference"]

# Before this opset, is_test=1 says that a node is an inference one; from it on, that is the default.
FIRST_OPSET_OF_INFERENCE = 7


def as_inference(source: Source, freeze_inputs: bool = False, input_shapes: Mapping[str, tuple[int, ...]] | None = None) -> Source:
    """Return a model in which every node in training mode is an inference one, with notes that say so; itself where there is none.

    Parameters
    ----------
    source : storage.Source
        The model; it is not changed.
    freeze_inputs, input_shapes
        As in `fold`.

    Raises
    ------
    ModelError
        The model is malformed.
    """
    if source.inference is not None:
        return source
    return _Conversion(source, freeze_inputs, input_shapes).result()


class _Conversion:
    """The edits of one model: attributes and inputs that mean training go, and the outputs that only training has."""

    def __init__(self, source: Source, freeze_inputs: bool, input_shapes: Mapping[str, tuple[int, ...]] | None) -> None:
        self.source = source
        self.index = Index(source, freeze_inputs, input_shapes)
        self.view = GraphView(self.index)
        self.proto = ModelProto()
        self.proto.CopyFrom(source.proto)
        self.graphs = scopes_of(self.proto.graph)
        self.changed: dict[str, list[str]] = {BATCH_NORM: [], DROPOUT: []}
        self.left: list[tuple[str, str]] = []
        # Values that the edited nodes read or gave before, with the number of their readers that are gone.
        self.dropped: dict[Value, int] = {}

    def result(self) -> Source:
        for node in self.index.order:
            if is_batch_norm(node) and batch_norm_training(node, self.index.opset):
                self._convert(node, self._batch_norm(node))
            elif node.is_op(DROPOUT) and dropout_training(node, self.view):
                self._convert(node, self._dropout(node))
        self._clean()
        is_changed = any(self.changed.values())
        made = self.source.derived(self.proto if is_changed else None)
        made.inference = InferenceForm([name for names in self.changed.values() for name in names], self.left)
        made.notes = (*self.source.notes, *self._notes())
        return made

    def _convert(self, node: Node, obstacle: str | None) -> None:
        if obstacle is None:
            self.changed[node.op].append(node.label)
        else:
            self.left.append((node.label, obstacle))

    def _proto(self, node: Node) -> NodeProto:
        proto: NodeProto = self.graphs[node.scope.number].node[node.position]
        return proto

    def _batch_norm(self, node: Node) -> str | None:
        """Make a batch normalization an inference one; return why that is not possible, or None."""
        used = used_statistics(node)
        if used is not None:
            return used
        proto = self._proto(node)
        del proto.output[1:]
        self.dropped.update({value: 0 for value in node.outputs[1:] if value is not None})
        if self.index.opset < FIRST_OPSET_OF_INFERENCE:
            _set_is_test(proto)
        elif "training_mode" in node.attributes:
            del proto.attribute[[attribute.name for attribute in proto.attribute].index("training_mode")]
        return None

    def _dropout(self, node: Node) -> str | None:
        """Make a Dropout an inference one; return why that is not possible, or None."""
        proto, mode = self._proto(node), node.input(TRAINING_MODE)
        if self.index.opset < FIRST_OPSET_OF_INFERENCE:
            _set_is_test(proto)
            return None
        assert mode is not None, "without the input it is an inference one"
        if self.index.constant(mode) is None:
            return f"its training_mode '{mode.name}' is no constant"
        del proto.input[TRAINING_MODE:]
        self.dropped[mode] = self.dropped.get(mode, 0) + 1
        return None

    def _clean(self) -> None:
        """Remove the outputs, and the constants that say "training", which nothing has or reads any more."""
        for value, readers in self.dropped.items():
            graph, node = self.graphs[value.scope.number], value.producer
            if readers < len(value.readers) or value.is_output:
                continue
            for entries in (graph.value_info, graph.initializer, graph.input):
                for position in reversed([position for position, entry in enumerate(entries) if entry.name == value.name]):
                    del entries[position]
            if node is not None and node.is_op("Constant"):
                position = next(position for position, proto in enumerate(graph.node) if list(proto.output) == [value.name])
                del graph.node[position]

    def _notes(self) -> list[str]:
        notes = []
        norms, dropouts = self.changed[BATCH_NORM], self.changed[DROPOUT]
        if norms:
            notes.append(f"as an inference model: {len(norms)} BatchNormalization by running statistics ({first_few(norms)})")
        if dropouts:
            notes.append(f"as an inference model: {len(dropouts)} Dropout without dropping ({first_few(dropouts)})")
        notes += [f"not as an inference model: '{name}', for {reason}" for name, reason in self.left]
        if norms or dropouts:
            notes.append("compared with the inference form of the original: in training mode its outputs depend on the batch or on chance")
        return notes or ["as an inference model: no node is in training mode"]


def _set_is_test(proto: NodeProto) -> None:
    attributes = [attribute for attribute in proto.attribute if attribute.name != "is_test"]
    del proto.attribute[:]
    proto.attribute.extend([*attributes, helper.make_attribute("is_test", 1)])
