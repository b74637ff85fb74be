"""What folding the models of all frameworks has in common: the job, and the parity that the outputs of two models have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from fastbn.errors import ParityError
from fastbn.exported.result import ModelFold, layer_of, named
from fastbn.exported.variables import Changes, Variables
from fastbn.graph.job import Job, Options, fold_of
from fastbn.graph.model.storage import Source
from fastbn.graph.ops.normalization import ADVICE, BATCH_NORM
from fastbn.graph.parity.reference import Progress, silent
from fastbn.graph.parity.verdict import Verdict
from fastbn.graph.planner.planning import Planning
from fastbn.graph.results import Kept, Parity, ParityStatus
from fastbn.graph.rewrite.draft import Draft
from fastbn.graph.rewrite.output import Output
from fastbn.graph.rewrite.writer import rewrite

if TYPE_CHECKING:
    from fastbn.graph.planner.plan import Plan

__all__ = ["Beside", "ModelJob", "parity_of"]

ModelT = TypeVar("ModelT")
CheckedT = TypeVar("CheckedT", contravariant=True)


class Beside(Protocol[CheckedT]):
    """The outputs of an original."""

    def check(self, folded: CheckedT) -> Parity:
        """Return the parity of a folded model."""
        ...


class ModelJob(Job, Generic[ModelT]):
    """The main job on the graph of a model of a framework, whose whole is compared there.

    Parameters
    ----------
    source : Source
        The graph.
    variables : Variables
    beside : Beside or None
        None verifies nothing.
    seed, progress : int, callable or None
    """

    framework: str

    def __init__(self, source: Source, variables: Variables, beside: Beside[ModelT] | None, seed: int, progress: Progress | None) -> None:
        verify = beside is not None
        super().__init__(source, source, Options(None, None, None, verify, {}, False, None, seed, progress or silent, None, variables))
        self.variables, self.beside = variables, beside

    def model_of(self, changes: Changes) -> ModelT:
        """Return a copy of the model with these changes."""
        raise NotImplementedError

    def class_of(self, name: str) -> str:
        """Return the class of a layer or module by its name."""
        raise NotImplementedError

    def unseen(self) -> list[Kept]:
        """Return the batch normalizations that the graph does not show."""
        return []

    def _whole(self, planning: Planning) -> tuple[Draft, Output, Parity | None]:
        draft = Draft(self.index, planning)
        output = rewrite(self.index, planning, draft)  # which is written for nobody
        if self.beside is None or not planning.plans:
            return draft, output, None
        self.options.progress("comparing the folded model with the original")
        return draft, output, self.beside.check(self.model_of(self.variables.changes(planning, self.index)))

    def model_fold(self) -> ModelFold[ModelT]:
        """Plan, compare, and return the result."""
        planning, draft, _, parity = self._finish(self.plan())
        if parity is not None and parity.status == "failed":
            raise ParityError(f"Cannot fold the model: it differs from the original whatever is left out: {parity}")
        changes = self.variables.changes(planning, self.index)
        folded = []
        for plan in planning.folds:
            fold = fold_of(plan, self.check_of(plan), draft, False)
            folded.append(named(fold, self.class_of, self._zeros(plan, changes)))
        kept: dict[str, Kept] = {}  # calls of one batch normalization count once
        for each in (*(each for each in planning.kept if each.ops == (BATCH_NORM,)), *self.unseen()):
            name = layer_of(each.bn)
            kept.setdefault(name, replace(each, bn=name, reason=each.reason.removesuffix(ADVICE)))  # the option is one of ONNX's fold
        return ModelFold(self.model_of(changes), folded, [*kept.values()], parity, self.framework)

    def _zeros(self, plan: Plan, changes: Changes) -> list[str]:
        names = [norm.name for norm in map(self.variables.norm_of, plan.lifted) if norm is not None]
        return [f"zeros stay in the place of '{name}'" for name in names if name in changes.zeros]


def parity_of(verdicts: Sequence[Verdict], runs: int, where: str) -> Parity:
    """Return the parity of two models whose outputs were compared in some runs."""
    if not verdicts:
        return Parity("not-run", reason="no output is a tensor")
    worst = max(verdicts, key=lambda each: (not each.holds, each.part))
    status, reason = _status(verdicts)
    return Parity(
        status,
        runs,
        worst.name,
        worst.worst.index,
        worst.worst.values,
        error=worst.worst.error,
        allowed=worst.allowed,
        reason=reason,
        compared=tuple(dict.fromkeys(each.name for each in verdicts if each.proves)),
        where=where,
    )


def _status(verdicts: Sequence[Verdict]) -> tuple[ParityStatus, str | None]:
    if any(each.is_wrong for each in verdicts):
        return "failed", None
    doubtful = next((each for each in verdicts if not each.holds), None)
    if doubtful is not None:
        return "inconclusive", doubtful.why_inconclusive
    if not any(each.proves for each in verdicts):
        return "inconclusive", "every output is constant"
    return "ok", None
