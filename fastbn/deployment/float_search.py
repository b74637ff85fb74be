"""Which few nodes to leave in float where int8 loses too much: those whose quantization alone spoils the outputs most, worst SQNR first."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from fastbn.deployment.quantize import Made, QuantizerRefused
from fastbn.deployment.result import Stage
from fastbn.deployment.trade_off import TradeOff
from fastbn.graph.runtime import runtime_errors

__all__ = ["FloatSearch"]

# The part of the time limit that ranking the nodes may take: what is not ranked then stays quantized.
RANKING = 0.5


class FloatSearch:
    """The search for the nodes to leave in float.

    Parameters
    ----------
    quantize : callable
        (path to write, names of the nodes to quantize or none for all, names of the nodes to leave in float) -> Made, or QuantizerRefused.
    compare : callable
        Path of a model -> Stage with its drop and its agreements.
    cost : callable
        Path of a model -> (bytes, median milliseconds or None).
    folder : Path
        Where models are written.
    seconds : float
        What the search may take.
    progress : callable of str
    """

    def __init__(
        self,
        quantize: Callable[[Path, Sequence[str], Sequence[str]], Made],
        compare: Callable[[Path], Stage],
        cost: Callable[[Path], tuple[int, float | None]],
        folder: Path,
        seconds: float,
        progress: Callable[[str], None],
    ) -> None:
        self.quantize = quantize
        self.compare = compare
        self.cost = cost
        self.folder = folder
        self.progress = progress
        self.failures: tuple[type[Exception], ...] = (QuantizerRefused, *runtime_errors())
        self.began = time.monotonic()
        self.seconds = seconds

    def point(self, path: Path, left: tuple[str, ...]) -> TradeOff:
        """Return the point of the curve that a model is."""
        stage = self.compare(path)
        size, milliseconds = self.cost(path)
        worst = stage.worst
        return TradeOff(left, stage.drop, None if worst is None else worst.relative, size, milliseconds)

    def run(self, path: Path, nodes: Sequence[str], most: int, max_drop: float) -> tuple[Path, tuple[TradeOff, ...]]:
        """Leave one node after the other in float until a model loses at most max_drop.

        Returns
        -------
        path : Path
            The first model that loses no more, or `path` where none does.
        curve : tuple of TradeOff
            Of the model at `path`, and of each that was tried.
        """
        curve = [self.point(path, ())]
        if curve[0].drop is None or curve[0].drop <= max_drop:
            return path, tuple(curve)
        left: tuple[str, ...] = ()
        for node in self._ranked(nodes)[:most]:
            if self._is_over(1):
                break
            left = (*left, node)
            self.progress(f"{len(left)} of at most {most} nodes left in float: {node}")
            target = self.folder / f"left-{len(left)}.onnx"
            try:
                self.quantize(target, (), left)
                curve.append(self.point(target, left))
            except self.failures:
                continue
            drop = curve[-1].drop
            if drop is not None and drop <= max_drop:
                return target, tuple(curve)
        return path, tuple(curve)

    def _ranked(self, nodes: Sequence[str]) -> list[str]:
        """Return the nodes by the error of the outputs where each alone is quantized, the largest first."""
        errors: dict[str, float] = {}
        target = self.folder / "alone.onnx"
        for number, node in enumerate(nodes):
            if self._is_over(RANKING):
                break
            self.progress(f"what quantizing one node alone costs, {number + 1} of {len(nodes)}: {node}")
            try:
                self.quantize(target, (node,), ())
                worst = self.compare(target).worst
            except self.failures:
                continue
            if worst is not None and worst.relative is not None and worst.relative > 0:
                errors[node] = worst.relative
        return sorted(errors, key=lambda node: -errors[node])

    def _is_over(self, part: float) -> bool:
        return time.monotonic() - self.began > part * self.seconds
