"""FoldResult: what folding made of a model, as a model, as files, as data and as text."""

from pathlib import Path

from fastbn.errors import ParityError, expected
from fastbn.graph import report
from fastbn.graph.model.nesting import is_standard, scopes_of
from fastbn.graph.model.storage import external_tensors
from fastbn.graph.ops.lift import BATCH_NORM
from fastbn.graph.results import SCHEMA, fold_dict, kept_dict
from fastbn.graph.rewrite.writer import raises_ir_version

__all__ = ["FoldResult"]


class FoldResult:
    """What folding made of a model.

    Attributes
    ----------
    folded : list of Fold
        bn, ops, into, op, channels, error, bound, note.
    kept : list of Kept
        bn, ops, code, reason.
    parity : Parity or None
        The whole model compared with its original; None with verify=False or when nothing was folded.
    notes : tuple of str
        What else was done to the model.
    index : model.Index
        Of the model as it was planned.
    planning : plan.Planning
        Its plans, one for each of folded, node by node.
    """

    def __init__(self, source, index, output, planning, folded, parity):
        self._source = source
        self.index = index
        self._output = output
        self.planning = planning
        self.folded = folded
        self.kept = planning.kept
        self.parity = parity
        raised = ("the IR version is raised to 4, from which on a constant need not be a graph input",) if raises_ir_version(index) else ()
        self.notes = (*index.source.notes, *raised)

    @property
    def model(self):
        """The folded onnx.ModelProto with all tensors inside; above 2 GB use save."""
        return self._output.to_proto()

    def to_bytes(self):
        """Return the folded model as bytes with all tensors inside; a model in which nothing changed comes back byte for byte."""
        return self._output.to_bytes()

    def save(self, path):
        """Write the folded model, and data files beside it if it had any, all or nothing; return their paths, the model's first.

        Raises
        ------
        ParityError
            The folded model differs from its original by more than rounding explains.
        StorageError
            A file cannot be written.
        """
        with self.prepared(path) as prepared:
            pass
        return prepared.paths

    def prepared(self, path):
        """Return a context in which the files of `save` are written under other names; they take their places when it ends well."""
        if self.parity is not None and self.parity.status == "failed":
            raise ParityError(expected("parity with the original", str(self.parity), "fold"))
        return self._output.prepared(path)

    def to_dict(self):
        """Return everything as data that JSON holds; "schema" is its version."""
        before, after = _counts(self._source.proto), _counts(self._output.proto)
        return {
            "schema": SCHEMA,
            "model": self.index.source.name,
            "opset": self.index.opset,
            "ir_version": self.index.proto.ir_version,
            "nodes": {"before": before[0], "after": after[0]},
            "batch_normalizations": {"before": before[1], "after": after[1]},
            "folded": [fold_dict(fold) for fold in self.folded],
            "kept": [kept_dict(kept) for kept in self.kept],
            "notes": list(self.notes),
            "parity": None if self.parity is None else self.parity.to_dict(),
        }

    def lines(self):
        """Return the report as lines of text, the first about the model as it came."""
        before, after = _counts(self._source.proto), _counts(self._output.proto)
        source = self._source
        size = report.size_text(source.size(external_tensors(source.proto)))
        head = f"{Path(source.name).name}   opset {self.index.opset}, {before[0]} nodes, {before[1]} BatchNormalization, {size}"
        lines = [head, *report.result_rows(self.folded, self.kept)]
        lines.extend(f"  note    {note}" for note in self.notes)
        lines.append(f"BatchNormalization {before[1]} -> {after[1]}, nodes {before[0]} -> {after[0]}")
        if self.parity is not None:
            lines.append(f"parity  {self.parity}")
            lines.extend(f"        {note}" for note in self.parity.notes)
        return lines

    def __str__(self):
        return "\n".join(report.wrapped(self.lines()))


def _counts(proto):
    """Return (nodes, batch normalizations) of a model, those in subgraphs and functions included."""
    nodes = [node for graph in scopes_of(proto.graph) for node in graph.node]
    nodes += [node for function in proto.functions for node in function.node]
    return len(nodes), sum(node.op_type == BATCH_NORM and is_standard(node.domain) for node in nodes)
