"""Deployment: the stages of a model on its way to the CPU, what was measured of each, and which is shipped; as data, text and file."""

import platform
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx

from fastbn.deployment.compare import Agreement
from fastbn.deployment.measure import Kernels
from fastbn.deployment.report import render
from fastbn.errors import ParityError, expected
from fastbn.graph.fold_result import planning_of
from fastbn.graph.report import size_text, table
from fastbn.graph.results import json_number
from fastbn.graph.rewrite.output import prepared_bytes
from fastbn.graph.rewrite.replacement import atomic

__all__ = ["SCHEMA", "STATUS", "Deployment", "Quantization", "Stage"]

# Version of the JSON report: it grows when a field changes its meaning or leaves, not when one is added.
SCHEMA = 1

# How a deployment ends.
STATUS = {
    "done": "what was asked for is shipped",
    "partial": "the folded model is shipped, but the quantised one was refused, or onnxruntime cannot run the model: nothing was measured",
    "unverified": "what was asked for is shipped, but nothing proves that the whole folded model is the original",
    "refused": "nothing is shipped",
}


@dataclass
class Stage:
    """One form of the model: original, folded or quantized; path is where it lies while it is measured, refused why it is not shipped."""

    name: str
    path: Path | None
    size: int = 0
    load_ms: float | None = None
    resident_mb: float | None = None
    kernels: Kernels | None = None
    agreements: list = field(default_factory=list)
    drop: float | None = None
    refused: str | None = None

    @property
    def worst(self):
        """The Agreement with the largest relative error, of those that have one, or None."""
        return max((found for found in self.agreements if found.relative is not None), key=lambda found: found.relative, default=None)

    @property
    def top1(self):
        """The smallest part of decisions that agree, over the outputs that have any, or None."""
        return min((found.top1 for found in self.agreements if found.top1 is not None), default=None)

    def to_dict(self):
        return {
            "name": self.name,
            "bytes": self.size,
            "load_ms": self.load_ms,
            "resident_mb": self.resident_mb,
            "kernels": self.kernels and self.kernels.to_dict(),
            "outputs": [Agreement.to_dict(found) for found in self.agreements],
            "drop": json_number(self.drop),
            "refused": self.refused,
        }


@dataclass
class Quantization:
    """What the quantiser was asked for and made: float_kernels holds the kernels that still compute in float, of the quantised folded model
    and of the unfolded one, quantised after onnxruntime's own pre-processing ("unfolded") and without it ("unfolded_raw")."""

    recipe: str
    notes: tuple = ()
    refused: str | None = None
    float_kernels: dict = field(default_factory=dict)

    def to_dict(self):
        return {"recipe": self.recipe, "notes": list(self.notes), "refused": self.refused, "float_kernels": self.float_kernels}

    def float_sentence(self):
        """Return how many kernels are left in float, with and without the fold; None where nothing was counted."""
        if self.float_kernels.get("folded") is None:
            return None
        parts = []
        for key, how in (("unfolded", "after onnxruntime's own pre-processing"), ("unfolded_raw", "without it")):
            count = self.float_kernels.get(key)
            parts.append(f"{'the quantiser fails' if count is None else count} {how}")
        left = self.float_kernels["folded"]
        return f"{left} kernel{'s' if left != 1 else ''} left in float; without the fold {', '.join(parts)}"


class Deployment:
    """What a deployment made of a model.

    Attributes
    ----------
    fold : FoldResult
        folded, kept, parity.
    stages : list of Stage
        original, folded and, where it was asked for and could be made, quantized.
    latency : list of dict
        threads, model, runs, median_ms, p90_ms, ratio.
    samples : Samples or None
        What it was compared on; None where onnxruntime cannot run the model.
    metric, max_drop : str, float
        What a stage is judged by ("top-1" or "error"), and how much it may lose.
    quantization : Quantization or None
        None where it was not asked for.
    shipped : str or None
        The name of the stage that `save` writes.
    status, decision : str
        One of STATUS, and the sentence that says why.
    warnings : list of str
        What the reader must know before trusting the figures.
    """

    def __init__(self, fold, samples, metric, max_drop, quantization, command):
        self.fold = fold
        self.samples = samples
        self.metric = metric
        self.max_drop = max_drop
        self.quantization = quantization
        self.command = command
        self.stages = []
        self.latency = []
        self.warnings = []
        self.shipped = None
        self.status = None
        self.decision = None
        self.seconds = 0.0
        self.quantized = None
        self.versions = _versions()

    @property
    def ok(self):
        return self.status == "done"

    def stage(self, name):
        """Return the Stage of a name, or None."""
        return next((stage for stage in self.stages if stage.name == name), None)

    def save(self, path):
        """Write the shipped model, all or nothing; return the paths of its files, the model's first.

        Raises
        ------
        ParityError
            No stage is good enough to be shipped.
        StorageError
            A file cannot be written.
        """
        with self.prepared(path) as prepared:
            pass
        return prepared.paths

    def prepared(self, path):
        """Return a context in which the files of `save` are written under other names; they take their places when it ends well."""
        if self.shipped is None:
            raise ParityError(expected("a stage that may be shipped", self.decision, "deploy"))
        if self.shipped == "folded":
            return self.fold.prepared(path)
        return prepared_bytes(path, self.quantized, planning_of(self.fold).view.index.source)

    def to_bytes(self):
        """Return the shipped model as bytes, all tensors inside."""
        return self.fold.to_bytes() if self.shipped == "folded" else self.quantized

    def save_report(self, path):
        """Write the HTML report, one file that needs no other; raises FastbnError without jinja2."""
        text = render(self)
        with atomic(path) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def to_dict(self):
        """Return everything as data that JSON holds; "schema" is its version."""
        return {
            "schema": SCHEMA,
            "status": self.status,
            "shipped": self.shipped,
            "decision": self.decision,
            "warnings": self.warnings,
            "metric": self.metric,
            "max_drop": self.max_drop,
            "data": self.samples and self.samples.to_dict(),
            "stages": [stage.to_dict() for stage in self.stages],
            "latency": self.latency,
            "quantization": self.quantization and self.quantization.to_dict(),
            "fold": self.fold.to_dict(),
            "command": self.command,
            "seconds": round(self.seconds, 3),
            "versions": self.versions,
        }

    def lines(self):
        """Return the report as lines of text: the fold's, then a table of the stages, then the decision."""
        lines = [*self.fold.lines(), *(f"WARNING {warning}" for warning in self.warnings)]
        if self.samples:
            lines.append(f"data    {self.samples}")
            lines.extend(f"        {note}" for note in self.samples.notes)
        if self.quantization:
            lines.append(f"int8    {self.quantization.recipe}")
            lines.extend(f"        {note}" for note in (*self.quantization.notes, self.quantization.float_sentence()) if note)
        lines.extend(self._table())
        lines.append(f"shipped {self.shipped or 'nothing'}: {self.decision}")
        return lines

    def _table(self):
        threads = sorted({row["threads"] for row in self.latency})
        heads = [f"ms, {number} thread{'s' if number > 1 else ''}" for number in threads]
        rows = [["  stage", "size", "load ms", "RAM MB", *heads, "max error", "relative", "top-1"]]
        for stage in self.stages:
            times = {row["threads"]: row for row in self.latency if row["model"] == stage.name}
            rows.append(
                [
                    f"  {stage.name}",
                    size_text(stage.size),
                    _number(stage.load_ms, ".1f"),
                    _number(stage.resident_mb, ".1f"),
                    *(f"{times[n]['median_ms']:.3f} (p90 {times[n]['p90_ms']:.3f})" if n in times else "-" for n in threads),
                    _number(stage.worst and stage.worst.max_error, ".2g"),
                    _number(stage.worst and stage.worst.relative, ".2g"),
                    _number(stage.top1, ".2%"),
                ]
            )
        return table(rows)

    def __str__(self):
        return "\n".join(self.lines())


def _number(value, form):
    return "-" if value is None else f"{value:{form}}"


def _versions():
    """Return what a figure depends on: versions, machine."""
    import onnxruntime

    import fastbn

    return {
        "fastbn": fastbn.__version__,
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "platform": f"{sys.platform} {platform.machine()}",
        "cpu": _cpu_name(),
    }


def _cpu_name():
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
