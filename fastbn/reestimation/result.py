"""Reestimation: what came of it, as a model, as files, as data and as text."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from fastbn.graph.report import size_text, table, wrapped
from fastbn.graph.results import SCHEMA, JsonNumber, json_number
from fastbn.graph.rewrite.output import ModelResult
from fastbn.graph.rewrite.replacement import atomic
from fastbn.reestimation.levels import Left, Site
from fastbn.reestimation.options import Mode
from fastbn.reestimation.report import render

if TYPE_CHECKING:
    from fastbn._types import FloatArray
    from fastbn.graph.rewrite.output import Output
    from fastbn.stats import BatchStats

__all__ = ["FAR", "Moved", "MovedDict", "Reestimation", "ReestimationReport", "moved"]

# A batch normalization that moves farther, in units of its own deviation, saw other data than these before.
FAR = 0.25


class MovedDict(TypedDict):
    """A Moved in the JSON report."""

    bn: str
    level: int
    channels: int
    count: int
    distance: JsonNumber
    channel: int
    mean_shift: JsonNumber
    std_ratio: JsonNumber
    typical: JsonNumber


@dataclass(frozen=True)
class Moved:
    """How far the statistics of one batch normalization moved.

    A channel whose values have the new mean m' and standard deviation s' leaves the old normalization, by m and s, with the mean
    (m' - m) / s and the deviation s' / s instead of 0 and 1. Its distance is sqrt(((m' - m) / s)^2 + (s' / s - 1)^2): the 2-Wasserstein
    distance of these two normal distributions, in units of s. s and s' are sqrt(var + eps), as the normalization uses them.

    Attributes
    ----------
    bn : str
    level, channels, count : int
        Its level, its channels, and how many values per channel were seen.
    distance : float
        Of the channel that moved farthest.
    channel : int
        Which one that is.
    mean_shift, std_ratio : float
        (m' - m) / s and s' / s of that channel.
    typical : float
        The median of the distances of all channels.
    """

    bn: str
    level: int
    channels: int
    count: int
    distance: float
    channel: int
    mean_shift: float
    std_ratio: float
    typical: float

    def to_dict(self) -> MovedDict:
        """Return everything as JSON holds it."""
        numbers = {name: json_number(getattr(self, name)) for name in ("distance", "mean_shift", "std_ratio", "typical")}
        return {**dataclasses.asdict(self), **numbers}  # type: ignore[typeddict-item]  # the same fields


def moved(site: Site, mean: FloatArray, var: FloatArray, stats: BatchStats) -> Moved:
    """Return the Moved of a site with a new mean and variance."""
    with np.errstate(all="ignore"):
        old = np.sqrt(site.var + site.eps)
        shift = (mean - site.mean) / old
        ratio = np.sqrt(var + site.eps) / old
        distance = np.hypot(shift, ratio - 1)
    distance = np.where(np.isfinite(distance), distance, np.inf)  # the old statistics were none
    worst = int(distance.argmax())
    numbers = float(distance[worst]), worst, float(shift[worst]), float(ratio[worst]), float(np.median(distance))
    return Moved(site.node.label, site.level, mean.size, stats.count, *numbers)


class ReestimationReport(TypedDict):
    """The JSON report."""

    schema: int
    model: str
    mode: str
    depth: int
    samples: int
    partitions: int
    workers: int
    unbiased: bool
    momentum: float | None
    verified: str | None
    moved: list[MovedDict]
    left: list[dict[str, str]]
    notes: list[str]
    seconds: float


@dataclass(frozen=True, repr=False)
class Reestimation(ModelResult):
    """What `reestimate` returns: the model with new statistics, and how far each batch normalization moved.

    Attributes
    ----------
    moved : list of Moved
        Those that have new statistics, the one that moved farthest first.
    left : list of Left
        Those that keep theirs: bn, code, reason.
    statistics : dict of name -> BatchStats
        What was estimated, by the name of the batch normalization.
    samples, partitions, depth, workers : int
        Rows that were read, partitions that they lie in, levels, and processes that worked (0: this one alone).
    verified : str or None
        What was checked of the new model; None where there was nothing to do.
    notes : tuple of str
        What else was done or is to be known.
    seconds : float
    """

    name: str
    head: str
    output: Output
    mode: Mode
    moved: list[Moved]
    left: list[Left]
    statistics: dict[str, BatchStats]
    samples: int
    partitions: int
    depth: int
    workers: int
    unbiased: bool
    momentum: float | None
    verified: str | None
    notes: tuple[str, ...]
    seconds: float

    def _made(self) -> Output:
        return self.output

    def to_dict(self) -> ReestimationReport:
        """Return everything but the model as data that JSON holds; "schema" is its version."""
        return {
            "schema": SCHEMA,
            "model": self.name,
            "mode": self.mode,
            "depth": self.depth,
            "samples": self.samples,
            "partitions": self.partitions,
            "workers": self.workers,
            "unbiased": self.unbiased,
            "momentum": self.momentum,
            "verified": self.verified,
            "moved": [each.to_dict() for each in self.moved],
            "left": [dict(dataclasses.asdict(each)) for each in self.left],
            "notes": list(self.notes),
            "seconds": self.seconds,
        }

    def lines(self) -> list[str]:
        """Return the report as lines of text, the first about the model."""
        rows = [
            [
                "  moved",
                each.bn,
                f"{each.channels} channels" if each.channels > 1 else "1 channel",
                f"by {each.distance:.2g} std in channel {each.channel}",
                f"mean {each.mean_shift:+.2g} std, std x {each.std_ratio:.2g}",
                f"typically {each.typical:.2g}",
            ]
            for each in self.moved
        ]
        kept = [f"  left    {each.bn}  {each.reason}   [{each.code}]" for each in self.left]
        lines = [self.head, *table(rows), *kept, *(f"  note    {note}" for note in self.notes)]
        if not self.moved:
            return [*lines, "nothing to do: no batch normalization has statistics that can be replaced"]
        who = {0: "in this process", 1: "by 1 worker"}.get(self.workers, f"by {self.workers} workers")
        lines.append(
            f"{len(self.moved)} of {len(self.moved) + len(self.left)} BatchNormalization re-estimated ({self.mode}), {self._extent(who)}"
        )
        lines.append(f"fit     {self.fit}")
        lines.append(f"verified  {self.verified}")
        return lines

    def _extent(self, who: str) -> str:
        numbers = ((self.depth, "level"), (self.samples, "sample"), (self.partitions, "partition"))
        levels, samples, partitions = (f"{number} {word}{'s' if number > 1 else ''}" for number, word in numbers)
        return f"{levels}, {samples} in {partitions} {who}, {self.seconds:.1f} s"

    @property
    def fit(self) -> str:
        """What the batch normalization that moved farthest says about the data, as a sentence."""
        worst = self.moved[0]
        if worst.distance <= FAR:
            return f"the data are like those behind the old statistics: no channel moved by more than {worst.distance:.2g} std"
        far = sum(each.distance > FAR for each in self.moved)
        first = min((each for each in self.moved if each.distance > FAR), key=lambda each: each.level)
        what = f"{far} of {len(self.moved)} moved by more than {FAR:g} std, on the way of the data first '{first.bn}'"
        return f"{what}: other weights, another domain or another preprocessing than before"

    def save_report(self, path: str | os.PathLike[str]) -> None:
        """Write the HTML report, one file that needs no other; raises FastbnError without jinja2."""
        with atomic(path, self.page()):
            pass

    def page(self, command: str = "") -> str:
        """Return that report; command is the call that it names."""
        return render(self, FAR, command)

    def __str__(self) -> str:
        return "\n".join(wrapped(self.lines()))

    def __repr__(self) -> str:
        worst = f", worst {self.moved[0].distance:.2g} std" if self.moved else ""
        return f"<Reestimation {Path(self.name).name!r}: {len(self.moved)} of {len(self.moved) + len(self.left)} BatchNormalization{worst}>"


def head_of(name: str, opset: int, nodes: int, norms: int, size: int) -> str:
    """Return the first line of a report."""
    return f"{Path(name).name}   opset {opset}, {nodes} nodes, {norms} BatchNormalization, {size_text(size)}"
