#!/usr/bin/env python3
"""Build the sample models: networks as PyTorch's and Keras's exporters write them, without either, always the same bytes.

    python tools/make_models.py [--out DIR] [NAME ...]     the models of MODELS, each a few hundred kB at most
    python tools/make_models.py --large DIR                2.4 GB of external data: --layers x Conv 1x1 of --channels, each with its BN
    python tools/make_models.py --long DIR [--nodes N]     two models of N nodes (6000): long.onnx, Conv, BatchNormalization, Relu, and so
                                                           on; computed.onnx, the same with biases and sizes that the graph computes

Weights and statistics are random, the statistics as wide as those of trained networks. What the exporters themselves make of such networks
lies in tests/models/exporters (tools/export_samples.py).
"""

import argparse
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

__all__ = ["MODELS", "computed", "large", "long"]

EPS = 1e-5


class Net:
    """A graph under construction; names follow PyTorch's exporter: module `a.b` gives node /a/b/Op and parameters a.b.weight."""

    def __init__(self, name, seed):
        self.name = name
        self.rng = np.random.default_rng(seed)
        self.graph = onnx.GraphProto(name=name)
        self.channels = {}
        self.used = set()

    def input(self, name, *shape, kind=TensorProto.FLOAT, channels=None):
        self.graph.input.append(helper.make_tensor_value_info(name, kind, shape))
        self.channels[name] = channels or shape[1]
        return name

    def output(self, value, name, *shape):
        """Let the graph end: the value's node gives the output under this name."""
        for node in self.graph.node:
            node.output[:] = [name if output == value else output for output in node.output]
        self.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))

    def constant(self, name, values):
        self.graph.initializer.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def normal(self, name, shape, fan_in):
        return self.constant(name, (self.rng.standard_normal(shape) * np.sqrt(2 / fan_in)).astype(np.float32))

    def node(self, op, inputs, module="", channels=None, **attributes):
        """Add a node and return the name of its value."""
        path = "/" + "/".join([*module.split("."), op] if module else [op])
        name, number = path, 0
        while name in self.used:
            number += 1
            name = f"{path}_{number}"
        self.used.add(name)
        value = f"{name}_output_0"
        self.graph.node.append(helper.make_node(op, inputs, [value], name=name, **attributes))
        self.channels[value] = channels or (self.channels.get(inputs[0]) if inputs else None)
        return value

    def conv(self, x, module, out, kernel=3, stride=1, pad=None, groups=1, bias=False, dilation=1, rank=2):
        pad = dilation * (kernel // 2) if pad is None else pad
        inner = self.channels[x] // groups
        inputs = [x, self.normal(f"{module}.weight", (out, inner, *[kernel] * rank), inner * kernel**rank)]
        if bias:
            inputs.append(self.constant(f"{module}.bias", (0.1 * self.rng.standard_normal(out)).astype(np.float32)))
        sizes = {"kernel_shape": [kernel] * rank, "strides": [stride] * rank, "pads": [pad] * 2 * rank, "dilations": [dilation] * rank}
        return self.node("Conv", inputs, module, out, group=groups, **sizes)

    def conv_transpose(self, x, module, out, kernel=2, stride=2, groups=1):
        inner = self.channels[x]
        weight = self.normal(f"{module}.weight", (inner, out // groups, kernel, kernel), inner // groups)
        sizes = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": [0] * 4, "dilations": [1, 1]}
        return self.node("ConvTranspose", [x, weight], module, out, group=groups, **sizes)

    def norm(self, x, module, positive=False):
        """Add a BatchNormalization; its weight is positive, or has a few negative channels as trained ones do."""
        count, rng = self.channels[x], self.rng
        weight = np.abs(rng.normal(1.0, 0.3, count)) + 0.05
        if not positive:
            weight[rng.random(count) < 0.1] *= -0.3
        parameters = {"weight": weight, "bias": rng.normal(0, 0.3, count), "running_mean": rng.normal(0, 0.5, count)}
        parameters["running_var"] = rng.lognormal(0, 0.5, count)
        names = [self.constant(f"{module}.{name}", values.astype(np.float32)) for name, values in parameters.items()]
        return self.node("BatchNormalization", [x, *names], module, epsilon=EPS, momentum=0.9)

    def relu(self, x, module=""):
        return self.node("Relu", [x], module)

    def linear(self, x, module, out, bias=True):
        """Add nn.Linear on a matrix: a Gemm, or a MatMul when it has no bias."""
        inner = self.channels[x]
        if not bias:
            return self.node("MatMul", [x, self.normal(f"{module}.weight_t", (inner, out), inner)], module, out)
        weight = self.normal(f"{module}.weight", (out, inner), inner)
        c = self.constant(f"{module}.bias", (0.1 * self.rng.standard_normal(out)).astype(np.float32))
        return self.node("Gemm", [x, weight, c], module, out, alpha=1.0, beta=1.0, transB=1)

    def reshape(self, x, module, *shape, channels=None):
        return self.node("Reshape", [x, self.constant(f"{module}.shape{len(self.used)}", np.array(shape, np.int64))], module, channels)

    def model(self, producer="pytorch", opset=18):
        model = helper.make_model(self.graph, producer_name=producer, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
        onnx.checker.check_model(model)
        return model


def small_cnn():
    """A residual CNN on 32 x 32 images. One BN stays whatever is known: it reads a Relu that the skip reads too, and a Relu reads it."""
    net = Net("small_cnn", 1)
    x = net.relu(net.norm(net.conv(net.input("image", "batch", 3, 32, 32), "stem.conv", 16, stride=2), "stem.bn"), "stem.relu")
    x = net.relu(net.norm(net.conv(x, "block1.depthwise", 16, groups=16), "block1.bn1"), "block1.relu")
    x = net.norm(net.conv(x, "block1.pointwise", 24, kernel=1), "block1.bn2")
    y = net.relu(net.norm(net.conv(x, "block2.conv1", 24), "block2.bn1"), "block2.relu1")
    y = net.norm(net.conv(y, "block2.conv2", 24), "block2.bn2")
    x = net.relu(net.node("Add", [x, y], "block2"), "block2.relu2")
    y = net.relu(net.norm(x, "block3.bn"), "block3.relu")
    x = net.node("Add", [x, net.conv(y, "block3.conv", 24, bias=True)], "block3")
    x = net.node("Flatten", [net.node("GlobalAveragePool", [x], "pool")], "flatten", axis=1)
    x = net.relu(net.norm(net.linear(x, "head.fc1", 32), "head.bn"), "head.relu")
    net.output(net.linear(x, "head.fc2", 10), "logits", "batch", 10)
    return net.model()


def levit_like():
    """Tokens through Linear, flatten, BN (LeViT): 2 convolutions, 3 blocks of attention and MLP with 4 BN each, a BN before the head."""
    net = Net("levit_like", 2)
    width, heads, tokens = 32, 2, 16
    per_head = width // heads

    def linear_norm(x, module, out):
        inner = net.channels[x]
        x = net.node("MatMul", [x, net.normal(f"{module}.c.weight_t", (inner, out), inner)], f"{module}.c", out)
        x = net.norm(net.reshape(x, module, -1, out), f"{module}.bn")
        return net.reshape(x, module, 1, tokens, out)

    x = net.norm(net.conv(net.input("image", 1, 3, 16, 16), "embed.0.c", 16, stride=2), "embed.0.bn")
    x = net.norm(net.conv(net.node("HardSwish", [x], "embed"), "embed.1.c", width, stride=2), "embed.1.bn")
    x = net.node("Transpose", [net.reshape(x, "embed", 1, width, tokens)], "embed", width, perm=[0, 2, 1])
    for block in range(3):
        module = f"blocks.{block}"
        qkv = net.reshape(linear_norm(x, f"{module}.qkv", 3 * width), module, 1, tokens, heads, 3 * per_head)
        sizes = net.constant(f"{module}.split", np.full(3, per_head, np.int64))
        names = [f"/{module}/{part}" for part in "qkv"]
        net.graph.node.append(helper.make_node("Split", [qkv, sizes], names, name=f"/{module}/Split", axis=3))
        q, v = (net.node("Transpose", [name], module, per_head, perm=[0, 2, 1, 3]) for name in (names[0], names[2]))
        k = net.node("Transpose", [names[1]], module, per_head, perm=[0, 2, 3, 1])
        scale = net.constant(f"{module}.scale", np.float32(per_head**-0.5))
        weights = net.node("Softmax", [net.node("Mul", [net.node("MatMul", [q, k], module), scale], module)], module, axis=-1)
        y = net.node("Transpose", [net.node("MatMul", [weights, v], module)], module, perm=[0, 2, 1, 3])
        y = net.node("HardSwish", [net.reshape(y, module, 1, tokens, width, channels=width)], module)
        x = net.node("Add", [x, linear_norm(y, f"{module}.proj", width)], module)
        y = net.node("HardSwish", [linear_norm(x, f"{module}.mlp.0", 2 * width)], f"{module}.mlp")
        x = net.node("Add", [x, linear_norm(y, f"{module}.mlp.2", width)], module)
    x = net.node("ReduceMean", [x, net.constant("pool.axes", np.array([1], np.int64))], "pool", width, keepdims=0)
    net.output(net.linear(net.norm(x, "head.bn"), "head.l", 10), "logits", 1, 10)
    return net.model()


def tabular_mlp():
    """Categories through embeddings, numbers through a BN, then three times Linear, Relu, BN, Dropout (fastai's TabularModel)."""
    net = Net("tabular_mlp", 3)
    categories = net.input("categories", "batch", 2, kind=TensorProto.INT64)
    parts = []
    for number, (count, width) in enumerate([(12, 4), (7, 3)]):
        column = net.node("Gather", [categories, net.constant(f"embeds.{number}.column", np.array(number, np.int64))], axis=1)
        table = net.normal(f"embeds.{number}.weight", (count, width), 2)
        parts.append(net.node("Gather", [table, column], f"embeds.{number}", width))
    parts.append(net.norm(net.input("numbers", "batch", 6), "bn_cont"))
    x = net.node("Concat", parts, "", 13, axis=1)
    for number, width in enumerate([32, 24, 16]):
        x = net.relu(net.linear(x, f"layers.{number}.0", width), f"layers.{number}.1")
        x = net.node("Dropout", [net.norm(x, f"layers.{number}.2")], f"layers.{number}.3")
    net.output(net.linear(x, "layers.3.0", 2), "logits", "batch", 2)
    return net.model()


def tdnn():
    """Dilated Conv1d without padding, Relu, BN, four times (x-vector); the last BN feeds a mean and a standard deviation over time."""
    net = Net("tdnn", 4)
    x = net.input("features", "batch", 20, 40)
    for number, (kernel, dilation) in enumerate([(5, 1), (3, 2), (3, 3), (1, 1)]):
        x = net.relu(net.conv(x, f"tdnn{number}.conv", 24, kernel, pad=0, dilation=dilation, bias=number % 2 == 0, rank=1), f"tdnn{number}")
        x = net.norm(x, f"tdnn{number}.bn")
    squares = net.node("Mul", [x, x], "pool")
    time = net.constant("pool.axes", np.array([2], np.int64))
    mean = net.node("ReduceMean", [x, time], "pool", keepdims=0)
    spread = net.node("Sub", [net.node("ReduceMean", [squares, time], "pool", keepdims=0), net.node("Mul", [mean, mean], "pool")], "pool")
    floor = net.constant("pool.floor", np.float32(1e-4))
    deviation = net.node("Sqrt", [net.node("Max", [spread, floor], "pool")], "pool")
    x = net.node("Concat", [mean, deviation], "pool", 48, axis=1)
    net.output(net.linear(x, "embedding", 16), "xvector", "batch", 16)
    return net.model()


def repvgg():
    """RepVGG as it is trained: 3x3 with BN, 1x1 with BN and a BN alone, added, four times."""
    net = Net("repvgg", 5)
    x = net.relu(net.conv(net.input("image", "batch", 3, 16, 16), "stem", 12, bias=True), "stem")
    for number in range(4):
        module = f"stage.{number}"
        dense = net.norm(net.conv(x, f"{module}.rbr_dense.conv", 12), f"{module}.rbr_dense.bn")
        point = net.norm(net.conv(x, f"{module}.rbr_1x1.conv", 12, kernel=1), f"{module}.rbr_1x1.bn")
        both = net.node("Add", [dense, point], module)
        x = net.relu(net.node("Add", [both, net.norm(x, f"{module}.rbr_identity")], module), module)
    x = net.node("Flatten", [net.node("GlobalAveragePool", [x], "gap")], "gap", axis=1)
    net.output(net.linear(x, "linear", 10), "logits", "batch", 10)
    return net.model()


def unet():
    """Three levels down, two up by grouped transposed convolutions, each with its BN; the skips are concatenated."""
    net = Net("unet", 6)
    x = net.relu(net.norm(net.conv(net.input("image", "batch", 3, 32, 32), "down1.conv", 8), "down1.bn"), "down1")
    skips = [x]
    for number, width in ((2, 16), (3, 24)):
        x = net.node("MaxPool", [x], f"pool{number}", kernel_shape=[2, 2], strides=[2, 2])
        x = net.relu(net.norm(net.conv(x, f"down{number}.conv", width), f"down{number}.bn"), f"down{number}")
        skips.append(x)
    for number, width, groups in ((2, 16, 4), (1, 8, 2)):
        x = net.relu(net.norm(net.conv_transpose(x, f"up{number}.conv", width, groups=groups), f"up{number}.bn"), f"up{number}")
        x = net.node("Concat", [x, skips[number - 1]], f"up{number}", 2 * width, axis=1)
    net.output(net.conv(x, "head", 2, kernel=1, bias=True), "mask", "batch", 2, 32, 32)
    return net.model()


def resnet_v2():
    """Pre-activation blocks: BN, Relu, Conv, BN, Relu, Conv, Add; six of them, and a BN at the end."""
    net = Net("resnet_v2", 7)
    x = net.conv(net.input("image", "batch", 3, 16, 16), "conv1", 12)
    for number in range(6):
        module = f"layer.{number}"
        y = net.conv(net.relu(net.norm(x, f"{module}.bn1"), f"{module}.relu1"), f"{module}.conv1", 12)
        y = net.conv(net.relu(net.norm(y, f"{module}.bn2"), f"{module}.relu2"), f"{module}.conv2", 12)
        x = net.node("Add", [x, y], module)
    x = net.node("GlobalAveragePool", [net.relu(net.norm(x, "bn"), "relu")], "avgpool")
    net.output(net.linear(net.node("Flatten", [x], "flatten", axis=1), "fc", 10), "logits", "batch", 10)
    return net.model()


def densenet_like():
    """Dense blocks of 4: BN, Relu, Conv 1x1, BN, Relu, Conv 3x3, Concat; three blocks, two transitions."""
    net = Net("densenet_like", 8)
    x = net.relu(net.norm(net.conv(net.input("image", "batch", 3, 32, 32), "conv0", 12, stride=2), "norm0"), "relu0")
    for block in range(3):
        for layer in range(4):
            module = f"denseblock{block + 1}.denselayer{layer + 1}"
            y = net.conv(net.relu(net.norm(x, f"{module}.norm1"), f"{module}.relu1"), f"{module}.conv1", 16, kernel=1)
            y = net.conv(net.relu(net.norm(y, f"{module}.norm2"), f"{module}.relu2"), f"{module}.conv2", 6)
            x = net.node("Concat", [x, y], f"{module}", net.channels[x] + 6, axis=1)
        if block < 2:
            module = f"transition{block + 1}"
            x = net.conv(net.relu(net.norm(x, f"{module}.norm"), f"{module}.relu"), f"{module}.conv", net.channels[x] // 2, kernel=1)
            x = net.node("AveragePool", [x], f"{module}.pool", kernel_shape=[2, 2], strides=[2, 2])
    x = net.node("GlobalAveragePool", [net.relu(net.norm(x, "norm5"), "relu5")], "pool")
    net.output(net.linear(net.node("Flatten", [x], "flatten", axis=1), "classifier", 10), "logits", "batch", 10)
    return net.model()


def keras_cnn():
    """A Keras Sequential as tf2onnx writes it: NHWC outside, Conv with Relu, BN of positive scale, MaxPool, Flatten, Dense, Softmax."""
    net = Net("keras_cnn", 9)
    image = net.input("input_1", "batch", 12, 12, 3, channels=3)
    x = net.node("Transpose", [image], "sequential.conv2d", 3, perm=[0, 3, 1, 2])
    x = net.relu(net.conv(x, "sequential.conv2d", 8, pad=0, bias=True), "sequential.conv2d")
    x = net.norm(x, "sequential.batch_normalization", positive=True)
    x = net.node("MaxPool", [x], "sequential.max_pooling2d", kernel_shape=[2, 2], strides=[2, 2])
    x = net.node("Transpose", [x], "sequential.max_pooling2d", perm=[0, 2, 3, 1])
    x = net.reshape(x, "sequential.flatten", -1, 200, channels=200)
    x = net.node("MatMul", [x, net.normal("sequential.dense.kernel", (200, 10), 200)], "sequential.dense", 10)
    x = net.node("Add", [x, net.constant("sequential.dense.bias", np.linspace(-1, 1, 10, dtype=np.float32))], "sequential.dense")
    net.output(net.node("Softmax", [x], "sequential.dense", axis=-1), "dense", "batch", 10)
    return net.model("tf2onnx", 15)


_NETS = [small_cnn, levit_like, tabular_mlp, tdnn, repvgg, unet, resnet_v2, densenet_like, keras_cnn]

# name -> function that returns the ModelProto
MODELS = {net.__name__: net for net in _NETS}


# Nodes in a block of `long` and of `computed`.
LONG_BLOCK, COMPUTED_BLOCK = 3, 26


def long(blocks=2000, channels=4):
    """Return blocks x (Conv 1x1, BatchNormalization, Relu)."""
    net = Net("long", 10)
    x = net.input("x", 1, channels, 4, 4)
    for number in range(blocks):
        x = net.relu(net.norm(net.conv(x, f"layers.{number}.conv", channels, kernel=1), f"layers.{number}.bn"), f"layers.{number}.relu")
    net.output(x, "y", 1, channels, 4, 4)
    return net.model()


def computed(blocks=231, channels=4):
    """Return blocks x 26 nodes: Conv, BatchNormalization, Relu with the bias as PyTorch's exporter computes it, its optimizer off, then a
    BatchNormalization of an image that is flattened and made an image again, by sizes as the exporter of TorchScript and tf2onnx compute
    them."""
    net = Net("computed", 12)
    x = net.input("x", "batch", channels, 4, 4)
    nothing = net.constant("nothing", np.float32(0))
    for number in range(blocks):
        conv, there, back = (f"layers.{number}.{part}" for part in ("conv", "there", "back"))
        weight = net.normal(f"{conv}.weight", (channels, channels, 1, 1), channels)
        length = net.node("Expand", [net.node("Shape", [weight], conv, end=1), net.node("Constant", [], conv, value_ints=[1])], conv)
        bias = net.node("Expand", [net.node("CastLike", [nothing, x], conv), length], conv)
        x = net.node("Conv", [x, weight, bias], conv, channels, kernel_shape=[1, 1])
        x = net.conv(net.relu(net.norm(x, f"{conv}.norm"), conv), there, channels, kernel=1)
        batch = net.node("Gather", [net.node("Shape", [x], there), net.node("Constant", [], there, value_int=0)], there, axis=0)
        batch = net.node("Unsqueeze", [batch, net.node("Constant", [], there, value_ints=[0])], there)
        batch = net.node("Cast", [batch], there, to=TensorProto.INT64)
        for module, sizes in ((there, [channels, -1]), (back, [channels, 4, 4])):
            ends = [net.node("Constant", [], module, value_ints=[size]) for size in sizes]
            x = net.node("Reshape", [x, net.node("Concat", [batch, *ends], module, axis=0)], module, channels)
            if module == there:
                x = net.relu(net.norm(x, f"{there}.norm"), there)
    net.output(x, "y", "batch", channels, 4, 4)
    return net.model()


def large(folder, layers=16, channels=6144, rows=256):
    """Write layers x (Conv 1x1, BatchNormalization, Relu) as large.onnx and large.onnx.data, some rows at a time; return the path."""
    net = Net("large", 11)
    folder = Path(folder)
    x = net.input("x", 1, channels, 2, 2)
    with open(folder / "large.onnx.data", "wb") as data:
        for number in range(layers):
            module = f"layers.{number}"
            weight = net.graph.initializer.add(name=f"{module}.conv.weight", data_type=TensorProto.FLOAT, dims=[channels, channels, 1, 1])
            weight.data_location = TensorProto.EXTERNAL
            place = {"location": "large.onnx.data", "offset": data.tell(), "length": 4 * channels * channels}
            for key, value in place.items():
                weight.external_data.add(key=key, value=str(value))
            for row in range(0, channels, rows):
                block = net.rng.standard_normal((min(rows, channels - row), channels), np.float32)
                block *= np.float32(np.sqrt(2 / channels))
                data.write(block)
            x = net.node("Conv", [x, weight.name], f"{module}.conv", channels, kernel_shape=[1, 1])
            x = net.relu(net.norm(x, f"{module}.bn"), f"{module}.relu")
    net.output(x, "y", 1, channels, 2, 2)
    model = helper.make_model(net.graph, producer_name="pytorch", opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (folder / "large.onnx").write_bytes(model.SerializeToString())
    return folder / "large.onnx"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", metavar="NAME", nargs="*", help=f"of {', '.join(MODELS)}; all without one")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the models go (the current folder)")
    parser.add_argument("--large", type=Path, metavar="DIR", help="write large.onnx and its data file there")
    parser.add_argument("--layers", type=int, default=16, help="of the large model (16)")
    parser.add_argument("--channels", type=int, default=6144, help="of the large model (6144)")
    parser.add_argument("--long", type=Path, metavar="DIR", help="write long.onnx and computed.onnx there")
    parser.add_argument("--nodes", type=int, default=6000, metavar="N", help="of these two (6000)")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.names) - set(MODELS))
    if unknown:
        parser.error(f"no model is called {', '.join(unknown)}")
    for folder in filter(None, (arguments.out, arguments.large, arguments.long)):
        folder.mkdir(parents=True, exist_ok=True)
    if arguments.large:
        print(large(arguments.large, arguments.layers, arguments.channels))
    if arguments.long:
        for model in (long(arguments.nodes // LONG_BLOCK), computed(arguments.nodes // COMPUTED_BLOCK)):
            path = arguments.long / f"{model.graph.name}.onnx"
            path.write_bytes(model.SerializeToString(deterministic=True))
            print(path)
    if arguments.names or not (arguments.large or arguments.long):
        for name in arguments.names or MODELS:
            path = (arguments.out or Path()) / f"{name}.onnx"
            path.write_bytes(MODELS[name]().SerializeToString(deterministic=True))
            print(f"{path}   {path.stat().st_size / 1e3:.1f} kB")


if __name__ == "__main__":
    main()
