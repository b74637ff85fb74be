"""Which stage of a deployment is shipped, and why: each is judged by what it loses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fastbn.deployment.compare import METRICS, Metric
from fastbn.deployment.result import Quantization, Shipped, Stage, Status
from fastbn.deployment.scores import row_outputs
from fastbn.graph.reasons import first_few

if TYPE_CHECKING:
    from fastbn.graph.model.index import Index
    from fastbn.graph.results import Parity
    from fastbn.graph.timing import Latency

__all__ = ["Judge", "Verdict", "unverified_warning", "warnings_about"]

# A ratio of medians below this is noise.
SLOWER = 1.05


@dataclass(frozen=True)
class Verdict:
    """What is shipped, how the deployment ends (one of result.STATUS), and the sentence that says why."""

    shipped: Shipped | None
    status: Status
    decision: str

    def after(self, parity: Parity | None) -> Verdict:
        """Return this verdict; where a stage is shipped and the parity of its fold proves nothing, its status and its sentence say so."""
        if self.shipped is None or parity is None or not parity.is_unverified:
            return self
        status: Status = "unverified" if self.status == "done" else self.status
        return replace(self, status=status, decision=f"{self.decision}; not verified: parity is {parity.status}")


@dataclass(frozen=True)
class Judge:
    """How the stages of a deployment are judged.

    Attributes
    ----------
    metric, max_drop : str, float
        What a stage is judged by, and how much it may lose.
    scores : list of str
        The outputs whose decisions count.
    chosen : bool
        Whether the caller chose the metric.
    """

    metric: Metric
    max_drop: float
    scores: list[str]
    chosen: bool

    def judged(self, stage: Stage, index: Index) -> Stage:
        """Return a stage, refused where it loses too much or nothing says what a quantized model loses; index is the model's."""
        if stage.refused is not None:
            return stage
        if stage.drop is None:
            return replace(stage, refused=self._loss(stage)) if stage.name == "quantized" else stage
        return replace(stage, refused=self._too_much(stage, index)) if stage.drop > self.max_drop else stage

    def verdict(self, stages: Sequence[Stage], quantization: Quantization | None) -> Verdict:
        """Return what is shipped of the judged stages: what was asked for, the folded model otherwise, or nothing."""
        wanted: Shipped = "folded" if quantization is None else "quantized"
        good = {stage.name: stage for stage in stages if stage.refused is None}
        folded: Shipped | None = "folded" if "folded" in good else None
        shipped = wanted if wanted in good else folded
        status: Status = "refused" if shipped is None else "done" if shipped == wanted else "partial"
        reasons = [quantization.refused] if quantization and quantization.refused else []
        reasons += [f"{stage.name}: {stage.refused}" for stage in stages[:0:-1] if stage.refused]
        return Verdict(shipped, status, "; ".join(reasons) or (self._loss(good[shipped]) if shipped else ""))

    def _loss(self, stage: Stage) -> str:
        """Return what a stage loses and what it may, as a sentence goes on."""
        if stage.drop is None:
            return f"no output can be compared by {self.metric}, so nothing says what it loses"
        if self.metric == "top-1" and stage.top1 is not None:
            rows = max(each.rows for each in stage.agreements)
            return f"{round(stage.drop * rows)} of {rows} decisions differ from the original's ({stage.drop:.1%}), {self.max_drop:.1%} may"
        return f"a relative error of {stage.drop:.2g} in the outputs, {self.max_drop:.2g} is allowed"

    def _too_much(self, stage: Stage, index: Index) -> str:
        """Return why a stage is refused, and, where nobody chose the metric and there is another, how to choose it."""
        spoiled = next((each for each in stage.agreements if each.relative == float("inf") and each.note), None)
        if spoiled:
            return f"{spoiled.note} in output '{spoiled.output}'"
        if self.chosen or not row_outputs(index):
            return self._loss(stage)
        other = "error judges it by the error of the outputs" if self.metric == "top-1" else "top-1 judges a classifier by its decisions"
        return f"{self._loss(stage)} (--metric {other})"


def unverified_warning(parity: Parity | None) -> Iterator[str]:
    """Yield, where the whole model was not verified (its parity was not run, or proves nothing), the sentence that says so."""
    if parity is not None and parity.is_unverified:
        hint = " (--input-shape may help)" if parity.status == "not-run" else ""
        yield f"the whole model was not verified{hint}: {parity.reason or parity}"


def warnings_about(stages: Sequence[Stage], latency: Sequence[Latency], metric: Metric, shipped: Shipped | None) -> Iterator[str]:
    """Yield what the figures do not say by themselves."""
    skipped: dict[str | None, list[str]] = {}
    for each in stages[0].agreements:
        if each.relative is None:
            skipped.setdefault(each.note, []).append(f"'{each.output}'")
    for note, names in skipped.items():
        if len(names) == 1:
            yield f"output {names[0]} is not compared ({note})"
        else:
            yield f"{len(names)} outputs are not compared ({note}): {first_few(names)}"
    for stage in stages:
        for each in stage.agreements if metric == "top-1" else ():
            if each.top1 is None and each.relative is not None and each.relative > METRICS["error"]:
                yield f"output '{each.output}' of {stage.name} has a relative error of {each.relative:.2g}, which top-1 does not judge"
    for threads in sorted({row["threads"] for row in latency}):
        times = {row["model"]: row["median_ms"] for row in latency if row["threads"] == threads}
        ratio = times["quantized"] / times["folded"] if shipped == "quantized" and "folded" in times else 0
        if ratio > SLOWER:
            yield f"quantized takes {ratio:.2f} times as long as folded here, {threads} thread{'s' * (threads > 1)}"
