"""What tests run on workers of a cluster, and how they start one: workers import this file."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

__all__ = ["Scheduler", "deadly", "executed", "forget_runtime", "set_version", "wait_until"]


def executed(dask_worker):
    """How many tasks a worker has done."""
    return dask_worker.state.executed_count


def deadly(item):
    """A mapping of data that ends its worker."""
    os.kill(os.getpid(), signal.SIGKILL)
    return item


def set_version(version):
    """Let this worker have another version of fastbn; return the one that it had."""
    import fastbn

    before, fastbn.__version__ = fastbn.__version__, version
    return before


def forget_runtime(forget):
    """Let this worker have no onnxruntime, or have it again."""
    for name in ("onnxruntime", "onnxruntime.capi"):
        if forget:
            sys.modules[name] = None
        else:
            del sys.modules[name]


def wait_until(holds, seconds=30):
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come about in time"
        time.sleep(0.02)


class Scheduler:
    """A scheduler and workers, each a process of its own, on loopback; all are gone when the block ends."""

    def __init__(self, folder, environment):
        self.file = Path(folder) / "scheduler.json"
        self.environment = {**environment, "PYTHONWARNINGS": "ignore"}
        self.folder = folder
        self._stack = contextlib.ExitStack()
        self.workers = []

    def __enter__(self):
        self._start(
            "scheduler",
            "--host",
            "127.0.0.1",
            "--port",
            "0",
            "--dashboard-address",
            "127.0.0.1:0",
            "--no-show",
            "--scheduler-file",
            str(self.file),
        )
        wait_until(lambda: self.file.exists() and self.file.stat().st_size > 0)
        wait_until(self._is_whole)
        self.address = json.loads(self.file.read_text(encoding="utf-8"))["address"]
        return self

    def _is_whole(self):
        with contextlib.suppress(ValueError):
            return bool(json.loads(self.file.read_text(encoding="utf-8")))
        return False

    def add_worker(self):
        """Start one more worker, without a nanny: once it is killed it is gone."""
        options = ["--host", "127.0.0.1", "--nthreads", "1", "--no-nanny", "--no-dashboard", "--local-directory", str(self.folder)]
        self.workers.append(self._start("worker", self.address, *options))

    def _start(self, what, *options):
        command = [sys.executable, "-m", "dask", what, *options]
        process = subprocess.Popen(command, env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)
        return process

    def __exit__(self, *error):
        self._stack.close()
