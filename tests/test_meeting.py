"""An affine that goes against the data flow by several ways that come from one value: all that read the value must want the same of it."""

import numpy as np
import pytest
from sketch import assert_same, folds, model, norm, normal
from test_carry import backward, gone, ints, repeated

import fastbn
from fastbn.errors import ModelError
from fastbn.graph.model import storage
from fastbn.graph.model.index import Index
from fastbn.graph.ops.affine import Affine
from fastbn.graph.ops.registry import row_of
from fastbn.graph.planner.view import GraphView
from fastbn.graph.reasons import Refusal

REST = ints(2**62)
BEFORE, BEHIND = "e = Slice(c, nul, one, ax)", "f = Slice(c, one, rest, ax)"
BOUNDS = {"nul": ints(0), "one": ints(1), "rest": REST}
WIDE = normal(6, 3, 3, 3)

# Parts of c as PyTorch's exporter writes a chunk before it optimizes the graph.
CUT = "q = SplitToSequence <axis = -3> (c, k)"
TURNED = "e = SequenceAt(q, i) f = SequenceAt(q, j) d = Concat <axis = 1> (f, e)"

PASSES = {
    "a part of a sequence": backward(f"{CUT} d = SequenceAt(q, i)", channels=3, k=ints(1, 3), i=np.int64(1)),
    "a part of a sequence of equal ones": backward(f"{CUT} d = SequenceAt(q, i)", channels=1, k=np.int64(3), i=np.int64(-1)),
    "parts of a sequence": backward(f"{CUT} {TURNED}", k=np.int64(2), i=np.int64(0), j=np.int64(1)),
    "parts of the space": backward(f"{CUT.replace('-3', '2')} {TURNED.replace('1>', '2>')}", k=ints(1, 5), i=np.int64(0), j=np.int64(1)),
    "a roll": backward(f"{BEFORE} {BEHIND} d = Concat <axis = 2> (f, e)", ax=ints(2), **BOUNDS),
    "a roll of the channels": backward(f"{BEFORE} {BEHIND} d = Concat <axis = 1> (f, e)", ax=ints(1), **BOUNDS),
    "a roll along two axes": backward(
        f"{BEFORE} {BEHIND} g = Concat <axis = 2> (f, e) h = Slice(g, nul, one, ay) i = Slice(g, one, rest, ay)"
        " d = Concat <axis = 3> (i, h)",
        ax=ints(2),
        ay=ints(3),
        **BOUNDS,
    ),
    "a ring": backward(f"{BEFORE} f = Slice(c, last, rest, ax) d = Concat <axis = 2> (f, c, e)", ax=ints(2), last=ints(-1), **BOUNDS),
    "channels in another order": backward(
        "e = Gather <axis = 1> (c, i) f = Gather <axis = 1> (c, j) d = Concat <axis = 1> (e, f)", i=ints(2, 0), j=ints(3, 1)
    ),
    "a channel that nobody reads": backward(
        "e = Gather <axis = 1> (c, i) f = Gather <axis = 1> (c, j) d = Concat <axis = 1> (e, f)", channels=3, i=ints(2, 0), j=ints(3)
    ),
    "a Split put together in another order": backward("e, f = Split <axis = 1> (c, k) d = Concat <axis = 1> (f, e)", k=ints(1, 3)),
    "a Split of the space": backward("e, f = Split <axis = 2> (c, k) d = Concat <axis = 2> (f, e)", k=ints(1, 5)),
    "one part of a Split by a longer way": backward(
        "e, f = Split <axis = 3> (c, k) g = Neg(e) h = Neg(g) d = Concat <axis = 3> (f, h)", k=ints(2, 4)
    ),
    "the greater half": backward("e, f = Split <axis = 1> (c, k) d = Max(e, f)", channels=2, positive=True, k=ints(2, 2)),
    "the greater half, sliced": backward(
        "e = Slice(c, nul, two, one) f = Slice(c, two, rest, one) d = Max(e, f)", channels=2, positive=True, two=ints(2), **BOUNDS
    ),
    "two of three parts": backward("e, f, g = Split <axis = 1> (c, k) d = Add(e, f) z = Tanh(g)", channels=2, w=WIDE, k=ints(2, 2, 2)),
    "the sum of three parts": backward(
        "e, f, g = Split <axis = 1> (c, k) h = Add(e, f) d = Add(h, g)", channels=2, w=WIDE, k=ints(2, 2, 2)
    ),
    "a value added to itself": backward("d = Add(c, c)"),
    "a value less its negative": backward("e = Neg(c) d = Sub(c, e)"),
    "a value less its mean, no shift": backward("e = ReduceMean <axes = [2]> (c) d = Sub(c, e)", shift=False),
    "two pools": backward(
        "e = MaxPool <kernel_shape = [3,3]> (c) f = AveragePool <kernel_shape = [3,3]> (c) d = Add(e, f)",
        positive=True,
    ),
    "three ways": backward("e = Neg(c) f = Neg(e) d = Mean(c, f, c)"),
    "one value twice in a Concat": repeated("d = Concat <axis = 1> (c, c)", w=normal(2, 3, 3, 3), channels=4),
    "a sum that a convolution makes up for": backward(
        f"p = Conv <pads = [1,1,1,1]> (c, w2) q = Add(p, c) {BEFORE} {BEHIND} d = Concat <axis = 2> (f, e)".replace(
            "(c, nul", "(q, nul"
        ).replace("(c, one", "(q, one"),
        w2=normal(4, 4, 3, 3),
        ax=ints(2),
        **BOUNDS,
    ),
}


@pytest.mark.parametrize("case", PASSES)
def test_passes(case):
    folds(PASSES[case], gone(PASSES[case]))


OVERLAP = "e = Slice(c, nul, two, ax) f = Slice(c, one, rest, ax)"

STAYS = {
    "two that want one channel to differ": backward(
        f"{OVERLAP} d = Concat <axis = 1> (e, f)", channels=5, ax=ints(1), two=ints(2), **BOUNDS
    ),
    "a shift in one operand alone": backward("e = ReduceMean <axes = [2]> (c) d = Sub(c, e)"),
    "a third reader": backward(f"{BEFORE} {BEHIND} d = Concat <axis = 2> (f, e) z = Tanh(c)", ax=ints(2), **BOUNDS),
    "a product": backward("e = Neg(c) d = Mul(c, e)", shift=False),
    "a part of a Split of the space that something else reads": backward(
        "e, f = Split <axis = 2> (c, k) g, h = Split <axis = 2> (f, l) d = Concat <axis = 2> (e, g) z = Tanh(h)", k=ints(1, 5), l=ints(2, 3)
    ),
    "parts of a Split of the space that differ": backward(
        "e, f = Split <axis = 2> (c, k) d = Concat <axis = 1> (e, f)", channels=8, k=ints(3, 3)
    ),
    "the greater of two that differ": backward("e = Identity(c) f = Neg(c) d = Max(e, f)", positive=True),
}


@pytest.mark.parametrize("case", STAYS)
def test_stays(case):
    proto = STAYS[case]
    result = fastbn.fold(proto, verify=False)
    assert len(result.kept) == 1
    assert result.to_bytes() == proto.SerializeToString()


def reason(proto, **options):
    (kept,) = fastbn.fold(proto, verify=False, **options).kept
    return kept.reason


def test_the_reason_is_what_would_have_to_change_last():
    """Each of the ways alone is refused for the other one."""
    assert "Tanh 'z' reads the value 'c' before it too" in reason(STAYS["a third reader"])
    expected = "Slice 'f' and Slice 'e' read the value 'c', and would need it changed in different ways"
    assert expected in reason(STAYS["two that want one channel to differ"])


def test_the_search_tells_of_the_ways_that_meet():
    result = fastbn.fold(PASSES["a roll"], explain="y", verify=False)
    told = [(step.depth, step.node, step.answer) for step in result.explanations[0].steps if step.strategy == "rearrange"]
    assert told[-4:] == [
        (0, "Concat 'd'", "lets it pass"),
        (1, "Slice 'f'", "lets it pass"),
        (1, "Slice 'e'", "lets it pass"),
        (2, "Conv 'c'", "takes it"),
    ]
    refused = fastbn.fold(STAYS["a third reader"], explain="y", verify=False)
    assert all(step.code for step in refused.explanations[0].steps if step.node == "Concat 'd'")


def test_a_caller_who_reads_the_value_keeps_it_as_it_is():
    text = f"(float[2,3,8,8] x) => (float y, float c) {{ c = Conv(x, w) {BEFORE} {BEHIND} d = Concat <axis = 2> (f, e) {NORM} }}"
    result = fastbn.fold(model(text, w=normal(4, 3, 3, 3), ax=ints(2), **BOUNDS, **norm(4)), verify=False)
    assert [kept.code for kept in result.kept] == ["graph-output"]


NORM = "y = BatchNormalization(d, s, t, m, v)"


def test_other_readers_may_undo_what_all_ways_want():
    """Neither way alone changes the value, and a convolution that reads it too makes up for the change."""
    text = f"""(float[2,3,8,8] x) => (float y, float z) {{
        c = Conv(x, w, b) {BEFORE} {BEHIND} d = Concat <axis = 2> (f, e) {NORM} z = Conv(c, w2)
    }}"""
    proto = model(text, b=normal(4), w=normal(4, 3, 3, 3), w2=normal(5, 4, 1, 1), ax=ints(2), **BOUNDS, **norm(4))
    folds(proto, "Conv Slice Slice Concat Conv")


def test_ways_behind_a_norm_that_is_gone_meet_before_it():
    """The first norm goes into the convolution and the second one passes the place where it stood, twice."""
    text = f"""(float[2,3,8,8] x) => (float y) {{
        a = Conv(x, w) c = BatchNormalization(a, s, t, m, v) {BEFORE} {BEHIND} d = Concat <axis = 2> (f, e) {NORM}
    }}"""
    folds(model(text, w=normal(4, 3, 3, 3), ax=ints(2), **BOUNDS, **norm(4)), "Conv Slice Slice Concat")


def test_an_alternative_that_comes_to_nothing_at_the_end_gives_way_to_another():
    """The shift may not go to one half alone, nor to both by half; it goes to the third operand."""
    text = f"""(float[2,3,8,8] x) => (float y) {{
        c = Conv(x, w) {BEFORE.replace("one", "five")} {BEHIND} g = Neg(f) h = Slice(x, nul, five, ax) j = Slice(h, nul, six, ay)
        k = Conv(j, w2) d = Sum(e, g, k) {NORM}
    }}"""
    constants = BOUNDS | {"five": ints(5), "six": ints(6), "ax": ints(2), "ay": ints(3)}
    proto = model(text, w=normal(4, 3, 3, 3), w2=normal(4, 3, 1, 1), **constants, **norm(4))
    result = fastbn.fold(proto)
    assert not result.kept
    assert_same(proto, result.model)


def test_the_search_gives_up_after_as_many_nodes_as_any_other():
    """Each sum has three ways to share the shift, and none comes to anything."""
    steps = " ".join(f"c{at + 1} = Sub(c{at}, c{at})" for at in range(40))
    text = f"(float[2,3] x) => (float y) {{ c0 = Gemm(x, w) {steps} y = BatchNormalization(c40, s, t, m, v) }}"
    result = fastbn.fold(model(text, w=normal(3, 4), **norm(4)), verify=False)
    assert len(result.kept) == 1


def test_half_a_shift_is_exact():
    text = "(float[2,3] x) => (float y) { c = Gemm(x, w, b) d = Add(c, c) y = BatchNormalization(d, s, t, m, v) }"
    parameters = {name: np.float32([value] * 4) for name, value in zip("stmv", (3, 5, 0, 1), strict=True)}
    proto = model(text, w=normal(3, 4), b=np.zeros(4, np.float32), **parameters)
    result = folds(proto, "Gemm Add")
    bias = next(tensor for tensor in result.model.graph.initializer if tensor.name == "b")
    np.testing.assert_array_equal(np.frombuffer(bias.raw_data, np.float32), np.float32(2.5))


def asked_of_parts(affines, axis=1, parts=3, x="2,6,6"):
    """Return what a Split, whose parts are y0, y1, ..., makes of affines that some of them are asked for."""
    names = [f"y{at}" for at in range(parts)]
    outputs = ", ".join(names)
    proto = model(f"(float[{x}] x) => ({outputs}) {{ {outputs} = Split <axis = {axis}> (x, k) }}", k=ints(*[6 // parts] * parts))
    view = GraphView(Index(storage.load(proto)))
    (node,) = view.index.order
    ((slot, affine),) = row_of(node, view).meet(node, affines, view).passed_on
    assert slot == 0
    return affine


def test_parts_ask_of_the_whole_what_others_have_to_leave_alone():
    one, other = Affine(np.float64([2, 3]), np.float64([0, 1]), 1), Affine(np.float64([4]), np.float64([5]), None)
    affine = asked_of_parts({0: one, 2: other})
    assert (affine.scale.tolist(), affine.shift.tolist(), affine.axis) == ([2, 3, 1, 1, 4, 4], [0, 1, 0, 0, 5, 5], 1)
    assert not affine.free.any()
    free = Affine(one.scale, one.shift, 1, free=np.array([True, False]))
    assert asked_of_parts({0: free, 2: other}).free.tolist() == [True, *[False] * 5]


def test_parts_along_another_axis_ask_for_the_same():
    one = Affine(np.arange(1.0, 7), np.zeros(6), 1)
    assert asked_of_parts({0: one, 1: one, 2: one}, axis=2).equals(one)
    for affines, code in (({0: one, 1: one}, "other-outputs"), ({0: one, 1: one, 2: one.times(2)}, "other-branch")):
        with pytest.raises(Refusal) as caught:
            asked_of_parts(affines, axis=2)
        assert caught.value.code == code


def test_parts_along_different_axes_do_not_meet():
    one, other = Affine(np.float64([2, 3]), np.zeros(2), 1), Affine(np.arange(1.0, 7), np.zeros(6), 2)
    with pytest.raises(Refusal, match="along different axes"):
        asked_of_parts({0: one, 1: other})


@pytest.mark.parametrize(
    "tail", ["u = Shape(g) z = Cast <to = 1> (u)", "g2 = Transpose(g) u = Size(g2) z = Cast <to = 1> (u)", "g2 = Neg(g)"]
)
def test_who_reads_the_shape_of_a_part_alone_sees_no_elements(tail):
    """So PyTorch writes zeros of the size of a part: nobody sees the elements of that part. Nor does somebody whom nobody reads."""
    outputs = "float y, float z" if "z =" in tail else "float y"
    text = f"(float[2,3,8,8] x) => ({outputs}) {{ c = Conv(x, w) g = Slice(c, nul, one, ax) {tail} d = Identity(c) {NORM} }}"
    proto = model(text, w=normal(4, 3, 3, 3), ax=ints(2), nul=ints(0), one=ints(1), **norm(4))
    result = fastbn.fold(proto)
    assert [kept.code for kept in result.kept] == (["other-readers"] if "Neg" in tail else [])
    assert_same(proto, result.model)


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        (f"{CUT} d = SequenceAt(q, nul) e = SequenceAt(q, nul) z = Tanh(e)", "SequenceAt 'e' reads the value 'q' before it too"),
        ("q = SequenceConstruct(c, c) d = SequenceAt(q, nul)", "SequenceAt 'd' reads a sequence that is not one value in parts"),
        ("q = SplitToSequence <axis = 1> (c) d = SequenceAt(q, nul)", "which part SequenceAt 'd' takes, and of what, is not known"),
        ("q = SplitToSequence <axis = 1> (c, k) d = SequenceAt(q, h)", "which part SequenceAt 'd' takes, and of what, is not known"),
        ("q = SplitToSequence <axis = 1> (c, h2) d = SequenceAt(q, nul)", "the sizes of the parts at SplitToSequence 'q' are not known"),
        ("q = SplitToSequence <axis = 1> (c, few) d = SequenceAt(q, nul)", "3 channels meet the 4 output channels of Conv 'c'"),
    ],
)
def test_a_part_of_a_sequence_that_is_not_known_takes_nothing(nodes, reason):
    text = (
        f"(float[2,3,8,8] x, int64 h, int64[2] h2) => (float y{', float z' if 'z =' in nodes else ''}) {{ c = Conv(x, w) {nodes} {NORM} }}"
    )
    numbers = {name: value for name, value in {"nul": np.int64(0), "k": np.int64(2), "few": ints(2, 1)}.items() if name in nodes}
    result = fastbn.fold(model(text, w=normal(4, 3, 3, 3), **numbers, **norm(2)), verify=False)
    assert [reason in kept.reason for kept in result.kept] == [True], result.kept


def test_a_part_that_a_sequence_does_not_have():
    text = f"(float[2,3,8,8] x) => (float y) {{ c = Conv(x, w) q = SplitToSequence <axis = 1> (c, k) d = SequenceAt(q, at) {NORM} }}"
    with pytest.raises(ModelError, match="Expected the position of one of 2 parts, got 2 - at `d`"):
        fastbn.fold(model(text, w=normal(4, 3, 3, 3), k=np.int64(2), at=np.int64(2), **norm(2)))
