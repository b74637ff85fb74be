"""What folding and comparing say, as data: Fold, Kept, Parity."""

from dataclasses import asdict, dataclass, field

__all__ = ["SCHEMA", "Fold", "Kept", "Parity", "fold_dict", "json_number", "kept_dict"]

# Version of the JSON report: it grows when a field changes its meaning or leaves, not when one is added.
SCHEMA = 1


@dataclass(frozen=True)
class Fold:
    """One fold. error and bound are those of the worst element of its site; None where the site was not run (note says why)."""

    bn: str
    ops: tuple
    into: str
    op: str
    channels: int
    error: float | None = None
    bound: float | None = None
    note: str | None = None


@dataclass(frozen=True)
class Kept:
    """One BatchNormalization, or one that was decomposed into Mul and Add, that stays."""

    bn: str
    ops: tuple
    code: str
    reason: str


@dataclass(frozen=True)
class Parity:
    """Two models compared on the same inputs, onnxruntime's optimiser off on both sides.

    status is "ok", "failed", "inconclusive" (what rounding may change is so large that nothing is proven) or "not-run". The worst element
    is the one whose error is the largest part of what is allowed; index is its place in output, values are (original, folded). compared
    holds the names of the outputs, and of values on the way, that were compared within a bound that proves something.
    """

    status: str
    inputs: int = 0
    output: str | None = None
    index: tuple = ()
    values: tuple = ()
    error: float | None = None
    allowed: float | None = None
    reason: str | None = None
    notes: tuple[str, ...] = field(default=())
    compared: tuple[str, ...] = field(default=())
    missed: tuple[str, ...] = field(default=())

    @property
    def ok(self) -> bool:
        """Say whether the models agree, and that was proven."""
        return self.status == "ok"

    def __str__(self):
        if self.status == "not-run":
            return f"not run: {self.reason}"
        if self.error is None:
            return f"failed: {self.reason}" if self.reason else self.status
        place = ",".join(map(str, self.index))
        before, after = (f"{value:.5g}" for value in self.values)
        text = (
            f"{self.inputs} inputs, optimiser off on both sides: worst {self.error:.2g} at {self.output}[{place}]"
            f" ({before} / {after}), allowed {self.allowed:.2g}   {self.status}"
        )
        return text + (f": {self.reason}" if self.reason else "")

    def to_dict(self):
        """Return the fields as JSON holds them."""
        fields = asdict(self)
        fields["values"] = [json_number(value) for value in self.values]
        fields["error"], fields["allowed"] = json_number(self.error), json_number(self.allowed)
        return fields


def fold_dict(fold):
    """Return a Fold as JSON holds it."""
    return {**asdict(fold), "error": json_number(fold.error), "bound": json_number(fold.bound)}


def kept_dict(kept):
    """Return a Kept as JSON holds it."""
    return asdict(kept)


def json_number(value):
    """Return a float that JSON can hold: Inf and NaN become their names."""
    if value is None:
        return None
    value = float(value)
    return value if value - value == 0 else repr(value)
