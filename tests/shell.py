"""What tests of the command share: a terminal, what lies in a folder, and a deployment whose stages lose what a test says."""

import io
import json
from pathlib import Path

import numpy as np
from sketch import classifier, normal

from fastbn.cli import main
from fastbn.deployment import pipeline, stages
from fastbn.graph.timing import Timings


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
    monkeypatch.setattr(stages, "drop_of", lambda found, metric: next(rest))


def weighing(monkeypatch, **megabytes):
    """Let stages take this memory, without a process that measures it; stages that are not named, none that anybody knows."""
    monkeypatch.setattr(stages, "resident_mb", lambda paths: {name: [megabytes[name]] * 5 for name in paths if name in megabytes})


def taking(monkeypatch, spread=0.001, **parts):
    """Let the stages of the next deployments take these parts of a millisecond on 1 and on 2 threads, give or take `spread` from round to
    round: recorded measurements, so that no test depends on how long anything takes."""

    def timed(models, feed, runs, seed, tell):
        tell("run 1 of 1, 1 thread")
        noise = np.random.default_rng(0)
        rounds = [{name: parts[name] * np.exp(spread * noise.standard_normal((3, 2))) for name in models} for _ in range(10)]
        return [Timings(1, rounds, seed), Timings(2, rounds, seed)]

    monkeypatch.setattr(pipeline, "timed", timed)


def fails(capsys, *arguments):
    """Run the command, demand exit code 2, one line and nothing new; return the line."""
    before = files(Path())
    assert main([*arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert files(Path()) == before
    return err


def quick(monkeypatch):
    """Let deployments measure neither memory, which takes a process each time, nor latency: int8 is faster, the fold as fast."""
    weighing(monkeypatch)
    taking(monkeypatch, original=1, folded=1, quantized=0.5)


def classifier_folder(folder, monkeypatch):
    """Make a folder the working one, with in.onnx (a classifier) and data.npz; memory and latency are recorded ones: int8 is faster."""
    monkeypatch.chdir(folder)
    weighing(monkeypatch, original=12.5, folded=12.5, quantized=12.5)
    taking(monkeypatch, original=1, folded=1, quantized=0.5)
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
