"""Nodes that ONNX forbids, read by their rows: a ModelError that says what was expected."""

import numpy as np
import pytest
from rows import A4, W, affine, case, ints
from sketch import norm, normal

from fastbn.errors import ModelError
from fastbn.graph.reasons import Refusal


def refused(direction, part, *arguments, **options):
    """Return a setting, and what its row says."""
    return case(*arguments, **options), direction, part


WRONG = {
    "MatMul by a number": refused("forward", "a vector or a stack of matrices", "MatMul(x, w)", affine(6, 3), w=np.float32(2)),
    "MatMul by nothing": refused("forward", "a vector or a stack of matrices", "MatMul(x, w)", affine(6, 3), w=normal(6, 0)),
    "LSTM by a matrix": refused(
        "forward", "weights of rank 3", "LSTM <hidden_size = 2> (x, w, r)", affine(5, 2), x=(3, 2, 5), w=normal(8, 5), r=normal(1, 8, 2)
    ),
    "Gemm by a stack": refused("forward", "Expected a matrix, got shape", "Gemm(x, w)", affine(5, 1), x=(2, 5), w=normal(1, 5, 3)),
    "Gemm with biases that do not fit": refused(
        "backward", "a C that broadcasts to 3 columns", "Gemm(x, w, c)", affine(3, 1), x=(2, 5), w=normal(5, 3), c=normal(2)
    ),
    "Gemm with too many axes of biases": refused(
        "backward", "a C that broadcasts to 3 columns", "Gemm(x, w, c)", affine(3, 1), x=(2, 5), w=normal(5, 3), c=normal(1, 1, 3)
    ),
    "Conv with biases that do not fit": refused("backward", "a bias of shape \\(4,\\)", "Conv(x, w, b)", A4, w=W, b=normal(3)),
    "Conv of groups that do not fit": refused("backward", "that 3 groups divide", "Conv <group = 3> (x, w)", A4, w=normal(4, 2, 1, 1)),
    "Conv of no groups": refused("backward", "that 0 groups divide", "Conv <group = 0> (x, w)", A4, w=W),
    "Conv by a matrix": refused("backward", "convolution weights", "Conv(x, w)", A4, w=normal(4, 4)),
    "Conv by nothing": refused("backward", "convolution weights", "Conv(x, w)", A4, w=normal(4, 4, 0, 1)),
    "Conv with too many strides": refused("backward", "2 strides for 2 axes", "Conv <strides = [1,1,1]> (x, w)", A4, w=W),
    "Conv with a stride of zero": refused("backward", "2 strides for 2 axes", "Conv <strides = [1,0]> (x, w)", A4, w=W),
    "Conv with a dilation of zero": refused("backward", "2 dilations for 2 axes", "Conv <dilations = [0,1]> (x, w)", A4, w=W),
    "Conv with too few pads": refused("backward", "4 pads for 2 axes", "Conv <pads = [1,1]> (x, w)", A4, w=W),
    "Conv of other channels": refused("backward", "weights for an input of shape", "Conv(x, w)", A4, w=normal(4, 3, 1, 1)),
    "ConvTranspose of other channels": refused(
        "backward", "weights for an input of shape", "ConvTranspose(x, w)", A4, w=normal(3, 4, 1, 1)
    ),
    "Conv of another rank": refused("backward", "weights for an input of shape", "Conv(x, w)", A4, x=(2, 4, 6), w=W),
    "Transpose twice": refused("forward", "a permutation of all axes", "Transpose <perm = [0,1,1,2]> (x)", A4),
    "Transpose of too few": refused("forward", "a permutation of all axes", "Transpose <perm = [0,1]> (x)", A4),
    "Gather of no axis": refused("forward", "an axis of a value of rank 4, got 4", "Gather <axis = 4> (x, k)", A4, k=ints(0)),
    "Gather of no axis from the end": refused(
        "forward", "an axis of a value of rank 4, got -5", "Gather <axis = -5> (x, k)", A4, k=ints(0)
    ),
    "Gather of no channel": refused("forward", "an axis of a value of rank 4, got -5", "Gather <axis = 1> (x, k)", A4, k=ints(-5)),
    "Slice of lists of different lengths": refused(
        "forward", "a start, an end and a step for each axis", "Slice(x, k, l, a)", A4, k=ints(1, 1), l=ints(3), a=ints(1)
    ),
    "Slice without a step": refused(
        "forward", "a start, an end and a step for each axis", "Slice(x, k, l, a, p)", A4, k=ints(1), l=ints(3), a=ints(1), p=ints(0)
    ),
    "Pad of too few": refused("forward", "two sizes of padding for each axis", "Pad(x, k)", A4, k=ints(0, 0, 0, 0, 0, 1)),
    "Pad with two numbers": refused(
        "forward", "one number to pad with, got 2", "Pad(x, k, o)", A4, k=ints(0, 0, 1, 1, 0, 0, 1, 1), o=np.float32([1, 2])
    ),
    "Slice by a matrix": refused("forward", "a list of integers", "Slice(x, k, l)", A4, k=ints(1).reshape(1, 1), l=ints(3)),
    "DepthToSpace of blocks that do not fit": refused(
        "forward", "channels that blocks of 9 divide, got 8", "DepthToSpace <blocksize = 3> (x)", affine(8, 1), x=(2, 8, 3, 3)
    ),
    "DepthToSpace of no blocks": refused(
        "backward", "channels that blocks of 0 divide", "DepthToSpace <blocksize = 0> (x)", affine(8, 1), x=(2, 8, 3, 3)
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_onnx_forbids_is_said(name):
    make, direction, part = WRONG[name]
    with pytest.raises(ModelError, match=part):
        make().answers(direction)


def test_a_batch_normalization_has_five_inputs():
    setting = case("BatchNormalization(x, s, t, m, v, s)", A4, **norm(4))()
    with pytest.raises(ModelError, match="Expected 5 inputs, got 6"):
        setting.view.lifted(setting.node)


@pytest.mark.parametrize(
    ("shape", "unknown", "code"), [((2, 4), False, None), ((2, 4, 6), False, "per-element"), ((2, 4), True, "axis-unknown")]
)
def test_parameters_per_element(shape, unknown, code):
    constants = {name: normal(4, seed=7) ** 2 + 1 for name in "stmv"}
    setting = case("BatchNormalization <spatial = 0> (x, s, t, m, v)", A4, x=shape, opset=8, unknown=unknown, **constants)()
    if code is None:
        assert setting.view.lifted(setting.node).channels == 4
    else:
        with pytest.raises(Refusal) as caught:
            setting.view.lifted(setting.node)
        assert caught.value.code == code
