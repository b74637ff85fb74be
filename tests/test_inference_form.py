"""as_inference: nodes in training mode become inference ones, and that is said; what cannot stays, with the reason."""

import json

import numpy as np
import onnx
import pytest
from onnx import helper
from shell import fails, quick
from sketch import CONV_BN, codes, conv_bn, initializers, model, norm, normal, ops, random_feeds, run

import fastbn
from fastbn.cli import main
from fastbn.graph.results import SCHEMA

TRAINING = CONV_BN.replace("y = BatchNormalization(", "y, running_mean, running_var = BatchNormalization<training_mode = 1>(")
DROPOUT = CONV_BN.replace("(float[N,4,6,6] y)", "(float[N,4,6,6] z)").replace("}", "    z = Dropout(y, ratio, mode)\n}")
FOUR = {"w": normal(4, 3, 3, 3), "b": normal(4), **norm(4)}
HALF = {"ratio": np.float32(0.5)}

# What means training -> (graph, opset, constants).
TRAINED = {
    "training_mode=1": (TRAINING, 17, {}),
    "training_mode=1, opset 14": (TRAINING, 14, {}),
    "training_mode=1, one output": (CONV_BN.replace("Normalization(", "Normalization<training_mode = 1>("), 15, {}),
    "opset 9, five outputs": (CONV_BN.replace("y =", "y, m1, v1, m2, v2 ="), 9, {}),
    "opset 13, two outputs": (CONV_BN.replace("y =", "y, m1 ="), 13, {}),
}


def inference_of(graph, opset):
    """Return the inference form of a graph of TRAINED, written by hand."""
    for outputs in ("y, running_mean, running_var =", "y, m1, v1, m2, v2 =", "y, m1 ="):
        graph = graph.replace(outputs, "y =")
    return conv_bn(graph.replace("<training_mode = 1>", ""), opset=opset)


@pytest.mark.parametrize("case", TRAINED)
def test_a_training_batch_norm_becomes_one_by_running_statistics(case):
    graph, opset, constants = TRAINED[case]
    proto = conv_bn(graph, opset=opset, **constants)
    plain = fastbn.fold(proto)
    assert codes(plain) == {"training": 1}
    assert "--as-inference makes it use the running ones" in plain.kept[0].reason
    assert plain.to_dict()["inference"] is None
    result = fastbn.fold(proto, as_inference=True)
    assert (ops(result.model), result.kept, result.parity.status) == ("Conv", [], "ok")
    assert result.to_dict()["inference"] == {"changed": ["y"], "left": []}
    assert result.notes[0] == "as an inference model: 1 BatchNormalization by running statistics (y)"
    assert result.notes[-1].startswith("compared with the inference form of the original")
    feeds = random_feeds(proto)
    (before,), (after,) = run(inference_of(graph, opset), feeds), run(result.model, feeds)
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)
    if graph == TRAINING:  # onnxruntime runs no other training form
        assert np.abs(run(proto, feeds)[0] - after).max() > 0.1


def test_the_statistics_of_the_form_are_the_running_ones():
    text = "(float[N,4,6] x) => (float[N,4,6] y) { y, rm, rv = BatchNormalization<training_mode = 1, momentum = 0.5>(x, s, t, m, v) }"
    proto = model(text, **norm(4))
    result = fastbn.fold(proto, as_inference=True)
    (node,) = result.model.graph.node
    assert [attribute.name for attribute in node.attribute] == ["momentum"]
    assert (list(node.output), result.parity, codes(result)) == (["y"], None, {"graph-output": 1})
    feeds, values = random_feeds(proto), {name: array.reshape(-1, 1) for name, array in norm(4).items()}
    expected = (feeds["x"] - values["m"]) / np.sqrt(values["v"] + 1e-5) * values["s"] + values["t"]
    np.testing.assert_allclose(run(onnx.ModelProto.FromString(result.to_bytes()), feeds)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("opset", [1, 6])
def test_before_opset_7_the_attribute_says_so(opset):
    proto = conv_bn(opset=opset)
    assert "--as-inference" in fastbn.fold(proto).kept[0].reason
    result = fastbn.fold(proto, as_inference=True, verify=False)  # onnxruntime has no kernels of these opsets
    assert (ops(result.model), result.to_dict()["inference"]["changed"]) == ("Conv", ["y"])
    left = fastbn.fold(proto, as_inference=True, skip="y").model.graph.node[1]
    assert {attribute.name: attribute.i for attribute in left.attribute} == {"is_test": 1}


@pytest.mark.parametrize(
    ("graph", "reason"),
    [
        (TRAINING.replace(" y)", " y, float[4] running_var)"), "its statistics 'running_var' are a graph output"),
        (
            TRAINING.replace(" y)", " y, float[4] z)").replace("}", " z = Neg(running_mean) }"),
            "Neg 'z' reads its statistics 'running_mean'",
        ),
    ],
)
def test_statistics_that_something_reads_keep_the_node_in_training(graph, reason):
    result = fastbn.fold(conv_bn(graph), as_inference=True)
    for kept in (*result.kept, *fastbn.fold(conv_bn(graph)).kept):  # and the option is advised only where it helps
        assert (kept.code, kept.reason) == ("training", f"training_mode=1: it normalizes with the statistics of the batch, and {reason}")
    assert result.to_dict()["inference"] == {"changed": [], "left": [{"node": "y", "reason": reason}]}
    assert result.notes == (f"not as an inference model: 'y', for {reason}",)
    assert result.to_bytes() == conv_bn(graph).SerializeToString()


def test_one_node_may_stay_in_training_and_another_not():
    graph = TRAINING.replace("(float[N,4,6,6] y)", "(float[N,4,4,4] z, float[4] running_var)")
    graph = graph.replace("}", " d = Conv(y, w3) z, rm, rv = BatchNormalization<training_mode = 1>(d, s, t, m, v) }")
    result = fastbn.fold(conv_bn(graph, w3=normal(4, 4, 3, 3)), as_inference=True)
    assert ([kept.bn for kept in result.kept], [fold.bn for fold in result.folded]) == (["y"], ["z"])
    assert result.to_dict()["inference"]["changed"] == ["z"]


def test_a_dropout_lets_the_affine_pass():
    graph = CONV_BN.replace("y = BatchNormalization(c,", "d, mask = Dropout(c, ratio, mode)\n    y = BatchNormalization(d,")
    proto = conv_bn(graph, **HALF, mode=np.array(True))
    (kept,) = fastbn.fold(proto).kept
    assert kept.code == "training-dropout"
    assert "--as-inference makes it pass its data" in kept.reason
    result = fastbn.fold(proto, as_inference=True)
    assert (ops(result.model), result.parity.status) == ("Conv Dropout", "ok")
    assert result.notes[0] == "as an inference model: 1 Dropout without dropping (d)"
    assert list(result.model.graph.node[1].input) == ["c", "ratio"]
    assert "mode" not in initializers(result.model)


def test_the_constant_of_a_dropout_stays_where_something_else_reads_it():
    graph = DROPOUT.replace(" z)", " z, bool n)").replace("}", " n = Not(mode) }")
    result = fastbn.fold(conv_bn(graph, **HALF, mode=np.array(True)), as_inference=True)
    assert "mode" in initializers(result.model)


def test_a_constant_node_that_says_training_goes():
    graph = DROPOUT.replace("c = Conv", "mode = Constant<value = bool {1}>()\n    c = Conv")
    result = fastbn.fold(conv_bn(graph, **HALF), as_inference=True)
    assert ops(result.model) == "Conv Dropout"
    onnx.checker.check_model(result.model)


@pytest.mark.parametrize("mode", [np.array(False), None])
def test_an_inference_dropout_is_left_alone(mode):
    graph = DROPOUT if mode is not None else DROPOUT.replace(", ratio, mode", ", ratio")
    result = fastbn.fold(conv_bn(graph, **HALF, **({"mode": mode} if mode is not None else {})), as_inference=True)
    assert result.notes == ("as an inference model: no node is in training mode",)
    assert result.to_dict()["inference"] == {"changed": [], "left": []}


def test_a_mode_that_the_caller_gives_is_left_to_the_caller():
    graph = DROPOUT.replace("x) =>", "x, bool mode) =>")
    result = fastbn.fold(conv_bn(graph, **HALF), as_inference=True, verify=False)
    assert result.to_dict()["inference"] == {"changed": [], "left": [{"node": "z", "reason": "its training_mode 'mode' is no constant"}]}


def test_an_overridable_mode_is_a_constant_once_it_is_frozen():
    proto = conv_bn(DROPOUT, **HALF, mode=np.array(True))
    proto.graph.input.append(helper.make_tensor_value_info("mode", onnx.TensorProto.BOOL, []))
    assert fastbn.fold(proto, as_inference=True, verify=False).to_dict()["inference"]["changed"] == []
    result = fastbn.fold(proto, as_inference=True, freeze_inputs=True)
    assert result.to_dict()["inference"]["changed"] == ["z"]
    assert [info.name for info in result.model.graph.input] == ["x"]


def test_nodes_in_a_branch_and_in_a_function():
    branches = """then_branch = a () => (p) { p, q, r = BatchNormalization<training_mode=1>(c, s, t, m, v) },
        else_branch = e () => (o) { o = Neg(c) }"""
    text = f"(float[2,3,8,8] x, bool yes) => (float[2,4,6,6] k) {{ c = Conv(x, w, b) k = If(yes) <{branches}> }}"
    result = fastbn.fold(model(text, **FOUR), as_inference=True)
    assert result.to_dict()["inference"]["changed"] == ["p"]
    assert codes(result) == {"crosses-scope": 1}
    text = """<ir_version: 10, opset_import: ["" : 17, "local" : 1]>
        g (float[2,4,6] x) => (float[2,4,6] y) { y = local.norm(x) }
        <domain: "local", opset_import: ["" : 17]> norm (x) => (y) {
            s = Constant<value = float[4] {1, 2, 3, 4}>()
            d = Mul(x, x)
            y, a, b = BatchNormalization<training_mode=1>(d, s, s, s, s)
        }"""
    result = fastbn.fold(onnx.parser.parse_model(text), as_inference=True)
    assert "model-local function 'norm' inlined" in result.notes
    assert len(result.to_dict()["inference"]["changed"]) == 1
    assert "training" not in codes(result)


def test_the_original_is_not_changed_and_external_data_are_kept(tmp_path):
    onnx.save(conv_bn(TRAINING), tmp_path / "in.onnx", save_as_external_data=True, location="in.data", size_threshold=0)
    before = (tmp_path / "in.onnx").read_bytes()
    result = fastbn.fold(tmp_path / "in.onnx", as_inference=True)
    assert (result.parity.status, ops(result.model)) == ("ok", "Conv")
    result.save(tmp_path / "out.onnx")
    assert (tmp_path / "in.onnx").read_bytes() == before
    feeds = random_feeds(inference_of(TRAINING, 17))
    expected = run(inference_of(TRAINING, 17), feeds)[0]
    np.testing.assert_allclose(run(onnx.load(tmp_path / "out.onnx"), feeds)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(name="here")
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quick(monkeypatch)
    (tmp_path / "in.onnx").write_bytes(conv_bn(TRAINING).SerializeToString())
    return tmp_path


def test_the_command(here, capsys):
    assert main(["fold", "in.onnx", "out.onnx", "--strict"]) == 3
    assert "--as-inference" in capsys.readouterr().out
    assert main(["fold", "in.onnx", "out.onnx", "--strict", "--as-inference", "--json", "report.json"]) == 0
    out = capsys.readouterr().out
    assert "note    as an inference model: 1 BatchNormalization by running statistics (y)" in out
    report = json.loads((here / "report.json").read_text(encoding="utf-8"))
    assert (report["schema"], report["inference"]) == (SCHEMA, {"changed": ["y"], "left": []})
    assert ops(onnx.load(here / "out.onnx")) == "Conv"
    assert "--as-inference" in fails(capsys, "fold", "in.onnx", "--as-inference=1")


def test_deploy_compares_with_the_inference_form(here):
    made = fastbn.deploy("in.onnx", "out.onnx", as_inference=True, runs=1)
    assert (made.status, made.shipped, made.fold.parity.status) == ("done", "folded", "ok")
    assert made.stage("folded").drop < 1e-5
    assert made.to_dict()["fold"]["inference"] == {"changed": ["y"], "left": []}
    assert main(["deploy", "in.onnx", "out.onnx", "--as-inference", "--runs", "1", "-q"]) == 0
