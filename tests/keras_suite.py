"""Keras's own tests of BatchNormalization, as its package has them, with our layer in place; tests/test_keras.py runs them per backend."""

import types

from keras.src import layers
from keras.src.layers.normalization import batch_normalization_test as theirs

import fastbn.keras

theirs.layers = types.SimpleNamespace(**{**vars(layers), "BatchNormalization": fastbn.keras.BatchNormalization})


class TestOurLayer(theirs.BatchNormalizationTest):
    """The tests of the class that it stands for."""
