"""What a deployment is asked for; what cannot be done is an error before any work."""

from collections.abc import Mapping
from dataclasses import dataclass

from fastbn.deployment.compare import METRICS
from fastbn.errors import ArgumentError, expected
from fastbn.graph.ranges import LARGEST_SEED, number_between, whole_number

__all__ = ["FEWEST_ROWS", "MOST_FEEDS", "QUANTIZE_SECONDS", "Options"]

# Feeds kept of the data, rows that calibrate at least, and seconds that quantising one model may take.
MOST_FEEDS, FEWEST_ROWS, QUANTIZE_SECONDS = 256, 8, 300.0

# No limit is longer than this many seconds: eleven days.
LONGEST_SECONDS = 1e6


@dataclass(frozen=True)
class Options:
    """What `deploy` was asked for, beside the model; its docstring says what each means."""

    data: object = None
    quantize: bool = False
    max_drop: float | None = None
    metric: str = "auto"
    only: object = None
    skip: object = None
    input_shapes: Mapping | None = None
    freeze_inputs: bool = False
    as_inference: bool = False
    rewrite_left: str | None = None
    seed: int = 0
    runs: int = 50
    most_samples: int = MOST_FEEDS
    min_samples: int = FEWEST_ROWS
    quantize_timeout: float = QUANTIZE_SECONDS

    def __post_init__(self) -> None:
        if self.metric not in ("auto", *METRICS):
            raise ArgumentError(expected(f"auto, {' or '.join(METRICS)}", repr(self.metric), "metric"))
        if self.max_drop is not None:
            self._set("max_drop", number_between(self.max_drop, "max_drop", 0, 1, "a part from 0 to 1"))
        for name in ("runs", "most_samples", "min_samples"):
            self._set(name, whole_number(getattr(self, name), name, 1))
        self._set("seed", whole_number(self.seed, "seed", 0, LARGEST_SEED))
        what = f"seconds, more than 0 and at most {LONGEST_SECONDS:g}"
        seconds = number_between(self.quantize_timeout, "quantize_timeout", 0, LONGEST_SECONDS, what)
        if not seconds:
            raise ArgumentError(expected(what, "0", "quantize_timeout"))
        self._set("quantize_timeout", seconds)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # NumPy's numbers become Python's, which JSON holds
