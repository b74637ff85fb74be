"""Reasons that an option would change: whether it really would, by planning once more as if it had been given.

A size that is not known, or a constant that a caller may override, is the reason only where the batch normalization would be folded
without it. Where it would stay all the same, what then stands in the way is the better reason.
"""

from collections.abc import Callable, Mapping

from onnx import ValueInfoProto

from fastbn.errors import ModelError
from fastbn.graph.model.index import Index
from fastbn.graph.model.node import Node
from fastbn.graph.planner.kept import kept_nodes
from fastbn.graph.planner.planning import Planning, key_of
from fastbn.graph.reasons import CURABLE, Refusal
from fastbn.graph.results import Kept

__all__ = ["advised", "supposed_shapes"]

# Sizes that are supposed where the model leaves them open: of the first axis, and of the others, which windows and strides fit.
FIRST_SIZE, OTHER_SIZE = 2, 224


def supposed_shapes(index: Index) -> dict[str, tuple[int, ...]]:
    """Return sizes for the graph inputs that leave some open, the same for the same name; those that the caller gives count."""
    named: dict[str, int] = {}
    shapes = {}
    for info in index.proto.graph.input:
        kind = info.type.tensor_type
        if info.name not in index.input_shapes and kind.HasField("shape") and any(dim.dim_value <= 0 for dim in kind.shape.dim):
            shapes[info.name] = _supposed(info, named)
    return {**index.input_shapes, **shapes}


def _supposed(info: ValueInfoProto, named: dict[str, int]) -> tuple[int, ...]:
    sizes = []
    for axis, dim in enumerate(info.type.tensor_type.shape.dim):
        size = FIRST_SIZE if axis == 0 else OTHER_SIZE
        sizes.append(dim.dim_value if dim.dim_value > 0 else named.setdefault(dim.dim_param, size) if dim.dim_param else size)
    return tuple(sizes)


def advised(planning: Planning, index: Index, suppose: Callable[[dict[str, tuple[int, ...]]], Planning]) -> list[Kept]:
    """Return what stays, with the reasons that would be left once every option was given.

    Parameters
    ----------
    planning : Planning
    index : Index
        Of the model as it was planned.
    suppose : callable
        Sizes of the graph inputs -> the planning of the same model with them, and with inputs frozen.
    """
    curable = {node: refusal for node, refusal in planning.refusals.items() if refusal.code in CURABLE}
    if not curable:
        return planning.kept
    shapes = supposed_shapes(index)
    try:
        best = {key_of(node): refusal for node, refusal in suppose(shapes).refusals.items()}
    except ModelError:  # with these sizes the model is none
        return planning.kept
    opened = [info.name for info in index.proto.graph.input if info.name in shapes and info.name not in index.input_shapes]
    return kept_nodes(index, planning.view, {**planning.refusals, **_changed(curable, best, opened)}, planning.unrewritten)


def _changed(curable: Mapping[Node, Refusal], best: Mapping[tuple[int, int], Refusal], opened: list[str]) -> dict[Node, Refusal]:
    """Return the refusals that say something else now."""
    changed = {}
    for node, refusal in curable.items():
        other = best.get(key_of(node))
        # Supposed sizes may be none that the model runs with; then a channel axis of one size meets one of another.
        if other is not None and other.code not in (*CURABLE, "axis"):
            changed[node] = other
        elif other is None and refusal.code == "axis-unknown" and opened:
            hint = f"{refusal.sentence}; --input-shape {opened[0]}=... tells the sizes"
            changed[node] = Refusal(refusal.code, hint)
    return changed
