"""The ONNX wing: fold batch normalization out of a model, verify it, and say what stayed and why."""

from fastbn.errors import FastbnError

try:
    import onnx  # noqa: F401
except ImportError as error:
    raise FastbnError("Cannot read models: onnx is not installed (pip install onnx onnxruntime)") from error

from fastbn.graph.fold_result import FoldResult
from fastbn.graph.job import fold, verify
from fastbn.graph.results import Fold, Kept, Parity

__all__ = ["Fold", "FoldResult", "Kept", "Parity", "fold", "verify"]
