"""Batch normalization on CPUs: array functions, and the folding of batch normalization out of ONNX models.

`import fastbn` loads NumPy and nothing else; the graph functions load onnx and onnxruntime when they are first called.
"""

from fastbn.config import kernels, show_config
from fastbn.errors import ArgumentError, ArgumentTypeError, FastbnError, FoldError, ModelError, ParityError, StorageError
from fastbn.functional import fold_conv, fold_linear

__version__ = "0.1.0"

_GRAPH = ("Fold", "FoldResult", "Kept", "Parity", "fold", "verify")

__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "FastbnError",
    "Fold",
    "FoldError",
    "FoldResult",
    "Kept",
    "ModelError",
    "Parity",
    "ParityError",
    "StorageError",
    "__version__",
    "fold",
    "fold_conv",
    "fold_linear",
    "kernels",
    "show_config",
    "verify",
]


def __getattr__(name):
    if name in _GRAPH:
        from fastbn import graph

        return getattr(graph, name)
    raise AttributeError(f"module 'fastbn' has no attribute '{name}'")


def __dir__():
    return sorted(set(globals()) | set(_GRAPH))
