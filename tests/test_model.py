"""The index: constants however they are written, scopes, captures, readers, what a caller may override, and malformed graphs."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from sketch import assert_same, conv_bn, folds, model, norm, normal, ops, refuses

import fastbn
from fastbn.graph.model import storage
from fastbn.graph.model.index import Index
from fastbn.graph.model.node import Node

# A bias of shape (4,), as exporters write it; z, four, two and one are initializers.
BIASES = {
    "Constant": "b = Constant <value = float[4] {0.5, -1, 2, 0}> ()",
    "value_floats": "b = Constant <value_floats = [0.5, -1.0, 2.0, 0.0]> ()",
    "value_float, Expand": "o = Constant <value_float = 0.5> () b = Expand(o, four)",
    "value_ints, ConstantOfShape": "n = Constant <value_ints = [4]> () b = ConstantOfShape <value = float[1] {0.25}> (n)",
    "ConstantOfShape": "b = ConstantOfShape(four)",
    "Expand": "b = Expand(z, four)",
    "Cast": "i = Constant <value = int64[4] {1, 2, 3, 4}> () b = Cast <to = 1> (i)",
    "CastLike": "i = Constant <value_int = 1> () l = CastLike(i, w) b = Expand(l, four)",
    "Shape, Slice": "n = Shape(w) first = Slice(n, zero, four0) b = ConstantOfShape(first)",
    "Shape with start and end": "n = Shape <start = 0, end = 1> (w) b = ConstantOfShape(n)",
    "Identity": "o = Identity(z4) b = Identity(o)",
    "Squeeze": "b = Squeeze(row, zero)",
    "Reshape": "b = Reshape(row, four)",
    "Concat": "b = Concat <axis = 0> (two, two)",
    "arithmetic": "o = Mul(z4, z4) p = Add(o, z4) q = Sqrt(o) b = Sub(p, q)",
}


@pytest.mark.parametrize("how", BIASES)
def test_a_computed_constant_is_a_constant(how):
    text = f"""(float[N,3,8,8] x) => (float[N,4,6,6] y) {{
        {BIASES[how].replace(") ", ")" + chr(10))}
        c = Conv(x, w, b)
        y = BatchNormalization(c, s, t, m, v)
    }}"""
    helpers = {"z": np.float32(0.75), "four": np.array([4]), "zero": np.array([0]), "four0": np.array([1]), "z4": normal(4)}
    helpers |= {"row": normal(1, 4), "two": normal(2)}
    used = {name: value for name, value in helpers.items() if f"{name}," in text or f"{name})" in text}
    folds(conv_bn(text, b=None, **used), "Conv")


@pytest.mark.parametrize("scalar", ["o = Constant <value_float = 0.5> ()", "o = Identity(z)", "o = Constant <value = float {0.5}> ()"])
def test_a_scalar_constant_stays_a_scalar(scalar):
    text = f"""(float[N,3,8,8] x) => (float[N,1,6,6] y) {{
        {scalar}
        b = Unsqueeze(o, zero)
        c = Conv(x, w, b)
        y = BatchNormalization(c, s, t, m, v)
    }}"""
    more = {"z": np.float32(0.75)} if "z)" in scalar else {}
    folds(conv_bn(text, b=None, w=normal(1, 3, 3, 3), zero=np.array([0]), **more, **norm(1)), "Conv")


def test_parameters_behind_constants_and_identities():
    text = """(float[N,3,8,8] x) => (float[N,4,6,6] y) {
        c = Conv(x, w, b)
        scale = Identity(s)
        var = Constant <value = float[4] {1, 2, 3, 4}> ()
        y = BatchNormalization(c, scale, t, m, var)
    }"""
    folds(conv_bn(text, v=None), "Conv")


def test_a_huge_computed_constant_is_not_evaluated():
    text = """(float[N,3,8,8] x) => (float[N,4,6,6] y) {
        n = Constant <value_ints = [4000000000000]> ()
        b = ConstantOfShape(n)
        c = Conv(x, w, b)
        y = BatchNormalization(c, s, t, m, v)
    }"""
    refuses(conv_bn(text, b=None), "dynamic-weight", verify=False)


@pytest.mark.parametrize("node", ["ConstantOfShape(four)", "Expand(z, four)", "Mul(long, long)"])
def test_the_limit_of_computed_constants(node, monkeypatch):
    text = f"(float[N,3,8,8] x) => (float[N,4,6,6] y) {{ b = {node} c = Conv(x, w, b) y = BatchNormalization(c, s, t, m, v) }}"
    everything = {"four": np.array([4]), "z": np.float32(0.5), "long": normal(4)}
    proto = conv_bn(text, b=None, **{name: value for name, value in everything.items() if name in node})
    assert ops(fastbn.fold(proto, verify=False).model) == "Conv"
    monkeypatch.setattr("fastbn.graph.model.expressions.LARGEST_RESULT", 3)
    refuses(proto, "dynamic-weight", verify=False)


def test_a_constant_that_fails_to_compute_is_none():
    text = """(float[N,3,8,8] x) => (float[N,4,6,6] y) {
        b = Reshape(z, four)
        c = Conv(x, w, b)
        y = BatchNormalization(c, s, t, m, v)
    }"""
    refuses(conv_bn(text, b=None, z=normal(3), four=np.array([4])), "dynamic-weight", verify=False)


@pytest.mark.parametrize("how", ["raw", "typed", "bits"])
def test_tensors_in_every_field(how):
    dtype = np.float16 if how == "bits" else np.float32
    proto = conv_bn(
        """(float16[N,3,8,8] x) => (float16[N,4,6,6] y) {
        c = Conv(x, w, b)
        y = BatchNormalization(c, s, t, m, v)
    }"""
        if how == "bits"
        else "(float[N,3,8,8] x) => (float[N,4,6,6] y) { c = Conv(x, w, b) y = BatchNormalization(c, s, t, m, v) }",
        w=normal(4, 3, 3, 3, dtype=dtype),
        b=normal(4, dtype=dtype),
        **norm(4, dtype=dtype),
    )
    if how != "raw":
        for tensor in proto.graph.initializer:
            values = onnx.numpy_helper.to_array(tensor)
            typed = helper.make_tensor(tensor.name, tensor.data_type, tensor.dims, values.ravel())
            assert not typed.HasField("raw_data")
            tensor.CopyFrom(typed)
    folds(proto, "Conv")


def test_unsorted_nodes_are_read_in_the_order_of_data_flow():
    proto = conv_bn()
    nodes = list(proto.graph.node)[::-1]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    result = fastbn.fold(proto, verify=False)
    assert ops(result.model) == "Conv"


def test_missing_shapes_do_not_stop_a_fold():
    proto = conv_bn()
    proto.graph.output[0].type.Clear()
    proto.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT
    assert ops(fastbn.fold(proto).model) == "Conv"


def test_empty_optional_inputs():
    proto = conv_bn(b=None)
    proto.graph.node[0].input.append("")
    result = folds(proto, "Conv")
    assert result.model.graph.node[0].input[2] == "c.bias"


IF = """(float[N,3,8,8] x, bool flag) => (float[N,4,6,6] y) {
    c = Conv(x, w, b)
    n = BatchNormalization(c, s, t, m, v)
    y = If (flag) <
        then_branch = yes () => (a) { a = Relu(%s) },
        else_branch = no () => (d) { d = Identity(n) }
    >
}"""


def test_a_capture_is_a_reader():
    refuses(conv_bn(IF % "c"), "other-readers", verify=False)
    result = fastbn.fold(conv_bn(IF % "n"))
    assert ops(result.model) == "Conv If"
    assert result.parity.status == "ok"
    assert result.model.graph.node[0].output[0] == "n"


BODY = """(float[N,3,8,8] x, bool flag) => (float[N,4,6,6] y) {
    y = If (flag) <
        then_branch = yes () => (a) { c = Conv(x, w, b) a = BatchNormalization(c, s, t, m, v) },
        else_branch = no () => (d) { d = Conv(x, w) }
    >
}"""


def test_a_fold_inside_a_body_leaves_shared_outer_weights_alone():
    proto = conv_bn(BODY)
    weight = normal(4, 3, 3, 3)
    result = fastbn.fold(proto)
    yes, no = (attribute.g for attribute in result.model.graph.node[0].attribute)
    assert [node.op_type for node in yes.node] == ["Conv"]
    assert no.node[0].input[1] == "w"
    kept = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in result.model.graph.initializer}
    assert kept["w"].tobytes() == weight.tobytes()
    feeds = {"x": normal(2, 3, 8, 8), "flag": np.array(True)}
    for flag in (True, False):
        feeds["flag"] = np.array(flag)
        assert_same(proto, result.model, feeds)


def _listed_as_inputs(proto):
    for tensor in proto.graph.initializer:
        proto.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return proto


def test_initializers_of_ir_version_3_are_constants():
    proto = _listed_as_inputs(conv_bn(ir_version=3, opset=8))
    result = folds(proto, "Conv")
    names = {tensor.name for tensor in result.model.graph.initializer}
    assert names <= {info.name for info in result.model.graph.input}, "before IR version 4 every initializer is listed as an input"


def test_a_new_bias_of_ir_version_3_is_listed_as_an_input():
    proto = _listed_as_inputs(conv_bn(b=None, ir_version=3, opset=8))
    result = folds(proto, "Conv")
    assert "c.bias" in {info.name for info in result.model.graph.input}


def test_what_a_caller_may_override_is_refused_until_it_is_frozen():
    proto = _listed_as_inputs(conv_bn())
    assert "--freeze-inputs" in refuses(proto, "overridable-parameters")
    result = fastbn.fold(proto, freeze_inputs=True)
    assert ops(result.model) == "Conv"
    assert [info.name for info in result.model.graph.input] == ["x"]
    assert result.parity.status == "ok"


def test_an_overridable_weight_is_refused_until_it_is_frozen():
    proto = conv_bn()
    proto.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [4, 3, 3, 3]))
    sentence = refuses(proto, "overridable-weight")
    assert "'w' of Conv 'c'" in sentence
    assert "--freeze-inputs" in sentence
    assert ops(fastbn.fold(proto, freeze_inputs=True).model) == "Conv"


def test_a_weight_that_the_model_computes_is_refused():
    text = """(float[N,3,8,8] x, float[4,3,3,3] w) => (float[N,4,6,6] y) {
        c = Conv(x, w, b)
        y = BatchNormalization(c, s, t, m, v)
    }"""
    assert "'w'" in refuses(conv_bn(text, w=None), "dynamic-weight", verify=False)


def test_a_sparse_weight_is_left_alone():
    proto = conv_bn(b=None)
    dense = proto.graph.initializer[0]
    assert dense.name == "w"
    sparse = proto.graph.sparse_initializer.add(dims=[4, 3, 3, 3])
    sparse.values.CopyFrom(helper.make_tensor("w", TensorProto.FLOAT, [2], [1.0, 2.0]))
    sparse.indices.CopyFrom(helper.make_tensor("w_indices", TensorProto.INT64, [2], [0, 5]))
    del proto.graph.initializer[0]
    refuses(proto, "dynamic-weight", verify=False)


def test_shapes_and_readers_of_the_index():
    proto = model(
        """(float[2,3,8,8] x) => (float[2,4] y) {
            c = Conv(x, w)
            p = GlobalAveragePool(c)
            y = Flatten(p)
            unused = Relu(c)
        }""",
        w=normal(4, 3, 3, 3),
    )
    index = Index(storage.load(proto))
    value = index.main.find("c")
    assert index.shape(value) == (2, 4, 6, 6)
    assert [(node.label, slot) for node, slot in value.readers] == [("p", 0), ("unused", 0)]
    assert index.constant(index.main.find("w")).shape == (4, 3, 3, 3)
    assert index.constant(value) is None
    assert index.main.find("y").is_output
    assert index.main.find("nowhere") is None


def test_input_shapes_reach_inference():
    proto = model("(float[N,C,H,W] x) => (y) { y = Relu(x) }")
    index = Index(storage.load(proto), input_shapes={"x": (1, 3, 8, 8)})
    assert index.shape(index.main.find("y")) == (1, 3, 8, 8)


def _renamed(proto, old, new):
    for node in proto.graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
        node.output[:] = [new if name == old else name for name in node.output]
    return proto


BROKEN = {
    "two sources": (lambda proto: _renamed(proto, "c", "x"), "Cannot read the model: the value 'x' has two sources"),
    "cycle": (lambda proto: _cycle(proto), "Cannot order the nodes: '[a-z]' is part of a cycle"),
    "no source": (lambda proto: _no_source(proto), "Expected a value that a node or an input gives, got 'nowhere' - at `c`"),
    "no output": (lambda proto: _no_output(proto), "Expected a value that a node or an input gives, got 'z' - at `graph output`"),
    "names in Latin-1": (lambda proto: _latin(proto), "Expected names in UTF-8"),
}


def _cycle(proto):
    proto.graph.node[0].input[0] = "y"
    return proto


def _no_source(proto):
    proto.graph.node[0].input[0] = "nowhere"
    return proto


def _no_output(proto):
    proto.graph.output[0].name = "z"
    return proto


def _latin(proto):
    proto.graph.node[1].name = "norm"
    return proto.SerializeToString().replace(b"norm", b"n\xf6rm")


@pytest.mark.parametrize("case", BROKEN)
def test_a_graph_that_is_none_is_refused_in_one_line(case):
    change, message = BROKEN[case]
    with pytest.raises(fastbn.ModelError, match=message) as caught:
        fastbn.fold(change(conv_bn()))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [list, list[int]])
def test_an_attribute_has_the_type_that_is_asked_for(kind):
    proto = helper.make_node("Custom", ["x"], ["y"], domain="local", axes=[1, 2], scale=0.5)
    node = Node(proto, Index(storage.load(conv_bn())).main, 0)
    assert node.find_attribute("axes", kind) == node.attribute("axes", [0]) == node.attribute("axes") == [1, 2]
    assert node.find_attribute("other", kind) is None
    with pytest.raises(fastbn.ModelError, match="Expected an attribute 'scale' of type INTS, got FLOAT - at `y`"):
        node.find_attribute("scale", kind)


def test_an_input_or_output_that_must_be_there():
    index = Index(storage.load(conv_bn()))
    node = index.order[0]
    assert node.required_input(0).name == "x"
    assert node.required_output() is node.outputs[0]
    with pytest.raises(fastbn.ModelError, match="Expected an input 9 of Conv, got none - at `c`"):
        node.required_input(9)
    with pytest.raises(fastbn.ModelError, match="Expected an output 1 of Conv, got none - at `c`"):
        node.required_output(1)
