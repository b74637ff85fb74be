"""Mutation check: change the package in small ways, one at a time, and see which changes no test notices.

    python tools/mutate.py fastbn/graph/ops fastbn/graph/planner --sample 400 --seed 0

No file changes. Everything happens in memory, in one process that has collected the tests:

1. A forked child runs every test once and records which lines of the given files each of them runs, and how long it takes.
2. For each mutant a forked child puts the mutated code in the place of the original one, in the functions and tables that are there
   already, and runs the tests that run the mutated line, the fastest first, until one fails. A change of a table or a constant runs every
   test.

A mutant is killed by a test that fails, takes ten times as much CPU as without it, or ends the process. mutants.py says what is mutated,
docs/mutation.md has the figures and the survivors that are accepted.
"""

import argparse
import gc
import json
import math
import os
import pickle
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any

import pytest
from mutants import ROOT, Mutant, mutants_of

# The tests of the rows, of the planner and of what they stand on, by themselves and through whole folds; those of verification and of
# writing take too long.
TESTS = (
    "absorb affine around bad_input bodies broken_models carry constant_values effort einsum errors expressions folding forward gather",
    "graph_affine growth hostile_models injected_faults injected_values join kept least_sizes lift matmul mixed_types nesting",
    "normalization odd_nodes places plan probe quantized reasons refusals results rewrite_left rows schemas search sequences shape_rules",
    "shapes siblings sizes storage survivors transfers underflow view wide widening wrong_nodes",
)

# A test may take ten times as long as without the mutant, and this many seconds of CPU more; a busy machine may take ten times that.
PATIENCE = 3

MEMORY = 8 << 30


def _codes(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _codes(constant)


class NotApplied(Exception):
    """A mutant that cannot be put in place."""


def functions_of(files: Sequence[Path]) -> dict[str, list[FunctionType]]:
    """Return the functions of each file that this process holds, closures among them."""
    functions: dict[str, list[FunctionType]] = {str(path): [] for path in files}
    # The package may be an installed copy of these files.
    loaded = {_module(path).__file__: str(path) for path in files if _module_name(path) in sys.modules}
    for value in gc.get_objects():
        if type(value) is FunctionType and value.__code__.co_filename in loaded:
            functions[loaded[value.__code__.co_filename]].append(value)
    return functions


def put_in_place(mutant: Mutant, functions: list[FunctionType]) -> None:
    """Make a module of this process, with its functions, what the mutant's file would make."""
    code = compile(mutant.tree(), str(mutant.path), "exec")
    if mutant.is_inside:
        _replace_functions(functions, code)
    else:
        _replace_globals(_module(mutant.path), code)


def _module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def _module(path: Path) -> ModuleType:
    return sys.modules[_module_name(path)]


def _replace_functions(functions: list[FunctionType], code: CodeType) -> None:
    """Give every function of a module its new code."""
    new = {(each.co_qualname, each.co_firstlineno): each for each in _codes(code)}
    for function in functions:
        own = function.__code__
        replacement = new.get((own.co_qualname, own.co_firstlineno))
        if replacement is not None:
            if len(replacement.co_freevars) != len(own.co_freevars):
                raise NotApplied(f"{own.co_qualname} reads other variables of the functions around it")
            function.__code__ = replacement


def _replace_globals(module: ModuleType, code: CodeType) -> None:
    """Give the tables, rows, classes and constants of a module, and those who import them, their new values."""
    namespace: dict[str, Any] = {"__name__": module.__name__, "__file__": module.__file__}
    exec(code, namespace)
    for name, new in namespace.items():
        old = vars(module).get(name)
        if name.startswith("__") or new is old:
            continue
        if isinstance(new, FunctionType) and new.__module__ == module.__name__ and isinstance(old, FunctionType):
            old.__defaults__, old.__kwdefaults__ = new.__defaults__, new.__kwdefaults__
        elif isinstance(new, type):
            _replace_attributes(old, new)
        elif type(new).__name__ == "Row":
            _replace_row(old, new)
        elif isinstance(new, dict) and isinstance(old, dict) and any(type(value).__name__ == "Row" for value in new.values()):
            for key, row in new.items():
                _replace_row(old[key], row)
        elif type(new).__module__ == "builtins" and new != old:
            for user in list(sys.modules.values()):
                if user is module or (vars(user).get(name) is old and f"from {module.__name__} import" in _source(user)):
                    setattr(user, name, new)


def _replace_attributes(old: Any, new: Any) -> None:  # classes, dataclasses among them
    """Give a class the defaults of another, and its instances where they have the default: rows are made when a module is loaded."""
    for before, after in zip(fields(old), fields(new), strict=True) if is_dataclass(old) else ():
        if isinstance(before.default, bool | int | float) and before.default != after.default:
            gc.unfreeze()  # which hides objects from get_objects
            for instance in [each for each in gc.get_objects() if isinstance(each, old)]:
                if getattr(instance, before.name) == before.default:
                    object.__setattr__(instance, before.name, after.default)
    for name, value in vars(new).items():
        own = getattr(old, name, None)
        if isinstance(value, FunctionType) and isinstance(own, FunctionType) and value.__code__.co_filename.endswith(".py"):
            own.__defaults__, own.__kwdefaults__ = value.__defaults__, value.__kwdefaults__
        elif name == "__init__" or (not name.startswith("__") and not isinstance(value, property)):
            setattr(old, name, value)


def _replace_row(old: object, new: object) -> None:
    for each in fields(new):  # type: ignore[arg-type]  # a Row
        object.__setattr__(old, each.name, getattr(new, each.name))


def _source(module: ModuleType) -> str:
    path = getattr(module, "__file__", None) or ""
    return Path(path).read_text(encoding="utf-8") if path.endswith(".py") else ""


@dataclass
class Record:
    """What a run of every test has shown: test -> seconds, the tests that failed, (file, line) -> the tests that run it."""

    sources: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)
    tests: dict[tuple[str, int], set[str]] = field(default_factory=dict)


class Checker:
    """A plugin of pytest: instead of running the tests once, it runs those of each mutant."""

    def __init__(self, files: Sequence[Path], mutants: list[Mutant], options: argparse.Namespace, screen: int) -> None:
        self.files, self.mutants, self.screen = files, mutants, screen
        self.out: Path | None = options.out
        self.map: Path | None = options.map
        self.slowest: float = options.slowest
        self.budget: float = options.budget
        self.reports: list[pytest.TestReport] = []
        self.survivors: list[Mutant] = []
        self.functions: dict[str, list[FunctionType]] = {}
        self.killed = Counter[str]()

    def say(self, text: str) -> None:
        """Print a line past what pytest captures."""
        os.write(self.screen, f"{text}\n".encode())

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep what a phase of a test gave."""
        self.reports.append(report)

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Check every mutant."""
        if session.testsfailed:
            return False
        for path in self.files:
            __import__(".".join(path.relative_to(ROOT).with_suffix("").parts))
        session.config.pluginmanager.unregister(name="terminalreporter")
        items = {item.nodeid: item for item in session.items}
        record = self._record(items)
        self.say(f"{len(items)} tests; left out, as they fail or take long: {sorted(record.failed)}")
        good = [name for name in items if name not in record.failed and record.seconds[name] <= self.slowest]
        good.sort(key=record.seconds.__getitem__)
        self.functions = functions_of(self.files)
        gc.freeze()  # what the children share stays shared
        for number, mutant in enumerate(self.mutants, 1):
            of_line = set().union(*(record.tests.get((str(mutant.path), line), ()) for line in mutant.lines))
            names = [name for name in good if name in of_line or not mutant.is_inside]
            names = self._within_budget(names, record)
            outcome = self._outcome(mutant, [items[name] for name in names], [record.seconds[name] for name in names])
            self._note(mutant, outcome, f"{number}/{len(self.mutants)}", len(names))
        return True

    def _within_budget(self, names: list[str], record: Record) -> list[str]:
        """Return the first tests that take no more seconds together than a mutant may cost."""
        left = self.budget
        for count, name in enumerate(names):
            left -= record.seconds[name]
            if left < 0:
                return names[: count + 1]
        return names

    def _note(self, mutant: Mutant, outcome: str, progress: str, count: int) -> None:
        if outcome == "survived" or outcome.startswith("not applied"):
            self.survivors.append(mutant)
            self.say(f"{progress} {outcome} {count} tests: line {mutant.lines.start} of {mutant.text}")
        else:
            self.killed[outcome] += 1
        if self.out is not None:
            with self.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"mutant": mutant.text, "line": mutant.lines.start, "outcome": outcome, "tests": count}) + "\n")

    def _record(self, items: dict[str, pytest.Item]) -> Record:
        """Return what a run of every test shows; what an earlier run has shown counts while the mutated files are the same."""
        sources = {str(path): path.read_text(encoding="utf-8") for path in self.files}
        record = Record(sources)
        if self.map is not None and self.map.exists():
            kept: Record = pickle.loads(self.map.read_bytes())
            record = kept if kept.sources == sources else record
        new = [item for name, item in items.items() if name not in record.seconds]
        complete: Record = self._forked(lambda: self._recorded(record, new))
        if self.map is not None:
            self.map.write_bytes(pickle.dumps(complete))
        return complete

    def _recorded(self, record: Record, items: list[pytest.Item]) -> Record:
        """Run every test once under a tracer."""
        watched = {str(path) for path in self.files}

        def stop(number: int, frame: FrameType | None) -> None:
            raise TimeoutError("too slow to be run for each mutant")

        signal.signal(signal.SIGPROF, stop)

        def on_line(frame: FrameType, event: str, argument: object) -> Any:  # as sys.settrace wants it
            seen.add((frame.f_code.co_filename, frame.f_lineno))
            return on_line

        def on_call(frame: FrameType, event: str, argument: object) -> Any:  # as sys.settrace wants it
            return on_line if frame.f_code.co_filename in watched else None

        for item, following in zip(items, [*items[1:], None][: len(items)], strict=True):
            seen: set[tuple[str, int]] = set()
            start = time.process_time()
            signal.setitimer(signal.ITIMER_PROF, 5 * self.slowest)
            sys.settrace(on_call)
            try:
                passed = self._passes(item, following)
            except TypeError:  # pytest cannot show a traceback whose end, where it was stopped, has no line
                passed = False
            sys.settrace(None)
            signal.setitimer(signal.ITIMER_PROF, 0)
            record.seconds[item.nodeid] = time.process_time() - start
            if not passed:
                record.failed.add(item.nodeid)
            for line in seen:
                record.tests.setdefault(line, set()).add(item.nodeid)
        return record

    def _passes(self, item: pytest.Item, following: pytest.Item | None) -> bool:
        self.reports.clear()
        item.ihook.pytest_runtest_protocol(item=item, nextitem=following)
        return not any(report.failed for report in self.reports)

    def _outcome(self, mutant: Mutant, items: list[pytest.Item], seconds: list[float]) -> str:
        """Return "survived", or what has killed a mutant."""

        def run() -> str:
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            try:
                put_in_place(mutant, self.functions[str(mutant.path)])
            except NotApplied as problem:
                return f"not applied: {problem}"
            except Exception as error:  # the file could not even be loaded
                return f"load: {type(error).__name__}"
            for item, following, usual in zip(items, [*items[1:], None][: len(items)], seconds, strict=True):
                signal.setitimer(signal.ITIMER_PROF, PATIENCE + 10 * usual)
                signal.setitimer(signal.ITIMER_REAL, 10 * (PATIENCE + 10 * usual) + 60)
                if not self._passes(item, following):
                    return "test"
            return "survived"

        return str(self._forked(run) or "time, memory or crash")

    def _forked(self, work: Callable[[], Any]) -> Any:  # whatever the work returns
        """Return what some work returns in a forked child, None where the child does not end well."""
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.close(reading)
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            try:
                with os.fdopen(writing, "wb") as pipe:
                    pickle.dump(work(), pipe)
                os._exit(0)
            except BaseException as error:
                self.say(f"  {type(error).__name__}: {error}"[:300])
                os._exit(1)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            answer = pipe.read()
        _, status = os.waitpid(child, 0)
        return pickle.loads(answer) if status == 0 else None


def main() -> int:
    """Check the mutants that the command line asks for; print the survivors and the share that was killed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, help="files and folders of the package to mutate")
    parser.add_argument("--sample", type=int, help="so many of the mutants, drawn at random; default: all")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default: %(default)s)")
    parser.add_argument("--again", type=Path, help="only the survivors of the run that wrote this file")
    parser.add_argument("--out", type=Path, help="append the outcome of each mutant to this file, as lines of JSON; skip those in it")
    parser.add_argument("--map", type=Path, help="keep what the first run of the tests shows in this file, for the next time")
    parser.add_argument("--slowest", type=float, default=1.0, help="leave out tests that take more seconds of CPU (default: %(default)s)")
    parser.add_argument("--budget", type=float, default=5.0, help="seconds of tests that a mutant may survive (default: %(default)s)")
    parser.add_argument(
        "--tests", nargs="+", metavar="NAME", default=" ".join(TESTS).split(), help="of tests/test_NAME.py (those of the ONNX part)"
    )
    parser.add_argument("--list", action="store_true", help="list the mutants and run nothing")
    options = parser.parse_args()
    paths = [path.resolve() for path in options.paths]
    files = sorted({file for path in paths for file in (path.rglob("*.py") if path.is_dir() else [path])})
    mutants = [mutant for file in files for mutant in mutants_of(file)]
    chosen = mutants if options.sample is None else random.Random(options.seed).sample(mutants, min(options.sample, len(mutants)))
    if options.again is not None:
        rows = [json.loads(line) for line in options.again.read_text(encoding="utf-8").splitlines()]
        wanted = {row["mutant"] for row in rows if row["outcome"] == "survived"}
        chosen = [mutant for mutant in mutants if mutant.text in wanted]
    if options.out is not None and options.out.exists():
        done = {json.loads(line)["mutant"] for line in options.out.read_text(encoding="utf-8").splitlines()}
        chosen = [mutant for mutant in chosen if mutant.text not in done]
    if options.list:
        print(*(mutant.text for mutant in chosen), f"{len(chosen)} of {len(mutants)}", sep="\n")
        return 0
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    tests = [str(path) for path in (ROOT / "tests" / f"test_{name}.py" for name in options.tests) if path.exists()]
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["-q", "-p", "no:cacheprovider", f"--basetemp={folder}/tests", *tests]
        checker = Checker(files, chosen, options, os.dup(2))
        if pytest.main(arguments, plugins=[checker]) != 0:
            return 2
    killed = sum(checker.killed.values())
    total = max(killed + len(checker.survivors), 1)
    print(f"{killed} of {total} mutants killed, {math.floor(1000 * killed / total) / 10} %: {dict(checker.killed)}")
    print(*(f"line {mutant.lines.start} of {mutant.text}" for mutant in checker.survivors), sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
