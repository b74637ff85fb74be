"""Data from objects: tensors of frameworks, loaders, data sets, generators; no framework is needed but for its own case."""

import itertools

import numpy as np
import pytest
from sketch import CONV_BN, conv_bn, model, normal

import fastbn
from fastbn import ArgumentError, ArgumentTypeError
from fastbn.deployment.samples import read_samples
from fastbn.graph.model import storage
from fastbn.graph.model.index import Index

X = normal(6, 3, 8, 8)
LABELS = np.arange(6)


def read(data, proto=None, most=256, **options):
    return read_samples(data, Index(storage.load(conv_bn() if proto is None else proto)), most, **options)


def stacked(samples):
    return np.concatenate([feed["x"] for feed in samples.feeds])


class Loader:
    """What a DataLoader or a tf.data.Dataset is to its reader: something that yields batches each time it is asked."""

    def __init__(self, *batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


class Items:
    """A data set in the way of torch: it has items and a length, and no __iter__."""

    def __len__(self):
        return len(X)

    def __getitem__(self, number):
        return X[range(len(X))[number]], number  # IndexError past the end ends it


LABELED = {
    "batches of (inputs, labels)": Loader((X[:4], LABELS[:4]), (X[4:], LABELS[4:])),
    "lists of them": Loader([X[:4], LABELS[:4]], [X[4:], LABELS[4:]]),
    "dicts": Loader({"x": X[:4], "labels": LABELS[:4]}, {"x": X[4:], "labels": LABELS[4:]}),
    "(dict, labels)": Loader(({"x": X[:4]}, LABELS[:4]), ({"x": X[4:]}, LABELS[4:])),
    "one-hot labels": Loader((X, np.eye(6))),
    "items without a batch": Items(),
    "a generator": ((x, label) for x, label in zip(X, LABELS, strict=True)),
    "a list of pairs": list(zip(X, LABELS, strict=True)),
}


@pytest.mark.parametrize("case", LABELED)
def test_samples_with_labels(case):
    samples = read(LABELED[case])
    assert np.array_equal(stacked(samples), X)
    assert np.concatenate(samples.labels).tolist() == LABELS.tolist()
    assert [feed["x"].shape for feed in samples.feeds] == [(1, 3, 8, 8)] * 6
    assert (samples.labels_name, samples.available, samples.notes) == ("labels", 6, ())


PLAIN = {
    "batches": Loader(X[:4], X[4:]),
    "tuples of one": Loader((X[:4],), (X[4:],)),
    "dicts": Loader({"x": X[:4]}, {"x": X[4:]}),
    "a generator of dicts": ({"x": each[None]} for each in X),
    "a list of arrays": list(X),
}


@pytest.mark.parametrize("case", PLAIN)
def test_samples_without_labels(case):
    samples = read(PLAIN[case])
    assert np.array_equal(stacked(samples), X)
    assert samples.labels is None


def test_an_iterable_without_an_end_is_read_as_far_as_it_is_needed():
    taken = []

    def batches():
        for number in itertools.count():
            taken.append(number)
            yield X[:2], LABELS[:2]

    samples = read(batches(), most=5)
    assert (len(samples.feeds), samples.available) == (5, None)
    assert samples.notes == ("the first 5 feeds of an iterable that has more",)
    assert taken == [0, 1, 2, 3]
    assert str(samples) == "5 samples with labels from arrays"


def test_a_batch_that_the_model_fixes():
    samples = read(Loader((X[:4], LABELS[:4]), (X[4:], LABELS[4:])), conv_bn(CONV_BN.replace("N", "2")))
    assert [len(feed["x"]) for feed in samples.feeds] == [2, 2, 2]
    assert [each.tolist() for each in samples.labels] == [[0, 1], [2, 3], [4, 5]]


def test_several_inputs_in_order():
    proto = model("(float[N,4] a, float[N,4] b) => (float[N,4] y) { y = Add(a, b) }")
    a, b = normal(5, 4), normal(5, 4) + 1
    for batch, labels in (((a, b), None), ((a, b, np.arange(5)), np.arange(5)), (({"a": a, "b": b}, np.arange(5)), np.arange(5))):
        samples = read(Loader(batch), proto)
        assert np.array_equal(np.concatenate([feed["b"] for feed in samples.feeds]), b)
        assert (samples.labels is None) if labels is None else np.concatenate(samples.labels).tolist() == labels.tolist()


def test_an_array_that_lacks_an_axis_of_size_1():
    proto = model("(float[N,1,5,6] x) => (float[N,1,5,6] y) { y = Relu(x) }")
    images = normal(4, 5, 6)
    samples = read(images, proto)
    assert np.array_equal(stacked(samples)[:, 0], images)
    assert samples.notes == ("'x' was given an axis of size 1, its axis 1",)
    last = model("(float[N,5,6,1] x) => (float[N,5,6,1] y) { y = Relu(x) }")
    assert np.array_equal(stacked(read(images, last))[..., 0], images)
    with pytest.raises(ArgumentError, match=r"Expected shape \[\?,1,5,6\] for 'x', got \[4,6,5\] - at `data`"):
        read(images.transpose(0, 2, 1), proto)


class Broken:
    def __iter__(self):
        yield X[:1]
        raise OSError("the disk is gone\nat line 3")


class NoArray:
    """A tensor of a type that NumPy does not have."""

    def __array__(self, *arguments, **options):
        raise TypeError("Got unsupported ScalarType BFloat16")


BAD = {
    "a loader that fails": (Broken(), ArgumentError, "Cannot read samples: batch 1 of the data raises OSError: the disk is gone"),
    "too many in a batch": (
        Loader((X, LABELS, LABELS)),
        ArgumentError,
        "Expected 1 inputs (x), and labels or none, in a batch, got 3 - at `data[0]`",
    ),
    "text": (Loader("abc"), ArgumentTypeError, "Expected a dict of arrays, an array or a tuple of them, got str - at `data[0]`"),
    "no batches": (Loader(), ArgumentError, "Expected at least one sample, got none - at `arrays`"),
    "labels of another number": (
        Loader((X, LABELS[:5])),
        ArgumentError,
        "Expected 6 labels in 'labels', one for each sample, got 5 - at `data[0]`",
    ),
    "an array that is none": (
        NoArray(),
        ArgumentTypeError,
        "Expected an array or a tensor, got NoArray: Got unsupported ScalarType BFloat16 - at `data`",
    ),
    "bytes": (
        b"abc",
        ArgumentTypeError,
        "Expected a path, an array or tensor, a dict of arrays, or an iterable of dicts or batches, got bytes - at `data`",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_read_is_one_line(case):
    data, kind, message = BAD[case]
    with pytest.raises(kind) as caught:
        read(data)
    assert str(caught.value) == message


def test_torch():
    torch = pytest.importorskip("torch")
    x, labels = torch.from_numpy(X).requires_grad_(), torch.from_numpy(LABELS)
    for data in (x, {"x": x}, [{"x": each[None]} for each in x]):
        assert np.array_equal(stacked(read(data)), X)
    dataset = torch.utils.data.TensorDataset(x.detach(), labels)
    for data in (dataset, torch.utils.data.DataLoader(dataset, batch_size=4)):
        samples = read(data)
        assert np.array_equal(stacked(samples), X)
        assert np.concatenate(samples.labels).tolist() == LABELS.tolist()
    made = fastbn.deploy(conv_bn(), data=torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x.detach()), batch_size=2), runs=1)
    assert made.samples.rows == 6


def test_tensorflow():
    tensorflow = pytest.importorskip("tensorflow")
    dataset = tensorflow.data.Dataset.from_tensor_slices((X, LABELS))
    for data in (dataset, dataset.batch(4), dataset.batch(4).repeat()):
        samples = read(data, most=6)
        assert np.array_equal(stacked(samples), X)
        assert np.concatenate(samples.labels).tolist() == LABELS.tolist()


def test_jax():
    jax = pytest.importorskip("jax")
    assert np.array_equal(stacked(read(jax.numpy.asarray(X))), X)
