"""Models that cannot be compared as they are: maps and strings, random numbers, branches that no input reaches, shapes that change."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from sketch import conv_bn, initializers, model, norm, normal, ops

import fastbn
from fastbn.cli import main
from fastbn.graph.rewrite import writer

# ---- maps and strings: compared one node before ----


def with_map(text, **constants):
    """Return a model whose output z is a list of maps: what ZipMap makes of the probabilities p."""
    proto = model(text, **constants)
    proto.opset_import.append(helper.make_opsetid("ai.onnx.ml", 3))
    labels = {"classlabels_strings": list("abcde")}
    proto.graph.node.append(helper.make_node("ZipMap", ["p"], ["z"], name="z", domain="ai.onnx.ml", **labels))
    kind = helper.make_map_type_proto(TensorProto.STRING, helper.make_tensor_type_proto(TensorProto.FLOAT, None))
    del proto.graph.output[-1]
    proto.graph.output.append(helper.make_value_info("z", helper.make_sequence_type_proto(kind)))
    return proto


def labeled(text, op="LabelEncoder", **constants):
    """Return a model whose label, a whole number a, becomes a string z."""
    proto = model(text, **constants)
    proto.opset_import.append(helper.make_opsetid("ai.onnx.ml", 2))
    attributes = {"keys_int64s": [0, 1, 2, 3, 4], "values_strings": list("abcde")} if op == "LabelEncoder" else {"to": TensorProto.STRING}
    proto.graph.node.append(helper.make_node(op, ["a"], ["z"], name="z", domain="ai.onnx.ml" if op == "LabelEncoder" else "", **attributes))
    del proto.graph.output[-1]
    proto.graph.output.append(helper.make_tensor_value_info("z", TensorProto.STRING, [None]))
    return proto


GEMM = "(float[N,6] x) => (float[N,5] p) { g = Gemm(x, w, b) n = BatchNormalization(g, s, t, m, v) p = Softmax(n) }"
CONV = """(float[N,3,8,8] x) => (float[N,5] p) {
    c = Conv(x, w, b) n = BatchNormalization(c, s, t, m, v) q = GlobalAveragePool(n) f = Flatten(q) p = Softmax(f)
}"""
LABEL = "(float[N,6] x) => (int64[N] a) { g = Gemm(x, w, b) n = BatchNormalization(g, s, t, m, v) a = ArgMax <axis = 1, keepdims = 0> (n) }"
SCORES = LABEL.replace("(int64[N] a)", "(float[N,5] n, int64[N] a)")
VECTORS = {"w": normal(6, 5), "b": normal(5), **norm(5)}
IMAGES = {"w": normal(5, 3, 3, 3), "b": normal(5), **norm(5)}
HIDDEN = {
    "ZipMap behind Gemm": (with_map(GEMM, **VECTORS), ("p",), "Gemm Softmax ZipMap"),
    "ZipMap behind Conv": (with_map(CONV, **IMAGES), ("p",), "Conv GlobalAveragePool Flatten Softmax ZipMap"),
    "LabelEncoder": (labeled(LABEL, **VECTORS), ("a",), "Gemm ArgMax LabelEncoder"),
    "LabelEncoder beside scores": (labeled(SCORES, **VECTORS), ("n", "a"), "Gemm ArgMax LabelEncoder"),
    "Cast to string": (labeled(LABEL, "Cast", **VECTORS), ("a",), "Gemm ArgMax Cast"),
}


@pytest.mark.parametrize("case", HIDDEN)
def test_maps_and_strings_are_compared_one_node_before(case, tmp_path):
    proto, compared, expected = HIDDEN[case]
    result = fastbn.fold(proto)
    assert ops(result.model) == expected
    assert (result.parity.status, result.parity.compared) == ("ok", compared)
    assert [info.name for info in result.model.graph.output] == [info.name for info in proto.graph.output]
    onnx.save(proto, tmp_path / "m.onnx")
    assert main(["fold", str(tmp_path / "m.onnx"), "-q"]) == 0
    assert fastbn.verify(proto, changed(result.model, 1.5)).status == "failed"


def changed(proto, factor):
    """Return the model with its bias and weight permuted and multiplied: any label is another one then."""
    other = onnx.ModelProto()
    other.CopyFrom(proto)
    for tensor in other.graph.initializer:
        values = initializers(other)[tensor.name]
        if values.dtype == np.float32 and values.ndim:
            tensor.raw_data = (factor * values[::-1]).tobytes()
    return other


# ---- random numbers: the same on both sides ----

RANDOM = {
    "RandomNormal": "r = RandomNormal <shape = [2,4,6,6]> () y = Add(n, r)",
    "RandomUniform": "r = RandomUniform <shape = [2,4,6,6]> () y = Mul(n, r)",
    "RandomNormalLike": "r = RandomNormalLike(n) y = Add(n, r)",
    "RandomUniformLike": "r = RandomUniformLike <low = -1.0> (n) y = Add(n, r)",
    "Bernoulli": "p = Sigmoid(n) r = Bernoulli(p) y = Mul(r, n)",
    "Multinomial": "g = GlobalAveragePool(n) f = Flatten(g) r = Multinomial <sample_size = 9> (f) k = Cast <to = 1> (r)"
    " e = ReduceMean <keepdims = 0> (k) y = Add(f, e)",
    "Dropout": "y = Dropout(n, ratio, train)",
    "Dropout with its mask": "d, e = Dropout(n, ratio, train) f = Cast <to = 1> (e) y = Add(d, f)",
    "Dropout in a branch": """y = If (train) <
        then_branch = g1 () => (float[2,4,6,6] p) { p = Dropout(n, ratio, train) },
        else_branch = g2 () => (float[2,4,6,6] q) { q = Identity(n) }
    >""",
}


def random_model(case):
    text = f"(float[2,3,8,8] x) => (float y) {{ c = Conv(x, w, b) n = BatchNormalization(c, s, t, m, v) {RANDOM[case]} }}"
    return conv_bn(text, **({"ratio": np.float32(0.4), "train": np.array(True)} if "train" in text else {}))


@pytest.mark.parametrize("case", RANDOM)
def test_random_numbers_are_seeded_on_both_sides(case):
    proto = random_model(case)
    result = fastbn.fold(proto)
    assert [fold.bn for fold in result.folded] == ["n"]
    assert (result.parity.status, result.parity.compared) == ("ok", ("y",))
    assert result.parity.inputs == 3
    assert not result.parity.notes
    assert not any(attribute.name == "seed" for node in result.model.graph.node for attribute in node.attribute), "only for the comparison"
    assert fastbn.verify(proto, changed(result.model, 1.01)).status == "failed"


def test_a_seed_of_the_models_own_does_not_matter():
    text = """(float[2,3,8,8] x) => (float y) {
        c = Conv(x, w, b) n = BatchNormalization(c, s, t, m, v) r = RandomNormalLike <seed = 3.0> (n) y = Add(n, r)
    }"""
    assert fastbn.fold(conv_bn(text)).parity.compared == ("y",)


# ---- branches that no random input reaches ----

IF = """(float[2,4] x) => (float[2,3] y) {
    mean = ReduceMean <keepdims = 0> (x)
    rare = Greater(mean, huge)
    y = If (rare) <
        then_branch = g1 () => (float[2,3] p) { a = MatMul(x, w) p = BatchNormalization(a, s, z, z, v) },
        else_branch = g2 () => (float[2,3] q) { q = MatMul(x, u) }
    >
}"""
NESTED = """(float[2,4] x) => (float[2,3] y) {
    mean = ReduceMean <keepdims = 0> (x)
    rare = Greater(mean, huge)
    y = If (rare) <
        then_branch = g1 () => (float[2,3] p) {
            p = If (rare) <
                then_branch = g3 () => (float[2,3] i) { i = MatMul(x, u) },
                else_branch = g4 () => (float[2,3] j) { a = MatMul(x, w) j = BatchNormalization(a, s, z, z, v) }
            >
        },
        else_branch = g2 () => (float[2,3] q) { q = MatMul(x, u) }
    >
}"""
LOOP = """(float[2,4] x) => (float[2,3] y) {
    mean = ReduceMean <keepdims = 0> (x)
    floor = Max(mean, zero)
    rare = Sub(floor, floor)
    count = Cast <to = 7> (rare)
    start = MatMul(x, u)
    y = Loop (count, true, start) <
        body = g1 (int64 i, bool go, float[2,3] before) => (bool on, float[2,3] after) {
            on = Identity(go) a = MatMul(x, w) c = BatchNormalization(a, s, z, z, v) after = Add(before, c)
        }
    >
}"""
HIDING = {"If": IF, "nested If": NESTED, "Loop": LOOP}


def hidden(case):
    """Return a model whose norm stands in a body that runs on no random input."""
    given = {"w": normal(4, 3), "u": normal(4, 3, seed=1), "huge": np.float32(1e6), "zero": np.float32(0), "true": np.array(True)}
    used = {
        name: values for name, values in given.items() if name in HIDING[case].replace(",", " ").replace(")", " ").replace("(", " ").split()
    }
    scale = norm(3)
    return model(HIDING[case], **used, s=scale["s"], z=np.zeros(3, np.float32), v=scale["v"])


@pytest.mark.parametrize("case", HIDING)
def test_a_branch_that_no_input_reaches_is_compared(case, monkeypatch, tmp_path):
    proto = hidden(case)
    result = fastbn.fold(proto)
    assert [fold.op for fold in result.folded] == ["MatMul"]
    assert (result.parity.status, result.parity.notes) == ("ok", ())

    def wrong_write(self, node, slot, constant, write=writer._Writer._write_constant):
        return write(self, node, slot, constant.times(constant.layout, np.full(3, 1.5)))

    monkeypatch.setattr(writer._Writer, "_write_constant", wrong_write)
    spoiled = fastbn.fold(proto, verify=False).model
    parity = fastbn.verify(proto, spoiled)
    assert parity.status == "failed"
    assert "branches" in parity.reason or "loops" in parity.reason
    left = fastbn.fold(proto)
    assert left.folded == []
    assert [kept.code for kept in left.kept] == ["parity"]
    onnx.save(proto, tmp_path / "m.onnx")
    assert main(["fold", str(tmp_path / "m.onnx"), str(tmp_path / "out.onnx"), "-q"]) == 0


def test_a_branch_that_cannot_run_with_these_sizes_is_said():
    text = """(float[2,4] x) => (float[N,M] y) {
        mean = ReduceMean <keepdims = 0> (x)
        rare = Greater(mean, huge)
        y = If (rare) <
            then_branch = g1 () => (float[N,M] p) { p = Reshape(x, seven) },
            else_branch = g2 () => (float[N,M] q) { a = MatMul(x, w) q = BatchNormalization(a, s, t, m, v) }
        >
    }"""
    result = fastbn.fold(model(text, w=normal(4, 3), huge=np.float32(1e6), seven=np.array([7, 1]), **norm(3)))
    assert result.parity.ok
    assert any("then branches cannot all be run" in note for note in result.parity.notes)


# ---- outputs whose shape changes with rounding ----

STEPS = """(float[2,3,8,8] x) => (int64[4,K] z, float[2,4,6,6] d) {
    c = Conv(x, w, b)
    n = BatchNormalization(c, s, t, m, v)
    e = Mul(n, big)
    f = Add(e, places)
    q = Sin(f)
    r = Relu(q)
    z = NonZero(r)
    d = Conv(x, w, t)
}"""


def test_a_fold_whose_only_output_cannot_be_compared_is_named(tmp_path):
    proto = conv_bn(STEPS, big=np.float32(1e6), places=1e5 * normal(4, 6, 6))
    result = fastbn.fold(proto)
    assert [(fold.bn, "not reached by the comparison" in fold.note) for fold in result.folded] == [("n+e", True)]
    assert result.parity.status == "inconclusive"
    assert "the fold of n" in result.parity.reason
    assert any("'z' changes its shape with rounding" in note for note in result.parity.notes)
    onnx.save(proto, tmp_path / "m.onnx")
    assert main(["fold", str(tmp_path / "m.onnx"), str(tmp_path / "out.onnx"), "-q"]) == 5


def test_an_output_of_another_shape_that_rounding_does_not_explain_fails():
    text = "(float[2,4] x) => (int64[2,K] z) { r = Relu(x) z = NonZero(r) }"
    other = "(float[2,4] x) => (int64[2,K] z) { a = Abs(x) z = NonZero(a) }"
    parity = fastbn.verify(model(text), model(other))
    assert parity.status == "failed"
    assert "shapes" in parity.reason
