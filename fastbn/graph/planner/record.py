"""What the search asks and hears, written down for an explanation."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

from fastbn.graph.model.node import Node, Value
from fastbn.graph.ops.affine import Affine
from fastbn.graph.ops.row import Strategy
from fastbn.graph.reasons import Refusal
from fastbn.graph.results import Step

__all__ = ["Record"]


class Record:
    """The steps of one search, or of several.

    Attributes
    ----------
    steps : list of Step
        In the order of the questions: one stands before those that follow from it.
    """

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._heard: str | None = None

    @contextmanager
    def question(
        self, strategy: Strategy, direction: Literal["backward", "forward"], asked: Node | Value, affine: Affine, depth: int
    ) -> Iterator[None]:
        """Write down a question, and the answer when the context ends: with a Refusal, or without."""
        name = f"{asked.op} '{asked.label}'" if isinstance(asked, Node) else f"the value '{asked.name}'"
        at = len(self.steps)
        step = Step(strategy, depth, direction, name, _shown(affine), "")
        self.steps.append(step)
        try:
            yield
        except Refusal as refusal:
            answer = "nothing further takes it" if refusal.sentence == self._heard else refusal.sentence
            self.steps[at] = replace(step, answer=answer, code=refusal.code)
            self._heard = refusal.sentence
            raise
        self.steps[at] = replace(step, answer="lets it pass" if len(self.steps) > at + 1 else "takes it")


def _shown(affine: Affine) -> str:
    parts = [name for name, there in (("scale", affine.scales), ("shift", affine.shifts)) if there]
    where = "one number for all elements" if affine.axis is None else f"{affine.channels} channels along axis {affine.axis}"
    return f"{' and '.join(parts) or 'nothing'}, {where}"
