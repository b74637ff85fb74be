"""Constants of any operator: what onnxruntime gives for them, and nothing that costs more than it may."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.backend.test.loader import load_model_tests
from sketch import conv_bn, folds, model, norm, normal, ops, refuses, run

import fastbn
from fastbn.graph.model import evaluation, expressions, storage
from fastbn.graph.model.index import Index
from fastbn.graph.model.schemas import RANDOM

# Test cases of onnx whose constants are not evaluated: their operators have bodies, drop at random, give text or sequences, or results
# whose size only a run tells; for the last ones inference knows no size at this opset.
NOT_EVALUATED = {
    *("If", "Loop", "Scan", "Dropout", "NonMaxSuppression", "Unique", "SplitToSequence", "GroupNormalization", "MeanVarianceNormalization"),
    *("DFT", "CausalConvWithState", "LinearAttention", "MaxUnpool", "Equal", "LpPool"),
    *("ReduceLogSum", "ReduceLogSumExp", "TfIdfVectorizer", "Trilu"),  # of arrays without elements, the third of any
    *("RegexFullMatch", "StringConcat", "StringNormalizer", "StringSplit", "LabelEncoder"),
}


def session(proto):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def session_types(run):
    return [info.type for info in (*run.get_inputs(), *run.get_outputs())]


def cases():
    """Yield (model of one node of ONNX's own, its inputs as tensors) of onnx's test cases."""
    for case in load_model_tests(kind="node"):
        proto = case.model
        inputs = case.data_sets[0][0]
        if len(proto.graph.node) != 1 or proto.graph.node[0].domain or not inputs:
            continue
        if not all(isinstance(each, (np.ndarray, np.generic, TensorProto)) for each in inputs):
            continue
        tensors = []
        for info, given in zip(proto.graph.input, inputs, strict=True):
            tensors.append(given if isinstance(given, TensorProto) else numpy_helper.from_array(np.asarray(given), info.name))
            tensors[-1].name = info.name
        proto.ir_version = min(proto.ir_version, 10)
        yield case.name, proto, tensors


def constant_model(proto, tensors):
    """Return the model whose inputs are initializers."""
    constant = onnx.ModelProto()
    constant.CopyFrom(proto)
    del constant.graph.input[:]
    constant.graph.initializer.extend(tensors)
    return constant


@pytest.mark.filterwarnings("ignore")
def test_a_constant_is_what_the_runtime_gives_for_every_case_of_onnx():
    compared, operators, missing = 0, set(), set()
    for name, proto, tensors in cases():
        try:
            run = session(proto)
            results = run.run(None, {tensor.name: numpy_helper.to_array(tensor) for tensor in tensors})
        except Exception:  # no kernel for this version, or for this type
            continue
        index = Index(storage.load(constant_model(proto, tensors)))
        node = proto.graph.node[0]
        found = [index.constant(index.main.find(output)) for output in node.output if output]
        if any(each is None for each in found) and not any(
            name in str(session_types(run)) for name in ("float8", "float4", "int4", "int2")
        ):
            missing.add(node.op_type)
        if any(each is None for each in found):
            continue
        for ours, theirs in zip(found, results, strict=True):
            # The runtime hands float8 numbers out as bytes.
            assert ours.dtype == theirs.dtype or (theirs.dtype == np.uint8 and ours.dtype.name.startswith("float8")), name
            assert ours.shape == theirs.shape, name
            assert ours.array().tobytes() == theirs.tobytes(), name
        compared += 1
        operators.add(node.op_type)
    assert missing <= NOT_EVALUATED
    assert compared > 900
    assert len(operators) > 130


def test_no_random_operator_is_a_constant():
    if hasattr(onnx.defs.OpSchema, "node_determinism"):
        random = {
            each.name for each in onnx.defs.get_all_schemas() if each.domain == "" and "NonDeterministic" in str(each.node_determinism)
        }
        assert random <= {*RANDOM, "AffineGrid", "Dropout", "If", "Loop", "Scan", "SequenceMap"}
    for op in ("RandomNormalLike(k)", "RandomUniformLike(k)", "Bernoulli(p)"):
        text = f"""(float[N,3,8,8] x) => (float[N,4,6,6] y) {{
            r = {op} c = Conv(x, w, r) y = BatchNormalization(c, s, t, m, v)
        }}"""
        constants = {"k": normal(4), "p": np.full(4, 0.5, np.float32), "half": np.float32(0.5), "yes": np.array(True)}
        used = {name: values for name, values in constants.items() if name in text.split("Conv")[0].split("=")[2]}
        assert "computed when the model runs" in refuses(conv_bn(text, b=None, **used), "dynamic-weight", verify=False)


def test_a_dropout_in_training_is_no_constant():
    text = """(float[N,3,8,8] x) => (float[N,4,6,6] y) {
        r = Dropout(k, half, yes) c = Conv(x, w, r) y = BatchNormalization(c, s, t, m, v)
    }"""
    proto = conv_bn(text, b=None, k=normal(4), half=np.float32(0.5), yes=np.array(True))
    assert "drops at random" in refuses(proto, "dynamic-weight", verify=False)


# ---- what is read for its type or shape alone ----

UNOPTIMIZED = """(float[N,3,8,8] x) => (float y) {
    h = Shape <start = 0, end = 1> (w)
    one = Constant <value_ints = [1]> ()
    e = Expand(h, one)
    z = CastLike(zero, x)
    b = Expand(z, e)
    c = Conv(x, w, b)
    n = BatchNormalization(c, s, t, m, v)
    y = Relu(n)
}"""


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("opset", [15, 18, 20])
def test_a_bias_that_an_exporter_computes_from_types_and_shapes(opset, dtype):
    text = UNOPTIMIZED.replace("float", {"float32": "float", "float64": "double"}[np.dtype(dtype).name])
    proto = model(text, opset=opset, zero=np.float32(0), w=normal(4, 3, 3, 3, dtype=dtype), **norm(4, dtype=dtype))
    assert ops(fastbn.fold(proto).model) == "Conv Relu"
    if dtype == np.float32:  # onnxruntime has no Conv of float64
        folds(proto, "Conv Relu")


def test_the_type_of_a_value_that_the_file_does_not_declare():
    """Type and shape come from inference: r is declared nowhere."""
    text = UNOPTIMIZED.replace("z = CastLike(zero, x)", "r = Sigmoid(x) z = CastLike(zero, r)").replace("Conv(x", "Conv(r")
    folds(model(text, zero=np.float32(0), w=normal(4, 3, 3, 3), **norm(4)), "Sigmoid Conv Relu")
    static = """(float[2,3,8,8] x) => (float y) {
        r = Sigmoid(x) h = Shape <start = 1, end = 2> (q) z = ConstantOfShape(h) q = Conv(r, w)
        c = Add(q, k) d = Conv(c, w2, z) y = BatchNormalization(d, s, t, m, v)
    }"""
    folds(model(static, w=normal(4, 3, 3, 3), w2=normal(4, 4, 1, 1), k=normal(4, 1, 1), **norm(4)), "Sigmoid Conv Conv")


def test_sizes_that_the_caller_gives_make_no_constants():
    """They hold for the caller's inputs, not for every run."""
    text = """(float[N,3,H,8] x) => (float y) {
        r = Sigmoid(x) h = Shape(r) z = Gather(h, two) f = Cast <to = 1> (z) c = Conv(x, w, b) d = Mul(c, f)
        y = BatchNormalization(d, s, t, m, v)
    }"""
    proto = model(text, two=np.int64(2), w=normal(4, 3, 3, 3), b=normal(4), **norm(4))
    result = fastbn.fold(proto, input_shapes={"x": (2, 3, 8, 8)}, verify=False)
    assert "Mul" in ops(result.model)


def test_a_type_that_nothing_tells():
    text = UNOPTIMIZED.replace("CastLike(zero, x)", "CastLike(zero, q)").replace("h = Shape", "q = custom.Op(x) h = Shape")
    proto = model(text, imports=["custom"], zero=np.float32(0), w=normal(4, 3, 3, 3), **norm(4))
    assert "CastLike 'z' cannot be evaluated here" in refuses(proto, "dynamic-weight", verify=False)


def test_size_and_shape_need_no_values():
    """The weight of c is too large for an expression; its size is not."""
    text = "(float[4] x) => (float y) { n = Size(w) h = Shape(w) f = Cast <to = 1> (n) y = Mul(x, f) }"
    index = Index(storage.load(model(text, w=normal(3, 5))))
    assert index.constant(index.main.find("n")).array() == 15
    assert index.constant(index.main.find("h")).array().tolist() == [3, 5]


# ---- weights that are computed ----

WEIGHTS = {
    "weight_norm": ("d = ReduceL2 <axes = [1,2,3]> (p) q = Div(p, d) w = Mul(q, g)", {"p": normal(4, 3, 3, 3), "g": normal(4, 1, 1, 1)}),
    "low rank": ("q = MatMul(e, f) r = Reshape(q, sizes) w = Add(p, r)", {"p": normal(4, 3, 3, 3), "e": normal(4, 2), "f": normal(2, 27)}),
    "standardized by its statistics": (
        "a = ReduceMean <axes = [1,2,3]> (p) o = Sub(p, a) u = Mul(o, o) i = ReduceMean <axes = [1,2,3]> (u) j = Sqrt(i) w = Div(o, j)",
        {"p": normal(4, 3, 3, 3)},
    ),
    "standardized by a BatchNormalization": (
        "a = Reshape(p, rows) i, j, k = BatchNormalization <training_mode = 1> (a, ones, zeros, mean, var) w = Reshape(i, sizes)",
        {
            "p": normal(4, 3, 3, 3),
            "rows": np.array([1, 4, -1]),
            "ones": np.ones(4, np.float32),
            "zeros": np.zeros(4, np.float32),
            "mean": np.zeros(4, np.float32),
            "var": np.ones(4, np.float32),
        },
    ),
    "standardized by an InstanceNormalization": (
        "a = Reshape(p, rows) i = InstanceNormalization(a, ones, zeros) w = Reshape(i, sizes)",
        {"p": normal(4, 3, 3, 3), "rows": np.array([1, 4, -1]), "ones": np.ones(4, np.float32), "zeros": np.zeros(4, np.float32)},
    ),
    "masked": ("w = Where(keep, p, none)", {"p": normal(4, 3, 3, 3), "keep": normal(4, 3, 3, 3) > 0, "none": np.float32(0)}),
    "einsum": ('w = Einsum <equation = "oi,ihw->ohw"> (e, f) ', {"e": normal(4, 2), "f": normal(2, 27).reshape(2, 27)}),
    "half": ("w = Cast <to = 1> (p)", {"p": normal(4, 3, 3, 3).astype(np.float16)}),
}


def computed_weight(name, **options):
    nodes, constants = WEIGHTS[name]
    if name == "einsum":
        nodes, constants = 'q = Einsum <equation = "oi,ij->oj"> (e, f) w = Reshape(q, sizes)', {"e": normal(4, 2), "f": normal(2, 27)}
    if "sizes" in nodes:
        constants = {**constants, "sizes": np.array([4, 3, 3, 3])}
    text = f"(float[N,3,8,8] x) => (float[N,4,6,6] y) {{ {nodes} c = Conv(x, w) y = BatchNormalization(c, s, t, m, v) }}"
    return model(text, **{**constants, **norm(4)}, **options)


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_computed_weight_takes_the_scale_as_a_whole(name):
    proto = computed_weight(name)
    result = folds(proto, "Conv")
    assert len(result.to_bytes()) < len(proto.SerializeToString()) + (200 if name == "half" else 0)


def test_a_weight_that_grows_is_reported():
    text = "(float[N,32] x) => (float y) { w = Cast <to = 1> (p) c = MatMul(x, w) d = Add(c, b) y = BatchNormalization(d, s, t, m, v) }"
    proto = model(text, p=normal(32, 64, dtype=np.float16), b=normal(64), **norm(64))
    (fold,) = [each for each in folds(proto, "MatMul Add").folded if "BatchNormalization" in each.ops]
    assert fold.note == "weight 'w' was computed from 'p': stored as it is, 8.2 kB"


def test_what_is_computed_for_two_is_stored_for_one():
    """v stays for the other reader, and the whole weight is written beside it: the report says so."""
    text = """(float[N,16,8,8] x) => (float y, float z) {
        w = Mul(p, g) c = Conv(x, w) y = BatchNormalization(c, s, t, m, v) z = Conv(x, p)
    }"""
    proto = model(text, p=normal(16, 16, 3, 3), g=normal(16, 1, 1, 1), **norm(16))
    (fold,) = folds(proto, "Conv Conv").folded
    assert "'p', 'g'" in fold.note
    assert "9.2 kB" in fold.note


def test_a_batch_normalization_of_a_constant_becomes_one():
    text = "(float[2,4] x) => (float y) { k = BatchNormalization(p, s, t, m, v) y = Add(x, k) }"
    folds(model(text, p=normal(2, 4), **norm(4)), "Add")
    output = text.replace("float y)", "float y, float k)")
    assert "graph output" in refuses(model(output, p=normal(2, 4), **norm(4)), "graph-output")
    result = fastbn.fold(model(text, p=normal(2, 4), **norm(4)), skip="k")
    assert [kept.code for kept in result.kept] == ["not-selected"]


def test_constants_of_an_outer_graph_are_evaluated_in_a_body():
    text = """(float[1,3,8,8] x, bool f) => (float y) {
        w = Mul(p, g)
        y = If (f) <
            then_branch = g1 () => (float a) {
                z = CastLike(zero, x) o = Expand(z, four) c = Conv(x, w, o) a = BatchNormalization(c, s, t, m, v)
            },
            else_branch = g2 () => (float b) { b = Conv(x, w) }
        >
    }"""
    proto = model(text, zero=np.float32(0), four=np.array([4]), p=normal(4, 3, 3, 3), g=normal(4, 1, 1, 1), **norm(4))
    result = fastbn.fold(proto)
    assert result.kept == []
    assert result.parity.ok


# ---- limits ----

# Nodes on a few bytes of constants that ask for very much, or for very long.
HUGE = {
    "ConstantOfShape(a)": {"a": np.array([1 << 40])},
    "Pad(a, b)": {"a": normal(4), "b": np.array([1 << 40, 0])},
    "Resize(a, , b)": {"a": normal(1, 1, 4, 4), "b": np.float32([1, 1, 1e6, 1e6])},
    "OneHot(a, b, c)": {"a": np.array([1]), "b": np.array([1 << 40]), "c": np.float32([0, 1])},
    'Einsum <equation = "a,b,c,d,e->">(a, a, a, a, a)': {"a": normal(2000)},
    'Einsum <equation = "a,b,c->abc">(a, a, a)': {"a": normal(4000)},
    "Conv(a, b)": {"a": normal(1, 1, 3000, 3000)[:, :, :, :], "b": normal(1, 1, 1500, 1500)},
    "MatMul(a, b)": {"a": normal(4000, 3000), "b": normal(3000, 4000)},
    "HannWindow(a)": {"a": np.int64(1 << 40)},
    "EyeLike(a)": {"a": normal(4100, 4100)},
    "Upsample(a, b)": {"a": normal(1, 1, 4, 4), "b": np.float32([1, 1, 1e6, 1e6])},
    "CenterCropPad(a, b)": {"a": normal(2, 2), "b": np.array([1 << 30, 1 << 30])},
    "MelWeightMatrix(a, a, a, b, b)": {"a": np.int64(1 << 20), "b": np.float32(1)},
}


@pytest.mark.parametrize("call", HUGE)
def test_what_asks_for_too_much_is_not_run(call, monkeypatch):
    monkeypatch.setattr(evaluation, "session", None)
    opset = 9 if call.startswith("Upsample") else 18
    proto = model(f"() => (float y) {{ o = {call} y = Identity(o) }}", opset=opset, **HUGE[call])
    index = Index(storage.load(proto))
    assert index.constant(index.main.find("o")) is None
    why = index.why_no_constant(index.main.find("o"))
    assert "too large" in why or "cannot be evaluated" in why


def test_what_takes_too_long_is_not_run(monkeypatch):
    text = "() => (float y) { o = MatMul(a, a) y = Identity(o) }"
    index = Index(storage.load(model(text, a=normal(64, 64))))
    assert index.constant(index.main.find("o")) is not None
    monkeypatch.setattr(expressions, "LARGEST_WORK", 64**3 // 8 - 1)
    index = Index(storage.load(model(text, a=normal(64, 64))))
    assert index.constant(index.main.find("o")) is None
    assert "too large" in index.why_no_constant(index.main.find("o"))


# ---- types ----


@pytest.mark.parametrize("kind", [*range(17, 21), TensorProto.UINT4, TensorProto.INT4])
def test_small_numbers_are_what_they_are(kind):
    text = f"() => (float y) {{ q = Cast <to = {kind}> (a) y = Cast <to = 1> (q) }}"
    proto = model(text, opset=21, ir_version=10, a=np.float32([0, 1, 3, 5.5, 0.3]))
    index = Index(storage.load(proto))
    q, y = (index.constant(index.main.find(name)) for name in "qy")
    assert q.dtype == helper.tensor_dtype_to_np_dtype(kind)
    (expected,) = run(proto, {})
    assert y.array().tobytes() == expected.tobytes()
    np.testing.assert_array_equal(q.array().astype(np.float32), expected)


@pytest.mark.parametrize("kind", [TensorProto.INT4, TensorProto.UINT4])
@pytest.mark.parametrize("raw", [True, False])
def test_packed_integers_are_read(kind, raw):
    values = [1, 2, 3, -4 if kind == TensorProto.INT4 else 4, 5]
    tensor = helper.make_tensor("q", kind, [5], values)
    if raw:
        tensor = numpy_helper.from_array(numpy_helper.to_array(tensor), "q")
    assert tensor.HasField("raw_data") == raw
    proto = model("() => (float y) { y = DequantizeLinear(q, k) }", opset=21, ir_version=10, k=np.float32(2))
    proto.graph.initializer.append(tensor)
    source = storage.load(proto)
    assert source.array(source.proto.graph.initializer[-1]).astype(int).tolist() == values


# ---- why a value is none ----


def test_the_reason_names_what_a_caller_may_override():
    text = "(float[N,3,8,8] x, float[4,3,3,3] p) => (float y) { w = Neg(p) c = Conv(x, w) y = BatchNormalization(c, s, t, m, v) }"
    proto = model(text, p=normal(4, 3, 3, 3), **norm(4))
    assert "'p', a graph input too" in refuses(proto, "dynamic-weight", verify=False)
    folds(proto, "Conv", freeze_inputs=True)


@pytest.mark.parametrize("place", ["w", "t"])
def test_the_reason_says_what_is_really_dynamic(place):
    text = """(float[N,3,8,8] x, float[4] d) => (float y) {
        k = Neg(d) c = Conv(x, w, b) y = BatchNormalization(c, s, t, m, v)
    }""".replace("Conv(x, w, b)" if place == "w" else ", t,", "Conv(x, w, k)" if place == "w" else ", k,")
    constants = {name: values for name, values in norm(4).items() if place == "w" or name != "t"}
    proto = model(text, w=normal(4, 3, 3, 3), **({} if place == "w" else {"b": normal(4)}), **constants)
    assert "'k'" in refuses(proto, verify=False)
    assert "computed when the model runs" in refuses(proto, verify=False)
    given = model(
        text.replace("k = Neg(d)", "k = Neg(e) e = Sigmoid(x)"),
        w=normal(4, 3, 3, 3),
        **({} if place == "w" else {"b": normal(4)}),
        **constants,
    )
    assert "computed when the model runs" in refuses(given, verify=False)
    direct = model(
        text.replace("k = Neg(d)", "").replace(" k", " d"), w=normal(4, 3, 3, 3), **({} if place == "w" else {"b": normal(4)}), **constants
    )
    assert "is a graph input" in refuses(direct, verify=False)


def test_the_parameters_of_a_batch_normalization_may_be_dequantized():
    """As a static quantizer of onnxruntime writes them."""
    text = """(float[N,3,8,8] x) => (float y) {
        c = Conv(x, w, b) s = DequantizeLinear(qs, ks) t = DequantizeLinear(qt, ks) y = BatchNormalization(c, s, t, m, v)
    }"""
    constants = {"qs": np.int8([50, -60, 70, 80]), "qt": np.int8([5, 6, -7, 8]), "ks": np.float32(0.02)}
    parameters = {name: values for name, values in norm(4).items() if name in "mv"}
    folds(model(text, w=normal(4, 3, 3, 3), b=normal(4), **constants, **parameters), "Conv")
