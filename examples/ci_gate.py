"""A gate for CI: deploy a model, and fail unless it kept its accuracy, folded completely and is small enough.

python examples/ci_gate.py [MODEL.onnx DATA.npz]
"""

import sys
from pathlib import Path

import fastbn

MODELS = Path(__file__).resolve().parents[1] / "tests" / "models"
MOST_BYTES = 1_000_000

model, data = sys.argv[1:] or (MODELS / "keras_digits.onnx", MODELS / "digits.npz")
made = fastbn.deploy(model, data=data, quantize=True, goal="size", max_drop=0.01, runs=20)
print(made.decision)

shipped = made.stage(made.shipped)
failures = {
    "compared on random numbers": made.to_dict()["data"]["random"],
    "a batch normalization is left": len(made.fold.kept) > 0,
    f"larger than {MOST_BYTES} bytes": shipped.size > MOST_BYTES,
}
for failure in (name for name, holds in failures.items() if holds):
    print(f"gate closed: {failure}", file=sys.stderr)
if any(failures.values()):
    raise SystemExit(1)
made.save("deployed.onnx")
print(f"gate open: {made.shipped}, {shipped.size} bytes")
