"""BatchNorm, the layer over NumPy: state, modes, gradients, conversions, and batches shared by several processes."""

import doctest
import threading

import ml_dtypes
import numpy as np
import pytest

import fastbn
from fastbn import BatchNorm, layers, reference

SHAPES = [((6, 4, 5, 3), 1), ((6, 5, 3, 4), -1), ((9, 4), 1), ((2, 4, 3, 2, 5), 1)]


def random(shape, seed=0, dtype=np.float32):
    return (np.random.default_rng(seed).standard_normal(shape) * 2 + 1).astype(dtype)


def trained(*, channels=4, batches=3, **options):
    """A layer with weights and statistics of its own."""
    layer = BatchNorm(channels, **options)
    for name, seed in (("weight", 1), ("bias", 2)):
        if getattr(layer, name) is not None:
            getattr(layer, name)[...] = random(channels, seed)
    shape = [6, 5, 3]
    shape.insert(layer.axis % 4, channels)
    for seed in range(batches):
        layer(random(shape, seed))
    return layer


@pytest.mark.parametrize("momentum", [0.1, 0.75, None])
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_training_matches_the_twin_batch_after_batch(shape, axis, momentum):
    layer = BatchNorm(4, momentum=momentum, axis=axis, activation="relu")
    layer.weight[...], layer.bias[...] = random(4, 1), random(4, 2)
    mean, var = np.zeros(4), np.ones(4)
    for batch in range(3):
        x, dy = random(shape, batch), random(shape, 10 + batch)
        y, (dx, dweight, dbias) = layer(x), layer.backward(dy)
        options = {"axis": axis, "activation": "relu"}
        want, stats = reference.batch_norm_train(
            x.astype(np.float64),
            layer.weight,
            layer.bias,
            running_mean=mean,
            running_var=var,
            momentum=1 / (batch + 1) if momentum is None else momentum,
            **options,
        )
        np.testing.assert_allclose(y, want, rtol=2e-6, atol=2e-6)
        wanted = reference.batch_norm_backward(dy.astype(np.float64), x.astype(np.float64), stats, layer.weight, layer.bias, **options)
        for got, twin in zip((dx, dweight, dbias), wanted, strict=True):
            np.testing.assert_allclose(got, twin, rtol=2e-5, atol=2e-5)
    # Each update rounds to float32 once.
    np.testing.assert_allclose(layer.running_mean, mean, rtol=3 * 2**-23, atol=3 * 2**-23)
    np.testing.assert_allclose(layer.running_var, var, rtol=3 * 2**-23)
    assert layer.num_batches_tracked == 3


@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_eval_uses_the_running_statistics_and_moves_nothing(shape, axis):
    layer = trained(axis=axis).eval()
    before = layer.state_dict()
    x, dy = random(shape, 5), random(shape, 6)
    y, gradients = layer(x), layer.backward(dy)
    want = reference.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias, axis=axis)
    np.testing.assert_allclose(y, want, rtol=2e-6, atol=2e-6)
    stats = fastbn.BatchStats(1, layer.running_mean, layer.running_var)
    wanted = reference.batch_norm_backward(dy, x, stats, layer.weight, layer.bias, axis=axis, training=False)
    for got, twin in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(got, twin, rtol=2e-5, atol=2e-5)
    for name, values in layer.state_dict().items():
        assert values.tobytes() == before[name].tobytes()


def test_eval_before_any_training_is_the_affine_alone():
    layer = BatchNorm(2, eps=0).eval()
    layer.weight[...], layer.bias[...] = [2, 3], [1, -1]
    assert layer(np.array([[1, 1], [2, 2]], np.float32)).tolist() == [[3, 2], [5, 5]]


def test_without_running_statistics_eval_uses_the_batch():
    layer = BatchNorm(4, track_running_stats=False, affine=False)
    x, dy = random((6, 4, 3)), random((6, 4, 3), 1)
    y = layer(x)
    dx, dweight, dbias = layer.backward(dy)
    assert dweight is None
    assert dbias is None
    assert layer.eval()(x).tobytes() == y.tobytes()
    assert layer.backward(dy)[0].tobytes() == dx.tobytes()
    assert layer.state_dict() == {}
    assert layer.num_batches_tracked == 0


@pytest.mark.parametrize("dtype", [np.float64, np.float16, ml_dtypes.bfloat16])
def test_other_types_beside_float32_parameters(dtype):
    layer = trained()
    x = random((6, 4, 7), 3, dtype)
    y, (dx, dweight, _) = layer(x), layer.backward(random((6, 4, 7), 4, dtype))
    assert (y.dtype, dx.dtype, dweight.dtype, layer.running_mean.dtype) == (x.dtype, x.dtype, np.float32, np.float32)
    stats = reference.batch_stats(x)
    want = reference.batch_norm(x.astype(np.float64), stats.mean, stats.var, layer.weight, layer.bias)
    np.testing.assert_allclose(
        y.astype(np.float64), want, rtol=2 * float(ml_dtypes.finfo(dtype).eps), atol=1e-3 if y.itemsize == 2 else 1e-12
    )


def test_one_value_per_channel_and_an_empty_batch():
    layer = trained(batches=0)
    assert layer(random((1, 4))).tolist() == [layer.bias.tolist()]
    assert layer.running_var.tolist() == [np.float32(0.9)] * 4
    before = layer.state_dict()
    y = layer(np.empty((0, 4, 3, 3), np.float32))
    assert y.shape == (0, 4, 3, 3)
    dx, dweight, dbias = layer.backward(y)
    assert (dx.shape, dweight.tolist(), dbias.tolist()) == ((0, 4, 3, 3), [0] * 4, [0] * 4)
    assert layer.running_mean.tobytes() == before["running_mean"].tobytes()
    assert layer.running_var.tobytes() == before["running_var"].tobytes()


def test_out_and_in_place():
    x = random((6, 4, 5))
    y = trained()(x)
    out, layer = np.empty_like(x), trained()
    assert layer(x, out=out) is out
    assert out.tobytes() == y.tobytes()
    dx = np.empty_like(x)
    assert layer.backward(x, out=dx)[0] is dx
    layer(x, out=x)
    assert x.tobytes() == y.tobytes()
    with pytest.raises(fastbn.ArgumentError, match="Cannot go backward: there is no forward pass, or it has overwritten its x"):
        layer.backward(x)


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}], ids=str)
def test_state_goes_round_through_a_file(options, tmp_path):
    layer = trained(**options)
    np.savez(tmp_path / "state.npz", **layer.state_dict())
    with np.load(tmp_path / "state.npz") as state:
        other = BatchNorm(4, **options)
        other.load_state_dict(dict(state))
    x = random((6, 4, 5), 9)
    assert other.eval()(x).tobytes() == layer.eval()(x).tobytes()
    assert other.num_batches_tracked == layer.num_batches_tracked
    layer.state_dict().get("weight", np.zeros(1))[...] = 7  # a copy
    assert layer.weight is None or 7 not in layer.weight


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": None}, "at `weight`"),
        ({"gamma": np.ones(4)}, "at `gamma`"),
        ({"bias": np.ones(3)}, r"Expected numbers of shape \(4,\), got float64 of shape \(3,\) - at `bias`"),
        ({"running_var": np.array(["a"] * 4)}, "at `running_var`"),
        ({"num_batches_tracked": -1}, "at `num_batches_tracked`"),
    ],
    ids=str,
)
def test_a_state_that_does_not_fit_changes_nothing(change, message):
    layer, other = trained(), trained(batches=1)
    state = {name: values for name, values in (other.state_dict() | change).items() if values is not None}
    before = layer.state_dict()
    with pytest.raises(fastbn.ArgumentError, match=message):
        layer.load_state_dict(state)
    assert all(values.tobytes() == before[name].tobytes() for name, values in layer.state_dict().items())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_features": 0}, fastbn.ArgumentError, "Expected an integer >= 1, got 0 - at `num_features`"),
        ({"num_features": 2.0}, fastbn.ArgumentTypeError, "Expected an integer, got float - at `num_features`"),
        ({"eps": -1}, fastbn.ArgumentError, "at `eps`"),
        ({"momentum": 2}, fastbn.ArgumentError, "Expected a number from 0 to 1, got 2.0 - at `momentum`"),
        ({"axis": 1.0}, fastbn.ArgumentTypeError, "Expected an integer, got float - at `axis`"),
        ({"activation": "tanh"}, fastbn.ArgumentError, "at `activation`"),
        ({"comm": object()}, fastbn.ArgumentTypeError, "Expected a communicator with allgather, got object - at `comm`"),
    ],
    ids=str,
)
def test_bad_settings(options, error, message):
    with pytest.raises(error, match=message):
        BatchNorm(**{"num_features": 4, **options})


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (np.ones((2, 5, 3), np.float32), fastbn.ArgumentError, r"Expected 4 channels on axis 1, got shape \(2, 5, 3\) - at `x`"),
        (np.ones(4, np.float32), fastbn.ArgumentError, "Expected an axis of an array with 1 axes, got 1 - at `axis`"),
        (np.ones((2, 4), np.int64), fastbn.ArgumentTypeError, "got int64 - at `x`"),
        ("text", fastbn.ArgumentTypeError, "Expected an array in CPU memory, got str - at `x`"),
    ],
    ids=["channels", "rank", "integers", "text"],
)
def test_bad_input_moves_nothing(x, error, message, training):
    layer = trained().train(training)
    before = layer.state_dict()
    with pytest.raises(error, match=message):
        layer(x)
    assert all(values.tobytes() == before[name].tobytes() for name, values in layer.state_dict().items())


def test_backward_before_forward():
    with pytest.raises(fastbn.ArgumentError, match="Cannot go backward"):
        BatchNorm(4).backward(np.ones((2, 4)))


# ---- conversions ----


class Torch:
    """What from_torch reads of torch's modules."""


def test_other_objects_are_not_converted():
    with pytest.raises(fastbn.ArgumentTypeError, match="Expected a batch normalization of PyTorch, got Torch - at `module`"):
        BatchNorm.from_torch(Torch())
    with pytest.raises(fastbn.ArgumentTypeError, match="Expected a BatchNormalization of Keras, got Torch - at `layer`"):
        BatchNorm.from_keras(Torch())


@pytest.mark.parametrize(
    ("options", "where"), [({"axis": -1}, "axis"), ({"activation": "relu"}, "activation"), ({"dimensions": 4}, "dimensions")], ids=str
)
def test_what_torch_does_not_have(options, where):
    dimensions = options.pop("dimensions", 2)
    with pytest.raises(fastbn.ArgumentError, match=f"at `{where}`"):
        BatchNorm(4, **options).to_torch(dimensions)


@pytest.mark.parametrize(
    ("options", "where"),
    [({"momentum": None}, "momentum"), ({"track_running_stats": False}, "momentum"), ({"activation": "relu"}, "activation")],
    ids=str,
)
def test_what_keras_does_not_have(options, where):
    with pytest.raises(fastbn.ArgumentError, match=f"at `{where}`"):
        BatchNorm(4, **options).to_keras()


@pytest.mark.parametrize("options", [{}, {"momentum": None, "eps": 0.01}, {"affine": False}, {"track_running_stats": False}], ids=str)
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_there_and_back_through_torch(dimensions, options):
    torch = pytest.importorskip("torch")
    layer = trained(**options)
    module = layer.to_torch(dimensions)
    assert type(module) is (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d)[dimensions - 1]
    back = BatchNorm.from_torch(module)
    assert repr(back) == repr(layer)
    assert {name: values.tolist() for name, values in back.state_dict().items()} == {
        name: values.tolist() for name, values in layer.state_dict().items()
    }
    shape = (6, 4, 5, 3, 2)[: 2 + dimensions]
    for training in (True, False):
        x = random(shape, 8)
        want = module.train(training)(torch.from_numpy(x)).detach().numpy()
        np.testing.assert_allclose(layer.train(training)(x), want, rtol=1e-5, atol=1e-5)
    for name, tensor in module.state_dict().items():
        np.testing.assert_allclose(layer.state_dict()[name], tensor.numpy(), rtol=4 * 2**-23, atol=4 * 2**-23)


def test_a_module_of_torch_without_bias():
    torch = pytest.importorskip("torch")
    module = torch.nn.BatchNorm2d(3, bias=False, dtype=torch.bfloat16).eval()
    layer = BatchNorm.from_torch(module)
    assert (layer.bias, layer.training, layer.weight.dtype) == (None, False, np.float32)
    assert layer.to_torch().bias is None


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras's own
@pytest.mark.parametrize("options", [{}, {"axis": -1, "momentum": 0.25}, {"eps": 0.01, "affine": False}], ids=str)
def test_there_and_back_through_keras(options, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    pytest.importorskip("keras")
    layer = trained(**options)
    there = layer.to_keras()
    assert (there.axis, there.epsilon) == (layer.axis, layer.eps)
    assert there.momentum == 1 - layer.momentum
    back = BatchNorm.from_keras(there)
    assert back.momentum == pytest.approx(layer.momentum, rel=1e-14)
    for name in ("weight", "bias", "running_mean", "running_var"):
        values = getattr(layer, name)
        assert (getattr(back, name) is None) if values is None else (getattr(back, name).tobytes() == values.tobytes())
    x = random((6, 4, 5, 4), 8)
    np.testing.assert_allclose(np.asarray(there(x).detach()), layer.eval()(x), rtol=1e-5, atol=1e-5)
    # Trained further, the copy of Keras's layer follows Keras.
    there(x, training=True)
    back(x)
    np.testing.assert_allclose(back.running_var, there.get_weights()[-1], rtol=1e-6)
    np.testing.assert_allclose(back.running_mean, there.get_weights()[-2], rtol=1e-6, atol=1e-6)


# ---- one batch, several processes: here as threads ----


class Ranks:
    """Communicators of threads, with mpi4py's allgather."""

    def __init__(self, size):
        self.size, self.barrier, self.given = size, threading.Barrier(size), [None] * size

    def run(self, work):
        """Return what work(comm, rank) returns in each thread; the first error is raised."""
        results, errors = [None] * self.size, []

        def thread(rank):
            try:
                results[rank] = work(Comm(self, rank), rank)
            except Exception as error:
                errors.append(error)
                self.barrier.abort()

        threads = [threading.Thread(target=thread, args=(rank,)) for rank in range(self.size)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        if errors:
            raise errors[0]
        return results


class Comm:
    def __init__(self, ranks, rank):
        self.ranks, self.rank, self.calls = ranks, rank, 0

    def allgather(self, message):
        self.calls += 1
        self.ranks.given[self.rank] = message
        self.ranks.barrier.wait(30)
        given = list(self.ranks.given)
        self.ranks.barrier.wait(30)
        return given


def shared(x, dy, cuts, **options):
    """Train one step on parts of a batch: (y, dx, dweight, dbias, states, exchanges)."""
    xs, dys = np.split(x, cuts), np.split(dy, cuts)

    def work(comm, rank):
        layer = trained(batches=0, comm=comm, **options)
        y = layer(xs[rank])
        return y, *layer.backward(dys[rank]), layer.state_dict(), comm.calls

    return list(zip(*Ranks(len(xs)).run(work), strict=True))


@pytest.mark.parametrize("activation", [None, "leaky_relu"])
@pytest.mark.parametrize("cuts", [[3], [2, 2], [0, 5], [1, 2, 6]], ids=str)
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_parts_of_a_batch_give_what_the_whole_gives(shape, axis, cuts, activation):
    options = {"axis": axis, "activation": activation}
    x, dy = random(shape) + 100, random(shape, 1)
    whole = trained(batches=0, **options)
    want, wanted = whole(x), whole.backward(dy)
    y, dx, dweight, dbias, states, exchanges = shared(x, dy, cuts, **options)
    np.testing.assert_allclose(np.concatenate(y), want, rtol=2e-6, atol=4e-6)
    np.testing.assert_allclose(np.concatenate(dx), wanted[0], rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(np.sum(dweight, axis=0), wanted[1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.sum(dbias, axis=0), wanted[2], rtol=1e-5, atol=1e-5)
    assert set(exchanges) == {2}
    for state in states:
        assert all(values.tobytes() == states[0][name].tobytes() for name, values in state.items())
        np.testing.assert_allclose(state["running_mean"], whole.running_mean, rtol=2e-7)
        np.testing.assert_allclose(state["running_var"], whole.running_var, rtol=2e-7)


def test_the_same_bits_for_the_same_number_of_ranks():
    x, dy = random((7, 4, 9)), random((7, 4, 9), 1)
    first, second = (shared(x, dy, [2, 3], momentum=None) for _ in range(2))
    for one, other in zip(first[:4], second[:4], strict=True):
        assert [part.tobytes() for part in one] == [part.tobytes() for part in other]


def test_no_process_has_any_value():
    empty = np.empty((0, 4, 3), np.float32)
    y, dx, dweight, _, states, _ = shared(empty, empty, [0])
    assert [part.shape for part in (*y, *dx)] == [(0, 4, 3)] * 4
    assert not np.any(dweight)
    assert states[0]["running_var"].tolist() == [1] * 4


def test_bad_input_is_found_before_the_other_processes_are_asked():
    comm = Comm(Ranks(2), 0)
    layer = BatchNorm(4, comm=comm)
    for x in (np.ones((2, 5)), np.ones((2, 4), int)):
        with pytest.raises(fastbn.FastbnError):
            layer(x)
    with pytest.raises(fastbn.ArgumentError, match="at `out`"):
        layer(np.ones((2, 4)), out=np.ones((2, 5)))
    assert comm.calls == 0


def test_processes_of_different_channels():
    def work(comm, rank):
        return BatchNorm(4 + rank, comm=comm)(np.ones((2, 4 + rank), np.float32))

    with pytest.raises(fastbn.ArgumentError, match="Cannot merge the statistics of several processes: their numbers of channels differ"):
        Ranks(2).run(work)


def test_eval_asks_no_other_process():
    comm = Comm(Ranks(2), 0)
    layer = BatchNorm(4, comm=comm).eval()
    layer(np.ones((2, 4), np.float32))
    layer.backward(np.ones((2, 4), np.float32))
    assert comm.calls == 0


def test_examples():
    assert doctest.testmod(layers).failed == 0
