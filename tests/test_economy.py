"""What verification costs: sessions open at a time, runs of the whole model, and plans that are made until a wrong fold is found."""

import weakref
from dataclasses import replace

import numpy as np
import pytest
from sketch import CONV_BN, classifier, codes, conv_bn, model, norm, normal

import fastbn
from fastbn.graph import job, runtime
from fastbn.graph.ops.registry import OPERATORS
from fastbn.graph.planner import planning
from fastbn.graph.rewrite import writer

# Runs of whole models (original, perturbed or folded) for a model that needs no comparison piece by piece.
MOST_RUNS = 8


class Counted:
    """A session that counts its runs."""

    def __init__(self, session, counts):
        self.session, self.counts = session, counts
        self.get_inputs, self.get_outputs = session.get_inputs, session.get_outputs

    def run(self, *arguments):
        self.counts["runs"] += 1
        return self.session.run(*arguments)


@pytest.fixture
def counts(monkeypatch):
    """What is counted of sessions of whole models: how many were opened, the most that were open at a time, and their runs."""
    counts = {"opened": 0, "at once": 0, "runs": 0}
    live = weakref.WeakSet()
    make = runtime.session

    def counting(*arguments, **options):
        made = Counted(make(*arguments, **options), counts)
        live.add(made)
        counts["opened"] += 1
        counts["at once"] = max(counts["at once"], len(live))
        return made

    monkeypatch.setattr(runtime, "session", counting)
    return counts


CHAOS = """(float[2,3,8,8] x) => (float[2,4,6,6] y) {
    c = Conv(x, w, b)
    n = BatchNormalization(c, s, t, m, v)
    h = Mul(n, big)
    y = Sin(h)
}"""
RANDOM = """(float[2,3,8,8] x) => (float[2,4,6,6] y) {
    c = Conv(x, w, b)
    n = BatchNormalization(c, s, t, m, v)
    r = RandomNormalLike(n)
    y = Add(n, r)
}"""
BRANCHES = """(float[2,3,8,8] x, bool cond) => (float[2,4,6,6] y) {
    y = If (cond) <
        then_branch = g1 () => (float[2,4,6,6] p) { c = Conv(x, w, b) p = BatchNormalization(c, s, t, m, v) },
        else_branch = g2 () => (float[2,4,6,6] q) { q = Conv(x, w, b) }
    >
}"""


@pytest.mark.parametrize("proto", [conv_bn(), classifier(), conv_bn(CONV_BN.replace("N,", "1,"))], ids=["Conv", "classifier", "one image"])
def test_a_plain_model_is_run_a_few_times(proto, counts):
    assert fastbn.fold(proto).parity.ok
    assert counts["at once"] == 1
    assert counts["runs"] <= MOST_RUNS


@pytest.mark.parametrize("text", [CHAOS, RANDOM, BRANCHES], ids=["piece by piece", "random numbers", "branches"])
def test_one_session_is_open_at_a_time(text, counts):
    constants = {"big": np.float32(1e6)} if "big" in text else {}
    assert fastbn.fold(conv_bn(text, **constants)).parity.ok
    assert counts["opened"] > 2
    assert counts["at once"] == 1


def test_one_session_is_open_while_the_fold_that_fails_is_looked_for(counts, monkeypatch):
    spoil_writer(monkeypatch, "c7")
    result = fastbn.fold(deep(10))
    assert codes(result) == {"parity": 1}
    assert counts["at once"] == 1


def test_many_norms_cost_no_more_runs_than_one(counts):
    assert fastbn.fold(deep(40)).parity.ok
    assert counts["runs"] <= MOST_RUNS


def deep(count):
    """Return a chain of Conv, BatchNormalization, LeakyRelu: what the first of them gives still matters at the end."""
    steps, constants, value = [], {}, "x"
    for number in range(count):
        mine = f"s{number}, t{number}, m{number}, v{number}"
        after = "y" if number + 1 == count else f"r{number}"
        steps.append(
            f"c{number} = Conv({value}, w{number}) n{number} = BatchNormalization(c{number}, {mine}) {after} = LeakyRelu(n{number})"
        )
        constants.update({f"w{number}": normal(4, 4, 1, 1, seed=number), **norm(4, str(number), seed=number)})
        value = after
    return model(f"(float[1,4,3,3] x) => (float[1,4,3,3] y) {{ {' '.join(steps)} }}", **constants)


def chain(count):
    """Return one Conv and a chain of BatchNormalization."""
    steps, constants, value = ["c = Conv(x, w)"], {}, "c"
    for number in range(count):
        after = "y" if number + 1 == count else f"n{number}"
        steps.append(f"{after} = BatchNormalization({value}, s{number}, t{number}, m{number}, v{number})")
        parameters = norm(4, str(number), seed=number)
        parameters[f"v{number}"] = parameters[f"s{number}"] ** 2  # a chain of any length neither grows nor shrinks
        constants.update(parameters)
        value = after
    return model(f"(float[1,4,3,3] x) => (float[1,4,3,3] y) {{ {' '.join(steps)} }}", w=normal(4, 4, 1, 1), **constants)


def spoil_writer(monkeypatch, absorber):
    """Write the weight of one convolution wrongly."""

    def wrong_write(self, node, slot, constant, write=writer._Writer._write_constant):
        if node.label == absorber and slot == 1:
            constant = constant.times(constant.layout, np.full(4, 1.5))
        return write(self, node, slot, constant)

    monkeypatch.setattr(writer._Writer, "_write_constant", wrong_write)


@pytest.fixture
def plans(monkeypatch):
    """How often the model is planned and a fold is run."""
    counts = {"plan": 0, "check_fold": 0}
    for module, name in ((planning, "plan"), (job, "check_fold")):
        monkeypatch.setattr(module, name, counted(name, getattr(module, name), counts))
    return counts


def counted(name, function, counts):
    def counting(*arguments):
        counts[name] += 1
        return function(*arguments)

    return counting


@pytest.mark.parametrize("wrong", [0, 199])
def test_the_wrong_link_of_a_long_chain_is_found_by_bisection(wrong, plans, monkeypatch):
    row = OPERATORS["BatchNormalization"]

    def wrong_lift(node, graph):
        affine = row.lift(node, graph)
        return replace(affine, scale=affine.scale * 1.5) if node.label == ("y" if wrong == 199 else f"n{wrong}") else affine

    proto = chain(200)
    assert len(fastbn.fold(proto).folded) == 1
    assert plans == {"plan": 1, "check_fold": 1}
    monkeypatch.setitem(OPERATORS, "BatchNormalization", replace(row, lift=wrong_lift))
    result = fastbn.fold(proto)
    assert [kept.code for kept in result.kept] == ["parity"]
    assert [kept.bn for kept in result.kept] == ["y" if wrong == 199 else f"n{wrong}"]
    assert plans["plan"] <= 1 + 4 + np.log2(200)
    assert plans["check_fold"] <= 1 + 6 + np.log2(200)


@pytest.mark.parametrize("wrong", [0, 15])
def test_the_fold_that_spoils_the_whole_model_is_found_by_bisection(wrong, plans, counts, monkeypatch):
    spoil_writer(monkeypatch, f"c{wrong}")
    result = fastbn.fold(deep(16))
    assert [kept.bn for kept in result.kept] == [f"n{wrong}"]
    assert result.parity.ok
    assert plans["plan"] <= 4 + np.log2(16)
    assert plans["check_fold"] == 16
    assert counts["runs"] <= 4 * MOST_RUNS * (2 + np.log2(16)), "a model that fails is looked at piece by piece"
