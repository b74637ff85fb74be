"""Public functions that fold batch normalization into arrays of weights: check, scale, round."""

from __future__ import annotations

from typing import TYPE_CHECKING, SupportsFloat, overload

import numpy as np

from fastbn import _check
from fastbn.affine import WeightLayout, batch_norm_affine, narrow, scale_weight
from fastbn.errors import ArgumentError, ArgumentTypeError, FoldError, expected

if TYPE_CHECKING:
    import numpy.typing as npt

    from fastbn._types import Array, ScalarT

__all__ = ["fold_conv", "fold_linear"]


@overload
def fold_conv(
    weight: npt.NDArray[ScalarT],
    bias: npt.ArrayLike | None,
    mean: npt.ArrayLike,
    var: npt.ArrayLike,
    gamma: npt.ArrayLike | None = None,
    beta: npt.ArrayLike | None = None,
    *,
    eps: SupportsFloat = 1e-5,
    groups: int | np.integer = 1,
    transposed: bool = False,
) -> tuple[npt.NDArray[ScalarT], npt.NDArray[ScalarT]]: ...
@overload
def fold_conv(
    weight: npt.ArrayLike,
    bias: npt.ArrayLike | None,
    mean: npt.ArrayLike,
    var: npt.ArrayLike,
    gamma: npt.ArrayLike | None = None,
    beta: npt.ArrayLike | None = None,
    *,
    eps: SupportsFloat = 1e-5,
    groups: int | np.integer = 1,
    transposed: bool = False,
) -> tuple[Array, Array]: ...
def fold_conv(
    weight: npt.ArrayLike,
    bias: npt.ArrayLike | None,
    mean: npt.ArrayLike,
    var: npt.ArrayLike,
    gamma: npt.ArrayLike | None = None,
    beta: npt.ArrayLike | None = None,
    *,
    eps: SupportsFloat = 1e-5,
    groups: int | np.integer = 1,
    transposed: bool = False,
) -> tuple[Array, Array]:
    """Fold an inference batch normalization into the convolution before it.

    ``BN(conv(x, weight) + bias)`` is ``conv(x, weight') + bias'``, where ``scale = gamma / sqrt(var + eps)``, ``weight' = weight * scale``
    on the output channels and ``bias' = (bias - mean) * scale + beta`` (Ioffe & Szegedy 2015, algorithm 2), in float64 and rounded once.

    Parameters
    ----------
    weight : array, float32, float64, float16 or bfloat16
        Shape (C_out, C_in / groups, k, ...) with any number of spatial axes; with `transposed`, (C_in, C_out / groups, k, ...). Here and
        below a tensor in CPU memory is an array too; where it requires grad, its values count, and no gradient comes back to it.
    bias : array of shape (C_out,) or None
        None means zeros.
    mean, var : array of shape (C_out,)
        The frozen statistics; var is the variance.
    gamma, beta : array of shape (C_out,) or None
        The weight and bias of the batch normalization; None means ones and zeros.
    eps : float
        Added to var.
    groups, transposed : int, bool
        Groups of the convolution (depthwise is groups == C_in), and whether it is a transposed one.

    Returns
    -------
    (weight, bias)
        New arrays of weight's dtype, in native byte order; weight keeps its shape, bias has shape (C_out,).

    Raises
    ------
    ArgumentError, ArgumentTypeError
        A shape, dtype or value that cannot be used.
    FoldError
        A result is Inf or NaN, or a weight that is not zero became zero.

    Examples
    --------
    >>> import numpy as np
    >>> weight, bias = fold_conv(np.ones((2, 1, 1, 1)), None, mean=np.array([1.0, 2.0]), var=np.array([3.0, 0.0]), eps=1.0)
    >>> weight.ravel().tolist(), bias.tolist()
    ([0.5, 1.0], [-0.5, -2.0])
    """
    weight = _check.fold_weight(weight, "weight", 3)
    groups = _check.positive_int(groups, "groups")
    if weight.shape[0] % groups:
        raise ArgumentError(expected(f"a first axis that {groups} groups divide", f"shape {weight.shape}", "weight"))
    outputs, inner = weight.shape[int(transposed)], int(np.prod(weight.shape[2:]))
    rows = weight.shape[0] // groups
    layout = WeightLayout(groups, rows, outputs, inner) if transposed else WeightLayout(1, 1, outputs, weight.shape[1] * inner)
    return _fold(weight, bias, mean, var, gamma, beta, eps, layout)


@overload
def fold_linear(
    weight: npt.NDArray[ScalarT],
    bias: npt.ArrayLike | None,
    mean: npt.ArrayLike,
    var: npt.ArrayLike,
    gamma: npt.ArrayLike | None = None,
    beta: npt.ArrayLike | None = None,
    *,
    eps: SupportsFloat = 1e-5,
    transposed: bool = False,
) -> tuple[npt.NDArray[ScalarT], npt.NDArray[ScalarT]]: ...
@overload
def fold_linear(
    weight: npt.ArrayLike,
    bias: npt.ArrayLike | None,
    mean: npt.ArrayLike,
    var: npt.ArrayLike,
    gamma: npt.ArrayLike | None = None,
    beta: npt.ArrayLike | None = None,
    *,
    eps: SupportsFloat = 1e-5,
    transposed: bool = False,
) -> tuple[Array, Array]: ...
def fold_linear(
    weight: npt.ArrayLike,
    bias: npt.ArrayLike | None,
    mean: npt.ArrayLike,
    var: npt.ArrayLike,
    gamma: npt.ArrayLike | None = None,
    beta: npt.ArrayLike | None = None,
    *,
    eps: SupportsFloat = 1e-5,
    transposed: bool = False,
) -> tuple[Array, Array]:
    """Fold an inference batch normalization into the linear layer before it.

    The formula and the parameters are those of `fold_conv`; the layer is ``x @ weight.T + bias``.

    Parameters
    ----------
    weight : array, float32, float64, float16 or bfloat16
        Shape (out_features, in_features), as PyTorch and a Gemm with transB hold it; with `transposed`, (in_features, out_features), as
        Keras and MatMul hold it.
    bias, mean, var, gamma, beta : array of shape (out_features,) or None as in `fold_conv`
    eps : float
        Added to var.
    transposed : bool
        The weight is stored as (in_features, out_features).

    Returns
    -------
    (weight, bias)
        New arrays of weight's dtype, in native byte order.

    Raises
    ------
    ArgumentError, ArgumentTypeError, FoldError
        As `fold_conv`.

    Examples
    --------
    >>> import numpy as np
    >>> weight, bias = fold_linear(np.ones((1, 2)), np.array([3.0]), mean=np.array([1.0]), var=np.array([4.0]), eps=0.0)
    >>> weight.tolist(), bias.tolist()
    ([[0.5, 0.5]], [1.0])
    """
    weight = _check.fold_weight(weight, "weight", 2)
    if weight.ndim != 2:
        raise ArgumentError(expected("2 axes", f"shape {weight.shape}", "weight"))
    layout = WeightLayout(1, weight.shape[0], weight.shape[1], 1) if transposed else WeightLayout(1, 1, *weight.shape)
    return _fold(weight, bias, mean, var, gamma, beta, eps, layout)


def _fold(
    weight: Array,
    bias: npt.ArrayLike | None,
    mean: npt.ArrayLike | None,
    var: npt.ArrayLike,
    gamma: npt.ArrayLike | None,
    beta: npt.ArrayLike | None,
    eps: SupportsFloat,
    layout: WeightLayout,
) -> tuple[Array, Array]:
    channels = layout.groups * layout.channels
    eps = _check.eps_of(eps)
    bias = _check.vector(bias, "bias", channels)
    gamma = _check.vector(gamma, "gamma", channels)
    beta = _check.vector(beta, "beta", channels)
    mean = _check.vector(mean, "mean", channels)
    if mean is None:
        raise ArgumentTypeError(expected("an array", "None", "mean"))
    var = _check.variance(var, "var", channels, eps)
    scale, shift = batch_norm_affine(gamma, beta, mean, var, eps)
    new_weight, nonfinite, flushed = scale_weight(weight, scale, layout)
    if nonfinite:
        raise FoldError(expected(f"finite folded weights in {weight.dtype}", f"{nonfinite} that are Inf or NaN", "weight"))
    if flushed:
        raise FoldError(expected(f"folded weights that {weight.dtype} can hold", f"{flushed} flushed to zero", "weight"))
    with np.errstate(over="ignore", invalid="ignore"):
        new_bias = narrow(shift if bias is None else bias.astype(np.float64) * scale + shift, weight.dtype)
    if not np.isfinite(new_bias).all():
        raise FoldError(expected(f"a finite folded bias in {weight.dtype}", f"{new_bias[~np.isfinite(new_bias)][0]}", "bias"))
    return new_weight, new_bias
