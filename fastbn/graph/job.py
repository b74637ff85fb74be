"""The main job: load, plan, verify each view, write, verify the whole."""

import os
from dataclasses import replace
from fnmatch import fnmatchcase

from onnx.inliner import inline_selected_functions

from fastbn.errors import ArgumentError, ArgumentTypeError, expected
from fastbn.graph.fold_result import FoldResult
from fastbn.graph.model import storage
from fastbn.graph.model.index import Index
from fastbn.graph.model.nesting import LARGEST_INLINED, expanded_size, is_standard
from fastbn.graph.ops.lift import BATCH_NORM, is_batch_norm
from fastbn.graph.parity.fold_parity import check_fold
from fastbn.graph.parity.model_parity import Comparison
from fastbn.graph.parity.reach import unreached
from fastbn.graph.planner.planning import plan
from fastbn.graph.reasons import first_few
from fastbn.graph.results import Fold
from fastbn.graph.rewrite.writer import rewrite
from fastbn.graph.runtime import Runnable

# Folds that are left out one by one because the whole model fails with them.
MOST_CULPRITS = 8

__all__ = ["checked_shapes", "fold", "fold_watched", "verify", "verify_watched"]


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
    input_shapes = checked_shapes(input_shapes)
    source = storage.load(model)
    for candidate in _with_and_without_functions(source):
        index = Index(candidate, freeze_inputs, input_shapes)
        _check_globs(index, only, skip)
        job = _Job(source, index, only, skip, verify, seed, progress or (lambda text: None), stage)
        planning = job.plan()
        if planning.plans:
            break
    planning, output, parity = job.finish(planning)
    missed = (
        unreached(index, planning, parity.compared, parity.missed) if parity is not None and parity.status in ("ok", "inconclusive") else []
    )
    if missed and parity.ok:
        names = first_few([found.lifted[0].label for found in missed])
        parity = replace(parity, status="inconclusive", reason=f"no output that could be compared depends on the fold of {names}")
    folded = [_fold_of(found, job.checks.get(_key(found)), output, found in missed) for found in planning.plans]
    return FoldResult(source, index, output, planning, folded, parity)


class _Job:
    """One model on its way: plans whose sites hold, the model that they make, and its parity as a whole."""

    def __init__(self, source, index, only, skip, verify, seed, progress, stage):
        self.source = source
        self.index = index
        self.only, self.skip = only, skip
        self.verify = verify
        self.seed = seed
        self.progress = progress
        self.stage = stage
        self.excluded = {}
        self.checks = {}
        self.comparison = None

    def plan(self, without=()):
        """Plan, run every view, and plan again without the folds that failed, until none does."""
        while True:
            planning = plan(self.index, self.only, self.skip, {**self.excluded, **dict.fromkeys(without, "")})
            wrong = [found for found in planning.plans if self.verify and not self._check(found, planning).ok]
            if not wrong:
                return planning
            for found in wrong:
                self._exclude(found, planning)

    def _check(self, found, planning):
        key = _key(found)
        if key not in self.checks:
            number = planning.plans.index(found) + 1
            self.progress(f"verifying fold {number} of {len(planning.plans)}: {found.lifted[0].label}")
            self.checks[key] = check_fold(found, planning.view, self.seed)
        return self.checks[key]

    def _exclude(self, found, planning):
        """Leave out of a plan that failed the one node without which it holds, or all of it."""
        check = self._check(found, planning)
        homes = ", ".join(f"{home.op} '{home.label}'" for home in found.homes)
        sentence = f"folded into {homes} it differs by {check.error:.2g}, {check.bound:.2g} is allowed"
        key = _key(found)
        if len(key) > 1:
            culprit = self._wrong_link(key, sentence)
            if self._holds(key, {culprit: sentence}):
                self.excluded[culprit] = sentence
                return
        self.excluded.update(dict.fromkeys(key, sentence))

    def _wrong_link(self, key, sentence):
        """Return the first of these nodes with which a plan that begins with the first of them fails, by bisection."""
        holds, fails = 0, len(key)
        while fails - holds > 1:
            middle = (holds + fails) // 2
            if self._holds(key[:middle], dict.fromkeys(key[middle:], sentence)):
                holds = middle
            else:
                fails = middle
        return key[fails - 1]

    def _holds(self, key, without):
        """Say whether some of these nodes fold, and rightly so, where others are left out."""
        trial = plan(self.index, self.only, self.skip, {**self.excluded, **without})
        rest = [other for other in trial.plans if set(_key(other)) & set(key)]
        return bool(rest) and all(self._check(other, trial).ok for other in rest)

    def finish(self, planning):
        """Return (planning, output, parity): without the folds that spoil the whole model although their own proofs held."""
        output, parity = self._whole(planning)
        for _ in range(MOST_CULPRITS):
            if parity is None or parity.status != "failed":
                break
            sentence = f"with it the whole model differs: {parity}"
            self.excluded.update(dict.fromkeys(self._culprit(planning), sentence))
            planning = self.plan()
            output, parity = self._whole(planning)
        return planning, output, parity

    def _culprit(self, planning):
        """Return the key of the first plan with which the whole model fails, by bisection."""
        keys = [_key(found) for found in planning.plans]
        holds, fails = 0, len(keys)
        while fails - holds > 1:
            middle = (holds + fails) // 2
            self.progress(f"looking for the fold that fails: {fails - holds} left")
            parity = self._whole(self.plan(without=[node for key in keys[middle:] for node in key]))[1]
            if parity is None or parity.status != "failed":
                holds = middle
            else:
                fails = middle
        return keys[fails - 1]

    def _whole(self, planning):
        """Return (output, parity of the whole model)."""
        output = rewrite(self.index, planning)
        if not self.verify or not planning.plans:
            return output, None
        if output.is_external:
            self.progress("writing the folded model for its verification")
            path = output.save_in_workdir(self.stage)
            folded = Runnable(os.fspath(path), path.parent)
        else:
            folded = Runnable(output.to_bytes())
        if self.comparison is None:
            original = Runnable.of(self.source)
            shapes = self.index.input_shapes
            self.comparison = Comparison(original, self.index, input_shapes=shapes, seed=self.seed, progress=self.progress)
        return output, self.comparison.check(folded, lambda names: bool(names) and not unreached(self.index, planning, names))


def _with_and_without_functions(source):
    """Yield the Source with the model-local functions that hold a batch normalization inlined, then as it came.

    A function that several calls share has parameters of its own only where it is called; what is inlined in vain is not kept.
    """
    holders = [
        (function.domain, function.name)
        for function in source.proto.functions
        if any(node.op_type == BATCH_NORM and is_standard(node.domain) for node in function.node)
    ]
    if holders and expanded_size(source.proto) <= LARGEST_INLINED:
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
        status is "ok", "failed", "inconclusive" or "not-run"; the worst element with its index, both values and what is allowed.

    Raises
    ------
    StorageError, ModelError
        As in `fold`.
    """
    return verify_watched(original, folded, input_shapes, seed)


def verify_watched(original, folded, input_shapes, seed=0, progress=None):
    """Do what `verify` does; tell `progress`, a callable of str, what is being run."""
    input_shapes = checked_shapes(input_shapes)
    index = Index(storage.load(original), False, input_shapes)
    other = Runnable.of(storage.load(folded))
    return Comparison(Runnable.of(index.source), index, input_shapes=input_shapes, seed=seed, progress=progress).check(other)


def _key(found):
    return tuple((node.scope.number, node.position) for node in found.lifted)


def _fold_of(found, check, output, missed):
    labels = "+".join(node.label for node in found.lifted)
    ops = tuple(node.op for node in found.lifted)
    notes = [f"weight '{output.duplicates[node]}' is shared: duplicated" for node in found.path if node in output.duplicates]
    if found.replaced:
        notes.append("an Add keeps the shift")
    if check and check.note:
        notes.append(check.note)
    if missed:
        notes.append("not reached by the comparison of the whole model")
    error, bound = (check.error, check.bound) if check else (None, None)
    into, op = ("+".join(getattr(home, name) for home in found.homes) for name in ("label", "op"))
    return Fold(labels, ops, into, op, found.channels, error, bound, "; ".join(notes) or None)


def _globs(value, where):
    if value is None:
        return None
    globs = [value] if isinstance(value, str) else value
    if not isinstance(globs, (list, tuple)) or not all(isinstance(glob, str) for glob in globs):
        raise ArgumentTypeError(expected("a glob or a list of globs", type(value).__name__, where))
    return list(globs)


def _check_globs(index, only, skip):
    labels = [node.label for node in index.order]
    for where, globs in (("only", only), ("skip", skip)):
        for glob in globs or ():
            if not any(fnmatchcase(label, glob) for label in labels):
                names = [node.label for node in index.order if is_batch_norm(node)]
                some = first_few(names)
                raise ArgumentError(expected(f"a glob that names a node (BatchNormalization: {some or 'none'})", repr(glob), where))


def checked_shapes(input_shapes):
    """Return input_shapes as a dict of name -> tuple of int; raises ArgumentError or ArgumentTypeError where they are none."""
    shapes = {}
    if input_shapes is not None and not isinstance(input_shapes, dict):
        raise ArgumentTypeError(expected("a dict of name -> sizes", type(input_shapes).__name__, "input_shapes"))
    for name, sizes in (input_shapes or {}).items():
        good = isinstance(sizes, (list, tuple)) and all(
            isinstance(size, int) and not isinstance(size, bool) and 0 < size < 1 << 63 for size in sizes
        )
        if not good:
            raise ArgumentError(expected("positive sizes", repr(sizes), f"input_shapes[{name!r}]"))
        shapes[name] = tuple(sizes)
    return shapes
