"""What a type checker tells the users of the graph functions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, assert_type

import numpy as np
import onnx

import fastbn
from fastbn.graph.reasons import REASONS

model = onnx.ModelProto()

result = fastbn.fold("in.onnx")
assert_type(result, fastbn.FoldResult)
assert_type(fastbn.fold(Path("in.onnx"), only="bn*", skip=["a", "b"], verify=False), fastbn.FoldResult)
assert_type(fastbn.fold(b"model", input_shapes={"x": (1, 3, 224, 224)}, freeze_inputs=True, seed=1), fastbn.FoldResult)
assert_type(fastbn.fold(model, progress=print, workdir=Path("folder")), fastbn.FoldResult)
assert_type(result.folded, list[fastbn.Fold])
assert_type(result.kept, list[fastbn.Kept])
assert_type(result.parity, fastbn.Parity | None)
assert_type(result.notes, tuple[str, ...])
assert_type(result.model, onnx.ModelProto)
assert_type(result.to_bytes(), bytes)
assert_type(result.save("out.onnx"), list[Path])
assert_type(result.lines(), list[str])
assert_type(result.to_dict()["folded"][0]["ops"], tuple[str, ...])
assert_type(result.to_dict()["batch_normalizations"]["after"], int)

for fold in result.folded:
    assert_type(fold.into, str)
    assert_type(fold.ops, tuple[str, ...])
    assert_type(fold.error, float | None)
for kept in result.kept:
    assert_type(REASONS[kept.code], str)
    # The codes of reasons are a closed set.
    if kept.code == "training" or kept.code == "other-readers":
        assert_type(kept.reason, str)

parity = fastbn.verify("in.onnx", model, input_shapes={"x": [1, 3]}, seed=2, progress=print)
assert_type(parity, fastbn.Parity)
assert_type(parity.status, Literal["ok", "failed", "inconclusive", "not-run"])
assert_type(parity.ok, bool)
assert_type(parity.error, float | None)
assert_type(parity.index, tuple[int, ...])
if parity.values:
    before, after = parity.values
    assert_type(before, float)

deployment = fastbn.deploy("in.onnx", "out.onnx", data="samples.npz", quantize=True, report="report.html", force=True)
assert_type(deployment, fastbn.Deployment)
x = np.ones((8, 3, 4, 4), np.float32)
for data in (x, {"x": x}, [{"x": x}, {"x": x}]):
    fastbn.deploy(model, data=data, metric="error", max_drop=0.1)
assert_type(fastbn.deploy("in.onnx", metric="top-1", runs=5, most_samples=9, min_samples=3, quantize_timeout=60), fastbn.Deployment)


def show(number: int, total: int, step: str, detail: str) -> None:
    """Show what is being done."""


fastbn.deploy("in.onnx", progress=show, workdir="folder", only="bn", skip=None, input_shapes=None, freeze_inputs=False, seed=0)
assert_type(deployment.fold, fastbn.FoldResult)
assert_type(deployment.shipped, Literal["original", "folded", "quantized"] | None)
assert_type(deployment.status, Literal["done", "partial", "unverified", "refused"])
assert_type(deployment.decision, str)
assert_type(deployment.warnings, tuple[str, ...])
assert_type(deployment.metric, Literal["top-1", "error", "accuracy"])
assert_type(deployment.save("out.onnx"), list[Path])
deployment.save_report(Path("report.html"))
for row in deployment.latency:
    assert_type(row["median_ms"], float)
stage = deployment.stage("folded")
if stage is not None:
    assert_type(stage.name, Literal["original", "folded", "quantized"])
    assert_type(stage.drop, float | None)
    assert_type([agreement.top1 for agreement in stage.agreements], list[float | None])
if deployment.samples is not None:
    assert_type(deployment.samples.rows, int)
names: Sequence[str] = [stage.name for stage in deployment.stages]
