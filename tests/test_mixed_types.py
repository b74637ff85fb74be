"""A narrow convolution, a Cast, a float32 normalization, a Cast back: what mixed precision exports; the affine goes to the narrow side."""

import numpy as np
import pytest
from onnx import TensorProto
from sketch import folds, model, norm, normal, refuses

import fastbn

HALF = TensorProto.FLOAT16


def mixed(nodes, kind="float16", out="float16", dtype=np.float16, **constants):
    weights = {"w": normal(4, 3, 3, 3), "b": normal(4), "w2": normal(5, 4, 1, 1)}
    used = {name: values.astype(dtype) for name, values in weights.items() if f"{name})" in nodes or f" {name}," in nodes}
    return model(f"({kind}[2,3,8,8] x) => ({out} y) {{ {nodes} }}", opset=22, ir_version=10, **used, **norm(4), **constants)


BACKWARD = f"c = Conv(x, w, b) e = Cast <to = 1> (c) n = BatchNormalization(e, s, t, m, v) f = Cast <to = {HALF}> (n) y = Tanh(f)"


def test_a_normalization_between_casts_goes_into_the_narrow_convolution():
    result = folds(mixed(BACKWARD), "Conv Cast Cast Tanh")
    (fold,) = result.folded
    assert 1e-5 < fold.error < fold.bound, "float16 rounds, and the proof was run"


def test_and_along_the_data_flow():
    weights = {"w2": normal(5, 4, 1, 1).astype(np.float16)}
    text = f"""(float16[2,4,6,6] x) => (float16 y) {{
        r = Tanh(x)
        e = Cast <to = 1> (r)
        n = BatchNormalization(e, s, t, m, v)
        f = Cast <to = {HALF}> (n)
        y = Conv(f, w2)
    }}"""
    result = folds(model(text, **weights, **norm(4)), "Tanh Cast Cast Conv")
    assert result.folded[0].error is not None


def test_bfloat16_too():
    text = BACKWARD.replace(f"to = {HALF}", f"to = {TensorProto.BFLOAT16}").replace("y = Tanh(f)", "y = Identity(f)")
    import ml_dtypes

    result = fastbn.fold(mixed(text, "bfloat16", "bfloat16", ml_dtypes.bfloat16))
    (fold,) = result.folded
    assert fold.error is not None
    assert fold.error <= fold.bound


@pytest.mark.parametrize("to", ["float16", "int32"])
def test_a_wide_convolution_does_not_take_what_is_rounded_behind_it(to):
    kind = {"float16": HALF, "int32": TensorProto.INT32}[to]
    nodes = f"c = Conv(x, w, b) e = Cast <to = {kind}> (c) f = Cast <to = 1> (e) y = BatchNormalization(f, s, t, m, v)"
    refuses(mixed(nodes, "float", "float", np.float32))


def test_offsets_of_a_deformable_convolution_keep_their_signs():
    """The bound is that of the samples which the convolution reads, not of others."""
    from test_normalization import deformable

    nodes = "c = DeformConv <pads = [1,1,1,1]> (x, w, o, b) y = BatchNormalization(c, s, t, m, v)"
    proto = deformable(nodes, **norm(4))
    (fold,) = fastbn.fold(proto).folded
    assert fold.error < 0.5 * fold.bound


def test_a_shift_that_stays_has_the_type_of_its_data_behind_a_cast():
    nodes = "c = MatMul(x, w) d = Cast <to = 11> (c) n = BatchNormalization(d, s, t, m, v) e = Cast <to = 1> (n) y = Tanh(e)"
    proto = model(f"(float[4,5] x) => (float y) {{ {nodes} }}", w=normal(5, 4), **norm(4, dtype=np.float64))
    folds(proto, "MatMul Cast Add Cast Tanh")


def test_what_a_cast_rounds_counts_where_no_narrow_constant_does():
    nodes = f"""
        h = Cast <to = {HALF}> (x)
        a = BatchNormalization(h, s2, t2, m2, v2)
        e = Cast <to = 1> (a)
        n = BatchNormalization(e, s, t, m, v)
        y = Tanh(n)
        z = Conv(e, w)"""
    proto = model(f"(float[2,4,6] x) => (float y, float z) {{ {nodes} }}", w=normal(5, 4, 1), **norm(4), **norm(4, "2", dtype=np.float16))
    (kept,) = fastbn.fold(proto).kept
    assert kept.bn == "a"


def test_the_factors_of_a_resize_are_no_data():
    nodes = 'a = BatchNormalization(r, s, t, m, v) e = Resize(a, "", f) y = BatchNormalization(e, s2, t2, m2, v2)'
    half = {**norm(4, dtype=np.float16), **norm(4, "2", seed=5, dtype=np.float16), "f": np.array([1, 1, 2, 2], np.float32)}
    folds(model(f"(float16[2,4,3,3] x) => (float16 y) {{ r = Tanh(x) {nodes} }}", **half), "Tanh Resize BatchNormalization")
