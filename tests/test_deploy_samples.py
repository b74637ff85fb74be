"""Input data of a deployment: every form that it may have, and one clear line for each that it may not."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from sketch import CONV_BN, conv_bn, model, normal

from fastbn import ArgumentError, ArgumentTypeError, StorageError
from fastbn.deployment.samples import random_samples, read_samples
from fastbn.graph.model import storage
from fastbn.graph.model.index import Index
from fastbn.graph.runtime import Runnable

X = normal(6, 3, 8, 8)

TWO_INPUTS = "(float[N,4] a, int64[N] b) => (float[N,4] y) { c = Cast<to=1>(b) d = Unsqueeze(c, one) y = Add(a, d) }"


def index_of(proto, **options):
    return Index(storage.load(proto), **options)


def two_inputs():
    return index_of(model(TWO_INPUTS, one=np.array([1])))


def read(data, proto=None, most=256):
    return read_samples(data, index_of(conv_bn() if proto is None else proto), most)


def save_tensor(path, array, name=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(numpy_helper.from_array(array, name).SerializeToString())


def stacked(samples, name="x"):
    return np.concatenate([feed[name] for feed in samples.feeds])


@pytest.fixture(name="here")
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_npz(folder):
    np.savez(folder / "data.npz", x=X)
    return "data.npz", 6


def write_npy(folder):
    np.save(folder / "data.npy", X)
    return "data.npy", 6


def write_whole_inputs(folder):
    np.save(folder / "data.npy", X[:, None])
    return "data.npy", 6


def write_pb(folder):
    save_tensor(folder / "data.pb", X, "x")
    return "data.pb", 1


def write_folder_of_npz(folder):
    (folder / "many").mkdir()
    (folder / "many" / "README.txt").write_text("no sample")
    np.savez(folder / "many" / "0.npz", x=X[:4])
    np.savez(folder / "many" / "1.npz", x=X[4:])
    return "many", 6


def write_folder_of_npy(folder):
    (folder / "many").mkdir()
    for number, row in enumerate(X):
        np.save(folder / "many" / f"{number}.npy", row[None])
    return "many", 6


def write_folder_of_pb(folder):
    for number, row in enumerate(X):
        save_tensor(folder / "many" / f"{number}.pb", row[None])
    return "many", 6


def write_test_data_sets(folder):
    for number, row in enumerate(X):
        save_tensor(folder / "tests" / f"test_data_set_{number}" / "input_0.pb", row[None], "x" if number % 2 else "")
        save_tensor(folder / "tests" / f"test_data_set_{number}" / "output_0.pb", row[None])
    return "tests", 6


def write_one_test_data_set(folder):
    save_tensor(folder / "test_data_set_0" / "input_0.pb", X)
    return "test_data_set_0", 1


FORMS = [
    write_npz,
    write_npy,
    write_whole_inputs,
    write_pb,
    write_folder_of_npz,
    write_folder_of_npy,
    write_folder_of_pb,
    write_test_data_sets,
    write_one_test_data_set,
]


@pytest.mark.parametrize("write", FORMS)
def test_a_form_of_file(write, here):
    path, feeds = write(here)
    samples = read(path)
    assert (len(samples.feeds), samples.available, samples.rows) == (feeds, feeds, 6)
    assert np.array_equal(stacked(samples), X)
    assert (samples.random, samples.origin, samples.notes) == (False, path, ())
    assert all(values.flags.c_contiguous for feed in samples.feeds for values in feed.values())


@pytest.mark.parametrize("data", [X, {"x": X}, [{"x": row[None]} for row in X]], ids=["array", "dict", "list"])
def test_a_form_of_object(data):
    samples = read(data)
    assert np.array_equal(stacked(samples), X)
    assert len(samples.feeds) == 6


def test_a_fixed_batch_is_fed_whole():
    proto = conv_bn(CONV_BN.replace("N", "2"))
    samples = read(X, proto)
    assert [feed["x"].shape for feed in samples.feeds] == [(2, 3, 8, 8)] * 3
    assert samples.rows == 6
    with pytest.raises(ArgumentError, match="Expected a multiple of 2 samples, the model's batch, of 'x', got 5 - at `data`"):
        read(X[:5], proto)


def test_of_many_feeds_evenly_spaced_ones_are_taken():
    x = np.zeros((100, 3, 8, 8), np.float32)
    x[:, 0, 0, 0] = np.arange(100)
    samples = read(x, most=4)
    assert [feed["x"][0, 0, 0, 0] for feed in samples.feeds] == [0, 33, 66, 99]
    assert (samples.available, samples.rows) == (100, 4)
    assert str(samples) == "4 samples from arrays, of 100 feeds there evenly 4"


def test_several_inputs(here):
    a, b = normal(5, 4), np.arange(5)
    np.savez("data.npz", a=a, b=b)
    (here / "arrays").mkdir()
    np.save(here / "arrays" / "a.npy", a)
    np.save(here / "arrays" / "b.npy", b)
    save_tensor(here / "test" / "input_0.pb", a)
    save_tensor(here / "test" / "input_1.pb", b)
    for path, feeds in (("data.npz", 5), ("arrays", 5), ("test", 1)):
        samples = read_samples(path, two_inputs(), 256)
        assert len(samples.feeds) == feeds
        assert np.array_equal(stacked(samples, "a"), a)
        assert np.array_equal(stacked(samples, "b"), b)


def test_one_sample_of_an_input_goes_with_every_one_of_the_other():
    samples = read_samples({"a": normal(5, 4), "b": np.array([7])}, two_inputs(), 256)
    assert [feed["b"][0] for feed in samples.feeds] == [7] * 5


def test_initializers_that_are_inputs_need_no_data():
    proto = conv_bn()
    for tensor in proto.graph.initializer:
        proto.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    assert len(read(X, proto).feeds) == 6


def test_types_of_one_kind_are_converted_and_that_is_said():
    samples = read(X.astype(np.float64))
    assert samples.feeds[0]["x"].dtype == np.float32
    assert samples.notes == ("float64 of 'x' read as float32",)
    assert read_samples({"a": normal(2, 4), "b": np.arange(2, dtype=np.int32)}, two_inputs(), 9).feeds[0]["b"].dtype == np.int64


def test_scalars_text_and_unknown_shapes():
    proto = model("(float s, string[N] t, float u) => (float y) { y = Add(s, u) }")
    for info in proto.graph.input[2:]:
        info.type.tensor_type.ClearField("shape")
    samples = read_samples({"s": np.float32(1), "t": np.array(["a", "b"]), "u": X}, index_of(proto), 9)
    assert [feed["t"].tolist() for feed in samples.feeds] == [["a"], ["b"]]
    assert samples.feeds[0]["s"].shape == ()
    assert samples.feeds[0]["u"].shape == X.shape


def test_input_shapes_count():
    proto = conv_bn(CONV_BN.replace("float[N,3,8,8] x", "float[N,C,H,W] x"))
    index = index_of(proto, input_shapes={"x": (2, 3, 8, 8)})
    assert len(read_samples(X, index, 256).feeds) == 3


def test_random_samples_are_seeded_and_said():
    index = index_of(conv_bn())
    reference = Runnable.of(index.source).session()
    one, same, other = (random_samples(reference, index, {}, seed, 5) for seed in (0, 0, 1))
    assert (one.random, one.rows, one.origin) == (True, 5, "normal random numbers, seed 0")
    assert [feed["x"].shape for feed in one.feeds] == [(1, 3, 8, 8)] * 5
    assert np.array_equal(stacked(one), stacked(same))
    assert not np.array_equal(stacked(one), stacked(other))
    assert len({values["x"].tobytes() for values in one.feeds}) == len(one.feeds)


def test_random_samples_in_the_batch_that_the_model_takes():
    text = "(float[N,3] x) => (float[3,N] y) { r = Reshape(x, shape) y = Transpose(r) }"
    index = index_of(model(text, shape=np.array([2, 3])))
    samples = random_samples(Runnable.of(index.source).session(), index, {}, 0, 5)
    assert [feed["x"].shape for feed in samples.feeds] == [(2, 3)] * 3


def bad_zip(folder):
    (folder / "data.npz").write_bytes(b"PK no zip at all")
    return "data.npz"


def pickled(folder):
    np.save(folder / "data.npy", np.array([{"x": 1}], dtype=object), allow_pickle=True)
    return "data.npy"


def broken_pb(folder):
    (folder / "data.pb").write_bytes(b"\xff\xff\xff")
    return "data.pb"


def empty_pb(folder):
    (folder / "data.pb").write_bytes(b"")
    return "data.pb"


def empty_folder(folder):
    (folder / "none").mkdir()
    return "none"


def mixed_folder(folder):
    (folder / "mixed").mkdir()
    np.save(folder / "mixed" / "a.npy", X)
    np.savez(folder / "mixed" / "b.npz", x=X)
    return "mixed"


def unknown_ending(folder):
    (folder / "data.csv").write_text("1,2")
    return "data.csv"


def with_value(value):
    def write(folder):
        x = X.copy()
        x[[1, 4], 0, 0, 0] = value
        np.savez(folder / "data.npz", x=x)
        return "data.npz"

    return write


BAD_FILES = {
    "missing": (
        lambda folder: "none.npz",
        StorageError,
        r"^Cannot use 'none.npz': no such file or directory$",
    ),
    "missing folder": (lambda folder: "none", StorageError, r"^Cannot read samples: 'none' does not exist$"),
    "no zip": (bad_zip, StorageError, r"^Expected a \.npz file of numbers, got .* - at `data.npz`$"),
    "pickled": (pickled, StorageError, r"^Expected a \.npy file of numbers, got .*Python objects.* - at `data.npy`$"),
    "no tensor": (broken_pb, StorageError, r"^Cannot read 'data.pb': it holds no ONNX tensor$"),
    "empty tensor": (empty_pb, StorageError, r"^Cannot read 'data.pb': it holds no ONNX tensor$"),
    "empty folder": (
        empty_folder,
        ArgumentError,
        r"^Expected files of one kind \(.*\) or test_data_set_\*, got a folder without any - at `none`$",
    ),
    "mixed folder": (mixed_folder, ArgumentError, r"^Expected files of one kind .*, got \.npy and \.npz in one folder - at `mixed`$"),
    "unknown ending": (unknown_ending, ArgumentError, r"^Expected a file that ends in \.npz, \.npy, \.pb, got data\.csv - at `data\.csv`$"),
    "NaN": (with_value(np.nan), ArgumentError, r"^Expected finite values, got NaN in 2 of 6 samples of 'x' - at `data.npz`$"),
    "Inf": (with_value(-np.inf), ArgumentError, r"^Expected finite values, got Inf in 2 of 6 samples of 'x' - at `data.npz`$"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_one_line(case, here):
    write, kind, message = BAD_FILES[case]
    with pytest.raises(kind, match=message):
        read(write(here))


BAD_ARRAYS = {
    "empty": (X[:0], ArgumentError, "Expected at least one sample, got none - at `arrays`"),
    "no feeds": ([], ArgumentError, "Expected at least one sample, got none - at `arrays`"),
    "other name": ({"img": X}, ArgumentError, "Expected arrays named after the inputs (x), got 'img' - at `data`"),
    "no name": ({}, ArgumentError, "Expected arrays named after the inputs (x), got none for 'x' - at `data`"),
    "channels last": (X.transpose(0, 2, 3, 1), ArgumentError, "Expected shape [?,3,8,8] for 'x', got [6,8,8,3] - at `data`"),
    "one axis too few": (X[0, 0], ArgumentError, "Expected shape [?,3,8,8] for 'x', got [8,8] - at `data`"),
    "whole inputs of another shape": ([{"x": X[0]}], ArgumentError, "Expected shape [?,3,8,8] for 'x', got [3,8,8] - at `data[0]`"),
    "integers": (X.astype(np.uint8), ArgumentError, "Expected float32 for 'x', got uint8 - at `data`"),
    "text": (np.array(["a"]), ArgumentError, "Expected float32 for 'x', got <U1 - at `data`"),
    "number": (
        3,
        ArgumentTypeError,
        "Expected a path, an array or tensor, a dict of arrays, or an iterable of dicts or batches, got int - at `data`",
    ),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_bad_arrays_are_one_line(case):
    data, kind, message = BAD_ARRAYS[case]
    with pytest.raises(kind) as caught:
        read(data)
    assert str(caught.value) == message


def test_several_inputs_that_do_not_go_together(here):
    index = two_inputs()
    with pytest.raises(ArgumentError, match="Expected 5 samples of every input, got 3 of 'b' - at `data`"):
        read_samples({"a": normal(5, 4), "b": np.arange(3)}, index, 9)
    with pytest.raises(ArgumentError, match=r"Expected arrays named after the inputs \(a, b\), got one without a name - at `data`"):
        read_samples(normal(5, 4), index, 9)
    with pytest.raises(ArgumentError, match="Expected int64 for 'b', got uint64 - at `data`"):
        read_samples({"a": normal(1, 4), "b": np.array([2**63], np.uint64)}, index, 9)
    with pytest.raises(ArgumentError, match="Expected text for 't', got int64 - at `data`"):
        read_samples({"t": np.arange(2)}, index_of(model("(string[N] t) => (string[N] y) { y = Identity(t) }")), 9)
    for number in range(3):
        save_tensor(here / "test" / f"input_{number}.pb", normal(1, 4))
    with pytest.raises(ArgumentError, match=r"Expected 2 inputs \(a, b\), got 3 - at `test`"):
        read_samples("test", index, 9)
    (here / "sets" / "test_data_set_0").mkdir(parents=True)
    with pytest.raises(ArgumentError, match=r"Cannot read samples: there is no input_0\.pb in"):
        read_samples("sets", index, 9)


def test_an_input_that_is_no_tensor():
    proto = conv_bn()
    proto.graph.input.add(name="list").type.sequence_type.elem_type.tensor_type.elem_type = TensorProto.FLOAT
    with pytest.raises(ArgumentError, match="Expected 'list' to be a tensor, got an input that is none"):
        read({"x": X, "list": X}, proto)


def test_a_type_of_sixteen_bits_from_a_file(here):
    proto = model("(bfloat16[N,2] x) => (bfloat16[N,2] y) { y = Identity(x) }")
    tensor = helper.make_tensor("x", TensorProto.BFLOAT16, [3, 2], np.arange(6.0))
    (here / "x.pb").write_bytes(tensor.SerializeToString())
    samples = read("x.pb", proto)
    assert samples.feeds[0]["x"].astype(np.float64).tolist() == [[0, 1], [2, 3], [4, 5]]
    assert onnx.helper.np_dtype_to_tensor_dtype(samples.feeds[0]["x"].dtype) == TensorProto.BFLOAT16
