"""How a model is quantized: types, scales per channel or per tensor, how ranges follow from samples, and which nodes stay in float."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self, TypeAlias, TypedDict

from fastbn.errors import ArgumentError, ArgumentTypeError, expected
from fastbn.graph.reasons import first_few

__all__ = ["CALIBRATIONS", "WEIGHT_TYPES", "Calibration", "Recipe", "RecipeFields", "WeightType", "checked_choice"]

Calibration: TypeAlias = Literal["minmax", "entropy", "percentile"]
WeightType: TypeAlias = Literal["auto", "int8", "uint8", "int7"]

# How the range of an activation follows from its values, and onnxruntime's name for that.
CALIBRATIONS: dict[Calibration, str] = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}

# Types of quantized weights; int7 is int8 in -64 to 63.
WEIGHT_TYPES: tuple[WeightType, ...] = ("auto", "int8", "uint8", "int7")


class RecipeFields(TypedDict):
    """A Recipe as JSON holds it."""

    activations: str
    weights: str
    reduce_range: bool
    per_channel: bool
    calibration: Calibration
    exclude: list[str]


@dataclass(frozen=True)
class Recipe:
    """What the quantizer is asked for.

    Attributes
    ----------
    activations, weights : str
        QInt8 or QUInt8, as onnxruntime.quantization.QuantType has them.
    reduce_range : bool
        Weights have 7 bits: the kernels of x86 without VNNI add pairs of products of 8 bits in 16, which saturate.
    per_channel : bool
        A scale for each output channel of a weight, instead of one.
    calibration : str
        One of CALIBRATIONS.
    exclude : tuple of str
        Globs over the names of nodes that stay in float.
    """

    activations: str
    weights: str
    reduce_range: bool
    per_channel: bool = True
    calibration: Calibration = "minmax"
    exclude: tuple[str, ...] = ()

    @classmethod
    def here(
        cls, weight_type: WeightType = "auto", per_tensor: bool = False, calibration: Calibration = "minmax", exclude: Sequence[str] = ()
    ) -> Self:
        """Return the recipe for this machine, after onnxruntime's own advice for CPUs: 7-bit weights on x86 without VNNI, symmetric
        activations on ARM; a weight type other than "auto" is taken as it is."""
        weights = "QUInt8" if weight_type == "uint8" else "QInt8"
        # onnxruntime has no kernels of signed activations and unsigned weights.
        activations = "QInt8" if _is_arm() and weights == "QInt8" else "QUInt8"
        reduce_range = weight_type == "int7" or (weight_type == "auto" and _saturates())
        return cls(activations, weights, reduce_range, not per_tensor, calibration, tuple(exclude))

    @classmethod
    def of(cls, fields: RecipeFields) -> Self:
        """Return the recipe that `to_dict` has made fields of."""
        types = fields["activations"], fields["weights"]
        return cls(*types, fields["reduce_range"], fields["per_channel"], fields["calibration"], tuple(fields["exclude"]))

    def to_dict(self) -> RecipeFields:
        """Return the fields as JSON holds them."""
        return {
            "activations": self.activations,
            "weights": self.weights,
            "reduce_range": self.reduce_range,
            "per_channel": self.per_channel,
            "calibration": self.calibration,
            "exclude": list(self.exclude),
        }

    def __str__(self) -> str:
        bits = ", weights in 7 bits" if self.reduce_range else ""
        if _saturates():
            bits += ": this CPU has no VNNI" if bits else ", whose sums saturate on this CPU without VNNI"
        scales = "channel" if self.per_channel else "tensor"
        types = f"{self.activations[1:]} activations, {self.weights[1:]} weights"
        left = f", {first_few([repr(glob) for glob in self.exclude])} in float" if self.exclude else ""
        return f"QDQ, per {scales}, {types}{bits}, {CALIBRATIONS[self.calibration]}{left}"


def checked_choice(value: object, choices: Sequence[str], where: str) -> None:
    """Raise ArgumentError where a value is none of some words."""
    if not isinstance(value, str):
        raise ArgumentTypeError(expected(" or ".join(choices), type(value).__name__, where))
    if value not in choices:
        raise ArgumentError(expected(" or ".join(choices), repr(value), where))


def _is_arm() -> bool:
    return platform.machine().lower() in ("aarch64", "arm64")


def _saturates() -> bool:
    return not _is_arm() and not _has_vnni()


def _has_vnni() -> bool:
    try:
        return "vnni" in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
