"""Lifting: which nodes are affines, with which scale, shift and axis, and why a BatchNormalization must stay."""

import numpy as np
import pytest
from sketch import codes, conv_bn, folds, model, norm, normal, refuses

import fastbn
from fastbn.graph.model import storage
from fastbn.graph.model.index import Index
from fastbn.graph.planner.view import GraphView

PER_CHANNEL = normal(4, 1, 1)


def lifted(proto, name="y"):
    """Return the Affine of the node that gives a value."""
    index = Index(storage.load(proto))
    return GraphView(index).lifted(index.main.find(name).producer)


def test_a_batch_norm_is_its_affine():
    parameters = norm(4)
    affine = lifted(model("(float[2,4,3] x) => (y) { y = BatchNormalization <epsilon = 0.01> (x, s, t, m, v) }", **parameters))
    x = normal(2, 4, 3).astype(np.float64)
    s, t, m, v = (parameters[name].astype(np.float64)[:, None] for name in "stmv")
    expected = (x - m) / np.sqrt(v + np.float32(0.01)) * s + t
    np.testing.assert_allclose(x * affine.scale[:, None] + affine.shift[:, None], expected, rtol=1e-12)
    assert (affine.axis, affine.channels) == (1, 4)


@pytest.mark.parametrize(
    ("expression", "scale", "shift"),
    [
        ("Add(x, k)", 1, PER_CHANNEL),
        ("Add(k, x)", 1, PER_CHANNEL),
        ("Sub(x, k)", 1, -PER_CHANNEL),
        ("Sub(k, x)", -1, PER_CHANNEL),
        ("Mul(x, k)", PER_CHANNEL, 0),
        ("Mul(k, x)", PER_CHANNEL, 0),
        ("Div(x, k)", 1 / PER_CHANNEL.astype(np.float64), 0),
    ],
)
def test_elementwise_affines_in_either_operand_order(expression, scale, shift):
    affine = lifted(model(f"(float[2,4,3,3] x) => (y) {{ y = {expression} }}", k=PER_CHANNEL))
    np.testing.assert_allclose(affine.scale, np.broadcast_to(np.ravel(scale), 4), rtol=1e-15)
    np.testing.assert_allclose(affine.shift, np.broadcast_to(np.ravel(shift), 4), rtol=1e-15)
    assert affine.axis == -3


@pytest.mark.parametrize(
    ("expression", "constant"),
    [
        ("Div(k, x)", PER_CHANNEL),
        ("Div(x, k)", np.zeros((4, 1, 1), np.float32)),
        ("Add(x, k)", normal(4, 3, 1)),
        ("Add(x, k)", np.full((4, 1, 1), np.inf, np.float32)),
        ("Mul(x, k)", np.zeros((0,), np.float32)),
        ("Mul(x, x)", PER_CHANNEL),
        ("Pow(x, k)", PER_CHANNEL),
    ],
)
def test_what_is_no_affine(expression, constant):
    assert lifted(model(f"(float[2,4,3,3] x) => (y) {{ y = {expression} }}", k=constant)) is None


def test_one_number_is_an_affine_without_an_axis():
    affine = lifted(model("(float[2,4,3,3] x) => (y) { y = Mul(x, k) }", k=np.float32(3)))
    assert (affine.scale.tolist(), affine.axis, affine.rank) == ([3.0], None, 0)


def test_integers_are_no_affine():
    assert lifted(model("(int64[2,4] x) => (y) { y = Add(x, k) }", k=np.arange(4))) is None


def test_a_domain_of_someone_else_is_no_batch_norm():
    proto = model("(float[2,4] x) => (y) { y = com.maker.BatchNormalization(x, s, t, m, v) }", imports=["com.maker"], **norm(4))
    assert lifted(proto) is None
    assert fastbn.fold(proto, verify=False).kept == []


TRAINING = {
    "training_mode": ("<training_mode = 1>", "y", 17),
    "opset 14, three outputs": ("<training_mode = 1>", "y, rm, rv", 14),
    "opset 9, five outputs": ("", "y, rm, rv, sm, sv", 9),
    "opset 7, two outputs": ("", "y, rm", 7),
    "opset 13, empty outputs": ("", 'y, "", "", "", ""', 13),
    "opset 6 without is_test": ("", "y", 6),
    "opset 1 without is_test": ("<consumed_inputs = [0, 0, 0, 1, 1]>", "y", 1),
}


@pytest.mark.parametrize("case", TRAINING)
def test_training_is_never_folded(case):
    attributes, outputs, opset = TRAINING[case]
    norm_node = f"y = BatchNormalization {attributes} (c, s, t, m, v)"
    proto = conv_bn(f"(float[N,3,8,8] x) => (float[N,4,6,6] y) {{ c = Conv(x, w, b) {norm_node} }}", opset=opset)
    proto.graph.node[1].output[:] = [name.strip().strip('"') for name in outputs.split(",")]
    refuses(proto, "training", verify=False)


@pytest.mark.parametrize(
    ("attributes", "opset"), [("<is_test = 1>", 6), ("<is_test = 1, consumed_inputs = [0, 0, 0, 1, 1]>", 1), ("<momentum = 0.5>", 7)]
)
def test_inference_in_old_opsets_folds(attributes, opset):
    text = f"(float[N,3,8,8] x) => (float[N,4,6,6] y) {{ c = Conv(x, w, b) y = BatchNormalization {attributes} (c, s, t, m, v) }}"
    result = fastbn.fold(conv_bn(text, opset=opset, ir_version=4))
    (fold,) = result.folded
    assert fold.error <= fold.bound
    assert [node.op_type for node in result.model.graph.node] == ["Conv"]


def test_opset_14_with_empty_running_outputs_is_inference():
    proto = conv_bn()
    proto.graph.node[1].output.extend(["", ""])
    assert len(fastbn.fold(proto, verify=False).folded) == 1


@pytest.mark.parametrize("opset", [7, 8])
def test_per_element_parameters_are_refused(opset):
    text = "(float[N,3,8,8] x) => (float[N,4,6,6] y) { c = Conv(x, w, b) y = BatchNormalization <spatial = 0> (c, s, t, m, v) }"
    parameters = {name: np.ones((4, 6, 6), np.float32) for name in "stmv"}
    refuses(conv_bn(text, opset=opset, **parameters), "per-element", verify=False)


def test_dynamic_parameters_are_refused():
    text = """(float[N,3,8,8] x, float[4] s) => (float[N,4,6,6] y) {
        c = Conv(x, w, b)
        y = BatchNormalization(c, s, t, m, v)
    }"""
    assert "its scale 's'" in refuses(conv_bn(text, s=None), "dynamic-parameters")


@pytest.mark.parametrize(
    ("name", "values"),
    [("v", [1, 2, -1, 3]), ("v", [1, 2, np.inf, 3]), ("m", [0, 0, np.nan, 0]), ("s", [0, 0, np.inf, 0]), ("t", [0, 0, -np.inf, 0])],
)
def test_bad_parameters_are_refused_and_the_channel_is_named(name, values):
    sentence = refuses(conv_bn(**{name: np.array(values, np.float32)}), "bad-parameters", verify=False)
    assert sentence.endswith("channel 2")


def test_a_decomposed_batch_norm_that_stays_is_reported_as_one():
    text = """(float[2,4,3,3] x) => (float[2,4,3,3] y) {
        r = Tanh(x)
        centered = Sub(r, mean)
        scaled = Mul(centered, k)
        shifted = Add(scaled, k)
        y = Tanh(shifted)
    }"""
    result = fastbn.fold(model(text, mean=normal(4, 1, 1, seed=2), k=PER_CHANNEL))
    assert [(fold.bn, fold.into) for fold in result.folded] == [("centered", "shifted")]
    (kept,) = result.kept
    assert kept.bn == "scaled+shifted"
    assert kept.ops == ("Mul", "Add")


def test_an_ordinary_bias_is_no_batch_norm():
    result = fastbn.fold(model("(float[2,4] x) => (y) { r = Tanh(x) a = Add(r, k) y = Tanh(a) }", k=normal(4)))
    assert codes(result) == {}


def test_weights_of_a_foreign_type_are_refused():
    parameters = {name: np.ones(4, np.int32) for name in "stmv"}
    refuses(conv_bn(**parameters), "unsupported-type", verify=False)


def test_decomposed_with_the_constant_first():
    text = """(float[2,3,8,8] x) => (float[2,4,6,6] y) {
        c = Conv(x, w, b)
        scaled = Mul(k, c)
        y = Sub(shift, scaled)
    }"""
    result = folds(model(text, w=normal(4, 3, 3, 3), b=normal(4), k=PER_CHANNEL, shift=normal(4, 1, 1, seed=4)), "Conv")
    assert [fold.bn for fold in result.folded] == ["scaled+y"]


def test_what_canceled_in_a_bias_is_not_forgotten():
    """A shift that is small only because t - m * s canceled is rounded as its terms are, and so is what becomes of it in the next link."""
    first = {"s": normal(4) + 2, "m": normal(4, seed=1) + 5, "v": np.ones(4, np.float32)}
    first["t"] = first["s"] * first["m"] / np.sqrt(np.float32(1) + np.float32(1e-5))
    nothing = {name: np.zeros(4, np.float32) for name in ("t2", "m2", "t3", "m3")}
    scales = {name: values for name, values in {**norm(4, "2"), **norm(4, "3", seed=2)}.items() if name[0] in "sv"}
    text = """(float[16,4,8,8] x) => (float[16,4,8,8] y) {
        a = BatchNormalization(x, s, t, m, v)
        b = BatchNormalization(a, s2, t2, m2, v2)
        y = BatchNormalization(b, s3, t3, m3, v3)
    }"""
    result = fastbn.fold(model(text, **first, **nothing, **scales))
    assert codes(result)["parity"] == 0, [kept.reason for kept in result.kept]
    assert result.parity.status == "ok"
    assert len(result.kept) == 1


def test_what_canceled_in_an_add_is_not_forgotten():
    text = """(float[16,4,8,8] x) => (float[16,4,8,8] y) {
        a = BatchNormalization(x, s, t, m, v)
        b = Add(a, k)
        c = Mul(b, g)
        y = BatchNormalization(c, s2, t2, m2, v2)
    }"""
    parameters = norm(4)
    far = {"m": np.full(4, 40, np.float32), "t": np.zeros(4, np.float32)}
    shift = parameters["s"] * 40 / np.sqrt(parameters["v"] + np.float32(1e-5))
    others = {**norm(4, "2", seed=2), "m2": np.zeros(4, np.float32), "t2": np.zeros(4, np.float32)}
    result = fastbn.fold(model(text, **{**parameters, **far}, k=shift.reshape(4, 1, 1), g=normal(4, 1, 1), **others))
    assert codes(result)["parity"] == 0, [kept.reason for kept in result.kept]
    assert result.parity.status == "ok"


STREAM = """(float[N,3,8,8] x) => (float y) {{
    c = Conv(x, w, b)
    {norm}
    r = Relu(n)
    d = Conv(r, e)
    f = Conv(c, g)
    y = Add(d, f)
}}"""
WRITTEN = {
    "Mul, Add": "a = Mul(c, k) n = Add(a, h)",
    "Sub, Mul": "a = Sub(c, h) n = Mul(k, a)",
    "Div, Sub": "a = Div(c, k) n = Sub(a, h)",
    "Sub, Div, Mul, Add": "a = Sub(c, h) p = Div(a, k) q = Mul(p, l) n = Add(q, h)",
    "one number and channels": "a = Mul(c, k) n = Add(a, i)",
}
PARTS = {
    "k": np.float32([2, -1, -0.5, 3]).reshape(4, 1, 1),
    "l": normal(4, 1, 1, seed=1),
    "h": normal(1, 4, 1, 1, seed=2),
    "i": np.float32(0.5),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_decomposed_norm_on_a_stream_goes_as_a_whole(name):
    """The convolution takes it, and the other reader of what that gives undoes it."""
    used = {key: value for key, value in PARTS.items() if f"{key})" in WRITTEN[name] or f"({key}," in WRITTEN[name]}
    weights = {"w": normal(4, 3, 3, 3), "b": normal(4), "e": normal(2, 4, 1, 1), "g": normal(2, 4, 1, 1, seed=1)}
    proto = model(STREAM.format(norm=WRITTEN[name]), **used, **weights)
    (fold,) = folds(proto, "Conv Relu Conv Conv Add").folded
    assert len(fold.ops) == len(WRITTEN[name].split("=")) - 1
    assert not any("n" in fold.bn.split("+") for fold in fastbn.fold(proto, skip=["n"]).folded)


def test_a_decomposed_norm_that_widens_its_data_stays():
    text = """(float[N,1,8,8] x) => (float y, float z) {
        c = Conv(x, w) a = Mul(c, k) n = Add(a, h) y = Relu(n) z = Conv(c, g)
    }"""
    proto = model(text, w=normal(1, 1, 3, 3), g=normal(2, 1, 1, 1), **{key: PARTS[key] for key in "kh"})
    assert "widens" in refuses(proto, "axis")
