"""Kill a save at every call that changes the file system, one after the other, each in a child process; run as a script in an empty folder.

It prints one JSON object: what was saved -> (points, what was found wrong, states that were found).
"""

import functools
import itertools
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import make_models
import onnx

import fastbn
from fastbn.cli import main as command
from fastbn.graph.rewrite import writer

CALLS = ("open", "mkdir", "rmdir", "link", "unlink", "rename", "replace", "fsync", "chmod", "chown", "pwrite", "close")


def killed_at(point, job):
    """Run a job in a child that is killed before its call number `point`; return whether it was."""
    child = os.fork()
    if child == 0:
        count = itertools.count()

        def deadly(call):
            @functools.wraps(call)
            def counted(*arguments, **options):
                if next(count) == point:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*arguments, **options)

            return counted

        for name in CALLS:
            setattr(os, name, deadly(getattr(os, name)))
        try:
            job()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def weights(out):
    """Return the weights that a model reads, or the reason why it cannot be read."""
    try:
        return b"".join(tensor.raw_data for tensor in onnx.load(out).graph.initializer)
    except Exception as error:
        return repr(error)


def data_of(out):
    """Return the names of the data files of a model."""
    proto = onnx.load(out, load_external_data=False)
    return {entry.value for tensor in proto.graph.initializer for entry in tensor.external_data if entry.key == "location"}


def check(folder, job, out, stays):
    """Kill a job that writes `out` at each point; afterwards there is the model, its data, what `stays` names, and nothing else."""
    faults, states = [], set()
    old = weights(out)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    linked = [path.name for path in folder.iterdir() if path != out and out.exists() and path.samefile(out)]
    job()
    new = weights(out)
    for point in itertools.count():
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name, data in before.items():
            (folder / name).write_bytes(data)
        for name in linked:
            (folder / name).unlink()
            os.link(out, folder / name)
        killed = killed_at(point, job)
        found = weights(out)
        states.add("old" if found == old else "new" if found == new else "neither")
        if found not in (old, new):
            faults.append([point, str(found)[:200]])
        job()
        left = {path.name for path in folder.iterdir()}
        if weights(out) != new or left != {*stays, out.name, *data_of(out)}:
            faults.append([point, f"then {sorted(left)}, new: {weights(out) == new}"])
        if not killed:
            return point, faults, sorted(states)


def several(folder):
    """Make large.onnx with a data file for each weight; return its path."""
    path = make_models.large(folder, layers=3, channels=8)
    proto = onnx.load(path)
    for tensor in (each for each in proto.graph.initializer if each.name.endswith("conv.weight")):
        onnx.external_data_helper.set_external_data(tensor, f"{tensor.name}.data")
    onnx.save(proto, path)
    (folder / "large.onnx.data").unlink()
    return path


def main():
    os.fsync = lambda descriptor: None  # a kill loses nothing that the system has
    writer.LARGEST_INLINE = 0
    here = Path.cwd()
    for name in ("in", "parts", "old", "fresh", "many", "same", "own", "inline", "linked", "reported"):
        (here / name).mkdir()
    model = make_models.large(here / "in", layers=2, channels=8)
    part = fastbn.fold(model, verify=False, only="*0*")
    for folder in ("old", "own", "linked", "reported"):
        part.save(here / folder / "out.onnx")
    os.link(here / "linked" / "out.onnx", here / "linked" / "other.onnx")
    onnx.save(onnx.load(model), here / "inline" / "out.onnx")
    shutil.copytree(here / "in", here / "same", dirs_exist_ok=True)
    (here / "same" / "large.onnx").rename(here / "same" / "out.onnx")

    def saving(source, out):
        return lambda: fastbn.fold(source, verify=False).save(out)

    def reporting(source, out):
        return lambda: command(["fold", str(source), str(out), "-q", "--no-verify", "--json", str(out.parent / "report.json")])

    runs = {
        "new": ("fresh", saving, model, ()),
        "replaced": ("old", saving, model, ()),
        "of several data files": ("many", saving, several(here / "parts"), ()),
        "with a report": ("reported", reporting, model, ("report.json",)),
        "in place": ("own", saving, None, ()),
        "in place, in one file": ("inline", saving, None, ()),
        "in place, hard linked": ("linked", saving, None, ("other.onnx", "out.onnx.data")),
        "in place, another's data": ("same", saving, None, ("large.onnx.data",)),
    }
    report = {}
    for name, (folder, job, source, stays) in runs.items():
        out = here / folder / "out.onnx"
        report[name] = check(out.parent, job(source or out, out), out, stays)
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
