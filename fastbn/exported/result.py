"""ModelFold: what folding made of a model of a framework, as that framework's model, as data and as text."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Generic, TypedDict, TypeVar

from fastbn.graph import report
from fastbn.graph.notebook import frame_of, lines_html
from fastbn.graph.ops.normalization import BATCH_NORM
from fastbn.graph.results import SCHEMA, Change, Fold, FoldDict, Kept, KeptDict, Parity, ParityDict

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import pandas

__all__ = ["ModelFold", "ModelFoldReport", "layer_of", "named"]

ModelT = TypeVar("ModelT")


class ModelFoldReport(TypedDict):
    """The JSON report of a ModelFold."""

    schema: int
    framework: str
    batch_normalizations: Change
    folded: list[FoldDict]
    kept: list[KeptDict]
    parity: ParityDict | None


@dataclass(frozen=True, repr=False)
class ModelFold(Generic[ModelT]):
    """What `fastbn.torch.fold` and `fastbn.keras.fold` return: the folded model, what was folded, what stayed and why, what was verified.

    Attributes
    ----------
    model : torch.nn.Module or keras.Model
        The folded copy, with nothing of ours in it where no addition or zeros had to stay (a note of its fold says so).
    folded : list of Fold
        bn, ops, into, op, channels, error, bound, note: names of modules or layers, in the order of the graph.
    kept : list of Kept
        bn, ops, code, reason; the codes are those of docs/reasons.md.
    parity : Parity or None
        The copy compared with the original in the framework itself; None with verify=False or where nothing was folded.
    framework : str
        "torch" or "keras".
    """

    model: ModelT
    folded: list[Fold]
    kept: list[Kept]
    parity: Parity | None
    framework: str

    @property
    def _counts(self) -> tuple[int, int]:
        """Batch normalizations before and after."""
        folded, kept = (sum(each.ops.count(BATCH_NORM) for each in entries) for entries in (self.folded, self.kept))
        return folded + kept, kept

    def to_dict(self) -> ModelFoldReport:
        """Return everything but the model as data that JSON holds; "schema" is its version."""
        before, after = self._counts
        return {
            "schema": SCHEMA,
            "framework": self.framework,
            "batch_normalizations": {"before": before, "after": after},
            "folded": [fold.to_dict() for fold in self.folded],
            "kept": [kept.to_dict() for kept in self.kept],
            "parity": None if self.parity is None else self.parity.to_dict(),
        }

    def lines(self) -> list[str]:
        """Return the report as lines of text."""
        before, after = self._counts
        lines = [*report.result_rows(self.folded, self.kept, []), f"BatchNormalization {before} -> {after}"]
        return [*lines, *report.parity_rows(self.parity)]

    def to_dataframe(self) -> pandas.DataFrame:
        """Return one row for each batch normalization, as `FoldResult.to_dataframe` does; a FastbnError where pandas is not installed."""
        return frame_of(self.folded, self.kept)

    def __str__(self) -> str:
        return "\n".join(report.wrapped(self.lines()))

    def _repr_html_(self) -> str:
        return lines_html(self.lines())

    def __repr__(self) -> str:
        before, after = self._counts
        verified = "not verified" if self.parity is None else f"parity {self.parity.status}"
        return f"<ModelFold of {self.framework}: {before - after} of {before} BatchNormalization folded, {verified}>"


def named(fold: Fold, class_of: Callable[[str], str], notes: Sequence[str]) -> Fold:
    """Return a Fold whose absorbers are layers, of which the nodes of one count once; class_of gives the class of a layer by its name."""
    layers = {name: class_of(name) for name in map(layer_of, fold.into.split("+"))}
    own = [] if fold.note is None else [fold.note.replace("an Add keeps", "an addition keeps")]
    said = "; ".join([*own, *notes])
    return replace(fold, into="+".join(layers), op="+".join(layers.values()), note=said or None)


def layer_of(node: str) -> str:
    """Return the layer of a node, whose name is that of the layer or begins with it and a slash."""
    return node.split("/")[0] or node
