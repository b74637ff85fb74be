"""Wrong bytes, by seed: files of models, mutated as protobuf fields or as plain bytes.

A mutation of a field keeps the lengths of the messages around it right, so that the faults reach the code behind the parser.
"""

from __future__ import annotations

import copy
import gzip
import random
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import onnx
from google.protobuf.descriptor import Descriptor
from onnx import GraphProto, ModelProto, helper

__all__ = ["Corpus", "mutated"]

# A file with more bytes than this is mutated whole in one case of eight, else a window of its nodes is.
LARGE = 16_000

# So many seeds, one after the other, have the same file, which is read once then.
SEEDS_OF_A_FILE = 50

# Wire types of protobuf that are read: a varint, 8 bytes, bytes with their length, 4 bytes.
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5

NUMBERS = (
    0,
    1,
    2,
    3,
    4,
    7,
    8,
    99,
    127,
    128,
    1 << 14,
    1 << 20,
    1 << 31,
    (1 << 31) - 1,
    1 << 32,
    1 << 40,
    (1 << 63) - 1,
    1 << 63,
    (1 << 64) - 1,
)
TEXTS = (
    b"",
    b"\xff\xfe",
    b"\0",
    b"x" * 70_000,
    b"BatchNormalization",
    b"Conv",
    b"If",
    b"Loop",
    b"ai.onnx",
    b"1" * 400,
    b"../x",
    b"\n",
    b"-1",
)


class Field:
    """One field of a message: its number, its wire type, and an int, bytes or the fields within."""

    __slots__ = ("number", "value", "wire")

    def __init__(self, number: int, wire: int, value: int | bytes | list[Field]) -> None:
        self.number = number
        self.wire = wire
        self.value = value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _as_varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _fields(data: bytes, kind: Descriptor | None) -> list[Field]:
    """Return the fields of a message of a valid file."""
    found, at = [], 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        value: int | bytes | list[Field]
        if wire == VARINT:
            value, at = _varint(data, at)
        elif wire == BYTES:
            size, at = _varint(data, at)
            value, at = data[at : at + size], at + size
            described = None if kind is None else kind.fields_by_number.get(number)
            if described is not None and described.message_type is not None:
                value = _fields(value, described.message_type)
        else:
            size = 8 if wire == FIXED64 else 4
            value, at = data[at : at + size], at + size
        found.append(Field(number, wire, value))
    return found


def _bytes(fields: Sequence[Field]) -> bytes:
    out = []
    for field in fields:
        out.append(_as_varint(field.number << 3 | field.wire))
        if isinstance(field.value, int):
            out.append(_as_varint(field.value))
            continue
        value = _bytes(field.value) if isinstance(field.value, list) else field.value
        out += [_as_varint(len(value)), value] if field.wire == BYTES else [value]
    return b"".join(out)


def _lists(fields: list[Field]) -> list[list[Field]]:
    """Return the lists of fields of a message and of those within."""
    found = [fields]
    for each in found:
        found.extend(field.value for field in each if isinstance(field.value, list) and field.value)
    return found


class Corpus:
    """The files that are mutated.

    Parameters
    ----------
    folders : sequence of Path
        Everything in them that ends with .onnx or .onnx.gz.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self.paths = [path for folder in folders for path in sorted(folder.rglob("*")) if path.name.endswith((".onnx", ".onnx.gz"))]
        self.bytes = lru_cache(maxsize=4)(self._read)
        self._inferred = lru_cache(maxsize=4)(self._infer)

    def _read(self, path: Path) -> bytes:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()

    def _infer(self, path: Path) -> ModelProto:
        proto: ModelProto = ModelProto.FromString(self.bytes(path))
        try:
            return onnx.shape_inference.infer_shapes(proto)
        except onnx.shape_inference.InferenceError:  # operators of other domains: windows of it have inputs without types
            return proto

    def choose(self, choose: random.Random, seed: int) -> bytes:
        """Return the bytes of the file whose turn it is, of a large one mostly a window."""
        path = self.paths[seed // SEEDS_OF_A_FILE % len(self.paths)]
        data = self.bytes(path)
        if len(data) <= LARGE or choose.random() < 1 / 8:
            return data
        return _window(choose, self._inferred(path)).SerializeToString()


def _window(choose: random.Random, proto: ModelProto) -> ModelProto:
    """Return up to a dozen nodes around a batch normalization, as a model of their own."""
    nodes = proto.graph.node
    norms = [place for place, node in enumerate(nodes) if node.op_type == "BatchNormalization"] or [0]
    place = choose.choice(norms)
    chosen = nodes[max(0, place - choose.randrange(6)) : place + choose.randint(1, 6)]
    graph = GraphProto(name="window", node=chosen)
    given = {name for node in chosen for name in node.output}
    read = {name for node in chosen for name in node.input if name} - given
    graph.initializer.extend(tensor for tensor in proto.graph.initializer if tensor.name in read)
    infos = {info.name: info for info in (*proto.graph.input, *proto.graph.value_info, *proto.graph.output)}
    for name in sorted(read - {tensor.name for tensor in graph.initializer}):
        graph.input.append(infos.get(name) or helper.make_tensor_value_info(name, 1, None))
    last = {name for node in nodes if node not in chosen for name in node.input} | {info.name for info in proto.graph.output}
    graph.output.extend(infos.get(name) or onnx.ValueInfoProto(name=name) for name in sorted(given & last) or list(chosen[-1].output))
    return ModelProto(ir_version=proto.ir_version, opset_import=proto.opset_import, graph=graph, functions=proto.functions)


def mutated(corpus: Corpus, seed: int) -> bytes:
    """Return the bytes of a model with some faults."""
    choose = random.Random(seed)
    data = corpus.choose(choose, seed)
    if choose.random() < 0.75:
        fields = _fields(data, ModelProto.DESCRIPTOR)
        for _ in range(choose.choice([1, 1, 1, 2, 3, 8])):
            choose.choice(FIELD_FAULTS)(choose, choose.choice(_lists(fields)))
        data = _bytes(fields)
    if choose.random() < 0.3:
        wrong = bytearray(data)
        for _ in range(choose.choice([1, 1, 2, 8])):
            if wrong:
                choose.choice(BYTE_FAULTS)(choose, wrong)
        data = bytes(wrong)
    return data


# ---- fields ----


def _changed(choose: random.Random, fields: list[Field]) -> None:
    """Change one value: a number, or a text, or bytes."""
    leaves = [field for field in fields if not isinstance(field.value, list)]
    if not leaves:
        return
    field = choose.choice(leaves)
    if isinstance(field.value, int):
        near = (field.value + choose.choice([-1, 1])) % (1 << 64)
        field.value = choose.choice([choose.choice(NUMBERS), near, field.value ^ 1 << choose.randrange(64)])
    elif isinstance(field.value, bytes):
        wrong = bytearray(field.value)
        if field.wire == BYTES and choose.random() < 0.4:
            wrong = bytearray(choose.choice([*TEXTS, wrong[: len(wrong) // 2], wrong + wrong]))
        elif wrong:
            for _ in range(choose.choice([1, 2, 4])):
                wrong[choose.randrange(len(wrong))] = choose.choice([0, 255, 127, 128, choose.randrange(256)])
        field.value = bytes(wrong)


def _deleted(choose: random.Random, fields: list[Field]) -> None:
    if fields:
        del fields[choose.randrange(len(fields))]


def _doubled(choose: random.Random, fields: list[Field]) -> None:
    if fields:
        fields.insert(choose.randrange(len(fields) + 1), copy.deepcopy(choose.choice(fields)))


def _swapped(choose: random.Random, fields: list[Field]) -> None:
    """Exchange the values of two fields, or their places."""
    if len(fields) < 2:
        return
    one, other = choose.sample(range(len(fields)), 2)
    if choose.random() < 0.5:
        fields[one], fields[other] = fields[other], fields[one]
    elif fields[one].wire == fields[other].wire:
        fields[one].value, fields[other].value = fields[other].value, fields[one].value


def _renumbered(choose: random.Random, fields: list[Field]) -> None:
    """Make another field of one, or one of another wire type."""
    if not fields:
        return
    field = choose.choice(fields)
    if choose.random() < 0.7:
        field.number = choose.choice([other.number for other in fields] + [1, 2, 3, 5, 20, 99, (1 << 29) - 1])
    else:
        field.wire = choose.choice([VARINT, FIXED64, BYTES, 3, 4, FIXED32, 6, 7])


def _nested(choose: random.Random, fields: list[Field]) -> None:
    """Put all fields of a message into a field of it, perhaps a few times."""
    first = [field for field in fields[: choose.randrange(3)] if not isinstance(field.value, list)]
    for _ in range(choose.choice([1, 2, 30, 110])):
        fields[:] = [*map(copy.copy, first), Field(choose.choice([1, 2, 5, 6, 7]), BYTES, list(fields))]


def _moved(choose: random.Random, fields: list[Field]) -> None:
    """Copy a field from a message within to this one, or the other way round."""
    within = choose.choice(_lists(fields))
    if within and fields and within is not fields:
        source, target = choose.choice([(within, fields), (fields, within)])
        field = choose.choice(source)
        if not isinstance(field.value, list):  # a message within itself has no end
            target.insert(choose.randrange(len(target) + 1), copy.copy(field))


FIELD_FAULTS: list[Callable[[random.Random, list[Field]], None]] = [
    *(_changed, _changed, _changed, _changed, _changed, _deleted, _deleted, _doubled, _swapped, _swapped, _renumbered, _nested, _moved),
]


# ---- bytes ----


def _flipped(choose: random.Random, data: bytearray) -> None:
    # Mostly in the first kilobytes, where the graph is in files of most exporters.
    data[choose.randrange(min(len(data), choose.choice([4096, len(data)])))] ^= 1 << choose.randrange(8)


def _cut(choose: random.Random, data: bytearray) -> None:
    at = choose.randrange(len(data))
    del data[at : at + choose.choice([1, 2, 16, 1000])]


def _inserted(choose: random.Random, data: bytearray) -> None:
    at = choose.randrange(len(data) + 1)
    data[at:at] = choose.choice([choose.randbytes(choose.choice([1, 4, 40])), bytes(data[: choose.choice([8, 300])]), b"\xff" * 10])


def _truncated(choose: random.Random, data: bytearray) -> None:
    del data[choose.randrange(len(data)) :]


BYTE_FAULTS: list[Callable[[random.Random, bytearray], None]] = [_flipped, _flipped, _flipped, _cut, _inserted, _truncated]
