"""Whether int8 loses less with layers equalized, tried on inputs that calibrate nothing: the trial as data, and as a line of text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

from fastbn.graph.results import json_number

__all__ = ["EqualizationTrial", "EqualizationTrialFields"]


class EqualizationTrialFields(TypedDict):
    """An EqualizationTrial as JSON holds it."""

    kept: bool
    layers: int
    inputs: str
    loss: float | str | None
    loss_without: float | str | None
    refused: str | None


@dataclass(frozen=True)
class EqualizationTrial:
    """What int8 loses with layers equalized and without, on inputs that have calibrated neither.

    Equalized layers are kept only where they lose less: as folded, the weights are those that the fold was verified with.

    Attributes
    ----------
    layers : int
        How many layers were equalized.
    inputs : str
        What both were run on.
    loss, loss_without : float or None
        The relative error of the worst output with them equalized, and as folded; None where it is not known.
    refused : str or None
        Why one of them is not known.
    """

    layers: int
    inputs: str
    loss: float | None = None
    loss_without: float | None = None
    refused: str | None = None

    @property
    def kept(self) -> bool:
        """Whether the quantized model is the one with equalized layers."""
        return self.loss is not None and self.loss_without is not None and self.loss < self.loss_without

    def to_dict(self) -> EqualizationTrialFields:
        """Return the fields as JSON holds them."""
        return {
            "kept": self.kept,
            "layers": self.layers,
            "inputs": self.inputs,
            "loss": json_number(self.loss),
            "loss_without": json_number(self.loss_without),
            "refused": self.refused,
        }

    def __str__(self) -> str:
        layers = f"{self.layers} layers" if self.layers != 1 else "1 layer"
        if self.refused is not None:
            return f"channels of {layers} not equalized: {self.refused}"
        losses = f"a relative error of {_text(self.loss)}, without {_text(self.loss_without)}, on {self.inputs}"
        if self.kept:
            return f"channels of {layers} equalized with the layers behind: {losses}"
        return f"channels of {layers} not equalized, for that loses no less: {losses}"


def _text(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.2g}"
