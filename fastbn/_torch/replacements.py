"""What stands in a folded model where no module of torch's would do."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Shift", "Zeros"]


class Shift(torch.nn.Module):
    """x + bias: what stays of a batch normalization whose scale went into a weight that has no bias beside it.

    Parameters
    ----------
    bias : Tensor
        In a shape that broadcasts over the data.
    """

    def __init__(self, bias: Tensor, requires_grad: bool = True) -> None:
        super().__init__()
        self.bias = torch.nn.Parameter(bias, requires_grad)

    def forward(self, input: Tensor) -> Tensor:
        """Return the sum."""
        return input + self.bias

    def extra_repr(self) -> str:
        """Return the shape of the bias."""
        return str(tuple(self.bias.shape))


class Zeros(torch.nn.Module):
    """Zeros of the input's shape, without memory of their own: what stays of a branch that went into a convolution beside it."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the zeros."""
        return input.new_zeros(()).expand(input.shape)
