"""Write fastbn/schemas/*.json, a JSON Schema of every report that a command writes, from the types of the package.

    python tools/make_schemas.py [--check]

The types of the reports are TypedDicts; what a field means comes from the "Attributes" of the class that it reports. Fields may be added to
a report without a new version of it, so a schema allows others.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import json
import pkgutil
import re
import sys
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints, is_typeddict

import fastbn

FOLDER = Path(__file__).resolve().parent.parent / "fastbn" / "schemas"

# Where reports come from, and what needs more than the extra [report].
SOURCES = ("fastbn.config", "fastbn.kernel_bench", "fastbn.graph", "fastbn.deployment", "fastbn.reestimation", "fastbn.zoo")
LEFT_OUT = ("fastbn.graph.olive", "fastbn.graph.passes")

PLAIN = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}

FILES = "Paths of the files that were written, the model's first."


class Report(NamedTuple):
    """What a command writes: the name of the type, fields that the command adds, and what it is."""

    kind: str
    added: dict[str, tuple[Any, str]]
    what: str


REPORTS = {
    "fold": Report("FoldReport", {"written": (list[str], FILES)}, "What `fastbn fold --json` writes."),
    "deploy": Report(
        "DeploymentFields",
        {"written": (list[str], FILES), "report": (str | None, "The path of the HTML report.")},
        "What `fastbn deploy --json` writes.",
    ),
    "reestimate": Report("ReestimationReport", {"written": (list[str], FILES)}, "What `fastbn reestimate --json` writes."),
    "fold-all": Report("Outcome", {}, "One line of what `fastbn fold-all --json` writes, and of fold-all.jsonl in the output folder."),
    "verify": Report("VerifyReport", {}, "What `fastbn verify --json` writes."),
    "bench": Report("BenchReport", {}, "What `fastbn bench --json` writes."),
    "bench-kernels": Report("KernelBenchReport", {}, "What `fastbn bench-kernels --json` writes."),
    "show-config": Report("Config", {}, "What `fastbn show-config --json` writes."),
}


def known_types() -> dict[str, Any]:
    """Return name -> class or alias of the modules that reports come from."""
    found: dict[str, Any] = {}
    for module in pkgutil.walk_packages(fastbn.__path__, "fastbn.", lambda name: None):
        if module.name.startswith(SOURCES) and module.name not in LEFT_OUT:
            found |= {name: value for name, value in vars(importlib.import_module(module.name)).items() if not name.startswith("_")}
    return found


def attributes(documented: type) -> dict[str, str]:
    """Return name -> sentence of the "Attributes" in the docstring of a class."""
    text = inspect.getdoc(documented) or ""
    section = re.search(r"^Attributes\n-+\n(.*?)(?=^\w[^\n]*\n-{3,}|\Z)", text, re.MULTILINE | re.DOTALL)
    found: dict[str, str] = {}
    for head, body in re.findall(r"^(\w[^\n]*)\n((?:[ ]+[^\n]*\n?|\n)*)", section[1] if section else "", re.MULTILINE):
        sentence = " ".join(body.split())
        found |= {name.strip(): sentence for name in head.split(" : ")[0].split(",") if sentence}
    return found


# What is said of fields that no class documents: of those of any type by this name, and of those of one type.
SAID = {
    "schema": "The version of the report: it grows when a field changes its meaning or leaves, not when one is added.",
    "model": "The name of the model's file.",
    "low": "The lower end of the 99 % interval of the ratio; null with too few runs, and for what is compared with itself.",
    "high": "The upper end of that interval.",
    "difference": "less, more, none, or unknown: what the whole interval says.",
    "ratio": "How many times as much or as long as the other it takes.",
    "threads": "Threads of the run; null where none are counted.",
    "note": "What else is to be known; null where nothing is.",
    "channels": "The channels of the batch normalization.",
    "seconds": "How long it took.",
    "bytes": "The size on disk.",
    "median_ms": "The median of the runs in milliseconds.",
    "drop": "What is lost by the metric of the deployment.",
    "relative": "||y' - y|| / ||y||, y the original's; null where it cannot be compared.",
    "sha256": "The SHA-256 of the bytes.",
    "fastbn": "Its version.",
    "onnx": "Its version; null where it is not installed.",
    "onnxruntime": "Its version; null where it is not installed.",
    "numpy": "Its version.",
    "python": "Its version.",
    "platform": "The operating system.",
    "mode": "What was estimated: population or one-pass.",
    "momentum": "The weight of the new statistics; null where they replace the old ones.",
    "unbiased": "Whether the variance was divided by n - 1.",
}
SAID_OF: dict[str, dict[str, str]] = {
    "AccuracyFields": {"accuracy": "The part of labels that is right."},
    "AgreementFields": {
        "output": "The name of the output.",
        "elements": "How many elements were compared.",
        "max_error": "The largest difference of an element.",
        "sqnr_db": "The signal-to-quantization-noise ratio in decibels.",
        "cosine": "The cosine of both outputs.",
        "rows": "Rows whose decisions were compared.",
        "top1": "The part of rows whose largest score is at the same place.",
    },
    "BenchReport": {"bench": "One row for each model on each number of threads."},
    "Change": {"before": "Of the original.", "after": "Of the folded model."},
    "ComparisonFields": {
        "stage": "The stage.",
        "against": "The stage that it is compared with.",
        "measure": "latency, size on disk or memory when loaded.",
    },
    "Config": {
        "version": "That of fastbn.",
        "isa": "The instruction set in use.",
        "isa_available": "Those that this CPU has, the best first.",
        "threads": "The most threads that a call uses.",
        "spin_microseconds": "How long a thread of the pool waits awake for the next call.",
        "machine": "The architecture.",
        "cpus": "Those that this process may use.",
    },
    "DeploymentFields": {"data": "The samples; null where nothing was measured."},
    "DigestFields": {"name": "The name of the file."},
    "EqualizationTrialFields": {"kept": "Whether the quantized model is the one with equalized layers."},
    "FoldReport": {
        "opset": "The version of ONNX's operators.",
        "ir_version": "The version of ONNX's format.",
        "nodes": "The number of nodes.",
        "batch_normalizations": "The number of BatchNormalization nodes.",
        "inference": "What --as-inference made of nodes in training mode; null without it.",
    },
    "InferenceDict": {"changed": "Nodes that are inference ones now.", "left": "Nodes that stay in training mode."},
    "KernelBenchReport": {
        "shape": "Sizes of the array.",
        "axis": "The axis of the channels, from 0 on.",
        "dtype": "The type of the array.",
        "bytes": "The size of one array; an operation has two or three of them.",
        "copy_us": "What np.copyto of the array takes, on one thread, in microseconds.",
        "timings": "One for each operation on one thread, and for those that use more on all.",
        "config": "What show-config prints.",
    },
    "Timing": {
        "operation": "inference, training or backward.",
        "reduction": "How sums visit the array; null where nothing is added up.",
        "map": "How results are written.",
        "fused": "Whether channels are mapped as soon as they are added up.",
        "store": "Whether results go around the caches.",
        "threads": "Threads that the call uses.",
        "why": "The reasons, a sentence each.",
        "us": "The 10th percentile of the calls in microseconds.",
        "copies": "The same as a multiple of the copy.",
    },
    "KernelFields": {
        "float": "Kernels that compute in float.",
        "float_ops": "How many of each operator.",
        "conversions": "Kernels that convert between float and integers.",
        "other": "Kernels that do neither: those that compute in integers, and those that move data.",
    },
    "Latency": {"model": "The name of the model or stage.", "runs": "Timed runs.", "p90_ms": "Their 90th percentile in milliseconds."},
    "LeftDict": {"node": "Its label."},
    "MovedDict": {"bn": "The label of the batch normalization."},
    "StageFields": {"outputs": "Its outputs beside the original's."},
    "StepDict": {"answer": "What the node said."},
    "TradeOffFields": {"left": "Nodes in float.", "drop": "What is lost with them by the metric of the deployment."},
    "VerifyReport": {"parity": "What came of the comparison."},
    "Versions": {"cpu": "The model of the CPU."},
}


class Maker:
    """Makes schemas of types, each TypedDict once for a report."""

    def __init__(self) -> None:
        self.names = known_types()
        self.definitions: dict[str, Any] = {}

    def schema(self, kind: Any) -> dict[str, Any]:
        """Return the schema of a type."""
        origin, arguments = get_origin(kind), get_args(kind)
        if kind in PLAIN:
            return {"type": PLAIN[kind]}
        if origin is Literal:
            return {"enum": list(arguments)}
        if origin in (Union, types.UnionType):
            return self.either(arguments)
        if origin is list or (origin is tuple and arguments[1:] == (...,)):
            return {"type": "array", "items": self.schema(arguments[0])}
        if origin is tuple or kind == tuple[()]:
            return {"type": "array", "maxItems": len(arguments), "items": self.either(dict.fromkeys(arguments))}
        if origin is dict:
            return {"type": "object", "additionalProperties": self.schema(arguments[1])}
        if is_typeddict(kind) or dataclasses.is_dataclass(kind):
            if kind.__name__ not in self.definitions:
                self.definitions[kind.__name__] = {}
                self.definitions[kind.__name__] = self.object(kind, {})
            return {"$ref": f"#/$defs/{kind.__name__}"}
        raise TypeError(f"no schema for {kind}")

    def either(self, kinds: Iterable[Any]) -> dict[str, Any]:
        """Return the schema of one of some types."""
        found = [self.schema(each) for each in kinds]
        if len(found) < 2:
            return found[0] if found else {}
        if all(set(each) == {"type"} and isinstance(each["type"], str) for each in found):
            return {"type": [each["type"] for each in found]}
        return {"anyOf": found}

    def object(self, kind: Any, added: dict[str, tuple[Any, str]]) -> dict[str, Any]:
        """Return the schema of a TypedDict or a dataclass with all its fields."""
        hints = get_type_hints(kind, localns=self.seen_by(kind))
        said = self.said_of(kind)
        properties = {}
        for name, each in {**hints, **{name: given for name, (given, _) in added.items()}}.items():
            properties[name] = self.schema(each)
            sentence = added[name][1] if name in added else said.get(name)
            if sentence:
                properties[name] = {**properties[name], "description": sentence}
        return {"type": "object", "properties": properties, "required": list(properties)}

    def seen_by(self, kind: Any) -> dict[str, Any]:
        """Return the names that the module of a type knows, and those of others, which it may import for type checkers alone."""
        return self.names | vars(sys.modules[kind.__module__])

    def said_of(self, kind: Any) -> dict[str, str]:
        """Return what is said of the fields of a type: by itself, or by the class that it reports."""
        stem = re.sub(r"(Dict|Fields|Report)$", "", kind.__name__)
        names = self.seen_by(kind)
        classes = [names.get(name) for name in (stem, f"{stem}Result", kind.__name__)]
        found = {name: text for each in classes if inspect.isclass(each) for name, text in attributes(each).items()}
        return {**found, **{name: text for name, text in SAID.items() if name not in found}, **SAID_OF.get(kind.__name__, {})}


def made(command: str) -> str:
    """Return the text of the schema of what a command writes."""
    report, maker = REPORTS[command], Maker()
    body = maker.object(maker.names[report.kind], report.added)
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": f"fastbn {command}", "description": report.what}
    return json.dumps({**head, **body, "$defs": dict(sorted(maker.definitions.items()))}, indent=1) + "\n"


def main() -> int:
    """Write the schemas, or say which ones are not as they should be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where a file is not what it should be")
    check = parser.parse_args().check
    wrong = []
    FOLDER.mkdir(exist_ok=True)
    for command in REPORTS:
        path, text = FOLDER / f"{command}.schema.json", made(command)
        if check and (not path.exists() or path.read_text(encoding="utf-8") != text):
            wrong.append(path.name)
        elif not check:
            path.write_text(text, encoding="utf-8")
    print("\n".join(f"{name} is not what the types say" for name in wrong), end="\n" if wrong else "")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
