"""What a few nodes in float cost and gain: the points of a trade-off curve, as data and as lines of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

from fastbn.graph.report import size_text, table
from fastbn.graph.results import json_number

__all__ = ["TradeOff", "TradeOffFields", "trade_off_lines"]


class TradeOffFields(TypedDict):
    """A TradeOff as JSON holds it."""

    left: list[str]
    drop: float | str | None
    relative: float | str | None
    bytes: int
    median_ms: float | None


@dataclass(frozen=True)
class TradeOff:
    """One point of the curve: the nodes left in float, what the outputs lose, and what the model costs.

    drop is the loss by the metric of the deployment, relative that of the worst output; size is in bytes, median_ms on one thread.
    """

    left: tuple[str, ...]
    drop: float | None
    relative: float | None
    size: int
    median_ms: float | None

    def to_dict(self) -> TradeOffFields:
        """Return the fields as JSON holds them."""
        return {
            "left": [*self.left],
            "drop": json_number(self.drop),
            "relative": json_number(self.relative),
            "bytes": self.size,
            "median_ms": self.median_ms,
        }


def trade_off_lines(curve: Sequence[TradeOff]) -> list[str]:
    """Return the curve as lines of a table, the node that each point adds in its row; none for no curve."""
    rows = [["  in float", "drop", "relative", "size", "ms, 1 thread", "node"]]
    for point in curve:
        drop = "-" if point.drop is None else f"{point.drop:.2g}"
        relative = "-" if point.relative is None else f"{point.relative:.2g}"
        milliseconds = "-" if point.median_ms is None else f"{point.median_ms:.3f}"
        rows.append([f"  {len(point.left)}", drop, relative, size_text(point.size), milliseconds, point.left[-1] if point.left else "-"])
    return table(rows) if curve else []
