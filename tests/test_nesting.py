"""Graphs within a model: bodies up to a depth, functions up to a size, and none that calls itself."""

import onnx
import pytest
from onnx import AttributeProto, TensorProto, helper
from sketch import ops

import fastbn
from fastbn.graph.model.nesting import DEEPEST, expanded_size

OPSETS = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
PARAMETERS = ["s", "t", "m", "v"]


def nested(depth, calls=2, lowest="BatchNormalization"):
    """Return the model of functions, each of which calls the one below it several times, the lowest one a batch normalization."""
    functions = []
    for level in range(depth):
        op, domain = (f"level{level - 1}", "local") if level else (lowest, "local" if lowest.startswith("level") else "")
        names = ["x", *(f"c{at}" for at in range(calls - 1)), "y"]
        nodes = [helper.make_node(op, [names[at], *PARAMETERS], [names[at + 1]], domain=domain) for at in range(calls)]
        functions.append(helper.make_function("local", f"level{level}", ["x", *PARAMETERS], ["y"], nodes, OPSETS))
    call = helper.make_node(f"level{depth - 1}", ["x", *PARAMETERS], ["y"], domain="local")
    tensors = [helper.make_tensor(name, TensorProto.FLOAT, [3], [1.0, 1.0, 1.0]) for name in PARAMETERS]
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 3, 4, 4]) for name in "xy"]
    graph = helper.make_graph([call], "g", infos[:1], infos[1:], tensors)
    return helper.make_model(graph, functions=functions, opset_imports=OPSETS, ir_version=8)


@pytest.mark.parametrize(("depth", "calls", "size"), [(1, 1, 1), (3, 2, 8), (10, 2, 1024), (40, 3, 3**40)])
def test_the_size_of_a_model_without_its_functions(depth, calls, size):
    assert expanded_size(nested(depth, calls)) == size


@pytest.mark.parametrize(("depth", "lowest"), [(1, "level0"), (3, "level1"), (3, "level2")])
def test_a_function_that_calls_itself_is_refused(depth, lowest):
    with pytest.raises(fastbn.ModelError, match=r"Cannot expand the function 'level[0-9]*': it calls itself"):
        fastbn.fold(nested(depth, lowest=lowest), verify=False)


def with_a_norm_at_every_level(depth):
    proto = nested(depth)
    for function in proto.functions:
        function.node[-1].output[0] = "last"
        function.node.append(helper.make_node("BatchNormalization", ["last", *PARAMETERS], ["y"]))
    return proto


def test_functions_that_expand_to_too_much_stay(monkeypatch):
    result = fastbn.fold(with_a_norm_at_every_level(4), verify=False)
    assert ops(result.model) == "BatchNormalization"
    monkeypatch.setattr("fastbn.graph.job.LARGEST_INLINED", 20)
    result = fastbn.fold(with_a_norm_at_every_level(4), verify=False)
    assert {kept.code for kept in result.kept} == {"in-function"}
    # Neither the inliner nor inference expands these: there are 2^40 nodes.
    result = fastbn.fold(with_a_norm_at_every_level(40), verify=False)
    assert {kept.code for kept in result.kept} == {"in-function"}


def test_inference_leaves_functions_that_expand_to_too_much_alone(monkeypatch):
    seen = []
    infer = onnx.shape_inference.infer_shapes

    def watched(proto, **options):
        seen.append(len(proto.functions))
        return infer(proto, **options)

    monkeypatch.setattr(onnx.shape_inference, "infer_shapes", watched)
    fastbn.fold(with_norm_behind(nested(3)), verify=False)
    assert max(seen) == 3
    seen.clear()
    monkeypatch.setattr("fastbn.graph.model.index.LARGEST_INLINED", 5)
    fastbn.fold(with_norm_behind(nested(3)), verify=False)
    assert max(seen) == 0


def with_norm_behind(proto):
    """Return a model with a Gemm and a batch normalization of what the functions give: planning asks for shapes."""
    graph = proto.graph
    graph.node[0].output[0] = "f"
    for function in proto.functions:
        for node in function.node:
            node.op_type, node.domain = ("Relu", "") if node.op_type == "BatchNormalization" else (node.op_type, node.domain)
            del node.input[1 if node.op_type == "Relu" else 5 :]
    graph.node.append(helper.make_node("Mul", ["f", "s"], ["e"]))
    graph.node.append(helper.make_node("BatchNormalization", ["e", *PARAMETERS], ["y"]))
    return proto


def deep(depth):
    """Return a model with branches within branches, made in place: protobuf copies no deeper ones."""
    proto = nested(1)
    del proto.functions[:]
    graph = proto.graph
    for level in range(depth):
        node = graph.node[0] if level == 0 else graph.node.add()
        node.Clear()
        node.op_type = "If"
        node.input.append("flag")
        node.output.append("y" if level == 0 else f"y{level}")
        branches = [node.attribute.add(name=name, type=AttributeProto.GRAPH).g for name in ("then_branch", "else_branch")]
        branches[1].node.add(op_type="Identity", input=["x"], output=[f"e{level}"])
        branches[1].output.add(name=f"e{level}")
        branches[0].output.add(name=f"y{level + 1}")
        graph = branches[0]
    graph.node.add(op_type="Identity", input=["x"], output=[f"y{depth}"])
    proto.graph.input.append(helper.make_tensor_value_info("flag", TensorProto.BOOL, []))
    return proto


def test_bodies_within_bodies_have_a_limit():
    assert not fastbn.fold(deep(DEEPEST), verify=False).kept
    for depth in (DEEPEST + 1, 31, 1000):
        with pytest.raises(fastbn.ModelError, match=f"Expected at most {DEEPEST} graphs within graphs, got more"):
            fastbn.fold(deep(depth), verify=False)
