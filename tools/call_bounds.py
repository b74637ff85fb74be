"""What `fastbn.reference` lets a result of the kernels be: an interval for each element, from the bounds that docs/numerics.md derives.

Letters are those of docs/numerics.md. The channels are moved to the last axis. Each bound adds up the roundings of the kernels and those of
the reference; what has overflowed on the way, in the type that is computed in, may be anything.
"""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from random_calls import Arguments, Call

from fastbn import BatchStats, reference
from fastbn.affine import narrow
from fastbn.dtypes import UNIT

__all__ = ["complaints"]

V = 2.0**-53
CORNERS = {None: (), "relu": (0,), "leaky_relu": (0,), "relu6": (0, 6)}


@dataclass
class Interval:
    """A result may be from `low` to `high`, both rounded to its type; anything where `free`."""

    name: str
    low: np.ndarray
    high: np.ndarray
    free: np.ndarray

    def wrong(self, got: np.ndarray) -> int:
        """Return how many elements lie outside."""
        low, high = narrow(self.low, got.dtype).astype(float), narrow(self.high, got.dtype).astype(float)
        value = got.astype(float)
        inside = ((low <= value) & (value <= high)) | (np.isnan(value) & np.isnan(low) & np.isnan(high))
        return int(np.size(value) - np.count_nonzero(inside | self.free))


def around(name: str, center: np.ndarray, error: np.ndarray, free: np.ndarray) -> Interval:
    """Return an interval of which the error is known."""
    exact = ~np.isfinite(center) | ~np.isfinite(error)
    error = np.where(exact, 0, error)
    return Interval(name, center - error, center + error, free | np.zeros(np.shape(center), bool))


class Bounds:
    """The intervals of one call."""

    def __init__(self, call: Call, given: Arguments) -> None:
        self.call, self.named = call, given.named
        wide = call.dtype == np.float64
        self.unit = UNIT["float64" if wide else "float32"]
        self.tiny = 2.0**-1074 if wide else 2.0**-149
        self.limit = 2.0**1019 if wide else 2.0**123
        # In float64 the reference rounds as the kernels do, and the constants per channel have roundings of the same size: four each.
        self.sides = 4 if wide else 1
        names = {"batch_norm": ("x", "mean", "var", "weight", "bias"), "batch_norm_train": ("x", "weight", "bias"), "batch_stats": ("x",)}
        given_by_name = dict(zip(names.get(call.function, ("dy", "x", "stats", "weight", "bias")), given.positional, strict=True))
        self.x = self._moved(given_by_name["x"])
        self.n = self.x.size // max(call.channels, 1)
        self.residual = None if given.named.get("residual") is None else self._moved(given.named["residual"])
        self.dy = self._moved(given_by_name["dy"]) if "dy" in given_by_name else None
        self.weight, self.bias = (self._values(given_by_name.get(name)) for name in ("weight", "bias"))
        self.mean, self.var = (self._values(given_by_name.get(name)) for name in ("mean", "var"))
        self.stats: BatchStats | None = given_by_name.get("stats")

    def _moved(self, tensor: np.ndarray) -> np.ndarray:
        return np.moveaxis(tensor.astype(np.float64), self.call.axis, -1)

    def _values(self, values: np.ndarray | None) -> np.ndarray | None:
        return None if values is None else values.astype(np.float64)

    def _over(self, values: np.ndarray) -> np.ndarray:
        """Sum over all axes but the channels."""
        total: np.ndarray = values.sum(axis=tuple(range(values.ndim - 1)))
        return total

    def _too_large(self, *values: Any) -> np.ndarray:
        return functools.reduce(np.logical_or, [~(np.abs(each) < self.limit) for each in values])

    def intervals(self) -> list[Interval]:
        """Return one for each result, in the order of `Call.results`."""
        if self.call.function == "batch_norm":
            assert self.mean is not None
            assert self.var is not None
            return [self._output(self.mean, self.var, np.zeros(()), np.zeros(()), np.zeros(self.call.channels, bool))]
        if self.call.function == "batch_norm_backward":
            return self._backward()
        mean, m2 = self._statistics()
        if self.call.function == "batch_stats":
            return [mean, m2]
        return [self._trained(mean, m2), mean, m2, *self._running(mean, m2)]

    # ---- z, and y ----

    def _z(
        self, mean: np.ndarray, var: np.ndarray, mean_error: np.ndarray, var_error: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return z, its error, and where it may be anything; `var_error` is relative. docs/numerics.md: the split mean.

        Roundings: x - center, scale, their product and its sum with shift, shift itself, and the sum with the residual.
        """
        eps = self.call.eps
        weight, bias = (default if values is None else values for values, default in ((self.weight, 1.0), (self.bias, 0.0)))
        residual = 0.0 if self.residual is None else self.residual
        z = reference.batch_norm(self.x, mean, var, self.weight, self.bias, eps=eps, axis=-1, residual=self.residual)
        scale_of_one = np.where(var + eps == 0, 0, 1 / np.sqrt(var + eps))
        scale = np.abs(weight * scale_of_one)
        d, low = np.abs(self.x - mean), self.unit * np.abs(mean) * scale
        size = 5 * (d * scale + low) + 3 * (np.abs(bias) + low) + np.abs(residual)
        error = 1.01 * self.sides * self.unit * size + self.tiny * (d + 4) + scale * mean_error + d * scale * var_error
        too_large = self._too_large(mean, var, scale, low, d, d * scale, d * scale_of_one, bias) & np.isfinite(self.x)
        # The product of an infinite x and a scale that is no normal number.
        vague = ~np.isfinite(self.x) & (self._too_large(mean, var, scale, low, bias) | (scale < 2.0**-120))
        return z, error, too_large | vague

    def _output(self, mean: np.ndarray, var: np.ndarray, mean_error: np.ndarray, var_error: np.ndarray, free: np.ndarray) -> Interval:
        z, error, vague = self._z(mean, var, mean_error, var_error)
        interval = around("y", z, error, vague | free)
        interval.low, interval.high = self._activated(interval.low, -1), self._activated(interval.high, 1)
        return interval

    def _activated(self, z: np.ndarray, side: int) -> np.ndarray:
        """Return an end of the interval behind the activation; the leak is rounded, and so is its product."""
        one = np.ones(z.shape[-1])
        y = reference.batch_norm(z, 0 * one, one, eps=0.0, axis=-1, activation=self.call.activation)
        if self.call.activation == "leaky_relu":
            error = self.sides * (2.02 * self.unit * np.abs(y) + self.tiny)
            y = np.where((z < 0) & np.isfinite(z), y + side * error, y)
        return np.asarray(y)

    # ---- statistics ----

    def _statistics(self) -> tuple[Interval, Interval]:
        """Return mean and m2. docs/numerics.md: one-pass variance; two-pass statistics."""
        stats, n, channels = reference.batch_stats(self.x, axis=-1), self.n, self.call.channels
        if n == 0:
            return tuple(around(name, np.zeros(channels), np.zeros(channels), np.zeros(channels, bool)) for name in ("mean", "m2"))  # type: ignore[return-value]
        rows = self.x.reshape(n, channels)
        constant = (rows == rows[0]).all(axis=0)
        deviation = np.sqrt(stats.m2 / n)
        size = np.abs(stats.mean)
        wide = self.call.dtype == np.float64
        mean_error = (40 + (2 * n if wide else 0)) * self.unit * deviation + 8 * V * size + 2.0**-1074
        m2_error = (240 * self.unit + (200 + 6 * n) * V * wide) * stats.m2 + n * (8 * V * size) ** 2 + n * 2.0**-1060
        # Their squares leave the range of float64.
        free = ~np.isfinite(rows).all(axis=0) | (np.abs(rows).max(axis=0) > 1e150)
        mean, m2 = np.where(constant, rows[0], stats.mean), np.where(constant, 0, stats.m2)
        return around("mean", mean, np.where(constant, 0, mean_error), free), around("m2", m2, np.where(constant, 0, m2_error), free)

    def _trained(self, mean: Interval, m2: Interval) -> Interval:
        n = max(self.n, 1)
        center, spread = (mean.low + mean.high) / 2, np.maximum((m2.low + m2.high) / 2, 0)
        total = spread + n * self.call.eps
        relative = np.where(total > 0, (m2.high - spread) / np.where(total > 0, total, 1), np.where(m2.high > 0, 1, 0))
        # A variance of rounding errors alone.
        return self._output(center, spread / n, mean.high - center, relative, mean.free | (relative > 0.1))

    def _running(self, mean: Interval, m2: Interval) -> list[Interval]:
        """running = (1 - momentum)*running + momentum*batch"""
        found, n, momentum = [], self.n, self.call.momentum
        for name, batch, count in (("running_mean", mean, 1), ("running_var", m2, max(n - 1 if self.call.unbiased else n, 1))):
            if self.named.get(name) is None:
                continue
            before = self._values(self.named[name])
            assert before is not None
            if n == 0:
                found.append(around(name, before, 0 * before, ~np.isfinite(before)))
                continue
            low, high = ((1 - momentum) * before + momentum * end / count for end in (batch.low, batch.high))
            error = 8 * V * (np.abs(before) + np.abs(batch.high) / count)
            found.append(Interval(name, low - error, high + error, batch.free | ~np.isfinite(before)))
        return found

    # ---- gradients ----

    def _backward(self) -> list[Interval]:
        """Return dx, dweight, dbias and dresidual. docs/numerics.md: backward; sums in blocks.

        The reference adds the n terms of a sum one after the other in float64.
        """
        call, stats, dy, n = self.call, self.stats, self.dy, max(self.n, 1)
        assert stats is not None
        assert dy is not None
        mean, var, zeros = stats.mean, stats.var, np.zeros(self.x.shape)
        options: dict[str, Any] = {"eps": call.eps, "axis": -1, "training": call.training, "activation": call.activation}
        residual = zeros if self.residual is None else self.residual
        dx, dweight, dbias, g = reference.batch_norm_backward(dy, self.x, stats, self.weight, self.bias, residual=residual, **options)
        z, z_error, vague = self._z(mean, var, np.zeros(()), np.full((), 8 * V))
        corners = [np.abs(z - corner) <= z_error for corner in CORNERS[call.activation]]
        unsure = np.where(np.logical_or.reduce(corners), np.abs(dy), 0) if corners else zeros  # the terms of which either may be right
        invstd = np.where(var + call.eps == 0, 0, 1 / np.sqrt(var + call.eps))
        scale = np.abs(invstd if self.weight is None else self.weight * invstd)
        roundings = 1.01 * self.sides * self.unit
        d, size = np.abs(self.x - mean) + self.unit * np.abs(mean), np.abs(g)
        sum_error = 1.01 * (18 * self.sides * self.unit + n * V) * self._over(size) + self._over(unsure) + self.n * self.tiny
        dot_error = (22 * self.sides * self.unit + n * V) * self._over(size * d) + self._over(unsure * d) + self.n * self.tiny
        dot_error += self.unit * np.abs(mean) * sum_error
        sum_dy, dot = np.abs(self._over(g)), np.abs(self._over(g * (self.x - mean)))
        slope, offset = scale * invstd**2 * dot / n, scale * sum_dy / n
        offset = offset + slope * self.unit * np.abs(mean)
        error = 4 * roundings * scale * size + scale * unsure + self.tiny * (size + 4)
        if call.training:
            error = error + roundings * (6 * slope * d + 4 * offset) + self.tiny * d
            error = error + scale * (sum_error + d * invstd**2 * dot_error) / n
        most_slope = slope + scale * invstd**2 * dot_error / n
        bad = self._bad_channels(vague, mean, var, scale, invstd, most_slope, offset, scale * size, size * d, d, dy)
        found = [around("dx", dx, error, bad)]
        if dweight is not None:
            found.append(around("dweight", dweight, invstd * dot_error + 16 * V * np.abs(dweight) + self.tiny, bad))
        if dbias is not None:
            found.append(around("dbias", dbias, sum_error, bad))
        if self.residual is not None:
            found.append(around("dresidual", g, (2 * roundings * size + unsure + self.tiny) if call.activation else zeros, bad))
        return found

    def _bad_channels(self, vague: np.ndarray, *values: np.ndarray) -> np.ndarray:
        """Say which channels have a value, or a product on the way, that is not finite or too large."""
        residual = 0.0 if self.residual is None else self.residual
        wrong = self._too_large(*values, self.x, residual, *(each for each in (self.weight, self.bias) if each is not None)) | vague
        return np.asarray(np.broadcast_to(wrong, self.x.shape).any(axis=tuple(range(self.x.ndim - 1))))


def complaints(call: Call, before: Arguments, results: list[np.ndarray]) -> list[str]:
    """Return what is wrong with the results of a call, which was given what `before` still holds."""
    with np.errstate(all="ignore"):
        intervals = Bounds(call, before).intervals()
    if len(intervals) != len(results):
        return [f"{len(results)} results, not {len(intervals)}"]
    found = []
    for interval, result in zip(intervals, results, strict=True):
        moved = np.moveaxis(result, call.axis, -1) if result.shape == call.shape and interval.low.ndim == len(call.shape) else result
        with np.errstate(all="ignore"):
            wrong = interval.wrong(moved)
        if wrong:
            found.append(f"{interval.name}: {wrong} of {moved.size} elements")
    return found
