"""onnxruntime as the verification uses it: sessions, what it says when it cannot, and the models that it takes."""

import re
from dataclasses import dataclass

from fastbn.errors import FastbnError, StorageError, expected
from fastbn.graph.storage import serialize, utf8_path

__all__ = ["UNIT", "Runnable", "runtime_errors", "said", "session"]

UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}


def _runtime():
    try:
        import onnxruntime
    except ImportError as error:
        raise FastbnError(expected("onnxruntime (pip install 'fastbn[onnx]'), or verify=False", "none installed", "verify")) from error
    return onnxruntime


def said(error):
    """Return the first line of what onnxruntime said, without its prefix."""
    line = str(error).strip().splitlines()[0]
    if line.startswith("[ONNXRuntimeError]"):
        line = line.split(" : ", 3)[-1]
    return re.sub(r"^/\S+:\d+ .*?\) (?=[A-Z])", "", line)[:300]  # the place in onnxruntime's own sources


def runtime_errors():
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    names = ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NotImplemented", "RuntimeException", "EPFail", "NoSuchFile")
    return (*(getattr(state, name) for name in names), RuntimeError, ValueError)


def _utf8(path):
    text = utf8_path(path)
    if text is None:
        raise StorageError(expected("a name that is UTF-8, as onnxruntime takes it", "another", path))
    return text


def session(model, folder=None, threads=0, optimise=False, profile=None):
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
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", _utf8(folder))
    return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@dataclass
class Runnable:
    """A model as onnxruntime takes it: bytes or a path, and the folder of its external data."""

    model: object
    folder: object = None

    @classmethod
    def of(cls, source):
        """Return the Runnable of a storage.Source."""
        if source.path is None:
            return cls(serialize(source.proto, source.name))
        if utf8_path(source.path) is not None:
            return cls(str(source.path), source.path.parent)
        return cls(source.to_bytes(), _utf8(source.path.parent) if source.data_files() else None)

    def session(self):
        """Return an onnxruntime session of the model."""
        return session(self.model, self.folder if isinstance(self.model, bytes) else None)
