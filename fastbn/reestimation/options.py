"""What a re-estimation is asked for; what cannot be done is an error before any work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from fastbn.errors import ArgumentError, ArgumentTypeError, expected
from fastbn.graph.options import Globs, checked_globs
from fastbn.graph.ranges import number_between, size_in_bytes, whole_number

__all__ = ["BATCH", "MEMORY", "MODES", "Mode", "Options"]

Mode: TypeAlias = Literal["population", "one-pass"]
MODES: tuple[Mode, ...] = ("population", "one-pass")

# Samples of a partition, and bytes of activations that a worker keeps.
BATCH, MEMORY = 32, 1 << 30

# Threads of one operator at most.
MOST_THREADS = 1024


@dataclass(frozen=True)
class Options:
    """What `reestimate` is asked for, beside the model, the data and the cluster.

    Attributes
    ----------
    mode : "population" or "one-pass"
        "population": the statistics of a batch normalization are those of what flows into it over all the data, with all batch
        normalizations before it already replaced. "one-pass": each batch is normalized by its own statistics, as in training, and the
        moments of all batches are merged; one pass over the data.
    batch : int
        Samples of a partition, which are run together where the model leaves the batch open.
    samples : int, optional
        Samples to take; of more, evenly spaced ones.
    only, skip : str or sequence of str, optional
        Globs over node names: replace only these; never those.
    momentum : float, optional
        The weight of the new statistics: new = (1 - momentum) * old + momentum * estimated. None replaces the old ones.
    unbiased : bool
        Divide by n - 1 instead of n for the variance.
    memory : int or str
        Bytes of activations that each worker keeps between levels; what does not fit is computed again.
    threads : int
        Threads of one operator in onnxruntime; another number may round differently.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        A value is out of range, or of another type.
    """

    mode: Mode = "population"
    batch: int = BATCH
    samples: int | None = None
    only: Globs | None = None
    skip: Globs | None = None
    momentum: float | None = None
    unbiased: bool = False
    memory: int | str = MEMORY
    threads: int = 1

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ArgumentError(expected(" or ".join(MODES), repr(self.mode), "mode"))
        self._set("batch", whole_number(self.batch, "batch", 1))
        self._set("threads", whole_number(self.threads, "threads", 1, MOST_THREADS))
        self._set("memory", size_in_bytes(self.memory, "memory"))
        self._set("only", checked_globs(self.only, "only"))
        self._set("skip", checked_globs(self.skip, "skip"))
        if self.samples is not None:
            self._set("samples", whole_number(self.samples, "samples", 1))
        if not isinstance(self.unbiased, bool):
            raise ArgumentTypeError(expected("True or False", type(self.unbiased).__name__, "unbiased"))
        if self.momentum is not None:
            momentum = number_between(self.momentum, "momentum", 0, 1, "a part, more than 0 and at most 1")
            if not momentum:
                raise ArgumentError(expected("a part, more than 0 and at most 1", "0", "momentum"))
            self._set("momentum", momentum)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)
