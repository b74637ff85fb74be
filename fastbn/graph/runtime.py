"""onnxruntime as the verification uses it: sessions, what it says when it cannot, and the models that it takes."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import onnx
from numpy.typing import NDArray

from fastbn.errors import FastbnError, StorageError, expected
from fastbn.graph.model.storage import Source, serialize, utf8_path

__all__ = ["UNIT", "Runnable", "Runner", "Session", "runtime_errors", "said", "says_invalid", "session"]

UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}


class Session(Protocol):
    """What is used of onnxruntime.InferenceSession, which has no types of its own."""

    def run(self, outputs: Sequence[str] | None, feed: dict[str, NDArray]) -> list[Any]: ...

    def get_inputs(self) -> Sequence[Any]: ...

    def get_outputs(self) -> Sequence[Any]: ...


def _runtime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise FastbnError(expected("onnxruntime (pip install 'fastbn[onnx]'), or verify=False", "none installed", "verify")) from error
    return onnxruntime


def said(error: Exception) -> str:
    """Return the first line of what onnxruntime said, without its prefix."""
    line = str(error).strip().splitlines()[0]
    if line.startswith("[ONNXRuntimeError]"):
        line = line.split(" : ", 3)[-1]
    return re.sub(r"^/\S+:\d+ .*?\) (?=[A-Z])", "", line)[:300]  # the place in onnxruntime's own sources


def runtime_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions that onnxruntime raises."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    names = ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NotImplemented", "RuntimeException", "EPFail", "NoSuchFile")
    return (*(getattr(state, name) for name in names), RuntimeError, ValueError)


def says_invalid(error: Exception) -> bool:
    """Say whether onnxruntime calls a model invalid, and not only one that it cannot run."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return isinstance(error, (state.InvalidGraph, state.Fail, state.InvalidProtobuf)) and "opset" not in str(error).lower()


def _utf8(path: str | os.PathLike) -> str:
    text = utf8_path(path)
    if text is None:
        raise StorageError(expected("a name that is UTF-8, as onnxruntime takes it", "another", path))
    return text


def session(
    model: bytes | str, folder: str | os.PathLike | None = None, threads: int = 0, optimise: bool = False, profile: str | None = None
) -> Session:
    """Return an onnxruntime session of a model given as bytes or path; folder is where external data of bytes lies, profile what the names
    of the files begin with in which its kernels are recorded."""
    runtime = _runtime()
    if isinstance(model, str):
        model = _utf8(model)
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    if not optimise:
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.disable_prepacking", "1")
        # From the second run on a memory pattern is one more block as large as all that the first run took.
        options.enable_mem_pattern = False
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", _utf8(folder))
    return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@dataclass
class Runnable:
    """A model as onnxruntime takes it: bytes or a path, and the folder of its external data."""

    model: bytes | str
    folder: Path | None = None

    @classmethod
    def of(cls, source: Source) -> "Runnable":
        """Return the Runnable of a storage.Source."""
        if source.path is None:
            return cls(serialize(source.proto, source.name))
        if utf8_path(source.path) is not None:
            return cls(str(source.path), source.path.parent)
        return cls(source.to_bytes(), _utf8(source.path.parent) if source.data_files() else None)

    def session(self) -> Session:
        """Return an onnxruntime session of the model, its optimizer off."""
        return session(self.model, self.folder if isinstance(self.model, bytes) else None)

    def proto(self) -> onnx.ModelProto:
        """Return the model without the values of its external tensors."""
        if isinstance(self.model, bytes):
            return onnx.ModelProto.FromString(self.model)
        return onnx.load(self.model, load_external_data=False)

    def with_proto(self, proto: onnx.ModelProto) -> "Runnable":
        """Return another model whose external data lie where this one's do."""
        return Runnable(serialize(proto, "the model"), self.folder)


class Runner:
    """One live session of a model, opened when it is first needed.

    Parameters
    ----------
    model : Runnable
    fresh : bool
        Open a new session for each run: random numbers with a seed are then the same in every run.
    """

    def __init__(self, model: Runnable, fresh: bool = False) -> None:
        self.model = model
        self.fresh = fresh
        self._session: Session | None = None

    def session(self) -> Session:
        """Return the session."""
        if self._session is None:
            self._session = self.model.session()
        return self._session

    def get_inputs(self) -> Sequence[Any]:
        """Return what onnxruntime says of the graph inputs."""
        return self.session().get_inputs()

    def run(self, outputs: Sequence[str] | None, feed: dict[str, NDArray]) -> list[Any]:
        """Return the outputs, all of them for None."""
        if self.fresh:
            self.close()
        return self.session().run(outputs, feed)

    def close(self) -> None:
        """Give the session's memory back."""
        self._session = None

    def __enter__(self) -> "Runner":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
