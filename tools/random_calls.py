"""Calls of the array functions, drawn from a seed: shapes, strides, types, memory and values of every kind, some of them refused.

tests/test_random_calls.py and fuzz_kernels.py compare them with `fastbn.reference`, stress_kernels.py with themselves under load.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from numpy.lib.stride_tricks import as_strided

import fastbn

if TYPE_CHECKING:
    from fastbn._types import Activation

__all__ = ["Call"]

DTYPES = [np.dtype(name) for name in (np.float32, np.float32, np.float64, np.float16, ml_dtypes.bfloat16)]
FUNCTIONS = ["batch_norm", "batch_norm_train", "batch_norm_backward"] * 2 + ["batch_stats"]
ACTIVATIONS: list[Activation | None] = [None, None, "relu", "leaky_relu", "relu6"]
EPS = [0.0, 1e-5, 1e-5, 1e-5, 1e-3, 1.0, 1e10, 1e300]
# Ends of vectors, of joined rows and of tiles, and the sizes that have none.
SIZES = [0, 1, 1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 33, 48, 63, 65, 130]
FEW, MANY = 6_000, 200_000

# How an array lies in memory, where it may be written to, and where it may not.
WRITABLE = ["contiguous", "contiguous", "permuted", "framed", "stepped", "reversed", "shifted"]
READABLE = [*WRITABLE, "repeated", "unaligned", "swapped", "read-only"]

# What is wrong with an out that is refused, beside those of READABLE.
BAD_OUTS = ["repeated", "unaligned", "swapped", "read-only", "overlap", "other type", "other shape"]

FAR_OFF = [np.nan, np.inf, -np.inf, 0.0, -0.0, 3e38, -6e4, 1e-45, 1e308]
VALUES = ["normal"] * 6 + ["far", "constant", "tiny", "huge", "integers", "zeros", "special", "special"]


@dataclass
class Arguments:
    """What a call is given, and what surrounds the arrays that it writes to."""

    positional: list[Any]
    named: dict[str, Any]
    frames: list[tuple[np.ndarray, np.ndarray, np.ndarray]]  # (the memory, which of its bytes may change, what it was)


class Call:
    """One call: the same for the same seed, however often it is made.

    `refused` says what is wrong with it, where something is; `large` draws tensors that several threads share.
    """

    def __init__(self, seed: int, *, large: bool = False, valid: bool = False) -> None:
        rng = np.random.default_rng(seed)
        self.seed = seed
        self.function = str(rng.choice(FUNCTIONS))
        self.dtype = DTYPES[rng.integers(len(DTYPES))]
        self.shape = _shape(rng, MANY if large else FEW, large)
        self.axis = int(rng.integers(-len(self.shape), len(self.shape)))
        self.channels = self.shape[self.axis]
        self.activation = ACTIVATIONS[rng.integers(len(ACTIVATIONS))]
        self.eps = EPS[rng.integers(len(EPS))]
        self.has_residual = bool(rng.random() < 0.3)
        self.training = bool(rng.random() < 0.7)
        self.unbiased = bool(rng.random() < 0.5)
        self.momentum = float(rng.choice([0.0, 0.1, 1.0, rng.random()]))
        self.out = str(rng.choice(["none", "none", "new", "new", "x", "residual" if self.has_residual else "x", "dy", "beside"]))
        if self.out == "dy" and self.function != "batch_norm_backward":
            self.out = "new"
        self.refused = None if valid or self.function == "batch_stats" or rng.random() > 0.08 else str(rng.choice(BAD_OUTS))
        if not self._can_be_refused():
            self.refused = "read-only"
        self._state = int(rng.integers(2**62))

    def __repr__(self) -> str:
        of = f"{self.dtype.name}{list(self.shape)} axis={self.axis} activation={self.activation} eps={self.eps:g} out={self.out}"
        return f"Call({self.seed}): {self.function} of {of}" + (f", refused: {self.refused}" if self.refused else "")

    def _can_be_refused(self) -> bool:
        """Say whether an out of this shape and type can be wrong in the way that was drawn."""
        if self.refused in ("repeated", "overlap"):
            return 0 not in self.shape and max(self.shape) > 1
        return 0 not in self.shape if self.refused == "unaligned" else self.refused != "swapped" or self.dtype.kind != "V"

    def arguments(self) -> Arguments:
        """Return the arrays and options, new ones each time."""
        maker = _Maker(np.random.default_rng(self._state), self)
        if self.refused == "overlap" or (self.refused is None and self.out == "beside"):
            x = maker.tensor_with_out()
        else:
            x = maker.tensor(is_in_place=self.out == "x")
        residual = maker.tensor(is_in_place=self.out == "residual") if self.has_residual else None
        weight, bias = maker.parameter("scale"), maker.parameter("shift")
        named: dict[str, Any] = {"axis": self.axis}
        if self.function == "batch_stats":
            return Arguments([x], named, maker.frames)
        named |= {"eps": self.eps, "activation": self.activation, "residual": residual}
        inputs: dict[str, np.ndarray | None] = {"x": x, "residual": residual}
        if self.function == "batch_norm":
            positional: list[Any] = [x, maker.parameter("mean"), maker.parameter("var"), weight, bias]
        elif self.function == "batch_norm_train":
            positional = [x, weight, bias]
            named |= {"momentum": self.momentum, "unbiased": self.unbiased}
            named |= {name: maker.running(kind) for name, kind in (("running_mean", "shift"), ("running_var", "var"))}
        else:
            inputs["dy"] = maker.tensor(is_in_place=self.out == "dy")
            positional = [inputs["dy"], x, maker.statistics(x), weight, bias]
            named["training"] = self.training
        named["out"] = maker.out(inputs)
        return Arguments(positional, named, maker.frames)

    def results(self, arguments: Arguments | None = None) -> list[np.ndarray]:
        """Make the call and return everything that it gives, running statistics included."""
        given = arguments or self.arguments()
        with np.errstate(all="ignore"):
            result = getattr(fastbn, self.function)(*given.positional, **given.named)
        found = []
        for each in result if isinstance(result, tuple) else (result,):
            found += [each.mean, each.m2] if isinstance(each, fastbn.BatchStats) else [] if each is None else [each]
        return found + [given.named[name] for name in ("running_mean", "running_var") if given.named.get(name) is not None]

    def bits(self, results: list[np.ndarray] | None = None) -> bytes:
        """Return the bits of all results, every NaN as the same one."""
        return b"".join(_one_nan(array).tobytes() for array in results or self.results())


def _one_nan(array: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(array), np.array(np.nan, array.dtype), array)


def _shape(rng: np.random.Generator, most: int, large: bool) -> tuple[int, ...]:
    """Return the sizes of 1 to 6 axes, with no more than `most` elements, and with many where `large`."""
    while True:
        shape = tuple(int(size) for size in rng.choice(SIZES, rng.integers(1, 7)))
        count = int(np.prod(shape))
        if count <= most and not large:
            return shape
        if large and 0 < count <= most and len(shape) < 6:
            return (*shape, most // count) if rng.random() < 0.7 else (most // count, *shape)


class _Maker:
    """Draws the arrays of one call."""

    def __init__(self, rng: np.random.Generator, call: Call) -> None:
        self.rng, self.call = rng, call
        self.frames: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def tensor(self, *, is_in_place: bool) -> np.ndarray:
        """Return an input, which can be written to where it is the output too."""
        call = self.call
        place = str(self.rng.choice(WRITABLE if is_in_place else READABLE))
        array = self._laid_out(place, call.shape, call.dtype, self._values(call.shape))
        if is_in_place:
            self._watch(array)
        return array

    def _values(self, shape: tuple[int, ...]) -> np.ndarray:
        rng, kind = self.rng, str(self.rng.choice(VALUES))
        values = rng.standard_normal(shape)
        if kind == "far":
            return values + 10.0 ** rng.integers(1, 7)
        if kind == "constant":
            return np.full(shape, rng.normal() * 10)
        if kind in ("tiny", "huge"):
            return values * (1e-30 if kind == "tiny" else 1e30)
        if kind == "integers":
            return np.rint(2 * values)
        if kind == "zeros":
            return values * 0
        if kind == "special":
            return np.where(rng.random(shape) < 0.02, rng.choice(FAR_OFF, shape), values)
        return values + rng.normal()

    def parameter(self, kind: str) -> np.ndarray | None:
        """Return values per channel, some of them without a stride of their own; None where the default may hold."""
        if kind in ("scale", "shift") and self.rng.random() < 0.25:
            return None
        dtype = np.dtype(str(self.rng.choice(["float32", "float64"])))
        return self._laid_out(str(self.rng.choice(READABLE)), (self.call.channels,), dtype, self._per_channel(kind))

    def _per_channel(self, kind: str) -> np.ndarray:
        rng, size = self.rng, self.call.channels
        values = rng.standard_normal(size)
        if kind == "var":
            return values**2 + 0.01
        if kind == "scale" and rng.random() < 0.2:
            return values * (rng.random(size) < 0.5)
        if rng.random() < 0.05:
            return np.where(rng.random(size) < 0.3, rng.choice([np.nan, np.inf, 1e30, 1e-40], size), values)
        return values

    def running(self, kind: str) -> np.ndarray | None:
        """Return running statistics, which are written to."""
        if self.rng.random() < 0.5:
            return None
        dtype = np.dtype(str(self.rng.choice(["float32", "float64"])))
        array = self._laid_out(str(self.rng.choice(WRITABLE)), (self.call.channels,), dtype, self._per_channel(kind))
        self._watch(array)
        return array

    def statistics(self, x: np.ndarray) -> fastbn.BatchStats:
        """Return what the forward pass would have found, or frozen statistics."""
        if self.call.training:
            return fastbn.batch_stats(x, axis=self.call.axis)
        return fastbn.BatchStats(1, self.rng.standard_normal(self.call.channels), self.rng.random(self.call.channels) + 0.01)

    def out(self, inputs: dict[str, np.ndarray | None]) -> np.ndarray | None:
        """Return where the result is to go."""
        call = self.call
        if call.refused is not None:
            return self._refused_out(call.refused)
        if call.out in inputs:
            return inputs[call.out]
        if call.out == "none":
            return None
        if call.out == "beside":
            return self._out
        array = self._laid_out(str(self.rng.choice(WRITABLE)), call.shape, call.dtype, np.full(call.shape, 7.0))
        self._watch(array)
        return array

    def _refused_out(self, reason: str) -> np.ndarray:
        shape, dtype = self.call.shape, self.call.dtype
        if reason == "other type":
            return np.zeros(shape, np.float32 if dtype != np.float32 else np.float64)
        if reason == "other shape":
            return np.zeros((*shape, 2), dtype)
        if reason == "overlap":
            return self._out
        return self._laid_out(reason, shape, dtype, np.zeros(shape))

    def tensor_with_out(self) -> np.ndarray:
        """Return an x in whose memory the out lies: between its elements, or an element behind it, which is refused."""
        shape, count = self.call.shape, int(np.prod(self.call.shape))
        if self.call.refused is None:
            memory = np.zeros((*shape, 2), self.call.dtype)
            x, self._out = memory[..., 0], memory[..., 1]
        else:
            memory = np.zeros(count + 1, self.call.dtype)
            x, self._out = memory[:-1].reshape(shape), memory[1:].reshape(shape)
        with np.errstate(all="ignore"):
            x[...] = self._values(shape).astype(self.call.dtype)
        if self.call.refused is None:
            self._watch(self._out)
        return x

    def _watch(self, array: np.ndarray) -> None:
        """Remember the memory around an array that is written to."""
        memory = array
        while isinstance(memory.base, np.ndarray):
            memory = memory.base
        whole = memory.reshape(-1, order="A").view(np.uint8)
        inside = np.zeros_like(whole)
        twin = as_strided(inside[array.ctypes.data - whole.ctypes.data :].view(), (*array.shape, array.itemsize), (*array.strides, 1))
        if array.size:
            twin[...] = 1
        self.frames.append((whole, inside == 0, whole.copy()))

    def _laid_out(self, place: str, shape: tuple[int, ...], dtype: np.dtype, values: np.ndarray) -> np.ndarray:
        """Return an array of these values that lies in memory in a certain way."""
        with np.errstate(all="ignore"):
            values = values.astype(dtype)
        rng, axes = self.rng, len(shape)
        if place == "swapped" and dtype.kind != "V":
            return values.astype(dtype.newbyteorder())
        if place == "unaligned":
            memory = np.zeros(values.nbytes + 1, np.uint8)
            array = memory[1:].view(dtype).reshape(shape)
        elif place == "permuted":
            order = rng.permutation(axes)
            array = np.zeros([shape[i] for i in order], dtype).transpose(np.argsort(order))
        elif place == "framed":
            margins = rng.integers(0, 3, (axes, 2)) * (rng.permutation(axes) < 2)[:, None]
            margins *= values.size > 0  # beside an axis of no elements a frame may be as large as all others together
            whole = np.zeros([size + a + b for size, (a, b) in zip(shape, margins, strict=True)], dtype)
            array = whole[tuple(slice(a, a + size) for size, (a, _) in zip(shape, margins, strict=True))]
        elif place == "stepped":
            steps = np.where(np.arange(axes) == rng.integers(axes), rng.integers(2, 4), 1)
            whole = np.zeros([size * step for size, step in zip(shape, steps, strict=True)], dtype)
            array = whole[tuple(slice(None, None, step) for step in steps)]
        elif place == "reversed":
            array = np.zeros(shape, dtype)[tuple(slice(None, None, int(step)) for step in rng.choice([-1, 1], axes))]
        elif place == "shifted":  # from the start of a cache line
            array = np.zeros(values.size + 16, dtype)[int(rng.integers(16)) :][: values.size].reshape(shape)
        elif place == "repeated" and values.size:
            kept = rng.random(axes) < 0.5
            kept[int(np.argmax(shape))] = False
            small = values[tuple(slice(None) if keep else slice(1) for keep in kept)]
            return as_strided(small, shape, [stride if keep else 0 for stride, keep in zip(small.strides, kept, strict=True)])
        else:
            array = np.zeros(shape, dtype)
        array[...] = values
        array.flags.writeable = place != "read-only"
        return array
