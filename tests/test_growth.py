"""How large a folded file is: never larger than its original, but for what the report names."""

import os
from pathlib import Path

import numpy as np
import pytest
from sketch import folds, initializers, model, norm, normal

import fastbn

SHARED = Path(__file__).resolve().parents[2] / "shared"
FOLDERS = [
    Path(os.environ.get("FASTBN_MODELS") or SHARED / "models"),
    Path(os.environ.get("FASTBN_MORE_MODELS") or SHARED / "models_more"),
    Path(os.environ.get("FASTBN_CASES") or SHARED / "cases"),
]
FILES = [path for folder in FOLDERS for path in sorted(folder.rglob("*.onnx"))]

# What the report says of a fold that makes the file larger.
SAID = ("is shared: duplicated", "stored as it is", "a new bias of")

# What new names, attributes and biases may take.
UNSAID = 4096


@pytest.mark.skipif(not FILES, reason="no real models: FASTBN_MODELS, FASTBN_MORE_MODELS and FASTBN_CASES name their folders")
def test_no_real_model_grows_without_a_word():
    folded, grown = 0, 0
    for path in FILES:
        try:
            result = fastbn.fold(path, verify=False)
        except fastbn.FastbnError:  # some of the cases are no models
            continue
        original = path.stat().st_size + (sum(Path(data).stat().st_size for data in result._index.source.data_files()))
        reported = [fold.note for fold in result.folded if any(word in (fold.note or "") for word in SAID)]
        is_larger = len(result.to_bytes()) > original + UNSAID
        assert reported or not is_larger, path.name
        assert all(fold.into and fold.op for fold in result.folded), path.name
        folded += bool(result.folded)
        grown += is_larger
    assert folded > 10
    assert grown < folded / 4


SHARED_WEIGHT = """(float[1,16,8,8] x, float[1,16,8,8] z) => (float y, float u) {
    c = Conv(x, w, b)
    y = BatchNormalization(c, s, t, m, v)
    d = Conv(z, w, b)
    u = BatchNormalization(d, s2, t2, m2, v2)
}"""


def test_the_note_names_the_weight_that_is_duplicated():
    proto = model(SHARED_WEIGHT, w=normal(16, 16, 3, 3), b=normal(16), **norm(16), **norm(16, "2", seed=2))
    notes = [fold.note for fold in folds(proto, "Conv Conv").folded]
    assert notes == [None, "weight 'w' is shared: duplicated, 9.2 kB; weight 'b' is shared: duplicated"]


def test_a_shared_constant_node_is_named_too():
    text = SHARED_WEIGHT.replace("c = Conv(x", "w = Identity(k) c = Conv(x")
    proto = model(text, k=normal(16, 16, 3, 3), b=normal(16), **norm(16), **norm(16, "2", seed=2))
    notes = [fold.note for fold in folds(proto, "Conv Conv").folded]
    assert "'k'" in notes[1]
    assert "9.2 kB" in notes[1]


# ---- a table of an embedding ----


def embedding(nodes="y = BatchNormalization(e, s, t, m, v)", ids="int64[N]", axis=0, dtype=np.float32, **changes):
    kind = {np.float32: "float", np.float16: "float16", np.float64: "double"}[dtype]
    text = f"({ids} i) => ({kind} y) {{ e = Gather <axis = {axis}> (table, i) {nodes} }}"
    constants = {"table": normal(50, 8, dtype=dtype), **norm(8, dtype=dtype)}
    return model(
        text, **{name: values for name, values in {**constants, **changes}.items() if f"{name}," in nodes + "table," or f"{name})" in nodes}
    )


def folded_embedding(proto, kept):
    result = fastbn.fold(proto)
    assert [node.op_type for node in result.model.graph.node] == kept.split(), [each.reason for each in result.kept]
    assert result.parity.ok, result.parity
    (fold,) = result.folded
    assert (fold.into, fold.op, fold.note) == ("e", "Gather", None)
    return result.model


@pytest.mark.parametrize("ids", ["int64[N]", "int32[N]", "int64[7]", "int32[3]"])
@pytest.mark.parametrize("axis", [0, -2])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_norm_behind_an_embedding_goes_into_its_table(ids, axis, dtype):
    after = folded_embedding(embedding(ids=ids, axis=axis, dtype=dtype), "Gather")
    assert initializers(after)["table"].dtype == dtype


@pytest.mark.parametrize("ids", ["int64", "int64[2]", "int32[2,3]", "int64[1,2,3]"])
def test_a_number_times_an_embedding_of_indices_of_any_rank_goes_into_its_table(ids):
    """As transformers write it: the root of the width, then what is added for each position or token type."""
    folded_embedding(embedding("y = Mul(e, root)", ids, root=np.float32(8**0.5)), "Gather")
    folded_embedding(embedding("y = Add(e, kind)", ids, kind=normal(8)), "Gather")
    folded_embedding(embedding("y = Mul(e, width)", ids, width=normal(8)), "Gather")


def test_channels_first_behind_an_embedding():
    nodes = "f = Transpose <perm = [0,2,1]> (e) y = BatchNormalization(f, s, t, m, v)"
    folded_embedding(embedding(nodes, "int64[2,3]"), "Gather Transpose")


def test_a_table_that_the_output_layer_reads_too_is_duplicated_and_named():
    nodes = "n = BatchNormalization(e, s, t, m, v) h = Transpose(table) y = MatMul(n, h)"
    proto = embedding(nodes, table=normal(150, 8))
    result = fastbn.fold(proto)
    assert result.parity.ok
    (fold,) = result.folded
    if fold.into == "e":
        assert fold.note == "weight 'table' is shared: duplicated, 4.8 kB"
        assert "e.table" in initializers(result.model)


def test_a_normalized_table_is_a_constant():
    text = "(int64[N] i) => (float y) { n = BatchNormalization(table, s, t, m, v) y = Gather(n, i) }"
    result = fastbn.fold(model(text, table=normal(50, 8), **norm(8)))
    assert [(fold.into, fold.op) for fold in result.folded] == [("y", "Gather")]
    assert result.parity.ok


def test_a_weight_that_one_fold_duplicates_more_than_once_is_named_once():
    nodes = "c = Conv(x, w) r = Relu(x) e = Conv(r, w) d = Concat <axis = 1> (c, e) z = Conv(r, w)"
    text = f"(float[1,4,8,8] x) => (float y, float z) {{ {nodes} y = BatchNormalization(d, s, t, m, v) }}"
    (fold,) = fastbn.fold(model(text, w=normal(32, 4, 3, 3), **norm(64))).folded
    assert fold.note.startswith("weight 'w' is shared: duplicated, 4.6 kB, 2 times")
