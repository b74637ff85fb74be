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
    from fastbn._types import Exchange, FloatArray

__all__ = ["MODES", "Mode", "update"]

Mode: TypeAlias = Literal["population", "one-pass"]
MODES: tuple[Mode, ...] = ("population", "one-pass")

# Elements that are widened to float64 at a time: they stay in a level-2 cache.
BLOCK = 1 << 18

# What normalizes by running statistics; the class that torch's modules and ours derive from.
_Norm: TypeAlias = Any  # torch.nn.modules.batchnorm._BatchNorm, which a checker without torch does not know


# A checker without torch does not know whether the class is there: torch 2.6 and later.
_STANCE: Any = getattr(torch.compiler, "set_stance", None)


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
    _check_device(device)
    model = _unwrapped(model)
    _check_scripted(model)
    norms = [part for part in model.modules() if isinstance(part, torch.nn.modules.batchnorm._BatchNorm) and part.running_mean is not None]
    if not norms:
        return
    exchange = None if process_group is None else exchange_of(process_group)
    job = _Job(model, loader, norms, exchange, device)
    with torch.no_grad(), _restored(model, norms), _in_eager_mode():
        job.in_one_pass() if mode == "one-pass" else job.one_by_one()


def _check_device(device: Any) -> None:
    """Refuse what names no device of this machine."""
    try:
        torch.empty(0, device=device)
    except Exception as error:  # torch raises many kinds: for a wrong name, a wrong type, a device that it is not built for
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ArgumentError(expected("a device of torch on this machine", f"{device!r} ({reason})", "device")) from error


def _unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """Return the module inside a compiled one, whose hooks would not be called, or inside one of DistributedDataParallel."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, torch.nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def _check_scripted(model: torch.nn.Module) -> None:
    """Refuse batch normalizations that torch.jit has compiled: nothing can look into these."""
    for name, part in model.named_modules():
        if isinstance(part, torch.jit.ScriptModule) and any(each.endswith("running_mean") for each, _ in part.named_buffers()):
            raise ArgumentTypeError(
                expected("batch normalizations that run in Python", "some that torch.jit has compiled", name or "model")
            )


def _in_eager_mode() -> contextlib.AbstractContextManager[object]:
    """Return a context in which what torch.compile has compiled runs as it was written: what watches it is Python."""
    return contextlib.nullcontext() if _STANCE is None else _STANCE("force_eager")


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
        """Take the statistics of one batch normalization after the other, each behind those that feed it; a pass ends there."""
        self.model.eval()
        for norm, calls in self._order():
            norm.training = calls != 1  # a shared one may read what it has given
            self._set(norm, self._measured({norm: calls}))
            norm.training = False

    def in_one_pass(self) -> None:
        """Take all statistics, each batch normalized by its own."""
        self.model.eval()
        momenta = [(norm, norm.momentum) for norm in self.norms]
        for norm in self.norms:
            norm.training, norm.momentum = True, 0.0  # no running statistics move
        try:
            found = self._measured(dict.fromkeys(self.norms, 0))
            self._check_called(not self.batches or any(stats.count for stats in found.values()))
            self._set(None, found)
        finally:
            for norm, momentum in momenta:
                norm.momentum = momentum

    def _order(self) -> list[tuple[_Norm, int]]:
        """Return (batch normalization, calls in a forward) of those that any batch of any process calls, each one behind those that some
        batch calls before it; calls is 0 where their number changes."""
        places = {norm: place for place, norm in enumerate(self.norms)}
        calls: dict[int, int] = {}

        def count(norm: _Norm, input: Tensor) -> None:
            calls[places[norm]] = calls.get(places[norm], 0) + 1

        table = _Table(len(self.norms))
        with _watched(self.norms, count):
            for batch in self._batches():
                calls.clear()
                self.model(batch)
                table.add(calls)
        if self.exchange is not None:
            table.values = np.max([np.asarray(each) for each in self.exchange(table.values)], axis=0)
        if not table.values[-1, -1]:
            raise ArgumentError(expected("more than 1 value per channel", "0", "loader"))
        called = table.called()
        self._check_called(bool(called))
        return [
            (self.norms[place], table.calls(place)) for place in self._sorted(called, table.values[: len(self.norms), : len(self.norms)])
        ]

    def _check_called(self, is_any: bool) -> None:
        if not is_any:
            raise ArgumentError(expected("a model that calls its batch normalizations", "one that calls none of them", "model"))

    def _sorted(self, called: Sequence[int], before: FloatArray) -> list[int]:
        """Return places in an order in which none stands before one that is called before it."""
        order: list[int] = []
        left = list(called)
        while left:
            ready = [place for place in left if not before[left, place].any()]
            if not ready:
                names = {part: name for name, part in self.model.named_modules()}
                both = [(one, other) for one in left for other in left if before[one, other] and before[other, one]]
                first, second = (f"'{names[self.norms[place]]}'" for place in (both[0] if both else left[:2]))
                reason = f"some batches call {first} before {second} and others the other way round"
                raise ArgumentError(f"Cannot take statistics of one after the other: {reason}; mode='one-pass' takes them at once")
            order += ready
            left = [place for place in left if place not in ready]
        return order

    def _measured(self, wanted: dict[_Norm, int]) -> dict[_Norm, BatchStats]:
        """Return the statistics of what flows into some batch normalizations over all batches, those of all processes together. A forward
        ends when one has been called as often as `wanted` says, never for 0."""
        found: dict[_Norm, BatchStats] = {norm: _nothing(norm) for norm in wanted}
        left: dict[_Norm, int] = {}

        def take(norm: _Norm, input: Tensor) -> None:
            found[norm] = found[norm].merge(_stats_of(input))
            left[norm] -= 1
            # Not before a shared one has given what its last call reads.
            if left[norm] == 0:
                raise _Reached

        self.batches = 0
        with _watched(list(wanted), take):
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


class _Table:
    """What batches call, as an array that processes put together by taking the maximum.

    Attributes
    ----------
    values : float64 array of shape (N + 2, N + 1)
        [i, j]: whether some batch calls j after i, for the first time; [N, i]: the most calls in a batch; [N + 1, i]: minus the fewest;
        [N + 1, N]: whether there was a batch.
    """

    def __init__(self, count: int) -> None:
        self.values = np.zeros((count + 2, count + 1))
        self.values[-1] = -np.inf
        self.values[-1, -1] = 0
        self._seen: set[tuple[int, ...]] = set()

    def add(self, calls: dict[int, int]) -> None:
        """Note the calls of one batch, in the order of the first."""
        self.values[-1, -1] = 1
        order = tuple(calls)
        if order not in self._seen:
            self._seen.add(order)
            for number, place in enumerate(order):
                self.values[place, list(order[number + 1 :])] = 1
        for place, count in calls.items():
            self.values[-2:, place] = np.maximum(self.values[-2:, place], (count, -count))

    def called(self) -> list[int]:
        """Return the places of those that are called."""
        return np.flatnonzero(self.values[-2, :-1]).tolist()

    def calls(self, place: int) -> int:
        """Return how often one is called in every batch that calls it, 0 where the number changes."""
        most, fewest = self.values[-2, place], -self.values[-1, place]
        return int(most) if most == fewest else 0


@contextlib.contextmanager
def _watched(norms: Sequence[_Norm], look: Callable[[_Norm, Tensor], None]) -> Iterator[None]:
    """Let a function see what each batch normalization is given, also one that is called by its `forward`, past all hooks."""

    def watching(norm: _Norm) -> Callable[..., Any]:
        inner = norm.forward

        def forward(*inputs: Any, **named: Any) -> Any:
            look(norm, (*inputs, *named.values())[0])
            return inner(*inputs, **named)

        return forward

    own = [norm.__dict__.get("forward") for norm in norms]
    try:
        for norm in norms:
            norm.__dict__["forward"] = watching(norm)
        yield
    finally:
        for norm, before in zip(norms, own, strict=True):
            if before is None:
                norm.__dict__.pop("forward", None)
            else:
                norm.__dict__["forward"] = before


def _nothing(norm: _Norm) -> BatchStats:
    return BatchStats(0, np.zeros(norm.num_features), np.zeros(norm.num_features))


def _stats_of(input: Tensor) -> BatchStats:
    """Return the statistics of a tensor, in float64 from the first addition on."""
    input = input.detach()
    input = (input if input.dim() > 1 else input[None]).cpu()
    rows = max(1, BLOCK // max(1, input[:1].numel()))
    return merge_stats([kernels.stats_of(part.double()) for part in input.split(rows)])
