"""Data of a re-estimation: every form gives the same statistics, and a message names the file and the sample that cannot be used."""

import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from sketch import model, norm, normal
from statistics_truth import branches, images

import fastbn
from fastbn import reestimate
from fastbn.reestimation.files import arrays_in, rows_of

TWO = model("(float[N, 2] x, float[N, 2] z) => (float[N, 2] y) { a = Mul (x, z) y = BatchNormalization (a, s, t, m, v) }", **norm(2))
X = images(40)


def moments(data, proto=None, **options):
    return {
        name: (stats.count, stats.mean, stats.var) for name, stats in reestimate(proto or branches(), data, **options).statistics.items()
    }


def same(found, wanted):
    for name, (count, mean, var) in wanted.items():
        assert found[name][0] == count
        np.testing.assert_allclose(found[name][1], mean, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(found[name][2], var, rtol=1e-5)


def exactly(found, wanted):
    for name, (count, mean, var) in wanted.items():
        assert (found[name][0], found[name][1].tobytes(), found[name][2].tobytes()) == (count, mean.tobytes(), var.tobytes())


def tensor(path, array, name="x"):
    path.write_bytes(numpy_helper.from_array(array, name).SerializeToString())


@pytest.fixture(name="wanted", scope="module")
def _wanted():
    return moments(X, batch=8)


def test_arrays_and_files_give_the_same_bits(tmp_path, wanted):
    np.save(tmp_path / "x.npy", X)
    np.save(tmp_path / "fortran.npy", np.asfortranarray(X))
    np.savez(tmp_path / "plain.npz", x=X, labels=np.arange(40))
    np.savez_compressed(tmp_path / "packed.npz", labels=np.arange(40), x=X)
    for data in ({"x": X}, *(tmp_path / name for name in ("x.npy", "fortran.npy", "plain.npz", "packed.npz"))):
        exactly(moments(data, batch=8), wanted)
    exactly(moments(str(tmp_path / "x.n?y"), batch=8), wanted)


def test_small_files_are_batched_together(tmp_path, wanted):
    for number, part in enumerate(np.split(X, 20)):
        np.save(tmp_path / f"{number:02}.npy", part)
    exactly(moments(tmp_path, batch=8), wanted)
    exactly(moments([tmp_path / "0*.npy", tmp_path / "1?.npy"], batch=8), wanted)


def test_one_input_as_it_is(tmp_path, wanted):
    parts = np.split(X, 5)
    exactly(moments([{"x": part} for part in parts], batch=8), wanted)
    exactly(moments(({"x": part} for part in parts), batch=8), wanted)
    for number, part in enumerate(parts):
        folder = tmp_path / f"test_data_set_{number}"
        folder.mkdir()
        tensor(folder / "input_0.pb", part)
        tensor(tmp_path / f"{number}.pb", part)
    exactly(moments(tmp_path, batch=8), wanted)
    exactly(moments(tmp_path / "test_data_set_0" / "..", batch=8), wanted)
    exactly(moments(str(tmp_path / "?.pb"), batch=8), wanted)
    assert reestimate(branches(), tmp_path / "test_data_set_3").samples == 8


def test_what_loaders_yield(wanted):
    torch = pytest.importorskip("torch")
    x, labels = torch.from_numpy(X), torch.arange(len(X))
    exactly(moments(x, batch=8), wanted)
    exactly(moments({"x": x.requires_grad_()}, batch=8), wanted)
    for size in (8, 5, 40):
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x.detach(), labels), batch_size=size)
        (exactly if 8 % size == 0 else same)(moments(loader, batch=8), wanted)
    same(moments(({"x": each, "label": 3} for each in X), batch=8), wanted)  # single samples, and what is no input
    same(moments(iter(X), batch=8), wanted)

    def broken():
        yield X[:3]
        raise RuntimeError("disk\non fire")

    with pytest.raises(fastbn.ArgumentError, match=r"^Cannot read samples: batch 1 of the data raises RuntimeError: disk$"):
        reestimate(branches(), broken())


def test_images_of_different_sizes(tmp_path):
    parts = [images(1, size, seed=size) for size in (8, 8, 8, 6, 6, 9, 8)]
    for number, part in enumerate(parts):
        np.save(tmp_path / f"{number}.npy", part)
    found = moments(tmp_path, batch=4)
    same(found, moments([{"x": part} for part in parts]))
    assert found["b1"][0] == 4 * 64 + 2 * 36 + 81
    assert found["y"][0] == 7


def test_several_inputs(tmp_path):
    x, z = images(30, 1, 2).reshape(30, 2), images(30, 1, 2, 8).reshape(30, 2)
    wanted = moments({"x": x, "z": z}, TWO, batch=7)
    np.savez(tmp_path / "both.npz", z=z, x=x, more=x)
    exactly(moments(tmp_path / "both.npz", TWO, batch=7), wanted)
    folder = tmp_path / "named"
    folder.mkdir()
    np.save(folder / "x.npy", x)
    np.save(folder / "z.npy", z)
    exactly(moments(folder, TWO, batch=7), wanted)


def test_urls():
    fsspec = pytest.importorskip("fsspec", reason="fsspec is not installed: the extra [cluster] brings it")
    memory = fsspec.filesystem("memory")
    wanted = moments(X, batch=8)
    with memory.open("/set/a.npy", "wb") as file:
        np.save(file, X[:24])
    with memory.open("/set/b.npy", "wb") as file:
        np.save(file, X[24:])
    with memory.open("/packed.npz", "wb") as file:
        np.savez_compressed(file, x=X)
    try:
        for data in ("memory://set", "memory://set/?.npy", ["memory://set/a.npy", "memory://set/b.npy"], "memory://packed.npz"):
            exactly(moments(data, batch=8), wanted)
        with pytest.raises(fastbn.StorageError, match=r"^Cannot use 'memory://set/c.npy': "):
            reestimate(branches(), "memory://set/c.npy")
        with pytest.raises(fastbn.StorageError, match=r"^Cannot read 'memory://set/c\*': no file matches it$"):
            reestimate(branches(), "memory://set/c*")
    finally:
        memory.store.clear()
    with pytest.raises(fastbn.StorageError, match=r"^Cannot read 'nosuch://x.npy': "):
        reestimate(branches(), "nosuch://x.npy")


def test_collections_of_dask():
    array = pytest.importorskip("dask.array", reason="dask is not installed: the extra [cluster] brings it")
    bag = pytest.importorskip("dask.bag")
    wanted = moments(X, batch=8)
    for chunks in ((40, 3, 8, 8), (7, 2, 8, 3), (1, 3, 8, 8)):
        exactly(moments(array.from_array(X, chunks=chunks), batch=8), wanted)
        exactly(moments({"x": array.from_array(X, chunks=chunks)}, batch=8), wanted)
    exactly(moments(bag.from_sequence([{"x": part} for part in np.split(X, 5)], npartitions=5), batch=8), wanted)
    exactly(moments(array.from_array(X, chunks=-1), batch=8, samples=12), moments(X, batch=8, samples=12))
    with pytest.raises(fastbn.ArgumentError, match="unknown ones"):
        reestimate(branches(), array.from_array(X)[array.from_array(X[:, 0, 0, 0]) > 0])
    with pytest.raises(fastbn.ArgumentTypeError, match="Expected dicts of arrays, got int"):
        reestimate(branches(), bag.from_sequence([3], npartitions=1))
    with pytest.raises(fastbn.ArgumentError, match=r"Cannot take some samples of a dask\.bag"):
        reestimate(branches(), bag.from_sequence([{"x": X}], npartitions=1), samples=3)


def test_the_recipe_of_the_docs():
    array = pytest.importorskip("dask.array", reason="dask is not installed: the extra [cluster] brings it")
    text = (Path(__file__).resolve().parents[1] / "docs" / "cluster.md").read_text(encoding="utf-8")
    (block,) = (block for block in re.findall(r"```py\n(.*?)```", text, re.DOTALL) if "stats_of" in block)
    names = {}
    exec(block, names)
    whole = fastbn.batch_stats(X.astype(np.float64))
    for chunks in ((40, 3, 8, 8), (7, 2, 8, 3), (1, 1, 3, 5)):
        stats = names["stats_of"](array.from_array(X.astype(np.float64), chunks=chunks)).compute(scheduler="synchronous")
        assert stats.count == whole.count
        np.testing.assert_allclose(stats.mean, whole.mean, rtol=1e-13)
        np.testing.assert_allclose(stats.var, whole.var, rtol=1e-13)


def test_an_axis_of_size_1_that_is_lacking_is_given(tmp_path):
    """As a deployment does: images [N, 28, 28] for an input [N, 1, 28, 28]."""
    proto = model("(float[N,1,5,6] x) => (float[N,1,5,6] y) { y = BatchNormalization (x, s, t, m, v) }", **norm(1))
    images = normal(9, 5, 6)
    wanted = reestimate(proto, images[:, None])
    np.save(tmp_path / "x.npy", images)
    for data in (images, {"x": images}, str(tmp_path / "x.npy")):
        result = reestimate(proto, data, batch=4)
        assert (result.samples, result.partitions) == (9, 3)
        assert result.notes == ("'x' was given an axis of size 1, its axis 1",)
        assert result.statistics["y"].mean.tobytes() == reestimate(proto, images[:, None], batch=4).statistics["y"].mean.tobytes()
    assert wanted.notes == ()
    with pytest.raises(fastbn.ArgumentError, match=r"Expected shape \[\?,1,5,6\] for 'x', got \[9,6,5\]"):
        reestimate(proto, images.transpose(0, 2, 1))


def test_some_samples_are_evenly_spaced():
    x = np.arange(200, dtype=np.float32).reshape(100, 2)
    proto = model("(float[N, 2] x) => (float[N, 2] y) { y = BatchNormalization (x, s, t, m, v) }", **norm(2))
    result = reestimate(proto, x, samples=12, batch=5)
    chosen = x[np.linspace(0, 99, 12).astype(int)]
    assert (result.samples, result.partitions) == (12, 3)
    np.testing.assert_allclose(result.statistics["y"].mean, chosen.mean(axis=0))
    assert reestimate(proto, x, samples=1000).samples == 100


def test_rows_of_every_kind_of_file(tmp_path):
    x = normal(30, 4, 5)
    np.save(tmp_path / "a.npy", x)
    np.savez(tmp_path / "a.npz", x=x, y=x[:2])
    np.savez_compressed(tmp_path / "b.npz", x=x, y=x[:2])
    files = [arrays_in(str(tmp_path / "a.npy"))["a"], *(arrays_in(str(tmp_path / name))["x"] for name in ("a.npz", "b.npz"))]
    for file in files:
        for numbers in (range(30), range(3, 9), [0, 1, 29], [7]):
            assert rows_of(file, numbers).tobytes() == x[list(numbers)].tobytes()
        assert file.whole().tobytes() == x.tobytes()


def test_files_that_cannot_be_used(tmp_path, wanted):
    def fails(data, message, proto=None):
        with pytest.raises(fastbn.FastbnError, match=message):
            reestimate(proto or branches(), data)

    here = re.escape(str(tmp_path))
    np.savez(tmp_path / "names.npz", images=X)
    fails(tmp_path / "names.npz", rf"^Expected arrays named after the inputs \(x\), got none for 'x' \(images\) - at `{here}/names\.npz`$")
    (tmp_path / "text.npz").write_text("no archive")
    fails(tmp_path / "text.npz", r"^Expected a \.npz file of numbers, got File is not a zip file - at ")
    (tmp_path / "text.npy").write_text("no array")
    fails(tmp_path / "text.npy", r"^Expected an array of numbers in NumPy's format, got ")
    (tmp_path / "text.pb").write_bytes(b"\x01\x02\x03")
    fails(tmp_path / "text.pb", r"^Cannot read '.*text\.pb': it holds no ONNX tensor$")
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object))
    fails(tmp_path / "objects.npy", r"one of Python objects")
    fails(tmp_path / "nothing.npz", r"nothing\.npz': no such file")
    fails(tmp_path / "nothing*", r"^Cannot read '.*nothing\*': no file matches it$")
    (tmp_path / "x.csv").write_text("1,2")
    fails(tmp_path / "x.csv", r"^Expected a file that ends in \.npz, \.npy, \.pb, got x\.csv - at ")
    fails(tmp_path, r"^Expected files of one kind .*, got \.npy and \.npz and \.pb in one folder - at ")
    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", r"^Expected files of one kind .*, got a folder without any - at ")
    np.save(tmp_path / "cut.npy", X)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "cut.npy").read_bytes()[:-100])
    fails(tmp_path / "cut.npy", r"^Expected \d+ bytes more, got \d+ - at `.*cut\.npy`$")
    bad = X.copy()
    bad[17, 1, 2, 3] = np.nan
    np.save(tmp_path / "nan.npy", bad)
    fails(tmp_path / "nan.npy", rf"^Expected finite values, got NaN in 'x' - at `sample 17 of {here}/nan\.npy`$")
    fails(np.zeros((4, 2), np.float32), "one without a name", TWO)
    fails({"x": np.zeros((4, 2), np.float32)}, "none for 'z'", TWO)
    fails({"x": np.zeros((4, 2), np.float32), "z": np.zeros((3, 2), np.float32)}, "Expected 4 samples of every input, got 3 of 'z'", TWO)


def test_without_fsspec(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "fsspec", None)
    with pytest.raises(fastbn.FastbnError, match=r"^Cannot use a URL: fsspec is not installed \(pip install fsspec\)$"):
        reestimate(branches(), "s3://bucket/x.npy")


def test_the_whole_of_a_model_in_a_file(tmp_path, wanted):
    onnx.save(branches(), tmp_path / "in.onnx")
    exactly(moments(X, tmp_path / "in.onnx", batch=8), wanted)
