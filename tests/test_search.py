"""Limits and refusals of the search: how far it goes, whom it may ask, what it says when it gives up."""

from itertools import pairwise

import pytest
from sketch import folds, model, norm, normal, ops

import fastbn
from fastbn.graph.planner.search import LONGEST_WAY, MOST_STEPS


def identities(count):
    """Return nodes that hand c on as d through so many Identities."""
    names = ["c", *(f"i{number}" for number in range(count - 1)), "d"]
    return " ".join(f"{after} = Identity({before})" for before, after in pairwise(names))


def kept(proto, **options):
    """Return the code and the sentence of the one node that stays."""
    (only,) = fastbn.fold(proto, verify=False, **options).kept
    return only.code, only.reason


@pytest.mark.parametrize("count", [LONGEST_WAY, LONGEST_WAY + 1])
def test_the_longest_way(count):
    text = f"(float[2,3] x) => (float y) {{ c = Gemm(x, w) {identities(count)} y = BatchNormalization(d, s, t, m, v) }}"
    proto = model(text, w=normal(3, 4), **norm(4))
    if count == 100:
        assert ops(fastbn.fold(proto, verify=False).model) == " ".join(["Gemm", *["Identity"] * count])
    else:
        code, sentence = kept(proto)
        assert (code, count) == ("too-far", 101)
        assert "the way is longer than 100 nodes at Gemm 'c'" in sentence


@pytest.mark.parametrize("count", [MOST_STEPS - 1, MOST_STEPS])
def test_the_most_nodes_that_are_asked_for_a_fold_that_leaves_an_add(count):
    """With the MatMul that takes the scale, 30 nodes."""
    text = f"(float[2,3] x) => (float y) {{ c = MatMul(x, w) {identities(count)} y = BatchNormalization(d, s, t, m, v) }}"
    result = fastbn.fold(model(text, w=normal(3, 4), **norm(4)), verify=False)
    rest = "Add" if count == 29 else "BatchNormalization"
    assert ops(result.model) == " ".join(["MatMul", *["Identity"] * count, rest])
    assert count in (29, 30)


INDICES = """(float[2,3,6,6] x) => (float y) {
    c = Conv(x, w) d, i = MaxPool <kernel_shape = [2,2]> (c) n = BatchNormalization(d, s, t, m, v) %s
}"""


def test_an_operator_that_gives_two_values_is_not_asked_for_one():
    constants = {"w": normal(4, 3, 1, 1), **norm(4, positive=True)}
    folds(model(INDICES % "y = Tanh(n)", **constants), "Conv MaxPool Tanh")
    assert kept(model(INDICES % "r = Tanh(n) j = Cast <to = 1> (i) y = Add(r, j)", **constants))[0] == "other-outputs"
    is_output = model((INDICES % "y = Tanh(n)").replace("=> (float y", "=> (float y, int64 i"), **constants)
    assert kept(is_output)[0] == "other-outputs"
