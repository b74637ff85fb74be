"""What stays of the batch normalizations of a model, and why; those that were decomposed into Mul and Add count too."""

from collections.abc import Mapping
from dataclasses import replace

from fastbn.graph.model.index import Index
from fastbn.graph.model.nesting import is_standard
from fastbn.graph.model.node import Node
from fastbn.graph.ops.normalization import BATCH_NORM, is_batch_norm
from fastbn.graph.planner.view import GraphView
from fastbn.graph.reasons import Refusal
from fastbn.graph.results import Kept

__all__ = ["decomposed", "kept_nodes"]


def kept_nodes(index: Index, view: GraphView, refusals: Mapping[Node, Refusal], unrewritten: Mapping[Node, str]) -> list[Kept]:
    """Return what stays, in the order of the data flow.

    Parameters
    ----------
    index : Index
    view : GraphView
        After all plans.
    refusals : mapping of node -> Refusal
        Of every node that could be lifted and has found no place.
    unrewritten : mapping of node -> str
        Why a batch normalization is not rewritten either, where that was asked for.
    """
    kept = []
    for node in index.order:
        if node in view.removed or node in view.replaced:
            continue
        if is_batch_norm(node):
            kept.append(replace(_kept([node], refusals[node]), not_rewritten=unrewritten.get(node)))
        elif chain := decomposed(node, view, refusals):
            kept.append(_kept(chain, refusals[node]))
    for function in index.proto.functions:
        for proto in function.node:
            if proto.op_type == BATCH_NORM and is_standard(proto.domain):
                sentence = f"it stands in the model-local function '{function.name}', which several calls may share"
                kept.append(Kept(proto.name or ", ".join(proto.output), (BATCH_NORM,), "in-function", sentence))
    return kept


def decomposed(node: Node, view: GraphView, refusals: Mapping[Node, Refusal]) -> list[Node]:
    """Return the nodes, this one first, that are a batch normalization written as Mul and Add and that stay; an empty list of any other."""
    if node not in refusals or is_batch_norm(node) or _previous(node, view) is not None:
        return []
    chain = _chain(node, refusals)
    return chain if _is_decomposed(chain, view) else []


def _kept(nodes: list[Node], refusal: Refusal) -> Kept:
    return Kept("+".join(node.label for node in nodes), tuple(node.op for node in nodes), refusal.code, refusal.sentence)


def _previous(node: Node, view: GraphView) -> Node | None:
    """Return the elementwise affine right before a node, if the node is its only reader."""
    value = view.source(view.data(node))
    before = value.producer
    if before is None or is_batch_norm(before) or view.affine(before) is None or len(value.readers) != 1 or value.is_output:
        return None
    return before


def _chain(node: Node, refusals: Mapping[Node, Refusal]) -> list[Node]:
    """Return a node and those behind it that stay too, each the only reader of the one before."""
    chain = [node]
    while True:
        output = chain[-1].outputs[0]
        if output is None or len(output.readers) != 1 or output.is_output:
            return chain
        reader = output.readers[0][0]
        if reader not in refusals or is_batch_norm(reader):
            return chain
        chain.append(reader)


def _is_decomposed(chain: list[Node], view: GraphView) -> bool:
    """Say whether a run of elementwise affines is a batch normalization: it scales, it shifts, and it does so per channel."""
    affines = [affine for affine in map(view.affine, chain) if affine is not None]
    return any(a.scales for a in affines) and any(a.shifts for a in affines) and any(a.channels > 1 for a in affines)
