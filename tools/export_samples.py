#!/usr/bin/env python3
"""Export the networks of make_models.py from PyTorch, Keras and Paddle, each in every form that their exporters write.

    python tools/export_samples.py torch  [--out DIR] [NAME ...]     torch and onnxscript: both exporters
    python tools/export_samples.py keras  [--out DIR] [NAME ...]     keras, with KERAS_BACKEND=tensorflow (and tf2onnx) or =torch
    python tools/export_samples.py paddle [--out DIR] [NAME ...]     paddlepaddle and paddle2onnx

writes NAME.FORM.onnx.gz into DIR (tests/models/exporters). The networks are small, their weights random, their statistics as wide as those
of trained networks, and each BatchNormalization without a positive scale has a negative one, as in make_models.py. What exporters note of
their run (stack traces, paths, versions of the machine) is left out; nothing else of the files is touched.

The forms of torch: `script` and `dynamo` are the exporters; `plain` is without the exporter's optimizer; `dynamic` has open sizes;
`training` is exported in training mode.
"""

import argparse
import gzip
import logging
import tempfile
import warnings
from pathlib import Path

import numpy as np
import onnx

OUT = Path(__file__).resolve().parent.parent / "tests" / "models" / "exporters"


# The networks that are exported in training mode too.
TRAINED = ("small_cnn", "tabular_mlp")


def statistics(rng, channels, positive=False):
    """Return (weight, bias, running_mean, running_var) of a batch normalization."""
    weight = np.abs(rng.normal(1.0, 0.3, channels)) + 0.05
    if not positive:
        weight[rng.integers(channels)] *= -0.3
    return [
        array.astype(np.float32)
        for array in (weight, rng.normal(0, 0.3, channels), rng.normal(0, 0.5, channels), rng.lognormal(0, 0.5, channels))
    ]


def write(proto, path):
    """Write a model without what its exporter notes of the run."""
    for graph in [proto.graph, *proto.functions]:
        for entry in [graph, *graph.node, *getattr(graph, "value_info", ()), *getattr(graph, "input", ()), *getattr(graph, "output", ())]:
            for field in ("metadata_props", "doc_string"):
                if hasattr(entry, "ClearField") and field in entry.DESCRIPTOR.fields_by_name:
                    entry.ClearField(field)
    for tensor in proto.graph.initializer:
        tensor.ClearField("metadata_props")
    proto.ClearField("metadata_props")
    onnx.checker.check_model(proto)
    path.write_bytes(gzip.compress(proto.SerializeToString(deterministic=True), mtime=0))
    print(f"{path.name:<44} {path.stat().st_size / 1e3:.1f} kB")


# ---- PyTorch ----


def export_torch(folder, names):
    """Write the networks by both exporters, with and without what they optimize, with sizes given and open."""
    import torch
    from torch_networks import torch_networks

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it would warn of packages that nothing here needs
    torch.manual_seed(0)
    modes = torch.onnx.TrainingMode
    for name, (net, inputs, axes) in torch_networks().items():
        if names and name not in names:
            continue
        rng = np.random.default_rng(0)
        for module in net.modules():
            if isinstance(module, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
                tensors = (module.weight.data, module.bias.data, module.running_mean, module.running_var)
                for tensor, values in zip(tensors, statistics(rng, module.num_features), strict=True):
                    tensor.copy_(torch.from_numpy(values))
        names_in = [f"input{number}" for number in range(len(inputs))]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for suffix, open_axes in (("", None), ("_dynamic", axes)):
                net.eval()
                for form, mode in (("", modes.EVAL), ("_plain", modes.PRESERVE)):
                    write(_by_script(net, inputs, names_in, open_axes, mode), folder / f"{name}.script{form}{suffix}.onnx.gz")
                    write(_by_dynamo(net, inputs, names_in, open_axes, not form), folder / f"{name}.dynamo{form}{suffix}.onnx.gz")
            if name in TRAINED:
                net.train()
                write(_by_script(net, inputs, names_in, None, modes.TRAINING), folder / f"{name}.script_training.onnx.gz")
                write(_by_dynamo(net, inputs, names_in, None, True), folder / f"{name}.dynamo_training.onnx.gz")


def _by_script(net, inputs, input_names, axes, mode):
    """The exporter over TorchScript; in evaluation mode it folds a batch normalization behind a convolution itself."""
    import io

    import torch

    file = io.BytesIO()
    options = {"dynamic_axes": dict(zip(input_names, axes, strict=True))} if axes else {}
    options |= {
        "training": mode,
        "do_constant_folding": mode is torch.onnx.TrainingMode.EVAL,
        "input_names": input_names,
        "output_names": ["output"],
    }
    torch.onnx.export(net, inputs, file, dynamo=False, **options)
    return onnx.load_from_string(file.getvalue())


def _by_dynamo(net, inputs, input_names, axes, optimize):
    import torch

    options = {"input_names": input_names, "output_names": ["output"], "optimize": optimize}
    if axes:
        options["dynamic_shapes"] = tuple({axis: torch.export.Dim.DYNAMIC for axis in each} for each in axes)
    return torch.onnx.export(net, inputs, dynamo=True, verbose=False, **options).model_proto


# ---- Keras ----


def keras_nets():
    """Return name -> network; channels are last, as in Keras's defaults."""
    from keras import Input, Model, layers

    def norm_relu(x):
        return layers.ReLU()(layers.BatchNormalization()(x))

    def conv(x, width, **options):
        return layers.Conv2D(width, 3, padding="same", **options)(x)

    def keras_cnn():
        x = image = Input((12, 12, 3))
        x = layers.BatchNormalization(name="positive")(layers.Conv2D(4, 3, activation="relu")(x))
        x = layers.Flatten()(layers.MaxPooling2D()(x))
        return Model(image, layers.Dense(4, activation="softmax")(x))

    def tdnn():
        x = features = Input((20, 6))
        for kernel, dilation in [(5, 1), (3, 2), (3, 3), (1, 1)]:
            x = layers.BatchNormalization()(layers.Conv1D(8, kernel, dilation_rate=dilation, activation="relu")(x))
        return Model(features, layers.Dense(4)(layers.GlobalAveragePooling1D()(layers.Multiply()([x, x]))))

    def tabular_mlp():
        numbers = Input((6,))
        x = layers.BatchNormalization()(numbers)
        for width in (8, 8, 6):
            x = layers.Dropout(0.1)(layers.BatchNormalization()(layers.Dense(width, activation="relu")(x)))
        return Model(numbers, layers.Dense(2)(x))

    def unet():
        image = Input((16, 16, 3))
        one = norm_relu(conv(image, 4, use_bias=False))
        two = norm_relu(conv(layers.MaxPooling2D()(one), 8, use_bias=False))
        x = norm_relu(conv(layers.MaxPooling2D()(two), 8, use_bias=False))
        x = layers.Concatenate()([norm_relu(layers.Conv2DTranspose(8, 2, strides=2, padding="same")(x)), two])
        x = layers.Concatenate()([norm_relu(layers.Conv2DTranspose(4, 3, strides=2, padding="same")(x)), one])
        return Model(image, layers.Conv2D(2, 1)(x))

    def resnet_v2():
        image = Input((16, 16, 3))
        x = conv(image, 4)
        for _ in range(6):
            x = layers.Add()([x, conv(norm_relu(conv(norm_relu(x), 4)), 4)])
        return Model(image, layers.Dense(4)(layers.GlobalAveragePooling2D()(norm_relu(x))))

    return {net.__name__: net() for net in (keras_cnn, tdnn, tabular_mlp, unet, resnet_v2)}


def export_keras(folder, names):
    """Write the networks by Keras's own exporter: over tf2onnx from TensorFlow, over dynamo from PyTorch."""
    import keras

    keras.utils.set_random_seed(0)
    backend = keras.backend.backend()
    for name, net in keras_nets().items():
        if names and name not in names:
            continue
        rng = np.random.default_rng(0)
        for layer in net.layers:
            if isinstance(layer, keras.layers.BatchNormalization):
                layer.set_weights(statistics(rng, layer.gamma.shape[0], positive=layer.name == "positive"))
        with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            path = Path(scratch) / "net.onnx"
            net(np.zeros((2, *net.input_shape[1:]), np.float32))  # Keras exports what has been called
            net.export(path, format="onnx", verbose=False)
            write(onnx.load(path), folder / f"{name}.keras_{backend}.onnx.gz")


# ---- Paddle ----


def paddle_nets():
    """Return name -> (network, shape of its input)."""
    from paddle import concat, nn

    def conv_norm(a, b, kernel, **options):
        return nn.Conv2D(a, b, kernel, bias_attr=False, **options), nn.BatchNorm2D(b)

    class Residual(nn.Sequential):
        def forward(self, x):
            return x + super().forward(x)

    pooled = [nn.AdaptiveAvgPool2D(1), nn.Flatten()]
    small_cnn = nn.Sequential(
        *(*conv_norm(3, 6, 3, stride=2, padding=1), nn.ReLU(), *conv_norm(6, 6, 3, padding=1, groups=6), nn.ReLU(), *conv_norm(6, 8, 1)),
        *(Residual(*conv_norm(8, 8, 3, padding=1), nn.ReLU(), *conv_norm(8, 8, 3, padding=1)), nn.ReLU()),
        Residual(nn.BatchNorm2D(8), nn.ReLU(), nn.Conv2D(8, 8, 3, padding=1)),
        *(*pooled, nn.Linear(8, 6, bias_attr=False), nn.BatchNorm1D(6), nn.ReLU(), nn.Linear(6, 4)),
    )

    def pre_activation(a, b):
        return nn.BatchNorm2D(a), nn.ReLU(), nn.Conv2D(a, b, 3, padding=1, bias_attr=False)

    blocks = [Residual(*pre_activation(4, 4), *pre_activation(4, 4)) for _ in range(6)]
    resnet_v2 = nn.Sequential(
        nn.Conv2D(3, 4, 3, padding=1, bias_attr=False), *blocks, nn.BatchNorm2D(4), nn.ReLU(), *pooled, nn.Linear(4, 4)
    )

    class UNet(nn.Layer):
        def __init__(self):
            super().__init__()
            self.down1, self.down2, self.down3 = (
                nn.Sequential(*conv_norm(a, b, 3, padding=1), nn.ReLU()) for a, b in [(3, 4), (4, 8), (8, 8)]
            )
            self.up2 = nn.Sequential(nn.Conv2DTranspose(8, 8, 2, 2, groups=4, bias_attr=False), nn.BatchNorm2D(8), nn.ReLU())
            self.up1 = nn.Sequential(nn.Conv2DTranspose(16, 4, 2, 2, groups=2, bias_attr=False), nn.BatchNorm2D(4), nn.ReLU())
            self.pool, self.head = nn.MaxPool2D(2, 2), nn.Conv2D(8, 2, 1)

        def forward(self, x):
            one = self.down1(x)
            two = self.down2(self.pool(one))
            x = concat([self.up2(self.down3(self.pool(two))), two], 1)
            return self.head(concat([self.up1(x), one], 1))

    image = [3, 16, 16]
    return {"small_cnn": (small_cnn, image), "resnet_v2": (resnet_v2, image), "unet": (UNet(), image)}


def export_paddle(folder, names):
    """Write the networks by paddle2onnx, with sizes given and open."""
    import paddle

    paddle.seed(0)
    for name, (net, shape) in paddle_nets().items():
        if names and name not in names:
            continue
        rng = np.random.default_rng(0)
        for layer in net.sublayers():
            if isinstance(layer, (paddle.nn.BatchNorm1D, paddle.nn.BatchNorm2D)):
                tensors = (layer.weight, layer.bias, layer._mean, layer._variance)
                for tensor, values in zip(tensors, statistics(rng, layer.weight.shape[0]), strict=True):
                    tensor.set_value(values)
        net.eval()
        for is_open in (False, True):
            sizes = [-1, shape[0], -1, -1] if is_open and name != "unet" else [-1 if is_open else 2, *shape]
            with tempfile.TemporaryDirectory() as scratch:
                inputs = [paddle.static.InputSpec(sizes, "float32", "x")]
                paddle.onnx.export(net, f"{scratch}/net", input_spec=inputs, opset_version=16, enable_auto_update_opset=False)
                write(onnx.load(f"{scratch}/net.onnx"), folder / f"{name}.paddle{'_dynamic' if is_open else ''}.onnx.gz")


EXPORTERS = {"torch": export_torch, "keras": export_keras, "paddle": export_paddle}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("framework", choices=EXPORTERS)
    parser.add_argument("names", metavar="NAME", nargs="*", help="only these networks")
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="where the models go")
    arguments = parser.parse_intermixed_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    EXPORTERS[arguments.framework](arguments.out, arguments.names)


if __name__ == "__main__":
    main()
