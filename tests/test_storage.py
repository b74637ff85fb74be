"""Files in and out: every kind of input, external data in all its forms, and writes that are all or nothing."""

import errno
import io
import os
import shutil
from pathlib import Path

import make_models
import numpy as np
import onnx
import pytest
from onnx import TensorProto, external_data_helper, numpy_helper
from sketch import assert_same, conv_bn, initializers, norm, normal, ops, random_feeds, run

import fastbn
from fastbn.graph.model import storage
from fastbn.graph.rewrite import data_files, replacement, writer


def save_external(proto, folder, name="model.onnx", data="model.data", threshold=0):
    """Write a model with its tensors in a data file; return its path."""
    copy = onnx.ModelProto.FromString(proto.SerializeToString())
    external_data_helper.convert_model_to_external_data(copy, True, data, threshold)
    onnx.save(copy, folder / name)
    return folder / name


def loaded(path):
    """Return a saved model with all tensors inside."""
    return onnx.load(path)


@pytest.fixture(name="big", scope="module")
def _big():
    """A model with a weight above LARGEST_INLINE."""
    text = """(float[N,512,2,2] x) => (float[N,600,2,2] y) {
        c = Conv(x, w)
        y = BatchNormalization(c, s, t, m, v)
    }"""
    return conv_bn(text, w=normal(600, 512, 1, 1), b=None, **norm(600))


@pytest.mark.parametrize("kind", ["str", "Path", "PathLike", "bytes", "bytearray", "memoryview", "ModelProto"])
def test_a_model_comes_in_any_form(kind, tmp_path):
    proto = conv_bn()
    data = proto.SerializeToString()
    path = tmp_path / "m.onnx"
    path.write_bytes(data)

    class Name:
        def __fspath__(self):
            return os.fsencode(path)

    given = {"str": str(path), "Path": path, "PathLike": Name(), "bytes": data, "bytearray": bytearray(data)}
    given |= {"memoryview": memoryview(data), "ModelProto": proto}
    result = fastbn.fold(given[kind])
    assert ops(result.model) == "Conv"
    assert path.read_bytes() == data
    assert proto.SerializeToString() == data


@pytest.mark.parametrize("given", [None, 3, ["a.onnx"], onnx.GraphProto()], ids=str)
def test_what_is_no_model(given):
    with pytest.raises(fastbn.ArgumentTypeError, match=r"Expected a path, bytes, onnx\.ModelProto or onnx_ir\.Model, got .* - at `model`"):
        fastbn.fold(given)


def test_save_and_read_again(tmp_path):
    proto = conv_bn()
    result = fastbn.fold(proto)
    result.save(tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx").read_bytes() == result.to_bytes()
    assert os.listdir(tmp_path) == ["out.onnx"]


@pytest.mark.parametrize("threshold", [0, 100])
def test_external_data_folds(tmp_path, threshold):
    proto = conv_bn()
    path = save_external(proto, tmp_path, threshold=threshold)
    before = (tmp_path / "model.data").read_bytes()
    result = fastbn.fold(path)
    assert result.parity.status == "ok"
    result.save(tmp_path / "out.onnx")
    assert sorted(os.listdir(tmp_path)) == ["model.data", "model.onnx", "out.onnx"], "small constants go into the model file"
    assert (tmp_path / "model.data").read_bytes() == before
    assert_same(proto, loaded(tmp_path / "out.onnx"))
    assert_same(proto, result.model)


def test_large_weights_are_patched_in_their_place(tmp_path, big):
    path = save_external(big, tmp_path)
    fastbn.fold(path).save(tmp_path / "out.onnx")
    old, new = (onnx.load(tmp_path / name, load_external_data=False).graph.initializer[0] for name in ("model.onnx", "out.onnx"))
    where = [{entry.key: entry.value for entry in tensor.external_data} for tensor in (old, new)]
    assert (where[0]["offset"], where[0]["length"]) == (where[1]["offset"], where[1]["length"])
    assert (tmp_path / "out.onnx.data").stat().st_size == (tmp_path / "model.data").stat().st_size
    assert_same(big, loaded(tmp_path / "out.onnx"))


def test_a_patched_copy_equals_the_fold_in_memory(tmp_path, big):
    path = save_external(big, tmp_path)
    fastbn.fold(path, verify=False).save(tmp_path / "out.onnx")
    inside, outside = initializers(fastbn.fold(big, verify=False).model), initializers(loaded(tmp_path / "out.onnx"))
    assert {name: array.tobytes() for name, array in inside.items()} == {name: array.tobytes() for name, array in outside.items()}


def test_a_system_that_writes_in_small_pieces(tmp_path, big, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, view, offset: pwrite(file, view[:10_007], offset))
    fastbn.fold(save_external(big, tmp_path), verify=False).save(tmp_path / "out.onnx")
    assert_same(big, loaded(tmp_path / "out.onnx"))


def test_two_tensors_at_one_offset_are_appended_not_overwritten(tmp_path, big):
    proto = onnx.ModelProto.FromString(big.SerializeToString())
    other = proto.graph.initializer.add()
    other.CopyFrom(proto.graph.initializer[0])
    other.name = "w_again"
    proto.graph.node.add(op_type="Conv", input=["x", "w_again"], output=["z"], name="z")
    proto.graph.output.add(name="z").type.tensor_type.elem_type = TensorProto.FLOAT
    path = save_external(proto, tmp_path)
    model = onnx.load(path, load_external_data=False)
    first = model.graph.initializer[0]
    model.graph.initializer[-1].CopyFrom(first)
    model.graph.initializer[-1].name = "w_again"
    path.write_bytes(model.SerializeToString())
    result = fastbn.fold(path)
    assert result.parity.status == "ok"
    result.save(tmp_path / "out.onnx")
    after = initializers(loaded(tmp_path / "out.onnx"))
    assert after["w_again"].tobytes() == initializers(big)["w"].tobytes()
    assert after["w"].tobytes() != after["w_again"].tobytes()
    assert_same(proto, loaded(tmp_path / "out.onnx"))


def test_a_shared_external_weight_is_duplicated_at_the_end(tmp_path):
    text = """(float[N,512,2,2] x) => (float[N,600,2,2] y, float[N,600,2,2] z) {
        c = Conv(x, w)
        y = BatchNormalization(c, s, t, m, v)
        d = Conv(x, w)
        z = BatchNormalization(d, s2, t2, m2, v2)
    }"""
    proto = conv_bn(text, w=normal(600, 512, 1, 1), b=None, **norm(600), **norm(600, "2", seed=3))
    path = save_external(proto, tmp_path)
    result = fastbn.fold(path)
    assert (len(result.folded), result.parity.status) == (2, "ok")
    result.save(tmp_path / "out.onnx")
    assert_same(proto, loaded(tmp_path / "out.onnx"))
    assert_same(proto, result.model)


def test_in_place_with_external_data(tmp_path, big):
    path = save_external(big, tmp_path)
    fastbn.fold(path).save(path)
    assert_same(big, loaded(path))
    assert ops(loaded(path)) == "Conv"


def test_the_hugging_face_cache_of_links(tmp_path, big):
    """snapshots/1/model.onnx -> ../../blobs/a, and its data file -> ../../blobs/b."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "1"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    save_external(big, blobs)
    (blobs / "model.onnx").rename(blobs / "a1b2")
    (blobs / "model.data").rename(blobs / "c3d4")
    (snapshot / "model.onnx").symlink_to(Path("../../blobs/a1b2"))
    (snapshot / "model.data").symlink_to(Path("../../blobs/c3d4"))
    before = (blobs / "c3d4").read_bytes()
    result = fastbn.fold(snapshot / "model.onnx")
    assert result.parity.status == "ok"
    result.save(tmp_path / "out.onnx")
    assert_same(big, loaded(tmp_path / "out.onnx"))
    assert (blobs / "c3d4").read_bytes() == before


def test_external_data_without_a_path():
    proto = conv_bn()
    external_data_helper.convert_model_to_external_data(proto, True, "m.data", 0)
    for tensor in proto.graph.initializer:
        external_data_helper.set_external_data(tensor, "m.data", 0, len(tensor.raw_data))
        tensor.ClearField("raw_data")
    with pytest.raises(fastbn.ModelError, match="Expected a path, for a model with external data, got bytes or an object"):
        fastbn.fold(proto)


def test_a_tensor_of_external_data_in_a_constant_node(tmp_path):
    text = """(float[N,3,8,8] x) => (float[N,4,6,6] y) {
        w = Constant()
        c = Conv(x, w)
        y = BatchNormalization(c, s, t, m, v)
    }"""
    proto = conv_bn(text, w=None, b=None)
    weight = normal(4, 3, 3, 3)
    attribute = proto.graph.node[0].attribute.add(name="value", type=onnx.AttributeProto.TENSOR)
    attribute.t.CopyFrom(numpy_helper.from_array(weight))
    inline = onnx.ModelProto.FromString(proto.SerializeToString())
    (tmp_path / "w.data").write_bytes(weight.tobytes())
    external_data_helper.set_external_data(attribute.t, "w.data")
    attribute.t.ClearField("raw_data")
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    result = fastbn.fold(tmp_path / "m.onnx", verify=False)
    assert ops(result.model) == "Conv"
    assert_same(inline, result.model)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_large_model_of_make_models(tmp_path, threads, monkeypatch):
    monkeypatch.setattr(data_files, "WRITERS", threads)
    path = make_models.large(tmp_path, layers=3, channels=640)
    result = fastbn.fold(path)
    assert (len(result.folded), result.parity.status) == (3, "ok")
    result.save(tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx.data").stat().st_size == 3 * 640 * 640 * 4
    feeds = random_feeds(onnx.load(path))
    before, after = run(onnx.load(path), feeds)[0], run(onnx.load(tmp_path / "out.onnx"), feeds)[0]
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5 * np.abs(before).max())


def test_a_weight_larger_than_a_block_is_streamed_like_the_kernel():
    from fastbn.affine import WeightLayout
    from fastbn.graph.model.constant import BLOCK, Scaled, Tensor

    for layout in (
        WeightLayout(1, 1, 5, BLOCK // 2),
        WeightLayout(1, 3, BLOCK + 7, 1),
        WeightLayout(2, 3, 5, BLOCK // 4),
        WeightLayout(3, 4, 5, 6),
    ):
        weight = normal(*layout)
        tensor = Tensor(weight.dtype, weight.shape, lambda weight=weight: weight)
        scaled = Scaled(tensor, layout, normal(layout.groups * layout.channels, seed=2).astype(np.float64))
        whole, pieces = scaled.array().ravel(), np.full(weight.size, np.nan, np.float32)
        for first, part in scaled.pieces():
            assert np.isnan(pieces[first : first + part.size]).all(), "no element twice"
            pieces[first : first + part.size] = part.ravel()
        assert pieces.tobytes() == whole.tobytes()


def test_bad_channels_are_found_block_by_block():
    from fastbn.affine import WeightLayout
    from fastbn.graph.model.constant import Scaled, Tensor

    weight = np.ones((2, 3, 4, 5), np.float32)
    weight[1, 2, 3, 4] = 3e38
    weight[0, 1, 2, 0] = 1e-45
    scaled = Scaled(
        Tensor(weight.dtype, weight.shape, lambda: weight), WeightLayout(2, 3, 4, 5), np.where(np.arange(8) % 4 == 3, 10.0, 0.1)
    )
    assert scaled.check() == (1, 1)
    assert scaled.bad_channels() == [2, 7]


def test_atomic_leaves_the_old_file_when_the_block_fails(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), replacement.atomic(path, "new"):
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_atomic_replaces_and_keeps_the_mode(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(0o640)
    with replacement.atomic(path, "new"):
        assert path.read_text() == "old"
        assert list(tmp_path.glob(".fastbn-*/file")), "renamed, never copied"
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o640
    assert os.listdir(tmp_path) == ["file"]


def test_a_new_file_has_the_mode_of_any_new_file(tmp_path):
    (tmp_path / "plain").write_text("")
    fastbn.fold(conv_bn()).save(tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("call", ["os.replace", "os.fsync", "os.pwrite", "pathlib.Path.write_bytes"])
def test_a_full_disk_leaves_nothing(call, tmp_path, big, monkeypatch):
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    path = save_external(big, tmp_path / "in")
    (tmp_path / "out" / "out.onnx").write_text("old")
    result = fastbn.fold(path, verify=False)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(call, full)
    with pytest.raises(fastbn.StorageError, match="no space left on device"):
        result.save(tmp_path / "out" / "out.onnx")
    assert os.listdir(tmp_path / "out") == ["out.onnx"]
    assert (tmp_path / "out" / "out.onnx").read_text() == "old"


@pytest.mark.parametrize("call", ["os.fsync", "os.pwrite", "pathlib.Path.write_bytes"])
def test_a_full_disk_leaves_the_old_model_and_its_old_data(call, tmp_path, big, monkeypatch):
    result = fastbn.fold(save_external(big, tmp_path), verify=False)
    result.save(tmp_path / "out.onnx")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as only:
        only.setattr(call, full)
        with pytest.raises(fastbn.StorageError, match="no space left on device"):
            result.save(tmp_path / "out.onnx")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_one_name_in_two_branches_is_two_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "LARGEST_INLINE", 0)
    text = """(float[N,3,8,8] x, bool flag) => (float[N,4,6,6] y) {
        y = If (flag) <
            then_branch = yes () => (a) { c = Conv(x, v1) a = BatchNormalization(c, s, t, m, v) },
            else_branch = no () => (d) { e = Conv(x, v2) d = BatchNormalization(e, s, t, m, v) }
        >
    }"""
    proto = conv_bn(text, w=None, b=None)
    for number, attribute in enumerate(proto.graph.node[0].attribute):
        attribute.g.node[0].input[1] = "w"
        attribute.g.initializer.append(numpy_helper.from_array(normal(4, 3, 3, 3, seed=number), "w"))
    inline = onnx.ModelProto.FromString(proto.SerializeToString())
    weights = [attribute.g.initializer[0] for attribute in proto.graph.node[0].attribute]
    (tmp_path / "w.data").write_bytes(weights[0].raw_data + weights[1].raw_data)
    for number, tensor in enumerate(weights):
        external_data_helper.set_external_data(tensor, "w.data", 432 * number, 432)
        tensor.ClearField("raw_data")
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    result = fastbn.fold(tmp_path / "m.onnx")
    assert (len(result.folded), result.parity.status) == (2, "ok")
    result.save(tmp_path / "out.onnx")
    for flag in (True, False):
        feeds = {"x": normal(2, 3, 8, 8), "flag": np.array(flag)}
        assert_same(inline, result.model, feeds)
        assert_same(inline, loaded(tmp_path / "out.onnx"), feeds)


def test_a_link_as_output_is_replaced_and_its_target_stays(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "m.onnx").write_text("old")
    (tmp_path / "m.onnx").symlink_to("real/m.onnx")
    fastbn.fold(conv_bn()).save(tmp_path / "m.onnx")
    assert ops(onnx.load(tmp_path / "m.onnx")) == "Conv"
    assert (tmp_path / "real" / "m.onnx").read_text() == "old"


def test_several_data_files(tmp_path, big):
    proto = onnx.ModelProto.FromString(big.SerializeToString())
    for number, tensor in enumerate(proto.graph.initializer):
        name = f"part{number % 2}.data"
        with open(tmp_path / name, "ab") as file:
            offset = file.tell()
            file.write(tensor.raw_data)
        external_data_helper.set_external_data(tensor, name, offset, len(tensor.raw_data))
        tensor.ClearField("raw_data")
    (tmp_path / "model.onnx").write_bytes(proto.SerializeToString())
    result = fastbn.fold(tmp_path / "model.onnx")
    assert result.parity.status == "ok"
    (tmp_path / "out").mkdir()
    result.save(tmp_path / "out" / "out.onnx")
    for name in ("part0.data", "part1.data"):
        (tmp_path / name).unlink()
    assert_same(big, loaded(tmp_path / "out" / "out.onnx"))


def test_external_data_without_offset_and_length(tmp_path):
    proto = conv_bn()
    tensor = proto.graph.initializer[0]
    (tmp_path / "w.data").write_bytes(tensor.raw_data)
    weight = tensor.raw_data
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="w.data")
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    result = fastbn.fold(tmp_path / "m.onnx")
    assert result.parity.status == "ok"
    assert (tmp_path / "w.data").read_bytes() == weight


def test_a_data_file_in_a_folder_below(tmp_path, big):
    (tmp_path / "weights").mkdir()
    path = save_external(big, tmp_path, data="data.bin")
    shutil.move(tmp_path / "data.bin", tmp_path / "weights" / "data.bin")
    proto = onnx.load(path, load_external_data=False)
    for tensor in proto.graph.initializer:
        tensor.external_data[0].value = "weights/data.bin"
    path.write_bytes(proto.SerializeToString())
    result = fastbn.fold(path)
    result.save(tmp_path / "out.onnx")
    assert_same(big, loaded(tmp_path / "out.onnx"))


def test_a_pipe_is_read_to_its_end_and_no_further_than_the_largest_model(monkeypatch):
    data = os.urandom(3 << 20)
    assert storage.read_pipe(io.BytesIO(data)) == data
    monkeypatch.setattr(storage, "PROTOBUF_LIMIT", 1 << 20)
    assert storage.read_pipe(io.BytesIO(data)) == data[: 2 << 20]


def test_the_size_of_a_model_is_that_of_its_file_or_of_what_it_has_become(tmp_path):
    proto = conv_bn()
    data = proto.SerializeToString()
    (tmp_path / "m.onnx").write_bytes(data + b"\xfa\x03\x00")  # a field that nobody knows
    source = storage.load(tmp_path / "m.onnx")
    assert source.size() == len(data) + 3
    assert storage.load(data).size() == storage.load(proto).size() == len(data)
    source.proto.doc_string = "edited"
    source.inference = storage.InferenceForm(["a"], [])
    assert source.size() == source.proto.ByteSize()


def test_pages_that_are_given_back_are_read_again(tmp_path):
    proto = conv_bn()
    onnx.save(proto, tmp_path / "in.onnx", save_as_external_data=True, location="in.data", size_threshold=0)
    source = storage.load(tmp_path / "in.onnx")
    before = [source.external(tensor).copy() for tensor in source.external_tensors]
    source.give_pages_back()
    assert before
    assert all((source.external(tensor) == values).all() for tensor, values in zip(source.external_tensors, before, strict=True))


def test_the_size_counts_data_files(tmp_path):
    path = save_external(conv_bn(), tmp_path)
    assert storage.load(path).size() == path.stat().st_size + (tmp_path / "model.data").stat().st_size


def test_what_is_derived():
    data = conv_bn().SerializeToString() + b"\x08\x08"  # the version once more, which protobuf would write first
    source, other = storage.load(data), onnx.ModelProto(doc_string="other")
    assert (source.derived().proto is source.proto, source.derived().to_bytes()) == (True, data)
    assert (source.derived(other).proto is other, source.derived(other).to_bytes()) == (True, other.SerializeToString())
    edited = source.derived(other, edited=True)
    assert [each.is_edited for each in (source.derived(other), edited, edited.derived(other))] == [False, True, True]
    shared = storage.load(other)
    assert [each.is_shared for each in (shared.derived(), shared.derived(source.proto), source.derived())] == [True, False, False]
