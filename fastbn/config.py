"""What runs here: versions, kernels, threads. The one page to attach to a bug report."""

import os
import sys

import numpy as np

__all__ = ["kernels", "show_config"]


def kernels():
    """Return the names of the C kernels in use, one per operation and dtype."""
    from fastbn.affine import DTYPES

    return [f"fbn_scale_weight_{dtype}" for dtype in DTYPES]


def show_config():
    """Return what runs here as a dict that JSON can hold.

    Returns
    -------
    dict
        version, python, platform, machine, cpus (those this process may use), numpy, onnx and onnxruntime (None where not installed).
    """
    import platform
    from importlib import metadata

    import fastbn

    def installed(package):
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "version": fastbn.__version__,
        "python": platform.python_version(),
        "platform": sys.platform,
        "machine": platform.machine(),
        "cpus": cpus,
        "numpy": np.__version__,
        "onnx": installed("onnx"),
        "onnxruntime": installed("onnxruntime"),
    }
