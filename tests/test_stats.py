"""BatchStats: merging is as good as seeing everything at once, and always the same bits."""

import doctest

import numpy as np
import pytest

import fastbn
from fastbn import BatchStats, merge_stats, stats


@pytest.mark.parametrize("mean", [0.0, 1e5])
def test_merged_parts_are_the_whole(mean):
    x = np.random.default_rng(0).standard_normal((60, 4, 33)) + mean
    parts = [fastbn.batch_stats(part) for part in np.split(x, [1, 7, 40])]
    whole, merged = fastbn.batch_stats(x), merge_stats(parts)
    assert merged.count == whole.count == 60 * 33
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-14, atol=1e-15)
    np.testing.assert_allclose(merged.m2, whole.m2, rtol=1e-9)
    again = parts[0].merge(parts[1]).merge(parts[2]).merge(parts[3])
    assert again.m2.tobytes() == merge_stats(iter(parts)).m2.tobytes()


def test_nothing_merges_with_anything():
    empty = fastbn.batch_stats(np.empty((0, 2), np.float32))
    some = BatchStats(3, np.ones(2), np.full(2, 6.0))
    for merged in (empty.merge(some), some.merge(empty), merge_stats([empty, some, empty])):
        assert (merged.count, merged.mean.tolist(), merged.var.tolist()) == (3, [1, 1], [2, 2])
    assert empty.merge(empty).var.tolist() == [0, 0]


def test_lists_and_float32_become_float64():
    made = BatchStats(np.int64(2), [1.0, 2.0], np.ones(2, np.float32))
    assert made.mean.dtype == made.m2.dtype == np.float64
    assert type(made.count) is int
    assert repr(made) == "BatchStats(count=2, channels=2)"


@pytest.mark.parametrize(
    ("call", "error", "where"),
    [
        (lambda: BatchStats(1.5, [1.0], [1.0]), TypeError, "count"),
        (lambda: BatchStats(-1, [1.0], [1.0]), ValueError, "count"),
        (lambda: BatchStats(1, [1], [1.0]), TypeError, "mean"),
        (lambda: BatchStats(1, [[1.0]], [1.0]), TypeError, "mean"),
        (lambda: BatchStats(1, [1.0], [1.0, 2.0]), ValueError, "m2"),
        (lambda: merge_stats([]), ValueError, "stats"),
        (lambda: merge_stats([1]), TypeError, "stats"),
        (lambda: merge_stats([BatchStats(1, [1.0], [1.0]), 1]), TypeError, "other"),
        (lambda: BatchStats(1, [1.0], [1.0]).merge(BatchStats(1, [1.0, 2.0], [1.0, 2.0])), ValueError, "other"),
    ],
)
def test_bad_arguments(call, error, where):
    with pytest.raises(error, match=rf"^Expected .*, got .* - at `{where}`$"):
        call()


def test_examples():
    result = doctest.testmod(stats)
    assert result.attempted > 4
    assert result.failed == 0
