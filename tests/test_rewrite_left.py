"""rewrite_left: a batch normalization that cannot be folded becomes a depthwise Conv, or a Mul and an Add, verified like a fold."""

import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from shell import fails, quick
from sketch import assert_same, codes, conv_bn, initializers, model, norm, normal, ops

import fastbn
from fastbn.arguments import REWRITE_FORMS
from fastbn.cli import main
from fastbn.errors import ArgumentError
from fastbn.graph.parity import fold_parity
from fastbn.graph.planner import substitute
from fastbn.graph.results import SCHEMA
from fastbn.graph.rewrite.version import difference

STUCK = "(float[%s] x) => (float[%s] y) { a = Tanh(x) b = BatchNormalization(a, s, t, m, v) y = Tanh(b) }"
SIZES = {2: "N,4", 3: "N,4,5", 4: "N,4,5,6", 5: "N,4,2,3,2", 6: "N,4,2,1,2,3"}


def stuck(rank=4, **options):
    """Return a model whose BN stands between two Tanh."""
    return model(STUCK % (SIZES[rank], SIZES[rank]), **{**norm(4), **options})


def rewritten(proto, form, expected, **options):
    """Rewrite what is left of a model, demand these operators and the same outputs; return the FoldResult."""
    result = fastbn.fold(proto, rewrite_left=form, **options)
    assert ops(result.model) == expected, [(kept.reason, kept.not_rewritten) for kept in result.kept]
    onnx.checker.check_model(result.model, full_check=True)
    assert result.parity.status == "ok", result.parity
    assert all(each.error <= each.bound for each in result.rewritten)
    assert_same(proto, result.model)
    return result


@pytest.mark.parametrize("rank", [3, 4, 5])
def test_a_depthwise_conv(rank):
    result = rewritten(stuck(rank), "conv", "Tanh Conv Tanh")
    (each,) = result.rewritten
    assert (each.bn, each.op, each.channels, each.code) == ("b", "Conv", 4, "no-absorber")
    conv = result.model.graph.node[1]
    assert (conv.name, list(conv.input), list(conv.output)) == ("b", ["a", "s", "t"], ["b"])
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in conv.attribute}
    assert attributes == {"group": 4, "kernel_shape": [1] * (rank - 2)}
    shapes = {name: array.shape for name, array in initializers(result.model).items()}
    assert shapes == {"s": (4, *[1] * (rank - 1)), "t": (4,)}


@pytest.mark.parametrize("rank", [2, 3, 4, 5, 6])
def test_mul_and_add(rank):
    result = rewritten(stuck(rank), "affine", "Tanh Mul Add Tanh")
    (each,) = result.rewritten
    assert (each.bn, each.op, each.channels) == ("b", "Mul+Add", 4)
    mul, add = result.model.graph.node[1:3]
    assert [(node.name, list(node.input), list(node.output)) for node in (mul, add)] == [
        ("b/scale", ["a", "s"], ["b/scaled"]),
        ("b", ["b/scaled", "t"], ["b"]),
    ]
    assert {name: array.shape for name, array in initializers(result.model).items()} == dict.fromkeys("st", (4, *[1] * (rank - 2)))


@pytest.mark.parametrize("rank", [2, 6])
def test_a_conv_needs_axes_to_move_along(rank):
    result = fastbn.fold(stuck(rank), rewrite_left="conv")
    (kept,) = result.kept
    assert (result.rewritten, kept.code) == ([], "no-absorber")
    assert kept.not_rewritten == f"its data has rank {rank}, that of a Conv has rank 3, 4 or 5; --rewrite-left affine takes any rank"
    assert f"not rewritten: {kept.not_rewritten}" in str(result)
    assert result.to_bytes() == stuck(rank).SerializeToString()


@pytest.mark.parametrize("form", REWRITE_FORMS)
def test_an_unknown_rank_cannot_be_placed(form):
    proto = stuck()
    for info in (*proto.graph.input, *proto.graph.output):
        info.type.tensor_type.ClearField("shape")
    (kept,) = fastbn.fold(proto, rewrite_left=form, verify=False).kept
    assert kept.not_rewritten.startswith("the rank of 'a' is not known")


def typed(kind, opset=17, **parameters):
    proto = stuck(opset=opset, **parameters)
    for info in (*proto.graph.input, *proto.graph.output):
        info.type.tensor_type.elem_type = kind
    return proto


def test_float64_has_no_conv_in_onnxruntime():
    proto = typed(TensorProto.DOUBLE, **norm(4, dtype=np.float64))
    (kept,) = fastbn.fold(proto, rewrite_left="conv").kept
    assert "no Conv of float64" in kept.not_rewritten
    result = rewritten(proto, "affine", "Tanh Mul Add Tanh")
    assert {array.dtype.name for array in initializers(result.model).values()} == {"float64"}


@pytest.mark.parametrize("form", REWRITE_FORMS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_float16_data_whatever_the_parameters_are(form, dtype):
    proto = typed(TensorProto.FLOAT16, **norm(4, dtype=dtype))
    result = fastbn.fold(proto, rewrite_left=form)
    assert ([len(result.rewritten), result.kept], result.parity.status) == ([1, []], "ok")
    assert {array.dtype.name for array in initializers(result.model).values()} == {"float16"}
    assert_same(proto, result.model)


@pytest.mark.parametrize("form", REWRITE_FORMS)
def test_a_scale_beyond_float16_stays(form):
    parameters = {**norm(4, dtype=np.float32), "s": np.float32([1, 1e6, 1, 1])}
    (kept,) = fastbn.fold(typed(TensorProto.FLOAT16, **parameters), rewrite_left=form, verify=False).kept
    assert "would become Inf or NaN in float16, channels 1" in kept.not_rewritten


@pytest.mark.parametrize(("opset", "count"), [(6, 0), (7, 1)])
def test_mul_and_add_broadcast_from_opset_7_on(opset, count):
    proto = stuck(opset=opset)
    if opset < 7:
        proto.graph.node[1].attribute.append(helper.make_attribute("is_test", 1))
    result = fastbn.fold(proto, rewrite_left="affine", verify=False)
    assert len(result.rewritten) == count
    assert [kept.not_rewritten for kept in result.kept] == ["Mul and Add of opset 6 do not broadcast by shape"] * (1 - count)


@pytest.mark.parametrize("form", REWRITE_FORMS)
def test_what_can_be_folded_is_folded(form):
    result = fastbn.fold(conv_bn(), rewrite_left=form)
    assert (ops(result.model), result.rewritten, len(result.folded)) == ("Conv", [], 1)


@pytest.mark.parametrize("form", REWRITE_FORMS)
def test_a_batch_norm_that_has_taken_another_in(form):
    text = "(float[N,4,5] x) => (float[N,4,5] y) { a = Tanh(x) b = BatchNormalization(a, s, t, m, v) "
    text += "c = BatchNormalization(b, s2, t2, m2, v2) y = Tanh(c) }"
    result = rewritten(
        model(text, **norm(4), **norm(4, "2", seed=2)), form, {"conv": "Tanh Conv Tanh", "affine": "Tanh Mul Add Tanh"}[form]
    )
    (fold,), (each,) = result.folded, result.rewritten
    assert {fold.bn, each.bn} == {"b", "c"}
    assert (fold.into, fold.error) == (each.bn if form == "conv" else f"{each.bn}/scale+{each.bn}", each.error)
    assert result.to_dict()["batch_normalizations"] == {"before": 2, "after": 0}


@pytest.mark.parametrize("form", REWRITE_FORMS)
def test_parameters_that_others_read_get_copies(form):
    text = "(float[N,4,5] x) => (float[N,4,5] y, float[4] z) { a = Tanh(x) b = BatchNormalization(a, s, s, m, v) y = Tanh(b) z = Neg(s) }"
    parameters = norm(4)
    del parameters["t"]
    result = rewritten(model(text, **parameters), form, {"conv": "Tanh Conv Tanh Neg", "affine": "Tanh Mul Add Tanh Neg"}[form])
    assert sorted(initializers(result.model)) == {"conv": ["b.bias", "b.weight", "s"], "affine": ["b.bias", "b/scale.weight", "s"]}[form]


@pytest.mark.parametrize("form", REWRITE_FORMS)
def test_new_names_are_new(form):
    text = (
        "(float[N,4,5] x) => (float[N,4,5] y) { a = Tanh(x) b = BatchNormalization(a, s, t, m, v) b_scaled = Tanh(b) y = Tanh(b_scaled) }"
    )
    proto = model(text.replace("b_scaled", "scaled"), **norm(4))
    for node in proto.graph.node:
        node.input[:] = ["b/scaled" if name == "scaled" else name for name in node.input]
        node.output[:] = ["b/scaled" if name == "scaled" else name for name in node.output]
    proto.graph.node[3].name = "b/scale"
    result = rewritten(proto, form, {"conv": "Tanh Conv Tanh Tanh", "affine": "Tanh Mul Add Tanh Tanh"}[form])
    assert len({node.name for node in result.model.graph.node}) == len(result.model.graph.node)


@pytest.mark.parametrize("form", REWRITE_FORMS)
def test_a_node_without_a_name(form):
    proto = stuck()
    proto.graph.node[1].name = ""
    result = rewritten(proto, form, {"conv": "Tanh Conv Tanh", "affine": "Tanh Mul Add Tanh"}[form])
    assert result.rewritten[0].bn == "b"


@pytest.mark.parametrize("form", REWRITE_FORMS)
def test_in_a_branch(form):
    branches = """then_branch = a () => (p) { d = Tanh(x) p = BatchNormalization(d, s, t, m, v) },
        else_branch = e () => (q) { q = Neg(x) }"""
    text = f"(float[2,4,5] x, bool yes) => (float[2,4,5] y) {{ k = If(yes) <{branches}> y = Tanh(k) }}"
    result = fastbn.fold(model(text, **norm(4)), rewrite_left=form)
    assert (len(result.rewritten), result.parity.status) == (1, "ok")
    (inner,) = (attribute.g for attribute in result.model.graph.node[0].attribute if attribute.name == "then_branch")
    assert " ".join(node.op_type for node in inner.node) == {"conv": "Tanh Conv", "affine": "Tanh Mul Add"}[form]


@pytest.mark.parametrize("ir_version", [3, 8])
def test_constants_that_are_graph_inputs(ir_version):
    proto = stuck(ir_version=ir_version)
    for tensor in proto.graph.initializer:
        proto.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    if ir_version == 8:
        (kept,) = fastbn.fold(proto, rewrite_left="conv").kept
        assert kept.not_rewritten.startswith("its scale 's' is also a graph input")
        proto = fastbn.fold(proto, freeze_inputs=True).model
    result = rewritten(proto, "conv", "Tanh Conv Tanh")
    if ir_version == 3:
        sizes = {info.name: [dim.dim_value for dim in info.type.tensor_type.shape.dim] for info in result.model.graph.input}
        assert (sizes["s"], sizes["t"]) == ([4, 1, 1, 1], [4])


@pytest.mark.parametrize(
    ("options", "sentence"), [({"skip": "b"}, "--skip names it"), ({"only": "y"}, "--only does not name it"), ({"only": "b"}, None)]
)
def test_what_is_not_selected_is_left_alone(options, sentence):
    result = fastbn.fold(stuck(), rewrite_left="conv", **options)
    assert [kept.not_rewritten for kept in result.kept] == ([sentence] if sentence else [])


def test_a_training_batch_norm_stays():
    proto = stuck()
    proto.graph.node[1].attribute.append(helper.make_attribute("training_mode", 1))
    proto.graph.node[1].output.extend(["rm", "rv"])
    (kept,) = fastbn.fold(proto, rewrite_left="conv", verify=False).kept
    assert (kept.code, kept.not_rewritten) == ("training", kept.reason)
    assert len(fastbn.fold(proto, rewrite_left="conv", as_inference=True).rewritten) == 1


def test_a_decomposed_one_is_a_mul_and_an_add_already():
    text = "(float[N,4,5] x) => (float[N,4,5] y) { a = Tanh(x) b = Mul(a, k) c = Add(b, l) y = Tanh(c) }"
    proto = model(text, k=normal(4, 1), l=normal(4, 1, seed=1))
    for form in REWRITE_FORMS:
        result = fastbn.fold(proto, rewrite_left=form)
        assert (result.to_bytes(), codes(result)) == (proto.SerializeToString(), {"no-absorber": 1})


def test_without_the_option_nothing_is_rewritten():
    result = fastbn.fold(stuck())
    assert (result.rewritten, [kept.not_rewritten for kept in result.kept]) == ([], [None])


def test_a_rewriting_that_differs_is_undone_and_named(monkeypatch):
    made = substitute.Rewriter.plan

    def wrong(self, node, affine):
        plan = made(self, node, affine)
        plan.constants = {use: constant.times(1.01) for use, constant in plan.constants.items()}
        return plan

    monkeypatch.setattr(substitute.Rewriter, "plan", wrong)
    result = fastbn.fold(stuck(), rewrite_left="conv")
    (kept,) = result.kept
    assert kept.not_rewritten.startswith("written in another way it differs by")
    assert (kept.code, result.rewritten) == ("no-absorber", [])
    # Where the small model does not tell, the whole one does.
    monkeypatch.setattr(fold_parity, "_check", lambda segment, probe, seed: fold_parity.FoldParity(True, 0.0, 1.0))
    result = fastbn.fold(stuck(), rewrite_left="conv")
    assert result.kept[0].not_rewritten.startswith("with it the whole model differs")
    assert result.to_bytes() == stuck().SerializeToString()


@pytest.mark.parametrize("form", REWRITE_FORMS)
def test_the_result_is_a_version_of_its_original_and_folds_to_itself(form):
    proto = stuck()
    result = fastbn.fold(proto, rewrite_left=form)
    assert difference(proto, result.model) is None
    other = onnx.ModelProto.FromString(result.to_bytes())
    other.graph.node[1].name = "another"
    assert (difference(proto, other) is None) == (form == "affine")
    assert fastbn.fold(result.model, rewrite_left=form).to_bytes() == result.to_bytes()


@pytest.mark.parametrize("value", ["Conv", "", 1, True])
def test_a_wrong_form_is_one_sentence(value):
    with pytest.raises(ArgumentError, match=r"Expected conv or affine, got .* - at `rewrite_left`"):
        fastbn.fold(stuck(), rewrite_left=value)


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    quick(monkeypatch)
    (tmp_path / "in.onnx").write_bytes(stuck().SerializeToString())
    assert main(["fold", "in.onnx", "out.onnx", "--strict"]) == 3
    assert main(["fold", "in.onnx", "out.onnx", "--strict", "--rewrite-left", "conv", "--json", "r.json"]) == 0
    out = capsys.readouterr().out
    assert "  rewrote  b  as Conv  4 channels  error " in out
    assert "BatchNormalization 1 -> 0 (1 rewritten), nodes 3 -> 3" in out
    report = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert (report["schema"], report["kept"], report["folded"]) == (SCHEMA, [], [])
    (each,) = report["rewritten"]
    assert set(each) == {"bn", "op", "channels", "error", "bound", "note", "code", "reason"}
    assert main(["fold", "in.onnx", "out.onnx", "-q", "--rewrite-left", "affine"]) == 0  # a version of IN stands there
    assert ops(onnx.load("out.onnx")) == "Tanh Mul Add Tanh"
    assert "invalid choice: 'mul'" in fails(capsys, "fold", "in.onnx", "--rewrite-left", "mul")
    assert "expected one argument" in fails(capsys, "fold", "in.onnx", "--rewrite-left")
    report = ["--runs", "1", "-q", "--report", "page.html"]
    assert main(["deploy", "in.onnx", "deployed.onnx", "--rewrite-left", "conv", *report]) == 0
    assert ops(onnx.load("deployed.onnx")) == "Tanh Conv Tanh"
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<h3>Rewritten</h3>" in page
    assert numpy_helper.to_array(onnx.load("deployed.onnx").graph.initializer[0]).shape == (4, 1, 1, 1)


def test_the_forms_of_the_command_are_those_of_the_package():
    assert REWRITE_FORMS == substitute.REWRITE_FORMS


def test_dry_run_and_repr():
    result = fastbn.fold(stuck(), rewrite_left="conv", verify=False)
    assert repr(result) == "<FoldResult 'model': 0 of 1 BatchNormalization folded, 1 rewritten, not verified>"
    assert result.rewritten[0].error is None


def test_data_without_an_axis_of_channels_stays():
    text = "(float[5] x) => (float[5] y) { a = Tanh(x) b = BatchNormalization(a, s, t, m, v) y = Tanh(b) }"
    (kept,) = fastbn.fold(model(text, **norm(1)), rewrite_left="affine", verify=False).kept
    assert kept.not_rewritten == "its data has rank 1 and no axis of channels"
