"""FoldResult: what folding made of a model, as a model, as files, as data and as text."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from fastbn.errors import ParityError
from fastbn.graph import report
from fastbn.graph.model.index import Index
from fastbn.graph.model.nesting import scopes_of
from fastbn.graph.model.storage import Source
from fastbn.graph.notebook import frame_of, result_html
from fastbn.graph.ops.normalization import BATCH_NORM, node_counts
from fastbn.graph.planner.planning import Planning
from fastbn.graph.results import SCHEMA, Explanation, Fold, FoldReport, InferenceDict, Kept, Parity, Rewritten
from fastbn.graph.rewrite.output import ModelResult, Output, Prepared
from fastbn.graph.rewrite.writer import raises_ir_version

if TYPE_CHECKING:
    import pandas

__all__ = ["FoldResult", "output_of", "planning_of"]


class FoldResult(ModelResult):
    """What `fold` returns: the folded model, and what was folded, what stayed and what was verified.

    Attributes
    ----------
    folded : list of Fold
        bn, ops, into, op, channels, error, bound, note; in the order of the graph.
    kept : list of Kept
        bn, ops, code, reason, not_rewritten; in the order of the graph.
    rewritten : list of Rewritten
        What was not folded and has become another operator (rewrite_left): bn, op, channels, error, bound, note, code, reason.
    explanations : list of Explanation
        bn, outcome, steps: the search for a place for each node that `explain` names.
    parity : Parity or None
        The whole model compared with its original; None with verify=False or when nothing was folded.
    notes : tuple of str
        What else was done to the model.

    Examples
    --------
    >>> import fastbn, onnx
    >>> nodes = "{ c = Conv (x, w) y = BatchNormalization <epsilon: float = 0.0> (c, s, s, m, v) }"
    >>> weights = "<float[1, 1, 1] w = {2}, float[1] s = {1}, float[1] m = {3}, float[1] v = {4}>"
    >>> head = '<ir_version: 8, opset_import: ["" : 17]>'
    >>> model = onnx.parser.parse_model(f"{head} tiny (float[1, 1, 3] x) => (float[1, 1, 3] y) {weights} {nodes}")
    >>> result = fastbn.fold(model)
    >>> result
    <FoldResult 'model': 1 of 1 BatchNormalization folded, parity ok>
    >>> result.folded[0].bn, result.folded[0].into, result.kept
    ('y', 'c', [])
    >>> [node.op_type for node in result.model.graph.node]
    ['Conv']
    >>> result.to_dict()["batch_normalizations"]
    {'before': 1, 'after': 0}
    """

    def __init__(
        self,
        source: Source,
        index: Index,
        output: Output,
        after: tuple[int, int],
        planning: Planning,
        folded: list[Fold],
        rewritten: list[Rewritten],
        parity: Parity | None,
    ) -> None:
        self._source = source
        self._index = index
        self._output = output
        self._after = after
        self._planning = planning
        self.folded: list[Fold] = folded
        self.kept: list[Kept] = planning.kept
        self.rewritten: list[Rewritten] = rewritten
        self.explanations: list[Explanation] = planning.explanations
        self.parity: Parity | None = parity
        raised = ("the IR version is raised to 4, from which on a constant need not be a graph input",) if raises_ir_version(index) else ()
        self.notes: tuple[str, ...] = (*index.source.notes, *raised)

    @cached_property
    def _before(self) -> tuple[int, int]:
        """Nodes and batch normalizations of the original."""
        proto = self._source.proto
        if proto is self._index.proto:
            return node_counts(((node.domain, node.op) for node in self._index.order), proto.functions)
        return node_counts(((node.domain, node.op_type) for graph in scopes_of(proto.graph) for node in graph.node), proto.functions)

    def _made(self) -> Output:
        return self._output

    def prepared(self, path: str | os.PathLike[str]) -> AbstractContextManager[Prepared]:
        """Return a context in which the files of `save` are written under other names; they are renamed when it ends without an error."""
        return output_of(self).prepared(path)

    def to_dict(self) -> FoldReport:
        """Return everything as data that JSON holds; "schema" is its version."""
        before, after = self._before, self._after
        return {
            "schema": SCHEMA,
            "model": self._index.source.name,
            "opset": self._index.opset,
            "ir_version": self._index.proto.ir_version,
            "nodes": {"before": before[0], "after": after[0]},
            "batch_normalizations": {"before": before[1], "after": after[1]},
            "folded": [fold.to_dict() for fold in self.folded],
            "kept": [kept.to_dict() for kept in self.kept],
            "rewritten": [each.to_dict() for each in self.rewritten],
            "inference": self._inference(),
            "notes": list(self.notes),
            "explanations": [explanation.to_dict() for explanation in self.explanations],
            "parity": None if self.parity is None else self.parity.to_dict(),
        }

    def _inference(self) -> InferenceDict | None:
        form = self._source.inference
        if form is None:
            return None
        return {"changed": form.changed, "left": [{"node": name, "reason": reason} for name, reason in form.left]}

    def lines(self) -> list[str]:
        """Return the report as lines of text, the first about the original."""
        before, after = self._before, self._after
        source = self._source
        size = report.size_text(source.size())
        head = f"{Path(source.name).name}   opset {self._index.opset}, {before[0]} nodes, {before[1]} BatchNormalization, {size}"
        rows = report.result_rows(self.folded, self.kept, self.rewritten)
        lines = [head, *rows, *report.explanation_rows(self.explanations)]
        lines.extend(f"  note    {note}" for note in self.notes)
        rewritten = f" ({len(self.rewritten)} rewritten)" if self.rewritten else ""
        lines.append(f"BatchNormalization {before[1]} -> {after[1]}{rewritten}, nodes {before[0]} -> {after[0]}")
        return [*lines, *report.parity_rows(self.parity)]

    def to_dataframe(self) -> pandas.DataFrame:
        """Return one row for each batch normalization: bn, outcome ("folded", "kept" or "rewritten"), ops, into, op, channels, error,
        bound, code, reason, note.

        Raises
        ------
        FastbnError
            pandas is not installed.
        """
        return frame_of(self.folded, self.kept, self.rewritten)

    def __str__(self) -> str:
        return "\n".join(report.wrapped(self.lines()))

    def _repr_html_(self) -> str:
        return result_html(self.lines(), self._planning)

    def __repr__(self) -> str:
        folded, kept = (sum(each.ops.count(BATCH_NORM) for each in entries) for entries in (self.folded, self.kept))
        verified = "not verified" if self.parity is None else f"parity {self.parity.status}"
        name = Path(self._source.name).name
        rewritten = f", {len(self.rewritten)} rewritten" if self.rewritten else ""
        count = folded + kept + len(self.rewritten)
        return f"<FoldResult {name!r}: {folded} of {count} BatchNormalization folded{rewritten}, {verified}>"


def planning_of(result: FoldResult) -> Planning:
    """Return the planning of a result, whose `folds` are one for each of `folded` in the same order: for the package, not for users."""
    return result._planning


def output_of(result: FoldResult) -> Output:
    """Return the Output of a result that may be saved, raising ParityError for another: for the package, not for users."""
    if result.parity is not None and result.parity.status == "failed":
        raise ParityError(f"Cannot save the folded model: it differs from the original: {result.parity}")
    return result._output
