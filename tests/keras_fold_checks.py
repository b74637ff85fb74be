"""Checks of fastbn.keras.fold; tests/test_keras.py runs them, on each backend in a process of its own."""

import json

import keras
import numpy as np
import pytest

import fastbn
from fastbn.keras import convert, fold

layers = keras.layers


def norm(x, name, **options):
    return layers.BatchNormalization(name=name, **options)(x)


def cnn():
    x = given = keras.Input((12, 12, 3))
    x = layers.Conv2D(6, 3, use_bias=False, activation="relu", name="conv")(x)
    x = norm(x, "before_pool")  # forwards a depthwise convolution that pads, backwards a ReLU
    x = layers.MaxPooling2D()(x)
    x = layers.DepthwiseConv2D(3, padding="same", depth_multiplier=2, use_bias=False, name="depthwise")(x)
    x = layers.ReLU()(norm(x, "after_depthwise"))
    y = norm(layers.Conv2D(12, 1, use_bias=False, name="point")(x), "branch")
    x = layers.Flatten()(layers.Dropout(0.5)(layers.Add()([x, y])))
    x = norm(layers.Dense(5, use_bias=False, name="dense")(x), "last", scale=False)
    return keras.Model(given, layers.Activation("softmax")(x))


def pyramid():
    """Convolutions in groups and of one axis, channels put together, a global mean, a nested model."""
    inner = keras.Sequential(
        [keras.Input((8, 8)), layers.Conv1D(8, 3, groups=2, name="inner_conv"), layers.BatchNormalization(name="inner")]
    )
    given = keras.Input((10, 4))
    one = norm(layers.Conv1D(4, 3, padding="same", name="one")(given), "first")
    two = norm(layers.Conv1D(4, 1, name="two")(given), "second", center=False)
    x = inner(layers.Reshape((10, 8))(layers.Concatenate()([one, two]))[:, :8])
    x = layers.GlobalAveragePooling1D()(norm(layers.LeakyReLU()(x), "ahead"))
    return keras.Model(given, layers.Dense(3, name="head")(x))


def sequence():
    parts = [layers.BatchNormalization(name="input"), layers.Dense(4, activation="tanh", name="one"), layers.Dense(3, name="two")]
    return keras.Sequential([keras.Input((6,)), *parts, layers.BatchNormalization(name="output")])


def images_first():
    given = keras.Input((3, 8, 8))
    x = layers.Conv2D(4, 3, data_format="channels_first", name="conv")(given)
    return keras.Model(given, norm(x, "norm", axis=1))


# Model -> the batch normalizations that stay.
MODELS = {cnn: ["before_pool"], pyramid: [], sequence: []}


def settled(model):
    rng = np.random.default_rng(0)
    for layer in model._flatten_layers():
        if isinstance(layer, layers.BatchNormalization):
            for variable in layer.weights:
                positive = variable.name in ("gamma", "moving_variance")
                variable.assign(rng.uniform(0.5, 1.5, variable.shape) if positive else rng.standard_normal(variable.shape))
    return model


def inputs_of(model):
    rng = np.random.default_rng(1)
    return [rng.standard_normal((3, *tensor.shape[1:])).astype("float32") for tensor in model.inputs]


def result_of(model):
    given = [keras.ops.convert_to_tensor(each) for each in inputs_of(model)]
    return keras.ops.convert_to_numpy(model(given if len(given) > 1 else given[0], training=False))


def assert_same(model, other, tolerance=2e-5):
    want, got = result_of(model), result_of(other)
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max()


def norms(model):
    return [layer.name for layer in model._flatten_layers() if isinstance(layer, layers.BatchNormalization)]


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_fold(make):
    model = settled(make())
    before = [weight.copy() for weight in model.get_weights()]
    result = fold(model)
    assert norms(result.model) == [kept.bn for kept in result.kept] == MODELS[make], str(result)
    assert result.parity.ok, str(result)
    assert all(each.error <= each.bound for each in result.folded if each.error is not None)
    assert any(each.error is not None for each in result.folded)
    assert_same(model, result.model)
    assert all(np.array_equal(one, other) for one, other in zip(before, model.get_weights(), strict=True))
    assert json.loads(json.dumps(result.to_dict()))["framework"] == "keras"
    assert f"in Keras on {keras.config.backend()}" in str(result)
    assert {type(layer).__module__.split(".")[0] for layer in result.model.layers} == {"keras"}
    assert norms(fold(convert(model)).model) == [] if not MODELS[make] else True


def test_the_copy_is_a_model_like_any_other(tmp_path):
    model = settled(cnn())
    result = fold(model, inputs_of(model))
    assert result.parity.inputs == 2
    assert result.model.get_layer("conv").use_bias is False
    assert result.model.get_layer("depthwise").use_bias is True
    assert type(result.model.get_layer("branch")) is layers.Identity
    result.model.save(tmp_path / "model.keras")
    assert_same(result.model, keras.models.load_model(tmp_path / "model.keras"), 1e-6)
    assert fold(model, verify=False).parity is None


def test_channels_first_as_a_backend_has_them():
    model = settled(images_first())
    try:
        result_of(model)
    except Exception as error:  # TensorFlow's convolution on CPUs
        pytest.skip(f"the backend has no such convolution: {error}")
    result = fold(model)
    assert norms(result.model) == []
    assert_same(model, result.model)


def twice():
    given, dense = keras.Input((4,)), layers.Dense(4)
    return keras.Model(given, norm(dense(layers.Activation("tanh")(dense(given))), "bn"))


def in_training():
    given = keras.Input((4,))
    return keras.Model(given, layers.BatchNormalization(name="bn")(layers.Dense(4)(given), training=True))


def wrapped():
    given = keras.Input((5, 4))
    return keras.Model(given, layers.TimeDistributed(layers.BatchNormalization(name="bn"))(layers.Dense(4)(given)))


def unknown():
    given = keras.Input((4,))
    return keras.Model(given, layers.Activation("tanh")(norm(layers.UnitNormalization()(layers.Dense(4)(given)), "bn")))


@pytest.mark.parametrize("make", [twice, in_training, wrapped, unknown], ids=lambda make: make.__name__)
def test_what_stays_has_a_reason(make):
    code, sentence = {
        twice: ("no-module", "read in 2 places"),
        in_training: ("no-module", "a call in training"),
        wrapped: ("no-module", "another layer"),
        unknown: ("no-absorber", "UnitNormalization"),
    }[make]
    model = settled(make())
    result = fold(model)
    assert [(kept.bn, kept.code) for kept in result.kept] == [("bn", code)]
    assert sentence in result.kept[0].reason
    if make is not in_training:
        assert_same(model, result.model, 0)


def test_a_wrong_weight_is_found(monkeypatch):
    from fastbn.exported import keras_fold

    copied = keras_fold.copied

    def wrong(model, gone, values):
        return copied(model, gone, {key: array * 1.01 if key[0].name == "two" else array for key, array in values.items()})

    monkeypatch.setattr(keras_fold, "copied", wrong)
    model = settled(sequence())
    result = fold(model)
    assert [(kept.bn, kept.code) for kept in result.kept] == [("output", "parity")]
    assert_same(model, result.model)


def test_what_cannot_be_folded():
    with pytest.raises(fastbn.ArgumentTypeError, match=r"Expected a keras.Model, got str - at `model`"):
        fold("model.keras")
    with pytest.raises(fastbn.ArgumentError, match="Cannot fold a model whose layers are not built"):
        fold(keras.Sequential([layers.Dense(3)]))

    class Own(keras.Model):
        def call(self, x):
            return x

    with pytest.raises(fastbn.ArgumentError, match="a class of its own"):
        fold(Own())


def relu(x):
    """Not Keras's."""
    return keras.ops.sigmoid(x)


def test_a_function_of_the_user_is_no_function_of_keras_of_the_same_name():
    given = keras.Input((4,))
    x = layers.Lambda(lambda x: x * 2.0)(norm(layers.Dense(3, activation=relu, name="one")(given), "bn"))
    model = settled(keras.Model(given, layers.Dense(2, name="two")(x)))
    result = fold(model)
    assert [kept.bn for kept in result.kept] == ["bn"]
    assert "relu '/one'" in result.kept[0].reason
    assert_same(model, result.model, 1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda: layers.LSTM(4, activation=relu),  # the functions are those of its cell
        lambda: layers.GRU(4, return_sequences=True, recurrent_activation=relu),
        lambda: layers.RNN([layers.SimpleRNNCell(4), layers.GRUCell(3, activation=relu)]),
        lambda: layers.Bidirectional(layers.SimpleRNN(4, activation=relu)),
        lambda: layers.TimeDistributed(layers.Dense(4, activation=relu)),
    ],
)
def test_layers_that_hold_functions_in_layers_of_theirs_are_copied_with_them(make):
    given = keras.Input((6, 3))
    x = norm(layers.Dense(5, name="dense")(given), "bn")
    model = settled(keras.Model(given, make()(x)))
    result = fold(model)
    assert [each.bn for each in result.folded] == ["bn"]
    assert_same(model, result.model)


def test_a_convolution_with_a_state_is_copied():
    given = keras.Input((4, 6, 6, 3))
    x = norm(layers.Conv3D(4, 1, name="conv")(given), "bn")
    model = settled(keras.Model(given, layers.ConvLSTM2D(3, 3)(x)))
    result = fold(model)
    assert not result.kept
    assert_same(model, result.model)


@keras.saving.register_keras_serializable("checks")
class Forgetful(layers.Layer):
    """Its configuration lacks what it was made with."""

    def __init__(self, factor=1.0, **options):
        super().__init__(**options)
        self.factor = factor

    def call(self, x):
        return x * self.factor

    def get_config(self):
        return super().get_config()


def test_a_copy_that_is_another_model_is_refused():
    given = keras.Input((4,))
    model = settled(keras.Model(given, norm(layers.Dense(3)(Forgetful(3.0)(given)), "bn")))
    with pytest.raises(fastbn.ArgumentError, match=r"Cannot copy the model: output\[0\] of an unchanged copy is another one"):
        fold(model)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16", "float16", "bfloat16", "float64"])
def test_types(policy):
    given = keras.Input((8, 8, 3), dtype="float64" if policy == "float64" else "float32")
    x = norm(layers.Conv2D(4, 3, dtype=policy, name="conv")(given), "bn", dtype=policy)
    result = fold(settled(keras.Model(given, layers.ReLU(dtype=policy)(x))))
    assert [each.into for each in result.folded] == ["conv"], str(result)
    assert result.parity.ok, str(result)
    assert result.model.get_layer("conv").dtype_policy.name == policy


def test_a_shared_model_counts_once():
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(4), layers.BatchNormalization(name="bn")])
    one, two = keras.Input((4,)), keras.Input((4,))
    result = fold(settled(keras.Model([one, two], layers.Add()([inner(one), inner(two)]))))
    assert [(kept.bn, kept.code) for kept in result.kept] == [("bn", "no-module")]
    assert result.to_dict()["batch_normalizations"] == {"before": 1, "after": 1}


def test_names_of_inputs_and_outputs():
    one, two = keras.Input((4,), name="one"), keras.Input((5,), name="two")
    model = keras.Model({"one": one, "two": two}, {"a": norm(layers.Dense(3)(one), "bn"), "b": layers.Dense(2)(two)})
    result = fold(settled(model), {"one": np.ones((2, 4), "float32"), "two": np.ones((2, 5), "float32")})
    assert result.parity.ok, str(result)
    assert result.parity.inputs == 2
    assert list(result.model.output) == ["a", "b"]
    with pytest.raises(fastbn.ArgumentError, match="Cannot run the model on its example inputs"):
        fold(model, np.ones((2, 9), "float32"))
