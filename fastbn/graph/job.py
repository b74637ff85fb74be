"""The main job: load, plan, verify each fold, write, verify the whole model."""

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

from onnx.inliner import inline_selected_functions

from fastbn.errors import ArgumentError, expected
from fastbn.graph.fold_result import FoldResult
from fastbn.graph.model import storage
from fastbn.graph.model.index import Index
from fastbn.graph.model.nesting import LARGEST_INLINED, expanded_size, is_standard
from fastbn.graph.model.node import Node
from fastbn.graph.model.storage import ModelLike, Source
from fastbn.graph.ops.identity import DROPOUT
from fastbn.graph.ops.normalization import BATCH_NORM
from fastbn.graph.options import Globs, InputShapes, check_named, checked_globs, checked_shapes
from fastbn.graph.parity.fold_parity import FoldParity, check_fold
from fastbn.graph.parity.model_parity import Comparison
from fastbn.graph.parity.reach import unreached
from fastbn.graph.parity.reference import Progress, silent
from fastbn.graph.planner import planning as planner
from fastbn.graph.planner.advice import advised
from fastbn.graph.planner.guard import Guard
from fastbn.graph.planner.plan import Plan
from fastbn.graph.planner.planning import NodeKey, Planning, key_of
from fastbn.graph.planner.substitute import REWRITE_FORMS, RewriteForm
from fastbn.graph.ranges import optional_callable
from fastbn.graph.reasons import Refusal, first_few
from fastbn.graph.results import Fold, Parity, Rewritten
from fastbn.graph.rewrite.draft import Draft
from fastbn.graph.rewrite.inference import as_inference as converted
from fastbn.graph.rewrite.output import Output
from fastbn.graph.rewrite.writer import rewrite
from fastbn.graph.runtime import Runnable

# Folds that are excluded one by one because the whole model fails with them: docs/numerics.md, "Limits of effort".
MOST_EXCLUDED = 8

# The nodes that a plan lifts, or those that it rewrites.
PlanKey: TypeAlias = tuple[NodeKey, ...]

__all__ = ["Job", "Options", "fold", "fold_of", "inference_form", "inlined_functions", "verify"]


def fold(
    model: ModelLike,
    *,
    only: Globs | None = None,
    skip: Globs | None = None,
    verify: bool = True,
    input_shapes: InputShapes | None = None,
    freeze_inputs: bool = False,
    as_inference: bool = False,
    rewrite_left: RewriteForm | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    workdir: str | os.PathLike[str] | None = None,
    explain: Globs | None = None,
) -> FoldResult:
    """Fold every inference batch normalization that can be folded exactly into its neighbors' weights.

    Parameters
    ----------
    model : str, os.PathLike, bytes, onnx.ModelProto, onnx_ir.Model or torch.onnx.ONNXProgram
        The model; it is not changed.
    only, skip, explain : str or sequence of str, optional
        Globs over node names: fold only these; never those; tell the whole search for a place for these in `FoldResult.explanations`.
    verify : bool
        Run every fold and the whole model in onnxruntime, its optimizer off, against the original.
    input_shapes : dict of name -> sequence of int, optional
        Sizes of graph inputs that the model leaves open.
    freeze_inputs : bool
        Make constants of initializers that are also graph inputs; they leave the model's inputs.
    as_inference : bool
        Make inference nodes of BatchNormalization (by running statistics) and Dropout in training mode; what is compared is that form.
    rewrite_left : "conv" or "affine", optional
        Make a depthwise Conv with a kernel of 1, or a Mul and an Add, of each BatchNormalization that cannot be folded.
    seed, progress : int, callable of str, optional
        Seed of the random inputs of the verification; what is called with a line of text before each of its steps.
    workdir : path, optional
        Where a hidden folder holds files of a model with external data during its verification; the system's temporary one by default.

    Returns
    -------
    FoldResult

    Raises
    ------
    StorageError, ModelError, ArgumentError, ArgumentTypeError
        A file cannot be read; the model is malformed; an option cannot be used.

    Examples
    --------
    >>> import fastbn, onnx
    >>> nodes = "{ c = Conv (x, w) y = BatchNormalization (c, s, s, s, s) }"
    >>> tiny = f"(float[1, 1, 3] x) => (float[1, 1, 3] y) <float[1, 1, 1] w = {{2}}, float[1] s = {{1}}> {nodes}"
    >>> result = fastbn.fold(onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> tiny {tiny}'))
    >>> result.folded[0].into, result.parity.ok, len(result.model.graph.node)
    ('c', True, 1)
    """
    globs = checked_globs(only, "only"), checked_globs(skip, "skip"), checked_globs(explain, "explain")
    shapes, tell = checked_shapes(input_shapes), optional_callable(progress, "progress") or silent
    options, source = Options(*globs, verify, shapes, freeze_inputs, rewrite_left, seed, tell, workdir), storage.load(model)
    return _folded(inference_form(source, freeze_inputs, shapes) if as_inference else source, options)


def inference_form(source: Source, freeze_inputs: bool, input_shapes: Mapping[str, tuple[int, ...]]) -> Source:
    """Return the form of a model in which no node is in training mode, its functions with such nodes inlined."""
    return converted(inlined_functions(source, (BATCH_NORM, DROPOUT)) or source, freeze_inputs, input_shapes)


@dataclass(frozen=True)
class Options:
    """The arguments of `fold` beside the model, checked."""

    only: list[str] | None
    skip: list[str] | None
    explain: list[str] | None
    verify: bool
    input_shapes: dict[str, tuple[int, ...]]
    freeze_inputs: bool
    rewrite_left: RewriteForm | None
    seed: int
    progress: Progress
    workdir: str | os.PathLike[str] | None
    guard: Guard | None = None

    def __post_init__(self) -> None:
        if self.rewrite_left not in (None, *REWRITE_FORMS):
            raise ArgumentError(expected(" or ".join(REWRITE_FORMS), repr(self.rewrite_left), "rewrite_left"))


def _folded(source: Source, options: Options) -> FoldResult:
    inlined = inlined_functions(source, (BATCH_NORM,))
    job = Job(source, source if inlined is None else inlined, options)
    planning = job.plan()
    whole = inlined_functions(source) if source.proto.functions and planning.batch_norms_left else None
    if whole is not None:  # what stands beside a batch normalization may be a call of a function
        other = Job(source, whole, options)
        planned = other.plan()
        if planned.batch_norms_left < planning.batch_norms_left:
            job, planning, inlined = other, planned, whole
    if inlined is not None and not planning.plans:
        job = Job(source, source, options)
        planning = job.plan()
    return job.result(planning)


class Job:
    """One call of `fold` on one form of the model: the original, or the original with functions inlined."""

    def __init__(self, original: Source, form: Source, options: Options) -> None:
        self.original = original
        self.options = options
        self.index = Index(form, options.freeze_inputs, options.input_shapes)
        for where, globs in (("only", options.only), ("skip", options.skip), ("explain", options.explain)):
            check_named(self.index, globs or (), where)
        # Node -> why it is not folded: verification found its fold wrong.
        self.excluded: dict[NodeKey, str] = {}
        # Node -> why it is not rewritten: verification found that wrong.
        self.unrewritten: dict[NodeKey, str] = {}
        self.checks: dict[tuple[PlanKey, PlanKey], FoldParity] = {}
        self.comparison: Comparison | None = None

    def plan(self, without: Iterable[NodeKey] = ()) -> Planning:
        """Plan, verify every fold, and plan again without the folds that failed, until none does."""
        while True:
            planning = self._planned(dict.fromkeys(without, ""))
            failed = [plan for plan in planning.plans if self.options.verify and not self._check(plan, planning).ok]
            if not failed:
                return planning
            for plan in failed:
                self._exclude(plan, planning)

    def _planned(self, without: Mapping[NodeKey, str]) -> Planning:
        options, excluded, unrewritten = self.options, {**self.excluded, **without}, {**self.unrewritten, **without}
        return planner.plan(
            self.index, options.only, options.skip, excluded, options.explain, options.rewrite_left, unrewritten, options.guard
        )

    def _supposed(self, shapes: Mapping[str, tuple[int, ...]]) -> Planning:
        """Return the planning of the same model with these sizes and with its inputs frozen."""
        index = Index(self.index.source, True, shapes)
        return planner.plan(index, self.options.only, self.options.skip, self.excluded)

    def _check(self, plan: Plan, planning: Planning) -> FoldParity:
        key = _key(plan.lifted), _key(plan.rewritten)
        if key not in self.checks:
            number = planning.plans.index(plan) + 1
            self.options.progress(f"verifying fold {number} of {len(planning.plans)}: {plan.leaving[0].label}")
            self.checks[key] = check_fold(plan, planning.view, self.options.seed)
        return self.checks[key]

    def check_of(self, plan: Plan) -> FoldParity | None:
        """Return what the verification of a plan gave, None where there was none."""
        return self.checks.get((_key(plan.lifted), _key(plan.rewritten)))

    def _exclude(self, plan: Plan, planning: Planning) -> None:
        """Exclude the one node without which a failed plan holds, or all nodes of the plan."""
        check = self._check(plan, planning)
        if plan.rewritten:
            sentence = f"written in another way it differs by {check.error:.2g}, {check.bound:.2g} is allowed"
            self.unrewritten.update(dict.fromkeys(_key(plan.rewritten), sentence))
            return
        absorbers = ", ".join(f"{node.op} '{node.label}'" for node in plan.absorbers)
        sentence = f"folded into {absorbers} it differs by {check.error:.2g}, {check.bound:.2g} is allowed"
        key = _key(plan.lifted)
        if len(key) > 1:
            # The first node with which a plan of the nodes up to it fails.
            first = key[_shortest_failing(len(key), lambda length: self._holds(key, dict.fromkeys(key[length:], sentence))) - 1]
            if self._holds(key, {first: sentence}):
                self.excluded[first] = sentence
                return
        self.excluded.update(dict.fromkeys(key, sentence))

    def _holds(self, key: PlanKey, without: Mapping[NodeKey, str]) -> bool:
        """Say whether some of these nodes fold, and all such folds hold, when others are excluded."""
        planning = self._planned(without)
        plans = [plan for plan in planning.plans if set(_key(plan.lifted)) & set(key)]
        return bool(plans) and all(self._check(plan, planning).ok for plan in plans)

    def result(self, planning: Planning) -> FoldResult:
        """Write and verify the whole model; return the FoldResult."""
        planning, draft, output, parity = self._finish(planning)
        self.original.check_unchanged()
        planning.kept = advised(planning, self.index, self._supposed)
        missed: list[Plan] = []
        if parity is not None and parity.status in ("ok", "inconclusive"):
            missed = unreached(self.index, planning, parity.compared, parity.missed)
            if missed and parity.ok:
                names = first_few([plan.leaving[0].label for plan in missed])
                reason = f"no output that could be compared depends on the fold of {names}"
                parity = replace(parity, status="inconclusive", reason=reason)
        checks = {plan: self.check_of(plan) for plan in planning.plans}
        folded = [fold_of(plan, checks[plan], draft, plan in missed) for plan in planning.folds]
        plans = {node: plan for plan in planning.plans for node in plan.rewritten}
        rewritten = [
            _rewritten_of(node, refusal, plans[node], checks[plans[node]], draft, plans[node] in missed)
            for node, refusal in planning.rewritten.items()
        ]
        return FoldResult(self.original, self.index, output, draft.counts, planning, folded, rewritten, parity)

    def _finish(self, planning: Planning) -> tuple[Planning, Draft, Output, Parity | None]:
        """Return (planning, draft, output, parity): without the folds with which the whole fails although each of them holds alone."""
        draft, output, parity = self._whole(planning)
        for _ in range(MOST_EXCLUDED):
            if parity is None or parity.status != "failed":
                break
            sentence = f"with it the whole model differs: {parity}"
            failing = self._first_failing(planning)
            self.excluded.update(dict.fromkeys(_key(failing.lifted), sentence))
            self.unrewritten.update(dict.fromkeys(_key(failing.rewritten), sentence))
            planning = self.plan()
            draft, output, parity = self._whole(planning)
        return planning, draft, output, parity

    def _first_failing(self, planning: Planning) -> Plan:
        """Return the first plan with which the whole model fails."""
        keys = [_key(plan.leaving) for plan in planning.plans]

        def holds(length: int) -> bool:
            parity = self._whole(self.plan(without=[node for key in keys[length:] for node in key]))[2]
            return parity is None or parity.status != "failed"

        def tell(left: int) -> None:
            self.options.progress(f"looking for the fold that fails: {left} left")

        return planning.plans[_shortest_failing(len(keys), holds, tell) - 1]

    def _whole(self, planning: Planning) -> tuple[Draft, Output, Parity | None]:
        """Return (draft, output, parity of the whole model)."""
        draft = Draft(self.index, planning)
        output = rewrite(self.index, planning, draft)
        if not self.options.verify or not planning.plans:
            return draft, output, None
        if output.is_external:
            self.options.progress("writing the folded model for its verification")
            path = output.save_in_workdir(self.options.workdir)
            folded = Runnable(os.fspath(path), path.parent)
        else:
            folded = Runnable(output.to_bytes())
        if self.comparison is None:
            self.comparison = Comparison(
                Runnable.of(self.original),
                self.index,
                input_shapes=self.options.input_shapes,
                seed=self.options.seed,
                progress=self.options.progress,
            )
        return draft, output, self.comparison.check(folded, lambda names: bool(names) and not unreached(self.index, planning, names))


def _shortest_failing(count: int, holds: Callable[[int], bool], tell: Callable[[int], None] | None = None) -> int:
    """Return the length of the shortest prefix of `count` entries that fails, by bisection; all entries together are known to fail."""
    longest, shortest = 0, count  # known to hold; known to fail
    while shortest - longest > 1:
        middle = (longest + shortest) // 2
        if tell:
            tell(shortest - longest)
        if holds(middle):
            longest = middle
        else:
            shortest = middle
    return shortest


def inlined_functions(source: Source, ops: tuple[str, ...] | None = None) -> Source | None:
    """Return the model with those model-local functions inlined that hold one of some operators, or all; None where that is not possible.

    A function that several calls share can only be folded where it is inlined.
    """
    holders = [
        (function.domain, function.name)
        for function in source.proto.functions
        if ops is None or any(node.op_type in ops and is_standard(node.domain) for node in function.node)
    ]
    if not holders or expanded_size(source.proto) > LARGEST_INLINED:
        return None
    try:
        proto = inline_selected_functions(source.proto, holders)
    except Exception:  # the inliner raises many kinds on odd models: then the functions stay, with their reason
        return None
    # Types that a function declares inside hold for onnxruntime only now; it does not read them there, and they may be wrong.
    declared = {entry.name for entry in source.proto.graph.value_info}
    kept = [entry for entry in proto.graph.value_info if entry.name in declared]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(kept)
    inlined = source.derived(proto)
    inlined.notes += tuple(f"model-local function '{name}' inlined" for _, name in holders)
    return inlined


def verify(
    original: ModelLike,
    folded: ModelLike,
    *,
    input_shapes: InputShapes | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Parity:
    """Compare two models on the same inputs, onnxruntime's optimizer off on both sides.

    Parameters
    ----------
    original, folded : str, os.PathLike, bytes, onnx.ModelProto, onnx_ir.Model or torch.onnx.ONNXProgram
    input_shapes, seed
        As in `fold`.
    progress : callable of str, optional
        Called with a line of text before each step.

    Returns
    -------
    Parity
        status is "ok", "failed", "inconclusive" or "not-run"; the worst element with its index, both values and what is allowed.

    Raises
    ------
    StorageError, ModelError
        As in `fold`.

    Examples
    --------
    >>> import fastbn, onnx
    >>> text = '<ir_version: 8, opset_import: ["" : 17]> tiny (float[1, 2] x) => (float[1, 2] y) { y = %s (x, x) }'
    >>> add, mul = (onnx.parser.parse_model(text % op) for op in ("Add", "Mul"))
    >>> fastbn.verify(add, add).ok, fastbn.verify(add, mul).status
    (True, 'failed')
    """
    tell, shapes = optional_callable(progress, "progress"), checked_shapes(input_shapes)
    index, other = Index(storage.load(original), False, shapes), storage.load(folded)
    comparison = Comparison(Runnable.of(index.source), index, input_shapes=shapes, seed=seed, progress=tell)
    parity = comparison.check(Runnable.of(other))
    for source in (index.source, other):
        source.check_unchanged()
    return parity


def _key(nodes: Iterable[Node]) -> PlanKey:
    return tuple(map(key_of, nodes))


def _notes_of(changed: Iterable[Node], keeps_shift: bool, check: FoldParity | None, draft: Draft, is_missed: bool) -> str | None:
    """Return what a result says of a plan; is_missed: the comparison of the whole model does not depend on it."""
    counted = Counter(note for node in dict.fromkeys(changed) for note in draft.growth.get(node, ()))
    notes = [note if times == 1 else f"{note}, {times} times" for note, times in counted.items()]
    if keeps_shift:
        notes.append("an Add keeps the shift")
    if check and check.note:
        notes.append(check.note)
    if is_missed:
        notes.append("not reached by the comparison of the whole model")
    return "; ".join(notes) or None


def _rewritten_of(node: Node, refusal: Refusal, plan: Plan, check: FoldParity | None, draft: Draft, is_missed: bool) -> Rewritten:
    substitutes = plan.replaced[node]
    return Rewritten(
        bn=node.label,
        op="+".join(each.op for each in substitutes),
        channels=math.prod(plan.constants[substitutes[0], 1].shape),
        error=check.error if check else None,
        bound=check.bound if check else None,
        note=_notes_of(substitutes, False, check, draft, is_missed),
        code=refusal.code,
        reason=refusal.sentence,
    )


def fold_of(plan: Plan, check: FoldParity | None, draft: Draft, is_missed: bool) -> Fold:
    """Return a plan as the result reports it."""
    keeps_shift = any(node in plan.replaced for node in plan.lifted)
    return Fold(
        bn="+".join(node.label for node in plan.lifted),
        ops=tuple(node.op for node in plan.lifted),
        into="+".join(node.label for node in plan.absorbers),
        op="+".join(node.op for node in plan.absorbers),
        channels=plan.channels,
        error=check.error if check else None,
        bound=check.bound if check else None,
        note=_notes_of((node for node, _ in plan.constants), keeps_shift, check, draft, is_missed),
    )
