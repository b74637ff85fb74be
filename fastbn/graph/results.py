"""Results as data: Fold, Kept, Parity, and the dictionaries of the JSON report."""

from dataclasses import dataclass
from html import escape
from typing import Literal, TypeAlias, TypedDict

from fastbn.graph.reasons import ReasonCode

__all__ = [
    "SCHEMA",
    "Change",
    "Explanation",
    "ExplanationDict",
    "Fold",
    "FoldDict",
    "FoldReport",
    "InferenceDict",
    "Kept",
    "KeptDict",
    "Parity",
    "ParityDict",
    "ParityStatus",
    "Rewritten",
    "RewrittenDict",
    "Step",
    "StepDict",
    "VerifyReport",
    "json_number",
]

# Version of the JSON report: it is raised when a field changes its meaning or is removed, not when one is added.
SCHEMA = 1

ParityStatus: TypeAlias = Literal["ok", "failed", "inconclusive", "not-run"]

# A float as JSON holds it: Inf and NaN are strings.
JsonNumber: TypeAlias = float | str | None


class FoldDict(TypedDict):
    """A Fold in the JSON report."""

    bn: str
    ops: tuple[str, ...]
    into: str
    op: str
    channels: int
    error: JsonNumber
    bound: JsonNumber
    note: str | None


class KeptDict(TypedDict):
    """A Kept in the JSON report."""

    bn: str
    ops: tuple[str, ...]
    code: ReasonCode
    reason: str
    not_rewritten: str | None


class RewrittenDict(TypedDict):
    """A Rewritten in the JSON report."""

    bn: str
    op: str
    channels: int
    error: JsonNumber
    bound: JsonNumber
    note: str | None
    code: ReasonCode
    reason: str


class LeftDict(TypedDict):
    """A node that stays in training mode, in the JSON report."""

    node: str
    reason: str


class InferenceDict(TypedDict):
    """What as_inference made of the nodes in training mode, in the JSON report."""

    changed: list[str]
    left: list[LeftDict]


class ParityDict(TypedDict):
    """A Parity in the JSON report."""

    status: ParityStatus
    inputs: int
    output: str | None
    index: tuple[int, ...]
    values: list[JsonNumber]
    error: JsonNumber
    allowed: JsonNumber
    reason: str | None
    notes: tuple[str, ...]
    compared: tuple[str, ...]
    missed: tuple[str, ...]


class StepDict(TypedDict):
    """A Step in the JSON report."""

    strategy: str
    depth: int
    direction: str
    node: str
    asked: str
    answer: str
    code: ReasonCode | None


class ExplanationDict(TypedDict):
    """An Explanation in the JSON report."""

    bn: str
    outcome: str
    steps: list[StepDict]


class Change(TypedDict):
    """A count before and after folding."""

    before: int
    after: int


class FoldReport(TypedDict):
    """The JSON report of a fold."""

    schema: int
    model: str
    opset: int
    ir_version: int
    nodes: Change
    batch_normalizations: Change
    folded: list[FoldDict]
    kept: list[KeptDict]
    rewritten: list[RewrittenDict]
    inference: InferenceDict | None
    notes: list[str]
    explanations: list[ExplanationDict]
    parity: ParityDict | None


class VerifyReport(TypedDict):
    """The JSON report of a comparison of two models."""

    schema: int
    parity: ParityDict


@dataclass(frozen=True)
class Fold:
    """Nodes that were folded together.

    Attributes
    ----------
    bn : str
        Labels of the nodes that are gone, joined by "+". A label is the name of a node, or that of its first output where it has none.
    ops : tuple of str
        Their operators: BatchNormalization, or Mul, Add, ... where it came decomposed.
    into, op : str
        Labels and operators of the absorbers, each joined by "+".
    channels : int
    error, bound : float or None
        Of the element of the segment with the largest error as a part of its bound: abs(folded - original), and what rounding allows.
        None where the segment was not run; note says why.
    note : str or None

    Examples
    --------
    >>> fold = Fold("bn1", ("BatchNormalization",), "conv1", "Conv", 64, error=1e-7, bound=5e-7)
    >>> fold.into, fold.error < fold.bound, fold.to_dict()["channels"]
    ('conv1', True, 64)
    """

    bn: str
    ops: tuple[str, ...]
    into: str
    op: str
    channels: int
    error: float | None = None
    bound: float | None = None
    note: str | None = None

    def to_dict(self) -> FoldDict:
        """Return the fields as JSON holds them."""
        return {
            "bn": self.bn,
            "ops": self.ops,
            "into": self.into,
            "op": self.op,
            "channels": self.channels,
            "error": json_number(self.error),
            "bound": json_number(self.bound),
            "note": self.note,
        }


@dataclass(frozen=True)
class Kept:
    """One BatchNormalization, or one that was decomposed into Mul and Add, that stays.

    Attributes
    ----------
    bn : str
        Label of the node; those of a chain joined by "+".
    ops : tuple of str
        Their operators.
    code : str
        A key of `reasons.REASONS`.
    reason : str
        The reason as a sentence.
    not_rewritten : str or None
        Why it has not become another operator either, where rewrite_left asks for that.

    Examples
    --------
    >>> kept = Kept("bn1", ("BatchNormalization",), "unused", "nothing reads it")
    >>> kept.code, kept.to_dict()["reason"]
    ('unused', 'nothing reads it')
    """

    bn: str
    ops: tuple[str, ...]
    code: ReasonCode
    reason: str
    not_rewritten: str | None = None

    def to_dict(self) -> KeptDict:
        """Return the fields as JSON holds them."""
        return {"bn": self.bn, "ops": self.ops, "code": self.code, "reason": self.reason, "not_rewritten": self.not_rewritten}


@dataclass(frozen=True)
class Rewritten:
    """One BatchNormalization that was not folded and has become another operator (rewrite_left).

    Attributes
    ----------
    bn : str
        Label of the node.
    op : str
        What stands in its place: "Conv", or "Mul+Add".
    channels : int
    error, bound, note
        As those of a Fold.
    code, reason : str
        Why it was not folded, as those of a Kept.
    """

    bn: str
    op: str
    channels: int
    error: float | None
    bound: float | None
    note: str | None
    code: ReasonCode
    reason: str

    def to_dict(self) -> RewrittenDict:
        """Return the fields as JSON holds them."""
        return {
            "bn": self.bn,
            "op": self.op,
            "channels": self.channels,
            "error": json_number(self.error),
            "bound": json_number(self.bound),
            "note": self.note,
            "code": self.code,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Step:
    """One question of the search for a place: what a node was asked for, and what it said.

    Attributes
    ----------
    strategy : str
        "plain", "rearrange" (other readers of a changed value undo the change) or "split" (an Add keeps the shift).
    depth : int
        How many nodes lie between this one and the batch normalization.
    direction : str
        "backward" (against the data flow) or "forward".
    node : str
        Operator and label, or the value that no node gives.
    asked : str
        The affine.
    answer : str
    code : str or None
        The reason of a refusal.
    """

    strategy: str
    depth: int
    direction: str
    node: str
    asked: str
    answer: str
    code: ReasonCode | None = None

    def to_dict(self) -> StepDict:
        """Return the fields as JSON holds them."""
        return {
            "strategy": self.strategy,
            "depth": self.depth,
            "direction": self.direction,
            "node": self.node,
            "asked": self.asked,
            "answer": self.answer,
            "code": self.code,
        }


@dataclass(frozen=True)
class Explanation:
    """The whole search for a place for one node.

    Attributes
    ----------
    bn : str
        Its label.
    outcome : str
        "folded", or the reason why it stays.
    steps : list of Step
        In the order of the questions.
    """

    bn: str
    outcome: str
    steps: list[Step]

    def to_dict(self) -> ExplanationDict:
        """Return the fields as JSON holds them."""
        return {"bn": self.bn, "outcome": self.outcome, "steps": [step.to_dict() for step in self.steps]}


@dataclass(frozen=True, repr=False)
class Parity:
    """Two models compared on the same inputs: in onnxruntime, its optimizer off on both sides, or in their framework.

    Attributes
    ----------
    status : str
        "ok", "failed", "inconclusive" (the bound is so large that nothing is proven) or "not-run".
    inputs : int
        How many kinds of input were compared.
    output : str or None
        The output that holds the worst element: the one whose error is the largest part of what is allowed.
    index : tuple of int
        The place of the worst element in this output.
    values : tuple of float
        (original, folded) of the worst element.
    error, allowed : float or None
        Of the worst element: abs(folded - original), and what is allowed there.
    reason : str or None
        Why the status is not "ok".
    notes : tuple of str
        What could not be compared, and why.
    compared : tuple of str
        Names of the outputs, and of values inside the model, that were compared within a bound that proves something.
    missed : tuple of str
        Choices of branches in which nothing was compared.
    where : str
        Where both were run, as the text says it.

    Examples
    --------
    >>> parity = Parity("ok", 3, "y", (0, 2), (1.0, 1.5), error=0.5, allowed=0.75)
    >>> parity
    <Parity ok: worst 0.5 at y[0,2], allowed 0.75>
    >>> parity.ok, parity.is_unverified, parity.to_dict()["index"]
    (True, False, (0, 2))
    """

    status: ParityStatus
    inputs: int = 0
    output: str | None = None
    index: tuple[int, ...] = ()
    values: tuple[float, float] | tuple[()] = ()
    error: float | None = None
    allowed: float | None = None
    reason: str | None = None
    notes: tuple[str, ...] = ()
    compared: tuple[str, ...] = ()
    missed: tuple[str, ...] = ()
    where: str = "optimizer off on both sides"

    @property
    def ok(self) -> bool:
        """Say whether the models agree, and that was proven."""
        return self.status == "ok"

    @property
    def is_unverified(self) -> bool:
        """Say whether the comparison was asked for and proves nothing: it was not run, or is inconclusive."""
        return self.status in ("not-run", "inconclusive")

    def __str__(self) -> str:
        if self.status == "not-run":
            return f"not run: {self.reason}"
        if self.error is None:
            return f"failed: {self.reason}" if self.reason else self.status
        before, after = (f"{value:.5g}" for value in self.values)
        text = f"{self.inputs} inputs, {self.where}: worst {self._worst()} ({before} / {after}), allowed {self.allowed:.2g}   {self.status}"
        return text + (f": {self.reason}" if self.reason else "")

    def __repr__(self) -> str:
        return f"<Parity {self.status}{'' if self.error is None else f': worst {self._worst()}, allowed {self.allowed:.2g}'}>"

    def _repr_html_(self) -> str:
        ran = {} if self.error is None else {"worst": self._worst(), "allowed": f"{self.allowed:.2g}"}
        rows = {"parity": self.status, "reason": self.reason, "inputs": self.inputs and f"{self.inputs} kinds, {self.where}", **ran}
        rows |= {"compared": ", ".join(self.compared), "not compared": "; ".join((*self.notes, *self.missed))}
        return f"<table>{''.join(f'<tr><th>{name}</th><td>{escape(str(each))}</td></tr>' for name, each in rows.items() if each)}</table>"

    def _worst(self) -> str:
        return f"{self.error:.2g} at {self.output}[{','.join(map(str, self.index))}]"

    def to_dict(self) -> ParityDict:
        """Return the fields as JSON holds them."""
        return {
            "status": self.status,
            "inputs": self.inputs,
            "output": self.output,
            "index": self.index,
            "values": [json_number(value) for value in self.values],
            "error": json_number(self.error),
            "allowed": json_number(self.allowed),
            "reason": self.reason,
            "notes": self.notes,
            "compared": self.compared,
            "missed": self.missed,
        }


def json_number(value: float | None) -> JsonNumber:
    """Return a float that JSON can hold: Inf and NaN become their names."""
    if value is None:
        return None
    value = float(value)
    return value if value - value == 0 else repr(value)
