"""Options that are numbers: what cannot be used is an error before any work, from Python as from the command."""

import numpy as np
import pytest

import fastbn
from fastbn.deployment.options import Options
from fastbn.errors import ArgumentError, ArgumentTypeError

COUNTS = ["runs", "most_samples", "min_samples"]

# Option -> values that are out of range.
RANGES = {
    **{name: [0, -1, np.int64(-3)] for name in COUNTS},
    "seed": [-1, 2**32, np.int64(-1)],
    "max_drop": [-0.1, 5, 1.0001, float("nan"), float("inf"), np.float32(2), 10**400],
    "quantize_timeout": [0, -1, float("nan"), float("inf"), 1e7],
}

# Option -> values of another type.
KINDS = {
    **{name: [2.5, float("nan"), "3", None, True, [1]] for name in ["most_samples", "min_samples", "seed"]},
    "runs": [2.5, float("nan"), "3", True, [1]],  # None: as many as it takes
    **{name: ["no", 1, None] for name in ("quantize", "ignore_unknown", "per_tensor", "data_free", "reestimate")},
    "max_drop": ["0.1", True, [0.1], 1j],
    "quantize_timeout": ["9", None, True],
}


@pytest.mark.parametrize("option", RANGES)
def test_values_out_of_range(option):
    for value in RANGES[option]:
        with pytest.raises(ArgumentError, match=f"^Expected .*, got .* - at `{option}`$"):
            fastbn.deploy("no such file, which nobody reads", **{option: value})


@pytest.mark.parametrize("option", KINDS)
def test_values_of_another_type(option):
    for value in KINDS[option]:
        with pytest.raises(ArgumentTypeError, match=f"^Expected .*, got .* - at `{option}`$"):
            fastbn.deploy("no such file, which nobody reads", **{option: value})


def test_progress_is_called():
    for call in (
        lambda: fastbn.fold("nothing", progress=5),
        lambda: fastbn.verify("nothing", "nothing", progress=5),
        lambda: fastbn.deploy("nothing", progress=5),
        lambda: fastbn.reestimate("nothing", "nothing", progress=5),
        lambda: fastbn.fold_all("nothing", "nowhere", progress=5),
    ):
        with pytest.raises(ArgumentTypeError, match=r"^Expected something that can be called, or None, got int - at `progress`$"):
            call()


def test_the_ends_of_the_ranges_are_good():
    for options in (
        {"max_drop": 0},
        {"max_drop": 1},
        {"seed": 0},
        {"seed": 2**32 - 1},
        {"runs": 1},
        {"quantize_timeout": 1e6, "quantize": True},
    ):
        assert Options(**options)


def test_numbers_of_numpy_become_python_s():
    options = Options(runs=np.int32(3), max_drop=np.float32(0.5), seed=np.uint8(7), quantize=True, quantize_timeout=np.int64(9))
    kinds = [type(getattr(options, name)) for name in ("runs", "max_drop", "seed", "quantize_timeout")]
    assert kinds == [int, float, int, float]


@pytest.mark.parametrize(("option", "value"), [
    ("min_samples", 1),
    ("quantize_timeout", 9),
    ("calibration", "entropy"),
    ("exclude_nodes", "*"),
    ("weight_type", "int8"),
    ("per_tensor", True),
    ("data_free", True),
    ("float_nodes", 0),
])  # fmt: skip
def test_options_of_the_quantizer_want_one(option, value):
    with pytest.raises(
        ArgumentError, match=f"^Cannot use {option} .--{option.replace('_', '-')}.: nothing is quantized without quantize=True"
    ):
        fastbn.deploy("no such file, which nobody reads", **{option: value})
    assert Options(quantize=True, **{option: value})
