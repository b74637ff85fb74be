"""Timed runs: what is paired with what, how many there are, and what a table says of them. No test depends on how long anything takes."""

import numpy as np
import pytest
from sketch import classifier, normal

from fastbn.graph import timing
from fastbn.graph.timing import Timings, time_models, time_runs

FEED = {"x": normal(1, 3, 8, 8)}


def timings_of(*ratios, rounds=10, blocks=4, runs=3):
    """Return Timings of a base, and of models that take these parts of its time; the machine slows down from block to block."""
    random = np.random.default_rng(0)
    found = []
    for number in range(rounds):
        slower = (1 + number) * (1 + np.arange(blocks))[:, None]
        found.append({str(place): slower * ratio * (1 + random.random((blocks, runs)) / 1e3) for place, ratio in enumerate((1, *ratios))})
    return Timings(1, found)


def test_pairs_do_not_see_that_the_machine_becomes_slower():
    made = timings_of(0.8, 1.25, 1.0)
    assert [made.ratio(name, "0").difference() for name in made.names] == ["none", "less", "more", "none"]
    assert made.ratio("2", "1").ratio == pytest.approx(1.25 / 0.8, rel=1e-3)
    assert made.is_precise
    rows = made.rows()
    assert [row["runs"] for row in rows] == [120] * 4
    assert (rows[0]["ratio"], rows[0]["difference"]) == (1, "none")
    assert rows[1]["low"] < 0.8 < rows[1]["high"] < 0.802
    assert rows[2]["median_ms"] == pytest.approx(1.25 * rows[0]["median_ms"], rel=1e-3)
    assert rows[2]["p90_ms"] > 2 * rows[2]["median_ms"], "of all runs, slow ones included"


def test_the_fastest_run_of_a_block_counts():
    made = timings_of(1.0)
    for each in made.rounds:
        each["1"][:, 0] *= 50
    assert made.ratio("1", "0").difference() == "none"


def test_a_number_of_runs():
    told = []
    one, *more = time_runs({"a": classifier().SerializeToString(), "b": classifier().SerializeToString()}, FEED, 3, progress=told.append)
    assert (one.threads, one.names, one.runs("a").size) == (1, ["a", "b"], 3)
    assert told[:3] == ["run 1 of 3, 1 thread", "run 2 of 3, 1 thread", "run 3 of 3, 1 thread"]
    assert one.ratio("b", "a").difference() == "unknown"
    assert not one.is_precise
    assert all(each.threads > 1 for each in more)


def test_as_many_rounds_as_the_intervals_need(monkeypatch):
    model = classifier().SerializeToString()
    monkeypatch.setattr(timing, "ROUND_SECONDS", 1e-4)
    for precise, rounds in ((True, timing.FEWEST_PAIRS), (False, timing.FEWEST_PAIRS + 3)):
        asked = iter([precise] * 3 + [True] * 99)
        monkeypatch.setattr(Timings, "is_precise", property(lambda _, asked=asked: next(asked)))
        (one, *_) = time_models({"a": model, "b": model}, FEED, longest=60)
        assert len(one.rounds) == rounds
    (one, *_) = time_models({"a": model, "b": model}, FEED, longest=0)
    assert len(one.rounds) == timing.FEWEST_PAIRS, "however short the time is"


def test_the_order_is_random_and_seeded():
    watches = [timing._Watch({"a": b"", "b": b"", "c": b""}, FEED, 1, seed) for seed in (0, 0, 1)]
    orders = [[tuple(watch._order()) for _ in range(60)] for watch in watches]
    assert orders[0] == orders[1] != orders[2]
    assert len(set(orders[0])) == 6, "every order occurs"
