"""Parity: a wrong rule is caught and named, the other folds stay; a wrong model is not written; what cannot be run is said."""

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from sketch import CONV_BN, assert_same, codes, conv_bn, folds, model, norm, normal, ops

import fastbn
from fastbn.cli import main
from fastbn.graph.ops.registry import OPERATORS
from fastbn.graph.rewrite import writer
from fastbn.graph.runtime import session

MIXED = """(float[N,3,8,8] x) => (float[N,4] y) {
    c = Conv(x, w, b)
    first = BatchNormalization(c, s, t, m, v)
    r = Relu(first)
    d = Conv(r, w2)
    second = BatchNormalization(d, s2, t2, m2, v2)
    p = GlobalAveragePool(second)
    f = Flatten(p)
    g = Gemm(f, w3, b3)
    third = BatchNormalization(g, s3, t3, m3, v3)
    y = Tanh(third)
}"""


def mixed():
    weights = {"w2": normal(4, 4, 3, 3), "w3": normal(4, 4), "b3": normal(4, seed=2)}
    return conv_bn(MIXED, **weights, **norm(4, "2", seed=4), **norm(4, "3", seed=5))


def wrong(monkeypatch, op, change):
    """Make the row of one operator wrong: change(transfer, affine) edits what it answers."""
    row = OPERATORS[op]

    def backward(node, traveler, graph):
        transfer = row.backward(node, traveler, graph)
        change(transfer, traveler.affine)
        return transfer

    monkeypatch.setitem(OPERATORS, op, replace(row, backward=backward))


def forget_shift(transfer, affine):
    transfer.constants[2] = transfer.constants[2].affine(1.0, -affine.shift, 0.0)


def permute_channels(transfer, affine):
    transfer.constants[1] = replace(transfer.constants[1], scale=np.roll(transfer.constants[1].scale, 1))


def one_channel_off_by_a_thousandth(transfer, affine):
    scale = transfer.constants[1].scale.copy()
    scale[2] *= 1.001
    transfer.constants[1] = replace(transfer.constants[1], scale=scale)


def one_bias_off(transfer, affine):
    transfer.constants[2] = transfer.constants[2].affine(1.0, np.where(np.arange(4) == 3, 1e-3, 0.0), 0.0)


@pytest.mark.parametrize("change", [forget_shift, permute_channels, one_channel_off_by_a_thousandth, one_bias_off])
def test_a_wrong_rule_is_caught_named_and_left_out_and_the_others_stay(change, monkeypatch):
    wrong(monkeypatch, "Gemm", change)
    proto = mixed()
    result = fastbn.fold(proto)
    assert [fold.bn for fold in result.folded] == ["first", "second"]
    (kept,) = result.kept
    assert (kept.bn, kept.code) == ("third", "parity")
    assert "Gemm 'g'" in kept.reason
    assert result.parity.status == "ok"
    assert_same(proto, result.model)


def test_without_verification_a_wrong_rule_goes_through(monkeypatch):
    """The test above would pass if the rule folded nothing: this shows that the same wrong rule folds when nothing verifies it."""
    wrong(monkeypatch, "Gemm", permute_channels)
    result = fastbn.fold(mixed(), verify=False)
    assert len(result.folded) == 3
    with pytest.raises(AssertionError):
        assert_same(mixed(), result.model)


def test_every_wrong_fold_is_left_out(monkeypatch):
    wrong(monkeypatch, "Conv", permute_channels)
    result = fastbn.fold(mixed())
    assert [fold.bn for fold in result.folded] == ["third"]
    assert codes(result) == {"parity": 2}


def test_only_the_wrong_link_of_a_chain_is_left_out(monkeypatch):
    """Two nodes share an absorber, and one of them is lifted wrongly: the other one stays folded."""
    row = OPERATORS["BatchNormalization"]

    def wrong_lift(node, graph):
        affine = row.lift(node, graph)
        return replace(affine, scale=affine.scale * 1.5) if node.label == "second" else affine

    monkeypatch.setitem(OPERATORS, "BatchNormalization", replace(row, lift=wrong_lift))
    text = """(float[N,3,8,8] x) => (float[N,4,6,6] y) {
        c = Conv(x, w, b)
        first = BatchNormalization(c, s, t, m, v)
        second = BatchNormalization(first, s2, t2, m2, v2)
        y = Tanh(second)
    }"""
    proto = conv_bn(text, **norm(4, "2", seed=4))
    result = fastbn.fold(proto)
    assert [(fold.bn, fold.into) for fold in result.folded] == [("first", "c")]
    assert [(kept.bn, kept.code) for kept in result.kept] == [("second", "parity")]
    assert_same(proto, result.model)


def test_the_one_fold_that_spoils_the_whole_model_is_left_out(monkeypatch):
    """Every fold parity holds, and the writer writes one node wrongly: bisection finds it, the other folds are written."""
    write = writer._Writer._write_constant

    def wrong_write(self, node, slot, constant):
        if node.label == "d" and slot == 1:
            constant = constant.times(constant.layout, np.full(4, 1.5))
        return write(self, node, slot, constant)

    monkeypatch.setattr(writer._Writer, "_write_constant", wrong_write)
    result = fastbn.fold(mixed())
    assert [fold.bn for fold in result.folded] == ["first", "third"]
    (kept,) = result.kept
    assert (kept.bn, kept.code) == ("second", "parity")
    assert "whole model" in kept.reason
    assert result.parity.ok
    assert_same(mixed(), result.model)


def tampered(monkeypatch):
    """Let the writer change a weight: every fold is right, the file is not."""
    fill = writer._Writer._fill

    def wrong_fill(self, scope, tensor, constant):
        fill(self, scope, tensor, constant)
        values = numpy_helper.to_array(tensor).copy()
        values.flat[0] += 0.01
        tensor.raw_data = values.tobytes()

    monkeypatch.setattr(writer._Writer, "_fill", wrong_fill)


def test_folds_that_the_writer_spoils_are_left_out_until_none_is_left(monkeypatch):
    tampered(monkeypatch)
    result = fastbn.fold(mixed())
    assert result.folded == []
    assert codes(result) == {"parity": 3}
    assert result.to_bytes() == mixed().SerializeToString()


def deep(count):
    """Return a chain of Conv, BatchNormalization, Tanh."""
    steps, names, constants = [], ["x", *(f"y{number}" for number in range(1, count))], {}
    for number, name in enumerate(names):
        after = names[number + 1] if number + 1 < count else "y"
        mine = f"s{number}, t{number}, m{number}, v{number}"
        steps.append(f"c{number} = Conv({name}, w{number}) n{number} = BatchNormalization(c{number}, {mine}) {after} = Tanh(n{number})")
        constants.update({f"w{number}": normal(4, 4, 1, 1, seed=number), **norm(4, str(number), seed=number)})
    return model(f"(float[N,4,3,3] x) => (float[N,4,3,3] y) {{ {' '.join(steps)} }}", **constants)


def test_a_wrong_file_fails_whole_model_parity_and_is_not_written(monkeypatch, tmp_path, capsys):
    tampered(monkeypatch)
    result = fastbn.fold(deep(10))
    assert result.parity.status == "failed"
    assert result.parity.error > result.parity.allowed
    with pytest.raises(ValueError, match="Cannot save the folded model: it differs from the original"):
        result.save(tmp_path / "out.onnx")
    (tmp_path / "in.onnx").write_bytes(deep(10).SerializeToString())
    assert main(["fold", str(tmp_path / "in.onnx"), str(tmp_path / "out.onnx"), "--json", str(tmp_path / "r.json"), "-q"]) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.onnx", "r.json"]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("fastbn: Cannot write the folded model: it differs from the original: ")
    report = json.loads((tmp_path / "r.json").read_text())
    assert (report["parity"]["status"], report["written"]) == ("failed", [])


@pytest.mark.parametrize("seed", range(3))
def test_verify_finds_one_changed_weight(seed):
    proto = mixed()
    other = mixed()
    tensor = other.graph.initializer[seed]
    values = numpy_helper.to_array(tensor).copy()
    values.flat[seed] += 1e-3
    tensor.raw_data = values.tobytes()
    parity = fastbn.verify(proto, other)
    assert parity.status == "failed"
    assert parity.output == "y"
    assert len(parity.index) == 2
    assert len(parity.values) == 2
    assert f"worst {parity.error:.2g} at y[{parity.index[0]},{parity.index[1]}]" in str(parity)


def test_verify_of_equal_and_of_folded_models_is_ok():
    proto = mixed()
    same = fastbn.verify(proto, proto)
    assert (same.status, same.error) == ("ok", 0.0)
    folded = fastbn.verify(proto, fastbn.fold(proto, verify=False).model)
    assert folded.status == "ok"
    assert 0 < folded.error <= folded.allowed, "optimizer off on both sides: an exact zero would mean both were folded"
    assert folded.inputs == 3


def test_the_optimizer_is_off_by_default():
    data = mixed().SerializeToString()
    for optimize, level in ((False, "ORT_DISABLE_ALL"), (True, "ORT_ENABLE_ALL")):
        assert session(data, optimize=optimize).get_session_options().graph_optimization_level.name == level


def test_outputs_that_differ_in_name_or_shape():
    one = model("(float[N,4] x) => (float y) { y = Relu(x) }")
    other = model("(float[N,4] x) => (float z) { z = Relu(x) }")
    parity = fastbn.verify(one, other)
    assert parity.status == "failed"
    assert "['y']" in parity.reason
    assert "['z']" in parity.reason
    flat = model("(float[N,4] x) => (float y) { r = Relu(x) y = Flatten <axis = 0> (r) }")
    parity = fastbn.verify(one, flat)
    assert parity.status == "failed"
    assert "shapes" in parity.reason


def test_nan_on_one_side_only_fails():
    one = model("(float[N,4] x) => (float y) { y = Mul(x, k) }", k=np.float32(0))
    other = model("(float[N,4] x) => (float y) { y = Div(x, k) }", k=np.float32(0))
    parity = fastbn.verify(one, other)
    assert parity.status == "failed"
    assert "NaN" in parity.reason
    assert json.dumps(parity.to_dict(), allow_nan=False)


def test_the_same_nan_on_both_sides_is_parity():
    proto = model("(float[N,4] x) => (float y) { y = Sqrt(x) }")
    assert fastbn.verify(proto, proto).status == "ok"


def custom():
    return conv_bn(
        "(float[N,3,8,8] x) => (float[N,4,6,6] y) { c = Conv(x, w, b) n = BatchNormalization(c, s, t, m, v) y = com.maker.Magic(n) }",
        imports=["com.maker"],
    )


def test_a_custom_operator_is_said_in_words_and_the_site_is_still_verified():
    result = fastbn.fold(custom())
    (fold,) = result.folded
    assert fold.error <= fold.bound
    assert result.parity.status == "not-run"
    assert "com.maker" in result.parity.reason
    assert "not run" in str(result)
    assert json.loads(json.dumps(result.to_dict()))["parity"]["status"] == "not-run"


def test_random_numbers_are_the_same_on_both_sides_and_compared():
    text = """(float[2,3,8,8] x) => (float[2,4,6,6] y, float[2,4,6,6] z, float[2,3] free) {
        c = Conv(x, w, b)
        y = BatchNormalization(c, s, t, m, v)
        r = RandomNormalLike(y)
        z = Add(y, r)
        free = RandomNormal <shape = [2, 3]> ()
    }"""
    parity = fastbn.fold(conv_bn(text)).parity
    assert (parity.status, parity.compared) == ("ok", ("y", "z"))
    assert any("always the same on every input tried: output 'free'" in note for note in parity.notes)


def test_an_output_that_no_input_moves_proves_nothing():
    text = "(float[2,3,8,8] x) => (float y) { c = Conv(x, w, b) n = BatchNormalization(c, s, t, m, v) y = RandomNormalLike(n) }"
    parity = fastbn.fold(conv_bn(text)).parity
    assert parity.status == "inconclusive"
    assert "always the same" in parity.reason


@pytest.mark.parametrize("kind", ["int64", "int32", "uint8", "bool"])
def test_integer_and_bool_inputs(kind):
    text = f"""({kind}[N,3] index) => (float[N,4] y) {{
        i = Cast <to = 7> (index)
        e = Gather(table, i)
        f = Flatten(e)
        g = Gemm(f, w3, b3)
        y = BatchNormalization(g, s, t, m, v)
    }}"""
    table = {"table": normal(256, 2), "w3": normal(6, 4), "b3": normal(4)}
    result = fastbn.fold(model(text, **table, **norm(4)))
    assert (len(result.folded), result.parity.status) == (1, "ok")


def test_unknown_sizes_are_tried_and_given_sizes_used():
    text = "(float[N,C,H,W] x) => (float y) { c = Conv(x, w, b) n = BatchNormalization(c, s, t, m, v) y = Reshape(n, shape) }"
    proto = conv_bn(text, shape=np.array([1, 4 * 36 * 36]))
    assert fastbn.fold(proto).parity.status == "not-run"
    result = fastbn.fold(proto, input_shapes={"x": (1, 3, 38, 38)})
    assert result.parity.status == "ok"
    with pytest.raises(fastbn.ArgumentError, match="Expected the name of a graph input"):
        fastbn.fold(proto, input_shapes={"nowhere": (1,)})


@pytest.mark.parametrize("batch", [3, 4, 8, 32])
def test_a_free_batch_that_a_reshape_fixes_is_found(batch):
    text = "(float[N,3,8,8] x) => (float y) { c = Conv(x, w, b) n = BatchNormalization(c, s, t, m, v) y = Reshape(n, shape) }"
    assert fastbn.fold(conv_bn(text, shape=np.array([batch, 4 * 36]))).parity.ok


def test_the_seed_decides_the_inputs():
    proto, folded = mixed(), fastbn.fold(mixed(), verify=False).model
    assert fastbn.verify(proto, folded, seed=1) == fastbn.verify(proto, folded, seed=1)
    assert fastbn.verify(proto, folded, seed=1) != fastbn.verify(proto, folded, seed=2)


def test_progress_is_told():
    said = []
    fastbn.fold(mixed(), progress=said.append)
    assert said[0].startswith("verifying fold 1 of 3: first")
    assert any("input 3 of 3" in text for text in said)


def test_a_model_that_onnxruntime_calls_invalid_is_an_error():
    proto = conv_bn(b=None)
    proto.graph.node[0].attribute.append(helper.make_attribute("kernel_shape", [5, 5]))
    proto.graph.node[0].attribute.append(helper.make_attribute("no_such_attribute", 5))
    with pytest.raises(fastbn.ModelError, match="Expected a valid model"):
        fastbn.fold(proto)


def test_float16_overflow_of_the_original_is_no_failure():
    text = "(float16[N,3,2,2] x) => (float16[N,4,2,2] y) { c = Conv(x, w) y = BatchNormalization(c, s, t, m, v) }"
    weight = np.full((4, 3, 1, 1), 60000, np.float16)
    tiny = {**norm(4, dtype=np.float16), "s": np.full(4, 1e-3, np.float16)}
    result = fastbn.fold(conv_bn(text, w=weight, b=None, **tiny))
    assert ops(result.model) == "Conv"


def test_the_bound_follows_the_type():
    bounds = {}
    for dtype, kind in (("float", np.float32), ("float16", np.float16)):
        text = f"({dtype}[N,3,8,8] x) => ({dtype}[N,4,6,6] y) {{ c = Conv(x, w, b) y = BatchNormalization(c, s, t, m, v) }}"
        proto = conv_bn(text, w=normal(4, 3, 3, 3, dtype=kind), b=normal(4, dtype=kind), **norm(4, dtype=kind))
        (fold,) = fastbn.fold(proto).folded
        bounds[dtype] = fold.bound
    assert 100 < bounds["float16"] / bounds["float"] < 1e5


def test_external_outputs_are_verified_from_their_files(tmp_path):
    proto = mixed()
    path = tmp_path / "m.onnx"
    onnx.save(proto, path, save_as_external_data=True, location="m.data", size_threshold=0)
    result = fastbn.fold(path, workdir=tmp_path)
    assert result.parity.status == "ok"
    result.save(tmp_path / "out.onnx")
    del result
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["m.data", "m.onnx", "out.onnx"], "the stage is left clean"


def test_an_input_that_is_no_tensor_is_said():
    proto = conv_bn(CONV_BN.replace("y = Batch", "n = SequenceLength(q) y = Batch"))
    kind = helper.make_tensor_sequence_value_info("q", TensorProto.FLOAT, None)
    proto.graph.input.append(kind)
    proto.graph.output.append(helper.make_tensor_value_info("n", TensorProto.INT64, []))
    result = fastbn.fold(proto)
    assert result.parity.status == "not-run"
    assert "'q' is no tensor" in result.parity.reason


def test_a_site_whose_smallest_input_leaves_nothing_is_run_on_the_sizes_of_the_model():
    text = (
        "(float[2,3,8] x) => (float y) { c = Conv(x, w, b) d = AveragePool <kernel_shape = [4]> (c) y = BatchNormalization(d, s, t, m, v) }"
    )
    result = folds(model(text, w=normal(4, 3, 1), b=normal(4), **norm(4)), "Conv AveragePool")
    assert result.folded[0].error is not None


def test_a_gru_is_bounded_although_absolute_values_close_its_gate():
    nodes = "r = Tanh(x) n = BatchNormalization(r, s, t, m, v) q = Transpose <perm = [0,2,1]> (n) y = GRU <hidden_size = 3> (q, w, u)"
    proto = model(f"(float[5,4,2] x) => (float y) {{ {nodes} }}", w=4 * normal(1, 9, 4), u=normal(1, 9, 3), **norm(4))
    folds(proto, "Tanh Transpose GRU")


def test_an_output_that_is_rounding_alone_on_zeros_is_proven_by_the_other_inputs():
    """y is t - m * s = 0 for x = 0, in the original exactly, in the folded model up to rounding."""
    constants = {"s": normal(4) + 2, "m": normal(4, seed=1) + 5, "v": np.ones(4, np.float32), "k": normal(4, 1, 1) + 3}
    constants["t"] = constants["s"] * constants["m"] / np.sqrt(np.float32(1) + np.float32(1e-5))
    proto = model("(float[8,4,8,8] x) => (y) { n = BatchNormalization(x, s, t, m, v) y = Mul(n, k) }", **constants)
    result = fastbn.fold(proto)
    assert len(result.folded) == 1
    assert result.parity.status == "ok", result.parity
    far = onnx.ModelProto()
    far.CopyFrom(result.model)
    for tensor in far.graph.initializer:
        values = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array(values + np.float32(1e-4) * np.abs(values), tensor.name))
    assert fastbn.verify(proto, far).status == "failed"
