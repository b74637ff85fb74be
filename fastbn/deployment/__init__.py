"""From a trained ONNX file to a verified, measured and perhaps quantized one, with a report to look at."""

from fastbn import graph  # noqa: F401  says what to install where onnx is absent
from fastbn.deployment.options import Options
from fastbn.deployment.pipeline import deploy
from fastbn.deployment.result import Deployment

__all__ = ["Deployment", "Options", "deploy"]
