"""onnxruntime as the verification uses it: sessions, what it says when it cannot, and the models that it takes."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

import onnx
from onnx import TensorProto

from fastbn.errors import FastbnError, StorageError
from fastbn.graph.model.element_types import dtype_of
from fastbn.graph.model.files import os_error, utf8_path
from fastbn.graph.model.storage import Source, serialize
from fastbn.interrupts import interrupts_deferred

if TYPE_CHECKING:
    from fastbn._types import Array

__all__ = [
    "CARRIED",
    "CARRIERS",
    "FATAL",
    "Runnable",
    "Runner",
    "Session",
    "ValueInfo",
    "carried",
    "runtime_errors",
    "said",
    "says_invalid",
    "session",
    "silence_log",
    "system_error",
]


# What onnxruntime says that tells a user nothing: place and signature of a function of its own, with or without a condition; that a
# model is invalid which may be a piece of a valid one; that a status is not zero.
NOISE = (
    (re.compile(r"/?\b[\w./-]+\.(?:h|cc|cpp):\d+ (?:.*? was false\. |\w+ (?=[A-Z])|.*?\) (?=[A-Z]))?"), ""),
    (re.compile(r"^This is an invalid model\. "), ""),
    (re.compile(r"^Non-zero status code returned while running (\S+) node\. Name:'(.*?)' Status Message: "), r"\1 '\2': "),
)


# Sizes that a model does not take, which it says in lines of their own.
SIZES = re.compile(r" for the following indices\s+index: (\d+) Got: (\d+) Expected: (\d+)[\s\S]*")

# What it says where the system gives an error, for a model file or a data file.
SYSTEM_ERROR = re.compile(r"(?:\bsystem error number |^SystemError : )(\d+)")

# Bytes that are read at once.
BLOCK = 1 << 20

# The level of onnxruntime's log above which nothing is written that a process survives.
FATAL = 4

_is_log_silent = False

# Types whose arrays onnxruntime does not take or give -> a type that holds all their values, in which they travel.
CARRIERS: dict[int, int] = {
    **dict.fromkeys(
        (
            *(TensorProto.BFLOAT16, TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E4M3FNUZ, TensorProto.FLOAT8E5M2),
            *(TensorProto.FLOAT8E5M2FNUZ, TensorProto.FLOAT4E2M1),
        ),
        TensorProto.FLOAT,
    ),
    TensorProto.INT4: TensorProto.INT8,
    TensorProto.UINT4: TensorProto.UINT8,
}
CARRIED: dict[str, int] = {dtype_of(kind).name: carrier for kind, carrier in CARRIERS.items()}


def carried(array: Array) -> Array:
    """Return an array in a type that onnxruntime takes."""
    carrier = CARRIED.get(array.dtype.name)
    return array if carrier is None else array.astype(dtype_of(carrier))


class Session(Protocol):
    """What is used of onnxruntime.InferenceSession, which has no types of its own."""

    def run(self, outputs: Sequence[str] | None, feed: Mapping[str, Array], /) -> list[Any]:
        """Return the outputs: an array for a tensor, a list or a dict for a sequence or a map."""
        ...

    def get_inputs(self) -> Sequence[ValueInfo]:
        """Return what is known of the graph inputs."""
        ...

    def get_outputs(self) -> Sequence[ValueInfo]:
        """Return what is known of the graph outputs."""
        ...


class OpenSession(Session, Protocol):
    """The same of a session that is open."""

    def end_profiling(self) -> str:
        """Return the path of the file with the profile."""
        ...


class ValueInfo(Protocol):
    """What onnxruntime says of an input or output."""

    @property
    def name(self) -> str:
        """Its name."""
        ...

    @property
    def type(self) -> str:
        """Its type, such as "tensor(float)"."""
        ...

    @property
    def shape(self) -> list[int | str | None]:
        """Its sizes, a name or None for one that only a run tells."""
        ...


def _runtime() -> Any:  # a module without types
    try:
        with interrupts_deferred():  # it makes an ImportError of one
            import onnxruntime
    except ImportError as error:
        raise FastbnError("Cannot run models: onnxruntime is not installed (pip install onnxruntime)") from error
    if _is_log_silent:
        onnxruntime.set_default_logger_severity(FATAL)
    return onnxruntime


@cache
def _register_arena() -> None:
    """Make the arena of all sessions that share one."""
    runtime = _runtime()
    state = _exceptions()
    place = state.OrtMemoryInfo("Cpu", state.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, state.OrtMemType.DEFAULT)
    runtime.create_and_register_allocator(place, state.OrtArenaCfg({"arena_extend_strategy": 0}))


def silence_log() -> None:
    """Let onnxruntime say nothing of its own from now on, and send nothing: for the command, whose stderr has one voice.

    Its telemetry keeps files in the home and in the temporary folder. It is asked once, when onnxruntime is loaded.
    """
    global _is_log_silent
    _is_log_silent = True
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def _exceptions() -> Any:  # a module without types
    _runtime()
    from onnxruntime.capi import onnxruntime_pybind11_state  # pyright: ignore[reportAttributeAccessIssue]  # compiled, without a stub

    return onnxruntime_pybind11_state


def said(error: Exception) -> str:
    """Return the first line of an error of onnxruntime as a user reads it: without its prefix and the places in its own sources."""
    line = SIZES.sub(r": \2 along axis \1, where it has \3", str(error).strip()).splitlines()[0]
    if line.startswith("[ONNXRuntimeError]"):
        line = line.split(" : ", 3)[-1]
    for pattern, instead in NOISE:
        line = pattern.sub(instead, line)
    return line[:300]


def runtime_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions that onnxruntime raises."""
    own = [each for each in vars(_exceptions()).values() if isinstance(each, type) and issubclass(each, Exception)]
    return (*own, RuntimeError, ValueError)


def system_error(error: Exception) -> str | None:
    """Return what the system said, where that is what an exception of onnxruntime, or of the system itself, is about."""
    found = SYSTEM_ERROR.search(str(error))
    if found:
        return os.strerror(int(found[1])).lower()
    return (error.strerror or str(error)).lower() if isinstance(error, OSError) else None


def says_invalid(error: Exception) -> bool:
    """Say whether onnxruntime calls a model invalid, and not only one that it cannot run."""
    state = _exceptions()
    return isinstance(error, (state.InvalidGraph, state.Fail, state.InvalidProtobuf)) and "opset" not in str(error).lower()


def _utf8(path: str | os.PathLike[str]) -> str:
    text = utf8_path(path)
    if text is None:
        raise StorageError(f"Cannot open {str(path)!r} in onnxruntime: its name is not UTF-8")
    return text


def session(
    model: bytes | str,
    folder: str | os.PathLike[str] | None = None,
    threads: int = 0,
    optimize: bool = False,
    profile: str | os.PathLike[str] | None = None,
    shares_arena: bool = False,
) -> OpenSession:
    """Return an onnxruntime session of a model.

    Parameters
    ----------
    model : bytes or str
        The model, or its path.
    folder : path, optional
        Where the external data of a model given as bytes lies.
    threads : int
        Threads of one operator; 0 leaves the number to onnxruntime.
    optimize : bool
        Run with onnxruntime's graph optimizer; without it every node is run as the model has it.
    profile : path, optional
        The path that the names of profile files begin with; None records no profile.
    shares_arena : bool
        Take memory for activations from one arena of this process, together with all such sessions.

    Raises
    ------
    FastbnError
        onnxruntime is not installed.
    StorageError
        A path is not UTF-8, or the system gives an error for the model file or a data file.
    """
    runtime = _runtime()
    if isinstance(model, str):
        model = _utf8(model)
    options = runtime.SessionOptions()
    options.log_severity_level = FATAL
    options.intra_op_num_threads = threads
    if not optimize:
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.disable_prepacking", "1")
        # With a memory pattern, the second run allocates one more block, as large as all that the first run took.
        options.enable_mem_pattern = False
    if shares_arena:
        _register_arena()
        options.add_session_config_entry("session.use_env_allocators", "1")
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", _utf8(folder))

    def make() -> OpenSession:
        # Without its fallback, which prints before it tries the same provider once more.
        made: OpenSession = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"], enable_fallback=0)
        return made

    return _opened(make, model, folder)


def _opened(make: Callable[[], OpenSession], model: bytes | str, folder: str | os.PathLike[str] | None) -> OpenSession:
    """Return what `make` makes of a model; an error of the system becomes a StorageError."""
    try:
        return make()
    except runtime_errors() as error:
        reason = system_error(error)
        if reason is not None:
            place = os.path.dirname(model) if isinstance(model, str) else folder
            is_data = not isinstance(model, str) or str(error).startswith("SystemError")
            what = f"a data file in '{place}'" if is_data else f"'{model!s}'"
            raise StorageError(f"Cannot use {what}: {reason}") from error
        if not isinstance(model, str) or not isinstance(error, _exceptions().InvalidProtobuf):
            raise
    # Where it cannot read a file to its end, it says that the file is no model.
    try:
        with open(model, "rb") as file:
            while file.read(BLOCK):
                pass
    except OSError as error:
        raise os_error(error, model) from error
    return make()


@dataclass
class Runnable:
    """A model as onnxruntime takes it: bytes or a path, and the folder of its external data."""

    model: bytes | str
    folder: str | os.PathLike[str] | None = None

    @classmethod
    def of(cls, source: Source) -> Runnable:
        """Return the Runnable of a storage.Source."""
        if source.path is None:
            return cls(serialize(source.proto, source.name))
        if utf8_path(source.path) is not None and not source.is_edited:
            return cls(str(source.path), source.path.parent)
        return cls(source.to_bytes(), _utf8(source.path.parent) if source.data_files() else None)

    def session(self) -> Session:
        """Return an onnxruntime session of the model, its optimizer off."""
        return session(self.model, self.folder if isinstance(self.model, bytes) else None)

    def proto(self) -> onnx.ModelProto:
        """Return the model without the values of its external tensors."""
        if isinstance(self.model, bytes):
            proto: onnx.ModelProto = onnx.ModelProto.FromString(self.model)
            return proto
        return onnx.load(self.model, load_external_data=False)

    def with_proto(self, proto: onnx.ModelProto) -> Runnable:
        """Return another model whose external data lie where this one's do."""
        return Runnable(serialize(proto, "the model"), self.folder)


class Runner:
    """One live session of a model, opened when it is first needed.

    Parameters
    ----------
    model : Runnable
    fresh : bool
        Open a new session for each run: operators with a random seed then give the same numbers in every run.
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

    def get_inputs(self) -> Sequence[ValueInfo]:
        """Return what onnxruntime says of the graph inputs."""
        return self.session().get_inputs()

    def get_outputs(self) -> Sequence[ValueInfo]:
        """Return what onnxruntime says of the graph outputs."""
        return self.session().get_outputs()

    def run(self, outputs: Sequence[str] | None, feed: Mapping[str, Array]) -> list[Any]:
        """Return the outputs, all of them for None."""
        if self.fresh:
            self.close()
        return self.session().run(outputs, feed)

    def close(self) -> None:
        """Give the session's memory back."""
        self._session = None

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
