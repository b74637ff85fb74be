"""Limits and refusals of the search: how far it goes, whom it may ask, what it says when it gives up."""

from itertools import pairwise

import numpy as np
import pytest
from sketch import assert_same, folds, model, norm, normal, ops

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


@pytest.mark.parametrize(("count", "left"), [(LONGEST_WAY, "Tanh"), (LONGEST_WAY + 1, "Tanh BatchNormalization")])
def test_the_longest_way_forward(count, left):
    text = f"(float[2,3] x) => (float y) {{ r = Tanh(x) c = BatchNormalization(r, s, t, m, v) {identities(count)} y = Gemm(d, w) }}"
    result = fastbn.fold(model(text, w=normal(3, 4), **norm(3)), verify=False)
    assert ops(result.model) == " ".join([left, *["Identity"] * count, "Gemm"])


@pytest.mark.parametrize("count", [MOST_STEPS - 1, MOST_STEPS])
def test_the_most_nodes_that_are_asked_for_a_fold_that_leaves_an_add(count):
    """With the MatMul that takes the scale, 30 nodes."""
    negations = identities(count).replace("Identity", "Neg")
    text = f"(float[2,3] x) => (float y) {{ c = MatMul(x, w) {negations} y = BatchNormalization(d, s, t, m, v) }}"
    result = fastbn.fold(model(text, w=normal(3, 4), **norm(4)), verify=False)
    rest = "Add" if count == 29 else "BatchNormalization"
    assert ops(result.model) == " ".join(["MatMul", *["Neg"] * count, rest])
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


TWO_READERS = """(float[2,3,6,6] x) => (float y) {
    c = Conv(x, w) n = BatchNormalization(c, s, t, m, v) a = Conv(n, w2) b = Conv(c, w3) y = Add(a, b)
}"""


def test_other_readers_are_asked_only_where_nothing_else_takes_the_affine():
    constants = {"w": normal(4, 3, 1, 1), "w2": normal(4, 4, 1, 1), "w3": normal(4, 4, 1, 1, seed=3)}
    result = folds(model(TWO_READERS, **constants, **norm(4)), "Conv Conv Conv Add")
    assert [fold.into for fold in result.folded] == ["a"]


def test_a_scale_of_zero_cannot_be_undone_by_other_readers():
    text = TWO_READERS.replace("a = Conv(n, w2)", "a = Tanh(n)")
    constants = {"w": normal(4, 3, 1, 1), "w3": normal(4, 4, 1, 1, seed=3), **norm(4)}
    folds(model(text, **constants), "Conv Tanh Conv Add")
    constants["s"] = np.float32([0, 1, 2, 3])
    assert kept(model(text, **constants))[0] == "other-readers"


@pytest.mark.parametrize("order", ["(a, b)", "(b, a)"])
def test_the_operand_that_can_takes_the_shift_of_a_sum(order):
    text = f"(float[2,3] x) => (float y) {{ a = MatMul(x, w) b = Gemm(x, w2) d = Add{order} y = BatchNormalization(d, s, t, m, v) }}"
    folds(model(text, w=normal(3, 4), w2=normal(3, 4, seed=2), **norm(4)), "MatMul Gemm Add")


def test_a_fold_in_a_body_does_not_reach_the_outer_graph():
    text = """(float[2,3] x, bool b) => (float y) {
        c = Gemm(x, w)
        y = If (b) <then_branch = yes () => (float y1) { y1 = BatchNormalization(c, s, t, m, v) },
                    else_branch = no () => (float y2) { y2 = Gemm(x, w) }>
    }"""
    code, sentence = kept(model(text, w=normal(3, 4), **norm(4)))
    assert (code, "of Gemm 'c' in an outer graph" in sentence) == ("crosses-scope", True)


DECOMPOSED = "(float[2,%s,6,6] x) => (float y) { a = Mul(x, k) n = Add(a, l) y = Conv(n, w) }"


@pytest.mark.parametrize(("channels", "code"), [("1", "axis"), ("C", "reads-input"), ("4", "reads-input")])
def test_constants_that_widen_their_data_stay(channels, code):
    proto = model((DECOMPOSED % channels).replace("Conv(n, w)", "Tanh(n)"), k=normal(4, 1, 1), l=normal(4, 1, 1, seed=1))
    assert kept(proto)[0] == code


def test_constants_that_do_not_widen_their_data_go():
    proto = model(DECOMPOSED % "4", k=normal(4, 1, 1), l=normal(4, 1, 1, seed=1), w=normal(5, 4, 1, 1))
    folds(proto, "Conv")


NARROW = "(float[2,C,6,6] x) => (float y) { a = Add(x, k) n = Mul(a, l) y = Conv(n, w) }"
WIDE = [((4, 1, 1), "Mul Conv"), ((1, 4, 1, 1), "Mul Conv"), ((1,), "Add Conv"), ((1, 1, 1), "Add Conv")]


@pytest.mark.parametrize(("shape", "left"), WIDE)
def test_a_constant_that_may_widen_its_data_goes_where_what_reads_it_widens_it_too(shape, left):
    """The last of them stays: without it, the convolution would read one channel where the caller gives one."""
    proto = model(NARROW, k=normal(4, 1, 1), l=normal(*shape, seed=1), w=normal(5, 4, 1, 1))
    result = fastbn.fold(proto, verify=False)
    assert ops(result.model) == left
    for channels in (1, 4):
        assert_same(proto, result.model, {"x": normal(2, channels, 6, 6)})


@pytest.mark.parametrize("tail", ["d = Sub(c, n)", "d = Sub(n, c)", "e = Neg(r) d = Sum(c, n, e)", "e = Neg(n) d = Add(c, e)"])
def test_only_a_sum_of_two_makes_the_affine_part_of_a_sibling(tail):
    """Without verification, which would find out."""
    text = f"""(float[2,4,6,6] x) => (float y) {{
        r = Tanh(x) c = Conv <pads = [1,1,1,1]> (r, w) n = BatchNormalization(r, s, t, m, v) {tail} y = Tanh(d)
    }}"""
    proto = model(text, w=normal(4, 4, 3, 3), **norm(4))
    result = fastbn.fold(proto, verify=False)
    assert "BatchNormalization" in ops(result.model) or "Neg" in tail
    assert_same(proto, result.model)


def test_other_readers_are_asked_for_a_batch_normalization_alone():
    text = TWO_READERS.replace("n = BatchNormalization(c, s, t, m, v)", "n = Mul(c, k)").replace("a = Conv(n, w2)", "a = Tanh(n)")
    proto = model(text, w=normal(4, 3, 1, 1), w3=normal(4, 4, 1, 1, seed=3), k=normal(4, 1, 1))
    assert fastbn.fold(proto, verify=False).to_bytes() == proto.SerializeToString()
