"""Which stage of a deployment is shipped, and why: each is judged by what it loses, and by what it has over the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

from fastbn.deployment.compare import METRICS, Metric
from fastbn.deployment.evidence import Comparison, Goal, between
from fastbn.deployment.result import Quantization, Shipped, Stage, StageName, Status
from fastbn.deployment.scores import row_outputs, score_outputs
from fastbn.errors import ArgumentError, expected
from fastbn.graph.reasons import first_few

if TYPE_CHECKING:
    from fastbn.deployment.options import Options
    from fastbn.deployment.reestimated import NewStatistics
    from fastbn.graph.model.index import Index
    from fastbn.graph.results import Parity

__all__ = ["Judge", "Verdict", "unverified_warning", "warnings_about"]


@dataclass(frozen=True)
class Verdict:
    """What is shipped, how the deployment ends (one of result.STATUS), and the sentence that says why."""

    shipped: Shipped | None
    status: Status
    decision: str

    def after(self, parity: Parity | None) -> Verdict:
        """Return this verdict; where a fold is shipped whose parity proves nothing, its status and its sentence say so."""
        if self.shipped in (None, "original") or parity is None or not parity.is_unverified:
            return self
        status: Status = "unverified" if self.status == "done" else self.status
        return replace(self, status=status, decision=f"{self.decision}; not verified: parity is {parity.status}")

    def with_statistics(self, tried: NewStatistics | None) -> Verdict:
        """Return this verdict; where new statistics were wanted and are not used, its status and its sentence say so."""
        if self.shipped is None or tried is None or not tried.is_refused:
            return self
        status: Status = "partial" if self.status == "done" else self.status
        return replace(self, status=status, decision=f"{self.decision}; with its old statistics, for accuracy would fall with new ones")


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
    goal : str
        What a quantized model must be better in, and a folded one not worse: "latency" (on one thread), "size" or "memory".
    max_slowdown : float or None
        How much slower than the original a stage may be for another goal than latency; None for any.
    """

    metric: Metric
    max_drop: float
    scores: list[str]
    chosen: bool
    goal: Goal = "latency"
    max_slowdown: float | None = None

    @classmethod
    def of(cls, options: Options, index: Index, has_labels: bool) -> Self:
        """Return the Judge that options ask for; raises ArgumentError where a model has nothing to judge it by in this way."""
        scores = score_outputs(index)
        metric = options.metric
        if metric == "accuracy" and not has_labels:
            raise ArgumentError(expected("labels in the data for the metric 'accuracy'", "none", "metric"))
        if metric == "top-1":
            scores = scores or row_outputs(index)
            if not scores:
                raise ArgumentError(expected("an output of scores [N, C] for the metric 'top-1'", "none that looks like one", "metric"))
        usual: Metric = "accuracy" if has_labels else "top-1" if scores else "error"
        chosen: Metric = usual if metric == "auto" else metric
        max_drop = METRICS[chosen] if options.max_drop is None else options.max_drop
        return cls(chosen, max_drop, scores, metric != "auto", options.goal, options.max_slowdown)

    def judged(self, stage: Stage, index: Index) -> Stage:
        """Return a stage, refused where it loses too much or nothing says what a quantized model loses; index is the model's."""
        if stage.refused is not None:
            return stage
        if stage.drop is None:
            return replace(stage, refused=self._loss(stage)) if stage.name == "quantized" else stage
        return replace(stage, refused=self._too_much(stage, index)) if stage.drop > self.max_drop else stage

    def verdict(
        self, stages: Sequence[Stage], quantization: Quantization | None, found: Sequence[Comparison], is_changed: bool = True
    ) -> tuple[Verdict, tuple[Stage, ...]]:
        """Return what is shipped of the judged stages, and the stages, those refused that are not.

        Parameters
        ----------
        stages : list of Stage
            As from `judged`.
        quantization : Quantization or None
        found : list of Comparison
        is_changed : bool
            Whether the folded model is another one than the original.
        """
        wanted: Shipped = "folded" if quantization is None else "quantized"
        by_name: dict[StageName, Stage] = {stage.name: stage for stage in stages}
        good = [stage.name for stage in stages if stage.refused is None]
        best: Shipped | None = "original" if "original" in good else None
        rest: str = ""
        candidates: list[Shipped] = ["folded", "quantized"]
        for name in candidates:
            if name not in good:
                continue
            reason = "" if name == "folded" and not is_changed else self._unfit(name, best, found)
            if reason:
                loss = f"; {self._loss(by_name[name])}" if self.metric != "error" or by_name[name].drop else ""
                by_name[name] = replace(by_name[name], refused=f"{reason}{loss}")
            else:
                rest = _said(best, between(found, name, best)) if best and is_changed else ""
                best = name
        reasons = [quantization.refused] if quantization and quantization.refused else []
        reasons += [f"{stage.name} is refused: {stage.refused}" for stage in list(by_name.values())[:0:-1] if stage.refused]
        made = tuple(by_name.values())
        if best is None or not {"folded", "quantized"} & set(good):
            return Verdict(None, "refused", "; ".join(reasons)), made
        if best == "original":
            return Verdict(best, "partial", "; ".join(["no stage is better than the original", *reasons])), made
        words = "; ".join(filter(None, [rest, self._loss(by_name[best])]))
        status: Status = "done" if best == wanted else "partial"
        compared = by_name[best].agreements
        if compared and not any(each.elements for each in compared):
            status, words = ("unverified" if status == "done" else status), f"{words}, for every output is empty"
        return Verdict(best, status, "; ".join([*reasons, f"{best} is taken: {words}" if reasons else words])), made

    def _unfit(self, name: StageName, best: StageName | None, found: Sequence[Comparison]) -> str:
        """Return why a stage is no better than the best so far, or slower than it may be; "" where it is fit."""
        slow = self._too_slow(between(found, name, "original"))
        if slow or best is None:
            return slow
        against = between(found, name, best)
        aim = next((each for each in against if each.measure == self.goal and each.threads in (None, 1)), None)
        if name == "quantized":
            if aim is not None and aim.is_less:
                return ""
            return _said(best, against, aim) if aim else f"nothing says whether it is better than {best} in {self.goal}"
        worse = any(each.difference == "more" for each in against if each is not aim)
        better = any(each.difference == "less" for each in against) or (aim is not None and aim.is_less)
        may_be_slower = self.goal == "latency" and self.max_slowdown is not None
        if (aim is not None and aim.is_more and not may_be_slower) or (worse and not better):
            return _said(best, against, aim)
        return ""

    def _too_slow(self, against: Sequence[Comparison]) -> str:
        """Return that a stage is slower than it may be beside the original, or ""."""
        one = next((each for each in against if each.measure == "latency" and each.threads == 1), None)
        if self.max_slowdown is None or one is None or not one.is_more or (one.ratio.low or 0) <= 1 + self.max_slowdown:
            return ""
        return f"{_said('original', against, one)}; --max-slowdown allows {1 + self.max_slowdown:.4g} of its time"

    def _loss(self, stage: Stage) -> str:
        """Return what a stage loses and what it may, as a sentence goes on."""
        if stage.drop is None:
            return f"no output can be compared by {self.metric}, so nothing says what it loses"
        if self.metric == "accuracy" and stage.accuracy is not None:
            return f"{stage.accuracy}, {100 * self.max_drop:.4g} may be lost"
        if self.metric == "top-1" and stage.top1 is not None:
            rows = max(each.rows for each in stage.agreements)
            differ = f"{round(stage.drop * rows)} of {rows} decisions differ from the original's"
            return f"{differ} ({stage.drop:.1%}, at most {self.max_drop:.1%} may)"
        return f"a relative error of {stage.drop:.2g} in the outputs, {self.max_drop:.2g} is allowed"

    def _too_much(self, stage: Stage, index: Index) -> str:
        """Return why a stage is refused, and, where nobody chose the metric and there is another, how to choose it."""
        spoiled = next((each for each in stage.agreements if each.relative == float("inf") and each.note), None)
        if spoiled:
            return f"{spoiled.note} in output '{spoiled.output}'"
        if self.chosen or self.metric == "accuracy" or not row_outputs(index):
            return self._loss(stage)
        other = "error judges it by the error of the outputs" if self.metric == "top-1" else "top-1 judges a classifier by its decisions"
        return f"{self._loss(stage)} (--metric {other})"


def _said(other: StageName, found: Sequence[Comparison], aim: Comparison | None = None) -> str:
    """Return what a stage is beside another, as a sentence: what decides and is alike first, then what speaks on the other side."""
    ordered = sorted(found, key=lambda each: each is not aim)
    sides = {
        "better": [each for each in ordered if each.is_less],
        "worse": [each for each in ordered if each.is_more],
        "even": [each for each in ordered if not each.is_less and not each.is_more],
    }
    first = next((side for side, each in sides.items() if aim in each), next((side for side, each in sides.items() if each), ""))
    if not first:
        return ""
    text = f"beside {other} it is {', '.join(map(str, sides.pop(first)))}"
    return text + "".join(f", {'and' if side == 'even' else 'but'} {', '.join(map(str, each))}" for side, each in sides.items() if each)


def unverified_warning(parity: Parity | None) -> Iterator[str]:
    """Yield, where the whole model was not verified (its parity was not run, or proves nothing), the sentence that says so."""
    if parity is not None and parity.is_unverified:
        hint = " (--input-shape may help)" if parity.status == "not-run" else ""
        yield f"the whole model was not verified{hint}: {parity.reason or parity}"


def warnings_about(stages: Sequence[Stage], metric: Metric, max_drop: float, shipped: Shipped | None) -> Iterator[str]:
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
        for each in stage.agreements if metric != "error" else ():
            if each.top1 is None and each.relative is not None and each.relative > METRICS["error"]:
                yield f"output '{each.output}' of {stage.name} has a relative error of {each.relative:.2g}, which {metric} does not judge"
        found = stage.accuracy
        if metric == "accuracy" and stage.name == shipped and found is not None and (found.high or 0) > max_drop:
            yield (
                f"{found.labels} labels are too few to prove it: {shipped} may lose up to {100 * (found.high or 0):.1f} points of accuracy,"
                f" {100 * max_drop:.4g} are allowed"
            )
