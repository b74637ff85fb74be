"""What a type checker tells the users of the ONNX wing."""

from pathlib import Path
from typing import Literal, assert_type

import onnx

import fastbn
from fastbn.graph.reasons import REASONS

result = fastbn.fold("in.onnx", only=["layer*"], skip="head", input_shapes={"x": [1, 3, 224, 224]}, progress=print, workdir=Path("."))
assert_type(result, fastbn.FoldResult)
assert_type(result.model, onnx.ModelProto)
assert_type(result.to_bytes(), bytes)
assert_type(result.save("out.onnx"), list[Path])
assert_type(result.folded, list[fastbn.Fold])
assert_type(result.folded[0].error, float | None)
assert_type(result.kept, list[fastbn.Kept])
assert_type(REASONS[result.kept[0].code], str)
assert_type(result.to_dict()["folded"][0]["ops"], tuple[str, ...])
assert_type(result.lines(), list[str])

parity = fastbn.verify(onnx.ModelProto(), b"", input_shapes={"x": (1, 3)}, seed=1)
assert_type(parity, fastbn.Parity)
assert_type(parity.status, Literal["ok", "failed", "inconclusive", "not-run"])
assert_type(parity.ok, bool)
assert_type(parity.index, tuple[int, ...])
if parity.values:
    before, after = parity.values
    assert_type(before, float)
maybe = result.parity
assert_type(maybe, fastbn.Parity | None)
