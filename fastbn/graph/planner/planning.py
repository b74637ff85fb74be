"""The planner: every BatchNormalization becomes part of a Plan or a Kept. It reads the model and writes nothing.

The affine of a node is lifted out and travels against the data flow or along it: each node on the way takes it into its constants or lets
it pass, as its row says (ops/), and nobody else may see a changed value who cannot undo the change (search.py). A plan is all or nothing.
Nodes are taken in the order of the data flow, and a node whose affine went into a plan is from then on as good as removed, so that a chain
(Conv, BN, Mul, Add) folds link by link while its constants stay exact: they are rounded once, when they are written.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from fastbn.graph.model.index import Index
from fastbn.graph.model.nesting import is_standard
from fastbn.graph.model.node import Node, Value
from fastbn.graph.ops.normalization import BATCH_NORM, is_batch_norm
from fastbn.graph.ops.registry import can_be_affine
from fastbn.graph.ops.row import STRATEGIES, Strategy
from fastbn.graph.planner.guard import Guard
from fastbn.graph.planner.kept import decomposed, kept_nodes
from fastbn.graph.planner.placement import Placement, changes_sizes, composed, place, place_constant
from fastbn.graph.planner.plan import Plan
from fastbn.graph.planner.record import Record
from fastbn.graph.planner.representable import refuse_unrepresentable
from fastbn.graph.planner.search import FORKED
from fastbn.graph.planner.substitute import RewriteForm, Rewriter
from fastbn.graph.planner.view import GraphView
from fastbn.graph.reasons import Refusal
from fastbn.graph.results import Explanation, Kept

__all__ = ["NodeKey", "Planning", "key_of", "plan"]

# (number of the scope, position in it): the same node in every index of one model.
NodeKey = tuple[int, int]


def key_of(node: Node) -> NodeKey:
    """Return the key of a node."""
    return node.scope.number, node.position


@dataclass
class Planning:
    """What the planner decided.

    Attributes
    ----------
    plans : list of Plan
    kept : list of Kept
    view : GraphView
        The graph after all plans.
    refusals : dict of Node -> Refusal
        Of every node that could be lifted and has found no place.
    explanations : list of Explanation
    rewritten : dict of Node -> Refusal
        What becomes another operator, and why it was not folded.
    unrewritten : dict of Node -> str
        Why a batch normalization that stays does not become another operator, where that was asked for.
    """

    plans: list[Plan]
    kept: list[Kept]
    view: GraphView
    refusals: dict[Node, Refusal]
    explanations: list[Explanation]
    rewritten: dict[Node, Refusal] = field(default_factory=dict)
    unrewritten: dict[Node, str] = field(default_factory=dict)

    @property
    def batch_norms_left(self) -> int:
        """How many batch normalizations stay as they are."""
        return sum(kept.ops == (BATCH_NORM,) for kept in self.kept)

    @property
    def folds(self) -> list[Plan]:
        """The plans that fold something, without those that only write a batch normalization in another way."""
        return [plan for plan in self.plans if plan.lifted]


def plan(
    index: Index,
    only: Sequence[str] | None = None,
    skip: Sequence[str] | None = None,
    excluded: Mapping[NodeKey, str] | None = None,
    explain: Sequence[str] | None = None,
    rewrite_left: RewriteForm | None = None,
    unrewritten: Mapping[NodeKey, str] | None = None,
    guard: Guard | None = None,
) -> Planning:
    """Plan every fold of a model.

    Parameters
    ----------
    index : model.index.Index
    only, skip : sequence of str, optional
        Globs over node names: fold only these, never those.
    excluded : mapping of (scope number, position) -> str
        Nodes whose folds verification has found wrong, and the sentence to report.
    explain : sequence of str, optional
        Globs over the names of nodes whose search is written down.
    rewrite_left : str, optional
        What batch normalizations become that would stay: "conv" or "affine".
    unrewritten : mapping of (scope number, position) -> str
        As excluded, of those that are not to be rewritten.
    guard : Guard, optional
        What plans must not do.

    Returns
    -------
    Planning
    """
    planner = _Planner(index, only, skip, excluded or {}, explain, guard)
    return planner.run(rewrite_left, unrewritten or {})


class _Planner:
    """One planning on its way: the present graph, the plans so far, the refusals."""

    def __init__(
        self,
        index: Index,
        only: Sequence[str] | None,
        skip: Sequence[str] | None,
        excluded: Mapping[NodeKey, str],
        explain: Sequence[str] | None,
        guard: Guard | None,
    ) -> None:
        self.index = index
        self.explain = explain
        self.records: dict[Node, Record] = {}
        self.only, self.skip, self.excluded = only, skip, excluded
        self.view = GraphView(index, guard)
        self.plans: dict[Plan, None] = {}
        # Head of a batch normalization that was decomposed -> its nodes; where they are searched for as one.
        self.chains: dict[Node, list[Node]] = {}
        # Nodes that would go into a batch normalization, which may yet leave itself; they wait until no other fold is left.
        self.deferred: set[Node] | None = set()

    def run(self, rewrite_left: RewriteForm | None, excluded_rewrites: Mapping[NodeKey, str]) -> Planning:
        refusals: dict[Node, Refusal] = {}
        candidates = waiting = _candidates(self.index)
        step = 0
        while step < len(STRATEGIES):
            if step > 0:
                waiting = [node for node in candidates if node in refusals and is_batch_norm(node)]
                self.chains = self._decomposed(candidates, refusals) if step == 1 else {}
                waiting.extend(self.chains)
            refused, placed = self._pass(waiting, STRATEGIES[step])
            if step == 0:
                refusals = refused
            elif step == 1:  # where others read a value, what is in the way once they have been asked
                known = {node: refusal for node, refusal in refused.items() if refusals[node].code in FORKED and refusal.code != "too-far"}
                refusals.update(known)
            elif step == len(STRATEGIES) - 1:  # of a shift that may stay behind, what is in the way of the scale
                known = {node: refusal for node, refusal in refused.items() if refusals[node].code == "shift-cannot-pass"}
                refusals.update(known)
            # A fold may have removed what another was refused for: try those again, in reverse, so that one pass frees a whole chain.
            waiting = [node for node in refusals if node not in placed][::-1]
            step = 0 if placed else step + 1
            if step == len(STRATEGIES) and self.deferred:
                self.deferred, step = None, 0
        view = self.view
        view.removed = {node: _behind(node, view) for node in self.index.order if node in view.removed}
        rewritten: dict[Node, Refusal] = {}
        unrewritten = {} if rewrite_left is None else self._rewrite(Rewriter(view, rewrite_left), refusals, excluded_rewrites, rewritten)
        plans = sorted(self.plans, key=lambda each: min(node.order for node in each.leaving))
        kept = kept_nodes(self.index, view, refusals, unrewritten)
        refusals = {node: refusal for node, refusal in refusals.items() if node not in view.removed and node not in view.replaced}
        return Planning(plans, kept, view, refusals, self._explanations({**refusals, **rewritten}), rewritten, unrewritten)

    def _explanations(self, refusals: Mapping[Node, Refusal]) -> list[Explanation]:
        explanations = []
        for node in self.index.order if self.explain else ():
            outcome = refusals[node].sentence if node in refusals else "folded"
            if node in self.records:
                explanations.append(Explanation(node.label, outcome, self.records[node].steps))
        return explanations

    def _record_of(self, node: Node, strategy: Strategy) -> Record | None:
        """Return where to write down the search of a node: that of the last round, in which the simplest strategy comes first."""
        if not self.explain or not any(fnmatchcase(node.label, glob) for glob in self.explain):
            return None
        if strategy == STRATEGIES[0] or node not in self.records:
            self.records[node] = Record()
        return self.records[node]

    def _pass(self, nodes: Sequence[Node], strategy: Strategy) -> tuple[dict[Node, Refusal], set[Node]]:
        """Try each of some nodes once; return (refusals, the nodes that found a place)."""
        refused, placed = {}, set()
        for node in nodes:
            if node in placed:
                continue
            try:
                found = self._placement(node, strategy)
                if found is None:
                    continue
                placement, channels = found
                for other in placement.plan.alike:
                    self._refuse_unselected(other)
                self._defer(node, placement)
                refuse_unrepresentable(placement.plan, self.view)
                if self.view.guard is not None:
                    self.view.guard.refuse_changes(placement.plan, self.index)
                self._record(node, channels, placement)
                placed.update([node, *placement.plan.alike, *self.chains.get(node, ())])
            except Refusal as refusal:
                refused[node] = refusal.with_traceback(None)  # the traceback would keep all objects of the search alive
        return refused, placed

    def _rewrite(
        self, rewriter: Rewriter, refusals: Mapping[Node, Refusal], excluded: Mapping[NodeKey, str], rewritten: dict[Node, Refusal]
    ) -> dict[Node, str]:
        """Plan the batch normalizations that stay as other operators, note them in `rewritten`; return why each other one cannot be."""
        obstacles, view = {}, self.view
        for node in self.index.order:
            if not is_batch_norm(node) or node in view.removed or node in view.replaced:
                continue
            try:
                if refusals[node].code == "not-selected":
                    raise refusals[node]
                if key_of(node) in excluded:
                    raise Refusal("parity", excluded[key_of(node)])
                affine = view.lifted(node)
                assert affine is not None, "a batch normalization is an affine, or a Refusal"
                new = rewriter.plan(node, affine)
            except Refusal as refusal:
                obstacles[node] = refusal.sentence
                continue
            rewritten[node] = refusals[node]
            target = view.owned(node)  # the plan of what this node has taken in, if any
            if target is None:
                self.plans[new] = None
            else:
                target.forget(node)
                new.absorbers = dict.fromkeys(reader for reader, _ in new.constants)
                target.join(new)
            view.replaced.update(new.replaced)
        return obstacles

    def _decomposed(self, candidates: Sequence[Node], refusals: Mapping[Node, Refusal]) -> dict[Node, list[Node]]:
        """Return head -> nodes of each batch normalization that was decomposed and stays: where others undo it, it may go as a whole."""
        chains = {node: decomposed(node, self.view, refusals) for node in candidates if node in refusals}
        return {node: chain for node, chain in chains.items() if len(chain) > 1}

    def _placement(self, node: Node, strategy: Strategy) -> tuple[Placement, int] | None:
        """Return (where the affine of a node goes, its channels), None for a node that is none."""
        chain = self.chains.get(node)
        if chain is not None and strategy != STRATEGIES[0]:
            for part in chain:
                self._refuse_unselected(part)
                _refuse_widening(part, self.view)
            whole = composed(chain, self.view)
            if whole is None:
                return None
            return place(node, whole, self.view, strategy, self._record_of(node, strategy), chain[-1]), whole.channels
        constant = self.view.constant(node.outputs[0]) if is_batch_norm(node) and node.outputs else None
        if constant is not None:
            self._refuse_unselected(node)
            return place_constant(node, constant, self.view), math.prod(constant.shape[1:2])
        affine = self.view.lifted(node)
        if affine is None:
            return None
        self._refuse_unselected(node)
        _refuse_widening(node, self.view)
        if is_batch_norm(node) and affine.is_neutral and self.view.owned(node) is not None:  # it has undone what other nodes were
            return Placement(Plan()), affine.channels
        return place(node, affine, self.view, strategy, self._record_of(node, strategy)), affine.channels

    def _defer(self, node: Node, placement: Placement) -> None:
        """Refuse for now to fold a node that is none into a batch normalization."""
        into = next(filter(is_batch_norm, placement.plan.absorbers), None)
        if self.deferred is not None and into is not None and not is_batch_norm(node):
            self.deferred.add(node)
            raise Refusal("other-readers", f"BatchNormalization '{into.label}' comes first")

    def _refuse_unselected(self, node: Node) -> None:
        if key_of(node) in self.excluded:
            raise Refusal("parity", self.excluded[key_of(node)])
        if self.only and not any(fnmatchcase(node.label, glob) for glob in self.only):
            raise Refusal("not-selected", "--only does not name it")
        if self.skip and any(fnmatchcase(node.label, glob) for glob in self.skip):
            raise Refusal("not-selected", "--skip names it")
        if self.view.guard is not None:
            self.view.guard.refuse_leaving(node)

    def _record(self, node: Node, channels: int, placement: Placement) -> None:
        """Make a placement part of the plans and of the present graph."""
        view, new = self.view, placement.plan
        if not new.absorbers:  # only constants that nodes on the path read have changed
            new.absorbers = dict.fromkeys(reader for reader, _ in new.constants)
        value = view.source(view.data(node))
        chain = self.chains.get(node, [node])
        leaving = [*chain, *new.alike, *new.bypassed]
        target = self._joined_plan(node, new, leaving)
        for gone in leaving:
            target.forget(gone)
        new.lifted.extend([*chain, *new.alike])
        new.channels = channels
        if placement.kept_shift is None:
            view.remove(node, value)
            if placement.forward:
                view.forwarded.add(node)
        else:
            add, constant = placement.kept_shift
            new.replaced[node] = (add,)
            new.constants[add, 1] = constant
            view.replaced[node] = (add,)
        for other in (*chain[1:], *new.alike):
            view.remove(other, view.source(view.data(other)))
            if placement.forward:
                view.forwarded.add(other)
        for gone, operand in new.bypassed.items():
            view.remove(gone, operand)
        target.join(new)
        view.apply(new)
        view.owner.update(dict.fromkeys([*new.path, *new.beside, *new.added, *leaving], target))

    def _joined_plan(self, node: Node, new: Plan, leaving: list[Node]) -> Plan:
        """Return the oldest plan that a new one touches, with all others that it touches joined to it, or a fresh one."""
        view = self.view
        before = view.data(node).producer
        touched = [*new.path, *new.beside, *new.crossed, *leaving, *([before] if before is not None and before in view.removed else [])]
        owners = dict.fromkeys(owner for owner in map(view.owned, touched) if owner is not None)
        target = min(owners, key=lambda each: each.number, default=None) or Plan(number=len(view.owner))
        self.plans[target] = None
        for other in owners:
            if other is not target:
                del self.plans[other]
                target.join(other)
                other.joined = target
        return target


def _candidates(index: Index) -> list[Node]:
    """Return the nodes that may be lifted by their distance from the inputs, then by name: the order of the file must not matter."""
    level: dict[Node, int] = {}
    candidates = []
    for node in index.order:
        producers = (value.producer for value in node.inputs if value is not None and value.producer is not None)
        level[node] = 1 + max((level.get(producer, 0) for producer in producers), default=0)
        if is_standard(node.domain) and can_be_affine(node.op):
            candidates.append(node)
    return sorted(candidates, key=lambda node: (node.scope.number, level[node], node.label))


def _refuse_widening(node: Node, view: GraphView) -> None:
    """Refuse a node whose constant widens its data: without it, what stands before and behind would meet another shape."""
    if not is_batch_norm(node) and changes_sizes(node, view):
        raise Refusal("axis", f"its constant widens the value '{view.data(node).name}'")


def _behind(node: Node, view: GraphView) -> Value:
    output = node.outputs[0]
    assert output is not None, "a lifted node gives its output"
    return view.source(output)
