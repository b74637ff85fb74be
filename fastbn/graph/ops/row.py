"""A row: everything that the package knows of one operator of ONNX.

A row answers two questions about a node and an affine S, T:

* backward: an output of the node must become S * output + T; which of its constants change, and what is asked of its inputs?
* forward: an input of the node, until now S * input + T, becomes plain `input`; which constants of the node make up for it, and what
  remains to be made up for behind its outputs?

Both return a Transfer, or raise Refusal. Rows only read. What they may ask is a PresentGraph: the graph in which the plans so far have
already happened; what they are given is a Traveler, the affine with the value where it has arrived.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from fastbn.graph.model.constant import Constant, Dense, Tensor
from fastbn.graph.model.node import Node, Shape, Value
from fastbn.graph.model.quantized import Dequantized, Requantized
from fastbn.graph.ops.affine import Affine, FloatArray
from fastbn.graph.ops.shape_rules import Size, Sizes
from fastbn.graph.reasons import Refusal

__all__ = [
    "STRATEGIES",
    "Attribute",
    "Origin",
    "PresentGraph",
    "Row",
    "Rule",
    "SiblingMerge",
    "Skip",
    "Strategy",
    "Transfer",
    "Traveler",
    "one_term",
]

# How far the planner goes, each only where the one before leaves nothing to do, the later ones for a batch normalization alone: move the
# affine; change a value that others read too, and let them undo it; leave the shift behind in an Add.
Strategy: TypeAlias = Literal["plain", "rearrange", "split"]
STRATEGIES: tuple[Strategy, ...] = ("plain", "rearrange", "split")

# What a fold sets an attribute of a node to.
Attribute: TypeAlias = int | float


class PresentGraph(Protocol):
    """What a row may ask: the graph in which the plans so far have already happened (planner/view.GraphView)."""

    @property
    def opset(self) -> int:
        """The version of ONNX's operators."""
        ...

    def constant(self, value: Value | None) -> Tensor | None:
        """Return the constant that a value of the original always is, or None."""
        ...

    def why_no_constant(self, value: Value) -> str:
        """Return why a value is no constant, as the end of a sentence about it."""
        ...

    def kind(self, value: Value) -> int:
        """Return the type of a value as a number of TensorProto, 0 where it is not known."""
        ...

    def is_overridable(self, value: Value) -> bool:
        """Say whether a caller of the model may override an initializer."""
        ...

    def shape(self, value: Value | None) -> Shape | None:
        """Return the shape of a value, None where not even the rank is known."""
        ...

    def rank(self, value: Value | None) -> int | None:
        """Return the rank of a value, or None."""
        ...

    def sizes(self, value: Value | None) -> Sizes | None:
        """Return the shape of a value with a Dim for each size that only a run tells: two that are equal are the same in every run."""

    def elements(self, value: Value | None) -> list[Size] | None:
        """Return the elements of a list of integers as far as they are known, None where not even their number is."""

    def declared_shape(self, value: Value) -> Shape | None:
        """Return what the file itself says of a shape."""
        ...

    def probe_shape(self, value: Value) -> tuple[int, ...] | None:
        """Return a shape to verify with, None where the rank is not known."""
        ...

    def affine(self, node: Node) -> Affine | None:
        """Return what a node is as an affine, None where it is none or must stay."""
        ...

    def check(self, node: Node) -> None:
        """Raise ModelError where a node is not what ONNX demands."""
        ...

    def source(self, value: Value) -> Value:
        """Return the value that stands in the place of a value now."""
        ...

    def producer(self, value: Value) -> Node | None:
        """Return the node that gives a value now."""
        ...

    def readers(self, value: Value) -> list[tuple[Node, int]]:
        """Return (node, slot) of everything that sees the elements of a value now; Refusal where the caller of the model does."""
        ...

    def refuse_readers(self, value: Value, asker: Node, slot: int) -> None:
        """Refuse when anything but this slot of `asker` sees a value."""
        ...

    def has(self, node: Node, slot: int) -> bool:
        """Say whether a node has an input at a slot now."""
        ...

    def is_changed(self, node: Node, slot: int) -> bool:
        """Say whether a plan has changed or made the constant at a slot."""
        ...

    def planned_attributes(self, node: Node) -> Mapping[str, Attribute]:
        """Return the attributes that plans set."""
        ...

    def tensor(self, node: Node, slot: int) -> Constant | None:
        """Return the constant at a slot as it is now, or None."""
        ...

    def weight(self, node: Node, slot: int) -> Constant:
        """Return the floating constant at a slot as it is now; Refusal where it is none."""
        ...

    def dense(self, node: Node, slot: int) -> Dense:
        """Return weight(node, slot) in float64."""
        ...

    def refuse_widening(self, node: Node, slot: int, constant: Constant) -> None:
        """Refuse to store the constant at a slot as floats where it is quantized and large."""
        ...

    def bias(self, node: Node, slot: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Dense | Dequantized:
        """Return the bias at a slot in float64, zeros where it is absent; as it is where a DequantizeLinear gives it."""
        ...


@dataclass(frozen=True)
class Origin:
    """Where an affine comes from: the node that it was lifted from, and the value of the present graph that this node reads."""

    node: Node
    value: Value


@dataclass(frozen=True)
class Skip:
    """What else is asked for backward: the value must become S * value + T + scale * source, with `source` another value of the graph."""

    source: Value
    scale: Affine


@dataclass(frozen=True)
class Traveler:
    """An affine on its way: where it is now, how far the planner goes for it, where it comes from.

    value is the output that is to become the affine of itself (backward) or the input that lacks the affine (forward), slot its number
    among the outputs or the inputs of the node at hand. skip is there only where the row says that it takes one.
    """

    affine: Affine
    value: Value
    slot: int
    strategy: Strategy
    origin: Origin
    skip: Skip | None = None

    @property
    def may_rearrange(self) -> bool:
        """Whether other readers of a value may be asked to undo a change in their constants."""
        return self.strategy != "plain"


@dataclass(frozen=True)
class SiblingMerge:
    """A fold into another convolution of the same value (RepVGG): the sum at hand leaves, and one of its inputs takes its place.

    constants are those of the sibling, by slot; via holds the sums between; stays is the input slot that takes the place of the output.
    """

    sibling: Node
    constants: Mapping[int, Constant]
    via: Sequence[Node]
    stays: int


@dataclass
class Transfer:
    """What a node does with an affine.

    constants and attributes are those of the node that change, by slot and by name. passed_on holds what is asked further: (input slot,
    affine) backward, (output slot, affine) forward. required yields what a forward row asks of the node's other inputs, (input slot,
    affine). merge is there where the affine goes into a sibling instead. alike are other nodes with the same affine, which are lifted too.
    skip is asked, backward, of the input at its slot. beside are nodes that stay as they are, which the proof has to run too. objection is
    what the node itself says against it, which counts once all that is asked further would work out.
    """

    constants: dict[int, Constant | Requantized] = field(default_factory=dict)
    attributes: dict[str, Attribute] = field(default_factory=dict)
    passed_on: list[tuple[int, Affine]] = field(default_factory=list)
    required: Iterable[tuple[int, Affine]] = ()
    merge: SiblingMerge | None = None
    alike: Sequence[Node] = ()
    skip: tuple[int, Skip] | None = None
    beside: Sequence[Node] = ()
    objection: Refusal | None = None


# What a row answers in one direction, see the head of the file; several answers are tried in order.
Rule: TypeAlias = Callable[[Node, Traveler, PresentGraph], Transfer | Iterable[Transfer]]


def _no_terms(node: Node, graph: PresentGraph) -> int:
    return 0


def one_term(node: Node, graph: PresentGraph) -> int:
    """Return the Row.terms of an operator that does not sum elements."""
    return 1


def _probe_inputs(node: Node, graph: PresentGraph) -> dict[int, tuple[int, ...] | None]:
    return {slot: graph.probe_shape(value) for slot, value in enumerate(node.inputs) if value is not None}


def _as_it_is(proto: NodeProto) -> list[NodeProto]:
    return []


def _absolute(slot: int, array: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(np.abs(array))


def _one(node: Node) -> float:
    return 1.0


def _first_slot(node: Node, graph: PresentGraph) -> int:
    return 0


@dataclass(frozen=True)
class Row:
    """One operator. What is not given does not hold of it, or is not known of it.

    Attributes
    ----------
    backward, forward : Rule or None
        What it does with an affine in each direction; None where it has no such fold.
    join : callable or None
        (node, input slot -> affine, graph) -> what it does forward with affines that have come in by several of its inputs, or Refusal.
    meet : callable or None
        (node, output slot -> affine, graph) -> what it does backward with affines that are asked of several of its outputs, or Refusal.
    forward_refusal : str
        What a sentence about the node goes on with where forward is None.
    with_constant : Row or None
        The row that counts instead where one of its two operands is a constant (Add of a value and a constant, for example).
    lift : callable or None
        (node, graph) -> the node itself as an affine, or None. A batch normalization that must stay raises Refusal.
    data_slot : callable
        (node, graph) -> the input slot of the data of a node that is lifted.
    broadcasts : bool
        Its operands broadcast: a constant may widen the data.
    takes_skip : bool
        Its backward rule knows of `Traveler.skip`.
    takes_wide : bool
        Its backward rule knows of an affine of more channels than its output, which has one element, has: the output becomes wider.
    parts : bool
        It hands out parts of its input, and one of its outputs may change alone.
    apart : tuple of int
        The slots of outputs that no affine of its data changes.
    reads : mapping of int -> "shape" or "type"
        The input slots of which it reads the shape or the type alone: an affine there changes nothing.

    channel_axis : int or None
        The axis of its output whose size its weight fixes.
    bias_slot : int or None
        Where it reads the bias that its sums end with.
    bias_factor : callable
        node -> the number that multiplies that bias.
    has_no_place_for_shift : bool
        Its weight takes a scale, and it has no bias: a shift may stay behind in an Add.
    weight_matrix : callable or None
        (node, slot, values) -> the weight at a slot as a matrix of shape (output channels, terms), None where no weight is read there.
    factor_reach : callable or None
        (node, slot, graph) -> how many times as large as the data what a number at a slot multiplies may be, one for all or one for each of
        them; Inf for a divisor, which must not become zero; None where no number is read there that multiplies each element alone.
    input_names : mapping of int -> str
        What a new constant at a slot is called, where it is neither a weight nor a bias.

    terms : callable
        (node, graph) -> the number of products, or of elements, that one element of the output sums.
    equal_terms : bool
        These may all be equal, so that their rounding errors do not cancel.
    probe_shapes : callable
        (node, graph) -> input slot -> shape to verify with, small but large enough for every weight to take part; for inputs that are no
        constants.
    sized : bool
        Whether an affine passes may depend on the sizes of its inputs, so the proof of a fold runs on the sizes that the model states,
        where they are small enough, before it runs on smaller ones.
    bound : callable
        Edits a NodeProto so that, run on absolute values, it bounds the size of what the node rounds; returns the nodes that follow it.
    magnitude : callable
        (slot, array) -> a floating constant for that run.
    ends_on_nothing : bool
        Its kernel in onnxruntime 1.32 ends the process where its data have no elements.
    signed_slots : tuple of int
        Inputs that say where to read, not what: they keep their signs in that run.
    least_magnitude : float
        The least size of what the node rounds.

    sizes : callable or None
        (node, sizes of the inputs) -> sizes of the first output as far as those of the inputs tell them.
    size_slots : tuple of int
        The slots in which it reads sizes, factors or axes by value.
    reshape_target : callable or None
        (node, sizes of the first input, value -> its elements) -> the list of sizes that it makes of its input, which Reshape's rules read.
    demanded_size : callable or None
        (node, sizes of its second input) -> (axis, size) that these demand of its first input.
    result_size : callable or None
        (node, arrays) -> how many elements it gives for constants, told before it is run; None where it is not to be run for them. Without
        it, onnx's shape inference is asked.
    work : callable or None
        (node, arrays by slot, elements of the result) -> how many steps it takes for constants. Without it, an operator with result_size
        takes a few for each element; one without, a step for each pair of an element of its result and one of its largest input.
    list_elements : callable or None
        (node, sizes of the first input, elements of the inputs) -> the elements of a list that it gives, where no run is needed for them.
    moved_inputs : "first", "all" or None
        The elements of what it gives are elements of its first input, or of all inputs.
    """

    backward: Rule | None = None
    forward: Rule | None = None
    join: Callable[[Node, Mapping[int, Affine], PresentGraph], Transfer] | None = None
    meet: Callable[[Node, Mapping[int, Affine], PresentGraph], Transfer] | None = None
    forward_refusal: str = "which cannot take or pass it"
    with_constant: "Row | None" = None
    lift: Callable[[Node, PresentGraph], Affine | None] | None = None
    data_slot: Callable[[Node, PresentGraph], int] = _first_slot
    broadcasts: bool = False
    takes_skip: bool = False
    takes_wide: bool = False
    parts: bool = False
    apart: tuple[int, ...] = ()
    reads: Mapping[int, Literal["shape", "type"]] = field(default_factory=dict)

    channel_axis: int | None = None
    bias_slot: int | None = None
    bias_factor: Callable[[Node], float] = _one
    has_no_place_for_shift: bool = False
    weight_matrix: Callable[[Node, int, NDArray[Any]], NDArray[Any] | None] | None = None
    factor_reach: Callable[[Node, int, PresentGraph], FloatArray | float | None] | None = None
    input_names: Mapping[int, str] = field(default_factory=dict)

    terms: Callable[[Node, PresentGraph], int] = _no_terms
    equal_terms: bool = False
    probe_shapes: Callable[[Node, PresentGraph], Mapping[int, tuple[int, ...] | None]] = _probe_inputs
    sized: bool = False
    bound: Callable[[NodeProto], list[NodeProto]] = _as_it_is
    magnitude: Callable[[int, NDArray[Any]], NDArray[Any]] = _absolute
    ends_on_nothing: bool = False
    signed_slots: tuple[int, ...] = ()
    least_magnitude: float = 0.0

    sizes: Callable[[Node, Sequence[Sizes | None]], Sizes | None] | None = None
    size_slots: tuple[int, ...] = ()
    reshape_target: Callable[[Node, Sizes | None, Callable[[Value | None], list[Size] | None]], list[Size] | None] | None = None
    demanded_size: Callable[[Node, Sizes], tuple[int, Size]] | None = None
    result_size: Callable[[Node, Sequence[NDArray[Any]]], float | None] | None = None
    work: Callable[[Node, Sequence[NDArray[Any] | None], float], float] | None = None
    list_elements: Callable[[Node, Sizes | None, Sequence[NDArray[Any] | None]], NDArray[Any] | None] | None = None
    moved_inputs: Literal["first", "all"] | None = None

    @property
    def transfers(self) -> bool:
        """Whether the operator takes an affine or lets one pass, in any direction."""
        return self.backward is not None or self.forward is not None
