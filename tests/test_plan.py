"""The planner: all or nothing, chains with one home, selection by name, reasons, independence of node order, and that it only reads."""

from typing import get_args

import numpy as np
import pytest
from onnx import helper
from sketch import assert_same, codes, conv_bn, initializers, model, norm, normal, ops

import fastbn
from fastbn.graph.model import storage
from fastbn.graph.model.index import Index
from fastbn.graph.planner.planning import plan
from fastbn.graph.reasons import REASONS, ReasonCode

TWO = """(float[N,3,8,8] x) => (float[N,4,4,4] y) {
    a = Conv(x, w, b)
    first = BatchNormalization(a, s, t, m, v)
    r = Relu(first)
    c = Conv(r, w2)
    second = BatchNormalization(c, s2, t2, m2, v2)
    y = Tanh(second)
}"""


def two():
    return conv_bn(TWO, w2=normal(4, 4, 3, 3), **norm(4, "2", seed=9))


def planned(proto, **options):
    return plan(Index(storage.load(proto)), **options)


def test_planning_only_reads():
    proto = two()
    before = proto.SerializeToString()
    planned(proto)
    assert proto.SerializeToString() == before
    fastbn.fold(proto, verify=False)
    assert proto.SerializeToString() == before


def test_each_norm_is_a_plan_with_its_home():
    found = planned(two())
    assert [([node.label for node in each.lifted], [node.label for node in each.absorbers], each.channels) for each in found.plans] == [
        (["first"], ["a"], 4),
        (["second"], ["c"], 4),
    ]
    assert found.kept == []


@pytest.mark.parametrize(
    ("options", "folded"),
    [
        ({"only": ["first"]}, ["first"]),
        ({"only": ["s*"]}, ["second"]),
        ({"skip": ["fir*"]}, ["second"]),
        ({"only": ["*"], "skip": ["second"]}, ["first"]),
        ({"only": ["first", "second"]}, ["first", "second"]),
        ({"skip": ["*"]}, []),
    ],
)
def test_selection_by_name(options, folded):
    result = fastbn.fold(two(), verify=False, **options)
    assert [fold.bn for fold in result.folded] == folded
    assert codes(result) == ({"not-selected": 2 - len(folded)} if len(folded) < 2 else {})


def test_a_single_glob_may_be_a_string():
    assert [fold.bn for fold in fastbn.fold(two(), verify=False, only="first").folded] == ["first"]


def test_excluded_folds_are_left_out_with_their_sentence():
    found = planned(two(), excluded={(0, 1): "it was wrong"})
    assert [(kept.bn, kept.code, kept.reason) for kept in found.kept] == [("first", "parity", "it was wrong")]


def test_a_chain_is_one_plan_and_all_or_nothing():
    """The Add takes the shift, but its scale finds no home behind it: nothing of it may be applied."""
    proto = model(
        """(float[2,4,3,3] x) => (float[2,4,3,3] y, float[2,4,3,3] z) {
            r = Tanh(x)
            a = Add(r, k)
            z = Sigmoid(a)
            b = BatchNormalization(a, s, t, m, v)
            y = Tanh(b)
        }""",
        k=normal(4, 1, 1),
        **norm(4),
    )
    result = fastbn.fold(proto, verify=False)
    assert result.to_bytes() == proto.SerializeToString()
    assert len(result.kept) == 1


@pytest.mark.parametrize("seed", range(5))
def test_the_result_does_not_depend_on_node_order(seed):
    proto = two()
    reference = fastbn.fold(proto, verify=False)
    nodes = [proto.graph.node[int(number)] for number in np.random.default_rng(seed).permutation(len(proto.graph.node))]
    shuffled = two()
    del shuffled.graph.node[:]
    shuffled.graph.node.extend(nodes)
    result = fastbn.fold(shuffled, verify=False)
    assert sorted(fold.bn for fold in result.folded) == sorted(fold.bn for fold in reference.folded)
    assert {name: array.tobytes() for name, array in initializers(result.model).items()} == {
        name: array.tobytes() for name, array in initializers(reference.model).items()
    }


def test_reasons_have_codes_and_sentences():
    assert list(REASONS) == list(get_args(ReasonCode))
    assert all(code == code.lower() and " " not in code and sentence for code, sentence in REASONS.items())


def test_a_norm_of_a_graph_input_says_so():
    result = fastbn.fold(model("(float[2,4] x) => (float[2,4] y) { a = BatchNormalization(x, s, t, m, v) y = Tanh(a) }", **norm(4)))
    assert codes(result) == {"reads-input": 1}


def test_a_norm_between_two_nonlinearities_stays():
    result = fastbn.fold(
        model("(float[2,4] x) => (float[2,4] y) { a = Tanh(x) b = BatchNormalization(a, s, t, m, v) y = Tanh(b) }", **norm(4))
    )
    (kept,) = result.kept
    assert kept.code in REASONS
    assert "Tanh" in kept.reason


def with_function(text, **constants):
    proto = model(text, imports=["my"], **constants)
    node = helper.make_node("BatchNormalization", ["a", "b", "c", "d", "e"], ["f"], name="inner")
    proto.functions.append(helper.make_function("my", "block", list("abcde"), ["f"], [node], proto.opset_import))
    return proto


def test_a_norm_in_a_model_local_function_that_cannot_go_is_reported():
    proto = with_function("(float[2,4] x) => (float[2,4] y) { y = my.block(x, s, t, m, v) }", **norm(4))
    result = fastbn.fold(proto)
    (kept,) = result.kept
    assert (kept.bn, kept.code) == ("inner", "in-function")
    assert "'block'" in kept.reason
    assert result.to_bytes() == proto.SerializeToString(), "nothing is inlined in vain"
    assert result.to_dict()["batch_normalizations"] == {"before": 1, "after": 1}


def test_a_norm_in_a_model_local_function_folds_where_it_is_called():
    text = """(float[N,3] x) => (float[N,4] y) {
        a = Gemm(x, w)
        b = my.block(a, s, t, m, v)
        c = Gemm(b, u)
        y = my.block(c, s1, t1, m1, v1)
    }"""
    proto = with_function(text, w=normal(3, 4), u=normal(4, 4), **norm(4), **norm(4, "1", seed=5))
    result = fastbn.fold(proto)
    assert result.kept == []
    assert [node.op_type for node in result.model.graph.node] == ["Gemm", "Gemm"]
    assert result.notes == ("model-local function 'block' inlined",)
    assert result.parity.ok
    assert_same(proto, result.model)


def test_several_outputs_of_the_node_before():
    proto = model(
        """(float[2,8] x) => (float[2,4] y) {
            a, b = Split <axis = 1> (x, parts)
            c = BatchNormalization(a, s, t, m, v)
            d = Tanh(c)
            y = Add(d, b)
        }""",
        parts=np.array([4, 4]),
        **norm(4),
    )
    result = fastbn.fold(proto)
    assert len(result.kept) == 1


LOOP = """(float[N,3,8,8] x, int64 trips, bool go) => (float[N,4,6,6] y) {
    c = Conv(x, w, b)
    y = Loop (trips, go, c) <
        body = step (int64 i, bool on, float[N,4,6,6] h) => (bool on2, float[N,4,6,6] n) {
            on2 = Identity(on)
            n = BatchNormalization(h, s, t, m, v)
        }
    >
}"""


def test_a_norm_of_a_loop_state_does_not_leave_the_loop():
    proto = conv_bn(LOOP)
    result = fastbn.fold(proto)
    assert ops(result.model) == "Conv Loop"
    assert len(result.kept) == 1
    assert_same(proto, result.model, {"x": normal(1, 3, 8, 8), "trips": np.array(3), "go": np.array(True)})


CROSSING = """(float[N,3,8,8] x, bool flag) => (float[N,4,6,6] y) {
    c = Conv(x, w, b)
    y = If (flag) <
        then_branch = yes () => (n) { n = BatchNormalization(c, s, t, m, v) },
        else_branch = no () => (d) { d = Tanh(x2) }
    >
    x2 = Conv(x, w, b)
}"""


def test_a_norm_in_a_branch_does_not_change_the_value_outside():
    proto = conv_bn(CROSSING)
    result = fastbn.fold(proto, verify=False)
    assert codes(result) == {"crosses-scope": 1}
    assert result.to_bytes() == proto.SerializeToString()


REPVGG = """(float[1,4,6,6] x) => (float y) {
    d = Conv <pads = [1,1,1,1]> (x, w3)
    dn = BatchNormalization(d, s, t, m, v)
    p = Conv(x, w1)
    pn = BatchNormalization(p, s, t, m, v)
    i = BatchNormalization(x, s, t, m, v)
    sum = Add(dn, pn)
    y = Add(sum, i)
}"""

# Two norms, of which the first can only leave when the second has: in the order of the data flow it comes too early.
BEHIND = """(float[1,4,6,6] x, float[1,3,6,6] z) => (float y) {
    a = Tanh(x)
    n = BatchNormalization(a, s, t, m, v)
    c = Concat <axis = 1> (n, z)
    o = BatchNormalization(c, s7, t7, m7, v7)
    y = Conv(o, w7)
}"""


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("text", [REPVGG, BEHIND], ids=["RepVGG", "behind"])
def test_what_one_fold_makes_possible_is_found_in_any_order(text, seed):
    everything = {"w3": normal(4, 4, 3, 3), "w1": normal(4, 4, 1, 1), "w7": normal(2, 7, 3, 3), **norm(4), **norm(7, "7")}
    used = {name: value for name, value in everything.items() if f"{name}," in text or f"{name})" in text}
    proto = model(text, **used)
    nodes = [proto.graph.node[int(number)] for number in np.random.default_rng(seed).permutation(len(proto.graph.node))]
    shuffled = model(text, **used)
    del shuffled.graph.node[:]
    shuffled.graph.node.extend(nodes)
    result = fastbn.fold(shuffled, verify=False)
    assert result.to_dict()["batch_normalizations"] == {"before": text.count("Batch"), "after": 0}
    expected = fastbn.fold(proto)
    assert expected.parity.status == "ok"
    assert_same(proto, expected.model)


def test_plans_join_where_one_passes_what_the_other_has_dissolved():
    """The Add of the identity goes with one fold; the affine that came through its place may not be verified without it."""
    text = """(float[1,4,6,6] x) => (float y) {
        i = BatchNormalization(x, s, t, m, v)
        d = Conv <pads = [1,1,1,1]> (x, w3)
        p = Conv(x, w1)
        a = Add(p, d)
        b = Add(a, i)
        g = Transpose <perm = [0,2,3,1]> (b)
        h = Transpose <perm = [0,3,1,2]> (g)
        y = Add(h, k)
    }"""
    proto = model(text, w3=normal(4, 4, 3, 3), w1=normal(4, 4, 1, 1), k=normal(4, 1, 1), **norm(4))
    result = fastbn.fold(proto)
    assert [fold.bn for fold in result.folded] == ["i+y"]
    assert_same(proto, result.model)


def test_no_shift_stays_behind_where_another_fold_makes_room_for_all_of_it():
    """At first only the scale of n has a home, in the MatMul before it; when o has gone into the Conv, all of n follows it there."""
    text = """(float[2,4,6] x) => (float y) {
        a = MatMul(w4, x)
        n = BatchNormalization(a, s, t, m, v)
        c = Concat <axis = 1> (n, x)
        o = BatchNormalization(c, s8, t8, m8, v8)
        y = Conv(o, w8)
    }"""
    result = fastbn.fold(model(text, w4=normal(4, 4), w8=normal(2, 8, 3), **norm(4), **norm(8, "8")))
    assert ops(result.model) == "MatMul Concat Conv"
