"""The ONNX wing: fold batch normalization out of a model, verify it, and say what stayed and why."""

from fastbn.errors import FastbnError, expected

try:
    import onnx  # noqa: F401
except ImportError as error:
    raise FastbnError(expected("onnx (pip install 'fastbn[onnx]')", "none installed", "fastbn.graph")) from error

from fastbn.graph.fold_result import FoldResult
from fastbn.graph.job import fold, verify
from fastbn.graph.results import Fold, Kept, Parity

__all__ = ["Fold", "FoldResult", "Kept", "Parity", "fold", "verify"]
