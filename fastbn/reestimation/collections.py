"""Collections of dask as fixed partitions: which rows each one has does not depend on how an array is chunked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from fastbn.deployment.groups import as_array
from fastbn.errors import ArgumentError, ArgumentTypeError, expected
from fastbn.reestimation.inputs import Batches
from fastbn.reestimation.partitions import Part, Rows, Whole, rows_of_arrays

if TYPE_CHECKING:
    from fastbn.reestimation.work import State

__all__ = ["Deferred", "Ready", "deferred_partitions", "is_collection", "ready"]


def is_collection(data: object) -> bool:
    """Say whether data are a collection of dask, or a dict of some."""
    return hasattr(data, "__dask_graph__") or (
        isinstance(data, Mapping) and bool(data) and all(hasattr(each, "__dask_graph__") for each in data.values())
    )


@dataclass(frozen=True)
class Ready:
    """A partition whose items have been computed.

    Attributes
    ----------
    label : str
        Which samples these are.
    whole : bool
        Whether each item is one input as it is.
    batch : int
        Rows of a feed where the model leaves the batch open.
    items : list of dict of name -> array
    """

    label: str
    whole: bool
    batch: int
    items: Sequence[Mapping[str, ArrayLike]]

    def read(self, inputs: Batches) -> State:
        """Return its feeds, as `partitions.Part.read` does."""
        pieces: list[Rows | Whole] = []
        for number, item in enumerate(self.items):
            if not isinstance(item, Mapping):
                raise ArgumentTypeError(expected("dicts of arrays", type(item).__name__, f"item {number} of {self.label}"))
            arrays = {name: as_array(array) for name, array in item.items()}
            pieces += [Whole(f"{self.label}[{number}]", arrays)] if self.whole else rows_of_arrays(self.label, arrays, inputs)
        return Part(tuple(pieces), self.batch).read(inputs)


@dataclass(frozen=True)
class Deferred:
    """A partition whose items dask computes.

    Attributes
    ----------
    label, whole, batch
        As in `Ready`.
    delayed : dask.delayed.Delayed
        What gives the items.
    """

    label: str
    whole: bool
    batch: int
    delayed: Any  # dask has no types that hold without it

    def read(self, inputs: Batches) -> State:
        """Compute the items in this process and return the feeds."""
        return ready(self.label, self.whole, self.batch, self.delayed.compute(scheduler="synchronous")).read(inputs)


def ready(label: str, whole: bool, batch: int, items: Sequence[Mapping[str, ArrayLike]]) -> Ready:
    """Return the partition of some items."""
    return Ready(label, whole, batch, items)


def deferred_partitions(data: Any, inputs: Batches, batch: int, most: int | None) -> list[Deferred]:
    """Return the partitions of a dask.array, a dict of dask.arrays or a dask.bag of dicts.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        It is another collection, of unknown size, without samples, or does not fit the inputs.
    """
    batch = inputs.batch_of(batch)
    arrays = data if isinstance(data, Mapping) else {inputs.only("data"): data} if hasattr(data, "rechunk") else None
    if arrays is not None:
        return _of_arrays(arrays, inputs, batch, most)
    to_delayed = getattr(data, "to_delayed", None)
    if to_delayed is None or not hasattr(data, "npartitions") or hasattr(data, "columns"):
        raise ArgumentTypeError(expected("a dask.array, a dict of them, or a dask.bag of dicts", type(data).__name__, "data"))
    if most is not None:
        raise ArgumentError("Cannot take some samples of a dask.bag: how many it has is not known; bag.take or bag.random_sample may help")
    return [Deferred(f"partition {number} of the bag", True, batch, part) for number, part in enumerate(to_delayed())]


def _of_arrays(arrays: Mapping[str, Any], inputs: Batches, batch: int, most: int | None) -> list[Deferred]:
    import dask

    for name, array in arrays.items():
        if not hasattr(array, "rechunk"):
            raise ArgumentTypeError(expected("dask.arrays", type(array).__name__, f"data[{name!r}]"))
        if any(size != size for size in array.shape):  # NaN: not known
            raise ArgumentError(expected("chunks of known sizes (array.compute_chunk_sizes())", "unknown ones", f"data[{name!r}]"))
    count, shared = inputs.counted("data", {name: array.shape for name, array in arrays.items()})
    if not count:
        raise ArgumentError(expected("at least one sample", "none", "data"))
    chosen = np.arange(count)
    if most is not None and most < count:
        chosen = np.unique(np.linspace(0, count - 1, most).astype(int))
        arrays = {name: array if name in shared else array[chosen] for name, array in arrays.items()}
    blocks = {name: _blocks(array, len(array) if name in shared else batch) for name, array in arrays.items()}
    parts = []
    for number, first in enumerate(range(0, len(chosen), batch)):
        own = [each[0 if name in shared else number] for name, each in blocks.items()]
        label = f"samples {chosen[first]} to {chosen[min(first + batch, len(chosen)) - 1]} of data"
        parts.append(Deferred(label, False, batch, dask.delayed(_named)(list(blocks), *own)))
    return parts


def _blocks(array: Any, rows: int) -> list[Any]:
    if not array.shape:
        return [array.to_delayed().item()]
    return list(array.rechunk((rows, *array.shape[1:])).to_delayed().reshape(-1))


def _named(names: list[str], *arrays: ArrayLike) -> list[dict[str, ArrayLike]]:
    """Return the one item that arrays are."""
    return [dict(zip(names, arrays, strict=True))]
