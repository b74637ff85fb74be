"""The operators that the package knows, one row each. A new operator is a row in the file of its family."""

from fastbn.graph.model.nesting import is_standard
from fastbn.graph.model.node import Node
from fastbn.graph.ops.activation import ACTIVATION
from fastbn.graph.ops.convolution import CONVOLUTION
from fastbn.graph.ops.einsum import EINSUM
from fastbn.graph.ops.elementwise import ELEMENTWISE
from fastbn.graph.ops.identity import IDENTITY
from fastbn.graph.ops.layout import LAYOUT
from fastbn.graph.ops.matmul import MATMUL
from fastbn.graph.ops.normalization import NORMALIZATION
from fastbn.graph.ops.parts import PARTS
from fastbn.graph.ops.placing import constant_slot
from fastbn.graph.ops.pooling import POOLING
from fastbn.graph.ops.quantization import QUANTIZATION
from fastbn.graph.ops.recurrent import RECURRENT
from fastbn.graph.ops.row import PresentGraph, Row
from fastbn.graph.ops.selection import SELECTION
from fastbn.graph.ops.shape_reading import SHAPE_READING

__all__ = ["OPERATORS", "can_be_affine", "ignores_elements", "operator_row", "row_of", "sees_elements"]

# The most nodes that are asked whether anybody sees the elements that they hand on.
MOST_HANDED_ON = 32

OPERATORS: dict[str, Row] = {
    **ACTIVATION,
    **CONVOLUTION,
    **EINSUM,
    **ELEMENTWISE,
    **IDENTITY,
    **LAYOUT,
    **MATMUL,
    **NORMALIZATION,
    **PARTS,
    **POOLING,
    **QUANTIZATION,
    **RECURRENT,
    **SELECTION,
    **SHAPE_READING,
}

_UNKNOWN = Row()


def operator_row(node: Node) -> Row:
    """Return the row of a node's operator, whatever its operands are; an empty one for an operator that is not known."""
    return OPERATORS.get(node.op, _UNKNOWN) if not node.domain or is_standard(node.domain) else _UNKNOWN


def row_of(node: Node, graph: PresentGraph) -> Row:
    """Return the row that counts for a node: one of its operands may be a constant."""
    row = operator_row(node)
    return row.with_constant if row.with_constant is not None and constant_slot(node, graph) is not None else row


def can_be_affine(op: str) -> bool:
    """Say whether nodes of one of ONNX's own operators may be affines themselves."""
    row = OPERATORS.get(op, _UNKNOWN)
    return row.lift is not None or (row.with_constant is not None and row.with_constant.lift is not None)


def ignores_elements(node: Node, slot: int) -> bool:
    """Say whether a node reads the shape or the type of an input alone, so that an affine there changes nothing."""
    return slot in operator_row(node).reads


def sees_elements(node: Node, slot: int) -> bool:
    """Say whether anybody sees the elements that a node reads at a slot: not where it hands them on to those alone who read shapes."""
    pending = [(node, slot)]
    for at, place in pending:
        if ignores_elements(at, place):
            continue
        hands_on = operator_row(at).moved_inputs
        if hands_on is None or (place and hands_on == "first") or len(pending) > MOST_HANDED_ON:
            return True
        values = [value for value in at.outputs if value is not None]
        if any(value.is_output for value in values):
            return True
        pending.extend(reader for value in values for reader in value.readers)
    return False
