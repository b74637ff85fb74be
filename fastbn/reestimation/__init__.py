"""Running statistics of a finished model, estimated again from data: in this process, on all cores, or on a cluster."""

from fastbn import graph  # noqa: F401  says what to install where onnx is absent
from fastbn.reestimation.job import reestimate
from fastbn.reestimation.options import Options
from fastbn.reestimation.result import Moved, Reestimation

__all__ = ["Moved", "Options", "Reestimation", "reestimate"]
