"""Drawings of graphs: which boxes there are, where they stand and how they are joined; the report's template makes SVG of them.

Ranks are longest paths from the top, long edges run through places of their own in each rank, and the order within a rank follows the
neighbors' middles (Sugiyama, Tagawa and Toda 1981, the method in its simplest form).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, TypeAlias

import onnx

from fastbn.graph.captions import captions, short
from fastbn.graph.model.nesting import bodies
from fastbn.graph.ops.normalization import is_batch_norm

if TYPE_CHECKING:
    from fastbn.graph.model.index import Index
    from fastbn.graph.model.node import Node, Value
    from fastbn.graph.planner.plan import Plan
    from fastbn.graph.planner.planning import Planning

__all__ = ["Drawing", "draw_fold", "draw_model"]

# What a box stands for, a class of the style sheet: a node that stays as it is, lets an affine pass, absorbs it, is taken out, or is a
# batch normalization that stays; a neighbor of a fold; an input or output of the graph; a bend of an edge.
Kind: TypeAlias = Literal["plain", "passes", "absorber", "removed", "kept", "near", "end", ""]

# The kinds of nodes in a chain, the one that its box shows first.
STRIKING: tuple[Kind, ...] = ("kept", "removed", "absorber", "passes", "plain")

# Boxes that a drawing of a whole model, and one of a fold, shows at most.
MODEL_BOXES, FOLD_BOXES = 240, 24

# Sizes in CSS pixels; a character of the heading and of the other lines is this wide at most on average.
GAP_X, GAP_Y, PADDING, LINE = 14, 26, 8, 14
HEADING, CHARACTER, NARROWEST = 7.6, 6.3, 56

SWEEPS, ALIGNMENTS = 6, 16

# An edge that passes more ranks than this goes straight, behind what stands in its way.
MOST_BENDS = 24


@dataclass
class Box:
    """A node, or a chain of them: a kind (a class of the style sheet), lines of text, the whole names, the name that one of the lines shows
    in short, and its place."""

    kind: Kind
    lines: list[str]
    title: str
    name: str = ""
    rank: int = 0
    x: float = 0.0
    y: float = 0.0
    width: float = 0.0
    height: float = 0.0
    above: list[Box] = field(default_factory=list)
    below: list[Box] = field(default_factory=list)

    @property
    def is_bend(self) -> bool:
        """Whether this is only where a long edge passes a rank."""
        return not self.kind

    @property
    def middle(self) -> float:
        """The x of its middle."""
        return self.x + self.width / 2


# (upper, lower).
Edge: TypeAlias = tuple[Box, Box]


@dataclass
class Drawing:
    """Boxes and paths (the d of an SVG path) in a frame, and how many nodes are not shown."""

    boxes: list[Box]
    paths: list[str]
    width: float
    height: float
    title: str
    text: str
    hidden: int = 0


def draw_model(planning: Planning) -> Drawing:
    """Return the Drawing of a model's main graph as it came: what was taken out, what took it in, what stayed."""
    index, kinds = planning.view.index, _kinds(planning)
    nodes = [node for node in index.main.nodes if not _is_constant(node, index)]
    groups = [[node] for node in nodes]
    if len(nodes) > MODEL_BOXES:
        groups = _chains(nodes, MODEL_BOXES)
    shown = groups[:MODEL_BOXES]
    boxes: dict[Node, Box] = {}
    for group in shown:
        box = _group_box(group, kinds)
        boxes.update(dict.fromkeys(group, box))
    edges = _edges(boxes, lambda value: value)
    ends: dict[Value, Box] = {}
    for value in index.main.values.values():
        if value.is_input and value.initializer is None:
            ends[value] = Box("end", [short(value.name)], f"graph input {value.name}", value.name)
            edges += [(ends[value], boxes[reader]) for reader, _ in value.readers if reader in boxes]
        if value.is_output and value.producer is not None and value.producer in boxes:
            edges.append((boxes[value.producer], Box("end", [short(value.name)], f"graph output {value.name}", value.name)))
    counts = Counter(kinds.get(node, "plain") for node in nodes)
    text = f"{len(nodes)} nodes: {counts['removed']} taken out, {counts['absorber']} that took them in, {counts['kept']} that stayed"
    hidden = sum(map(len, groups[len(shown) :]))
    return _drawing(_unique(boxes.values()), edges, "The whole model before folding", text, hidden)


def draw_fold(plan: Plan, planning: Planning) -> tuple[Drawing, Drawing]:
    """Return (before, after): the Drawings of one plan's nodes and their neighbors."""
    view = planning.view
    removed = view.removed
    inside = dict.fromkeys([*plan.path, *plan.leaving, *plan.bypassed])
    order = [node for node in view.index.order if node in inside]
    kinds = _kinds(planning)
    before = {node: Box(kinds.get(node, "passes"), _lines(node), _title(node), node.label) for node in order[:FOLD_BOXES]}

    def after_of(value: Value) -> Value:
        while value.producer is not None and value.producer in removed:
            value = removed[value.producer]
        return value

    after: dict[Node, Box] = {}
    for node in order:
        if len(after) == FOLD_BOXES or node in removed:
            continue
        stays = view.present(node)
        changed = [_slot_name(step, slot, view.index.opset) for step, slot in plan.constants if step in stays]
        lines = ["+".join(step.op for step in stays), *_lines(stays[-1])[1:], *([f"new {_joined(changed)}"] if changed else [])]
        after[node] = Box("absorber" if changed else "passes", lines, _title(stays[-1]), stays[-1].label)
    names = ", ".join(node.label for node in plan.lifted)
    hidden = len(order) - len(before)
    edges_before = _edges(before, lambda value: value) + _context(before, lambda value: value, {}, view.index)
    edges_after = _edges(after, after_of) + _context(after, after_of, removed, view.index)
    return (
        _drawing(list(before.values()), edges_before, "before", f"{_sequence(before)}; {names} is taken out", hidden),
        _drawing(list(after.values()), edges_after, "after", f"{_sequence(after)}; {names} is gone", hidden),
    )


def _kinds(planning: Planning) -> dict[Node, Kind]:
    """Return node -> kind of every node that a plan names, or that stays although it is a batch normalization."""
    kinds: dict[Node, Kind] = {}
    for plan in planning.plans:
        kinds.update(dict.fromkeys(plan.path, "passes"))
        kinds.update(dict.fromkeys((node for node, _ in plan.constants), "absorber"))
        kinds.update(dict.fromkeys((*plan.lifted, *plan.bypassed), "removed"))
    for node in planning.view.index.order:
        if is_batch_norm(node) and kinds.get(node) != "removed":
            kinds[node] = "kept"
    return kinds


def _is_constant(node: Node, index: Index) -> bool:
    output = node.outputs[0] if node.outputs else None
    return output is not None and not bodies(node.proto) and index.constant(output) is not None


def _edges(boxes: Mapping[Node, Box], source: Callable[[Value], Value]) -> list[Edge]:
    """Return the edge of every value that goes from box to box; source is the value that a value stands for."""
    edges: dict[tuple[int, int], Edge] = {}
    for node, box in boxes.items():
        for value in node.inputs:
            producer = None if value is None else source(value).producer
            if producer is not None and producer in boxes and boxes[producer] is not box:
                edges[id(boxes[producer]), id(box)] = boxes[producer], box
    return list(edges.values())


def _context(boxes: Mapping[Node, Box], source: Callable[[Value], Value], removed: Collection[Node], index: Index) -> list[Edge]:
    """Return edges to the neighbors of a fold, which get boxes of their own."""
    edges: list[Edge] = []
    above: dict[Value, Box] = {}
    below: dict[Node, Box] = {}
    for node, box in boxes.items():
        for value in node.inputs:
            origin = None if value is None else source(value)
            if origin is None or origin.initializer is not None or index.constant(origin) is not None:
                continue
            producer = origin.producer
            if producer is None or producer not in boxes:
                outer = Box("near", [short(origin.name)], origin.name, origin.name)
                above.setdefault(origin, Box("near", [producer.op], _title(producer)) if producer else outer)
                edges.append((above[origin], box))
        for output in node.outputs:
            for reader in _readers(output, removed):
                if reader not in boxes and reader not in below and len(above) + len(below) < FOLD_BOXES:
                    below[reader] = Box("near", [reader.op], _title(reader))
                    edges.append((box, below[reader]))
    return edges


def _readers(value: Value | None, removed: Collection[Node]) -> list[Node]:
    """Return the nodes that read a value, those behind removed ones too."""
    readers: list[Node] = []
    pending = [value]
    for read in pending:
        for reader, _ in read.readers if read is not None else ():
            if reader in removed:
                pending.extend(reader.outputs[:1])
            else:
                readers.append(reader)
    return readers


def _chains(nodes: Sequence[Node], most: int) -> list[list[Node]]:
    """Return nodes in groups: linear chains, as short as possible for at most `most` groups."""
    drawn = set(nodes)
    above = {node: {value.producer for value in node.inputs if value is not None and value.producer in drawn} for node in nodes}
    below: Counter[Node | None] = Counter(producer for producers in above.values() for producer in producers)
    length, groups = 1, [[node] for node in nodes]
    while len(groups) > most and length < len(nodes):
        length *= 2
        group_of: dict[Node | None, list[Node]] = {}
        groups = []
        for node in nodes:
            before = next(iter(above[node])) if len(above[node]) == 1 else None
            group = group_of.get(before)
            if group is None or below[before] != 1 or len(group) >= length:
                group = []
                groups.append(group)
            group.append(node)
            group_of[node] = group
    return groups


def _group_box(group: Sequence[Node], kinds: Mapping[Node, Kind]) -> Box:
    if len(group) == 1:
        node = group[0]
        return Box(kinds.get(node, "plain"), _lines(node), _title(node), node.label)
    counts = Counter(kinds.get(node, "plain") for node in group)
    kind: Kind = next(each for each in STRIKING if counts[each])
    ops = Counter(node.op for node in group).most_common(3)
    lines = [f"{len(group)} nodes", short(", ".join(f"{count} {op}" for op, count in ops))]
    if counts["removed"]:
        lines.append(f"{counts['removed']} taken out")
    return Box(kind, lines, f"{_title(group[0])} to {_title(group[-1])}")


def _lines(node: Node) -> list[str]:
    return [node.op, short(node.label)] if node.label else [node.op]


def _title(node: Node) -> str:
    return f"{node.op} {node.label}"


def _joined(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _slot_name(node: Node, slot: int, opset: int) -> str:
    """Return what the operator's definition calls an input."""
    try:
        name: str = onnx.defs.get_schema(node.op, opset, node.domain).inputs[slot].name
        return name
    except (onnx.defs.SchemaError, IndexError):
        return f"input {slot}"


def _sequence(boxes: Mapping[Node, Box]) -> str:
    return " then ".join(box.lines[0] for box in list(boxes.values())[:8]) or "nothing"


def _unique(boxes: Iterable[Box]) -> list[Box]:
    return list({id(box): box for box in boxes}.values())


def _drawing(boxes: list[Box], edges: list[Edge], title: str, text: str, hidden: int) -> Drawing:
    """Return the Drawing of boxes and of those that only edges name."""
    boxes = _unique([*boxes, *(box for edge in edges for box in edge)])
    texts = captions([box.name for box in boxes if box.name])
    for box in boxes:
        box.lines = [texts[box.name] if box.name and line == short(box.name) else line for line in box.lines]
        heading, *others = box.lines
        box.width = max(NARROWEST, 2 * PADDING + max(HEADING * len(heading), CHARACTER * max(map(len, others), default=0)))
        box.height = 2 * PADDING + LINE * len(box.lines) - 4
    _rank(boxes, edges)
    rows, chains = _rows(boxes, edges)
    _order(rows)
    width, height = _place(rows)
    paths = [_path(chain) for chain in chains]
    return Drawing(boxes, paths, width, height, title, text, hidden)


def _rank(boxes: list[Box], edges: list[Edge]) -> None:
    """Give every box the length of the longest way from the top."""
    readers: dict[int, list[Box]] = {}
    waiting: Counter[int] = Counter()
    for upper, lower in edges:
        readers.setdefault(id(upper), []).append(lower)
        waiting[id(lower)] += 1
    ready = [box for box in boxes if not waiting[id(box)]]
    for box in ready:
        for lower in readers.get(id(box), ()):
            lower.rank = max(lower.rank, box.rank + 1)
            waiting[id(lower)] -= 1
            if not waiting[id(lower)]:
                ready.append(lower)
    fed = {id(lower) for _, lower in edges}
    for box in boxes:  # a box without anything above it stands right above its first reader
        if id(box) not in fed and id(box) in readers:
            box.rank = min(lower.rank for lower in readers[id(box)]) - 1


def _rows(boxes: list[Box], edges: list[Edge]) -> tuple[list[list[Box]], list[list[Box]]]:
    """Return (boxes by rank, chains of boxes that each edge runs through), with bends where an edge passes a rank."""
    rows: list[list[Box]] = [[] for _ in range(1 + max((box.rank for box in boxes), default=0))]
    for box in boxes:
        rows[box.rank].append(box)
    chains = []
    for upper, lower in edges:
        chain = [upper]
        passed = range(upper.rank + 1, lower.rank)
        for rank in passed if len(passed) <= MOST_BENDS else ():
            chain.append(Box("", [], "", rank=rank, width=10))
            rows[rank].append(chain[-1])
        chain.append(lower)
        for one, other in pairwise(chain):
            one.below.append(other)
            other.above.append(one)
        chains.append(chain)
    return rows, chains


def _order(rows: list[list[Box]]) -> None:
    """Order each rank by the middles of its neighbors, down and up in turn."""
    for row in rows:
        for place, box in enumerate(row):
            box.x = place
    for sweep in range(SWEEPS):
        down = sweep % 2 == 0
        for row in rows if down else rows[::-1]:
            row.sort(key=_middle_above if down else _middle_below)
            for place, box in enumerate(row):
                box.x = place


def _middle_above(box: Box) -> float:
    return sum(other.x for other in box.above) / len(box.above) if box.above else box.x


def _middle_below(box: Box) -> float:
    return sum(other.x for other in box.below) / len(box.below) if box.below else box.x


def _place(rows: list[list[Box]]) -> tuple[float, float]:
    """Give every box its coordinates; return the size of the drawing."""
    for row in rows:
        x = 0.0
        for box in row:
            box.x = x
            x += box.width + GAP_X
    for sweep in range(ALIGNMENTS):
        for row in rows if sweep % 2 == 0 else rows[::-1]:
            _align(row)
    left = min((box.x for row in rows for box in row), default=0) - 2
    y = 2.0
    for row in rows:
        height = max((box.height for box in row), default=0)
        for box in row:
            box.x -= left
            box.y = y + (height - box.height) / 2
            if box.is_bend:
                box.y, box.height = y, height
        y += height + GAP_Y
    width = max((box.x + box.width for row in rows for box in row), default=0) + 2
    return round(width, 1), round(y - GAP_Y + 2, 1)


def _align(row: list[Box]) -> None:
    """Move the boxes of a rank below the middles of their neighbors, as far as none overlaps another."""
    wanted = []
    for box in row:
        near = [*box.above, *box.below]
        wanted.append(sum(other.middle for other in near) / len(near) - box.width / 2 if near else box.x)
    from_left: list[float] = []
    edge = float("-inf")
    for box, x in zip(row, wanted, strict=True):
        from_left.append(max(x, edge))
        edge = from_left[-1] + box.width + GAP_X
    from_right: list[float] = []
    edge = float("inf")
    for box, x in zip(row[::-1], wanted[::-1], strict=True):
        from_right.append(min(x, edge - box.width))
        edge = from_right[-1] - GAP_X
    for box, one, other in zip(row, from_left, from_right[::-1], strict=True):
        box.x = (one + other) / 2  # neither pass lets boxes overlap, so their mean does not


def _path(chain: list[Box]) -> str:
    """Return an SVG path from the bottom of the first box to the top of the last, upright where it passes a rank."""
    first, *rest = chain
    x, y = first.middle, first.y + first.height
    parts = [f"M{x:.1f} {y:.1f}"]
    for box in rest:
        top = (y + box.y) / 2
        parts.append(f"C{x:.1f} {top:.1f} {box.middle:.1f} {top:.1f} {box.middle:.1f} {box.y:.1f}")
        x, y = box.middle, box.y
        if box.is_bend and box.height:
            y += box.height
            parts.append(f"V{y:.1f}")
    return "".join(parts)
