"""Models that other libraries hold in memory, as messages: those of onnx_ir, and what torch.onnx.export returns."""

from __future__ import annotations

from typing import Any, Protocol

from onnx import ModelProto, TensorProto

from fastbn.errors import ModelError
from fastbn.graph.model.external import external_tensors

__all__ = ["Program", "TensorGraph", "proto_of"]


class TensorGraph(Protocol):
    """An `onnx_ir.Model`, as far as its type is looked at."""

    @property
    def ir_version(self) -> int:
        """The version of the format."""
        ...

    @property
    def graph(self) -> Any:  # Any: a graph of a library that need not be installed
        """The graph."""
        ...


class Program(Protocol):
    """A `torch.onnx.ONNXProgram`, as far as its type is looked at."""

    @property
    def model(self) -> Any:  # Any: an onnx_ir.Model
        """The model."""
        ...


def proto_of(model: Any) -> ModelProto | None:  # Any: whatever a caller gives
    """Return a new message with all tensors inside of an onnx_ir.Model or a torch.onnx.ONNXProgram, None of anything else.

    Raises
    ------
    ModelError
        A model that no message holds, such as one above 2 GB, or one that its library cannot write.
    """
    package = type(model).__module__.split(".")[0]
    if package == "torch" and type(model).__name__ == "ONNXProgram":
        model, package = model.model, "onnx_ir"
    if package != "onnx_ir" or type(model).__name__ != "Model":
        return None
    import onnx_ir

    try:
        proto: ModelProto = onnx_ir.to_proto(model)
        tensors = [value.const_value for graph in model.graphs() for value in graph.initializers.values()]
        # The place of a tensor's values, as its message gives it -> the tensor.
        places = {(str(each.location), each.offset): each for each in tensors if isinstance(each, onnx_ir.ExternalTensor)}
        for tensor in external_tensors(proto):  # whose messages know no folder to look in
            entries = {entry.key: entry.value for entry in tensor.external_data}
            values = places[entries["location"], int(entries["offset"]) if "offset" in entries else None]
            tensor.ClearField("external_data")
            tensor.data_location = TensorProto.DEFAULT
            tensor.raw_data = values.tobytes()
        if proto.ByteSize() >= 1 << 31:
            raise ModelError("it has more than 2 GB")
    except Exception as error:  # whatever protobuf, onnx_ir and the tensors of a framework raise
        raise ModelError(f"Cannot take the model of onnx_ir: {error or type(error).__name__}; save it and give the path") from error
    return proto
