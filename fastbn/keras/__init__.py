"""Batch normalization in Keras 3 on our kernels: a layer in place of keras.layers.BatchNormalization, and models converted to it and
back, or folded.

Keras's backend is chosen before it is imported (KERAS_BACKEND): torch, jax or tensorflow.
"""

from fastbn.keras.conversion import convert
from fastbn.keras.folding import fold
from fastbn.keras.layer import BatchNormalization

__all__ = ["BatchNormalization", "convert", "fold"]
