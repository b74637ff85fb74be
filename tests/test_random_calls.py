"""Random calls of the array functions against their twin, within derived bounds: a part of what tools/fuzz_kernels.py does."""

import numpy as np
import pytest
from call_bounds import complaints
from fuzz_kernels import check
from random_calls import BAD_OUTS, Call


@pytest.mark.parametrize("first", range(0, 1000, 100))
def test_a_hundred_calls(first):
    wrong = {call: found for call in (Call(seed, large=seed % 50 == 0) for seed in range(first, first + 100)) if (found := check(call))}
    assert wrong == {}


def test_a_slope_that_is_rounding_alone_may_overflow():
    """Gradients that are all the same, eps 0 and deviations of 1e-30: dweight is 0 but for rounding, times 1e60."""
    assert check(Call(91003546)) == []


def test_the_calls_are_of_every_kind():
    calls = [Call(seed) for seed in range(1000)]
    assert {call.refused for call in calls} == {None, *BAD_OUTS}
    assert len({(call.function, call.dtype, call.activation) for call in calls}) == 4 * 4 * 4
    assert {0, 1} <= {size for call in calls for size in call.shape}
    assert {len(call.shape) for call in calls} == set(range(1, 7))
    assert {call.out for call in calls} == {"none", "new", "beside", "x", "dy", "residual"}


# How much larger than a rounding of float32, and than what 16 bits keep: what the bounds of nearly every call must notice.
@pytest.mark.parametrize(("factor", "least"), [(1 + 2.0**-16, 0.7), (1 + 2.0**-6, 0.9)])
def test_the_bounds_notice_a_small_error(factor, least):
    """In one result of a call at a time, where it has numbers that are neither zero nor Inf."""
    noticed = []
    for seed in range(400):
        call = Call(seed, valid=True)
        results = call.results()
        assert complaints(call, call.arguments(), results) == []
        if call.dtype.itemsize == 2 and factor < 1 + 2.0**-7:
            continue
        for at, result in enumerate(results):
            if (np.isfinite(result) & (result != 0)).any():
                changed = [*results]
                with np.errstate(over="ignore", invalid="ignore"):
                    changed[at] = (result.astype(np.float64) * factor).astype(result.dtype)
                noticed.append(bool(complaints(call, call.arguments(), changed)))
    assert len(noticed) > 300
    assert np.mean(noticed) > least
