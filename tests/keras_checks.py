"""Checks of fastbn.keras on the backend that KERAS_BACKEND names; tests/test_keras.py runs them once per backend."""

import doctest

import keras
import numpy as np
import pytest
from keras import layers, ops

import fastbn
import fastbn.keras
from fastbn import reference
from fastbn.keras import BatchNormalization, callbacks, convert

BACKEND = keras.backend.backend()
SHAPES = {"NC": ((64, 5), -1), "NCS": ((8, 5, 12), 1), "NHWC": ((8, 6, 7, 5), -1), "NCHW": ((8, 5, 6, 7), 1), "NDHWC": ((3, 4, 5, 2, 5), 4)}
MASK = np.array([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], bool)


def data(shape, seed=0):
    return np.random.default_rng(seed).normal(3, 2, shape).astype(np.float32)


def numpy(value, dtype=None):
    return ops.convert_to_numpy(value if dtype is None else ops.cast(value, dtype))


def made(layer_class, shape, axis=-1, **options):
    """Return a built layer with random weights, always the same."""
    layer = layer_class(axis=axis, momentum=0.9, epsilon=1e-3, **options)
    layer.build(shape)
    rng = np.random.default_rng(1)
    for weight in layer.weights:
        weight.assign(rng.uniform(0.5, 2, weight.shape))
    return layer


def pair(shape, axis=-1, **options):
    return made(BatchNormalization, shape, axis, **options), made(layers.BatchNormalization, shape, axis, **options)


def gradients(layer, x, dy, training, mask=None):
    """Return the gradients of sum(dy * layer(x)) by x and by each trainable weight."""
    if BACKEND == "torch":
        import torch

        given = torch.tensor(x, requires_grad=True)
        (layer(given, training=training, mask=mask) * torch.tensor(dy)).sum().backward()
        return [value.numpy() for value in (given.grad, *(weight.value.grad for weight in layer.trainable_weights))]
    if BACKEND == "tensorflow":
        import tensorflow as tf

        given = tf.constant(x)
        with tf.GradientTape() as tape:
            tape.watch(given)
            total = tf.reduce_sum(layer(given, training=training, mask=mask) * dy)
        return [value.numpy() for value in tape.gradient(total, [given, *(weight.value for weight in layer.trainable_weights)])]
    import jax

    @jax.jit
    def total(x, weights):
        y, _ = layer.stateless_call(weights, [weight.value for weight in layer.non_trainable_weights], x, training=training, mask=mask)
        return (y * dy).sum()

    dx, weights = jax.grad(total, (0, 1))(x, [weight.value for weight in layer.trainable_weights])
    return [np.asarray(value) for value in (dx, *weights)]


@pytest.mark.parametrize("name", SHAPES)
def test_forward_is_the_reference(name):
    shape, axis = SHAPES[name]
    layer, x = made(BatchNormalization, shape, axis), data(shape)
    gamma, beta, mean, var = (numpy(weight) for weight in layer.weights)
    y = reference.batch_norm(x.astype(np.float64), mean, var, gamma, beta, eps=1e-3, axis=axis)
    np.testing.assert_allclose(numpy(layer(x)), y, rtol=0, atol=4e-6)
    running = {"running_mean": mean.astype(np.float64), "running_var": var.astype(np.float64), "momentum": 0.1, "unbiased": False}
    y, _ = reference.batch_norm_train(x.astype(np.float64), gamma, beta, eps=1e-3, axis=axis, **running)
    np.testing.assert_allclose(numpy(layer(x, training=True)), y, rtol=0, atol=4e-6)
    np.testing.assert_allclose(numpy(layer.moving_mean), running["running_mean"], rtol=2e-7)
    np.testing.assert_allclose(numpy(layer.moving_variance), running["running_var"], rtol=2e-7)


@pytest.mark.parametrize("name", SHAPES)
def test_statistics_and_values_are_those_of_keras(name):
    shape, axis = SHAPES[name]
    ours, keras_own = pair(shape, axis)
    for batch in range(10):
        x = data(shape, batch)
        np.testing.assert_allclose(numpy(ours(x, training=True)), numpy(keras_own(x, training=True)), rtol=0, atol=1e-5)
    for one, other in zip(ours.weights, keras_own.weights, strict=True):
        np.testing.assert_allclose(numpy(one), numpy(other), rtol=1e-6)


@pytest.mark.parametrize("parameters", ["both", "gamma", "beta", "none"])
@pytest.mark.parametrize("training", [True, False])
def test_gradients_are_the_reference(training, parameters):
    shape = (8, 6, 7, 5)
    options = {"scale": parameters in ("both", "gamma"), "center": parameters in ("both", "beta")}
    layer, x, dy = made(BatchNormalization, shape, **options), data(shape), data(shape, 1)
    weight, bias = (None if value is None else numpy(value) for value in (layer.gamma, layer.beta))
    stats = reference.batch_stats(x, axis=-1)
    if not training:
        stats = fastbn.BatchStats(1, numpy(layer.moving_mean), numpy(layer.moving_variance))
    expected = reference.batch_norm_backward(dy, x, stats, weight, bias, eps=1e-3, axis=-1, training=training)
    found = gradients(layer, x, dy, training)
    for got, want in zip(found, [value for value in expected if value is not None], strict=True):
        # The mean of a float32 batch is right to 2^-24 standard deviations, and dweight takes its error times sum(dy).
        atol = 4e-6 if want.ndim > 1 else 2**-24 * np.abs(dy).sum((0, 1, 2)).max()
        np.testing.assert_allclose(got, want, rtol=2e-6, atol=atol)


def test_gradients_of_masked_batches_are_those_of_keras():
    shape = (4, 5, 3)
    x, dy = data(shape), data(shape, 1)
    ours, keras_own = pair(shape)
    for got, want in zip(gradients(ours, x, dy, True, MASK), gradients(keras_own, x, dy, True, MASK), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-6)


def test_gradients_of_masked_batches_are_the_differences():
    shape, step = (4, 5, 3), 1e-6
    x, dy = (data(shape, seed).astype(np.float64) for seed in (0, 1))
    rng = np.random.default_rng(2)
    mean, var, weight, bias = rng.uniform(0.5, 2, (4, 3))
    options = {"eps": 1e-3, "axis": -1}

    def total(x, weight, bias):
        return (callbacks.train(x, mean, var, weight, bias, MASK, momentum=0.1, **options)[0] * dy).sum()

    saved = callbacks.train(x, mean, var, weight, bias, MASK, momentum=0.1, **options)[-1]
    for slot, gradient in enumerate(callbacks.train_backward(dy, x, weight, bias, saved, MASK, **options)):
        for place in [(0,) * gradient.ndim, (-1,) * gradient.ndim, (1,) * gradient.ndim]:
            totals = []
            for sign in (1, -1):
                values = [x.copy(), weight.copy(), bias.copy()]
                values[slot][place] += sign * step
                totals.append(total(*values))
            np.testing.assert_allclose(gradient[place], (totals[0] - totals[1]) / (2 * step), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("variance", [-0.5, -2e-3])
@pytest.mark.parametrize("renorm", [False, True])
def test_a_moving_variance_without_a_root_gives_nan_in_its_channel(renorm, variance):
    shape = (8, 3)
    for layer in pair(shape, renorm=renorm):
        layer.moving_variance.assign([1.0, variance, 2.0])
        y = numpy(layer(data(shape), training=False))
        assert np.isnan(y).tolist() == [[False, True, False]] * 8
        dx, *_ = gradients(layer, data(shape), data(shape, 1), False)
        assert np.isnan(dx).tolist() == [[False, True, False]] * 8


def test_a_constant_masked_channel_without_epsilon_gives_beta():
    """Keras gives NaN; as without a mask, the gradient of such a channel is 0."""
    layer, x = BatchNormalization(epsilon=0.0), data((4, 5, 3))
    layer.build(x.shape)
    layer.beta.assign([1.0, 2.0, 3.0])
    x[..., 1] = 7
    np.testing.assert_array_equal(numpy(layer(x, training=True, mask=MASK))[MASK][:, 1], 2)
    dx, *_ = gradients(layer, x, data(x.shape, 1), True, MASK)
    assert not dx[..., 1].any()
    assert np.isfinite(dx).all()


def test_a_mask_leaves_padding_out():
    shape = (4, 5, 3)
    layer, x = made(BatchNormalization, shape), data(shape)
    mean, var = (numpy(value) for value in (layer.moving_mean, layer.moving_variance))
    rows = x[MASK].astype(np.float64)
    y = (x - rows.mean(0)) / np.sqrt(rows.var(0) + 1e-3) * numpy(layer.gamma) + numpy(layer.beta)
    np.testing.assert_allclose(numpy(layer(x, training=True, mask=MASK)), y, rtol=0, atol=4e-6)
    np.testing.assert_allclose(numpy(layer.moving_mean), 0.9 * mean + 0.1 * rows.mean(0), rtol=2e-7)
    np.testing.assert_allclose(numpy(layer.moving_variance), 0.9 * var + 0.1 * rows.var(0), rtol=2e-7)
    x[~MASK] = np.nan
    layer(x, training=True, mask=MASK)
    assert np.isfinite(numpy(layer.moving_mean)).all()


def test_a_mask_comes_from_the_layer_before():
    x = np.where(MASK[..., None], data((4, 5, 3)), 0).astype(np.float32)
    norm = BatchNormalization()
    keras.Sequential([keras.Input((5, 3)), layers.Masking(), norm])(x, training=True)
    np.testing.assert_allclose(numpy(norm.moving_mean), 0.01 * x[MASK].mean(0), rtol=1e-6)


def test_a_mask_of_other_axes_is_keras_own():
    shape = (4, 5, 3)
    x, mask = data(shape), MASK
    ours, keras_own = pair(shape, 1)
    np.testing.assert_array_equal(numpy(ours(x, training=True, mask=mask)), numpy(keras_own(x, training=True, mask=mask)))


def test_nothing_to_see_leaves_the_statistics_alone():
    layer = made(BatchNormalization, (4, 5, 3))
    before = [numpy(weight).copy() for weight in layer.weights]
    assert numpy(layer(np.zeros((0, 5, 3), np.float32), training=True)).shape == (0, 5, 3)
    assert np.isfinite(numpy(layer(data((4, 5, 3)), training=True, mask=np.zeros((4, 5), bool)))).all()
    for one, other in zip(before, layer.weights, strict=True):
        np.testing.assert_array_equal(one, numpy(other))


def test_one_value_per_channel_gives_beta():
    layer = made(BatchNormalization, (1, 3))
    np.testing.assert_array_equal(numpy(layer(data((1, 3)), training=True))[0], numpy(layer.beta))


def test_not_trainable_means_inference():
    layer, x = made(BatchNormalization, (8, 5)), data((8, 5))
    y, mean = numpy(layer(x)), numpy(layer.moving_mean).copy()
    layer.trainable = False
    np.testing.assert_array_equal(numpy(layer(x, training=True)), y)
    np.testing.assert_array_equal(numpy(layer.moving_mean), mean)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16", "bfloat16", "float16"])
def test_half_precision_is_rounded_once(policy):
    unit = 2.0**-8 if "bfloat16" in policy else 2.0**-11
    layer = made(BatchNormalization, (8, 6, 5), dtype=policy)
    x = numpy(ops.cast(data((8, 6, 5)), layer.compute_dtype), "float32")
    gamma, beta = (numpy(value, "float32") for value in (layer.gamma, layer.beta))
    y, _ = reference.batch_norm_train(x.astype(np.float64), gamma, beta, eps=1e-3, axis=-1)
    found = layer(ops.cast(x, layer.compute_dtype), training=True)
    assert keras.backend.standardize_dtype(found.dtype) == layer.compute_dtype
    np.testing.assert_allclose(numpy(found, "float32"), y, rtol=unit * 1.01, atol=4e-6)
    kept = "float32" if policy.startswith("mixed") else policy
    assert {weight.dtype for weight in layer.weights} == {kept}
    masked = layer(ops.cast(x, layer.compute_dtype), training=True, mask=np.ones((8, 6), bool))
    np.testing.assert_allclose(numpy(masked, "float32"), y, rtol=unit * 1.01, atol=4e-6)


def test_integers_become_float32_as_in_keras():
    x = np.arange(12).reshape(4, 3)
    ours, keras_own = pair((4, 3))
    found = ours(x, training=True)
    assert keras.backend.standardize_dtype(found.dtype) == "float32"
    np.testing.assert_allclose(numpy(found), numpy(keras_own(x, training=True)), rtol=0, atol=2e-6)


def test_renorm_trains_as_in_keras():
    x = data((8, 5))
    ours, keras_own = pair((8, 5), renorm=True)
    np.testing.assert_array_equal(numpy(ours(x, training=True)), numpy(keras_own(x, training=True)))
    np.testing.assert_allclose(numpy(ours(x)), numpy(keras_own(x)), rtol=0, atol=4e-6)


def network(norm):
    keras.utils.set_random_seed(3)
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(4, 3, activation="relu"),
            norm(momentum=0.9, epsilon=1e-5),
            layers.Flatten(),
            layers.Dense(3, activation="softmax"),
        ]
    )


def test_fit_goes_the_way_of_keras():
    x, labels = data((160, 8, 8, 1)), np.arange(160) % 3
    losses, statistics = [], []
    for norm in (BatchNormalization, layers.BatchNormalization):
        model = network(norm)
        model.compile(optimizer="adam", loss="sparse_categorical_crossentropy")
        losses.append(model.fit(x, labels, batch_size=32, epochs=3, verbose=0).history["loss"])
        statistics.append([numpy(weight) for weight in model.layers[1].non_trainable_weights])
        assert np.isfinite(model.predict(x, verbose=0)).all()
    np.testing.assert_allclose(*losses, rtol=1e-5)
    for one, other in zip(*statistics, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_config_is_that_of_keras():
    options = {"axis": 1, "momentum": 0.7, "epsilon": 1e-4, "scale": False, "beta_regularizer": "l2", "name": "norm"}
    ours, keras_own = BatchNormalization(**options), layers.BatchNormalization(**options)
    assert ours.get_config() == keras_own.get_config()
    assert BatchNormalization.from_config(ours.get_config()).get_config() == ours.get_config()
    names = [[weight.name for weight in layer.weights] for layer in pair((4, 3))]
    assert names == [["gamma", "beta", "moving_mean", "moving_variance"]] * 2


def test_models_are_saved_and_loaded(tmp_path):
    x = data((8, 8, 8, 1))
    ours, keras_own = network(BatchNormalization), network(layers.BatchNormalization)
    ours(x, training=True)
    ours.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert type(again.layers[1]) is BatchNormalization
    np.testing.assert_array_equal(numpy(again(x)), numpy(ours(x)))
    ours.save_weights(tmp_path / "model.weights.h5")
    keras_own.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_allclose(numpy(keras_own(x)), numpy(ours(x)), rtol=1e-5)


def nested():
    inner = keras.Sequential([keras.Input((7, 6)), layers.BatchNormalization(name="inside"), layers.Dense(6)], name="inner")
    given = keras.Input((7, 6))
    value = layers.TimeDistributed(layers.BatchNormalization(name="wrapped"))(inner(given))
    value = layers.BatchNormalization(name="top", momentum=0.7, gamma_regularizer="l2")(value)
    model = keras.Model(given, layers.Dense(2)(value))
    rng = np.random.default_rng(1)
    for weight in model.weights:
        weight.assign(rng.uniform(0.5, 2, weight.shape))
    return model


def classes(model):
    return {layer.name: type(layer) for layer in model._flatten_layers() if isinstance(layer, layers.BatchNormalization)}


def test_convert_there_and_back():
    model, x = nested(), data((4, 7, 6))
    y = numpy(model(x))
    ours = convert(model)
    assert classes(ours) == dict.fromkeys(["inside", "wrapped", "top"], BatchNormalization)
    assert classes(model) == dict.fromkeys(["inside", "wrapped", "top"], layers.BatchNormalization)
    np.testing.assert_allclose(numpy(ours(x)), y, rtol=3e-6, atol=3e-6 * np.abs(y).max())
    assert ours.get_layer("top").momentum == 0.7
    back = convert(ours, back=True)
    assert classes(back) == classes(model)
    np.testing.assert_array_equal(numpy(back(x)), y)


class Block(layers.Layer):
    """A layer that makes its own norm."""

    def __init__(self, **options):
        super().__init__(**options)
        self.norm = layers.BatchNormalization(name="hidden")

    def call(self, inputs):
        return self.norm(inputs)


class Written(keras.Model):
    """A model that is written as a class."""

    def call(self, inputs):
        return inputs


def test_convert_refuses_what_it_cannot_reach():
    hidden = "^Cannot convert the model: 'hidden' is in no configuration, another layer makes it itself$"
    with pytest.raises(ValueError, match=hidden):
        convert(keras.Sequential([keras.Input((3,)), Block()]))
    with pytest.raises(ValueError, match="Functional"):
        convert(Written())
    with pytest.raises(TypeError, match=r"^Expected a keras\.Model, got int - at `model`$"):
        convert(3)


# what is called -> its sentence, all of them a ValueError
WRONG = {
    "axis": (lambda: BatchNormalization(axis=4)(data((4, 3))), "Expected an axis of an input with 2 axes, got 4 - at `axis`"),
    "rank": (lambda: BatchNormalization()(data((4,))), "Expected an input with at least 2 axes, got shape (4,) - at `inputs`"),
    "mask": (
        lambda: BatchNormalization()(data((4, 5, 3)), training=True, mask=MASK[0]),
        "Expected 2 axes, one less than inputs, got shape (5,) - at `mask`",
    ),
    "channels": (lambda: made(BatchNormalization, (4, 3))(data((4, 5))), "but received input with shape (4, 5)"),
    "momentum": (lambda: BatchNormalization(momentum=1.5), "Expected a number from 0 to 1, got 1.5 - at `momentum`"),
    "epsilon": (lambda: BatchNormalization(epsilon=-1), "Expected a finite number >= 0, got -1.0 - at `epsilon`"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_input(name):
    call, sentence = WRONG[name]
    with pytest.raises(ValueError) as caught:  # noqa: PT011, the sentence is compared below: Keras wraps some
        call()
    assert sentence in str(caught.value)


def test_a_traced_function_gives_the_same():
    layer, x = made(BatchNormalization, (8, 6, 5)), data((8, 6, 5))
    y, trained = numpy(layer(x)), numpy(made(BatchNormalization, (8, 6, 5))(x, training=True))
    if BACKEND == "torch":
        import torch

        found = torch.compile(layer, backend="aot_eager")(torch.tensor(x)).detach()
        taught = torch.compile(made(BatchNormalization, (8, 6, 5)), backend="aot_eager")(torch.tensor(x), training=True).detach()
    elif BACKEND == "jax":
        import jax

        state = [[weight.value for weight in weights] for weights in (layer.trainable_weights, layer.non_trainable_weights)]
        found = jax.jit(layer)(x)
        taught, _ = jax.jit(layer.stateless_call, static_argnames="training")(*state, x, training=True)
        several = jax.vmap(layer)(np.stack([x, x + 1]))
        np.testing.assert_array_equal(several[0], y)
    else:
        import tensorflow as tf

        found = tf.function(layer)(x)
        np.testing.assert_array_equal(tf.function(layer, input_signature=[tf.TensorSpec([None, None, 5])])(x), y)
        taught = tf.function(lambda x: layer(x, training=True))(x)
    np.testing.assert_array_equal(numpy(found), y)
    np.testing.assert_array_equal(numpy(taught), trained)


@pytest.mark.parametrize("dynamic", [False, True])
def test_an_exported_model_has_a_plain_node_and_folds(dynamic, tmp_path):
    if BACKEND != "torch":
        pytest.skip("Keras writes BatchNormalization from its torch backend only")
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    model, path = network(BatchNormalization), tmp_path / "model.onnx"
    model(data((8, 8, 8, 1)), training=True)
    signature = None if dynamic else [keras.InputSpec(shape=(2, 8, 8, 1), dtype="float32")]
    model.export(path, format="onnx", input_signature=signature, verbose=False)
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    assert [node.op_type for node in proto.graph.node].count("BatchNormalization") == 1
    if not dynamic:
        result = fastbn.fold(path)
        assert result.to_dict()["batch_normalizations"] == {"before": 1, "after": 0}
        assert result.parity.ok, result.parity


def test_examples():
    for module in (fastbn.keras.layer, fastbn.keras.conversion, fastbn.keras.folding):
        found = doctest.testmod(module)
        assert found.attempted > 0
        assert found.failed == 0
