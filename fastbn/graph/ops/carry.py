"""Table two: the operators that let a per-channel affine pass, perhaps along another axis, one row per operator (row.Row).

They change no constants. Most of them are symmetric: what may pass from the output to the input may pass from the input to the output,
along the axis that corresponds.
"""

from fastbn.graph.ops.affine import Affine
from fastbn.graph.ops.layout import LAYOUT
from fastbn.graph.ops.lift import FIRST_BROADCASTING_OPSET
from fastbn.graph.ops.pooling import POOLING, require_sign
from fastbn.graph.ops.row import Row, Taken, axis_in, data_sample, symmetric
from fastbn.graph.reasons import Refusal

__all__ = ["CARRIERS"]


# Identity:  f(S x + T) = S f(x) + T.
def _identity(node, affine, came, goes, view):
    return affine


# Dropout in inference is Identity; the ways to say "inference" changed with the opset.
def _dropout(node, affine, came, goes, view):
    opset, mode = view.index.opset, node.input(2)
    training = None if mode is None else view.index.constant(mode)
    if opset < 7 and not node.attribute("is_test", 0):
        raise Refusal("training-dropout", f"Dropout '{node.label}' drops at random (opset {opset} without is_test=1)")
    if mode is not None and (training is None or training.array().any()):
        raise Refusal("training-dropout", f"Dropout '{node.label}' may drop at random: its training_mode is not a constant false")
    return affine


# Cast to the type that a value already has is Identity, as some exporters write it; any other rounds or converts.
def _cast(node, affine, came, goes, view):
    kind = view.index.kind(node.inputs[0])
    if kind == 0 or kind != node.attribute("to"):
        raise Refusal("no-absorber", f"Cast '{node.label}' may change the type of '{node.inputs[0].name}'")
    return affine


# Neg:  -(S x + T) = S (-x) - T.
def _neg(node, affine, came, goes, view):
    return Affine(affine.scale, -affine.shift, affine.axis, affine.rank, affine.abs_terms)


# Relu, LeakyRelu, PRelu:  f(S x) = S f(x) where S > 0; a shift moves the bend.
def _relu(node, affine, came, goes, view):
    require_sign(node, affine, 1)
    if affine.shifts:
        raise Refusal("shift-through-relu", f"a shift cannot pass {node.op} '{node.label}'")
    return affine


# Add, Sub, Sum of values that are no constants:  S (a + b) + T = (S a + T) + S b: the scale goes to each, the shift to one of them.
# Forward a scale needs every operand to have it, a shift passes.  Where the other operand is a convolution of the same value, the affine
# becomes the centre of its kernel (RepVGG); otherwise the producers of the other operands are asked to make up for it.
def _sum_backward(node, affine, view):
    both = [_narrowed(node, affine, node.outputs[0], value, view) for value in node.inputs]
    if not affine.shifts:
        return Taken(onward=[*enumerate(both)])
    scales = [part.scale_only() for part in both]
    if node.op == "Sub":
        both[1] = Affine(both[1].scale, -both[1].shift, both[1].axis, both[1].rank, both[1].abs_terms)
    return (
        Taken(onward=[(slot, both[slot] if slot == taker else scales[slot]) for slot in range(len(both)) if slot == taker or affine.scales])
        for taker in range(len(both))
    )


def _sum_forward(node, slot, affine, view):
    if affine.scales:
        sibling = view.into_sibling(node, slot, affine)
        return sibling or _joined(node, slot, affine, view)
    onward = _narrowed(node, affine, node.inputs[slot], node.outputs[0], view)
    if node.op == "Sub" and slot == 1:
        onward = Affine(onward.scale, -onward.shift, onward.axis, onward.rank, onward.abs_terms)
    return Taken(onward=[(0, onward)])


def _joined(node, slot, affine, view):
    """(S x + T) + b = S (x + b/S) + T: the other operands are asked for what makes up for the scale."""
    if not view.may_rearrange() or (affine.scale == 0).any():
        raise Refusal("other-branch", f"{node.op} '{node.label}' adds it to a value that does not have its scale")
    onward = _narrowed(node, affine, node.inputs[slot], node.outputs[0], view)
    undone = onward.inverse().scale_only()
    # As they are asked for: a sum of very many is given up after a few.
    back = ((at, _narrowed(node, undone, node.outputs[0], value, view)) for at, value in enumerate(node.inputs) if at != slot)
    if node.op == "Sub" and slot == 1:
        onward = Affine(onward.scale, -onward.shift, onward.axis, onward.rank, onward.abs_terms)
    return Taken(onward=[(0, onward)], back=back)


def _narrowed(node, affine, came, goes, view):
    """Return the affine along the axis of another value that broadcasts with this one; Refusal where it does not fit."""
    before, after = view.shape(came), view.shape(goes)
    if before is None or after is None:
        raise Refusal("axis-unknown", f"the shapes at {node.op} '{node.label}' are not known")
    if view.index.opset < FIRST_BROADCASTING_OPSET and node.attribute("broadcast", 0):
        raise Refusal("axis", f"{node.op} '{node.label}' broadcasts along an axis that it names, as opset {view.index.opset} does")
    if affine.axis is None:
        return affine
    axis = axis_in(node, affine, len(before)) - len(before)
    if -axis > len(after) or after[axis] is None or after[axis] != affine.channels:
        raise Refusal("axis", f"{node.op} '{node.label}' makes the {affine.channels} channels by broadcasting")
    return affine.at(axis + len(after))


# Mul, Div of values that are no constants:  S (a * b) = (S a) * b: either factor takes the scale, no shift passes.
def _product_backward(node, affine, view):
    _refuse_shift(node, affine)
    slots = (0,) if node.op == "Div" else (0, 1)
    choices = []
    for slot in slots:
        try:
            choices.append(Taken(onward=[(slot, _narrowed(node, affine, node.outputs[0], node.inputs[slot], view))]))
        except Refusal as refusal:
            refused = refusal
    if not choices:
        raise refused
    return choices


def _product_forward(node, slot, affine, view):
    _refuse_shift(node, affine)
    if node.op == "Div" and slot == 1:
        raise Refusal("no-absorber", f"it is the divisor of Div '{node.label}'")
    return Taken(onward=[(0, _narrowed(node, affine, node.inputs[slot], node.outputs[0], view))])


def _refuse_shift(node, affine):
    if affine.shifts:
        raise Refusal("shift-cannot-pass", f"a shift cannot pass {node.op} '{node.label}' of two values")


_SUM = Row(_sum_backward, _sum_forward, lambda node, view: 1, data_sample)


_PRODUCT = Row(_product_backward, _product_forward, lambda node, view: 1, data_sample)


CARRIERS = {
    **LAYOUT,
    **POOLING,
    "Identity": symmetric(_identity),
    "Dropout": symmetric(_dropout),
    "Cast": symmetric(_cast),
    "Neg": symmetric(_neg),
    "Relu": symmetric(_relu),
    "LeakyRelu": symmetric(_relu),
    "PRelu": symmetric(_relu),
    "Add": _SUM,
    "Sub": _SUM,
    "Sum": _SUM,
    "Mul": _PRODUCT,
    "Div": _PRODUCT,
}
