"""The main job: load, plan, verify each site, write, verify the whole."""

import os
from pathlib import Path

from onnx.inliner import inline_selected_functions

from fastbn.errors import ArgumentError, ArgumentTypeError, ParityError, expected
from fastbn.graph import report, storage
from fastbn.graph.lift import BATCH_NORM, is_batch_norm
from fastbn.graph.model import Index, is_standard, scopes_of
from fastbn.graph.plan import plan
from fastbn.graph.report import Fold
from fastbn.graph.rewrite import external_tensors, rewrite
from fastbn.graph.verify import Runnable, check_model, check_site

__all__ = ["FoldResult", "fold", "fold_watched", "verify", "verify_watched"]


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
    """

    def __init__(self, source, index, output, folded, kept, parity):
        self._source = source
        self._index = index
        self._output = output
        self.folded = folded
        self.kept = kept
        self.parity = parity
        self.notes = index.source.notes

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
        if self.parity is not None and self.parity.status == "failed":
            raise ParityError(expected("parity with the original", str(self.parity), "fold"))
        return [Path(path), *self._output.save(path).values()]

    def to_dict(self):
        """Return everything as data that JSON holds; "schema" is its version."""
        before, after = _counts(self._source.proto), _counts(self._output.proto)
        return {
            "schema": report.SCHEMA,
            "model": self._index.source.name,
            "opset": self._index.opset,
            "ir_version": self._index.proto.ir_version,
            "nodes": {"before": before[0], "after": after[0]},
            "batch_normalizations": {"before": before[1], "after": after[1]},
            "folded": [report.fold_dict(fold) for fold in self.folded],
            "kept": [report.kept_dict(kept) for kept in self.kept],
            "notes": list(self.notes),
            "parity": None if self.parity is None else self.parity.to_dict(),
        }

    def lines(self):
        """Return the report as lines of text, the first about the model as it came."""
        before, after = _counts(self._source.proto), _counts(self._output.proto)
        source = self._source
        size = report.size_text(source.size(external_tensors(source.proto)))
        head = f"{Path(source.name).name}   opset {self._index.opset}, {before[0]} nodes, {before[1]} BatchNormalization, {size}"
        lines = [head, *report.result_rows(self.folded, self.kept)]
        lines.extend(f"  note    {note}" for note in self.notes)
        lines.append(f"BatchNormalization {before[1]} -> {after[1]}, nodes {before[0]} -> {after[0]}")
        if self.parity is not None:
            lines.append(f"parity  {self.parity}")
            lines.extend(f"        {note}" for note in self.parity.notes)
        return lines

    def __str__(self):
        return "\n".join(self.lines())


def fold(model, *, only=None, skip=None, verify=True, input_shapes=None, freeze_inputs=False, seed=0):
    """Fold every inference batch normalization that can be folded exactly into its neighbours' weights.

    Parameters
    ----------
    model : str, os.PathLike, bytes or onnx.ModelProto
        The model; it is not changed.
    only, skip : str or sequence of str, optional
        Globs over node names: fold only these, never those.
    verify : bool
        Run every fold and the whole model in onnxruntime, its optimiser off, against the original.
    input_shapes : dict of name -> sequence of int, optional
        Sizes of graph inputs that the model leaves open.
    freeze_inputs : bool
        Make constants of initializers that are also graph inputs; they leave the model's inputs.
    seed : int
        Of the random inputs of the verification.

    Returns
    -------
    FoldResult

    Raises
    ------
    StorageError
        A file cannot be read.
    ModelError
        The model is malformed.
    ArgumentError, ArgumentTypeError
        An option cannot be used.

    Examples
    --------
    >>> import fastbn  # doctest: +SKIP
    >>> result = fastbn.fold("resnet.onnx")  # doctest: +SKIP
    >>> result.save("resnet.folded.onnx")  # doctest: +SKIP
    """
    return fold_watched(model, only, skip, verify, input_shapes, freeze_inputs, seed)


def fold_watched(model, only, skip, verify, input_shapes, freeze_inputs, seed=0, progress=None, stage=None):
    """Do what `fold` does; tell `progress`, a callable of str, what is being verified, and stage the files of a model with external data in
    the folder `stage` while it is verified (a temporary one without it)."""
    only, skip = _globs(only, "only"), _globs(skip, "skip")
    input_shapes = _shapes(input_shapes)
    source = storage.load(model)
    for candidate in _with_and_without_functions(source):
        index = Index(candidate, freeze_inputs, input_shapes)
        _check_globs(index, only, skip)
        planning, checks = _plan_verified(index, only, skip, verify, seed, progress)
        if planning.plans:
            break
    output = rewrite(index, planning)
    parity = None
    if verify and planning.plans:
        parity = _whole_parity(source, index, output, input_shapes, seed, progress, stage)
    folded = [_fold_of(plan, checks.get(_key(plan)), output) for plan in planning.plans]
    return FoldResult(source, index, output, folded, planning.kept, parity)


def _with_and_without_functions(source):
    """Yield the Source with the model-local functions that hold a batch normalization inlined, then as it came.

    A function that several calls share has parameters of its own only where it is called; what is inlined in vain is not kept.
    """
    holders = [
        (function.domain, function.name)
        for function in source.proto.functions
        if any(node.op_type == BATCH_NORM and is_standard(node.domain) for node in function.node)
    ]
    if holders:
        try:
            inlined = inline_selected_functions(source.proto, holders)
        except Exception:  # the inliner raises many kinds on odd models: then the functions stay, with their reason
            pass
        else:
            candidate = storage.Source(inlined, source.path, source.name)
            candidate.notes = tuple(f"model-local function '{name}' inlined" for _, name in holders)
            yield candidate
    yield source


def verify(original, folded, *, input_shapes=None, seed=0):
    """Compare two models on the same inputs, onnxruntime's optimiser off on both sides.

    Parameters
    ----------
    original, folded : str, os.PathLike, bytes or onnx.ModelProto
    input_shapes, seed
        As in `fold`.

    Returns
    -------
    Parity
        status is "ok", "failed" or "not-run"; the worst element with its index, both values and what is allowed.

    Raises
    ------
    StorageError, ModelError
        As in `fold`.
    """
    return verify_watched(original, folded, input_shapes, seed)


def verify_watched(original, folded, input_shapes, seed=0, progress=None):
    """Do what `verify` does; tell `progress`, a callable of str, what is being run."""
    input_shapes = _shapes(input_shapes)
    index = Index(storage.load(original), False, input_shapes)
    other = Runnable.of(storage.load(folded))
    return check_model(Runnable.of(index.source), other, index, input_shapes=input_shapes, seed=seed, progress=progress)


def _plan_verified(index, only, skip, verify, seed, progress):
    """Plan, run every site, and plan again without the folds that failed, until none does."""
    excluded, checks = {}, {}
    while True:
        planning = plan(index, only, skip, excluded)
        if not verify:
            return planning, checks
        failed = False
        for number, found in enumerate(planning.plans):
            key = _key(found)
            if key not in checks:
                if progress:
                    progress(f"verifying fold {number + 1} of {len(planning.plans)}: {found.lifted[0].label}")
                checks[key] = check_site(found, planning.site, seed)
            check = checks[key]
            if not check.ok:
                failed = True
                homes = ", ".join(f"{home.op} '{home.label}'" for home in found.homes)
                sentence = f"folded into {homes} it differs by {check.error:.2g}, {check.bound:.2g} is allowed"
                excluded.update(dict.fromkeys(key, sentence))
        if not failed:
            return planning, checks


def _key(found):
    return tuple((node.scope.number, node.position) for node in found.lifted)


def _fold_of(found, check, output):
    labels = "+".join(node.label for node in found.lifted)
    ops = tuple(node.op for node in found.lifted)
    notes = [f"weight '{output.duplicates[node]}' is shared: duplicated" for node in found.path if node in output.duplicates]
    if found.replaced:
        notes.append("an Add keeps the shift")
    if check and check.note:
        notes.append(check.note)
    error, bound = (check.error, check.bound) if check else (None, None)
    into, op = ("+".join(getattr(home, name) for home in found.homes) for name in ("label", "op"))
    return Fold(labels, ops, into, op, found.channels, error, bound, "; ".join(notes) or None)


def _whole_parity(source, index, output, input_shapes, seed, progress, stage):
    original = Runnable.of(source)
    if not output.is_external:
        return check_model(
            original, Runnable(output.to_bytes(), output.proto), index, input_shapes=input_shapes, seed=seed, progress=progress
        )
    if progress:
        progress("writing the folded model for its verification")
    path = output.stage(stage)
    folded = Runnable(os.fspath(path), output.proto, path.parent)
    return check_model(original, folded, index, input_shapes=input_shapes, seed=seed, progress=progress)


def _counts(proto):
    """Return (nodes, batch normalizations) of a model, those in subgraphs and functions included."""
    nodes = [node for graph in scopes_of(proto.graph) for node in graph.node]
    nodes += [node for function in proto.functions for node in function.node]
    return len(nodes), sum(node.op_type == BATCH_NORM and is_standard(node.domain) for node in nodes)


def _globs(value, where):
    if value is None:
        return None
    globs = [value] if isinstance(value, str) else value
    if not isinstance(globs, (list, tuple)) or not all(isinstance(glob, str) for glob in globs):
        raise ArgumentTypeError(expected("a glob or a list of globs", type(value).__name__, where))
    return list(globs)


def _check_globs(index, only, skip):
    from fnmatch import fnmatchcase

    labels = [node.label for node in index.order]
    for where, globs in (("only", only), ("skip", skip)):
        for glob in globs or ():
            if not any(fnmatchcase(label, glob) for label in labels):
                names = [node.label for node in index.order if is_batch_norm(node)]
                some = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
                raise ArgumentError(expected(f"a glob that names a node (BatchNormalization: {some or 'none'})", repr(glob), where))


def _shapes(input_shapes):
    shapes = {}
    if input_shapes is not None and not isinstance(input_shapes, dict):
        raise ArgumentTypeError(expected("a dict of name -> sizes", type(input_shapes).__name__, "input_shapes"))
    for name, sizes in (input_shapes or {}).items():
        good = isinstance(sizes, (list, tuple)) and all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes)
        if not good:
            raise ArgumentError(expected("positive sizes", repr(sizes), f"input_shapes[{name!r}]"))
        shapes[name] = tuple(sizes)
    return shapes
