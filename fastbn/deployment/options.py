"""What a deployment is asked for; what cannot be done is an error before any work."""

from dataclasses import dataclass, fields
from typing import Literal

from fastbn.deployment.compare import METRICS, Metric
from fastbn.deployment.evidence import Goal
from fastbn.deployment.groups import Data
from fastbn.deployment.recipe import CALIBRATIONS, WEIGHT_TYPES, Calibration, Recipe, WeightType, checked_choice
from fastbn.errors import ArgumentError, ArgumentTypeError, expected
from fastbn.graph.options import Globs, InputShapes, checked_globs
from fastbn.graph.planner.substitute import RewriteForm
from fastbn.graph.ranges import LARGEST_SEED, number_between, whole_number

__all__ = ["FEWEST_ROWS", "FLOAT_NODES", "MOST_FEEDS", "QUANTIZE_SECONDS", "Options"]

# Feeds kept of the data, rows that calibrate at least, and seconds that quantizing one model may take.
MOST_FEEDS, FEWEST_ROWS, QUANTIZE_SECONDS = 256, 8, 300.0

# What a stage may be wanted to be better in, and the largest slowdown that anybody allows.
GOALS: tuple[Goal, ...] = ("latency", "size", "memory")
MOST_SLOWDOWN = 1e6

# Nodes that may stay in float where int8 loses too much.
FLOAT_NODES = 8

# Options that only the quantizer reads.
QUANTIZER = (
    *("min_samples", "quantize_timeout", "calibration", "exclude_nodes", "weight_type"),
    *("per_tensor", "data_free", "float_nodes"),
)

# No limit is longer than this many seconds: eleven days.
LONGEST_SECONDS = 1e6


@dataclass(frozen=True)
class Options:
    """What `deploy` is asked for, beside the model and what it writes.

    Attributes
    ----------
    data : path, array or tensor, dict of name -> array, list of such dicts, or iterable of batches, optional
        Samples to compare and to calibrate on, as in `deployment.samples.read_samples`. Without them, seeded normal random numbers.
    labels : str, optional
        The array of the data that holds labels: whole numbers, one for each sample (or for each pixel), or rows with one 1 and else 0;
        negative ones do not count. Without it, "labels", "y" or "targets" where no input is called so. Batches of a loader may have
        theirs behind the inputs. Where there are labels, the accuracy of every stage is counted, and is what a stage is judged by.
    ignore_unknown : bool
        Leave out arrays of the data that are no inputs and no labels, and say so, instead of refusing them.
    quantize : bool
        Try static int8 quantization (QDQ, per channel) of the folded model.
    max_drop : float, optional
        How much a stage may lose, from 0 to 1. For metric "top-1": the part of rows whose largest score moves to another place (0.01 by
        default). For "error": ||y' - y|| / ||y|| of the worst output over all samples (0.1 by default). y is the original's with
        onnxruntime's optimizer off; what the optimizer changes in the original itself does not count. For "accuracy": that of the original
        less that of the stage (0.01, a point).
    metric : str
        "top-1", "error", "accuracy", or "auto": accuracy where there are labels, else top-1 where an output looks like the scores of a
        classifier (it ends in Softmax, or its width and name allow it), else error.
    goal : str
        What a quantized model must be better in than every other good stage, and a folded one not worse than the original: "latency" (on
        one thread; the whole 99 % interval of the ratio must lie beyond 2 %), "size" (on disk) or "memory" (when loaded).
    max_slowdown : float, optional
        How much slower than the original, on one thread, a stage may be: 0.1 is a tenth. Without it, no slower where the goal is latency,
        as slow as it is for another goal.
    only, skip, input_shapes, freeze_inputs, as_inference, rewrite_left, seed
        As in `fold`; with as_inference, the original that is compared and measured is its inference form.
    runs : int, optional
        Timed runs of each stage, fewer where those of all stages would take longer than a second. Without it, as many as it takes until the
        ratios of latencies are known within 1 %, for at most 3 seconds on one thread and half as many on all.
    most_samples, min_samples : int
        Feeds of the data that are used at most, evenly spaced (256); rows that calibrate at least (8).
    calibration : str
        How the range of an activation follows from its values on the samples: "minmax", "entropy" or "percentile".
    exclude_nodes : glob or list of globs, optional
        Over the names of nodes that stay in float.
    weight_type : str
        "auto" (int8, in 7 bits on x86 without VNNI), "int8", "uint8" or "int7" (int8 from -64 to 63: for x86 CPUs without VNNI).
    per_tensor : bool
        One scale for a weight, not one for each of its output channels.
    data_free : bool
        Calibrate on synthetic inputs that fit the means and variances in the model's batch normalizations, not on the data; layers are
        equalized where int8 then loses less on such inputs of another seed.
    float_nodes : int
        How many nodes may stay in float, the worst first, where int8 loses too much (8); 0 for none.
    reestimate : bool
        Estimate the running statistics of all batch normalizations again before the fold, on a random half of the samples, and use them
        where accuracy does not fall on the other half, on which everything else is compared then. It needs data with labels.
    quantize_timeout : float
        Seconds that onnxruntime's quantizer may take for the model (300); it runs in a process of its own, which is then ended.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        A value is out of range, or of another type.
    """

    data: Data | None = None
    quantize: bool = False
    max_drop: float | None = None
    metric: Metric | Literal["auto"] = "auto"
    labels: str | None = None
    ignore_unknown: bool = False
    goal: Goal = "latency"
    max_slowdown: float | None = None
    only: Globs | None = None
    skip: Globs | None = None
    input_shapes: InputShapes | None = None
    freeze_inputs: bool = False
    as_inference: bool = False
    rewrite_left: RewriteForm | None = None
    seed: int = 0
    runs: int | None = None
    most_samples: int = MOST_FEEDS
    min_samples: int = FEWEST_ROWS
    quantize_timeout: float = QUANTIZE_SECONDS
    calibration: Calibration = "minmax"
    exclude_nodes: Globs | None = None
    weight_type: WeightType = "auto"
    per_tensor: bool = False
    data_free: bool = False
    float_nodes: int = FLOAT_NODES
    reestimate: bool = False

    def __post_init__(self) -> None:
        if self.metric not in ("auto", *METRICS):
            raise ArgumentError(expected(f"auto, {' or '.join(METRICS)}", repr(self.metric), "metric"))
        if self.goal not in GOALS:
            raise ArgumentError(expected(f"{', '.join(GOALS[:-1])} or {GOALS[-1]}", repr(self.goal), "goal"))
        for name in ("quantize", "ignore_unknown", "per_tensor", "data_free", "reestimate"):
            if not isinstance(getattr(self, name), bool):
                raise ArgumentTypeError(expected("True or False", type(getattr(self, name)).__name__, name))
        if self.labels is not None and not isinstance(self.labels, str):
            raise ArgumentTypeError(expected("the name of an array", type(self.labels).__name__, "labels"))
        if self.labels is not None and self.data is None:
            raise ArgumentError(expected("data that hold the labels", "none", "data"))
        if self.reestimate and self.data is None:
            raise ArgumentError(expected("data to estimate statistics from", "none", "data"))
        if self.max_slowdown is not None:
            self._set("max_slowdown", number_between(self.max_slowdown, "max_slowdown", 0, MOST_SLOWDOWN, "a part, 0 or more"))
        if self.max_drop is not None:
            self._set("max_drop", number_between(self.max_drop, "max_drop", 0, 1, "a part from 0 to 1"))
        for name in ("most_samples", "min_samples", *(["runs"] if self.runs is not None else [])):
            self._set(name, whole_number(getattr(self, name), name, 1))
        self._set("float_nodes", whole_number(self.float_nodes, "float_nodes", 0))
        self._set("seed", whole_number(self.seed, "seed", 0, LARGEST_SEED))
        what = f"seconds, more than 0 and at most {LONGEST_SECONDS:g}"
        seconds = number_between(self.quantize_timeout, "quantize_timeout", 0, LONGEST_SECONDS, what)
        if not seconds:
            raise ArgumentError(expected(what, "0", "quantize_timeout"))
        self._set("quantize_timeout", seconds)
        checked_choice(self.calibration, [*CALIBRATIONS], "calibration")
        checked_choice(self.weight_type, WEIGHT_TYPES, "weight_type")
        self._set("exclude_nodes", checked_globs(self.exclude_nodes, "exclude_nodes"))

        self._refuse_unused()

    def _refuse_unused(self) -> None:
        """Refuse what only the quantizer would read where nothing is quantized."""
        usual = {each.name: each.default for each in fields(self)}
        for name in QUANTIZER if not self.quantize else ():
            if getattr(self, name) != usual[name]:
                option = f"--{name.replace('_', '-')}"
                raise ArgumentError(f"Cannot use {name} ({option}): nothing is quantized without quantize=True (--quantize)")

    def recipe(self) -> Recipe:
        """Return what the quantizer is asked for."""
        return Recipe.here(self.weight_type, self.per_tensor, self.calibration, self.exclude_nodes or ())

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # NumPy's numbers become Python's, which JSON holds
