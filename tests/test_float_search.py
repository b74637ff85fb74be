"""The search for the few nodes to leave in float: the order, the curve, its limits."""

import json
from pathlib import Path

import pytest
from shell import classifier_folder

import fastbn
from fastbn.cli import main
from fastbn.deployment import float_search
from fastbn.deployment.compare import Agreement
from fastbn.deployment.float_search import FloatSearch
from fastbn.deployment.quantize import Made, QuantizerRefused
from fastbn.deployment.result import Stage
from fastbn.deployment.trade_off import TradeOff, trade_off_lines

# What each node adds to the error of the outputs where it is quantized.
COSTS = {"a": 0.1, "b": 0.4, "c": 0.0, "d": 0.2}


class World:
    """A quantizer of models that are the sets of their quantized nodes, and what compares them."""

    def __init__(self, refused=()):
        self.refused = refused
        self.models = {}
        self.asked = []

    def quantize(self, path, only, left):
        if left and left[-1] in self.refused:
            raise QuantizerRefused("no")
        self.asked.append((tuple(only), tuple(left)))
        self.models[path] = set(only or COSTS) - set(left)
        return Made((), ())

    def compare(self, path):
        drop = sum(COSTS[node] for node in self.models[path])
        return Stage("quantized", agreements=(Agreement("y", 1, drop, drop, 1.0, None, 0),), drop=drop)

    def search(self, most=8, max_drop=0.15, seconds=1e6):
        self.quantize(Path("full"), (), ())
        search = FloatSearch(self.quantize, self.compare, lambda path: (len(self.models[path]), 1.5), Path(), seconds, lambda text: None)
        path, curve = search.run(Path("full"), list(COSTS), most, max_drop)
        return self.models[path], [(point.left, pytest.approx(point.drop)) for point in curve]


def test_the_worst_goes_first_until_it_passes():
    quantized, curve = World().search()
    assert quantized == {"a", "c"}
    assert curve == [((), 0.7), (("b",), 0.3), (("b", "d"), 0.1)]


def test_one_that_passes_is_left_alone():
    world = World()
    assert world.search(max_drop=0.8) == (set(COSTS), [((), 0.7)])
    assert len(world.asked) == 1, "nothing is ranked"


def test_where_none_passes_the_whole_quantized_model_stays():
    quantized, curve = World().search(most=1)
    assert quantized == set(COSTS)
    assert curve == [((), 0.7), (("b",), 0.3)]
    assert World().search(max_drop=-1)[1][-1] == (("b", "d", "a"), 0.0), "a node that costs nothing is not tried"


def test_a_model_that_cannot_be_made_is_passed_over():
    quantized, curve = World(refused=("b",)).search()
    assert [left for left, _ in curve] == [(), ("b", "d")]
    assert quantized == {"a", "c"}


def test_the_time_limit_ends_it(monkeypatch):
    now = iter(range(0, 10_000, 30))
    monkeypatch.setattr(float_search.time, "monotonic", lambda: next(now))
    world = World()
    quantized, curve = world.search(seconds=100)
    assert quantized == set(COSTS)
    assert len(curve) < 3
    assert [only for only, _ in world.asked if only] == [("a",)], "half of the time is for the ranking"


def test_the_curve_as_text_and_data():
    curve = [TradeOff((), float("inf"), None, 2000, None), TradeOff(("a", "b"), 0.25, 0.5, 3000, 1.25)]
    assert trade_off_lines(curve) == [
        "  in float  drop  relative  size    ms, 1 thread  node",
        "  0         inf   -         2.0 kB  -             -",
        "  2         0.25  0.5       3.0 kB  1.250         b",
    ]
    assert trade_off_lines([]) == []
    assert curve[0].to_dict() == {"left": [], "drop": "inf", "relative": None, "bytes": 2000, "median_ms": None}


def ran(*options):
    """Deploy in.onnx, whatever is shipped."""
    assert main(["deploy", "in.onnx", "out.onnx", "--runs", "2", *options]) in (0, 4)


def as_json(capsys, *options):
    """Deploy in.onnx, and return the JSON report."""
    ran(*options, "--json", "-")
    return json.loads(capsys.readouterr().out)


def test_a_deployment_searches_and_says_so(tmp_path, monkeypatch, capsys):
    classifier_folder(tmp_path, monkeypatch)
    options = ("--data", "data.npz", "--quantize", "--metric", "error", "--for", "size", "--report", "report.html", "--force")
    full = as_json(capsys, *options, "--float-nodes", "0", "--max-drop", "0.5")
    loss = full["stages"][2]["drop"]
    assert full["quantization"]["trade_off"] == []
    report = as_json(capsys, *options, "--max-drop", str(0.9 * loss))
    curve = report["quantization"]["trade_off"]
    assert curve[0]["left"] == []
    assert curve[0]["drop"] == pytest.approx(loss)
    assert curve[-1]["drop"] <= 0.9 * loss
    assert report["stages"][2]["drop"] == pytest.approx(curve[-1]["drop"])
    for left in curve[-1]["left"]:
        assert left in Path("report.html").read_text(encoding="utf-8")
    ran(*options, "--max-drop", str(0.9 * loss))
    assert "  in float  drop" in capsys.readouterr().out
    as_json(capsys, *options, "--float-nodes", "0", "--max-drop", str(0.9 * loss))


def test_the_number_of_nodes_is_checked():
    with pytest.raises(fastbn.ArgumentError, match=r"got -1 - at `float_nodes`$"):
        fastbn.deploy("in.onnx", float_nodes=-1)
