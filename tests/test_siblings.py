"""Identity branches with a norm beside a convolution of the same value (RepVGG): they become the center of its kernel."""

import pytest
from sketch import assert_same, codes, model, norm, normal, ops

import fastbn

W, B = normal(4, 3, 3, 3), normal(4, seed=8)


def repvgg(conv, *, groups=1, kernel=3, channels=4, x="2,4,6,6", more="", tail="d = Add(c, n)", **constants):
    text = (
        f"(float[{x}] x) => (float y) {{ r = Tanh(x) c = {conv} (r, w) n = BatchNormalization(r, s, t, m, v) {more} {tail} y = Tanh(d) }}"
    )
    kernel = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    return model(text, w=normal(channels, channels // groups, *kernel), **norm(channels), **constants)


SIBLINGS = {
    "3x3": repvgg("Conv <pads = [1,1,1,1]>"),
    "1x1": repvgg("Conv", kernel=1),
    "1x3": repvgg("Conv <pads = [0,1,0,1]>", kernel=(1, 3)),
    "groups": repvgg("Conv <pads = [1,1,1,1], group = 2>", groups=2),
    "depthwise": repvgg("Conv <pads = [1,1,1,1], group = 4>", groups=4),
    "dilation": repvgg("Conv <pads = [2,2,2,2], dilations = [2,2]>"),
    "even kernel": repvgg("Conv <pads = [1,1,0,0]>", kernel=2),
    "off center": repvgg("Conv <pads = [0,2,2,0]>"),
    "auto_pad": repvgg('Conv <auto_pad = "SAME_UPPER">'),
    "identity first": repvgg("Conv <pads = [1,1,1,1]>", tail="d = Add(n, c)"),
    "three branches": repvgg("Conv <pads = [1,1,1,1]>", more="p = Conv(r, w1) q = Add(p, c)", tail="d = Add(q, n)", w1=normal(4, 4, 1, 1)),
    "three branches, nested": repvgg(
        "Conv <pads = [1,1,1,1]>", more="p = Conv(r, w1) q = Add(n, c)", tail="d = Add(p, q)", w1=normal(4, 4, 1, 1)
    ),
}


@pytest.mark.parametrize("case", SIBLINGS)
def test_an_identity_branch_goes_into_its_sibling(case):
    proto = SIBLINGS[case]
    left = ops(proto).replace(" BatchNormalization", "").split()
    left.remove("Add")
    assert_folds_to(proto, sorted(left))


def assert_folds_to(proto, left):
    result = fastbn.fold(proto)
    assert sorted(ops(result.model).split()) == left, result
    assert result.parity.status == "ok"
    assert_same(proto, result.model)


NO_SIBLINGS = {
    "stride 2": repvgg(
        "Conv <strides = [2,2], pads = [1,1,1,1]>", more="p = MaxPool <kernel_shape = [1,1], strides = [2,2]> (n)", tail="d = Add(c, p)"
    ),
    "of another value": repvgg("Conv <pads = [1,1,1,1]>", more="e = Conv <pads = [1,1,1,1]> (x, w)", tail="d = Add(e, n)"),
    "sibling read twice": repvgg("Conv <pads = [1,1,1,1]>", more="e = Mul(c, c)", tail="f = Add(c, n) d = Add(e, f)"),
    "Sub": repvgg("Conv <pads = [1,1,1,1]>", tail="d = Sub(c, n)"),
}


@pytest.mark.parametrize("case", NO_SIBLINGS)
def test_an_identity_branch_stays(case):
    proto = NO_SIBLINGS[case]
    result = fastbn.fold(proto)
    assert codes(result).total() == 1
    assert result.to_bytes() == proto.SerializeToString()
