"""Which outputs are taken for the scores of a classifier: Softmax, or a last linear layer whose names and width allow it."""

import numpy as np
import pytest
from sketch import CLASSIFIER, CONV_BN, model, norm, normal

from fastbn.deployment.scores import row_outputs, score_outputs
from fastbn.graph.model import storage
from fastbn.graph.model.index import Index

SCORES = {
    "the last linear layer": (CLASSIFIER, {"w": normal(4, 3, 3, 3), "b": normal(4), "w2": normal(4, 5), **norm(4)}, ["y"]),
    "a Softmax": ("(float[N,4] x) => (float[N,4] y) { y = Softmax(x) }", {}, ["y"]),
    "a Softmax, cast": ("(float[N,4] x) => (float16[N,4] y) { s = Softmax(x) y = Cast<to=10>(s) }", {}, ["y"]),
    "a MatMul and its bias": (
        "(float[N,9] x) => (float[N,5] y) { z = MatMul(x, w) y = Add(z, b) }",
        {"w": normal(9, 5), "b": normal(5)},
        ["y"],
    ),
    "one column": ("(float[N,4] x) => (float[N,1] y) { y = MatMul(x, w) }", {"w": normal(4, 1)}, []),
    "images": (CONV_BN, {"w": normal(4, 3, 3, 3), "b": normal(4), **norm(4)}, []),
    "two linear outputs": (
        "(float[N,4] x) => (float[N,4] y, float[N,4] z) { y = MatMul(x, w) z = Softmax(y) }",
        {"w": normal(4, 4)},
        ["z"],
    ),
    "an activation": ("(float[N,4] x) => (float[N,4] y) { y = Tanh(x) }", {}, []),
    "pooled maps": ("(float[N,6,2,2] x) => (float[N,6,1,1] y) { y = GlobalAveragePool(x) }", {}, ["y"]),
    "a Softmax over the batch": ("(float[N,9] x) => (float[N,9] y) { y = Softmax<axis=0>(x) }", {}, []),
    "a quantized Softmax": (
        "(float[N,4] x) => (float[N,4] y) { s = Softmax(x) q = QuantizeLinear(s, k, z) y = DequantizeLinear(q, k, z) }",
        {"k": np.float32(0.01), "z": np.uint8(0)},
        ["y"],
    ),
}


@pytest.mark.parametrize("case", SCORES)
def test_what_looks_like_a_classifier(case):
    text, constants, expected = SCORES[case]
    assert score_outputs(Index(storage.load(model(text, **constants)))) == expected


def linear(name, columns, *, label="", weight="w", inputs="float[N,5000] x", outputs=""):
    """Return the Index of a model that ends in a linear layer with this output."""
    text = f"({inputs}) => (float[N,{columns}] {name}{outputs}) {{ {name} = MatMul(x, {weight}) }}"
    proto = model(text, **{weight: np.zeros((5000, columns), np.float32)})
    proto.graph.node[0].name = label
    return Index(storage.load(proto))


@pytest.mark.parametrize("name", ["x_recon", "reconstruction", "embedding", "features", "boxes", "bbox_pred", "landmarks", "coordinates"])
def test_a_name_that_says_otherwise(name):
    assert score_outputs(linear(name, 10)) == []
    assert row_outputs(linear(name, 10)) == [name], "--metric top-1 may still be asked for"


@pytest.mark.parametrize("name", ["latent", "mu", "logvar", "keypoints", "regression_output", "class_embedding", "poseAngles", "offsets"])
def test_more_names_that_say_otherwise(name):
    assert score_outputs(linear(name, 10)) == []


@pytest.mark.parametrize("name", ["logits", "pred_logits", "probs", "class_scores", "classifier_out", "classLogits", "labels", "policy"])
@pytest.mark.parametrize("columns", [2, 3, 512])
def test_a_name_that_says_scores(name, columns):
    assert score_outputs(linear(name, columns)) == [name]


@pytest.mark.parametrize(
    ("label", "weight", "expected"),
    [
        ("/decoder/fc/Gemm", "w", []),
        ("", "decoder.weight".replace(".", "_"), []),
        ("/head/fc/Gemm", "bbox_head_w", []),
        ("/head/fc/Gemm", "w", ["y"]),
        ("/ReduceMean/fc", "fc_weight", ["y"]),
    ],
)
def test_the_layer_speaks_where_the_output_does_not(label, weight, expected):
    assert score_outputs(linear("y", 10, label=label, weight=weight)) == expected
    assert score_outputs(linear("logits", 10, label=label, weight=weight)) == ["logits"], "the output's own name comes first"


@pytest.mark.parametrize(
    ("columns", "taken"),
    [
        (2, False),
        (4, False),
        (5, True),
        (10, True),
        (100, True),
        (1000, True),
        (1001, True),
        (4096, False),
        (64, False),
        (32, True),
        (512, False),
    ],
)
def test_the_width_where_no_name_speaks(columns, taken):
    assert bool(score_outputs(linear("output", columns))) is taken


def test_more_numbers_than_the_input_has_are_no_classes():
    small = "(float[N,20] x) => (float[N,700] output) { output = MatMul(x, w) }"
    assert score_outputs(Index(storage.load(model(small, w=normal(20, 700))))) == []
    same = "(float[N,640] x) => (float[N,640] output) { output = MatMul(x, w) }"
    assert score_outputs(Index(storage.load(model(same, w=normal(640, 640))))) == []
    tokens = "(int64[N,6] x) => (float[N,10] output) { e = Gather(t, x) m = ReduceMean<axes=[1], keepdims=0>(e) output = MatMul(m, w) }"
    assert score_outputs(Index(storage.load(model(tokens, t=normal(9, 4), w=normal(4, 10))))) == ["output"]


def test_one_of_several_linear_outputs_is_not_singled_out():
    text = "(float[N,50] x) => (float[N,10] logits, float[N,1] value) { logits = MatMul(x, w) value = MatMul(x, u) }"
    assert score_outputs(Index(storage.load(model(text, w=normal(50, 10), u=normal(50, 1))))) == []
