"""Einsum of data and a constant: the constant takes the scale of an axis of its own, that of another axis passes."""

import math
import string
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastbn.affine import WeightLayout
from fastbn.errors import ModelError, expected
from fastbn.graph.model.constant import Constant, Dense
from fastbn.graph.model.node import Node
from fastbn.graph.ops.affine import Affine, FloatArray
from fastbn.graph.ops.placing import axis_in, require_channels
from fastbn.graph.ops.row import PresentGraph, Row, Transfer, Traveler
from fastbn.graph.ops.shape_rules import Size, Sizes
from fastbn.graph.ops.weighted import scaled
from fastbn.graph.reasons import Refusal

__all__ = ["EINSUM"]

# The most elements of a product of two operands of an Einsum of more.
MOST_HELD = 1 << 24


class Product(NamedTuple):
    """An Einsum of two operands, one of them a constant: the slot of that, and the letters of the axes of data, weight and result.

    own are the letters of axes along which the weight has numbers of its own, and does not repeat one for all elements of the data.
    """

    slot: int
    weight: str
    data: str
    result: str
    own: frozenset[str]


def _terms_of(node: Node) -> tuple[list[str], str | None]:
    """Return (letters of the operands, those of the result or None where the equation does not say) of an Einsum."""
    left, arrow, right = node.attribute("equation", b"").decode("latin-1").replace(" ", "").partition("->")
    return left.split(","), right if arrow else None


def _letters(node: Node, ranks: Sequence[int | None]) -> tuple[list[str], str] | None:
    """Return (letters of the operands, of the result), others in the place of dots; None where ranks do not tell, or do not fit."""
    terms, result = _terms_of(node)
    if len(terms) != len(ranks):
        return None
    free = [letter for letter in string.ascii_letters[::-1] if not any(letter in term for term in (*terms, result or ""))]
    longest = 0
    for at, term in enumerate(terms):
        if "..." in term:
            rank = ranks[at]
            covered = -1 if rank is None else rank - len(term) + len("...")
            if covered < 0:
                return None
            longest = max(longest, covered)
            terms[at] = term.replace("...", "".join(free[:covered][::-1]))
    dots = "".join(free[:longest][::-1])
    if result is None:
        every = "".join(terms)
        result = "..." + "".join(sorted(letter for letter in set(every) - set(dots) if every.count(letter) == 1))
    return terms, result.replace("...", dots)


def _product(node: Node, graph: PresentGraph) -> tuple[Product, Constant]:
    """Return (letters, constant) of an Einsum of data and a constant; Refusal where it is none, or sums the data alone."""
    constants = [graph.constant(value) is not None for value in node.inputs]
    count = len(_terms_of(node)[0])
    if count != len(constants):
        raise ModelError(expected(f"{count} operands, as the equation says", str(len(constants)), node.label))
    if sorted(constants) != [False, True]:
        raise Refusal("no-absorber", f"Einsum '{node.label}' is no product of one value and a constant")
    found = _letters(node, [graph.rank(value) for value in node.inputs])
    if found is None:
        raise Refusal("axis-unknown", f"the rank of the data of Einsum '{node.label}' is not known")
    slot = constants.index(True)
    terms, result = found
    weight, data, constant = terms[slot], terms[1 - slot], graph.weight(node, slot)
    if len(constant.shape) != len(weight):
        raise ModelError(expected(f"a constant of {len(weight)} axes", f"shape {constant.shape}", node.label))
    if not {*result} <= {*weight, *data}:
        raise ModelError(expected("a result of axes that the operands have", repr(result), node.label))
    own = frozenset(letter for letter, size in zip(weight, constant.shape, strict=True) if size != 1 or letter not in data)
    if any(len(set(term)) < len(term) for term in (weight, data, result)) or not {*data} <= {*own, *result}:
        raise Refusal("axis", f"Einsum '{node.label}' takes a diagonal, or sums an axis that its constant does not have")
    return Product(slot, weight, data, result, own), constant


def _layout(product: Product, weight: Constant, letter: str | None) -> WeightLayout:
    """Return the layout of a weight that takes a scale along the axis of a letter, or one number."""
    if letter is None:
        return WeightLayout(1, 1, 1, math.prod(weight.shape))
    axis = product.weight.index(letter)
    return WeightLayout(1, math.prod(weight.shape[:axis]), weight.shape[axis], math.prod(weight.shape[axis + 1 :]))


# With w the constant:  backward S sum w x = sum (S w) x along an axis of w, else the scale goes on to x;  forward sum w (S x + T) =
# sum (S w) x + sum w T along an axis of w, and sum w T goes on as a shift; along another axis of the result a scale goes on.
def _backward(node: Node, traveler: Traveler, graph: PresentGraph) -> Transfer:
    affine, (product, weight) = traveler.affine, _product(node, graph)
    axis = axis_in(node, affine, len(product.result))
    if affine.shifts:
        raise Refusal("shift-cannot-pass", f"Einsum '{node.label}' has no bias to take the shift")
    letter = None if axis is None else product.result[axis]
    if letter is not None and letter not in product.own:
        return Transfer(passed_on=[(1 - product.slot, affine.at(product.data.index(letter)))])
    layout = _layout(product, weight, letter)
    require_channels(node, affine, layout.channels, "output")
    return Transfer({product.slot: scaled(weight, layout, affine.along(layout.channels)[0])})


def _forward(node: Node, traveler: Traveler, graph: PresentGraph) -> Transfer:
    affine, (product, weight) = traveler.affine, _product(node, graph)
    axis = axis_in(node, affine, len(product.data))
    letter = None if axis is None else product.data[axis]
    if letter is not None and letter not in product.own:
        if affine.shifts:
            raise Refusal("shift-cannot-pass", f"a shift along axis {axis} cannot pass Einsum '{node.label}'")
        return Transfer(passed_on=[(0, affine.at(product.result.index(letter)))])
    layout = _layout(product, weight, letter)
    require_channels(node, affine, layout.channels, "input")
    transfer = Transfer()
    if affine.scales:
        transfer.constants[product.slot] = scaled(weight, layout, affine.along(layout.channels)[0])
    if affine.shifts:
        transfer.passed_on.append((0, _behind(node, affine, product, weight, letter)))
    return transfer


def _behind(node: Node, affine: Affine, product: Product, weight: Constant, letter: str | None) -> Affine:
    """Return what a shift of the data becomes behind the sum: one number for each element of one axis of the weight."""
    kept = [at for at, each in enumerate(product.weight) if each in product.result]
    if len([at for at in kept if weight.shape[at] != 1]) > 1:
        raise Refusal("shift-cannot-pass", f"the shift behind Einsum '{node.label}' is not one number per channel")
    summed = tuple(at for at in range(len(weight.shape)) if at not in kept)
    shape = [1] * len(weight.shape)
    if letter is not None:
        shape[product.weight.index(letter)] = affine.channels
    values = Dense.of(weight).values
    total: FloatArray = (values * affine.shift.reshape(shape)).sum(axis=summed).reshape(-1)
    size: FloatArray = (np.abs(values) * affine.abs_terms.reshape(shape)).sum(axis=summed).reshape(-1)
    long = next((product.weight[at] for at in kept if weight.shape[at] != 1), None)
    return Affine(np.ones_like(total), total, None if long is None else product.result.index(long), 0, size)


def _terms(node: Node, graph: PresentGraph) -> int:
    product, weight = _product(node, graph)
    return math.prod(size for size, letter in zip(weight.shape, product.weight, strict=True) if letter not in product.result)


def _probe_shapes(node: Node, graph: PresentGraph) -> dict[int, tuple[int, ...] | None]:
    product, weight = _product(node, graph)
    sizes = {letter: size for letter, size in zip(product.weight, weight.shape, strict=True) if letter in product.own}
    value = node.inputs[1 - product.slot]
    known = None if value is None else graph.probe_shape(value)
    shape = known or (2,) * len(product.data)
    return {1 - product.slot: tuple(sizes.get(letter, size) for letter, size in zip(product.data, shape, strict=True))}


def _weight_matrix(node: Node, slot: int, values: NDArray[Any]) -> NDArray[Any] | None:
    terms, result = _terms_of(node)
    if result is None or len(terms[slot]) != values.ndim or "." in terms[slot]:
        return None
    kept = [at for at, letter in enumerate(terms[slot]) if letter in result]
    summed = [at for at in range(values.ndim) if at not in kept]
    return values.transpose([*kept, *summed]).reshape(math.prod(values.shape[at] for at in kept), -1)


def _sizes(node: Node, inputs: Sequence[Sizes | None]) -> Sizes | None:
    found = _letters(node, [None if sizes is None else len(sizes) for sizes in inputs])
    if found is None or len(found[0]) != len(inputs):
        return None
    sizes: dict[str, set[Size]] = {}
    for letters, own in zip(found[0], inputs, strict=True):
        for letter, size in zip(letters, own or (), strict=False):
            sizes.setdefault(letter, set()).add(size)
    return tuple(_only(sizes.get(letter, ())) for letter in found[1])


def _only(sizes: Iterable[Size]) -> Size:
    """Return the size of an axis of several operands: a number above 1 where there is one, or the one that all have."""
    given = list(sizes)
    numbers = [size for size in given if isinstance(size, int) and size != 1]
    return numbers[0] if numbers else given[0] if len(given) == 1 else None


def _einsum_work(node: Node, arrays: Sequence[NDArray[Any] | None], size: float) -> float:
    """Return the product of the sizes of all letters; infinite where a product of two of several operands may be too large to be held."""
    sizes: dict[str | int, int] = {}
    for term, array in zip(_terms_of(node)[0], arrays, strict=False):
        before, _, behind = term.partition("...")
        shape = () if array is None else array.shape
        middle = len(shape) - len(before) - len(behind)
        for letter, length in zip((*before, *range(-middle, 0), *behind), shape, strict=False):
            sizes[letter] = max(sizes.get(letter, 1), length)
    steps = math.prod(sizes.values())
    return math.inf if len(arrays) > 2 and steps > MOST_HELD else steps


EINSUM = {
    "Einsum": Row(
        _backward,
        _forward,
        has_no_place_for_shift=True,
        terms=_terms,
        probe_shapes=_probe_shapes,
        weight_matrix=_weight_matrix,
        sizes=_sizes,
        work=_einsum_work,
    ),
}
