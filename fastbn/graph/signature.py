"""What ONNX demands of a node before anybody reads it as its operator: its inputs and outputs, its attributes and their types."""

from functools import cache

import onnx
from onnx import AttributeProto, defs

from fastbn.errors import ModelError, expected
from fastbn.graph.model import Node
from fastbn.graph.report import Refusal

__all__ = ["check_signature"]

# ONNX lets attributes of this prefix pass; and what opset 1 demands of some operators says only which inputs may be overwritten.
INTERNAL, LEGACY = "__", "consumed_inputs"

OPTIONAL = defs.OpSchema.FormalParameterOption.Optional


def check_signature(node: Node, opset: int) -> None:
    """Raise ModelError unless a node of ONNX's own operators has the inputs, outputs and attributes that its operator has at this opset.

    An operator that this opset does not have raises Refusal.
    """
    schema = _schema(node.op, opset)
    if schema is None:
        raise Refusal("no-absorber", f"{node.op} '{node.label}' is no operator of opset {opset}")
    for what, values, least, most, formal in (
        ("inputs", node.inputs, schema.min_input, schema.max_input, schema.inputs),
        ("outputs", node.outputs, schema.min_output, schema.max_output, schema.outputs),
    ):
        if not least <= len(values) <= most:
            raise ModelError(expected(f"{least} to {most} {what} of {node.op}", str(len(values)), node.label))
        for slot, value in enumerate(values):
            if value is None and what == "inputs" and formal[min(slot, len(formal) - 1)].option != OPTIONAL:
                raise ModelError(expected(f"an input {slot} of {node.op}", "none", node.label))
    odd = next((name for name in node.attributes if name not in schema.attributes and not name.startswith(INTERNAL)), None)
    if odd is not None:
        raise ModelError(expected(f"a valid model: attributes that {node.op} has at opset {opset}", repr(odd), node.label))
    for name, attribute in schema.attributes.items():
        found = node.attributes.get(name)
        if found is None and attribute.required and name != LEGACY:
            raise ModelError(expected(f"an attribute '{name}' of {node.op}", "none", node.label))
        if found is not None and (found.type != attribute.type.value or found.ref_attr_name):
            kind = attribute.type.name
            got = f"one of a function, '{found.ref_attr_name}'" if found.ref_attr_name else AttributeProto.AttributeType.Name(found.type)
            raise ModelError(expected(f"an attribute '{name}' of type {kind}", got, node.label))


@cache
def _schema(op, opset):
    """Return the OpSchema of a standard operator at an opset, or None where ONNX does not know it."""
    try:
        return defs.get_schema(op, opset, "")
    except onnx.defs.SchemaError:
        return None
