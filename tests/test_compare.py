"""Outputs of a stage beside the original's: the figures, what is lost, and what cannot be compared and must not read as perfect."""

import numpy as np
import onnx
import pytest
from sketch import model, normal

from fastbn.deployment import compare as compare_module
from fastbn.deployment.compare import Agreement, Original, compare, drop_of
from fastbn.graph.runtime import session


class Session:
    """What compare asks of an onnxruntime session."""

    def __init__(self, *outputs):
        self.outputs = outputs

    def get_outputs(self):
        return [type("Entry", (), {"name": f"y{number}"}) for number in range(len(self.outputs))]

    def run(self, names, feed):
        return [output[feed["row"]] for output in self.outputs]


def compared(before, after, scores=()):
    feeds = [{"row": row} for row in range(len(before))]
    return compare(Original(Session(before)), {"stage": Session(after)}, feeds, scores)["stage"][0]


def test_the_figures_of_a_comparison():
    before = np.array([[[3.0, 4.0]], [[0.0, 12.0]]])
    after = before + np.array([[[0.0, 0.0]], [[5.0, 0.0]]])
    found = compared(before, after, {"y0"})
    assert (found.max_error, found.elements, found.rows, found.top1) == (5.0, 4, 2, 1.0)
    assert found.relative == pytest.approx(5 / 13)
    assert found.sqnr_db == pytest.approx(20 * np.log10(13 / 5))
    assert found.cosine == pytest.approx((9 + 16 + 144) / (13 * np.sqrt(9 + 16 + 25 + 144)))
    assert compared(before, before).relative == 0
    assert compared(before, before).to_dict()["sqnr_db"] == "inf"
    assert compared(np.zeros((1, 2)), np.ones((1, 2))).relative == np.inf


def test_top_1_counts_rows_and_takes_a_tie_either_way():
    before = np.array([[[1.0, 3.0, 2.0]], [[2.0, 2.0, 1.0]], [[1.0, 2.0, 3.0]], [[5.0, 1.0, 0.0]]])
    after = np.array([[[1.0, 3.0, 2.0]], [[2.0, 2.1, 1.0]], [[1.0, 3.1, 3.0]], [[5.0, 1.0, 0.0]]])
    assert compared(before, after, {"y0"}).top1 == 0.75
    assert compared(before, after).top1 is None


def test_other_outputs():
    labels = np.array([[[1, 2]], [[3, 4]]])
    changed = labels.copy()
    changed[0, 0, 0] = 9
    assert compared(labels, changed).relative == 0.25
    infinite = np.array([[[np.inf, 1.0]], [[np.nan, 2.0]]])
    assert compared(infinite, infinite).relative == 0
    assert compared(infinite, np.ones((2, 1, 2))).note == "Inf or NaN on one side only"
    assert compared(np.ones((2, 1, 3)), np.ones((2, 1, 4))).note == "shape [1, 4] instead of [1, 3]"
    text = np.array([[["a", "b"]], [["c", "d"]]], dtype=object)
    other = np.array([[["a", "b"]], [["c", "e"]]], dtype=object)
    assert (compared(text, other).relative, compared(text, text).relative, compared(text, labels).note) == (0.25, 0, None)


def test_what_a_drop_is():
    def agreement(relative, top1):
        return Agreement("y", 1, 0.0, relative, 1.0, top1, 1)

    assert drop_of([agreement(0.5, None), agreement(0.2, 0.75)], "top-1") == 0.25
    assert drop_of([agreement(0.5, None), agreement(0.2, 0.75)], "error") == 0.5
    assert drop_of([agreement(np.inf, 1.0)], "top-1") == np.inf
    assert drop_of([], "error") is drop_of([], "top-1") is None, "nothing to compare is no proof of anything"
    nothing = Agreement("y", 1, None, None, None, None, 0, "no finite values to compare")
    assert drop_of([nothing], "error") is drop_of([nothing], "top-1") is None
    assert drop_of([nothing, agreement(0.5, None)], "error") == 0.5
    assert drop_of([agreement(0.0, None)], "top-1") is None, "no decision was made"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_without_finite_values_there_is_nothing_to_compare(value):
    found = compared(np.full((2, 1, 3), value), np.full((2, 1, 3), value), {"y0"})
    assert (found.relative, found.max_error, found.sqnr_db, found.top1, found.rows) == (None, None, None, None, 0)
    assert found.note == "no finite values to compare"
    assert found.to_dict()["sqnr_db"] is None


def test_values_that_are_not_finite_are_counted():
    before = np.array([[[np.nan, 1.0, 2.0]], [[3.0, -np.inf, 4.0]]])
    found = compared(before, before, {"y0"})
    assert (found.relative, found.note) == (0, "2 of 6 values are Inf or NaN on both sides")
    assert (found.rows, found.top1) == (1, 1.0), "a row with NaN has no largest score; -Inf is a class ruled out"


def test_an_empty_output_proves_nothing():
    found = compared(np.zeros((2, 0, 4)), np.zeros((2, 0, 4)))
    assert (found.relative, found.note) == (None, "empty on every sample")


def test_maps_of_numbers_are_compared():
    before = [[{"cat": 0.25, "dog": 0.75}], [{"cat": 0.5, "dog": 0.5}]]
    after = [[{"dog": 0.75, "cat": 0.25}], [{"cat": 0.75, "dog": 0.25}]]
    found = compared(before, after)
    assert (found.elements, found.max_error) == (4, 0.25)
    assert found.relative == pytest.approx(np.sqrt(0.125 / 1.125))
    assert compared(before, before).relative == 0
    other = [[{"cat": 0.25, "cow": 0.75}], [{"cat": 0.5, "dog": 0.5}]]
    assert compared(before, other).relative == np.inf
    assert compared(before, np.zeros((2, 1, 2))).note == "another kind of value instead of [1, 2]"


def test_what_is_neither_is_said():
    odd = [[np.zeros(3)], [np.zeros(3)]]
    assert compared(odd, odd).note == "neither numbers nor text"


def sessions(text, **constants):
    """Return two sessions of a model."""
    data = model(text, **constants).SerializeToString()
    return session(data), session(data, optimize=True)


def test_random_outputs_are_not_compared():
    text = "(float[N,4] x) => (float[N,4] y, float[N,4] z) { r = RandomNormalLike(x) z = Add(x, r) y = Mul(x, k) }"
    reference, stage = sessions(text, k=np.float32(2))
    found = compare(Original(reference), {"stage": stage}, [{"x": normal(3, 4, seed=seed)} for seed in (0, 1)], ())["stage"]
    assert [(each.relative, each.note) for each in found] == [
        (0, None),
        (None, "random: it differs between two runs of the original"),
    ]


def test_stages_share_the_outputs_of_the_original(monkeypatch):
    class Counted(Session):
        runs = 0

        def run(self, names, feed):
            self.runs += 1
            return super().run(names, feed)

    feeds, seen = [{"row": row} for row in range(5)], []
    values = np.arange(10.0).reshape(5, 2)
    for kept, runs in ((1 << 20, 6), (3 * 16, 8)):  # one more tells which outputs are random; those that are not kept are run again
        monkeypatch.setattr(compare_module, "KEPT", kept)
        counted = Counted(values)
        original = Original(counted)
        found = [
            compare(original, {name: Session(values + name)}, feeds, (), None, lambda *what: seen.append(what[:2]))[name] for name in (1, 2)
        ]
        assert [each[0].max_error for each in found] == [1, 2]
        assert counted.runs == runs
    assert seen[:5] == [("reference", 0), (1, 0), ("reference", 1), (1, 1), ("reference", 2)]
    assert seen[10:20] == [(2, number) for number in range(5)] + seen[:5]


def test_a_zipmap_is_compared():
    proto = model("(float[N,2] x) => (float[N,2] y) { y = Softmax(x) }")
    proto.opset_import.append(onnx.helper.make_opsetid("ai.onnx.ml", 3))
    proto.graph.node.append(onnx.helper.make_node("ZipMap", ["y"], ["z"], domain="ai.onnx.ml", classlabels_strings=["a", "b"]))
    proto.graph.output.append(onnx.ValueInfoProto(name="z"))
    map_type = proto.graph.output[-1].type.sequence_type.elem_type.map_type
    map_type.key_type = onnx.TensorProto.STRING
    map_type.value_type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    run = session(proto.SerializeToString())
    found = compare(Original(run), {"stage": run}, [{"x": normal(3, 2)}], ())["stage"]
    assert [(each.output, each.elements, each.relative, each.note) for each in found] == [("y", 6, 0, None), ("z", 6, 0, None)]
