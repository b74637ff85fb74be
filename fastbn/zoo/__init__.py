"""Many models folded and verified, each in a process of its own."""

from fastbn import graph  # noqa: F401  says what to install where onnx is absent
from fastbn.zoo.job import fold_all
from fastbn.zoo.result import Outcome, Zoo

__all__ = ["Outcome", "Zoo", "fold_all"]
