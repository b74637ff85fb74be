"""The batch normalizations of a model: which of them are converted, why others are not, and tracers to which converted ones are opaque."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from fastbn.errors import ArgumentTypeError, TensorError, expected

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

__all__ = ["Named", "NormEntry", "entries_of", "module_of", "refuse_fusion", "warn_skipped"]

# Those that a warning names.
MOST_NAMED = 4


class Named:
    """A module that torch prints by the name of its package: a converted model must not look like one of torch's."""

    def _get_name(self) -> str:
        return f"fastbn.{type(self).__name__}"


@dataclass(frozen=True)
class NormEntry:
    """One batch normalization of a model.

    Attributes
    ----------
    name : str
        Its name in the model; "" for the model itself.
    module : torch.nn.Module
    kind : "fastbn", "torch" or "other"
        Ours, torch's (which `convert` converts), or one that `convert` leaves as it is.
    reason : str or None
        Of an "other" one, why.
    """

    name: str
    module: torch.nn.Module
    kind: Literal["fastbn", "torch", "other"]
    reason: str | None = None


def module_of(value: Any, where: str) -> torch.nn.Module:  # Any: whatever a caller gives
    """Return a value that is a torch.nn.Module; raises ArgumentTypeError for any other."""
    if not isinstance(value, torch.nn.Module):
        raise ArgumentTypeError(expected("a torch.nn.Module", type(value).__name__, where))
    return value


def entries_of(model: torch.nn.Module, ours: Collection[type], theirs: Collection[type]) -> list[NormEntry]:
    """Return an entry for each batch normalization of a model, given the classes of ours and those of torch that are converted."""
    entries = []
    for name, module in model.named_modules():
        if type(module) in ours:
            entries.append(NormEntry(name, module, "fastbn"))
        elif type(module) in theirs:
            entries.append(NormEntry(name, module, "torch"))
        elif _is_batch_norm(module):
            entries.append(NormEntry(name, module, "other", _reason(module, tuple(ours))))
    return entries


def _is_batch_norm(module: torch.nn.Module) -> bool:
    if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
        return True
    if isinstance(module, torch.nn.modules.instancenorm._InstanceNorm):
        return False
    if isinstance(module, torch.jit.ScriptModule):
        return "BatchNorm" in str(getattr(module, "original_name", ""))
    return "BatchNorm" in type(module).__name__ and {"running_mean", "running_var"} <= {*module._buffers, *module._parameters}


def _reason(module: torch.nn.Module, ours: tuple[type, ...]) -> str:
    name = type(module).__name__
    if isinstance(module, torch.nn.modules.lazy.LazyModuleMixin):
        return f"{name} has no number of channels before its first call"
    if torch.nn.utils.parametrize.is_parametrized(module):
        return "a parametrization computes its parameters"
    if isinstance(module, torch.jit.ScriptModule):
        return "torch.jit has compiled it"
    base = "fastbn's" if isinstance(module, ours) else "torch's"
    if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
        return f"{name} is a class derived from {base}, whose forward may differ"
    return f"{name} is not derived from torch's batch normalizations"


def warn_skipped(skipped: Sequence[NormEntry], stacklevel: int) -> None:
    """Warn of batch normalizations that stay as they are."""
    if skipped:
        named = "; ".join(f"'{entry.name}': {entry.reason}" if entry.name else str(entry.reason) for entry in skipped[:MOST_NAMED])
        more = f"; and {len(skipped) - MOST_NAMED} more" if len(skipped) > MOST_NAMED else ""
        warnings.warn(f"Cannot convert every batch normalization: {named}{more}", UserWarning, stacklevel + 1)


def refuse_fusion(tracer: Any) -> None:  # Any: tracers are classes of anybody
    """Raise TensorError where a module is traced for a fusion that looks for torch's classes: it would silently fuse nothing.

    torch.fx.experimental.optimization.fuse is known by its frame, as it has no tracer of its own.
    """
    caller = None
    if any(kind.__name__ == "QuantizationTracer" for kind in type(tracer).__mro__):
        caller = "torch.ao.quantization"
    elif (module := sys.modules.get("torch.fx.experimental.optimization")) is not None:
        frame = sys._getframe()
        while frame.f_back is not None and caller is None:
            frame = frame.f_back
            caller = "torch.fx.experimental.optimization.fuse" if frame.f_code is module.fuse.__code__ else None
    if caller is not None:
        reason = "it knows torch's own classes alone: use fastbn.torch.convert(model, back=True) first, or fastbn.torch.fold"
        raise TensorError(f"Cannot fuse converted batch normalizations in {caller}: {reason}")
