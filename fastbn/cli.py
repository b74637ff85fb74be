"""The command: its words read, its command run, in a process of limits where these are asked for, and one line for each error.

Exit codes are those of commands.py, 70 for an unexpected fault and 130 where it was interrupted. With --limits, work that takes more than
it may, or crashes, gives 2 where nothing was written.
"""

from __future__ import annotations

import gc
import importlib
import os
import shlex
import signal
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from fastbn.arguments import Arguments, parsed, parsers, with_options
from fastbn.commands import COMMANDS, UNUSABLE, stop
from fastbn.confinement import Ended, confined, is_confined, limits_in
from fastbn.delivery import Delivery
from fastbn.errors import ArgumentError, ArgumentTypeError, FastbnError
from fastbn.interrupts import interrupts_deferred, interrupts_ignored, stoppable
from fastbn.terminal import flush

__all__ = ["COMMANDS", "main", "run"]

FAULT, INTERRUPTED = 70, 130

# Commands that need no ONNX.
ARRAY_COMMANDS = ("bench-kernels", "show-config")

# How many objects are made before the garbage collector looks for cycles. A large model makes hundreds of thousands that live to the end.
PAUSE = 100_000


def main(argv: Sequence[str | os.PathLike[str]] | None = None) -> int:
    """Run the command with these arguments, sys.argv's by default, and return its exit code."""
    words = list(map(str, sys.argv[1:] if argv is None else argv))
    with stoppable():
        return _run(words, Delivery())


def run() -> NoReturn:
    """Be the command: run it and end the process, in which an interrupt comes too late from then on."""
    gc.set_threshold(PAUSE)
    code = main()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.freeze()  # or the end of the process would look for cycles in all that is left
    raise SystemExit(code)


def _run(words: list[str], delivery: Delivery) -> int:
    command = ""
    try:
        arguments = _parsed(words)
        arguments.line = shlex.join(["fastbn", *words])
        command = arguments.command
        if not command:
            parsers(COMMANDS)[0].print_help(sys.stderr)
            return UNUSABLE
        if arguments.limits is not None and not is_confined():
            return _within_limits(arguments, words, delivery)
        _load(arguments.command)
        code = COMMANDS[arguments.command](arguments, delivery)
        flush(sys.stdout)
        return code
    except (ArgumentError, ArgumentTypeError) as error:
        return stop(f"{with_options(str(error), command, COMMANDS)}{_mentioned(delivery)}", UNUSABLE)
    except FastbnError as error:
        return stop(f"{error}{_mentioned(delivery)}", UNUSABLE)
    except OSError as error:
        where = f"use '{error.filename}'" if isinstance(error.filename, str) else _without_a_name()
        return stop(f"Cannot {where}: {(error.strerror or str(error)).lower()}{_mentioned(delivery)}", UNUSABLE)
    except MemoryError:
        return stop("Cannot go on: the memory does not suffice", UNUSABLE)
    except KeyboardInterrupt:
        with interrupts_ignored():
            return stop(f"interrupted, {delivery.written}", INTERRUPTED)
    except Exception as error:
        if "--debug" in words:
            traceback.print_exc()
        reason = " ".join(str(error).split())[:300]
        hint = "a fault of fastbn: --debug shows where"
        return stop(f"Cannot go on, {delivery.written}: {type(error).__name__}{': ' if reason else ''}{reason} ({hint})", FAULT)


def _load(command: str) -> None:
    """Import what a command needs; some modules make an ImportError of an interrupt, and say that a library is not installed."""
    with interrupts_deferred():
        if command == "deploy":
            importlib.import_module("fastbn.deployment.pipeline")
        elif command not in ARRAY_COMMANDS:
            importlib.import_module("fastbn.graph.job")


def _parsed(argv: list[str]) -> Arguments:
    try:
        return parsed(COMMANDS, argv)
    except SystemExit:  # the help or the version is printed
        flush(sys.stdout)
        raise


def _without_a_name() -> str:
    """Return what an error of the system without a name is about."""
    try:
        os.getcwd()
    except OSError:
        return "use the current folder"
    return "go on"


def _mentioned(delivery: Delivery) -> str:
    """Return what an error adds that comes after the model has taken its place: that of a report, of a folder that is not synced."""
    return f"; {delivery.written}" if delivery.has_written else ""


def _within_limits(arguments: Arguments, words: list[str], delivery: Delivery) -> int:
    """Run the command in a process of its own, and remove what that leaves where it is ended."""
    given = arguments.original if arguments.command in ("verify", "bench") else arguments.input
    limits = limits_in(arguments.limits or "")
    if arguments.command == "reestimate" and arguments.scheduler is not None:
        raise ArgumentError("Cannot limit time and memory: the workers of a --scheduler are processes of others")
    try:
        return confined(words, limits, delivery.closed, f"{arguments.command} '{given}'")
    except KeyboardInterrupt:
        _remove_leftovers(arguments)
        raise
    except Ended as ended:
        _remove_leftovers(arguments)
        return stop(str(ended), UNUSABLE if ended.is_harmless else FAULT)


def _remove_leftovers(arguments: Arguments) -> None:
    """Remove the hidden folders of a killed process where the command reads and writes."""
    from fastbn.graph.rewrite.workdir import remove_leftovers

    named = (getattr(arguments, name, None) for name in ("input", "output", "json", "report"))
    for folder in {os.path.dirname(os.path.abspath(name)) for name in named if isinstance(name, str)} | {tempfile.gettempdir()}:
        remove_leftovers(Path(folder))
