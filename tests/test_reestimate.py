"""reestimate: the statistics of what really flows in, level by level, whatever is kept and however the data come."""

import os
import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from sketch import model, norm, normal, run
from statistics_truth import as_float64, branches, images, population

import fastbn
from fastbn import reestimate
from fastbn.cli import main
from fastbn.reestimation.levels import LEFT

HEAD = "(float[N, 2] x) => (float[N, 2] y)"
ONE = model(HEAD + " { y = BatchNormalization (x, s, t, m, v) }", **norm(2))


def bits(result):
    """The statistics as bytes."""
    return {name: (stats.count, stats.mean.tobytes(), stats.m2.tobytes()) for name, stats in result.statistics.items()}


def statistics_in(proto):
    """Name of each BN -> (mean, var) as a model has them."""
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    nodes = [node for node in proto.graph.node if node.op_type == "BatchNormalization"]
    return {node.name or node.output[0]: (tensors.get(node.input[3]), tensors.get(node.input[4])) for node in nodes}


def close(found, wanted, units=256):
    """Whether means and variances agree up to the rounding of float32 activations, in units of the deviation."""
    for name, (mean, var) in wanted.items():
        std = np.sqrt(var)
        scale = std + np.abs(mean)
        assert np.abs(found[name].mean - mean).max() <= units * 2.0**-24 * scale.max(), name
        np.testing.assert_allclose(found[name].var, var, rtol=units * 2.0**-24 * (scale / std).max() ** 2, err_msg=name)


# ---- the truth ----


@pytest.mark.parametrize("batch", [1, 7, 23, 100])
def test_statistics_are_those_of_all_data_with_every_norm_before_replaced(batch):
    proto, x = branches(), images()
    wanted, done = population(proto, {"x": x})
    result = reestimate(proto, {"x": x}, batch=batch)
    close(result.statistics, wanted)
    assert result.depth == 4
    assert [moved.distance for moved in result.moved] == sorted((moved.distance for moved in result.moved), reverse=True)
    assert [len(result.moved), result.samples, result.partitions, result.left] == [5, 23, -(-23 // batch), []]
    found = statistics_in(result.model)
    for name, (mean, var) in statistics_in(done).items():
        np.testing.assert_allclose(found[name][0], mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found[name][1], var, rtol=1e-4)
    # What is normalized has mean 0 and variance 1 now: y is the output of the last one.
    (y,) = run(result.model, {"x": x})
    scale, bias = (numpy_helper.to_array(each) for each in result.model.graph.initializer if each.name in ("s5", "t5"))
    mean, var = as_float64(y)
    np.testing.assert_allclose(mean, bias, atol=1e-5)
    np.testing.assert_allclose(var, np.square(scale) * wanted["y"][1] / (wanted["y"][1] + 1e-5), rtol=1e-4)


@pytest.mark.parametrize("mean", [0, 1e4])
def test_activations_given_the_moments_are_those_of_float64(mean):
    x = (np.random.default_rng(1).standard_normal((999, 2)) * [1, 3] + mean).astype(np.float32)
    stats = reestimate(ONE, x, batch=10).statistics["y"]
    want_mean, want_var = as_float64(x)
    assert stats.count == 999
    assert (np.abs(stats.mean - want_mean) <= 1e-9 * np.sqrt(want_var)).all()
    np.testing.assert_allclose(stats.var, want_var, rtol=1e-9)


def test_what_is_kept_does_not_change_a_bit():
    x = {"x": images()}
    wanted = bits(reestimate(branches(), x, batch=4))
    for memory in (0, 20_000, "1 MB"):
        assert bits(reestimate(branches(), x, batch=4, memory=memory)) == wanted
    assert bits(reestimate(branches(), x, batch=5)) != wanted


def test_in_one_pass_each_batch_is_normalized_by_its_own_statistics():
    proto, x = branches(), images(20)
    found = reestimate(proto, {"x": x}, batch=5, mode="one-pass").statistics
    parts = [population(proto, {"x": part})[0] for part in np.split(x, 4)]
    wanted = {}
    for name in found:
        means, variances = (np.array([part[name][each] for part in parts]) for each in (0, 1))
        wanted[name] = means.mean(axis=0), variances.mean(axis=0) + means.var(axis=0)
    close(found, wanted)
    with pytest.raises(AssertionError):
        close(found, population(proto, {"x": x})[0])


def test_selected_ones_and_their_levels():
    proto, x = branches(), images()
    result = reestimate(proto, {"x": x}, only=["b*"], skip="b1")
    wanted, _ = population(proto, {"x": x}, skip=("b1", "y"))
    close(result.statistics, wanted)
    assert set(result.statistics) == {"b2", "b3", "b4"}
    assert result.depth == 2
    assert {(left.bn, left.code) for left in result.left} == {("b1", "not-selected"), ("y", "not-selected")}
    assert statistics_in(result.model)["b1"][0].tobytes() == statistics_in(proto)["b1"][0].tobytes()


def test_one_of_a_thing_is_said_so():
    assert ", 1 level, 2 samples in 1 partition in this process, " in str(reestimate(ONE, images(2, 1, 2).reshape(2, 2), batch=2))
    assert ", 1 level, 5 samples in 3 partitions in this process, " in str(reestimate(ONE, images(5, 1, 2).reshape(5, 2), batch=2))


def test_momentum_and_the_unbiased_variance():
    x = images(5, 1, 2).reshape(5, 2)
    mean, var = as_float64(x)
    old_mean, old_var = statistics_in(ONE)["y"]
    for momentum, unbiased in ((None, True), (0.25, False), (1, True)):
        new_mean, new_var = statistics_in(reestimate(ONE, x, momentum=momentum, unbiased=unbiased).model)["y"]
        weight = momentum or 1
        np.testing.assert_allclose(new_mean, (1 - weight) * old_mean + weight * mean, rtol=1e-6)
        np.testing.assert_allclose(new_var, (1 - weight) * old_var + weight * var * (5 / 4 if unbiased else 1), rtol=1e-6)


def test_how_far_it_moved():
    constants = {"s": np.ones(2, np.float32), "t": np.zeros(2, np.float32), "m": np.float32([0, 1]), "v": np.float32([4, 1])}
    proto = model(HEAD + " { y = BatchNormalization <epsilon = 0.0> (x, s, t, m, v) }", **constants)
    (moved,) = reestimate(proto, np.float32([[-1, 1], [7, 1 + 2e-3]])).moved  # mean 3, std 4 where 0, 2 was; 1.001, 0.001 where 1, 1 was
    assert (moved.channel, moved.channels, moved.count, moved.level) == (0, 2, 2, 1)
    assert [moved.mean_shift, moved.std_ratio] == pytest.approx([1.5, 2])
    assert moved.distance == pytest.approx(np.hypot(1.5, 1))
    assert moved.typical == pytest.approx((np.hypot(1.5, 1) + 0.999) / 2, rel=1e-3)


def test_statistics_that_are_none_are_replaced():
    proto = model(
        HEAD + " { y = BatchNormalization (x, s, t, m, v) }", **{**norm(2), "m": np.float32([np.nan, 0]), "v": np.float32([-1, 1])}
    )
    result = reestimate(proto, np.float32([[0, 1], [2, 3]]))
    assert statistics_in(result.model)["y"][0].tolist() == [1, 2]
    assert result.moved[0].distance == np.inf
    assert result.to_dict()["moved"][0]["distance"] == "inf"


def test_the_run_in_the_docs_is_a_real_one(tmp_path, capsys, monkeypatch):
    root = Path(__file__).resolve().parents[1]
    for name in ("torch_digits.onnx", "dark_digits.npz"):
        shutil.copy(root / "tests" / "models" / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["reestimate", "torch_digits.onnx", "fixed.onnx", "--data", "dark_digits.npz", "--workers", "0"]) == 0
    shown = "".join(f"    {line}\n" for line in capsys.readouterr().out.splitlines())
    numbers = r"[0-9.]+ s$"
    page = re.sub(numbers, "#", (root / "docs" / "reestimate.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert re.sub(numbers, "#", shown, flags=re.MULTILINE) in page


@pytest.mark.parametrize(("out", "message"), [
    ("in.onnx", "Cannot write 'in.onnx': OUT is IN"),
    ("data.npy", "Cannot write 'data.npy': it is an input"),
])  # fmt: skip
def test_an_input_is_never_written_over(out, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    onnx.save(ONE, "in.onnx")
    np.save("data.npy", normal(8, 2))
    before = Path(out).read_bytes()
    assert main(["reestimate", "in.onnx", out, "--data", "data.npy", "--force", "--workers", "0"]) == 2
    assert capsys.readouterr().err == f"fastbn: {message}\n"
    assert Path(out).read_bytes() == before


# ---- types, places and shapes of models ----


@pytest.mark.parametrize("name", ["float16", "bfloat16", "double"])
def test_other_types(name, tmp_path):
    kind = {"float16": "float16", "bfloat16": "bfloat16", "double": "double"}[name]
    dtype = helper.tensor_dtype_to_np_dtype(onnx.TensorProto.DataType.Value(name.upper()))
    text = f"({kind}[N, 12] x) => ({kind}[N, 2] y) {{ c = MatMul (x, w) b = BatchNormalization (c, s, t, m, v) r = Relu (b) "
    text += "d = MatMul (r, u) y = BatchNormalization (d, s1, t1, m1, v1) }"
    constants = {"w": normal(12, 4), "u": normal(4, 2), **norm(4), **norm(2, "1")}
    proto = model(text, **{key: values.astype(dtype) for key, values in constants.items()})
    plain = model(text.replace(kind, "float"), **{key: values.astype(dtype).astype(np.float32) for key, values in constants.items()})
    x = images(size=2).reshape(-1, 12).astype(dtype if name != "bfloat16" else np.float32)
    onnx.save(proto, tmp_path / "in.onnx")
    result = reestimate(tmp_path / "in.onnx", {"x": x})
    assert bits(result) == bits(reestimate(proto, {"x": x}))
    wanted, _ = population(plain, {"x": x.astype(np.float32)})
    unit = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "double": 2.0**-24}[name]
    for key, (mean, var) in statistics_in(result.model).items():
        assert mean.dtype == var.dtype == dtype
        assert np.abs(mean.astype(float) - wanted[key][0]).max() <= 8 * unit * np.sqrt(wanted[key][1]).max() * 4
        np.testing.assert_allclose(var.astype(float), wanted[key][1], rtol=32 * unit)
    assert ("run in float32: onnxruntime has no bfloat16 kernels" in result.notes) == (name == "bfloat16")


def test_a_statistic_that_the_type_cannot_hold_stays():
    text = "(float16[N, 2] x) => (float16[N, 2] y) { z = Mul (x, w) y = BatchNormalization (z, s, t, m, v) }"
    proto = model(text, w=np.float16([1, 1000]), **norm(2, dtype=np.float16))
    result = reestimate(proto, np.float16([[-1, -1], [1, 1]]))
    assert [(left.bn, left.code) for left in result.left] == [("y", "not-representable")]
    assert result.model.SerializeToString() == proto.SerializeToString()


def test_shared_and_computed_statistics_get_their_own():
    text = """(float[N, 2] x) => (float[N, 2] y) {
        n = Neg (m)
        a = BatchNormalization (x, s, t, m, v)
        b = BatchNormalization (a, s, t, m, v)
        y = BatchNormalization (b, s, t, n, s) }"""
    proto = model(text, **norm(2, positive=True))
    x = images(9, 1, 2).reshape(9, 2)
    result = reestimate(proto, x)
    found = statistics_in(result.model)
    np.testing.assert_allclose(found["a"][0], as_float64(x)[0], rtol=1e-6)
    for name in "by":  # behind a BN: mean t, deviation |s|
        np.testing.assert_allclose(found[name][0], norm(2, positive=True)["t"], atol=1e-6)
        np.testing.assert_allclose(found[name][1], norm(2, positive=True)["s"] ** 2, rtol=1e-4)
    assert "'m' is shared: 'a' has a running_mean of its own now" in result.notes
    onnx.checker.check_model(result.model, full_check=True)


def test_old_files_whose_constants_are_inputs():
    proto = model(HEAD + " { y = BatchNormalization (x, s, t, m, v) }", ir_version=3, opset=9, **norm(2))
    shared = model(
        HEAD + " { z = BatchNormalization (x, s, t, m, v) y = BatchNormalization (z, s, t, m, v) }", ir_version=3, opset=9, **norm(2)
    )
    for each in (proto, shared):
        for tensor in each.graph.initializer:
            each.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        x = images(9, 1, 2).reshape(9, 2)
        result = reestimate(each, x)
        assert result.left == []
        onnx.checker.check_model(result.model)
        (y,) = run(result.model, {"x": x})
        np.testing.assert_allclose(as_float64(y)[0], norm(2)["t"], atol=1e-5)


def test_several_inputs_a_late_one_and_one_for_all():
    text = """(float[N, 2] x, float[N, 2] late, float scale, int64[1] axis) => (float[N, 2] y) {
        a = BatchNormalization (x, s, t, m, v)
        r = Mul (a, scale)
        z = Add (r, late)
        u = Unsqueeze (z, axis)
        q = Squeeze (u, axis)
        y = BatchNormalization (q, s1, t1, m1, v1) }"""
    proto = model(text, **norm(2), **norm(2, "1", seed=2))
    x, late = images(9, 1, 2, 1).reshape(9, 2), images(9, 1, 2, 2).reshape(9, 2)
    feeds = {"x": x, "late": late, "scale": np.array(3, np.float32), "axis": np.int64([2])}
    close(reestimate(proto, feeds, batch=4).statistics, population(proto, feeds)[0])
    (kept,) = [reestimate(proto, {**feeds, "late": late[:1]}, batch=4)]
    close(kept.statistics, population(proto, {**feeds, "late": np.repeat(late[:1], 9, axis=0)})[0])


def test_values_that_are_no_tensors_are_computed_again_behind_the_cut():
    text = """(float[N, 2] x) => (float[N, 2] y) {
        list = SequenceConstruct (x, x)
        a = BatchNormalization (x, s, t, m, v)
        second = SequenceAt (list, one)
        z = Mul (a, second)
        y = BatchNormalization (z, s1, t1, m1, v1) }"""
    proto = model(text, one=np.int64(1), **norm(2), **norm(2, "1"))
    x = images(9, 1, 2).reshape(9, 2)
    close(reestimate(proto, x, batch=4).statistics, population(proto, {"x": x})[0])


def test_what_stays_and_why():
    then, other = (f"() => (float[N, 2] {name}) {{ {name} = BatchNormalization (x, s, t, m, v) }}" for name in "cd")
    text = f"""(float[N, 2] x, bool which, float[2] given) => (float[N, 2] y) {{
        a = If (which) <then_branch = th {then}, else_branch = el {other}>
        b = BatchNormalization (a, s, t, given, v)
        e, e1, e2 = BatchNormalization <training_mode = 1> (b, s, t, m, v)
        y = BatchNormalization (e, s, t, m, v) }}"""
    proto = model(text, **norm(2))
    feeds = {"x": images(9, 1, 2).reshape(9, 2), "which": np.array(True), "given": np.float32([0, 0])}
    with pytest.raises(fastbn.ArgumentError, match="'which'"):
        reestimate(proto, {"x": feeds["x"]})
    result = reestimate(proto, [feeds])
    assert {left.bn: left.code for left in result.left} == {
        "c": "in-subgraph",
        "d": "in-subgraph",
        "b": "dynamic-parameters",
        "e": "training",
    }
    assert all(left.code in LEFT for left in result.left)
    assert [moved.bn for moved in result.moved] == ["y"]
    assert np.isfinite(statistics_in(result.model)["y"]).all()


def test_a_model_without_any_comes_back_byte_for_byte(tmp_path):
    data = model("(float[N, 2] x) => (float[N, 2] y) { y = Relu (x) }").SerializeToString()
    result = reestimate(data, np.zeros((1, 2), np.float32))
    assert result.to_bytes() == data
    assert result.moved == result.left == []
    assert "nothing to do" in str(result)


def test_functions_with_norms_are_inlined():
    call = model("(float[N, 2] x) => (float[N, 2] y) { z = local.Twice (x) y = Relu (z) }", imports=("local",), **norm(2))
    body = "{ o = Constant <value = float[2] {1, 1}> () y = BatchNormalization (x, o, o, o, o) }"
    text = f'<domain: "local", opset_import: ["" : 17]> Twice (x) => (y) {body}'
    call.functions.append(onnx.parser.parse_function(text))
    x = images(9, 1, 2).reshape(9, 2)
    (moved,) = reestimate(call, x).moved
    assert moved.count == 9
    assert statistics_in(reestimate(call, x).model)[moved.bn][0] == pytest.approx(as_float64(x)[0], rel=1e-5)


def test_tensors_in_data_files(tmp_path):
    proto, x = branches(), {"x": images()}
    onnx.save(branches(), tmp_path / "in.onnx", save_as_external_data=True, location="in.data", size_threshold=0)
    result = reestimate(tmp_path / "in.onnx", x)
    assert bits(result) == bits(reestimate(proto, x))
    paths = result.save(tmp_path / "out.onnx")
    assert [path.name for path in paths] == ["out.onnx", "out.onnx.data"]
    assert statistics_in(onnx.load(paths[0]))["y"][0].tobytes() == statistics_in(reestimate(proto, x).model)["y"][0].tobytes()


def test_a_batch_that_the_model_fixes():
    proto = model("(float[4, 2] x) => (float[4, 2] y) { y = BatchNormalization (x, s, t, m, v) }", **norm(2))
    x = images(20, 1, 2).reshape(20, 2)
    assert reestimate(proto, x, batch=9).partitions == 3  # of 8, 8 and 4
    close(reestimate(proto, x).statistics, population(ONE, {"x": x})[0])
    assert reestimate(proto, x, samples=9).samples == 8
    assert reestimate(proto, x.reshape(5, 4, 2)).samples == 20
    with pytest.raises(fastbn.ArgumentError, match="a multiple of 4 samples"):
        reestimate(proto, x[:18])


@pytest.mark.parametrize(("options", "error"), [
    ({"mode": "fast"}, "Expected population or one-pass, got 'fast' - at `mode`"),
    ({"batch": 0}, "Expected at least 1, got 0 - at `batch`"),
    ({"momentum": 0}, "Expected a part, more than 0 and at most 1, got 0 - at `momentum`"),
    ({"momentum": 2}, "Expected a part, more than 0 and at most 1, got 2 - at `momentum`"),
    ({"memory": "much"}, "Expected a number of bytes, as 500MB or 2G, got 'much' - at `memory`"),
    ({"unbiased": 1}, "Expected True or False, got int - at `unbiased`"),
    ({"samples": 0}, "Expected at least 1, got 0 - at `samples`"),
    ({"workers": -1}, "Expected at least 0, got -1 - at `workers`"),
    ({"only": "nothing"}, "Expected a glob that names a node .*, got 'nothing' - at `only`"),
    ({"threads": 1.5}, "Expected a whole number, got float - at `threads`"),
])  # fmt: skip
def test_options_that_cannot_be_used(options, error):
    with pytest.raises((ValueError, TypeError), match=f"^{error}$"):
        reestimate(ONE, np.zeros((4, 2), np.float32), **options)


@pytest.mark.parametrize(("data", "error"), [
    (np.zeros((0, 2), np.float32), "Expected at least one sample, got none - at `data`"),
    ([], "Expected at least one sample, got none - at `data`"),
    (np.zeros((1, 2), np.float32), "Expected at least two values per channel, got 1 - at `data, at 'y'`"),
    (np.float32([[0, 0], [0, np.nan], [0, 0]]), "Expected finite values, got NaN in 'x' - at `sample 1 of data`"),
    (np.float32([[0, 0]] * 40 + [[np.inf, 0]]), "Expected finite values, got Inf in 'x' - at `sample 40 of data`"),
    ({"z": np.zeros((4, 2), np.float32)}, r"Expected arrays named after the inputs \(x\), got 'z' - at `data`"),
    (np.zeros((4, 3), np.float32), r"Expected shape \[\?,2\] for 'x', got \[4,3\] - at `data`"),
    (np.zeros((4, 2), np.int64), "Expected float32 for 'x', got int64 - at `data`"),
    (3, "Expected paths, URLs, arrays or tensors, a loader, an iterable of dicts, or a collection of dask, got int - at `data`"),
    (b"x.npy", "Expected paths, URLs, arrays or tensors, a loader, an iterable of dicts, or a collection of dask, got bytes - at `data`"),
    ([3], r"Expected a dict of arrays, an array or a tuple of them, got int - at `data\[0\]`"),
    ([b"x.npy"], r"Expected a dict of arrays, an array or a tuple of them, got bytes - at `data\[0\]`"),
])  # fmt: skip
def test_data_that_cannot_be_used(data, error):
    with pytest.raises((ValueError, TypeError), match=f"^{error}$"):
        reestimate(ONE, data)


def test_activations_that_overflow_name_the_samples():
    proto = model(HEAD + " { z = Exp (x) y = BatchNormalization (z, s, t, m, v) }", **norm(2))
    x = np.zeros((70, 2), np.float32)
    x[50] = 1000
    message = "Expected finite activations, got NaN or Inf in 'z' for samples 32 to 63 of data - at `data`"
    with pytest.raises(fastbn.ModelError, match=f"^{message}$"):
        reestimate(proto, x)


def test_what_onnxruntime_cannot_run():
    proto = model(HEAD + " { z = Reshape (x, shape) y = BatchNormalization (z, s, t, m, v) }", shape=np.int64([3, 2]), **norm(2))
    with pytest.raises(fastbn.ModelError, match=r"^Cannot run the model on samples 0 to 3 of data: "):
        reestimate(proto, np.zeros((4, 2), np.float32))
    assert reestimate(proto, np.float32([[1, 2], [3, 4], [5, 6]])).samples == 3


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the size of a process is read from /proc")
def test_sessions_of_pieces_share_their_memory():
    """The first pieces need up to 400 MB while they run; with arenas of their own six sessions would keep 1.6 GB."""
    steps = "".join(f"a{k} = Tile (v{k}, many) b{k} = Neg (a{k}) c{k} = Slice (b{k}, zero, one, zero) n{k} = Neg (c{k}) "
                    f"v{k + 1} = BatchNormalization (n{k}, s, t, m, v) " for k in range(6))  # fmt: skip
    constants = {"many": np.array([1 << 14, 1]), "zero": np.array([0]), "one": np.array([2]), **norm(1 << 9)}
    proto = model(f"(float[2, 512] v0) => (float[2, 512] v6) {{ {steps} }}", **constants)
    before, sizes = resident(), []
    reestimate(proto, normal(8, 512), batch=2, memory=1 << 20, progress=lambda *_: sizes.append(resident()))
    assert max(sizes) - before < 12 << 26


def resident():
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
