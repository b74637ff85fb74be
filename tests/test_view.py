"""The view of a graph in which plans have happened: who gives and who reads a value, constants as plans have left them."""

import numpy as np
import pytest
from sketch import model, norm, normal

from fastbn.errors import ModelError
from fastbn.graph.model import storage
from fastbn.graph.model.constant import Dense
from fastbn.graph.model.index import Index
from fastbn.graph.planner.plan import MOST_SLOTS, Plan
from fastbn.graph.planner.planning import plan
from fastbn.graph.planner.view import GraphView
from fastbn.graph.reasons import Refusal

CHAIN = """(float[2,3,6,6] x) => (float y) {
    c = Conv(x, w) a = Identity(c) b = Identity(a) d = Identity(b) h = Shape(b) y = Tanh(d) z = Sigmoid(b)
}"""


def viewed(text=CHAIN, **constants):
    """Return (view, nodes by name) of a model."""
    view = GraphView(Index(storage.load(model(text, **(constants or {"w": normal(4, 3, 1, 1)})))))
    return view, {node.label: node for node in view.index.order}


def names(uses):
    return [(node.label, slot) for node, slot in uses]


def test_removed_nodes_are_followed_to_what_stands_there():
    view, nodes = viewed()
    value = {name: node.outputs[0] for name, node in nodes.items()}
    for name in ("b", "a", "d"):
        view.remove(nodes[name], nodes[name].inputs[0])
    assert {name for name in "abcd" if view.source(value[name]) is value["c"]} == set("abcd")
    assert view.source(value["y"]) is value["y"]
    assert sorted(names(view.readers(value["c"]))) == [("y", 0), ("z", 0)]
    assert sorted(names(view.readers(value["d"]))) == [("y", 0), ("z", 0)]


def test_readers_of_shapes_alone_see_no_elements():
    view, nodes = viewed()
    assert sorted(names(view.readers(nodes["b"].outputs[0]))) == [("d", 0), ("z", 0)]


def test_other_readers_are_those_besides_the_asker_and_not_more_than_are_asked_for():
    view, nodes = viewed()
    value = nodes["b"].outputs[0]
    assert names(view.other_readers(value, [(nodes["z"], 0)], 5)) == [("d", 0)]
    assert names(view.other_readers(value, [(nodes["y"], 0)], 1)) == [("d", 0)]
    assert len(view.other_readers(value, [(nodes["y"], 0)], 5)) == 2
    view.refuse_readers(nodes["a"].outputs[0], nodes["b"], 0)
    with pytest.raises(Refusal, match="Identity 'd' reads the value 'b' before it too"):
        view.refuse_readers(value, nodes["z"], 0)


def test_the_caller_of_the_model_sees_its_outputs_wherever_they_stand():
    view, nodes = viewed()
    with pytest.raises(Refusal) as caught:
        view.readers(nodes["y"].outputs[0])
    assert (caught.value.code, caught.value.sentence) == ("graph-output", "the value 'y' on the way is a graph output")
    view.remove(nodes["y"], nodes["d"].outputs[0])
    with pytest.raises(Refusal, match="the value 'y' on the way"):
        view.readers(nodes["d"].outputs[0])


def test_a_node_that_another_replaces():
    view, nodes = viewed()
    view.replaced[nodes["d"]] = (nodes["z"],)
    assert view.producer(nodes["d"].outputs[0]) is nodes["z"]
    assert view.producer(nodes["a"].outputs[0]) is nodes["a"]
    assert view.producer(nodes["c"].inputs[0]) is None
    assert names(view.readers(nodes["b"].outputs[0])) == [("z", 0), ("z", 0)]


def test_constants_are_those_that_plans_have_made():
    view, nodes = viewed()
    conv = nodes["c"]
    assert (view.has(conv, 1), view.has(conv, 2)) == (True, False)
    assert (view.is_changed(conv, 1), view.is_changed(conv, 2)) == (False, False)
    new = Dense.zeros((4,), np.dtype(np.float32))
    view.apply(Plan(constants={(conv, 2): new}))
    assert (view.has(conv, 2), view.is_changed(conv, 2), view.tensor(conv, 2)) == (True, True, new)
    assert view.tensor(conv, 1).shape == (4, 3, 1, 1)
    assert view.weight(conv, 2) is new


def test_a_bias_that_is_absent_is_zero_and_one_of_another_shape_is_an_error():
    view, nodes = viewed()
    assert view.bias(nodes["c"], 2, (4,), np.dtype(np.float32)).values.tolist() == [0, 0, 0, 0]
    assert view.bias(nodes["c"], 1, (4, 3, 1, 1), np.dtype(np.float32)).values.shape == (4, 3, 1, 1)
    with pytest.raises(ModelError, match=r"Expected a bias of shape \(4,\), got shape \(4, 3, 1, 1\) - at `c`"):
        view.bias(nodes["c"], 1, (4,), np.dtype(np.float32))


WEIGHTS = """(float[2,3] x, float[3,4] given) => (float y) {
    a = Gemm(x, given) e = Exp(given) b = Gemm(x, e) c = Gemm(x, w) q = Gemm(x, i) y = Tanh(a)
}"""


def test_why_there_is_no_weight():
    view, nodes = viewed(WEIGHTS, w=normal(3, 4), i=np.ones((3, 4), np.int64))
    assert view.weight(nodes["c"], 1).shape == (3, 4)
    reasons = {}
    for name in ("a", "b", "q"):
        with pytest.raises(Refusal) as caught:
            view.weight(nodes[name], 1)
        reasons[name] = caught.value.code, caught.value.sentence
    assert reasons["a"] == ("dynamic-weight", "the weight 'given' of Gemm 'a' is a graph input")
    assert reasons["b"] == ("dynamic-weight", "the weight 'e' of Gemm 'b' is computed when the model runs")
    assert reasons["q"] == ("unsupported-type", "the weight 'i' of Gemm 'q' is int64")
    with pytest.raises(ModelError, match="Expected a weight, got none - at `c`"):
        view.weight(nodes["c"], 2)


def test_a_refusal_holds_while_the_graph_is_the_same():
    view, nodes = viewed()
    node = nodes["y"]
    assert not view.is_refused(node, "split")
    behind, ahead = Refusal("reads-input", "behind"), Refusal("unused", "ahead")
    view.note_refused(node, "rearrange", behind, ahead)
    assert view.refused(node) == (behind, ahead)
    assert [view.is_refused(node, strategy) for strategy in ("plain", "rearrange", "split")] == [False, True, True]
    assert not view.is_refused(nodes["z"], "split")
    view.remove(nodes["d"], nodes["b"].outputs[0])
    assert not view.is_refused(node, "rearrange")
    view.note_refused(node, "plain", behind, ahead)
    assert [view.is_refused(node, strategy) for strategy in ("plain", "rearrange")] == [True, False]
    view.owner[nodes["a"]] = Plan()
    assert not view.is_refused(node, "plain")


def test_a_shift_may_stay_where_there_is_a_matmul():
    assert not viewed()[0].keeps_shifts()
    assert viewed("(float[2,3] x) => (float y) { y = MatMul(x, w) }", w=normal(3, 4))[0].keeps_shifts()


def test_plans_that_join_are_one():
    view, nodes = viewed()
    first, second, third = Plan(channels=3, number=1), Plan(channels=5, number=2), Plan(number=3)
    first.joined, second.joined = second, third
    view.owner[nodes["a"]] = first
    assert view.owned(nodes["a"]) is third
    assert view.owned(nodes["b"]) is None
    a, b, new = nodes["a"], nodes["b"], Dense.zeros((4,), np.dtype(np.float32))
    c_node = nodes["c"]
    c = c_node.outputs[0]
    other = Plan(
        constants={(a, 1): new},
        attributes={a: {"axis": 1}},
        lifted=[a],
        bypassed={b: a.outputs[0]},
        rewritten=[b],
        replaced={a: (b,)},
        path={a: None},
        absorbers={b: None},
        crossed={a: None},
        beside={c_node: None},
        alike={b: None},
        widened={c: (4,)},
        channels=4,
    )
    second.join(other)
    assert (second.constants, second.attributes, second.lifted, second.bypassed) == (
        {(a, 1): new},
        {a: {"axis": 1}},
        [a],
        {b: a.outputs[0]},
    )
    assert ([*second.beside], [*second.alike], second.widened) == ([c_node], [b], {c: (4,)})
    assert ([*second.replaced], [*second.path], [*second.absorbers], [*second.crossed], second.channels) == ([a], [a], [b], [a], 5)
    first.join(other)
    assert first.channels == 4


def test_a_plan_forgets_a_node():
    _, nodes = viewed()
    a, b, new = nodes["a"], nodes["b"], Dense.zeros((4,), np.dtype(np.float32))
    slots = {(node, slot): new for node in (a, b) for slot in range(MOST_SLOTS)}
    held = Plan(dict(slots), {a: {}, b: {}}, path=dict.fromkeys([a, b]), absorbers=dict.fromkeys([a, b]))
    held.forget(a)
    held.forget(nodes["c"])
    assert {node for node, _ in held.constants} == {*held.attributes} == {*held.path} == {*held.absorbers} == {b}
    assert len(held.constants) == MOST_SLOTS == 5


def test_attributes_that_plans_set():
    view, nodes = viewed()
    assert view.planned_attributes(nodes["a"]) == {}
    view.owner[nodes["a"]] = Plan(attributes={nodes["a"]: {"axis": 3}})
    view.owner[nodes["b"]] = Plan()
    assert view.planned_attributes(nodes["a"]) == {"axis": 3}
    assert view.planned_attributes(nodes["b"]) == {}


def test_what_planning_leaves():
    """Removed nodes are followed to the end, and the plan knows where each affine went."""
    text = """(float[2,3,6,6] x) => (float y) {
        c = Conv(x, w) n = BatchNormalization(c, s, t, m, v) a = Mul(n, k) r = Relu(a) o = BatchNormalization(r, s, t, m, v) y = Conv(o, w2)
    }"""
    index = Index(storage.load(model(text, w=normal(4, 3, 1, 1), w2=normal(5, 4, 1, 1), k=normal(4, 1, 1), **norm(4))))
    planning = plan(index)
    nodes = {node.label: node for node in index.order}
    view = planning.view
    assert {node.label: value.name for node, value in view.removed.items()} == {"n": "c", "a": "c", "o": "r"}
    assert [node.label for node in view.forwarded] == ["o"]
    assert [([node.label for node in each.lifted], [node.label for node in each.absorbers]) for each in planning.plans] == [
        (["n", "a"], ["c"]),
        (["o"], ["y"]),
    ]
    assert view.owned(nodes["c"]) is view.owned(nodes["n"]) is planning.plans[0]
    assert view.affine(nodes["r"]) is None


def lifted_together(text, **constants):
    return [[node.label for node in each.lifted] for each in plan(Index(storage.load(model(text, **constants)))).plans]


def test_a_fold_behind_a_removed_node_is_one_with_that_nodes_fold():
    """The MatMul takes the scale before it, the Gemm the rest: the second fold stands on the first."""
    text = "(float[2,3] x) => (float y) { c = MatMul(x, w) a = Mul(c, k) n = BatchNormalization(a, s, t, m, v) y = Gemm(n, w2) }"
    assert lifted_together(text, w=normal(3, 4), k=normal(4), w2=normal(4, 5), **norm(4)) == [["a", "n"]]
    apart = text.replace("a = Mul(c, k)", "b = Mul(c, k) a = Tanh(b)")
    assert lifted_together(apart, w=normal(3, 4), k=normal(4), w2=normal(4, 5), **norm(4)) == [["b"], ["n"]]


def test_nodes_are_taken_in_the_order_of_the_data_flow_whatever_they_are_called():
    text = "(float[2,3] x) => (float y) { c = Gemm(x, w) z = BatchNormalization(c, s, t, m, v) b = Mul(z, k) a = Add(b, k) y = Tanh(a) }"
    assert lifted_together(text, w=normal(3, 4), k=normal(4), **norm(4)) == [["z", "b", "a"]]


def test_nodes_with_the_same_affine_that_leave_with_another_have_gone_the_same_way():
    text = """(float[2,4,6,6] x) => (float y) {
        r = Tanh(x) a, b = Split <axis = 0> (r, k) n = BatchNormalization(a, s, t, m, v) o = BatchNormalization(b, s, t, m, v)
        d = Concat <axis = 0> (n, o) y = Conv(d, w)
    }"""
    planning = plan(Index(storage.load(model(text, k=np.array([1, 1]), w=normal(5, 4, 1, 1), **norm(4)))))
    assert {node.label for node in planning.view.forwarded} == {"n", "o"}
    assert [[node.label for node in each.lifted] for each in planning.plans] == [["n", "o"]]


def test_an_elementwise_node_is_checked_before_it_is_taken_for_an_affine():
    view, nodes = viewed("(float[2,4] x) => (float y) { y = Mul <axis = 1> (x, k) }", k=normal(4))
    with pytest.raises(ModelError, match="attributes that Mul has at opset 17, got 'axis'"):
        view.lifted(nodes["y"])
