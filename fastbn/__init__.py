"""Batch normalization on CPUs: array functions, and the folding of batch normalization out of ONNX models.

`import fastbn` loads NumPy and nothing else; the graph functions, `deploy` and `reestimate` load onnx and onnxruntime when they are
first called.
"""

from importlib.util import find_spec
from typing import TYPE_CHECKING

from fastbn.interrupts import interrupts_deferred, interrupts_end_it, is_command

try:
    with interrupts_end_it() if is_command() else interrupts_deferred():  # of which NumPy makes an ImportError
        from fastbn import _native  # noqa: F401
except ImportError as error:
    if find_spec("fastbn._native") is None:
        reason = "it is not built in this source folder: start elsewhere, or run `pip install -e .` here"
    elif find_spec("numpy") is None:
        reason = "NumPy is not installed"
    else:
        reason = str(error)
    raise ImportError(f"Cannot load the compiled part of fastbn from '{__path__[0]}': {reason}") from error
from fastbn.config import get_num_threads, kernels, set_num_threads, show_config, use_isa
from fastbn.errors import ArgumentError, ArgumentTypeError, FastbnError, FoldError, ModelError, ParityError, StorageError, TensorError
from fastbn.folding import fold_conv, fold_linear
from fastbn.functional import batch_norm, batch_norm_backward, batch_norm_train, batch_stats
from fastbn.layers import BatchNorm
from fastbn.stats import BatchStats, merge_stats

if TYPE_CHECKING:  # what `__getattr__` finds
    from fastbn.deployment import Deployment, deploy
    from fastbn.graph import Fold, FoldResult, Kept, Parity
    from fastbn.graph.job import fold, verify
    from fastbn.kernel_bench import bench_kernels, kernel_schedule
    from fastbn.reestimation import Reestimation, reestimate
    from fastbn.zoo import Zoo, fold_all

__version__ = "0.1.0"

# Name -> the module that it is taken from when it is first asked for.
_LATER = {
    **dict.fromkeys(("Fold", "FoldResult", "Kept", "Parity", "fold", "verify"), "fastbn.graph"),
    **dict.fromkeys(("Deployment", "deploy"), "fastbn.deployment"),
    **dict.fromkeys(("Reestimation", "reestimate"), "fastbn.reestimation"),
    **dict.fromkeys(("bench_kernels", "kernel_schedule"), "fastbn.kernel_bench"),
    **dict.fromkeys(("Zoo", "fold_all"), "fastbn.zoo"),
}

__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "BatchNorm",
    "BatchStats",
    "Deployment",
    "FastbnError",
    "Fold",
    "FoldError",
    "FoldResult",
    "Kept",
    "ModelError",
    "Parity",
    "ParityError",
    "Reestimation",
    "StorageError",
    "TensorError",
    "Zoo",
    "__version__",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_train",
    "batch_stats",
    "bench_kernels",
    "deploy",
    "fold",
    "fold_all",
    "fold_conv",
    "fold_linear",
    "get_num_threads",
    "kernel_schedule",
    "kernels",
    "merge_stats",
    "reestimate",
    "set_num_threads",
    "show_config",
    "use_isa",
    "verify",
]


if not TYPE_CHECKING:  # a checker would take every name for one that this function finds

    def __getattr__(name):
        if name in _LATER:
            from importlib import import_module

            return getattr(import_module(_LATER[name]), name)
        raise AttributeError(f"module 'fastbn' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_LATER))
