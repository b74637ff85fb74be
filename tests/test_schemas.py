"""The inputs, outputs and attributes that the schema of an operator demands of a node."""

import onnx
import pytest
from onnx import AttributeProto
from sketch import conv_bn, ops

import fastbn


def attribute(name, **values):
    return AttributeProto(name=name, **values)


def conv_with(*attributes):
    proto = conv_bn()
    proto.graph.node[0].attribute.extend(attributes)
    return proto


def changed(change):
    proto = conv_bn()
    change(proto.graph.node)
    return proto


INT = AttributeProto.INT

WRONG = {
    "an input too few": (
        changed(lambda nodes: nodes[1].input.pop()),
        r"Expected an input 4 \('input_var'\) of BatchNormalization",
    ),
    "an empty input": (changed(lambda nodes: nodes[0].input.__setitem__(1, "")), r"Expected an input 1 \('W'\) of Conv, got none - at `c`"),
    "no output": (changed(lambda nodes: nodes[0].output.pop()), r"Expected an output 0 \('Y'\) of Conv, got none - at `c`"),
    "a type": (conv_with(attribute("strides", type=INT, i=1)), "Expected an attribute 'strides' of type INTS, got INT - at `c`"),
    "no type": (conv_with(attribute("group", i=1)), "Expected an attribute 'group' of type INT, got UNDEFINED - at `c`"),
    "a graph in a node that has none": (
        changed(lambda nodes: nodes[1].attribute.append(attribute("body", type=AttributeProto.GRAPH))),
        "Expected no graph in BatchNormalization, got the attribute 'body' - at `y`",
    ),
    "a reference": (
        conv_with(attribute("group", type=INT, ref_attr_name="n")),
        "Expected a value of the attribute 'group', got a reference",
    ),
    "two": (conv_with(*[attribute("group", type=INT, i=1)] * 2), "Expected one attribute 'group', got two - at `c`"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_node_that_is_none_is_refused_in_one_line(case):
    proto, message = WRONG[case]
    with pytest.raises(fastbn.ModelError, match=message) as caught:
        fastbn.fold(proto, verify=False)
    assert "\n" not in str(caught.value)


def test_an_operator_lacks_what_it_demands():
    proto = conv_bn("(float[N,3,8,8] x) => (float y) { c = Conv(x, w, b) n = BatchNormalization(c, s, t, m, v) y = DepthToSpace(n) }")
    with pytest.raises(fastbn.ModelError, match="Expected an attribute 'blocksize' of DepthToSpace, got none - at `y`"):
        fastbn.fold(proto, verify=False)
    proto = conv_bn(
        '(float[N,3,8,8] x) => (float y) { c = Conv(x, w, b) n = BatchNormalization(c, s, t, m, v) y = Concat <axis = 0> (n, "") }'
    )
    with pytest.raises(fastbn.ModelError, match="Expected names for all inputs of Concat, got an empty one - at `y`"):
        fastbn.fold(proto, verify=False)


# Only another version of the operator has the attribute: its type is checked, and that this opset lacks it is no error.
def test_an_attribute_of_another_version_has_its_type():
    text = "(float[N,3,8,8] x) => (float y) { c = Conv(x, w, b) n = BatchNormalization(c, s, t, m, v) y = Squeeze <axes = %s> (n) }"
    assert ops(fastbn.fold(conv_bn(text % "[0]"), verify=False).model) == "Conv Squeeze"
    with pytest.raises(fastbn.ModelError, match="Expected an attribute 'axes' of type INTS, got FLOAT - at `y`"):
        fastbn.fold(conv_bn(text % "0.5"), verify=False)


@pytest.mark.parametrize("version", [0, -1, -(1 << 63), (1 << 63) - 1])
def test_an_opset_that_is_none_is_refused(version):
    proto = conv_bn()
    proto.opset_import[0].version = version
    with pytest.raises(fastbn.ModelError, match="Expected a version of ONNX's operators of 1 or more"):
        fastbn.fold(proto, verify=False)


# The first schemas demand a hint, consumed_inputs, which later exporters do not write.
def test_the_first_opset_is_read():
    proto = conv_bn(opset=1)
    assert proto.graph.node[1].op_type == "BatchNormalization"
    assert fastbn.fold(proto, verify=False).kept


def test_an_operator_that_onnx_does_not_know_is_let_alone():
    text = "(float[N,3,8,8] x) => (float y) { c = Conv(x, w, b) n = BatchNormalization(c, s, t, m, v) y = Mystery(n) }"
    assert ops(fastbn.fold(conv_bn(text), verify=False).model) == "Conv Mystery"
    assert not onnx.defs.has("Mystery")
