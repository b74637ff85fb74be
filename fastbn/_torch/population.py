"""Running statistics of the batch normalizations of a module, estimated again from data."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from fastbn import sync
from fastbn._torch import kernels
from fastbn._torch.distributed import exchange_of
from fastbn.errors import ArgumentError, ArgumentTypeError, expected
from fastbn.stats import BatchStats, merge_stats

if TYPE_CHECKING:
    from fastbn._types import Exchange

__all__ = ["MODES", "Mode", "update"]

Mode: TypeAlias = Literal["population", "one-pass"]
MODES: tuple[Mode, ...] = ("population", "one-pass")

# Elements that are widened to float64 at a time: they stay in a level-2 cache.
BLOCK = 1 << 18

# What normalizes by running statistics; the class that torch's modules and ours derive from.
_Norm: TypeAlias = Any  # torch.nn.modules.batchnorm._BatchNorm, which a checker without torch does not know


class _Reached(BaseException):
    """The batch normalization whose input was asked for has been called; no module catches this."""


def update(model: torch.nn.Module, loader: Iterable[Any], mode: Mode, process_group: Any, device: Any) -> None:
    """Do as `fastbn.torch.update_bn` says."""
    if mode not in MODES:
        raise ArgumentError(expected(" or ".join(MODES), repr(mode), "mode"))
    if not isinstance(model, torch.nn.Module):
        raise ArgumentTypeError(expected("a torch.nn.Module", type(model).__name__, "model"))
    if not isinstance(loader, Iterable) and not hasattr(loader, "__getitem__"):
        raise ArgumentTypeError(expected("an iterable of batches", type(loader).__name__, "loader"))
    if mode == "population" and iter(loader) is loader:
        raise ArgumentTypeError(expected("a loader that can be gone through again, or mode='one-pass'", type(loader).__name__, "loader"))
    model = _unwrapped(model)
    norms = [part for part in model.modules() if isinstance(part, torch.nn.modules.batchnorm._BatchNorm) and part.running_mean is not None]
    if not norms:
        return
    exchange = None if process_group is None else exchange_of(process_group)
    job = _Job(model, loader, norms, exchange, device)
    with torch.no_grad(), _restored(model, norms):
        job.in_one_pass() if mode == "one-pass" else job.one_by_one()


def _unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """Return the module inside a compiled one, whose hooks would not be called, or inside one of DistributedDataParallel."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, torch.nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


@contextlib.contextmanager
def _restored(model: torch.nn.Module, norms: Sequence[_Norm]) -> Iterator[None]:
    """Give every module its training flag back; after an error also the statistics that it had."""
    flags = [(part, part.training) for part in model.modules()]
    before = [[buffer.clone() if buffer is not None else None for buffer in _buffers(norm)] for norm in norms]
    try:
        yield
    except BaseException:
        for norm, buffers in zip(norms, before, strict=True):
            for buffer, old in zip(_buffers(norm), buffers, strict=True):
                if buffer is not None and old is not None:
                    buffer.copy_(old)
        raise
    finally:
        for part, training in flags:
            part.training = training


def _buffers(norm: _Norm) -> tuple[Tensor | None, ...]:
    return norm.running_mean, norm.running_var, norm.num_batches_tracked


class _Job:
    """One call of `update`."""

    def __init__(
        self,
        model: torch.nn.Module,
        loader: Iterable[Any],
        norms: list[_Norm],
        exchange: Exchange | None,
        device: Any,
    ) -> None:
        self.model, self.loader, self.norms, self.exchange, self.device = model, loader, norms, exchange, device
        self.batches = 0

    def one_by_one(self) -> None:
        """Take the statistics of one batch normalization after the other, in the order in which they are called; a pass ends there."""
        self.model.eval()
        for norm, calls in self._order():
            norm.training = calls > 1  # a shared one may read what it has given
            self._set(norm, self._measured({norm: calls}))
            norm.training = False

    def in_one_pass(self) -> None:
        """Take all statistics, each batch normalized by its own."""
        self.model.eval()
        momenta = [(norm, norm.momentum) for norm in self.norms]
        for norm in self.norms:
            norm.training, norm.momentum = True, 0.0  # no running statistics move
        try:
            self._set(None, self._measured(dict.fromkeys(self.norms, 0)))
        finally:
            for norm, momentum in momenta:
                norm.momentum = momentum

    def _order(self) -> list[tuple[_Norm, int]]:
        """Return (batch normalization, calls in a forward) in the order of the first call, from the first batch that any process has."""
        calls: dict[_Norm, int] = {}

        def count(norm: _Norm, inputs: Any, named: Any) -> None:
            calls[norm] = calls.get(norm, 0) + 1

        has_data = False
        for batch in self._batches():
            has_data = True
            with _hooked(self.norms, count):
                self.model(batch)
            break
        places = np.zeros((len(self.norms) + 1, 2))
        places[-1] = has_data
        for place, (norm, number) in enumerate(calls.items(), 1):
            places[self.norms.index(norm)] = place, number
        rows = [places] if self.exchange is None else self.exchange(places)
        first = next((np.asarray(row) for row in rows if np.asarray(row)[-1].all()), None)
        if first is None:
            raise ArgumentError(expected("more than 1 value per channel", "0", "loader"))
        called = [index for index in np.argsort(first[:-1, 0], kind="stable").tolist() if first[index, 0]]
        return [(self.norms[index], int(first[index, 1])) for index in called]

    def _measured(self, wanted: dict[_Norm, int]) -> dict[_Norm, BatchStats]:
        """Return the statistics of what flows into some batch normalizations over all batches, those of all processes together. A forward
        ends when one has been called as often as `wanted` says, never for 0."""
        found: dict[_Norm, BatchStats] = {norm: _nothing(norm) for norm in wanted}
        left: dict[_Norm, int] = {}

        def take(norm: _Norm, inputs: Any, named: Any) -> None:
            if norm not in wanted:
                return
            found[norm] = found[norm].merge(_stats_of((*inputs, *named.values())[0]))
            left[norm] -= 1
            # Not before a shared one has given what its last call reads.
            if left[norm] == 0:
                raise _Reached

        self.batches = 0
        with _hooked(list(wanted), take):
            for batch in self._batches():
                left.update(wanted)
                with contextlib.suppress(_Reached):
                    self.model(batch)
                self.batches += 1
        if self.exchange is not None:
            found = {norm: sync.merge(stats, self.exchange) for norm, stats in found.items()}
        return found

    def _batches(self) -> Iterator[Any]:
        for batch in self.loader:
            batch = batch[0] if isinstance(batch, (list, tuple)) else batch
            yield batch if self.device is None else batch.to(self.device)

    def _set(self, only: _Norm | None, found: dict[_Norm, BatchStats]) -> None:
        is_empty = not self.batches and not any(stats.count for stats in found.values())
        for norm, stats in found.items():
            if stats.count == 0 and only is None and not is_empty:  # never called: it keeps what it has
                continue
            if stats.count < 2:
                raise ArgumentError(expected("more than 1 value per channel", str(stats.count), "loader"))
            if not (np.isfinite(stats.mean).all() and np.isfinite(stats.m2).all()):
                raise ArgumentError(expected("finite values", f"NaN or Inf in the input of a {type(norm).__name__}", "loader"))
            kernels.update_running(norm.running_mean, norm.running_var, stats, 1.0)
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.fill_(self.batches)


@contextlib.contextmanager
def _hooked(norms: Sequence[_Norm], hook: Callable[[_Norm, Any, Any], None]) -> Iterator[None]:
    handles = [norm.register_forward_pre_hook(hook, with_kwargs=True) for norm in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _nothing(norm: _Norm) -> BatchStats:
    return BatchStats(0, np.zeros(norm.num_features), np.zeros(norm.num_features))


def _stats_of(input: Tensor) -> BatchStats:
    """Return the statistics of a tensor, in float64 from the first addition on."""
    input = input.detach()
    input = (input if input.dim() > 1 else input[None]).cpu()
    rows = max(1, BLOCK // max(1, input[:1].numel()))
    return merge_stats([kernels.stats_of(part.double()) for part in input.split(rows)])
