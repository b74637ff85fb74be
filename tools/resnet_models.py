"""A residual network for benchmarks, as PyTorch's exporter writes it: ResNet-18 (He et al. 2016), weights random."""

import onnx
from make_models import Net
from onnx import helper

__all__ = ["resnet18"]

WIDTHS, BLOCKS = (64, 128, 256, 512), 2


def resnet18(size=64, width=1.0):
    """Return ResNet-18 for images of size x size, every BN with statistics of its own; its channels times `width`."""
    net = Net("resnet18", 18)
    x = net.input("image", "batch", 3, size, size)
    widths = [max(4, int(each * width)) for each in WIDTHS]
    x = net.node("Relu", [net.norm(net.conv(x, "conv1", widths[0], 7, 2), "bn1")], "relu")
    x = net.node("MaxPool", [x], "maxpool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    for stage, channels in enumerate(widths):
        for block in range(BLOCKS):
            x = residual(net, x, f"layer{stage + 1}.{block}", channels, 2 if stage and not block else 1)
    x = net.node("Flatten", [net.node("GlobalAveragePool", [x], "avgpool")], "")
    net.constant("fc.weight", net.rng.standard_normal((1000, widths[-1])).astype("float32") * 0.05)
    x = net.node("Gemm", [x, "fc.weight"], "fc", transB=1)
    net.output(x, "logits", "batch", 1000)
    model = helper.make_model(net.graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def residual(net, x, name, channels, stride):
    """Add a basic block."""
    shortcut = x
    if stride > 1 or net.channels[x] != channels:
        shortcut = net.norm(net.conv(x, f"{name}.downsample.0", channels, 1, stride), f"{name}.downsample.1")
    y = net.node("Relu", [net.norm(net.conv(x, f"{name}.conv1", channels, 3, stride), f"{name}.bn1")], f"{name}.relu")
    y = net.norm(net.conv(y, f"{name}.conv2", channels, 3), f"{name}.bn2")
    return net.node("Relu", [net.node("Add", [y, shortcut], name)], f"{name}.relu1")
