"""What tests of the command share: a terminal, what lies in a folder, and a deployment whose stages lose what a test says."""

import io
import json
from pathlib import Path

import numpy as np
from sketch import classifier, normal

from fastbn.cli import main
from fastbn.deployment import pipeline


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


def files(folder):
    """Return the names of what lies in a folder, sorted."""
    return sorted(path.name for path in folder.iterdir())


def losing(monkeypatch, *losses):
    """Let the stages of the next deployments lose this much, one after the other."""
    rest = iter(losses)
    monkeypatch.setattr(pipeline, "drop_of", lambda found, metric: next(rest))


def fails(capsys, *arguments):
    """Run the command, demand exit code 2, one line and nothing new; return the line."""
    before = files(Path())
    assert main([*arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert files(Path()) == before
    return err


def classifier_folder(folder, monkeypatch):
    """Make a folder the working one, with in.onnx (a classifier) and data.npz; memory is not measured, which takes a process each time."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(pipeline, "resident_mb", lambda path: 12.5)
    (folder / "in.onnx").write_bytes(classifier().SerializeToString())
    np.savez(folder / "data.npz", x=normal(16, 3, 8, 8))
    return folder


def deploy(*options, code=0):
    """Deploy in.onnx to out.onnx by the command, and demand an exit code."""
    assert main(["deploy", "in.onnx", "out.onnx", "--runs", "2", *options]) == code


def as_json(capsys, *options, code=0):
    """Deploy, and return the JSON report."""
    deploy(*options, "--json", "-", code=code)
    return json.loads(capsys.readouterr().out)
