"""Models that are malformed: one line, exit code 2, and nothing is written."""

import numpy as np
import onnx
import pytest
from shell import fails
from sketch import conv_bn, norm, normal


def cyclic():
    return conv_bn("(float[N,3,8,8] x) => (float[N,4,6,6] y) { c = Conv(y, w, b) y = BatchNormalization(c, s, t, m, v) }")


def without_inputs():
    proto = conv_bn()
    del proto.graph.node[1].input[3:]
    return proto


def wrong_raw_size():
    proto = conv_bn()
    proto.graph.initializer[0].raw_data = proto.graph.initializer[0].raw_data[:-4]
    return proto


def unknown_type():
    proto = conv_bn()
    proto.graph.initializer[0].data_type = 99
    return proto


def negative_size():
    proto = conv_bn()
    proto.graph.initializer[0].dims[0] = -4
    return proto


def huge_size():
    proto = conv_bn()
    proto.graph.initializer[0].dims[0] = 2**62
    return proto


def no_source():
    proto = conv_bn()
    proto.graph.node[0].input[0] = "nowhere"
    return proto


def attribute_of_another_type():
    proto = conv_bn()
    proto.graph.node[1].attribute.append(onnx.helper.make_attribute("epsilon", "small"))
    return proto


def with_attribute(name, value):
    proto = conv_bn()
    proto.graph.node[0].attribute.append(onnx.helper.make_attribute(name, value))
    return proto


BROKEN = {
    "cyclic graph": cyclic,
    "no source": no_source,
    "weights of a matrix": lambda: conv_bn(w=normal(4, 3)),
    "weights for other channels": lambda: conv_bn(w=normal(4, 5, 3, 3)),
    "weights without elements": lambda: conv_bn(w=normal(4, 0, 3, 3)),
    "bias of another length": lambda: conv_bn(b=normal(5)),
    "norm of another length": lambda: conv_bn(**norm(5)),
    "one parameter of another length": lambda: conv_bn(m=normal(3)),
    "parameter that is no vector": lambda: conv_bn(v=np.ones((2, 2), np.float32)),
    "norm without statistics": without_inputs,
    "another number of bytes": wrong_raw_size,
    "tensor of an unknown type": unknown_type,
    "tensor of negative size": negative_size,
    "tensor of a huge size": huge_size,
    "attribute of another type": attribute_of_another_type,
    "group of zero": lambda: with_attribute("group", 0),
    "groups that do not divide": lambda: with_attribute("group", 3),
    "strides for other axes": lambda: with_attribute("strides", [1, 1, 1]),
    "strides of zero": lambda: with_attribute("strides", [0, 1]),
    "strides of another type": lambda: with_attribute("strides", [1.5, 1.5]),
    "pads for other axes": lambda: with_attribute("pads", [1, 1]),
}


@pytest.mark.parametrize("verify", ["", "--no-verify", "--dry-run"])
@pytest.mark.parametrize("case", BROKEN)
def test_broken_models(case, verify, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    broken = BROKEN[case]().SerializeToString()
    (tmp_path / "broken.onnx").write_bytes(broken)
    line = fails(capsys, "fold", "broken.onnx", "out.onnx", *filter(None, [verify]))
    assert line.startswith(("fastbn: Expected ", "fastbn: Cannot "))
    assert len(line) < 600
    assert (tmp_path / "broken.onnx").read_bytes() == broken
