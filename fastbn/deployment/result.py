"""Deployment: the stages of a model on its way to the CPU, what was measured of each, and which is shipped; as data, text and file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, Self, TypeAlias, TypedDict

from fastbn.deployment.compare import Agreement, AgreementFields, Metric
from fastbn.deployment.equalization_trial import EqualizationTrial, EqualizationTrialFields
from fastbn.deployment.evidence import Comparison, ComparisonFields, Goal
from fastbn.deployment.labels import Accuracy, AccuracyFields
from fastbn.deployment.measure import KernelFields, Kernels
from fastbn.deployment.provenance import Provenance, ProvenanceFields, Versions, versions
from fastbn.deployment.report import render
from fastbn.deployment.trade_off import TradeOff, TradeOffFields, trade_off_lines
from fastbn.errors import ParityError
from fastbn.graph.fold_result import output_of, planning_of
from fastbn.graph.notebook import result_html
from fastbn.graph.report import size_text, size_texts, table
from fastbn.graph.results import FoldReport, json_number
from fastbn.graph.rewrite.output import ModelResult, Output, Written
from fastbn.graph.rewrite.replacement import atomic

if TYPE_CHECKING:
    import os

    from fastbn.deployment.reestimated import NewStatistics, NewStatisticsFields
    from fastbn.deployment.samples import Samples, SamplesFields
    from fastbn.graph import FoldResult
    from fastbn.graph.digests import Digest
    from fastbn.graph.timing import Latency

__all__ = ["SCHEMA", "STATUS", "Deployment", "Quantization", "Stage", "StageName", "Status"]

# Version of the JSON report: it grows when a field changes its meaning or leaves, not when one is added.
SCHEMA = 1

StageName: TypeAlias = Literal["original", "folded", "quantized"]
Shipped: TypeAlias = Literal["original", "folded", "quantized"]
Status: TypeAlias = Literal["done", "partial", "unverified", "refused"]

# How a deployment ends.
STATUS: dict[Status, str] = {
    "done": "what was asked for is shipped",
    "partial": "another stage is shipped than the one that was asked for, or onnxruntime cannot run the model and nothing was measured",
    "unverified": "what was asked for is shipped, but nothing proves that the whole folded model is the original",
    "refused": "nothing is shipped",
}


class StageFields(TypedDict):
    """A Stage as JSON holds it."""

    name: StageName
    bytes: int
    load_ms: float | None
    resident_mb: float | None
    kernels: KernelFields | None
    outputs: list[AgreementFields]
    accuracy: AccuracyFields | None
    drop: float | str | None
    refused: str | None


@dataclass(frozen=True, repr=False)
class Stage:
    """One form of the model.

    Attributes
    ----------
    name : str
        "original", "folded" or "quantized".
    size : int
        Bytes of its files; 0 where it was not measured.
    load_ms, resident_mb : float or None
        Milliseconds to load it, and megabytes that it then takes.
    kernels : Kernels or None
        What onnxruntime runs for it.
    agreements : tuple of Agreement
        Its outputs beside the original's.
    accuracy : Accuracy or None
        How many labels it gets right, where there are any.
    drop : float or None
        What it loses by the metric of the deployment, beside what onnxruntime's optimizer loses of the original.
    refused : str or None
        Why it is not shipped.
    """

    name: StageName
    size: int = 0
    load_ms: float | None = None
    resident_mb: float | None = None
    kernels: Kernels | None = None
    agreements: tuple[Agreement, ...] = ()
    accuracy: Accuracy | None = None
    drop: float | None = None
    refused: str | None = None

    @property
    def worst(self) -> Agreement | None:
        """The Agreement with the largest relative error, of those that have one, or None."""
        errors = [(each.relative, each) for each in self.agreements if each.relative is not None]
        return max(errors, key=lambda error: error[0], default=(None, None))[1]

    @property
    def top1(self) -> float | None:
        """The smallest part of decisions that agree, over the outputs that have any, or None."""
        return min((each.top1 for each in self.agreements if each.top1 is not None), default=None)

    def to_dict(self) -> StageFields:
        """Return the fields as JSON holds them."""
        return {
            "name": self.name,
            "bytes": self.size,
            "load_ms": self.load_ms,
            "resident_mb": self.resident_mb,
            "kernels": None if self.kernels is None else self.kernels.to_dict(),
            "outputs": [each.to_dict() for each in self.agreements],
            "accuracy": None if self.accuracy is None else self.accuracy.to_dict(),
            "drop": json_number(self.drop),
            "refused": self.refused,
        }

    def __repr__(self) -> str:
        return f"<Stage {self.name}: {size_text(self.size)}, drop {_number(self.drop, '.2g')}{', refused' if self.refused else ''}>"


class QuantizationFields(TypedDict):
    """A Quantization as JSON holds it."""

    recipe: str
    notes: list[str]
    refused: str | None
    float_kernels: dict[str, int | None]
    trade_off: list[TradeOffFields]
    equalization: EqualizationTrialFields | None


@dataclass(frozen=True)
class Quantization:
    """What the quantizer was asked for and made.

    Attributes
    ----------
    recipe : str
        What it was asked for.
    notes : tuple of str
        What else was done to the model.
    refused : str or None
        Why there is no quantized model.
    float_kernels : dict of str -> int or None
        Kernels that still compute in float, of the quantized folded model ("folded") and of the unfolded one, quantized after
        onnxruntime's own pre-processing ("unfolded") and without it ("unfolded_raw"); None where the quantizer fails.
    trade_off : tuple of TradeOff
        What each node more in float gains and costs; empty where int8 did not lose too much.
    equalization : EqualizationTrial or None
        Whether layers are equalized, and what says so; None where nothing could be equalized, and without data_free.
    """

    recipe: str
    notes: tuple[str, ...] = ()
    refused: str | None = None
    float_kernels: dict[str, int | None] = field(default_factory=dict)
    trade_off: tuple[TradeOff, ...] = ()
    equalization: EqualizationTrial | None = None

    def to_dict(self) -> QuantizationFields:
        """Return the fields as JSON holds them."""
        return {
            "recipe": self.recipe,
            "notes": list(self.notes),
            "refused": self.refused,
            "float_kernels": self.float_kernels,
            "trade_off": [point.to_dict() for point in self.trade_off],
            "equalization": None if self.equalization is None else self.equalization.to_dict(),
        }

    def said(self) -> list[str]:
        """Return the notes, what came of the equalization at their end, as sentences."""
        return [*self.notes, *([] if self.equalization is None else [str(self.equalization)])]

    def float_sentence(self) -> str | None:
        """Return how many kernels are left in float, with and without the fold; None where nothing was counted."""
        left = self.float_kernels.get("folded")
        if left is None:
            return None
        parts = []
        for key, how in (("unfolded", "after onnxruntime's own pre-processing"), ("unfolded_raw", "without it")):
            count = self.float_kernels.get(key)
            parts.append(f"{'the quantizer fails' if count is None else count} {how}")
        return f"{left} kernel{'s' if left != 1 else ''} left in float; without the fold {', '.join(parts)}"


class DeploymentFields(TypedDict):
    """A Deployment as JSON holds it."""

    schema: int
    status: Status
    shipped: Shipped | None
    decision: str
    warnings: list[str]
    metric: Metric
    max_drop: float
    goal: Goal
    max_slowdown: float | None
    data: SamplesFields | None
    stages: list[StageFields]
    latency: list[Latency]
    comparisons: list[ComparisonFields]
    quantization: QuantizationFields | None
    new_statistics: NewStatisticsFields | None
    fold: FoldReport
    command: str
    seconds: float
    provenance: ProvenanceFields | None
    versions: Versions


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Deployment(ModelResult):
    """What a deployment made of a model.

    Attributes
    ----------
    fold : FoldResult
        folded, kept, parity.
    shipped : str or None
        The name of the stage that `save` writes: "original", "folded", "quantized" or None.
    status, decision : str
        One of STATUS, and the sentence that says why.
    metric, max_drop : str, float
        What a stage is judged by ("top-1", "error" or "accuracy"), and how much it may lose.
    goal, max_slowdown : str, float or None
        What it must be better in, and how much slower it may be, as in `Options`.
    samples : Samples or None
        What it was compared on; None where onnxruntime cannot run the model.
    stages : tuple of Stage
        original, folded and, where it was asked for and could be made, quantized.
    latency : list of dict
        threads, model, runs, median_ms, p90_ms, ratio (how many times as long as the original it takes), low, high (its 99 % interval) and
        difference, as `bench` gives them.
    comparisons : tuple of Comparison
        Every stage beside those before it, measure by measure.
    quantization : Quantization or None
        None where it was not asked for.
    quantized : bytes or None
        The quantized model.
    new_statistics : NewStatistics or None
        What came of running statistics that were estimated again; None where that was not asked for.
    warnings : tuple of str
        What the reader must know before trusting the figures.
    command : str
        What was called.
    seconds : float
        How long it took.
    provenance : Provenance or None
        SHA-256 of input, output and data, date and host.
    versions : dict
        What the figures depend on: versions, machine.

    Examples
    --------
    >>> import fastbn, numpy as np, onnx
    >>> text = '''<ir_version: 8, opset_import: ["" : 17]>
    ... tiny (float[N, 1, 3] x) => (float[N, 1, 3] y) <
    ...   float[1, 1, 1] w = {2}, float[1] one = {1}, float[1] mean = {3}, float[1] var = {4} > {
    ...   c = Conv (x, w)
    ...   y = BatchNormalization <epsilon: float = 0.0> (c, one, one, mean, var)
    ... }'''
    >>> samples = np.linspace(-1, 1, 24, dtype=np.float32).reshape(8, 1, 3)
    >>> deployment = fastbn.deploy(onnx.parser.parse_model(text), data=samples, runs=1)
    >>> deployment
    <Deployment done: folded shipped, 2 stages, parity ok>
    >>> deployment.stage("folded").drop
    0.0
    >>> [node.op_type for node in onnx.load_from_string(deployment.to_bytes()).graph.node]
    ['Conv']
    """

    fold: FoldResult
    shipped: Shipped | None
    status: Status
    decision: str
    metric: Metric
    max_drop: float
    goal: Goal = "latency"
    max_slowdown: float | None = None
    samples: Samples | None = None
    stages: tuple[Stage, ...] = ()
    latency: Sequence[Latency] = ()
    comparisons: tuple[Comparison, ...] = ()
    quantization: Quantization | None = None
    quantized: bytes | None = None
    new_statistics: NewStatistics | None = None
    warnings: tuple[str, ...] = ()
    command: str = ""
    seconds: float = 0.0
    provenance: Provenance | None = None
    versions: Versions = field(default_factory=versions)

    @property
    def ok(self) -> bool:
        """Whether what was asked for is shipped and verified."""
        return self.status == "done"

    def stage(self, name: StageName) -> Stage | None:
        """Return the Stage of a name, or None."""
        return next((stage for stage in self.stages if stage.name == name), None)

    def _made(self) -> Output:
        """Return the shipped model; raises ParityError where none is."""
        source = planning_of(self.fold).view.index.source
        if self.shipped is None:
            raise ParityError(f"Cannot save a model: nothing is shipped: {self.decision}")
        if self.shipped == "quantized" and self.quantized is not None:
            return Output.of_bytes(self.quantized, source)
        if self.shipped == "folded":
            return output_of(self.fold)
        return Output(source, source.is_edited, lambda: Written(source.proto, []))  # byte for byte, but for the names of its data files

    def written_as(self, output: Sequence[Digest]) -> Self:
        """Return the same deployment, which says that these files are its output."""
        return self if self.provenance is None else replace(self, provenance=replace(self.provenance, output=tuple(output)))

    def save_report(self, path: str | os.PathLike[str]) -> None:
        """Write the HTML report, one file that needs no other; raises FastbnError without jinja2."""
        with atomic(path, render(self)):
            pass

    def to_dict(self) -> DeploymentFields:
        """Return everything as data that JSON holds; "schema" is its version."""
        return {
            "schema": SCHEMA,
            "status": self.status,
            "shipped": self.shipped,
            "decision": self.decision,
            "warnings": list(self.warnings),
            "metric": self.metric,
            "max_drop": self.max_drop,
            "goal": self.goal,
            "max_slowdown": self.max_slowdown,
            "data": None if self.samples is None else self.samples.to_dict(),
            "stages": [stage.to_dict() for stage in self.stages],
            "latency": list(self.latency),
            "comparisons": [each.to_dict() for each in self.comparisons],
            "quantization": None if self.quantization is None else self.quantization.to_dict(),
            "new_statistics": None if self.new_statistics is None else self.new_statistics.to_dict(),
            "fold": self.fold.to_dict(),
            "command": self.command,
            "seconds": round(self.seconds, 3),
            "provenance": None if self.provenance is None else self.provenance.to_dict(),
            "versions": self.versions,
        }

    def lines(self) -> list[str]:
        """Return the report as lines of text: the fold's, then a table of the stages, then the decision."""
        lines = [*self.fold.lines(), *(f"WARNING {warning}" for warning in self.warnings)]
        if self.samples:
            lines.append(f"data    {self.samples}")
            lines.extend(f"        {note}" for note in self.samples.notes)
        if self.new_statistics:
            lines.append(f"stats   {self.new_statistics}")
        if self.quantization:
            lines.append(f"int8    {self.quantization.recipe}")
            lines.extend(f"        {note}" for note in (*self.quantization.said(), self.quantization.float_sentence()) if note)
            lines.extend(trade_off_lines(self.quantization.trade_off))
        lines.extend(self._table())
        lines.append(f"shipped {self.shipped or 'nothing'}: {self.decision}")
        return lines

    def _table(self) -> list[str]:
        threads = sorted({row["threads"] for row in self.latency})
        heads = [f"ms, {number} thread{'s' if number > 1 else ''}" for number in threads]
        right = ["accuracy"] if any(stage.accuracy for stage in self.stages) else []
        rows = [["  stage", "size", "load ms", "RAM MB", *heads, "max error", "relative", "top-1", *right]]
        sizes = size_texts([stage.size for stage in self.stages])
        for stage, size in zip(self.stages, sizes, strict=True):
            times = {row["threads"]: row for row in self.latency if row["model"] == stage.name}
            worst = stage.worst
            rows.append(
                [
                    f"  {stage.name}",
                    size,
                    _number(stage.load_ms, ".1f"),
                    _number(stage.resident_mb, ".1f"),
                    *(_latency_cell(times.get(number)) for number in threads),
                    _number(None if worst is None else worst.max_error, ".2g"),
                    _number(None if worst is None else worst.relative, ".2g"),
                    _number(stage.top1, ".2%"),
                    *(["-" if stage.accuracy is None else f"{stage.accuracy.part:.2%}"] if right else []),
                ]
            )
        return table(rows)

    def _repr_html_(self) -> str:
        return result_html(self.lines(), planning_of(self.fold))

    def __repr__(self) -> str:
        verified = "not verified" if self.fold.parity is None else f"parity {self.fold.parity.status}"
        return f"<Deployment {self.status}: {self.shipped or 'nothing'} shipped, {len(self.stages)} stages, {verified}>"

    def __str__(self) -> str:
        return "\n".join(self.lines())


def _latency_cell(row: Latency | None) -> str:
    """Return median and 90th percentile, and the ratio to the original with its interval where there is one."""
    if row is None:
        return "-"
    text = f"{row['median_ms']:.3f} (p90 {row['p90_ms']:.3f})"
    ends = "" if row["low"] is None or row["model"] == "original" else f" {row['ratio']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
    return text + ends


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"
