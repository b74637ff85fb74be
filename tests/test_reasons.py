"""Reasons: the true obstacle, an option only where it helps, the search told in full, and advice for every code."""

import json
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from sketch import codes, folds, model, norm, normal, ops, refuses, run

import fastbn
from fastbn.cli import main
from fastbn.graph.reasons import REASONS

DOCS = Path(__file__).parents[1] / "docs" / "reasons.md"


def test_the_docs_have_advice_for_every_code():
    sections = re.split(r"^### ", DOCS.read_text(), flags=re.MULTILINE)[1:]
    named = [code for section in sections for code in re.findall(r"`([a-z-]+)`", section.splitlines()[0])]
    assert sorted(named) == sorted(REASONS)
    assert all(len(section.split("\n", 1)[1].split()) > 4 for section in sections)


# ---- what the node itself is ----


def test_empty_statistics_are_a_training_graph():
    empty = np.zeros(0, np.float32)
    text = "(float[1,3,8,8] x) => (float y) { c = Conv(x, w) y = BatchNormalization(c, s, t, m, v) }"
    reason = refuses(model(text, opset=11, w=normal(4, 3, 3, 3), **{**norm(4), "m": empty, "v": empty}), "training", verify=False)
    assert "empty" in reason


STATISTICS = "(float[2,3,8,8] x) => ({}) {{ c = Conv(x, w) n, a, b = BatchNormalization <training_mode = 0> (c, s, t, m, v) y = Relu(n) }}"


def statistics(outputs, opset=14):
    return model(STATISTICS.format(outputs), opset=opset, w=normal(4, 3, 3, 3), **norm(4))


def test_unread_statistics_leave_with_the_node():
    """onnxruntime does not run the original; without the outputs that nothing reads it does, and so it is verified."""
    result = fastbn.fold(statistics("float y"))
    assert ops(result.model) == "Conv Relu"
    assert result.parity.ok
    assert result.folded[0].error <= result.folded[0].bound
    original = statistics("float y")
    with pytest.raises(Exception, match="outputs should be 1"):
        run(original)
    del original.graph.node[1].output[1:]
    np.testing.assert_allclose(run(original)[0], run(result.model)[0], rtol=1e-4, atol=1e-5)


def test_statistics_that_are_handed_out_stay():
    refuses(statistics("float y, float a"), "training", verify=False)


def test_statistics_before_opset_14_mean_training():
    text = STATISTICS.format("float y").replace("<training_mode = 0>", "")
    refuses(model(text, opset=13, w=normal(4, 3, 3, 3), **norm(4)), "training", verify=False)


def test_variances_beyond_float16_make_no_warning():
    """Warnings are errors in these tests."""
    parameters = norm(4)
    parameters["v"][:2] = 1e6, 1e8
    text = "(float16[1,3,8,8] x) => (float16 y) { c = Conv(x, w) n = BatchNormalization(c, s, t, m, v) y = Relu(n) }"
    folds(model(text, opset=15, w=normal(4, 3, 3, 3, dtype=np.float16), **parameters), "Conv Relu")


# ---- which obstacle is named ----


def test_a_constant_that_would_grow_is_no_reason_where_there_is_no_home():
    """Its channels are axis 1, the features of the linear layer axis 2."""
    text = """(float[n,2,3] x) => (float y) {
        a = MatMul(x, w) c = Add(a, b) d = BatchNormalization(c, s, t, m, v) e = Relu(d) y = MatMul(e, u)
    }"""
    reason = refuses(model(text, w=normal(3, 5), b=normal(5), u=normal(5, 4), **norm(2, positive=True)), "shift-through-relu", verify=False)
    assert "graph input 'x'" in reason


def test_a_constant_that_would_grow_is_the_reason_where_there_is_a_home():
    text = """(float[n,2,3] x) => (float y) {
        c = BatchNormalization(x, s, t, m, v) e = Mul(c, k) a = Add(e, b) d = BatchNormalization(a, s, t, m, v) y = Tanh(d)
    }"""
    result = fastbn.fold(model(text, b=normal(3, seed=2), k=normal(3), **norm(2)), verify=False)
    assert "grows" in codes(result)


POOL = "(float[n,3,h,w] x) => (float y) {{ c = Conv(x, w) r = Relu(c) p = MaxPool <kernel_shape = [2,2]> (r) n = {norm} {nodes} }}"


def behind_pool(nodes, **constants):
    """Return a norm of scales of both signs behind a MaxPool, and `nodes` behind the norm."""
    return model(POOL.format(norm="BatchNormalization(p, s, t, m, v)", nodes=nodes), w=normal(4, 3, 3, 3), **norm(4), **constants)


def test_an_unknown_size_is_named_before_a_sign():
    proto = behind_pool(
        "d = Flatten(n) e = Slice(d, zero, far) y = Gemm(e, g)", zero=np.int64([0]), far=np.int64([9]), g=normal(4 * 221 * 221, 2)
    )
    reason = refuses(proto, "axis-unknown", verify=False)
    assert "--input-shape x=" in reason
    folded = fastbn.fold(proto, verify=False, input_shapes={"x": (2, 3, 224, 224)})
    assert not folded.kept


def test_the_input_whose_sizes_would_help_is_named_not_one_whose_sizes_are_given():
    proto = behind_pool(
        "d = Flatten(n) e = Slice(d, zero, far) y = Gemm(e, g)", zero=np.int64([0]), far=np.int64([9]), g=normal(4 * 221 * 221, 2)
    )
    proto.graph.input.insert(0, onnx.helper.make_tensor_value_info("other", onnx.TensorProto.FLOAT, ["k"]))
    (kept,) = fastbn.fold(proto, verify=False, input_shapes={"other": (3,)}).kept
    assert "--input-shape x=" in kept.reason


def test_an_unknown_size_is_no_reason_where_known_ones_do_not_help():
    """Conv pads with zeros, which no size changes."""
    nodes = "d = Reshape(n, flat) e = Transpose <perm = [0,2,1]> (d) f = Reshape(e, rest) y = Tanh(f)"
    proto = behind_pool(nodes, flat=np.int64([0, 0, -1]), rest=np.int64([-1, 4]))
    reason = refuses(proto, "mixed-sign-through-maxpool", verify=False)
    assert "--input-shape" not in reason


def overridable(nodes):
    text = f"(float[2,3,8,8] x, float[4] s) => (float y) {{ c = Conv(x, w) r = Tanh(c) n = BatchNormalization(r, s, t, m, v) {nodes} }}"
    return model(text, w=normal(4, 3, 3, 3), k=normal(5, 4, 3, 3), **norm(4))


def test_freezing_is_advised_where_it_helps():
    proto = overridable("y = Conv(n, k)")
    assert "--freeze-inputs" in refuses(proto, "overridable-parameters", verify=False)
    assert not fastbn.fold(proto, freeze_inputs=True).kept


def test_freezing_is_not_advised_where_the_norm_stays_all_the_same():
    proto = overridable("y = Conv <pads = [1,1,1,1]> (n, k)")
    reason = refuses(proto, "padding", verify=False)
    assert "--freeze-inputs" not in reason
    assert codes(fastbn.fold(proto, freeze_inputs=True)) == {"padding": 1}


def test_a_size_that_no_option_tells_is_not_named_first():
    """The inputs are static, and how many elements are not zero only a run tells."""
    text = """(float[1,4,6,6] x) => (float y) {
        c = Conv(x, w) i = NonZero(x) f = Cast <to = 1> (i) g = Transpose(f) u = Unsqueeze(g, axes)
        d = Concat <axis = 1> (c, u, u) n = BatchNormalization(d, s, t, m, v) y = Conv <pads = [1,1,1,1]> (n, k)
    }"""
    proto = model(text, w=normal(4, 4, 1, 1), k=normal(2, 12, 3, 3), axes=np.int64([0, 3]), **norm(12))
    reason = refuses(proto, "padding", verify=False)
    assert "sizes of the parts" in reason
    assert "--input-shape" not in reason


def test_what_mixes_channels_whatever_the_sizes_are_is_said():
    text = "(float[n,4,a] x) => (float y) { r = Tanh(x) q = BatchNormalization(r, s, t, m, v) d = Reshape(q, k) y = Tanh(d) }"
    proto = model(text, k=np.int64([0, 2, 2, -1]), **norm(4))
    assert "nx4xa becomes nx2x2xa" in refuses(proto, "axis", verify=False)


# ---- the search, told ----


def explained(capsys, *arguments):
    assert main(["fold", *arguments]) == 0
    return capsys.readouterr().out


def test_the_search_is_told(tmp_path, capsys):
    path = tmp_path / "model.onnx"
    onnx.save(overridable("y = Conv <pads = [1,1,1,1]> (n, k)"), path)
    out = explained(capsys, str(path), "--dry-run", "--freeze-inputs", "--explain", "n")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    start = lines.index("explain n: stays, for the reason above")
    assert lines[start + 1] == "plain: scale and shift, 4 channels along axis 1", "said once for both directions"
    assert lines[start + 2].startswith("backward it reads Tanh 'r'"), "the answer names the node"
    assert lines[start + 3].startswith("forward Conv 'y' pads")
    assert lines[start + 4] == "rearrange: scale and shift, 4 channels along axis 1"


def test_the_search_of_a_fold_is_told():
    text = "(float[2,3,8,8] x) => (float y) { c = Conv(x, w) d = Transpose <perm = [0,1,3,2]> (c) y = BatchNormalization(d, s, t, m, v) }"
    result = fastbn.fold(model(text, w=normal(4, 3, 3, 3), **norm(4)), explain="y", verify=False)
    (explanation,) = result.explanations
    assert (explanation.bn, explanation.outcome) == ("y", "folded")
    assert [(step.depth, step.direction, step.node, step.answer) for step in explanation.steps] == [
        (0, "backward", "Transpose 'd'", "lets it pass"),
        (1, "backward", "Conv 'c'", "takes it"),
    ]
    assert json.loads(json.dumps(result.to_dict()))["explanations"][0]["steps"][1]["node"] == "Conv 'c'"


def test_nothing_is_told_unasked():
    assert fastbn.fold(overridable("y = Conv(n, k)"), verify=False).explanations == []


def test_a_glob_must_name_a_node():
    with pytest.raises(fastbn.errors.ArgumentError, match="explain"):
        fastbn.fold(overridable("y = Conv(n, k)"), explain="nothing*")


def test_the_search_is_told_for_the_nodes_that_were_asked_for_alone():
    text = """(float[2,3,8,8] x) => (float y, float z) {
        c = Conv(x, w) y = BatchNormalization(c, s, t, m, v) d = Conv(x, w) z = BatchNormalization(d, s, t, m, v)
    }"""
    proto = model(text, w=normal(4, 3, 3, 3), **norm(4))
    for globs, expected in (("y", ["y"]), ("*", ["y", "z"])):
        result = fastbn.fold(proto, explain=globs, verify=False)
        assert [explanation.bn for explanation in result.explanations] == expected
