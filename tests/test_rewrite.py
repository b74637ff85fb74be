"""The writer: names stay, all that no fold changes stays byte for byte, and unused nodes and constants are removed."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from sketch import assert_same, conv_bn, folds, initializers, model, norm, normal, ops

import fastbn


def decorated():
    """Return Conv and BatchNormalization in a model that has every field of ModelProto."""
    proto = conv_bn(
        """(float[N,3,8,8] x) => (float[N,4,6,6] y, float[N,4,6,6] z, float[N,4,6,6] u) {
            c = Conv(x, w, b)
            y = BatchNormalization(c, s, t, m, v)
            z = my.Op <level = 3> (y)
            e = Add(y, sparse)
            u = my.function(e)
        }""",
        imports=["my", "unused.domain"],
    )
    proto.producer_version, proto.domain, proto.model_version, proto.doc_string = "1.2", "org.tests", 7, "a model"
    proto.graph.doc_string = "a graph"
    proto.graph.node[0].doc_string = "a convolution"
    proto.graph.input[0].doc_string = "an image"
    helper.set_model_props(proto, {"author": "me", "classes": "cat,dog"})
    sparse = proto.graph.sparse_initializer.add(dims=[4, 6, 6])
    sparse.values.CopyFrom(helper.make_tensor("sparse", TensorProto.FLOAT, [2], [1.0, 2.0]))
    sparse.indices.CopyFrom(helper.make_tensor("sparse_indices", TensorProto.INT64, [2], [0, 5]))
    proto.graph.value_info.append(helper.make_tensor_value_info("e", TensorProto.FLOAT, ["N", 4, 6, 6]))
    proto.graph.value_info.append(helper.make_tensor_value_info("c", TensorProto.FLOAT, ["N", 4, 6, 6]))
    training = proto.training_info.add()
    training.algorithm.name = "sgd"
    training.algorithm.node.append(helper.make_node("Identity", ["lr"], ["lr2"]))
    training.update_binding.add(key="w", value="w2")
    node = helper.make_node("Relu", ["a"], ["b"])
    proto.functions.append(helper.make_function("my", "function", ["a"], ["b"], [node], proto.opset_import[:1]))
    annotation = proto.graph.quantization_annotation.add(tensor_name="e")
    annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="s")
    return proto


def with_unknown_field(data):
    """Append field 1999 to a serialized message, as a later version of ONNX may."""
    return data + b"\xfa\x7c\x05later"


def test_everything_that_is_not_folded_comes_back_byte_for_byte():
    proto = decorated()
    result = fastbn.fold(with_unknown_field(proto.SerializeToString()))
    folded = onnx.ModelProto.FromString(result.to_bytes())
    assert ops(folded) == "Conv Op Add function"
    assert result.to_bytes().count(b"later") == 1
    expected = onnx.ModelProto.FromString(with_unknown_field(proto.SerializeToString()))
    # Undo by hand what the fold is meant to do; the rest must be the same bytes.
    del expected.graph.node[1]
    expected.graph.node[0].output[0] = "y"
    for name in "stmv":
        entry = next(tensor for tensor in expected.graph.initializer if tensor.name == name)
        expected.graph.initializer.remove(entry)
    expected.graph.value_info.remove(next(info for info in expected.graph.value_info if info.name == "c"))
    for name in "wb":
        new = next(tensor for tensor in folded.graph.initializer if tensor.name == name)
        old = next(tensor for tensor in expected.graph.initializer if tensor.name == name)
        assert new.raw_data != old.raw_data
        old.raw_data = new.raw_data
    expected.graph.initializer.sort(key=lambda tensor: tensor.name)
    folded.graph.initializer.sort(key=lambda tensor: tensor.name)
    assert folded.SerializeToString(deterministic=True) == expected.SerializeToString(deterministic=True)


def test_nothing_folded_is_the_same_bytes(tmp_path):
    proto = decorated()
    del proto.graph.node[1]
    proto.graph.node[0].output[0] = "y"
    # Some exporters write fields in another order than protobuf does: here the IR version comes last.
    data = with_unknown_field(proto.SerializeToString())
    assert data[:2] == b"\x08\x08"
    data = data[2:] + data[:2]
    assert onnx.ModelProto.FromString(data).SerializeToString() != data
    assert fastbn.fold(data, verify=False).to_bytes() == data
    (tmp_path / "in.onnx").write_bytes(data)
    fastbn.fold(tmp_path / "in.onnx", verify=False).save(tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx").read_bytes() == data


def test_names_of_values_nodes_and_weights_stay():
    proto = conv_bn("(float[N,3,8,8] x) => (float[N,4,6,6] y) { c = Conv(x, w, b) n = BatchNormalization(c, s, t, m, v) y = Relu(n) }")
    result = folds(proto, "Conv Relu")
    conv, relu = result.model.graph.node
    assert (conv.name, list(conv.input), list(conv.output)) == ("c", ["x", "w", "b"], ["n"])
    assert (relu.name, list(relu.input)) == ("y", ["n"])
    assert sorted(initializers(result.model)) == ["b", "w"]


def test_a_new_bias_is_named_after_its_node_and_unique_over_all_scopes():
    text = """(float[N,3,8,8] x, bool flag) => (float[N,4,6,6] y) {
        c = Conv(x, w)
        n = BatchNormalization(c, s, t, m, v)
        y = If (flag) <
            then_branch = yes () => (q) { bias2 = Constant <value_float = 1.0> () q = Add(n, bias2) },
            else_branch = no () => (r) { r = Add(n, k) }
        >
    }"""
    proto = conv_bn(text, b=None, k=np.float32(2))
    inner = proto.graph.node[2].attribute[0].g
    inner.node[1].input[1] = inner.node[0].output[0] = "c.bias"
    result = fastbn.fold(proto)
    assert result.model.graph.node[0].input[2] == "c.bias_2"
    assert result.parity.status == "ok"


@pytest.mark.parametrize("use", ["another node", "the body of an If", "a graph output"])
def test_parameters_that_others_read_stay(use):
    outputs, extra = {
        "another node": ("float[N,4,6,6] y, float[4] z", "z = Neg(m)"),
        "the body of an If": (
            "float[N,4,6,6] y, float[4] z",
            "z = If (flag) <then_branch = yes () => (p) { p = Neg(m) }, else_branch = no () => (q) { q = Identity(m) }>",
        ),
        "a graph output": ("float[N,4,6,6] y, float[4] m", ""),
    }[use]
    text = f"(float[N,3,8,8] x, bool flag) => ({outputs}) {{ c = Conv(x, w, b) y = BatchNormalization(c, s, t, m, v) {extra} }}"
    proto = conv_bn(text)
    result = fastbn.fold(proto, verify=False)
    assert sorted(initializers(result.model)) == ["b", "m", "w"]
    feeds = {"x": normal(2, 3, 8, 8), "flag": np.array(True)}
    if use != "a graph output":
        assert_same(proto, result.model, feeds)


def test_dead_constants_and_their_nodes_leave_and_nothing_else():
    text = """(float[N,3,8,8] x) => (float[N,4,6,6] y) {
        zero = ConstantOfShape(four)
        c = Conv(x, w, zero)
        scale = Identity(s)
        y = BatchNormalization(c, scale, t, m, v)
        unused = Relu(x)
    }"""
    proto = conv_bn(text, b=None, four=np.array([4]))
    proto.graph.initializer.append(numpy_helper.from_array(normal(3), "orphan"))
    result = folds(proto, "Conv Relu")
    assert sorted(initializers(result.model)) == ["c.bias", "orphan", "w"]


def test_the_node_of_a_constant_that_others_read_stays():
    text = """(float[N,3,8,8] x) => (float[N,4,6,6] y, float[4] z) {
        zero = ConstantOfShape(four)
        c = Conv(x, w, zero)
        y = BatchNormalization(c, s, t, m, v)
        z = Neg(zero)
    }"""
    result = folds(conv_bn(text, b=None, four=np.array([4])), "ConstantOfShape Conv Neg")
    assert initializers(result.model)["c.bias"].any()


def test_the_last_value_may_be_an_output_with_readers():
    text = """(float[N,3,8,8] x) => (float[N,4,6,6] n, float[N,4,6,6] y) {
        c = Conv(x, w, b)
        n = BatchNormalization(c, s, t, m, v)
        y = Tanh(n)
    }"""
    result = folds(conv_bn(text), "Conv Tanh")
    assert [info.name for info in result.model.graph.output] == ["n", "y"]


def test_a_chain_hands_the_last_name_to_the_convolution():
    text = """(float[N,3,8,8] x) => (float[N,4,6,6] y) {
        c = Conv(x, w, b)
        i = Identity(c)
        n = BatchNormalization(i, s, t, m, v)
        k = Mul(n, two)
        y = Add(k, two)
    }"""
    result = folds(conv_bn(text, two=np.float32(2)), "Conv Identity")
    assert result.model.graph.node[1].output[0] == "y"


def test_value_info_of_a_value_that_changed_its_meaning_leaves():
    proto = conv_bn("(float[N,3,8,8] x) => (float[N,4,6,6] y) { c = Conv(x, w, b) n = BatchNormalization(c, s, t, m, v) y = Relu(n) }")
    for name in "cn":
        proto.graph.value_info.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 4, 6, 6]))
        annotation = proto.graph.quantization_annotation.add(tensor_name=name)
        annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="w")
    graph = folds(proto, "Conv Relu").model.graph
    assert [info.name for info in graph.value_info] == ["n"]
    assert [entry.tensor_name for entry in graph.quantization_annotation] == ["n"]


def test_freeze_inputs_without_any_fold_still_freezes():
    proto = model("(float[N,4] x) => (float[N,4] y) { y = Add(x, k) }", k=normal(4))
    proto.graph.input.append(helper.make_tensor_value_info("k", TensorProto.FLOAT, [4]))
    result = fastbn.fold(proto, freeze_inputs=True)
    assert [info.name for info in result.model.graph.input] == ["x"]


def before_ir_4(proto):
    """Return a model of IR 3, where every initializer is a graph input too."""
    proto.ir_version = 3
    proto.graph.input.extend(helper.make_tensor_value_info(each.name, each.data_type, each.dims) for each in proto.graph.initializer)
    return proto


@pytest.mark.parametrize("unused", [False, True])
def test_freezing_raises_the_ir_version(unused):
    proto = conv_bn(b=None, **({"spare": normal(2)} if unused else {}))
    result = fastbn.fold(before_ir_4(proto), freeze_inputs=True)
    assert ops(result.model) == "Conv"
    assert result.model.ir_version == 4
    assert [info.name for info in result.model.graph.input] == ["x"]
    assert "the IR version is raised to 4" in str(result)
    onnx.checker.check_model(result.model)
    assert_same(proto, result.model)


def test_folding_alone_leaves_the_ir_version():
    proto = before_ir_4(conv_bn(b=None))
    result = folds(proto, "Conv")
    assert result.model.ir_version == 3
    assert result.notes == ()


def test_a_bias_that_grows_is_declared_as_it_is():
    text = "(float[5,3] x) => (float[5,4] y) { c = Gemm(x, w, b) y = BatchNormalization(c, s, t, m, v) }"
    graph = folds(before_ir_4(model(text, w=normal(3, 4), b=normal(1), **norm(4))), "Gemm").model.graph
    declared = {info.name: [dim.dim_value for dim in info.type.tensor_type.shape.dim] for info in graph.input}
    assert declared["b"] == [4]
    assert all(declared[tensor.name] == [*tensor.dims] for tensor in graph.initializer)


def test_the_value_info_of_a_constant_that_changes_its_shape_follows():
    text = (
        "(float[2,4,5] x) => (float[2,3,4] y) { c = MatMul(x, w) h = Transpose<perm = [0, 2, 1]>(c) y = BatchNormalization(h, s, t, m, v) }"
    )
    proto = model(text, w=normal(5, 3), **norm(3))
    proto.graph.value_info.append(helper.make_tensor_value_info("t", TensorProto.FLOAT, [3]))
    result = folds(proto, "MatMul Transpose Add")
    shapes = {info.name: [dim.dim_value for dim in info.type.tensor_type.shape.dim] for info in result.model.graph.value_info}
    assert shapes.get("t", [3, 1]) == list(initializers(result.model)["t"].shape) == [3, 1]


def test_a_fold_inside_nested_bodies():
    text = """(float[N,3,8,8] x, bool flag) => (float[N,4,6,6] y) {
        y = If (flag) <
            then_branch = yes () => (a) {
                a = If (flag) <
                    then_branch = yes2 () => (e) { c = Conv(x, w, b) e = BatchNormalization(c, s, t, m, v) },
                    else_branch = no2 () => (f) { f = Conv(x, w, b) }
                >
            },
            else_branch = no () => (d) { d = Conv(x, w, b) }
        >
    }"""
    proto = conv_bn(text)
    result = fastbn.fold(proto)
    assert len(result.folded) == 1
    for flag in (True, False):
        assert_same(proto, result.model, {"x": normal(1, 3, 8, 8), "flag": np.array(flag)})


def test_the_order_of_nodes_stays():
    text = """(float[N,3,8,8] x) => (float[N,4,6,6] y, float[N,3,8,8] p, float[N,3,8,8] q) {
        p = Relu(x)
        c = Conv(x, w, b)
        q = Tanh(x)
        y = BatchNormalization(c, s, t, m, v)
    }"""
    folds(conv_bn(text), "Relu Conv Tanh")


def test_folding_twice_changes_nothing_more():
    once = fastbn.fold(conv_bn()).to_bytes()
    assert fastbn.fold(once).to_bytes() == once


def test_a_folded_constant_is_rounded_once():
    """Two norms in a row: the weights are those of the exact product, not of two roundings."""
    proto = model(
        "(float[N,3,8,8] x) => (y) { c = Conv(x, w) d = BatchNormalization(c, s, t, m, v) y = BatchNormalization(d, s2, t2, m2, v2) }",
        w=normal(4, 3, 3, 3),
        **norm(4),
        **norm(4, "2", seed=6),
    )
    given = {name: array.astype(np.float64) for name, array in initializers(proto).items()}
    eps = float(np.float32(1e-5))
    scale = given["s"] / np.sqrt(given["v"] + eps) * (given["s2"] / np.sqrt(given["v2"] + eps))
    expected = (given["w"] * scale.reshape(4, 1, 1, 1)).astype(np.float32)
    found = initializers(fastbn.fold(proto, verify=False).model)["w"]
    assert np.abs(found.view(np.int32) - expected.view(np.int32)).max() <= 1
    assert (found == expected).mean() > 0.95


def test_a_norm_whose_home_goes_forward_itself_leaves_the_graph_input_its_name():
    text = "(float[2,4,5,5] x) => (float y) { a = Mul(x, k) n = BatchNormalization(a, s, t, m, v) y = Conv(n, w) }"
    parameters = norm(4)
    parameters["t"] = parameters["m"] = np.zeros(4, np.float32)
    result = folds(model(text, k=normal(4, 1, 1), w=normal(3, 4, 3, 3), **parameters), "Conv")
    assert result.model.graph.node[0].input[0] == "x"


def test_a_norm_whose_home_goes_forward_itself_leaves_the_graph_output_its_name():
    text = """(float[2,4,5,5] x) => (float y, float a) {
        a = Tanh(x)
        n = BatchNormalization(a, s, t, m, v)
        o = BatchNormalization(n, s2, t2, m2, v2)
        y = Conv(o, w)
    }"""
    folds(model(text, w=normal(3, 4, 3, 3), **norm(4), **norm(4, "2")), "Tanh Conv")
