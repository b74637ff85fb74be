"""Checks of the graph that fastbn.keras.fold plans on; tests/test_keras.py runs them, on each backend in a process of its own."""

import warnings

import keras
import numpy as np
import onnxruntime
import pytest

from fastbn.exported.keras_graph import KerasGraph
from fastbn.exported.keras_layers import LAYERS, OPERATIONS
from fastbn.keras import fold

layers, ops = keras.layers, keras.ops

SHAPES = {"1D": (10, 3), "2D": (9, 8, 3), "3D": (5, 6, 5, 2)}
IMAGE, SIGNAL, ROW = SHAPES["2D"], SHAPES["1D"], (4,)

# Layers for one, two and three axes -> arguments; a number holds for every axis.
SIZED = {
    "Conv{}": [
        {"filters": 4, "kernel_size": 3},
        {"filters": 4, "kernel_size": 3, "strides": 2, "padding": "same", "use_bias": False},
        {"filters": 4, "kernel_size": 2, "dilation_rate": 2, "activation": "relu"},
    ],
    "DepthwiseConv{}": [
        {"kernel_size": 3, "depth_multiplier": 2, "padding": "same"},
        {"kernel_size": 2, "dilation_rate": 2, "use_bias": False},
    ],
    "SeparableConv{}": [
        {"filters": 5, "kernel_size": 3, "depth_multiplier": 2, "padding": "same", "use_bias": False},
        {"filters": 5, "kernel_size": 3, "strides": 2, "activation": "leaky_relu"},
    ],
    "Conv{}Transpose": [
        {"filters": 4, "kernel_size": 3},
        {"filters": 4, "kernel_size": 2, "strides": 2, "padding": "same"},
        {"filters": 4, "kernel_size": 2, "strides": 3, "use_bias": False},
        {"filters": 4, "kernel_size": 4, "strides": 2, "padding": "same", "activation": "relu"},
        {"filters": 4, "kernel_size": 3, "strides": 2, "output_padding": 1},
        {"filters": 4, "kernel_size": 3, "dilation_rate": 2, "padding": "same"},
    ],
    "MaxPooling{}": [{"pool_size": 2}, {"pool_size": 3, "strides": 2, "padding": "same"}],
    "AveragePooling{}": [{"pool_size": 2}, {"pool_size": 3, "strides": 2, "padding": "same"}],
    "GlobalMaxPooling{}": [{}, {"keepdims": True}],
    "GlobalAveragePooling{}": [{}, {"keepdims": True}],
    "ZeroPadding{}": [{}, {"padding": 2}],
    "Cropping{}": [{}, {"cropping": 2}],
    "UpSampling{}": [{"size": 2}, {"size": 3}],
}

# Other layers -> shape of the input, arguments.
LAYER_CASES = {
    "Activation": (ROW, [{"activation": name} for name in ("relu", "leaky_relu", "linear", "sigmoid", "softplus", "tanh")]),
    "BatchNormalization": (IMAGE, [{}, {"axis": 1}, {"axis": 2, "center": False}]),
    "Conv1D": (SIGNAL, [{"filters": 4, "kernel_size": 3, "padding": "causal", "dilation_rate": 2}]),
    "Cropping2D": (IMAGE, [{"cropping": ((0, 2), (1, 0))}]),
    "Dense": (SIGNAL, [{"units": 4}, {"units": 4, "use_bias": False, "activation": "tanh"}]),
    "EinsumDense": (SIGNAL, [{"equation": "abc,cd->abd", "output_shape": (None, 5), "bias_axes": "d"}]),
    "Embedding": ((6,), [{"input_dim": 10, "output_dim": 4}, {"input_dim": 10, "output_dim": 4, "mask_zero": True}]),
    "Flatten": (IMAGE, [{}, {"data_format": "channels_first"}]),
    "LayerNormalization": (SIGNAL, [{}]),
    "LeakyReLU": (ROW, [{"negative_slope": 0.4}]),
    "PReLU": (IMAGE, [{"alpha_initializer": "uniform"}, {"alpha_initializer": "uniform", "shared_axes": [1, 2]}]),
    "Permute": (IMAGE, [{"dims": (3, 1, 2)}]),
    "ReLU": (ROW, [{}, {"negative_slope": 0.3}, {"max_value": 0.5}]),
    "RepeatVector": (ROW, [{"n": 3}]),
    "Rescaling": (IMAGE, [{"scale": 0.5, "offset": -1.0}]),
    "Reshape": (IMAGE, [{"target_shape": (-1, 3)}, {"target_shape": (72, 3, 1)}]),
    "SeparableConv2D": (IMAGE, [{"filters": 4, "kernel_size": 2, "data_format": "channels_first", "padding": "same"}]),
    "UpSampling2D": (IMAGE, [{"size": (2, 3), "interpolation": "bilinear"}]),
    "ZeroPadding2D": (IMAGE, [{"padding": ((0, 2), (1, 0))}, {"data_format": "channels_first"}]),
    **{name: (IMAGE, [{}]) for name in ("ActivityRegularization", "Identity")},
    **{name: (IMAGE, [{"rate": 0.3}]) for name in ("AlphaDropout", "Dropout", "GaussianDropout", "SpatialDropout2D")},
    "GaussianNoise": (IMAGE, [{"stddev": 0.3}]),
    "SpatialDropout1D": (SIGNAL, [{"rate": 0.3}]),
    "SpatialDropout3D": (SHAPES["3D"], [{"rate": 0.3}]),
}

# What functions make of two tensors of one shape: layers that put them together, and operations.
FUNCTIONS = {
    "Add": [lambda x, y: layers.Add()([x, y, x]), lambda x, y: x + y, lambda x, y: 2 + x],
    "Average": [lambda x, y: layers.Average()([x, y, x])],
    "Concatenate": [lambda x, y: layers.Concatenate(axis=1)([x, y]), lambda x, y: ops.concatenate([x, y], axis=-1)],
    "Divide": [lambda x, y: ops.divide(x, 3)],
    "LeakyRelu": [lambda x, y: ops.leaky_relu(x, 0.3)],
    "Max": [lambda x, y: ops.max(x, axis=(1, 2))],
    "Mean": [lambda x, y: ops.mean(x, axis=1, keepdims=True)],
    "Multiply": [lambda x, y: layers.Multiply()([x, y]), lambda x, y: x * 0.5],
    "Negative": [lambda x, y: -x],
    "Relu": [lambda x, y: ops.relu(x)],
    "Reshape": [lambda x, y: ops.reshape(x, (-1, 72, 3))],
    "Sigmoid": [lambda x, y: ops.sigmoid(x)],
    "Subtract": [lambda x, y: layers.Subtract()([x, y]), lambda x, y: 1.5 - x],
    "Tanh": [lambda x, y: ops.tanh(x)],
    "Transpose": [lambda x, y: ops.transpose(x, (0, 3, 1, 2)), lambda x, y: ops.transpose(x)],
    "TrueDivide": [lambda x, y: x / 4.0],
}


def layer_cases():
    """Return (id, shape of the input, name of the layer, its arguments)."""
    found = [(kind.format(size), (SHAPES[size], each)) for kind, each in SIZED.items() for size in SHAPES]
    found += LAYER_CASES.items()
    every = [(name, shape, options) for name, (shape, each) in found if hasattr(layers, name) for options in each]
    return [pytest.param(shape, name, options, id=f"{name} {number}") for number, (name, shape, options) in enumerate(every)]


def function_cases():
    return [pytest.param(make, id=f"{name} {number}") for name, each in FUNCTIONS.items() for number, make in enumerate(each)]


def settled(model):
    """Give every variable values of its own: in this order kernels, biases, statistics."""
    rng = np.random.default_rng(0)
    for weight in model.weights:
        if "seed" not in weight.name:
            values = rng.uniform(0.5, 1.5, weight.shape) if "variance" in weight.name else rng.normal(0, 0.5, weight.shape)
            weight.assign(values)
    return model


def assert_graph_is_the_model(model):
    """Run the graph in onnxruntime, and the model."""
    rng = np.random.default_rng(1)
    whole = [str(tensor.dtype).startswith("int") for tensor in model.inputs]
    shapes = [(2, *tensor.shape[1:]) for tensor in model.inputs]
    given = [
        rng.integers(0, 10, shape).astype("int32") if is_whole else rng.standard_normal(shape).astype("float32")
        for shape, is_whole in zip(shapes, whole, strict=True)
    ]
    tensors = [ops.convert_to_tensor(each) for each in given]
    try:
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            want = ops.convert_to_numpy(model(tensors if len(tensors) > 1 else tensors[0], training=False))
    except Exception as error:  # TensorFlow has no channels first on CPUs
        pytest.skip(f"the backend does not run it: {error}")
    is_own = any("inconsistencies across backends" in str(each.message) or "Clamping" in str(each.message) for each in heard)
    averages = any(type(layer).__name__.startswith("AveragePooling") and layer.padding == "same" for layer in model.layers)
    if is_own or (averages and keras.config.backend() == "torch"):  # which repeats values at the borders, where others leave them out
        pytest.skip("the backend pads in a way of its own")
    proto = KerasGraph(model).proto
    assert {node.domain for node in proto.graph.node} == {""}, "an opaque node"
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    got = session.run(None, {f"input{number}": each for number, each in enumerate(given)})[0]
    assert got.shape == want.shape
    assert got == pytest.approx(want, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(("shape", "name", "options"), layer_cases())
def test_the_graph_computes_what_a_layer_does(shape, name, options):
    given = keras.Input(shape, dtype="int32" if name == "Embedding" else "float32")
    assert_graph_is_the_model(settled(keras.Model(given, getattr(layers, name)(**options)(given))))


@pytest.mark.parametrize("make", function_cases())
def test_the_graph_computes_what_an_operation_does(make):
    given = [keras.Input(IMAGE), keras.Input(IMAGE)]
    assert_graph_is_the_model(keras.Model(given, make(*given)))


def test_every_rule_has_a_case():
    tried = {kind.format(size) for kind in SIZED for size in SHAPES} | set(LAYER_CASES) | set(FUNCTIONS)
    assert {name for name in LAYERS if hasattr(layers, name)} | set(OPERATIONS) <= tried


# ---- what folds through them ----


def norm(x, **options):
    return layers.BatchNormalization(name="bn", **options)(x)


def folded(shape, make, dtype="float32"):
    """Return (what became of the batch normalization of a model, the layers that took it in)."""
    given = keras.Input(shape, dtype=dtype)
    model = settled(keras.Model(given, make(given)))
    result = fold(model)
    assert [kept.code for kept in result.kept] or result.parity.ok, str(result)
    return [kept.code for kept in result.kept], [each.into for each in result.folded]


TAKE = {
    "transposed": lambda x: norm(layers.Conv2DTranspose(4, 3, strides=2, padding="same", use_bias=False, name="it")(x)),
    "separable": lambda x: norm(layers.SeparableConv2D(4, 3, use_bias=False, name="it")(x)),
    "separable, ahead": lambda x: layers.SeparableConv2D(4, 3, name="it")(norm(layers.Activation("tanh")(x))),
    "separable without a bias, ahead": lambda x: layers.SeparableConv2D(4, 3, use_bias=False, name="it")(norm(layers.Softmax()(x))),
    "causal": lambda x: norm(layers.Conv1D(4, 3, padding="causal", name="it")(layers.Reshape((-1, 3))(x))),
    "einsum": lambda x: norm(layers.EinsumDense("abcd,de->abce", (None, None, 5), bias_axes="e", name="it")(x)),
    "layer normalization": lambda x: norm(layers.LayerNormalization(name="it")(x)),
    "in the middle": lambda x: norm(layers.Permute((1, 3, 2))(layers.Conv2D(4, 3, name="it")(x)), axis=2),
}
PASS = {
    "cropping": layers.Cropping2D(1),
    "upsampling": layers.UpSampling2D(2),
    "bilinear": layers.UpSampling2D(2, interpolation="bilinear"),
    "PReLU": layers.PReLU("uniform"),
    "average": lambda x: layers.Average()([x, layers.Activation("linear")(x)]),
    "number": lambda x: 2.0 * x,
    "reshape": lambda x: ops.reshape(x, (-1, 72, 4)),
    "mean": lambda x: ops.mean(x, axis=(1, 2)),
}


@pytest.mark.parametrize("make", TAKE.values(), ids=TAKE)
def test_layers_take_in_what_stands_beside_them(make):
    assert folded(IMAGE, make) == ([], ["it"])


def test_an_embedding_takes_in_a_scale_and_a_shift():
    def make(x):
        return layers.GlobalAveragePooling1D()(norm(layers.Embedding(10, 4, mask_zero=True, name="it")(x)))

    assert folded((6,), make, "int32") == ([], ["it"])


@pytest.mark.parametrize("make", PASS.values(), ids=PASS)
def test_layers_that_a_batch_normalization_passes(make):
    options = {"center": False} if isinstance(make, layers.PReLU) else {}
    codes, into = folded(IMAGE, lambda x: layers.Dense(3, name="ahead")(norm(make(layers.Conv2D(4, 1, name="it")(x)), **options)))
    assert (codes, into) in [([], ["it"]), ([], ["ahead"])]


def test_zeros_of_padding_and_uneven_kernels_let_no_shift_pass():
    def padded(x):
        return layers.Activation("tanh")(norm(layers.ZeroPadding2D(1)(layers.Conv2D(4, 1)(x))))

    def ahead(x):
        return layers.Conv2DTranspose(4, 2, strides=2)(norm(layers.Activation("tanh")(x)))

    assert folded(IMAGE, padded) == folded(IMAGE, ahead) == (["padding"], [])


UNKNOWN = {
    "LayerNormalization of another axis": (IMAGE, lambda: layers.LayerNormalization(axis=1)),
    "LayerNormalization without a center": (ROW, lambda: layers.LayerNormalization(center=False)),
    "ReLU from a threshold on": (ROW, lambda: layers.ReLU(threshold=1.0)),
    "ReLU with an end and a slope": (ROW, lambda: layers.ReLU(max_value=6.0, negative_slope=0.1)),
    "UpSampling2D, bicubic": (IMAGE, lambda: layers.UpSampling2D(interpolation="bicubic")),
    "Rescaling by several numbers": (ROW, lambda: layers.Rescaling(scale=[1.0, 2.0, 3.0, 4.0])),
    "the sum of all": (ROW, lambda: lambda x: ops.sum(x, axis=None, keepdims=True)),
    "the largest, at least a number": (ROW, lambda: lambda x: ops.max(x, axis=1, keepdims=True, initial=0.5)),
    "a sum of types": (ROW, lambda: lambda x: ops.add(x, ops.cast(x, "int32"))),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_has_no_rule_is_an_opaque_node(name):
    shape, make = UNKNOWN[name]
    given = keras.Input(shape)
    proto = KerasGraph(keras.Model(given, make()(given))).proto
    assert [node for node in proto.graph.node if node.domain], [node.op_type for node in proto.graph.node]
