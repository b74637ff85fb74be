"""What the operators with a weight share: a scale goes into the weight, and a shift of the input becomes a sum over it."""

import numpy as np

from fastbn.affine import WeightLayout
from fastbn.graph.model.constant import Constant, Dense, Scaled, Tensor, broadcast_scale
from fastbn.graph.model.quantized import Dequantized, Requantized
from fastbn.graph.ops.affine import Affine, FloatArray

__all__ = ["scaled", "summed"]


def scaled(weight: Constant, layout: WeightLayout, scale: FloatArray) -> Constant | Requantized:
    """Return a weight times a scale for each (group, channel) of its layout."""
    if isinstance(weight, Dequantized):
        return weight.times(layout, scale)
    if isinstance(weight, Dense):
        return weight.times(broadcast_scale(layout, scale, weight.shape))
    if isinstance(weight, Scaled):
        return weight.times(layout, scale)
    assert isinstance(weight, Tensor), "a constant of the model"
    return Scaled(weight, layout, np.array(scale))


def summed(weight: Constant, layout: WeightLayout, affine: Affine) -> tuple[FloatArray, FloatArray]:
    """Return (sum, sum of absolute values) of weight * shift over the channels of a layout: what a shift of the input adds, per row."""
    values = Dense.of(weight).values.reshape(layout)
    channels = layout.groups * layout.channels
    shift, abs_terms = (
        np.broadcast_to(part, (channels,)).reshape(layout.groups, 1, layout.channels, 1) for part in (affine.shift, affine.abs_terms)
    )
    return (values * shift).sum(axis=(2, 3)).reshape(-1), (np.abs(values) * abs_terms).sum(axis=(2, 3)).reshape(-1)
