"""Random graphs of the operators of both tables: folded without verification they must equal their originals in onnxruntime.

Verification is off because it would leave out exactly the folds that this test looks for. FASTBN_GRAPHS sets how many graphs are tried and
FASTBN_SEED where they begin; a failure names the seed of its graph.
"""

import numpy as np
import onnx
import pytest
from random_graphs import CHUNK, FIRST, GRAPHS, Graph, worst_difference
from sketch import run

import fastbn
from fastbn.arguments import REWRITE_FORMS
from fastbn.graph.model import storage
from fastbn.graph.model.index import Index
from fastbn.graph.ops.registry import OPERATORS
from fastbn.graph.planner.planning import plan

# An Upsample needs an old opset: random graphs have few.
SELDOM = {"Upsample"}

# Rounding of a dozen layers, conditioned as badly as these graphs are; a wrong fold is wrong in the first digits.
ALLOWED = 2e-4
ALLOWED_HALF = 0.005  # beside four times the original's own error


def said(seed, graph, *found):
    return "\n".join([f"seed {seed}", *map(str, found), onnx.printer.to_text(graph.model.graph)])


def both_outputs(graph, model, folded):
    """Return what a graph and its folded model give; where sizes have names, onnxruntime 1.32 may reuse memory of other sizes, and fail."""
    reuses = True
    try:
        before = run(model, graph.feed)
    except Exception as error:
        if "attempting to re-use buffer" not in str(error):
            raise
        reuses = False
        before = run(model, graph.feed, reuses_memory=reuses)
    return before, run(folded, graph.feed, reuses_memory=reuses)


def as_it_is(model):
    return model


def difference_of(seed, graph, folded, form):
    """Return (the difference of the outputs of a graph and of its folded model, both in a form of theirs; what is allowed).

    In float16 the distance of the folded model from the same graph in float32 is compared with the original's own: how badly the graph is
    conditioned.
    """
    before, after = both_outputs(graph, form(graph.model), form(folded))
    if not graph.narrow:
        return worst_difference(before, after), ALLOWED
    twin = Graph(seed, half=False)
    exact = [each.astype(np.float16) for each in run(twin.model if form is as_it_is else twin.settled(twin.model), twin.feed)]
    return worst_difference(exact, after), ALLOWED_HALF + 4 * worst_difference(exact, before)


def compare(seed, graph, result):
    """Demand that the model of a FoldResult gives what the graph gives, but for what a normalization of one element rounds."""
    try:
        difference, allowed = difference_of(seed, graph, result.model, as_it_is)
        if difference > allowed and graph.singles:
            difference, allowed = difference_of(seed, graph, result.model, graph.settled)
    except Exception as error:
        raise AssertionError(said(seed, graph, result, error)) from error
    assert difference <= allowed, said(seed, graph, result, difference, allowed)


def check(seed, crossed=None):
    """Fold the graph of one seed and compare; return how many folds there were."""
    graph = Graph(seed)
    result = fastbn.fold(graph.model, verify=False)
    compare(seed, graph, result)
    if crossed is not None:
        for each in plan(Index(storage.load(graph.model))).plans:
            crossed.update(node.op for node in each.path)
    return len(result.folded)


@pytest.mark.parametrize("first", range(FIRST, FIRST + GRAPHS, CHUNK))
def test_random_graphs(first):
    assert sum(check(seed) for seed in range(first, first + CHUNK)) > CHUNK / 4


def test_verification_finds_no_fault_with_right_folds():
    for seed in range(FIRST, FIRST + GRAPHS // 8):
        graph = Graph(seed)
        result = fastbn.fold(graph.model)
        assert "parity" not in {kept.code for kept in result.kept}, said(seed, graph, result)
        assert result.parity is None or result.parity.status != "failed", said(seed, graph, result)


@pytest.mark.parametrize("form", REWRITE_FORMS)
def test_what_stays_is_rewritten_right(form):
    count = 0
    for seed in range(FIRST, FIRST + GRAPHS // 4):
        graph = Graph(seed)
        result = fastbn.fold(graph.model, rewrite_left=form, verify=seed % 8 == 0)
        assert result.parity is None or result.parity.status != "failed", said(seed, graph, result)
        compare(seed, graph, result)
        assert not any("differs" in (kept.not_rewritten or "") for kept in result.kept), said(seed, graph, result)
        count += len(result.rewritten)
    assert count > GRAPHS / 32


def shuffled(graph, rng, valid):
    """Return the model with its nodes in another order; a valid one gives every value before it is read."""
    nodes = list(graph.model.graph.node)
    order = [nodes[int(number)] for number in rng.permutation(len(nodes))]
    if valid:
        known, waiting, order = {"x", "", *(tensor.name for tensor in graph.constants)}, order, []
        while waiting:
            ready = next(node for node in waiting if known.issuperset(node.input))
            waiting.remove(ready)
            known.update(ready.output)
            order.append(ready)
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    del model.graph.node[:]
    model.graph.node.extend(order)
    return model


def test_the_order_of_the_nodes_changes_nothing():
    folds = 0
    for seed in range(FIRST, FIRST + GRAPHS // 4):
        graph, rng = Graph(seed), np.random.default_rng(seed)
        expected = fastbn.fold(graph.model, verify=False)
        kept = sorted(node.op_type for node in expected.model.graph.node)
        folds += len(expected.folded)
        for valid in (True, False):
            result = fastbn.fold(shuffled(graph, rng, valid), verify=False)
            assert sorted(node.op_type for node in result.model.graph.node) == kept, said(seed, graph, expected, result)
            if valid:
                compare(seed, graph, result)
    assert folds > GRAPHS / 16


def test_the_graphs_reach_the_tables():
    """A generator that stopped making something would not be noticed otherwise."""
    crossed = set()
    for seed in range(1500):
        for each in plan(Index(storage.load(Graph(seed).model))).plans:
            crossed.update(node.op for node in each.path)
    known = {op for op, row in OPERATORS.items() if row.transfers} | {"DequantizeLinear"}
    assert not known - crossed - SELDOM
