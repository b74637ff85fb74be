"""Constants that a model computes: the value is the one that onnxruntime computes, whatever the operator, the opset and the axes.

Oracles: NumPy formulas written here, and onnxruntime on a model in which the same operator reads graph inputs.
"""

import random

import ml_dtypes
import numpy as np
import pytest
from onnx import TensorProto
from operator_cases import CASES, evaluated, ints, listed, opsets, single
from sketch import conv_bn, folds, model, normal, ops, refuses, run

import fastbn
from fastbn.errors import FastbnError
from fastbn.graph import runtime
from fastbn.graph.model import evaluation, expressions, storage
from fastbn.graph.model.index import Index
from fastbn.graph.ops.registry import OPERATORS


def test_every_operator_with_a_rule_for_its_size_has_a_case():
    assert set(CASES) == {op for op, row in OPERATORS.items() if row.result_size is not None}


@pytest.mark.parametrize("op", CASES)
def test_a_constant_is_what_the_runtime_computes(op):
    choose = random.Random(op)
    for opset in opsets(op):
        for _ in range(6):
            arrays, attributes, expected = CASES[op][1](choose, opset)
            feeds = {f"i{at}": np.asarray(array) for at, array in enumerate(arrays)}
            results = run(single(op, arrays, opset, attributes, False, len(expected)), feeds)
            found = evaluated(op, arrays, opset, len(expected), **attributes)
            for ours, theirs, formula in zip(found, results, expected, strict=True):
                where = f"{op} of opset {opset}, {attributes}, {[array.shape for array in arrays]}"
                assert ours is not None, where
                assert ours.dtype == theirs.dtype == formula.dtype, where
                assert ours.shape == theirs.shape == formula.shape, where
                assert ours.tobytes() == theirs.tobytes(), where
                np.testing.assert_allclose(ours.astype(np.float64), formula.astype(np.float64), rtol=2e-6, atol=2e-6, err_msg=where)


@pytest.fixture
def without_runtime(monkeypatch):
    """onnxruntime is not installed."""

    def missing(*arguments, **options):
        raise FastbnError("none")

    monkeypatch.setattr(evaluation, "session", missing)
    evaluation._operator.cache_clear()
    yield
    evaluation._operator.cache_clear()


# onnx's own evaluator lacks bfloat16 and a few operators; what it does compute must be right.
@pytest.mark.parametrize("op", CASES)
def test_without_the_runtime_a_constant_is_right_or_none(op, without_runtime):
    choose = random.Random(op)
    known = 0
    for opset in opsets(op):
        for _ in range(6):
            arrays, attributes, expected = CASES[op][1](choose, opset)
            for ours, formula in zip(evaluated(op, arrays, opset, len(expected), **attributes), expected, strict=True):
                where = f"{op} of opset {opset}, {attributes}, {[np.shape(array) for array in arrays]}"
                if ours is not None:
                    known += 1
                    assert (ours.dtype, ours.shape) == (formula.dtype, formula.shape), where
                    np.testing.assert_allclose(ours.astype(np.float64), formula.astype(np.float64), rtol=2e-6, atol=2e-6, err_msg=where)
    assert known


@pytest.mark.parametrize("opset", [11, 12, 13])
def test_several_negative_axes_make_one_shape(opset):
    more, attributes = listed("axes", [-2, -1], opset, 13)
    (found,) = evaluated("Unsqueeze", [normal(4), *more], opset, **attributes)
    assert found.shape == (4, 1, 1)
    more, attributes = listed("axes", [-1, 0], opset, 13)
    (found,) = evaluated("Squeeze", [normal(1, 4, 1), *more], opset, **attributes)
    assert found.shape == (4,)


UNSQUEEZED = """(float[1,3,6,6] x) => (float[1,5] y) {
    c = Conv(x, w, b)
    k = Unsqueeze <axes = [-2,-1]> (factor)
    p = Mul(c, k)
    h = Unsqueeze <axes = [-2,-1]> (shift)
    a = Add(p, h)
    f = Flatten(a)
    y = Gemm(f, d, e)
}"""


@pytest.mark.parametrize("opset", [11, 12])
def test_a_scale_with_as_many_channels_as_rows_goes_to_its_axis(opset):
    constants = {"w": normal(4, 3, 3, 3), "b": normal(4), "factor": normal(4, seed=5), "shift": normal(4, seed=6)}
    folds(model(UNSQUEEZED, opset=opset, d=normal(64, 5), e=normal(5), **constants), "Conv Flatten Gemm")


def test_bfloat16_travels():
    x = normal(2, 3).astype(ml_dtypes.bfloat16)
    (found,) = evaluated("Transpose", [x])
    assert found.dtype == x.dtype
    assert found.tobytes() == np.ascontiguousarray(x.T).tobytes()
    (found,) = evaluated("Cast", [normal(5)], to=TensorProto.BFLOAT16)
    assert found.dtype == x.dtype
    assert found.tobytes() == normal(5).astype(ml_dtypes.bfloat16).tobytes()


# An integer division without a result ends the process on some processors, so the runtime must not run it.
@pytest.mark.parametrize("op", ["Div", "Mod"])
@pytest.mark.parametrize(("a", "b"), [(ints(1, 2), ints(1, 0)), (ints(-(1 << 63), 2), ints(-1, 1))])
def test_an_integer_division_without_a_result_is_none(op, a, b):
    assert evaluated(op, [a, b]) == [None]


@pytest.mark.parametrize(
    ("op", "arrays", "attributes"),
    [
        ("Reshape", [normal(3), ints(4)], {}),
        ("Gather", [normal(3), ints(5)], {}),
        ("Gather", [normal(3), ints(0)], {"axis": 4}),
        ("Add", [normal(3), normal(4)], {}),
        ("Cast", [normal(3)], {"to": TensorProto.STRING}),
        ("Cast", [normal(3)], {"to": 99}),
        ("Unsqueeze", [normal(3), np.arange(99)], {}),
        ("ConstantOfShape", [ints(-1)], {}),
        ("Expand", [normal(3), ints(*[1] * 70)], {}),
        ("Range", [np.float32(0), np.float32("nan"), np.float32(1)], {}),
        ("Transpose", [normal(2, 3)], {"perm": [0, 0]}),
    ],
)
def test_what_cannot_be_computed_is_none(op, arrays, attributes):
    assert evaluated(op, arrays, **attributes) == [None]


MANY = 1 << 13

# Sizes within the limit, and the same operator a little beyond it; LARGEST_RESULT is 1 << 13 in the test.
LIMITS = {
    "Concat": ([normal(MANY // 2)] * 2, [normal(MANY // 2 + 1)] * 2, {"axis": 0}),
    "ConstantOfShape": ([ints(MANY)], [ints(MANY + 1)], {}),
    "Expand": ([np.float32(1), ints(8, MANY // 8)], [np.float32(1), ints(1 << 60, 1 << 60)], {}),
    "Gather": ([normal(2, 16), ints(*[0] * (MANY // 16))], [normal(2, 16), ints(*[0] * (MANY // 16 + 1))], {}),
    "Mul": ([normal(MANY // 2, 1), normal(2)], [normal(MANY // 2, 1), normal(3)], {}),
    "Range": ([ints(0)[0], ints(MANY)[0], ints(1)[0]], [ints(0)[0], ints(1 << 62)[0], ints(1)[0]], {}),
    "Tile": ([normal(4), ints(MANY // 4)], [normal(4), ints(1 << 60)], {}),
    "Where": ([np.ones((MANY // 2, 1), bool), normal(2), normal(1)], [np.ones((MANY // 2, 1), bool), normal(3), normal(1)], {}),
}


def test_every_operator_that_may_grow_has_a_limit():
    assert set(LIMITS) >= {"Concat", "ConstantOfShape", "Expand", "Gather", "Range", "Tile"}


@pytest.mark.parametrize("op", LIMITS)
def test_a_result_beyond_the_limit_is_not_computed(op, monkeypatch):
    monkeypatch.setattr(expressions, "LARGEST_RESULT", MANY)
    within, beyond, attributes = LIMITS[op]
    (found,) = evaluated(op, within, **attributes)
    assert found.size == MANY
    monkeypatch.setattr(expressions, "evaluated", None)  # the size is told beforehand
    index = Index(storage.load(single(op, beyond, 17, attributes, True)))
    assert index.constant(index.main.find("o0")) is None
    assert "too large" in index.why_no_constant(index.main.find("o0"))


def test_all_results_together_have_a_limit(monkeypatch):
    monkeypatch.setattr(expressions, "LARGEST_TOTAL", 40)
    chain = " ".join(f"k{at} = Neg(k{at - 1})" for at in range(1, 9))
    index = Index(storage.load(model(f"() => (float y) {{ {chain} y = Identity(k8) }}", k0=normal(10))))
    found = [index.constant(index.main.find(f"k{at}")) is not None for at in range(1, 9)]
    assert found == [True] * 4 + [False] * 4
    assert "too large" in index.why_no_constant(index.main.find("y"))


def test_the_reason_says_what_is_too_large():
    text = """(float[N,3,8,8] x) => (float[N,4,6,6] y) {
        k = ConstantOfShape(n) b = Tile(k, n) c = Conv(x, w, b) y = BatchNormalization(c, s, t, m, v)
    }"""
    assert "too large" in refuses(conv_bn(text, b=None, n=ints(1 << 20)), "dynamic-weight", verify=False)


@pytest.mark.parametrize("length", [300, 5000])
def test_a_long_chain_of_constants_is_one(length):
    chain = " ".join(f"k{at} = {'Neg' if at % 2 else 'Identity'}(k{at - 1})" for at in range(1, length + 1))
    text = f"""(float[N,3,8,8] x) => (float[N,4,6,6] y) {{
        {chain} c = Conv(x, w, k{length}) y = BatchNormalization(c, s, t, m, v)
    }}"""
    assert ops(fastbn.fold(conv_bn(text, b=None, k0=normal(4)), verify=False).model) == "Conv"


def test_one_session_serves_all_nodes_alike(monkeypatch):
    made = []
    monkeypatch.setattr(evaluation, "session", lambda *arguments, **options: made.append(0) or runtime.session(*arguments, **options))
    evaluation._operator.cache_clear()
    chain = " ".join(f"k{at} = Neg(k{at - 1})" for at in range(1, 100))
    index = Index(storage.load(model(f"() => (float y) {{ {chain} y = Identity(k99) }}", k0=normal(10))))
    np.testing.assert_array_equal(index.constant(index.main.find("y")).array(), -normal(10))
    assert len(made) == 1


def test_a_model_without_expressions_needs_no_runtime(without_runtime):
    assert ops(fastbn.fold(conv_bn(), verify=False).model) == "Conv"
