"""The readable truth: NumPy twins of the array functions in float64, with the same signatures, and the oracle of their tests."""

import numpy as np

from fastbn.affine import batch_norm_affine, narrow

__all__ = ["fold_conv", "fold_linear"]


def _fold(weight, bias, mean, var, gamma, beta, eps, channel_axis_scale):
    scale, shift = batch_norm_affine(gamma, beta, mean, var, eps)
    with np.errstate(over="ignore", invalid="ignore"):
        new_weight = narrow(weight.astype(np.float64) * channel_axis_scale(scale), weight.dtype)
        new_bias = narrow(shift if bias is None else bias.astype(np.float64) * scale + shift, weight.dtype)
    return new_weight, new_bias


def fold_conv(weight, bias, mean, var, gamma=None, beta=None, *, eps=1e-5, groups=1, transposed=False):
    """Twin of `fastbn.fold_conv`, without its checks."""

    def along_output_channels(scale):
        if not transposed:
            return scale.reshape(-1, *[1] * (weight.ndim - 1))
        # (C_in, C_out / groups, ...): input channel i belongs to group i // (C_in / groups), which owns that group's outputs.
        per_group = scale.reshape(groups, -1).repeat(weight.shape[0] // groups, axis=0)
        return per_group.reshape(*weight.shape[:2], *[1] * (weight.ndim - 2))

    return _fold(weight, bias, mean, var, gamma, beta, eps, along_output_channels)


def fold_linear(weight, bias, mean, var, gamma=None, beta=None, *, eps=1e-5, transposed=False):
    """Twin of `fastbn.fold_linear`, without its checks."""
    return _fold(weight, bias, mean, var, gamma, beta, eps, lambda scale: scale if transposed else scale[:, None])
