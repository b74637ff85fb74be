"""BatchStats: merging is as good as seeing everything at once, and always the same bits."""

import doctest
import pickle
from fractions import Fraction

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


def exact(parts):
    """Count, mean and m2 of one channel from the values, as fractions."""
    values = [Fraction(float(value)) for part in parts for value in part]
    mean = sum(values) / len(values)
    return len(values), mean, sum((value - mean) ** 2 for value in values)


def tree(stats, fan):
    while len(stats) > 1:
        stats = [merge_stats(stats[first : first + fan]) for first in range(0, len(stats), fan)]
    return stats[0]


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_any_order_of_merges_stays_within_the_bound(offset):
    rng = np.random.default_rng(2)
    parts = [rng.standard_normal(int(size)) + offset + rng.standard_normal() for size in rng.integers(1, 9, 60)]
    # The statistics of the parts themselves, as exact as float64 holds them.
    stats = [BatchStats(count, [float(mean)], [float(m2)]) for count, mean, m2 in (exact([part]) for part in parts)]
    count, mean, m2 = exact(parts)
    means = np.concatenate([each.mean for each in stats])
    reach, far = float(np.ptp(means)), float(np.abs(means).max())
    scatter = np.sqrt(float(m2) / count)
    found = set()
    shuffled = [stats[place] for place in rng.permutation(60)]
    for merged, depth in (
        (merge_stats(stats), 60),
        (sum(stats), 60),
        (tree(stats, 2), 6),
        (tree(stats, 8), 16),
        (merge_stats(shuffled), 60),
    ):
        unit = (depth + 1) * 2.0**-53  # one for the rounding of the parts
        assert merged.count == count
        assert abs(merged.mean[0] - mean) <= unit * (far + 4 * reach)
        assert abs(merged.m2[0] - m2) <= unit * float(m2) * (8 + 4 * (far + 4 * reach) / scatter)
        found.add(merged.m2.tobytes())
    assert 1 < len(found) < 5, "sum is merge_stats, and other orders round differently"
    wrong = BatchStats(count, merge_stats(stats).mean * (1 + 1e-12), [0.0])
    assert abs(wrong.mean[0] - mean) > 61 * 2.0**-53 * (far + 4 * reach) or not offset


def test_sums():
    first, second = BatchStats(1, [2.0], [0.0]), BatchStats(1, [4.0], [0.0])
    assert (first + second).var.tolist() == [1]
    assert sum([first, second]).var.tolist() == [1]
    assert sum([first]) is first
    for wrong in (lambda: first + 1, lambda: 1 + first, lambda: first + "1"):
        with pytest.raises(TypeError, match="unsupported operand"):
            wrong()


def test_bytes_are_stable():
    stats = BatchStats(3, [1.5, -0.0], [2.0, np.inf])
    data = stats.to_bytes()
    wanted = "46424e535441545301000000" + "0300000000000000" + "0200000000000000" + "000000000000f83f" + "0000000000000080"
    wanted += "0000000000000040" + "000000000000f07f"
    assert data.hex()[:24] + data.hex()[32:] == wanted
    for given in (data, bytearray(data), memoryview(data)):
        again = BatchStats.from_bytes(given)
        assert (again.count, again.mean.tobytes(), again.m2.tobytes()) == (3, stats.mean.tobytes(), stats.m2.tobytes())
    assert again.merge(again).count == 6
    empty = BatchStats.from_bytes(BatchStats(0, np.zeros(0), np.zeros(0)).to_bytes())
    assert (empty.count, empty.mean.size) == (0, 0)
    assert pickle.loads(pickle.dumps(stats)).to_bytes() == data


def test_bytes_that_are_damaged():
    data = BatchStats(3, [1.5], [2.0]).to_bytes()
    for bad in [data[:length] for length in range(len(data))] + [data + b"0", b"", b"other"]:
        with pytest.raises(fastbn.ArgumentError, match=r"^Expected the bytes of a BatchStats.* - at `data`$"):
            BatchStats.from_bytes(bad)
    for place in range(len(data)):
        bad = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
        with pytest.raises(fastbn.ArgumentError, match=r"^Expected "):
            BatchStats.from_bytes(bad)
    with pytest.raises(fastbn.ArgumentError, match="got version 2"):
        BatchStats.from_bytes(data[:8] + b"\x02" + data[9:])
    with pytest.raises(fastbn.ArgumentTypeError, match=r"^Expected bytes, got str - at `data`$"):
        BatchStats.from_bytes("text")
    with pytest.raises(fastbn.ArgumentError, match=r"below 2\*\*64"):
        BatchStats(1 << 64, [0.0], [0.0]).to_bytes()


def test_examples():
    result = doctest.testmod(stats)
    assert result.attempted > 4
    assert result.failed == 0
