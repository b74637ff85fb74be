"""What ONNX's operator schemas demand of a node and let it have, and which nodes its shape inference can be trusted with."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import onnx
from onnx import AttributeProto, FunctionProto, ModelProto, NodeProto, checker, defs

from fastbn.errors import ModelError, expected
from fastbn.graph.model.nesting import is_standard, scopes_of
from fastbn.graph.reasons import Refusal

__all__ = ["RANDOM", "check_node", "check_version", "checker_context", "is_function", "is_inferable", "propagates"]

NAMES = AttributeProto.AttributeType
BODIES = (AttributeProto.GRAPH, AttributeProto.GRAPHS)
OPTION = defs.OpSchema.FormalParameterOption

# The largest version that onnx's checker takes.
LAST_VERSION = (1 << 31) - 1

# No array that NumPy holds has more axes.
HIGHEST_RANK = 64

# An attribute of the first versions, a hint to memory planning: no result depends on it.
LEGACY = "consumed_inputs"

# onnx's checker accepts any attribute whose name begins with this.
INTERNAL = "__"

# Their shape inference reads the type of the input without a check that it is known, and ends the process where it is not.
UNSAFE = ("EyeLike", "RegexFullMatch")

# Operators that draw random numbers from an attribute `seed`; Dropout does so in training mode.
RANDOM = ("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike")

# A well-formed equation of Einsum: on some malformed ones its shape inference does not end.
EQUATION = re.compile(r"[a-zA-Z]*(\.\.\.)?[a-zA-Z]*(,[a-zA-Z]*(\.\.\.)?[a-zA-Z]*)*(->[a-zA-Z]*(\.\.\.)?[a-zA-Z]*)?")


@dataclass(frozen=True)
class Demand:
    """What the schema of an operator demands of a node, and the most that it lets it have.

    inputs and outputs: slot -> name of those that must be there; most_inputs and most_outputs: how many there may be; is_variadic: whether
    any number of inputs may follow, none of them empty; attributes: names of those that must be there; types: name -> type of all
    attributes that the operator has.
    """

    inputs: dict[int, str]
    outputs: dict[int, str]
    most_inputs: int
    most_outputs: int
    is_variadic: bool
    attributes: tuple[str, ...]
    types: dict[str, int]


@lru_cache(maxsize=1024)
def _demand(op: str, opset: int) -> Demand | None:
    schema = _schema(op, opset)
    if schema is None or schema.deprecated:
        return None
    inputs, outputs = (
        {slot: parameter.name for slot, parameter in enumerate(parameters[:least]) if parameter.option != OPTION.Optional}
        for parameters, least in ((schema.inputs, schema.min_input), (schema.outputs, schema.min_output))
    )
    variadic = bool(schema.inputs) and schema.inputs[-1].option == OPTION.Variadic and schema.inputs[-1].is_homogeneous
    attributes = tuple(name for name, attribute in schema.attributes.items() if attribute.required and name != LEGACY)
    types = {name: _number(attribute) for name, attribute in schema.attributes.items()}
    return Demand(inputs, outputs, schema.max_input, schema.max_output, variadic, attributes, types)


@lru_cache(maxsize=1024)
def _schema(op: str, opset: int) -> defs.OpSchema | None:
    try:
        return defs.get_schema(op, opset, "")
    except Exception:  # the class of onnx's error has no public name
        return None


def _number(attribute: defs.OpSchema.Attribute) -> int:
    return int(attribute.type.value)  # type: ignore[attr-defined]  # the stub of AttrType lacks `value`


@lru_cache(maxsize=1024)
def _types(op: str) -> dict[str, set[int]]:
    """Return attribute -> its types in all versions of an operator."""
    types: dict[str, set[int]] = {}
    version = defs.onnx_opset_version()
    while (schema := _schema(op, version) if version else None) is not None:
        for name, attribute in schema.attributes.items():
            types.setdefault(name, set()).add(_number(attribute))
        version = schema.since_version - 1
    return types


def check_node(
    op: str, inputs: Sequence[str], outputs: Sequence[str], attributes: Sequence[AttributeProto], label: str, opset: int
) -> None:
    """Raise ModelError where a node of a standard operator lacks an input, output or attribute, or an attribute has a wrong type.

    An operator that the opset does not have, and an attribute that the operator does not have, are no error here: see check_version.
    """
    demand = _demand(op, opset)
    if demand is not None:
        _check_names(demand, op, inputs, outputs, label)
    kinds: dict[str, int] = {}
    for attribute in attributes:
        name = attribute.name
        if attribute.ref_attr_name:
            raise ModelError(expected(f"a value of the attribute '{name}'", "a reference outside a function", label))
        if name in kinds:
            raise ModelError(expected(f"one attribute '{name}'", "two", label))
        kinds[name] = attribute.type
    if demand is None or not kinds.items() <= demand.types.items():
        for name, kind in kinds.items():
            _check_kind(demand, op, name, kind, label)
    for name in demand.attributes if demand else ():
        if name not in kinds:
            raise ModelError(expected(f"an attribute '{name}' of {op}", "none", label))


def _check_kind(demand: Demand | None, op: str, name: str, kind: int, label: str) -> None:
    wanted = {demand.types[name]} if demand and name in demand.types else _types(op).get(name, {kind})
    if kind not in wanted:
        shown = " or ".join(sorted(map(_shown, wanted)))
        raise ModelError(expected(f"an attribute '{name}' of type {shown}", _shown(kind), label))
    if demand and name not in demand.types and kind in BODIES:  # its body would leave with it
        raise ModelError(expected(f"no graph in {op}", f"the attribute '{name}'", label))


def _check_names(demand: Demand, op: str, inputs: Sequence[str], outputs: Sequence[str], label: str) -> None:
    if len(inputs) > max(demand.inputs, default=-1) and len(outputs) > max(demand.outputs, default=-1) and all(inputs) and all(outputs):
        return
    for what, wanted, names in (("an input", demand.inputs, inputs), ("an output", demand.outputs, outputs)):
        for slot, name in wanted.items():
            if slot >= len(names) or not names[slot]:
                raise ModelError(expected(f"{what} {slot} ('{name}') of {op}", "none", label))
    if demand.is_variadic and not all(inputs):
        raise ModelError(expected(f"names for all inputs of {op}", "an empty one", label))


def check_version(op: str, inputs: int, outputs: int, attributes: Iterable[str], label: str, opset: int) -> None:
    """Check that a node which passes check_node has no more than its operator takes at this opset: its meaning would be undefined.

    Parameters
    ----------
    op : str
    inputs, outputs : int
        How many the node has.
    attributes : iterable of str
        Their names.
    label : str
        What the node is called.
    opset : int

    Raises
    ------
    ModelError
        It has more inputs, outputs or attributes.
    Refusal
        The opset does not have the operator.
    """
    demand = _demand(op, opset)
    if demand is None:
        raise Refusal("no-absorber", f"{op} '{label}' is no operator of opset {opset}")
    for what, count, most in (("inputs", inputs, demand.most_inputs), ("outputs", outputs, demand.most_outputs)):
        if count > most:
            raise ModelError(expected(f"at most {most} {what} of {op}", str(count), label))
    for name in attributes:
        if name not in demand.types and not name.startswith(INTERNAL):
            raise ModelError(expected(f"a valid model: attributes that {op} has at opset {opset}", repr(name), label))


def _shown(kind: int) -> str:
    return NAMES.Name(kind) if kind in NAMES.values() else str(kind)


def checker_context(proto: ModelProto, opset: int) -> checker.C.CheckerContext:
    """Return what onnx's checker needs to know of the model around a node."""
    context = checker.C.CheckerContext()
    context.ir_version = min(max(proto.ir_version, 4), onnx.IR_VERSION)
    # Versions are 64 bits in a file, and 32 here; a domain that is no UTF-8 comes as bytes.
    entries = [entry for entry in proto.opset_import if isinstance(entry.domain, str)]
    imports = {entry.domain: min(max(entry.version, -LAST_VERSION), LAST_VERSION) for entry in entries}
    context.opset_imports = {**imports, "": opset, "ai.onnx": opset}
    return context


def is_inferable(proto: NodeProto, context: checker.C.CheckerContext) -> bool:
    """Say whether shape inference may see a node: some that onnx's checker refuses, and a few more, end the process or hang it."""
    if proto.domain not in context.opset_imports:
        return False
    if not is_standard(proto.domain):
        return True
    try:
        checker.check_node(proto, context)
    except Exception:  # the checker raises many kinds; all say that the node is malformed
        return False
    return _is_sound(proto)


def _is_sound(proto: NodeProto) -> bool:
    """Say whether inference is safe on a node that the checker accepts."""
    if proto.op_type in UNSAFE or any(attribute.name == "axis" and abs(attribute.i) > HIGHEST_RANK for attribute in proto.attribute):
        return False
    if proto.op_type == "Split":
        return all(attribute.i == len(proto.output) for attribute in proto.attribute if attribute.name == "num_outputs")
    if proto.op_type == "GatherND":
        return all(0 <= attribute.i < HIGHEST_RANK for attribute in proto.attribute if attribute.name == "batch_dims")
    if proto.op_type == "Einsum":
        equation = next((attribute.s for attribute in proto.attribute if attribute.name == "equation"), b"")
        text = equation.decode("latin-1").replace(" ", "")
        return EQUATION.fullmatch(text) is not None and text.partition("->")[0].count(",") + 1 == len(proto.input)
    return True


def is_function(proto: FunctionProto, context: checker.C.CheckerContext) -> bool:
    """Say whether shape inference may see a model-local function."""
    try:
        checker.check_function(proto, context)
    except Exception:  # the checker raises many kinds; all say that the function is malformed
        return False
    return all(_is_sound(node) for graph in scopes_of(proto) for node in graph.node)


@lru_cache(maxsize=1024)
def propagates(op: str, opset: int) -> bool:
    """Say whether shape inference follows the elements of a list through an operator."""
    schema = _schema(op, opset)
    return schema is not None and schema.has_data_propagation_function
