"""fastbn/schemas: what the types say, and what each command really writes."""

import copy
import json

import make_schemas
import pytest
from shell import classifier_folder
from sketch import conv_bn, model, norm

from fastbn.cli import COMMANDS, main

STUCK = "(float[N,3,8,8] x) => (float[N,3,8,8] y) { a = Tanh(x) b = BatchNormalization(a, s, t, m, v) y = Tanh(b) }"

# Command -> lines whose reports have all that a report may have.
LINES = {
    "fold": [
        ["stuck.onnx", "out.onnx", "--explain", "*", "--as-inference"],
        ["stuck.onnx", "out.onnx", "--rewrite-left", "affine", "--force"],
        ["in.onnx", "--dry-run"],
    ],
    "deploy": [
        ["in.onnx", "deployed.onnx", "--data", "data.npz", "--quantize", "--max-drop", "0.25", "--runs", "9"],
        ["in.onnx", "deployed.onnx", "--quantize", "--data-free", "--max-drop", "1", "--runs", "9"],
    ],
    "reestimate": [["in.onnx", "new.onnx", "--data", "data.npz", "--workers", "0"]],
    "fold-all": [["in.onnx", "broken.onnx", "--out", "zoo", "--workers", "2", "-q"]],
    "verify": [["in.onnx", "in.onnx"], ["in.onnx", "other.onnx"]],
    "bench": [["in.onnx", "--runs", "2"], ["in.onnx", "--runs", "9"]],
    "bench-kernels": [["2,3,4", "--seconds", "0.001"]],
    "show-config": [[]],
}


def schema_of(command):
    return json.loads((make_schemas.FOLDER / f"{command}.schema.json").read_text(encoding="utf-8"))


def objects_in(schema):
    """Yield (name, schema) of every object with fields."""
    yield schema["title"], schema
    yield from ((name, each) for name, each in schema["$defs"].items() if "properties" in each)


def test_every_command_has_a_schema():
    assert list(make_schemas.REPORTS) == list(LINES)
    assert set(LINES) == set(COMMANDS)
    assert {path.name for path in make_schemas.FOLDER.iterdir()} == {f"{command}.schema.json" for command in LINES}


@pytest.mark.parametrize("command", LINES)
def test_a_schema_is_what_the_types_say(command):
    """`python tools/make_schemas.py` writes them anew."""
    assert make_schemas.made(command) == (make_schemas.FOLDER / f"{command}.schema.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("command", LINES)
def test_every_field_is_described(command):
    missing = [
        f"{name}.{field}"
        for name, each in objects_in(schema_of(command))
        for field, what in each["properties"].items()
        if not what.get("description")
    ]
    assert missing == []


@pytest.fixture(name="reports")
def _reports(tmp_path, monkeypatch, capsys):
    """Return the reports of a command, each of its lines run in a folder with models and data."""
    classifier_folder(tmp_path, monkeypatch)
    (tmp_path / "stuck.onnx").write_bytes(model(STUCK, **norm(3)).SerializeToString())
    (tmp_path / "other.onnx").write_bytes(conv_bn().SerializeToString())
    (tmp_path / "broken.onnx").write_text("no model")

    def run(command):
        for line in LINES[command]:
            assert main([command, *line, "--json", "-"]) in (0, 1, 2, 4)
            out = capsys.readouterr().out
            yield from map(json.loads, out.splitlines() if command == "fold-all" else [out])

    return run


@pytest.mark.parametrize("command", LINES)
def test_a_report_has_these_fields_and_no_others(command, reports):
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed: the extra [test] brings it")
    schema = schema_of(command)
    jsonschema.Draft202012Validator.check_schema(schema)
    strict = copy.deepcopy(schema)
    for _, each in objects_in(strict):
        each["additionalProperties"] = False
    count = 0
    for count, report in enumerate(reports(command), 1):  # noqa: B007
        jsonschema.validate(report, strict)
    assert count >= len(LINES[command])
    report.popitem()
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(report, schema)
