"""Intervals of paired measurements: they hold the truth as often as they say, and call a difference only where there is one."""

import math

import numpy as np
import pytest

from fastbn.graph.intervals import CONFIDENCE, FEWEST_PAIRS, MARGIN, Ratio, bootstrap, middle_mean, paired_ratio


def rounds_of(random, ratio, count, blocks=20, noise=0.05, shared=0.0):
    """Return rounds of logarithms of ratios: noise within a round, and what all blocks of a round share."""
    return [math.log(ratio) + shared * random.standard_normal() + noise * random.standard_normal(blocks) for _ in range(count)]


def test_the_interval_holds_the_mean_as_often_as_it_says():
    random = np.random.default_rng(0)
    for count in (FEWEST_PAIRS, 12, 40):
        ends = [bootstrap(random.standard_normal(count), seed, 2000) for seed in range(400)]
        held = np.mean([low < 0 < high for low, high in ends])
        # 400 draws of 0.99 have a standard deviation of 0.005.
        assert CONFIDENCE - 0.015 <= held < 1, count
        width = np.mean([high - low for low, high in ends]) / 2 * math.sqrt(count)
        assert 2.4 < width < 3.6, "a normal interval of 99 % has 2.58, Student's for seven degrees of freedom 3.5"


def test_what_the_blocks_of_a_round_share_widens_the_interval():
    random = np.random.default_rng(1)
    alone = paired_ratio(rounds_of(random, 1, 10), 0)
    shared = paired_ratio(rounds_of(random, 1, 10, shared=0.05), 0)
    assert shared.width > 3 * alone.width


def test_the_same_seed_gives_the_same_interval():
    rounds = rounds_of(np.random.default_rng(2), 0.9, 12)
    assert paired_ratio(rounds, 7) == paired_ratio(rounds, 7)
    assert paired_ratio(rounds, 7) != paired_ratio(rounds, 8)


@pytest.mark.parametrize(("ratio", "said"), [(0.8, "less"), (1.25, "more"), (1.0, "none"), (1 - MARGIN / 2, "none")])
def test_a_difference_is_called_where_there_is_one(ratio, said):
    random = np.random.default_rng(3)
    found = [paired_ratio(rounds_of(random, ratio, 8, shared=0.005), seed).difference() for seed in range(100)]
    assert found == [said] * 100


def test_a_busy_machine_says_nothing_and_nothing_wrong():
    """Runs that are interrupted take up to 30 times as long: whole rounds are disturbed."""
    random = np.random.default_rng(4)
    found = []
    for seed in range(300):
        late = [random.choice([0, 0, 1, 3], size=20) * random.choice([-1, 1], size=20) for _ in range(8)]
        rounds = [each + more for each, more in zip(rounds_of(random, 1, 8, shared=0.3), late, strict=True)]
        found.append(paired_ratio(rounds, seed).difference())
    assert found.count("unknown") >= 290
    wide = paired_ratio(rounds_of(random, 1, 8, shared=1), 0)
    assert (wide.difference(), wide.doubt) == ("unknown", "too noisy to tell")


def test_few_pairs_say_nothing():
    found = paired_ratio([np.array([-1.0])] * (FEWEST_PAIRS - 1), 0)
    assert (found.low, found.high, found.difference(), found.width) == (None, None, "unknown", math.inf)
    assert str(found) == "0.37"
    assert str(Ratio(0.5, 0.4, 0.6)) == "0.50 (0.40 to 0.60)"
    assert Ratio(0.97, 0.96, 0.975).difference() == "less"
    assert Ratio(0.97, 0.96, 0.985).difference() == "none"
    assert found.doubt == "too few runs to tell"
    assert [Ratio(1, 1 - half, 1 + half).difference() for half in (0.04, 0.06)] == ["none", "unknown"]
    assert Ratio(0.5, 0.3, 0.9).difference() == "less", "wide, and all on one side"


def test_disturbed_values_do_not_move_the_middle():
    assert middle_mean(np.array([1.0, 1.0, 1.0, 100.0])) == 1
    assert middle_mean(np.array([3.0])) == 3
