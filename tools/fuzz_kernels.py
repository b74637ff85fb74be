"""Random calls of the array functions against `fastbn.reference`, within the bounds of docs/numerics.md.

    python tools/fuzz_kernels.py --calls 50000 --seed 0

Each call runs on an instruction set and with a number of threads drawn for it. Its results lie within the bounds (call_bounds.py) and are
the bits that one thread gives without vector instructions; what it was not to write to is as before; a call that is wrong is refused, and
writes nothing (random_calls.py). Ctrl-C ends it early. Exit code 1 and a line for each call of which that is not true.
"""

import argparse
import contextlib
import faulthandler
import resource
import time
from collections import Counter
from typing import Any

import numpy as np
from call_bounds import complaints
from random_calls import Arguments, Call

import fastbn

__all__ = ["check"]

THREADS = (1, 1, 2, 3, 8)


def check(call: Call) -> list[str]:
    """Return what is wrong with a call."""
    rng = np.random.default_rng(call.seed + 1)
    threads = fastbn.get_num_threads()
    given = call.arguments()
    before = [_bytes(each) for each in (*given.positional, *given.named.values())]
    out = given.named.get("out")
    fastbn.set_num_threads(int(rng.choice(THREADS)))
    try:
        with fastbn.use_isa(str(rng.choice(fastbn.show_config()["isa_available"]))):
            results = call.results(given)
    except (fastbn.ArgumentError, fastbn.ArgumentTypeError):
        return [*_written(given, before, ()), *([] if call.refused else ["refused"])]
    finally:
        fastbn.set_num_threads(threads)
    if call.refused:
        return [f"not refused: {call.refused}"]
    found = [] if out is None or results[0] is out else ["another array than out"]
    found += _written(given, before, (out, given.named.get("running_mean"), given.named.get("running_var")))
    found += complaints(call, call.arguments(), results)
    bits = call.bits(results)
    fastbn.set_num_threads(1)
    with fastbn.use_isa("scalar"):
        found += [] if bits == call.bits() else ["other bits on one thread without vectors"]
    fastbn.set_num_threads(threads)
    return found


def _bytes(value: Any) -> bytes | None:  # of whatever a call is given
    return value.tobytes() if isinstance(value, np.ndarray) else None


def _written(given: Arguments, before: list[bytes | None], targets: tuple[np.ndarray | None, ...]) -> list[str]:
    """Return what has changed and was not to change."""
    found = []
    for value, was in zip((*given.positional, *given.named.values()), before, strict=True):
        if was is not None and not any(value is target for target in targets) and value.tobytes() != was:
            found.append("an input has changed")
    for memory, outside, initial in given.frames:
        if not np.array_equal(memory[outside], initial[outside]):
            found.append("memory beside an array has changed")
    return found


def main() -> int:
    """Make the calls; print what is wrong and what was done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=50_000, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the first one; each call has the next (default: %(default)s)")
    parser.add_argument("--large", type=int, default=20, help="one in so many calls has large tensors (default: %(default)s)")
    options = parser.parse_args()
    faulthandler.enable()
    start, counts, wrong = time.process_time(), Counter[str](), 0
    with contextlib.suppress(KeyboardInterrupt):
        for seed in range(options.seed, options.seed + options.calls):
            call = Call(seed, large=seed % options.large == 0)
            found = check(call)
            counts[call.refused or call.function] += 1
            if found:
                wrong += 1
                print(call, *found, sep="; ", flush=True)
    seconds, memory = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(f"{sum(counts.values())} calls, {wrong} wrong, {seconds:.0f} s of CPU, at most {memory} MB: {dict(counts)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
