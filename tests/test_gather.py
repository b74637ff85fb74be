"""Gather: rows chosen by any indices keep the channels that lie along another axis; the oracle is onnxruntime."""

import numpy as np
import pytest
from onnx import helper
from sketch import assert_same, folds, model, norm, normal, ops, refuses

import fastbn

TABLE = "(int64[{0}] ids) => ({1} y) {{ e = Gather(table, ids) {2} y = BatchNormalization(n, s, t, m, v) }}"
IDS = {"ids": np.array([[1, 4, 0], [2, 2, 3]], np.int64)}


def fixed(proto, **feeds):
    """Compare on valid indices, which random numbers are not."""
    result = fastbn.fold(proto, verify=False)
    assert_same(proto, result.model, feeds)
    return ops(result.model)


def test_a_norm_behind_an_embedding_goes_into_the_table():
    text = TABLE.format("2,3", "float[2,4,3]", "n = Transpose<perm = [0, 2, 1]>(e)")
    assert fixed(model(text, table=normal(5, 4), **norm(4)), **IDS) == "Gather Transpose"


def test_a_norm_behind_one_chosen_row_goes_into_the_table():
    text = "(int64 id) => (float[1,4] y) { e = Gather(table, id) n = Unsqueeze(e, at) y = BatchNormalization(n, s, t, m, v) }"
    proto = model(text, table=normal(5, 4), at=np.array([0], np.int64), **norm(4))
    assert fixed(proto, id=np.array(3, np.int64)) == "Gather Unsqueeze"


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
@pytest.mark.parametrize("axis", [0, 1, 2, 3, -1])
def test_channels_pass_indices_of_any_rank_along_any_axis(rank, axis):
    """Channels move to the axis that is theirs behind it; along their own axis a list chooses among them."""
    ids = np.arange(2**rank).reshape((2,) * rank).astype(np.int64) % 2
    shape = [1] * (3 + rank)
    if axis != 1:
        shape[rank if axis == 0 else 1] = 3
    else:
        shape = [2, 1, 1] if rank == 1 else []
    text = "(float[2,3,4,5] x) => (float y) { c = Conv(x, w) g = Gather(c, ids) h = Mul(g, k) y = Add(h, k) }"
    proto = model(text, ids=ids, w=normal(3, 3, 1, 1), k=normal(*shape))
    proto.graph.node[1].attribute.append(helper.make_attribute("axis", axis))
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    assert fixed(proto, x=normal(2, 3, 4, 5)) == "Conv Gather"


def test_a_norm_behind_indices_of_its_own_channels_needs_a_list():
    text = "(float[2,4,5] x) => (float[2,2,2,5] y) { c = Conv(x, w) g = Gather<axis = 1>(c, ids) y = BatchNormalization(g, s, t, m, v) }"
    proto = model(text, w=normal(3, 4, 1), ids=np.array([[0, 1], [2, 0]], np.int64), **norm(2))
    assert fixed(proto, x=normal(2, 4, 5)) == "Conv Gather BatchNormalization"
    text = text.replace("2,2,2,5", "2,2,5")
    folds(model(text, w=normal(3, 4, 1), ids=np.array([2, 0], np.int64), **norm(2)), "Conv Gather")


def test_an_index_that_is_out_of_range_is_said():
    text = "(float[2,4,5] x) => (float[2,2,5] y) { c = Conv(x, w) g = Gather<axis = 1>(c, ids) y = BatchNormalization(g, s, t, m, v) }"
    with pytest.raises(fastbn.ModelError, match="Expected an axis of a value of rank 3, got 3 - at `g`"):
        fastbn.fold(model(text, w=normal(3, 4, 1), ids=np.array([3, 0], np.int64), **norm(2)), verify=False)


def picked(nodes, *, x="2,4,5", first="c = Conv(x, w)", last="", **constants):
    """Return a convolution of 3 channels, which gives c, and `nodes`, which give d, with a norm behind them or, in `last`, a Conv."""
    behind = last or "y = BatchNormalization(d, s, t, m, v)"
    channels = constants.pop("channels", 3)
    return model(f"(float[{x}] x) => (float y) {{ {first} {nodes} {behind} }}", **norm(channels), **constants)


FORWARD = {"first": "r = Tanh(x) c = BatchNormalization(r, s, t, m, v)", "last": "y = Conv(d, w)"}
ELEMENTS = np.random.default_rng(0).integers(0, 5, (2, 3, 4))
BLOCKS = np.random.default_rng(0).integers(0, 2, (4, 6, 1))

# name -> (model whose norm goes, what stays).
OTHER_PICKS = {
    "GatherElements": (picked("d = GatherElements <axis = 2> (c, i)", i=ELEMENTS, w=normal(3, 4, 1)), "Conv GatherElements"),
    "GatherElements of the first channels": (
        picked("d = GatherElements <axis = -1> (c, i)", i=ELEMENTS[:, :2], channels=2, w=normal(3, 4, 1)),
        "Conv GatherElements",
    ),
    "GatherElements forward": (
        picked("d = GatherElements <axis = 2> (c, i)", x="2,3,5", i=ELEMENTS[:, :2], w=normal(6, 2, 1), **FORWARD),
        "Tanh GatherElements Conv",
    ),
    "GatherND": (
        picked(
            "e = Transpose <perm = [2,0,1]> (c) f = GatherND(e, i) d = Transpose <perm = [0,2,1]> (f)",
            i=BLOCKS[:, 0],
            channels=3,
            w=normal(3, 4, 1),
        ),
        "Conv Transpose GatherND Transpose",
    ),
    "GatherND forward": (
        picked(
            "e = Transpose <perm = [2,1,0]> (c) f = GatherND(e, i) d = Transpose <perm = [0,2,1,3]> (f)",
            x="2,3,5",
            i=BLOCKS,
            w=normal(6, 3, 1, 1),
            **FORWARD,
        ),
        "Tanh Transpose GatherND Transpose Conv",
    ),
    "GatherND in batches": (
        picked("d = GatherND <batch_dims = 2> (c, i)", i=ELEMENTS[:, :, :, None], w=normal(3, 4, 1)),
        "Conv GatherND",
    ),
}


@pytest.mark.parametrize("case", OTHER_PICKS)
def test_other_ways_to_choose(case):
    proto, stays = OTHER_PICKS[case]
    folds(proto, stays)


@pytest.mark.parametrize("nodes", ["d = GatherElements <axis = 1> (c, i)", "d = GatherND <batch_dims = 1> (c, j)"])
def test_other_ways_to_choose_channels(nodes):
    constants = {"i": ELEMENTS % 3} if "(c, i)" in nodes else {"j": np.array([[[0], [2]], [[1], [0]]])}
    refuses(picked(nodes, channels=3 if "i" in constants else 2, w=normal(3, 4, 1), **constants), "axis", verify=False)


def test_nothing_passes_a_gathernd_whose_indices_have_no_known_shape():
    text = """(float[2,5,4] x, int64[?] list, int64[K] ids) => (float y) {
        c = Tanh(x) i = Reshape(ids, list) f = GatherND(c, i) n = Identity(f) y = BatchNormalization(n, s, t, m, v)
    }"""
    reason = refuses(model(text, **norm(4)), verify=False)
    assert "the shape of the indices of GatherND 'f' is not known" in reason
