"""Synthetic inputs where there are no data: noise without neighbors, noise as smooth as photographs, and shapes that hide each other.

Photographs have a power spectrum of about 1/f^2 (Field 1987), and edges where one object hides another: the dead leaves model (Matheron
1968; Lee, Mumford and Huang 2001). Ranges of activations on all three together are wide enough for what a trained network meets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from fastbn.graph.parity.feeds import Feed

__all__ = ["KINDS", "synthetic"]

# Fills (channels, height, width) from a generator.
Maker: TypeAlias = Callable[[np.random.Generator, int, int, int], NDArray[np.float64]]

# Channels of pictures: an axis this short, at the end, is one of colors.
COLORS = 4

# Shapes in a picture, and the pixels above which they are drawn at half size.
SHAPES, LARGE = (20, 80), 1 << 14


def synthetic(like: Sequence[Feed], rng: np.random.Generator) -> list[Feed]:
    """Return feeds of the same sizes whose floats are of one of KINDS in turn, those of each kind together of mean 0 and standard deviation
    1; what is no float stays as it is."""
    feeds = [
        {name: _like(values, rng, KINDS[number % len(KINDS)]) if values.dtype.kind == "f" else values for name, values in feed.items()}
        for number, feed in enumerate(like)
    ]
    for name in [name for name, values in like[0].items() if values.dtype.kind == "f"]:
        for kind in range(len(KINDS)):
            together = [feed[name] for feed in feeds[kind :: len(KINDS)]]
            if not together:
                continue
            mean, deviation = np.mean([values.mean() for values in together]), np.sqrt(np.mean([values.var() for values in together]))
            deviation = np.hypot(deviation, np.std([values.mean() for values in together]))
            for feed in feeds[kind :: len(KINDS)]:
                feed[name] = ((feed[name] - mean) / (deviation or 1)).astype(like[0][name].dtype)
    return feeds


def _like(values: NDArray[Any], rng: np.random.Generator, make: Maker) -> NDArray[Any]:
    if values.ndim < 2 or not values.size:
        return rng.standard_normal(values.shape)
    axes = _spatial_axes(values.shape)
    rest = [axis for axis in range(1, values.ndim) if axis not in axes]
    height, width = ([1] + [values.shape[axis] for axis in axes])[-2:]
    channels = math.prod(values.shape[axis] for axis in rest)
    images = np.stack([make(rng, channels, height, width) for _ in range(values.shape[0])])
    order = (0, *rest, *axes)
    laid = images.reshape([values.shape[axis] for axis in order])
    return np.ascontiguousarray(laid.transpose(np.argsort(order)))


def _spatial_axes(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the axes along which neighbors are alike: both of a picture, one of a row or a sequence; axis 0 counts samples."""
    rank = len(shape)
    if rank == 2:
        return (1,)
    if rank == 3:
        return (1,) if shape[1] >= shape[2] else (2,)
    if shape[-1] <= COLORS < shape[1]:
        return rank - 3, rank - 2
    return rank - 2, rank - 1


def _white(rng: np.random.Generator, channels: int, height: int, width: int) -> NDArray[np.float64]:
    return rng.standard_normal((channels, height, width))


def _smooth(rng: np.random.Generator, channels: int, height: int, width: int) -> NDArray[np.float64]:
    """An amplitude of 1/f, mostly common to all channels as brightness is; contrast and brightness differ between pictures."""
    frequencies = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequencies[0, 0] = 1 / max(height, width)
    shape = 1 + channels, *frequencies.shape
    noise = rng.standard_normal(shape) + 1j * rng.standard_normal(shape)
    pictures = np.fft.irfft2((noise[:1] + 0.3 * noise[1:]) / frequencies, s=(height, width))
    pictures /= pictures.std() or 1
    return np.asarray(pictures * np.exp(0.4 * rng.standard_normal()) + 0.5 * rng.standard_normal())


def _leaves(rng: np.random.Generator, channels: int, height: int, width: int) -> NDArray[np.float64]:
    """Rectangles and ellipses whose radii follow a power law of -3, as those of objects at all distances do, each of one color."""
    if height * width > LARGE:
        half = _leaves(rng, channels, -(-height // 2), -(-width // 2))
        return half.repeat(2, axis=1).repeat(2, axis=2)[:, :height, :width]
    picture = np.repeat(rng.random(channels), height * width).reshape(channels, height, width)
    rows, columns = np.mgrid[:height, :width]
    smallest, largest = max(1.0, 0.02 * min(height, width)), 0.5 * max(height, width)
    for _ in range(rng.integers(*SHAPES)):
        radius = (smallest**-2 + rng.random() * (largest**-2 - smallest**-2)) ** -0.5
        angle, stretch = rng.random() * np.pi, np.exp(0.7 * rng.standard_normal())
        down, right = rows - rng.random() * height, columns - rng.random() * width
        along = (right * np.cos(angle) + down * np.sin(angle)) / (radius * stretch)
        across = (down * np.cos(angle) - right * np.sin(angle)) / radius * stretch
        inside = along**2 + across**2 < 1 if rng.random() < 0.5 else np.maximum(np.abs(along), np.abs(across)) < 1
        picture[:, inside] = np.clip(rng.random() + 0.3 * rng.standard_normal(channels), 0, 1)[:, None]
    return picture + 0.02 * rng.standard_normal(picture.shape)


KINDS: tuple[Maker, ...] = (_white, _smooth, _leaves)
