"""The ONNX wing: fold batch normalization out of a model, verify it, and say what stayed and why."""

from fastbn.errors import FastbnError, expected

try:
    import onnx  # noqa: F401
except ImportError as error:
    raise FastbnError(expected("onnx (pip install 'fastbn[onnx]')", "none installed", "fastbn.graph")) from error

from fastbn.graph.folding import fold, verify
from fastbn.graph.report import Fold, Kept, Parity
from fastbn.graph.result import FoldResult

__all__ = ["Fold", "FoldResult", "Kept", "Parity", "fold", "verify"]
