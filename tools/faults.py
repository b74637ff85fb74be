#!/usr/bin/env python3
"""Let every call to the system that changes files fail, or be the last one, while models are written; then look at what lies there.

    python tools/faults.py FOLDER                             every fault in every place, some thousand runs
    python tools/faults.py FOLDER --only kill --every 3       a part of it

FOLDER is made. Each run is a child of this process under strace, which is needed. Whatever happens: the model that stands at OUT is the old
one or the new one, as a whole, and onnxruntime runs it; the other files are as they were; the next run removes what a killed one left; an
error is one line and exit code 2, an interrupt exit code 130.
"""

import argparse
import atexit
import collections
import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import make_models
import numpy as np
import onnx

import fastbn
from fastbn.cli import main as command
from fastbn.deployment import stages
from fastbn.graph.rewrite import writer

# What changes files, and what makes sure that they are on the disk.
CHANGING = "write,pwrite64,rename,link,unlink,unlinkat,mkdir,rmdir,ftruncate,chmod,fchmod,fchmodat,chown,fsync,close,flock"
ENDING = "fsync,rename,link,close"
WRITING = "write,pwrite64,ftruncate,openat,mkdir"

# Name -> what strace injects at call number N of each thread, and whether all later calls of the kind get it too.
FAULTS = {
    "kill": (f"{CHANGING}:signal=KILL", False),
    "interrupt": (f"{CHANGING}:signal=INT", False),
    "terminate": (f"{CHANGING}:signal=TERM", False),
    "hang up": (f"{CHANGING}:signal=HUP", False),
    "disk full": (f"{WRITING},fsync:error=ENOSPC", True),
    "quota": (f"{WRITING}:error=EDQUOT", True),
    "input or output error": (f"{WRITING},{ENDING}:error=EIO", False),
    "read-only": (f"{WRITING},rename,link,unlink,rmdir:error=EROFS", True),
}
SIGNALS = {"interrupt", "terminate", "hang up"}

# What strace writes where it has injected a fault.
HIT = re.compile(r"INJECTED|--- SIG(INT|TERM|HUP) |killed by SIGKILL")

# The most calls of one kind that a run is expected to make.
MOST = 2000

# A run that takes longer hangs, and is ended by SIGALRM.
MOST_SECONDS = 300


class Place:
    """A folder with a model, a command that writes into it, and what may stand there afterwards."""

    def __init__(self, folder, name, line, out, make):
        self.folder = folder / name
        self.name, self.line, self.out = name, line, out
        self.folder.mkdir(parents=True)
        make(self.folder)
        self.before = contents(self.folder)
        self.old = self.state()
        assert self.run()[0] == 0, self.said
        self.new = self.state()
        self.after = self.names()
        assert self.old != self.new, name

    def restore(self):
        """Bring the folder back to where it was."""
        for path in self.folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name, (data, _) in self.before.items():
            (self.folder / name).write_bytes(data)
        for name, (_, other) in self.before.items():
            if other:
                (self.folder / name).unlink()
                os.link(self.folder / other, self.folder / name)

    def state(self):
        """Return the weights of the model at OUT, and what onnxruntime makes of it; None where there is none."""
        path = self.folder / self.out
        if not path.exists():
            return None
        import onnxruntime  # after the command has turned its telemetry off, which writes files too

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        x = session.get_inputs()[0]
        feed = np.linspace(-1, 1, int(np.prod([size if isinstance(size, int) else 1 for size in x.shape])), dtype=np.float32)
        y = session.run(None, {x.name: feed.reshape([size if isinstance(size, int) else 1 for size in x.shape])})[0]
        weights = b"".join(tensor.raw_data for tensor in onnx.load(path).graph.initializer)
        return weights, y.tobytes()

    def state_or_none(self):
        """Return the same, None where the model cannot be run."""
        with contextlib.suppress(Exception):
            return self.state()
        return None

    def run(self, injection=None, seconds=None):
        """Run the command in a child, which is killed after some seconds; return (exit code, whether strace has injected something)."""
        said, log = self.folder.parent / "said", self.folder.parent / "log"
        (ready, go), (begun, begin) = os.pipe(), os.pipe()
        streams = os.open(os.devnull, os.O_WRONLY), os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        child = os.fork()
        if child == 0:
            os.close(go)
            os.chdir(self.folder)
            for number, stream in enumerate(streams, 1):
                os.dup2(stream, number)
            signal.alarm(MOST_SECONDS)
            os.write(begin, b"!")  # strace comes after all that is not the command's
            os.read(ready, 1)
            code = 99
            with contextlib.suppress(BaseException):
                code = command(self.line)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # all is done
                signal.signal(number, signal.SIG_IGN)
            atexit._run_exitfuncs()
            os._exit(code)
        os.read(begun, 1)
        for stream in (ready, begun, begin, *streams):
            os.close(stream)
        tracer = None
        if injection:
            kinds = injection.split(":")[0]
            tracer = subprocess.Popen(
                ["strace", "-f", "-qq", "-o", log, "-e", f"trace={kinds}", "-e", f"inject={injection}", "-p", str(child)],
                stderr=subprocess.DEVNULL,
            )
            while "TracerPid:\t0" in Path(f"/proc/{child}/status").read_text(encoding="utf-8"):
                time.sleep(0.001)
        os.close(go)
        if seconds is not None:
            time.sleep(seconds)
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if tracer:
            tracer.wait()
        self.said = said.read_text(encoding="utf-8", errors="replace")
        hit = tracer is not None and HIT.search(log.read_text(errors="replace")) is not None
        return os.waitstatus_to_exitcode(status), hit

    def faults(self, fault, code):
        """Return what is wrong after a run into which a fault was injected."""
        found = []
        try:
            state = self.state()
        except Exception as error:
            return [f"the model cannot be run: {error}"]
        if state not in (self.old, self.new) and not (fault == "input or output error" and self.is_like_new(state)):
            found.append("the model is neither the old one nor the new one")
        for name, (data, _) in self.before.items():
            if name not in self.replaced() and (not (self.folder / name).exists() or (self.folder / name).read_bytes() != data):
                found.append(f"{name} is another one")
        if "Traceback" in self.said or self.said.count("\n") > 1 or (self.said and not self.said.startswith("fastbn: ")):
            found.append(f"says {self.said!r}")
        # Where onnxruntime cannot read the original, nothing is verified: 5.
        codes = {"kill": (-signal.SIGKILL, 0), **dict.fromkeys(SIGNALS, (130, 0))}.get(fault, (0, 2, 5))
        if code not in codes:
            found.append(f"exit code {code}: {self.said!r}")
        if code in (2, 130):
            wrote = "is written" in self.said
            if wrote != (state == self.new):
                found.append(f"says {self.said!r}, and the model is the {'new' if state == self.new else 'old'} one")
        left = [path.name for path in self.folder.iterdir() if path.name.startswith(".fastbn-")]
        if left and fault in SIGNALS:
            found.append(f"leaves {left}")
        if self.run()[0] != 0:
            found.append(f"the next run fails: {self.said!r}")
        elif self.state() != self.new or self.names() != self.after:
            found.append(f"the next run leaves {sorted(contents(self.folder))}, not {sorted(self.after)}")
        return found

    def is_like_new(self, state):
        """Say whether a model computes the same as the new one: a fold of which onnxruntime could not read a file has been left out."""
        if state is None or self.new is None:
            return False
        return np.allclose(*(np.frombuffer(each[1], np.float32) for each in (state, self.new)), rtol=1e-3, atol=1e-4)

    def names(self):
        """Return the names of all files; data files that a model reads are alike, whatever their numbers."""
        read = set()
        for path in self.folder.glob("*.onnx"):
            tensors = onnx.load(path, load_external_data=False).graph.initializer
            read |= {entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"}
        return {name for name in contents(self.folder) if name not in read} | {f"{len(read)} data files"}

    def replaced(self):
        """Return the names of the files that the command may replace or remove."""
        own = {self.out} | {name for name in self.before if name.startswith(self.out) and name.endswith(".data")}
        return own | {"report.json", "page.html"}


def contents(folder):
    """Return name -> (bytes, another name of the same file or None) of the files of a folder."""
    found, names = {}, {}
    for path in sorted(folder.iterdir()):
        first = names.setdefault(path.lstat().st_ino, path.name)
        found[path.name] = (path.read_bytes() if path.is_file() else b"", None if first == path.name else first)
    return found


def several_files(folder):
    """Make a model whose weights lie in four data files."""
    make_models.large(folder, layers=4, channels=8)
    proto = onnx.load(folder / "large.onnx")
    for number, tensor in enumerate(each for each in proto.graph.initializer if each.name.endswith("conv.weight")):
        onnx.external_data_helper.set_external_data(tensor, f"part{number}.data")
    onnx.save(proto, folder / "large.onnx")
    (folder / "large.onnx.data").unlink()


def places(folder):
    """Return the Places in which faults are tried."""

    def external(place):
        make_models.large(place, layers=2, channels=8)

    def written_before(place):
        external(place)
        fastbn.fold(place / "large.onnx", verify=False, only="*0*").save(place / "out.onnx")

    def own_data(place):
        external(place)
        fastbn.fold(place / "large.onnx", verify=False, only="*0*").save(place / "out.onnx")
        for path in place.glob("large.*"):
            path.unlink()

    def inline(place):
        onnx.save(onnx.load(make_models.large(place, layers=2, channels=8)), place / "out.onnx")
        for path in place.glob("large.*"):
            path.unlink()

    def linked(place):
        own_data(place)
        os.link(place / "out.onnx", place / "other.onnx")

    def classifier(place):
        (place / "in.onnx").write_bytes(make_models.MODELS["small_cnn"]().SerializeToString())

    fold = ["fold", "large.onnx", "out.onnx", "-q", "--force", "--json", "report.json"]
    place = ["fold", "out.onnx", "--in-place", "-q"]
    deploy = ["deploy", "in.onnx", "out.onnx", "--runs", "1", "-q", "--force", "--report", "page.html", "--json", "report.json"]
    yield Place(folder, "a new file", fold, "out.onnx", external)
    yield Place(folder, "a file replaced", fold, "out.onnx", written_before)
    yield Place(folder, "several data files", fold, "out.onnx", several_files)
    yield Place(folder, "in place", place, "out.onnx", inline)
    yield Place(folder, "in place, with data", place, "out.onnx", own_data)
    yield Place(folder, "in place, hard linked", place, "out.onnx", linked)
    yield Place(folder, "a deployment", deploy, "out.onnx", classifier)


def warm_up(folder):
    """Load what the commands load, so that no fault comes in between."""
    (folder / "in.onnx").write_bytes(make_models.MODELS["small_cnn"]().SerializeToString())
    assert command(["deploy", str(folder / "in.onnx"), str(folder / "out.onnx"), "--runs", "1", "-q", "--report", str(folder / "p")]) == 0
    assert command(["fold", str(make_models.large(folder, layers=1, channels=8)), "-q"]) == 0


def killed_at_random(place, count):
    """Kill a command at random moments; return how often something was wrong."""
    place.restore()
    begin = time.monotonic()
    place.run()
    longest, rng = time.monotonic() - begin, np.random.default_rng(0)
    states, codes, wrong = collections.Counter(), collections.Counter(), 0
    for number in range(count):
        place.restore()
        code, _ = place.run(seconds=longest * rng.random())
        states["new" if place.state_or_none() == place.new else "old"] += 1
        codes[code] += 1
        for line in place.faults("kill", code):
            wrong += 1
            print(f"  {place.name}, random kill, {number}: {line[:600]}", flush=True)
    print(f"{place.name:24} {'random kill':24} {count:5} runs, {dict(states)}, exit codes {dict(codes)}", flush=True)
    return wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", action="append", choices=FAULTS, help="these faults only (repeatable)")
    parser.add_argument("--place", action="append", help="these places only (repeatable)")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="try every Nth call only (1)")
    parser.add_argument("--random", type=int, default=50, metavar="N", help="kill so many runs in each place at random moments too (50)")
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what is in the background with it ignored
    folder = arguments.folder.absolute()
    folder.mkdir()
    writer.LARGEST_INLINE = 0
    stages.resident_mb = lambda paths: {}  # a process each time
    warm_up(folder)
    total = wrong = 0
    for place in places(folder):
        if arguments.place and place.name not in arguments.place:
            continue
        for fault in arguments.only or FAULTS:
            kind, lasting = FAULTS[fault]
            states, codes = collections.Counter(), collections.Counter()
            # The first call of each kind is no first call of all: a run would be hit several times, also when all is done.
            for number in itertools.count(2 if fault in SIGNALS else 1, arguments.every):
                place.restore()
                code, hit = place.run(f"{kind}:when={number}{'+' if lasting else ''}")
                if not hit:
                    break
                assert number < MOST
                states["new" if place.state_or_none() == place.new else "old"] += 1
                codes[code] += 1
                for line in place.faults(fault, code):
                    wrong += 1
                    print(f"  {place.name}, {fault}, call {number}: {line[:600]}", flush=True)
            total += sum(states.values())
            print(f"{place.name:24} {fault:24} {sum(states.values()):5} runs, {dict(states)}, exit codes {dict(codes)}", flush=True)
        total += arguments.random
        wrong += killed_at_random(place, arguments.random)
    print(f"{total} runs, {wrong} faults")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
