"""A folded PyTorch model beside its original, both in torch, on the same inputs; how far rounding may move it: docs/numerics.md."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastbn.dtypes import UNIT
from fastbn.errors import first_line
from fastbn.exported.job import parity_of
from fastbn.exported.torch_graph import Arguments, moved_copy, on_device
from fastbn.graph.parity.difference import max_change
from fastbn.graph.parity.noise import NOISE
from fastbn.graph.parity.verdict import Verdict, judged
from fastbn.graph.results import Parity

if TYPE_CHECKING:
    from fastbn._types import Array

    Outputs = dict[str, Array]

__all__ = ["Comparison"]

# Runs with other signs of the noise.
NOISY_RUNS = 2


@dataclass
class _Run:
    """What the original gives for some arguments in one type, and how far noise moves each output of it."""

    arguments: Arguments
    dtype: torch.dtype | None
    before: Outputs
    noise: dict[str, float]


class Comparison:
    """The outputs of an original, which folded models are compared with.

    The arguments are the example and, where the model takes them, the same with all numbers of floating point drawn at random. Each is run
    in the type of the model and in float64, where nothing but the fold and the rounding of its weights can make a difference.

    Parameters
    ----------
    model : torch.nn.Module
        The original, in inference.
    arguments : (tuple, dict)
        The example.
    seed : int
    """

    def __init__(self, model: torch.nn.Module, arguments: Arguments, seed: int) -> None:
        self._model = model
        self._seed = seed
        self.unit = max((UNIT[_name(each.dtype)] for each in _floats(model)), default=UNIT["float32"])
        self._double = _in_double(model)
        noisy = [_perturbed(model, seed + run, self.unit) for run in range(NOISY_RUNS)]
        noisy_double = [each for each in map(_in_double, noisy) if each is not None]
        self._runs: list[_Run] = []
        for number, example in enumerate((arguments, _drawn(arguments, seed))):
            try:
                self._add(example, noisy, noisy_double)
            except Exception:
                if number == 0:
                    raise

    def _add(self, arguments: Arguments, noisy: list[torch.nn.Module], noisy_double: list[torch.nn.Module]) -> None:
        before = _outputs(self._model, arguments)
        noise = _noise(before, [_outputs(each, arguments) for each in noisy])
        exact = None if self._double is None else _tried(self._double, on_device(arguments, "cpu", torch.float64))
        if exact is not None and exact.keys() == before.keys():
            noise = {name: max(noise[name], max_change(before[name], exact[name])) for name in before}
            double = on_device(arguments, "cpu", torch.float64)
            moved = [each for each in (_tried(model, double) for model in noisy_double) if each is not None]
            self._runs.append(_Run(double, torch.float64, exact, _noise(exact, moved)))
        self._runs.append(_Run(arguments, None, before, noise))

    def check(self, folded: torch.nn.Module) -> Parity:
        """Return the parity of a folded model."""
        verdicts: list[Verdict] = []
        for run in self._runs:
            try:
                model = folded if run.dtype is None else moved_copy(folded, run.dtype)
                after = _outputs(model, run.arguments)
            except Exception as error:  # a module reads what a batch normalization had
                return Parity("failed", reason=f"the folded model raises {first_line(error)}")
            for name, before in run.before.items():
                written = after.keys() - run.before.keys()
                if written:
                    return Parity("failed", reason=f"the folded model has another result, '{min(written)}'")
                if name not in after or after[name].shape != before.shape:
                    return Parity("failed", reason=f"the output '{name}' has another shape")
                if before.size:
                    verdicts.append(judged(name, before, after[name], run.noise[name], self.unit))
        return parity_of(verdicts, len(self._runs), "in torch and in float64" if self._double is not None else "in torch")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _floats(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    return (each for each in model.parameters() if _name(each.dtype) in UNIT)


def _in_double(model: torch.nn.Module) -> torch.nn.Module | None:
    try:
        return moved_copy(model, torch.float64)
    except Exception:  # a model that has no other type, as quantized ones
        return None


def _tried(model: torch.nn.Module, arguments: Arguments) -> Outputs | None:
    """Return the outputs of a model, None where it does not run: its code may hold a type."""
    try:
        return _outputs(model, arguments)
    except Exception:
        return None


def _outputs(model: torch.nn.Module, arguments: Arguments) -> Outputs:
    """Return the tensors that a model gives as arrays, and the arguments that it writes over; floating-point ones in float64."""
    device, flat = _device(model), torch.utils._pytree.tree_flatten_with_path
    given, before = on_device(arguments, device), on_device(arguments, device)
    with torch.no_grad():
        result = model(*given[0], **given[1])
    leaves = [(f"output{torch.utils._pytree.keystr(path)}", leaf) for path, leaf in flat(result)[0]]
    for (path, leaf), (_, old) in zip(flat(given)[0], flat(before)[0], strict=True):
        if isinstance(leaf, torch.Tensor) and not torch.equal(leaf.nan_to_num(), old.nan_to_num()):
            leaves.append((f"argument{torch.utils._pytree.keystr(path)}", leaf))
    found: Outputs = {}
    for name, leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            tensor = torch.view_as_real(leaf.resolve_conj()) if leaf.is_complex() else leaf
            tensor = tensor.detach().to("cpu", torch.float64 if tensor.is_floating_point() else tensor.dtype)
            found[name] = tensor.contiguous().numpy()
    return found


def _device(model: torch.nn.Module) -> torch.device:
    return next((each.device for each in (*model.parameters(), *model.buffers())), torch.device("cpu"))


def _noise(before: Outputs, moved: list[Outputs]) -> dict[str, float]:
    """Return how far noise moves each output."""
    return {
        name: max((max_change(values, other[name]) for other in moved if name in other and other[name].shape == values.shape), default=0.0)
        for name, values in before.items()
    }


def _perturbed(model: torch.nn.Module, seed: int, unit: float) -> torch.nn.Module:
    """Return a copy in which every parameter has moved by NOISE units of roundoff of random sign, and each bias of a batch normalization
    by as many of the terms that it is added to."""
    noisy, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)

    def moved(values: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
        signs = torch.randint(0, 2, values.shape, generator=generator).to(values.device) * 2.0 - 1.0
        return (values.double() + NOISE * unit * signs * size).to(values.dtype)

    for module in noisy.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.is_floating_point():
                continue
            size = parameter.detach().double().abs()
            if name == "bias" and isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and module.running_var is not None:
                mean, var = module.running_mean.double(), module.running_var.double()
                size = size + module.weight.detach().double().abs() * (1 + mean.abs() / (var + module.eps).sqrt())
            parameter.data = moved(parameter.detach(), size)
    return noisy


def _drawn(arguments: Arguments, seed: int) -> Arguments:
    """Return arguments in which every tensor of floating point is drawn from the normal distribution."""
    rng = np.random.default_rng(seed)

    def drawn(value: Any) -> Any:  # Any: a leaf of arguments
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        return torch.from_numpy(rng.standard_normal(tuple(value.shape))).to(value.device, value.dtype)

    return torch.utils._pytree.tree_map(drawn, arguments)  # type: ignore[no-any-return]  # a tree of the same form
