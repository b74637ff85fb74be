"""Whole models without their batch normalizations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastbn.exported.result import ModelFold

__all__ = ["fold"]


def fold(
    model: keras.Model,
    example_inputs: Any = None,  # an array, or a structure of them
    *,
    verify: bool = True,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> ModelFold[keras.Model]:
    """Fold every batch normalization of a model that can be folded exactly into its neighbors' weights; return a copy without them.

    The layers of the model are planned as `fastbn.fold` plans nodes; the new weights go into layers of the same names, a layer without a
    bias gets one where it needs one, and a batch normalization becomes `keras.layers.Identity`. docs/keras.md says more.

    Parameters
    ----------
    model : keras.Model
        Functional or Sequential and built, with nested models, on any backend; it is not changed.
    example_inputs : array or structure of arrays, optional
        What the copy is compared on beside random numbers; what the model takes for its inputs.
    verify : bool
        Run every fold in onnxruntime, and the folded model beside the original in Keras.
    seed, progress : int, callable of str, optional
        Seed of random inputs; what is called with a line of text before each step.

    Returns
    -------
    ModelFold
        model (not compiled), folded, kept, parity, to_dict(); str() is the report.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        What is no Keras model, or one whose graph is not known: a class of its own, layers that are not built.
    ParityError
        The folded model differs from the original whatever is left out.

    Examples
    --------
    >>> import keras
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="dense"), keras.layers.BatchNormalization(name="bn")])
    >>> result = fold(model)
    >>> result, result.folded[0].into, type(result.model.get_layer("bn")).__name__
    (<ModelFold of keras: 1 of 1 BatchNormalization folded, parity ok>, 'dense', 'Identity')
    """
    from fastbn.exported import keras_fold  # which loads onnx

    return keras_fold.fold(model, example_inputs, verify, seed, progress)
