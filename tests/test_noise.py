"""The measured tolerance: it must come from the original itself, and one near the size of the output proves nothing."""

import numpy as np
import onnx
import pytest
from onnx import NodeProto
from sketch import assert_same, conv_bn, folds, initializers, model, norm, normal, ops

import fastbn
from fastbn.cli import main
from fastbn.graph import job
from fastbn.graph.model import expressions, storage
from fastbn.graph.model.index import Index
from fastbn.graph.parity.fold_parity import FoldParity
from fastbn.graph.parity.noise import OwnNoise


def unsqueezed(opset, axes, gain=1.0):
    """Return Conv, Mul, Add, Flatten, Gemm; what is multiplied and added is made of vectors, and there are as many rows as channels."""
    text = f"""(float[1,3,8,8] x) => (float[1,10] y) {{
        c = Conv <pads = [1,1,1,1]> (x, w)
        su = Unsqueeze <axes = {axes}> (s)
        bu = Unsqueeze <axes = {axes}> (b)
        p = Mul(c, su)
        q = Add(p, bu)
        f = Flatten(q)
        y = Gemm(f, v)
    }}"""
    vectors = {"s": gain * np.linspace(0.5, 4, 8, dtype=np.float32), "b": normal(8, seed=2)}
    return model(text, opset=opset, w=normal(8, 3, 3, 3), v=normal(512, 10), **vectors)


@pytest.mark.parametrize("opset", [11, 12])
@pytest.mark.parametrize("axes", [[-2, -1], [-1, -2], [1, 2], [2, 1], [1, -1]])
def test_constants_with_axes_from_the_back_or_in_any_order(opset, axes):
    proto = unsqueezed(opset, axes)
    result = folds(proto, "Conv Flatten Gemm")
    assert result.parity.allowed < 1e-4 * abs(result.parity.values[0]) + 1e-3
    expected = initializers(proto)["w"] * initializers(proto)["s"].reshape(8, 1, 1, 1)
    (weight,) = (values for values in initializers(result.model).values() if values.ndim == 4)
    assert np.allclose(weight, expected, rtol=1e-6, atol=0)


def test_squeeze_with_axes_from_the_back():
    text = "(float[1,3,8,8] x) => (float y) { c = Conv <pads = [1,1,1,1]> (x, w) k = Squeeze <axes = [-4,-5]> (s) y = Mul(c, k) }"
    folds(model(text, opset=11, w=normal(8, 3, 3, 3), s=np.linspace(1, 2, 8, dtype=np.float32).reshape(1, 1, 8, 1, 1)), "Conv")


def turned(monkeypatch):
    """Evaluate Unsqueeze wrongly: the channels become the rows."""
    run = expressions.evaluated

    def wrong(key, *given):
        results = run(key, *given)
        is_turned = NodeProto.FromString(key[0]).op_type == "Unsqueeze"
        return {slot: each.reshape(1, -1, 1) for slot, each in results.items()} if is_turned else results

    monkeypatch.setattr(expressions, "evaluated", wrong)


@pytest.mark.parametrize("gain", [1.0, 100.0])
def test_a_noise_that_is_not_the_original_is_void(gain, monkeypatch):
    """The wrong constant is in the noise too: as a bound it would allow any fold with it."""
    proto = unsqueezed(11, [-2, -1], gain)
    wrong = unsqueezed(11, [-2, -1], gain)
    values = initializers(wrong)["w"] * 1.01
    wrong.graph.initializer[0].raw_data = values.tobytes()
    right = fastbn.verify(proto, proto)
    assert (right.status, right.notes) == ("ok", ())
    assert fastbn.verify(proto, wrong).status == "failed"
    turned(monkeypatch)
    for folded, status in ((proto, "ok"), (wrong, "failed")):
        parity = fastbn.verify(proto, folded)
        assert parity.status == status
        assert any("the rounding noise enters by the inputs alone" in note for note in parity.notes)
    assert parity.allowed < 1e-3 * abs(parity.values[0])


@pytest.mark.parametrize("proved_by", ["fold", "model"])
def test_a_constant_that_is_evaluated_wrongly_folds_nowhere(proved_by, monkeypatch):
    turned(monkeypatch)
    proto = unsqueezed(11, [-2, -1])
    if proved_by == "model":
        monkeypatch.setattr(job, "check_fold", lambda *_: FoldParity(True))
    result = fastbn.fold(proto)
    assert result.parity is None or result.parity.ok
    assert_same(proto, result.model)


CHAOS = """(float[2,3,8,8] x) => (float[2,4,6,6] y) {
    c = Conv(x, w, b)
    n = BatchNormalization(c, s, t, m, v)
    h = Mul(n, big)
    y = Sin(h)
}"""
BODY = """(float[2,3,8,8] x, bool cond) => (float[N,4,H,W] y) {
    y = If (cond) <
        then_branch = g1 () => (float[N,4,H,W] p) {
            c = Conv(x, w, b) n = BatchNormalization(c, s, t, m, v) h = Mul(n, big) p = Sin(h)
        },
        else_branch = g2 () => (float[N,4,H,W] q) { q = Conv(x, w, b) }
    >
}"""


@pytest.mark.parametrize("big", [1e4, 1e6])
def test_an_output_of_which_rounding_makes_anything_is_compared_piece_by_piece(big):
    result = fastbn.fold(conv_bn(CHAOS, big=np.float32(big)))
    assert len(result.folded) == 1
    assert result.parity.status == "ok"
    assert result.parity.notes == ("compared piece by piece, at 1 values on the way",)
    assert result.parity.output == "h"
    assert "h" in result.parity.compared


def test_piece_by_piece_a_wrong_weight_is_found():
    proto = conv_bn(CHAOS, big=np.float32(1e6))
    other = fastbn.fold(proto, verify=False).model
    tensor = next(each for each in other.graph.initializer if len(each.dims) == 4)
    tensor.raw_data = (initializers(other)[tensor.name] * np.float32(1.001)).tobytes()
    assert fastbn.verify(proto, other).status != "ok"


def test_what_proves_nothing_is_said(tmp_path, capsys):
    """In a body there is no value on the way that both models hand out."""
    proto = conv_bn(BODY, big=np.float32(1e6))
    result = fastbn.fold(proto)
    assert len(result.folded) == 1
    assert result.parity.status == "inconclusive"
    assert "proves nothing" in result.parity.reason
    assert "   ok" not in str(result.parity)
    onnx.save(proto, tmp_path / "m.onnx")
    assert main(["fold", str(tmp_path / "m.onnx"), str(tmp_path / "out.onnx"), "-q"]) == 5
    assert (tmp_path / "out.onnx").exists()
    assert main(["fold", str(tmp_path / "m.onnx"), str(tmp_path / "unverified.onnx"), "-q", "--no-verify"]) == 0
    assert main(["verify", str(tmp_path / "m.onnx"), str(tmp_path / "out.onnx")]) == 5
    assert "inconclusive" in capsys.readouterr().out


@pytest.mark.parametrize("big", [1.0, 100.0])
def test_a_bound_that_proves_something_needs_no_pieces(big):
    parity = fastbn.fold(conv_bn(CHAOS.replace("Sin", "Tanh"), big=np.float32(big))).parity
    assert (parity.status, parity.notes, parity.compared) == ("ok", (), ("y",))
    assert parity.allowed <= 0.01


BEHIND = """(float[2,3,8,8] x) => (float[2,4,6,6] y) {{
    c = Conv(x, w, b)
    n = BatchNormalization(c, s, t, m, v)
    a = Abs(n)
    g = Neg(a)
    l = {op}(g)
    d = Conv(l, w2)
    y = BatchNormalization(d, s, z, z, v)
}}"""


@pytest.mark.parametrize("op", ["Log", "Relu"])
def test_a_fold_behind_values_that_are_nan_or_zero_on_every_input_is_proven_on_others(op):
    proto = conv_bn(BEHIND.format(op=op), w2=normal(4, 4, 1, 1), z=np.zeros(4, np.float32))
    result = fastbn.fold(proto)
    assert [fold.bn for fold in result.folded] == ["n", "y"]
    assert result.parity.ok
    assert {"n", "y"} <= set(result.parity.compared)
    other = onnx.ModelProto()
    other.CopyFrom(result.model)
    tensor = next(each for each in other.graph.initializer if list(each.dims) == [4, 4, 1, 1])
    tensor.raw_data = (initializers(other)[tensor.name] * np.float32(1.01)).tobytes()
    assert fastbn.verify(proto, other).status == "inconclusive"


def test_a_fold_that_no_value_reaches_is_named(tmp_path):
    """In a body there is no other value to try."""
    text = """(float[2,3,8,8] x, bool cond) => (float[2,4,6,6] n, float[2,4,6,6] y) {
        c = Conv(x, w, b)
        n = BatchNormalization(c, s, t, m, v)
        y = If (cond) <
            then_branch = g1 () => (float[2,4,6,6] p) {
                a = Abs(x) g = Neg(a) l = Log(g) d = Conv(l, w2) p = BatchNormalization(d, s, t, m, v)
            },
            else_branch = g2 () => (float[2,4,6,6] q) { e = Abs(x) f = Neg(e) k = Log(f) q = Conv(k, w3) }
        >
    }"""
    proto = conv_bn(text, w2=normal(4, 3, 3, 3, seed=5), w3=normal(4, 3, 3, 3, seed=6))
    result = fastbn.fold(proto)
    assert [(fold.bn, fold.note) for fold in result.folded] == [("n", None), ("p", "not reached by the comparison of the whole model")]
    assert result.parity.status == "inconclusive"
    assert "the fold of p" in result.parity.reason
    onnx.save(proto, tmp_path / "m.onnx")
    assert main(["fold", str(tmp_path / "m.onnx"), "-q"]) == 5


ALL_NAN = """(float[1,3,8,8] x) => (float[1,4,6,6] z) {
    c = Conv(x, w, b)
    y = BatchNormalization(c, s, t, m, v)
    q = Sqrt(y)
    p = Sub(q, q)
    l = Log(p)
    z = Mul(l, p)
}"""


def test_nan_on_both_sides_proves_nothing_by_itself():
    proto = conv_bn(ALL_NAN)
    result = fastbn.fold(proto)
    assert result.parity.status == "ok"
    assert (result.parity.output, result.parity.error > 0) == ("y", True), "what is proven is proven on the way"
    inside = conv_bn(
        BODY.replace("p = Sin(h)", "k = Sub(h, h) p = Log(k)").replace("q = Conv(x, w, b)", "e = Conv(x, w, b) k2 = Sub(e, e) q = Log(k2)"),
        big=np.float32(1),
    )
    inside = fastbn.fold(inside)
    assert len(inside.folded) == 1
    assert inside.parity.status == "inconclusive"


ZERO_ALONE = """(float[1,3,8,8] x, bool cond) => (float[N,4,H,W] y) {
    e = Abs(x)
    f = ReduceSum <keepdims = 1> (e)
    g = Mul(f, huge)
    h = Mul(g, huge)
    y = If (cond) <
        then_branch = g1 () => (float[N,4,H,W] p) { c = Conv(x, w, b) k = BatchNormalization(c, s, t, m, v) p = Add(k, h) },
        else_branch = g2 () => (float[N,4,H,W] q) { d = Conv(x, w, b) l = BatchNormalization(d, s, t, m, v) q = Add(l, h) }
    >
}"""


def test_the_input_of_zeros_alone_proves_nothing():
    """Every other input overflows."""
    result = fastbn.fold(conv_bn(ZERO_ALONE, huge=np.float32(1e30)))
    assert len(result.folded) == 2
    assert result.parity.status == "inconclusive"
    assert "on every input but zeros" in result.parity.reason
    finite = fastbn.fold(conv_bn(ZERO_ALONE, huge=np.float32(1)))
    assert finite.parity.status == "ok"


FAR = np.full(4, 1000, np.float32)
CANCELING = {
    "norms": (
        "n = BatchNormalization(r, v, far, far, v) k = BatchNormalization(n, s, zero, zero, v) q = Neg(k)"
        " y = BatchNormalization(q, s, zero, zero, v)",
        "Tanh Neg BatchNormalization",
    ),
    "sums": ("a = Add(r, there) b = Sub(a, back) q = Neg(b) y = BatchNormalization(q, s, zero, zero, v)", "Tanh Neg BatchNormalization"),
}


@pytest.mark.parametrize("case", CANCELING)
def test_shifts_that_cancel_on_their_way_are_bounded_by_what_they_were(case):
    """The original rounds at 1000 times the size of what is left, a chain that is one norm does not."""
    nodes, expected = CANCELING[case]
    constants = {"far": FAR, "zero": np.zeros(4, np.float32), "there": FAR.reshape(4, 1, 1), "back": FAR.reshape(4, 1, 1) + 0.5}
    used = {name: values for name, values in constants.items() if name in nodes}
    proto = model(
        f"(float[2,4,3,3] x) => (float y) {{ r = Tanh(x) {nodes} }}", s=np.full(4, 1.25, np.float32), v=np.ones(4, np.float32), **used
    )
    result = fastbn.fold(proto)
    assert ops(result.model) == expected, result.kept
    assert result.parity.ok


# A branch that no random input takes, and one that all take.
HIDDEN = """(float[1,3,8,8] x) => (float[1,4,6,6] y) {
    sum = ReduceSum <keepdims = 0> (x)
    cond = Greater(sum, large)
    y = If (cond) <
        then_branch = g1 () => (float[1,4,6,6] p) { c = Conv(x, w) p = BatchNormalization(c, s, t, m, v) },
        else_branch = g2 () => (float[1,4,6,6] q) { q = Conv(x, w) }
    >
}"""


def test_a_wrong_branch_that_random_inputs_do_not_take_has_failed(tmp_path, capsys):
    proto = model(HIDDEN, w=normal(4, 3, 3, 3), large=np.float32(1e9), **norm(4))
    result = folds(proto, "ReduceSum Greater If")
    assert result.parity.ok
    onnx.save(proto, tmp_path / "m.onnx")
    wrong = result.model
    then = next(attribute.g for attribute in wrong.graph.node[2].attribute if attribute.name == "then_branch")
    weight = next(tensor for tensor in (*then.initializer, *wrong.graph.initializer) if tensor.name == then.node[0].input[1])
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * np.float32(1.01), weight.name))
    onnx.save(wrong, tmp_path / "wrong.onnx")
    assert main(["verify", str(tmp_path / "m.onnx"), str(tmp_path / "wrong.onnx")]) == 1
    assert "failed: in the then branches" in capsys.readouterr().out


def test_a_fold_in_a_branch_that_cannot_be_run_is_named():
    text = HIDDEN.replace("c = Conv(x, w)", "e = Reshape(x, sizes) c = Conv(e, w)").replace("p = Batch", "k = Batch", 1)
    text = text.replace("(c, s, t, m, v) }", "(c, s, t, m, v) p = Reshape(k, other) }", 1)
    result = fastbn.fold(
        model(text, w=normal(4, 3, 3, 3), large=np.float32(1e9), sizes=np.array([7, 3, 5, 5]), other=np.array([1, 4, 6, 6]), **norm(4))
    )
    assert (result.parity.status, result.parity.missed) == ("inconclusive", ("then branches",))
    assert result.folded[0].note.endswith("not reached by the comparison of the whole model")


def test_an_output_that_is_zero_but_for_rounding_proves_nothing():
    """Three times a convolution, less the same sum in another order; random numbers forbid to compare it piece by piece."""
    text = """(float[1,3,8,8] x) => (float[1,4,6,6] y, float[2] r) {
        c = Conv(x, w)
        n = BatchNormalization <epsilon = 0.0> (c, s, t, m, v)
        d = Conv(x, k)
        twice = Add(d, d)
        all = Add(twice, d)
        y = Sub(n, all)
        r = RandomNormal <shape = [2]> ()
    }"""
    weight, zero = normal(4, 3, 3, 3), np.zeros(4, np.float32)
    proto = model(text, w=weight, k=weight, s=zero + 3, t=zero, m=zero, v=zero + 1)
    parity = fastbn.fold(proto).parity
    assert (parity.status, parity.reason) == ("inconclusive", "rounding alone may change values that are all zero, which proves nothing")


@pytest.mark.parametrize("times", [1, 100])
@pytest.mark.parametrize("seed", range(6))
def test_a_shift_that_another_reader_takes_away_again_is_rounded_by_the_folded_model_alone(seed, times):
    """For x = 0 the original gives z = 0 exactly; the folded model gives what is left of two numbers of the size of the shift."""
    text = "(float[2,3,8,8] x) => (float y, float z) { c = Conv(x, w) y = BatchNormalization(c, s, t, m, v) z = Conv(c, k) }"
    constants = {**norm(4, seed=seed), "w": normal(4, 3, 3, 3, seed=seed), "k": normal(5, 4, 1, 1, seed=seed)}
    proto = model(text, **{**constants, "t": constants["t"] * np.float32(times)})
    result = fastbn.fold(proto)
    assert (ops(result.model), result.parity.status) == ("Conv Conv", "ok"), result.kept
    for place in (1, 2):
        wrong = onnx.ModelProto()
        wrong.CopyFrom(result.model)
        tensor = next(each for each in wrong.graph.initializer if each.name == wrong.graph.node[1].input[place])
        tensor.raw_data = (initializers(wrong)[tensor.name] * np.float32(1 + 1e-3)).tobytes()
        assert fastbn.verify(proto, wrong).status == "failed"


def test_a_folded_model_rounds_the_constants_that_the_original_does_not_hold():
    text = "(float[2,3,8,8] x) => (float y) { c = Conv(x, w, b) n = BatchNormalization(c, s, t, m, v) r = Tanh(n) y = Conv(r, k, a) }"
    proto = model(text, w=normal(4, 3, 3, 3), b=normal(4), k=normal(5, 4, 1, 1), a=normal(5), **norm(4))
    original, folded = (Index(storage.load(each)) for each in (proto, fastbn.fold(proto, verify=False).model))
    assert [info.name for info in OwnNoise(original, original).proto.graph.input] == ["x"]
    noise = OwnNoise(original, folded)
    assert [[name for name in node.input if name.startswith("fastbn/noise/")] for node in noise.proto.graph.node] == [
        ["fastbn/noise/0/0/1", "fastbn/noise/0/0/2"],
        [],
        [],
    ]
    x = normal(2, 3, 8, 8)
    feed = noise.perturbed({"x": x}, np.random.default_rng(0))
    assert feed["x"] is x
    least = 2 * 2.0**-24
    for slot in (1, 2):
        values = folded.constant(folded.order[0].inputs[slot]).array()
        assert (np.abs(feed[f"fastbn/noise/0/0/{slot}"] - values) >= least * np.abs(values)).all()


LONG = {
    "Gemm": ("(float[4,4608] x) => (float y) { c = Gemm(x, w) y = BatchNormalization(c, s, t, m, v) }", normal(4608, 4)),
    "Conv": ("(float[1,512,6,6] x) => (float y) { c = Conv(x, w) y = BatchNormalization(c, s, t, m, v) }", normal(4, 512, 3, 3)),
    "pool": (
        """(float[1,4,128,128] x) => (float y) {
            r = Sigmoid(x) n = BatchNormalization(r, s, t, m, v) p = GlobalAveragePool(n) f = Flatten(p) y = Gemm(f, w)
        }""",
        normal(4, 3),
    ),
    "sum of magnitudes": (
        """(float[1,4,64,64] x) => (float y) {
            r = Tanh(x) n = BatchNormalization(r, s, zero, zero, v) d = ReduceL1 <axes = [2,3], keepdims = 0> (n) y = Gemm(d, w)
        }""",
        normal(4, 3),
    ),
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("case", LONG)
def test_what_long_sums_err_is_no_wrong_fold(case, seed):
    """A pool over an image of zeros adds equal terms: its error is no random walk."""
    text, weight = LONG[case]
    constants = {**norm(4, seed=seed, positive=True), "zero": np.zeros(4, np.float32)}
    used = {name: values for name, values in constants.items() if f" {name}," in text or f" {name})" in text}
    proto = model(text, w=(weight / np.sqrt(len(weight))).astype(np.float32), **used)
    result = fastbn.fold(proto, seed=seed)
    assert len(result.folded) == 1, result.kept
    assert result.parity.ok
    other = fastbn.fold(proto, verify=False).model
    tensor = next(each for each in other.graph.initializer if len(each.dims) == weight.ndim)
    tensor.raw_data = (initializers(other)[tensor.name] * np.float32(1.01)).tobytes()
    assert fastbn.verify(proto, other, seed=seed).status == "failed"


@pytest.mark.parametrize("times", [1e3, 1e5, 1e7])
@pytest.mark.parametrize("spoiled", ["s", "t"])
def test_a_small_channel_beside_huge_ones_is_judged_by_its_own_noise(times, spoiled):
    text = """(float[2,3,8,8] x) => (float[2,8,6,6] y) {
        c = Conv(x, w) n = BatchNormalization(c, s, t, m, v) d = Conv(x, k) y = Concat <axis = 1> (n, d)
    }"""
    constants = {"w": normal(4, 3, 3, 3), "k": normal(4, 3, 3, 3, seed=1) * np.float32(times), **norm(4)}
    original = model(text, **constants)
    assert fastbn.verify(original, fastbn.fold(original, verify=False).model).ok
    constants[spoiled] = constants[spoiled] * np.float32(1.01)
    assert fastbn.verify(original, model(text, **constants)).status == "failed"


def test_a_model_that_does_not_run_with_noise_has_none(monkeypatch):
    """Rounding may move an index out of range."""

    def impossible(self, feed, *_):
        return {name: values[..., :-1] for name, values in self.unperturbed(feed).items()}

    monkeypatch.setattr("fastbn.graph.parity.noise.Noise.perturbed", impossible)
    result = fastbn.fold(conv_bn())
    assert result.parity is None or result.parity.status in ("ok", "failed")
    assert_same(conv_bn(), result.model)
