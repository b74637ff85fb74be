"""What hands out its input as it is, or in another type: Identity, Dropout in inference, Cast."""

from collections.abc import Sequence
from typing import Any, Final

from numpy.typing import NDArray
from onnx import TensorProto

from fastbn.graph.model.node import Node, Value
from fastbn.graph.ops.affine import Affine
from fastbn.graph.ops.placing import both_ways
from fastbn.graph.ops.row import PresentGraph, Row
from fastbn.graph.ops.shape_rules import Sizes, first_size, same_sizes
from fastbn.graph.reasons import Refusal

__all__ = ["DROPOUT", "IDENTITY", "TRAINING_MODE", "dropout_training"]

DROPOUT: Final = "Dropout"

# The input slot by which a Dropout is told to drop, from opset 12 on.
TRAINING_MODE = 2

# The output slot of what a Dropout keeps: in inference, everything.
MASK = 1

# A Cast to one of these types leaves a size as it is.
INTEGERS = (TensorProto.INT32, TensorProto.INT64)

# (wider floating type, narrower one).
WIDER = {
    (TensorProto.DOUBLE, TensorProto.FLOAT),
    (TensorProto.DOUBLE, TensorProto.FLOAT16),
    (TensorProto.DOUBLE, TensorProto.BFLOAT16),
    (TensorProto.FLOAT, TensorProto.FLOAT16),
    (TensorProto.FLOAT, TensorProto.BFLOAT16),
}


def _identity(node: Node, affine: Affine, source: Value, target: Value, graph: PresentGraph) -> Affine:
    return affine


# Dropout in inference is Identity; the ways to say "inference" changed with the opset.
def _dropout(node: Node, affine: Affine, source: Value, target: Value, graph: PresentGraph) -> Affine:
    training = dropout_training(node, graph)
    if training is not None:
        raise Refusal("training-dropout", f"Dropout '{node.label}' {training}")
    return affine


def dropout_training(node: Node, graph: PresentGraph) -> str | None:
    """Return how a sentence about a Dropout goes on that may drop at random, None for one that does not."""
    mode = node.input(TRAINING_MODE)
    if graph.opset < 7 and not node.attribute("is_test", 0):
        return f"drops at random (opset {graph.opset} without is_test=1): --as-inference makes it pass its data"
    if mode is None:
        return None
    training = graph.constant(mode)
    if training is None:
        return "may drop at random: its training_mode is not a constant false"
    return "drops at random (training_mode=1): --as-inference makes it pass its data" if training.array().any() else None


# Cast to the type that a value already has is Identity, as some exporters write it. Between two floating types the affine may move to
# the side of the narrower one, whose values are rounded to that type with and without the affine. Any other Cast rounds or converts.
def _cast(node: Node, affine: Affine, source: Value, target: Value, graph: PresentGraph) -> Affine:
    kind, narrower = graph.kind(source), graph.kind(target)
    is_known = kind != 0 and narrower != 0
    if not is_known or (kind != narrower and (kind, narrower) not in WIDER):
        raise Refusal("no-absorber", f"Cast '{node.label}' may change the type of '{node.required_input(0).name}'")
    return affine


def _same_elements(node: Node, sizes: Sizes | None, inputs: Sequence[NDArray[Any] | None]) -> NDArray[Any] | None:
    return inputs[0]


def _cast_elements(node: Node, sizes: Sizes | None, inputs: Sequence[NDArray[Any] | None]) -> NDArray[Any] | None:
    elements = inputs[0]
    return elements if node.attribute("to", 0) in INTEGERS and elements is not None and elements.dtype == object else None


def _dropout_size(node: Node, arrays: Sequence[NDArray[Any]]) -> float | None:
    """None where it drops at random; its mask is as large as its data."""
    return None if any(array.dtype == bool and array.any() for array in arrays[1:]) else 2 * arrays[0].size


IDENTITY = {
    "Identity": Row(*both_ways(_identity), takes_wide=True, sizes=same_sizes, list_elements=_same_elements),
    DROPOUT: Row(*both_ways(_dropout), apart=(MASK,), sizes=same_sizes, result_size=_dropout_size),
    "Cast": Row(*both_ways(_cast), takes_wide=True, sizes=same_sizes, result_size=first_size, list_elements=_cast_elements),
    "CastLike": Row(reads={1: "type"}, sizes=same_sizes, result_size=first_size),
}
