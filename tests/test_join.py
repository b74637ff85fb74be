"""An affine that goes several ways along the data flow and comes together again in one node."""

import numpy as np
import pytest
from sketch import codes, folds, model, norm, normal, ops, refuses

import fastbn


def ints(*values):
    return np.array(values, np.int64)


def graph(nodes, *, x="2,4,6", inputs="", channels=4, positive=False, shift=True, **constants):
    """Return Tanh, a BatchNormalization, which gives n, and `nodes`, which give y."""
    parameters = norm(channels, positive=positive)
    if not shift:
        parameters |= {name: np.zeros_like(parameters[name]) for name in "tm"}
    text = f"(float[{x}] x{inputs}) => (float y) {{ r = Tanh(x) n = BatchNormalization(r, s, t, m, v) {nodes} }}"
    return model(text, **parameters, **constants)


def gone(proto):
    return " ".join(op for op in ops(proto).split() if op != "BatchNormalization")


# A k-NN graph network (DGCNN, ParticleNet): each point beside the differences to its neighbors, whose indices come from elsewhere.
NEIGHBORS = """g = Gather <axis = 2> (n, i) u = Unsqueeze(n, three) e = Expand(u, k) d = Sub(g, e) q = Concat <axis = 1> (e, d)
    y = Conv(q, w)"""

# The same as PyTorch writes it for batches: points of all events in one row.
BATCHED = """
    z = Transpose <perm = [1,0,2]> (n) f = Reshape(z, flat) g = Gather <axis = 1> (f, j)
    o = Reshape(g, grid) a = Transpose <perm = [1,0,2,3]> (o)
    u = Reshape(n, column) e = Expand(u, k) d = Sub(a, e) q = Concat <axis = 1> (e, d) y = Conv(q, w)"""

PASSES = {
    "a k-NN graph network": graph(
        NEIGHBORS, i=np.int64([[0, 1], [2, 3], [4, 5], [1, 0], [3, 3], [5, 2]]), three=ints(3), k=ints(1, 1, 1, 2), w=normal(5, 8, 1, 1)
    ),
    "a k-NN graph network of batches": graph(
        BATCHED,
        j=ints(*[0, 5, 2, 3, 4, 1, 7, 9, 8, 10, 11, 6] * 2),
        flat=ints(4, -1),
        grid=ints(4, 2, 6, 2),
        column=ints(2, 4, 6, 1),
        k=ints(1, 1, 1, 2),
        w=normal(5, 8, 1, 1),
    ),
    "a value added to itself": graph("d = Add(n, n) y = Conv(d, w)", w=normal(5, 4, 1)),
    "a value less its mean": graph("a = ReduceMean <axes = [2]> (n) d = Sub(n, a) y = Conv(d, w)", w=normal(5, 4, 1)),
    "three ways": graph("a = Neg(n) b = Neg(a) d = Sum(n, n, b) y = Conv(d, w)", w=normal(5, 4, 1)),
    "a product of two ways": graph("a = Neg(n) d = Mul(n, a) y = Conv(d, w)", w=normal(5, 4, 1), shift=False),
    "a quotient of two ways": graph("a = Neg(n) d = Div(n, a) y = Conv(d, w)", w=normal(5, 4, 1), shift=False),
    "a quotient of other channels": graph(
        "a = Gather <axis = 1> (n, p) d = Div(n, a) y = Conv(d, w)", w=normal(5, 4, 1), shift=False, p=ints(1, 2, 3, 0)
    ),
    "Concat of all along another axis": graph("a = Neg(n) b = Neg(a) d = Concat <axis = 2> (n, b) y = Conv(d, w)", w=normal(5, 4, 1)),
    "Concat of two along the channels": graph("a = Neg(n) d = Concat <axis = 1> (a, r, n) y = Conv(d, w)", w=normal(5, 12, 1)),
    "what a join gives joined again": graph("a = Neg(n) e = Add(a, n) d = Sub(e, n) y = Conv(d, w)", w=normal(5, 4, 1)),
    "two joins, one behind the other": graph(
        "a = Neg(n) b = Neg(a) c = Add(n, b) d = Concat <axis = 1> (c, n) y = Conv(d, w)", w=normal(5, 8, 1)
    ),
}


@pytest.mark.parametrize("case", PASSES)
def test_passes(case):
    folds(PASSES[case], gone(PASSES[case]))


STAYS = {
    "different scales": (
        "other-branch",
        graph("a = Transpose <perm = [0,2,1]> (n) d = Add(n, a) y = Conv(d, w)", x="2,4,4", w=normal(5, 4, 1)),
    ),
    "a value and its negative": ("other-branch", graph("a = Neg(n) d = Concat <axis = 2> (n, a) y = Conv(d, w)", w=normal(5, 4, 1))),
    "two of three": ("other-branch", graph("a = Neg(n) b = Neg(a) d = Sum(n, b, r) y = Conv(d, w)", w=normal(5, 4, 1))),
    "a product of shifts": ("shift-cannot-pass", graph("a = Neg(n) d = Mul(n, a) y = Conv(d, w)", w=normal(5, 4, 1))),
}


@pytest.mark.parametrize("case", STAYS)
def test_stays(case):
    code, proto = STAYS[case]
    refuses(proto, code, verify=False)


def test_what_undoes_a_change_may_meet_again_too():
    """The convolution takes the norm, and the two other readers of its output undo it where they come together."""
    text = """(float[2,3,6] x) => (float y, float z) {
        c = Conv(x, w, k) y = BatchNormalization(c, s, t, m, v) a = Neg(c) b = Neg(a) d = Add(c, b) z = Conv(d, w2)
    }"""
    folds(model(text, w=normal(4, 3, 1), k=normal(4), w2=normal(5, 4, 1), **norm(4)), "Conv Neg Neg Add Conv")


def test_a_residual_network_is_planned_as_before():
    """The Add waits for its other operand, which takes the affine on the way."""
    proto = graph("a = Conv <pads = [1,1]> (n, w) d = Add(a, n) y = Tanh(d)", w=normal(4, 4, 3))
    assert codes(fastbn.fold(proto, verify=False))


@pytest.mark.parametrize("seed", range(10))
def test_branches_that_meet_within_others_do_so_in_any_order_of_the_file(seed):
    """The Sub waits for the Add, whatever place the file gives them."""
    text = """(float[2,4,6,6] x) => (float y) {
        r = Tanh(x) n = BatchNormalization(r, s, t, m, v) a = Neg(n) e = Add(n, a) f = Identity(e)
        g = Sub(n, f) h = Mul(g, k) y = Conv(h, w)
    }"""

    def nested():
        return model(text, w=normal(5, 4, 1, 1), k=normal(4, 1, 1), **norm(4))

    proto, shuffled = nested(), nested()
    nodes = [proto.graph.node[int(number)] for number in np.random.default_rng(seed).permutation(len(proto.graph.node))]
    del shuffled.graph.node[:]
    shuffled.graph.node.extend(nodes)
    assert not fastbn.fold(proto, verify=False).kept
    assert not fastbn.fold(shuffled, verify=False).kept
