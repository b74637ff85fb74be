"""What all tests share: which fastbn is under test, and where the real models lie."""

import os
import signal
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# `python -m pytest` puts the source tree first on the path; unless the extension was built in place, that would hide the installed package.
if not any((ROOT / "fastbn").glob("_native.*.so")) and not any((ROOT / "fastbn").glob("_native.*.pyd")):
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]


@pytest.fixture(scope="session")
def environment():
    """The environment of a subprocess that imports the same fastbn as the tests do."""
    import fastbn

    # The safe path keeps the current folder, which may be the source tree, off the path.
    own = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return {**own, "PYTHONPATH": str(Path(fastbn.__file__).resolve().parents[1]), "PYTHONSAFEPATH": "1"}


# A shell starts what it runs in the background with interrupts ignored, and children inherit that: tests send them.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# And nohup ignores this one.
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def small_cnn():
    """Path of the sample model that ships."""
    return ROOT / "tests" / "models" / "small_cnn.onnx"
