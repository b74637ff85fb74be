"""Plain tensors, read by DLPack, beside the general way: the same bits, and nothing taken for plain that is not."""

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from fastbn import _native  # noqa: E402
from fastbn._torch import kernels  # noqa: E402
from fastbn.torch import batch_norm, convert  # noqa: E402

if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
    pytest.skip("a torch without DLPack's exchange functions takes the general way throughout", allow_module_level=True)

SHAPES = [(8, 6), (8, 6, 5), (4, 6, 7, 5), (1, 6, 7, 5), (4, 6, 1, 1), (16, 3, 1, 4), (2, 6, 3, 4, 5), (3, 40, 17, 17)]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def tensor(shape, seed=0, dtype=torch.float32):
    return (torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)) + 0.5).to(dtype)


def results(module, x, dy, training):
    module = copy.deepcopy(module).train(training)
    x = x.detach().requires_grad_()
    y = module(x)
    gradients = torch.autograd.grad(y, [x, *module.parameters()], dy)
    return [y.detach(), *gradients, *module.buffers()], [buffer._version for buffer in module.buffers()]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("parameters", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_ways_give_the_same_bits(monkeypatch, shape, last, dtype, parameters, training):
    kind = {2: torch.nn.BatchNorm1d, 3: torch.nn.BatchNorm1d, 4: torch.nn.BatchNorm2d, 5: torch.nn.BatchNorm3d}[len(shape)]
    module = convert(kind(shape[1])).to(parameters)
    with torch.no_grad():
        for seed, parameter in enumerate(module.parameters()):
            parameter.copy_(tensor(shape[1], seed))
    order = LAST.get(len(shape), torch.contiguous_format) if last else torch.contiguous_format
    x, dy = (tensor(shape, seed, dtype).contiguous(memory_format=order) for seed in (2, 3))
    y, mean, var = torch.empty_like(x), module.running_mean, module.running_var
    assert kernels.plain.infer(x, y, mean, var, None, None, 1e-5, 1)
    plain, versions = results(module, x, dy, training)
    monkeypatch.setattr(kernels, "plain", _native.PlainTensors(None, torch.empty_like, torch.Tensor, torch.nn.Parameter))
    general, others = results(module, x, dy, training)
    for one, other in zip(plain, general, strict=True):
        assert one.dtype is other.dtype
        assert one.stride() == other.stride()
        assert torch.equal(one, other)
    assert [version > 0 for version in versions] == [version > 0 for version in others]


X = tensor((4, 6, 3, 3))
NEGATIVE = torch.view_as_complex(tensor((4, 6, 3, 3, 2))).conj().imag


@pytest.mark.parametrize(
    "x",
    [
        X.transpose(0, 1),
        X[:, ::2],
        X[..., ::2],
        X[:, :, 1:],
        X.permute(0, 2, 3, 1).contiguous().permute(0, 3, 2, 1),
        X.to(torch.int32),
        X.to(torch.complex64),
        X.to_sparse(),
        X.to("meta"),
        X.expand(2, *X.shape)[:, 0],
        NEGATIVE,
        torch._neg_view(X),
        X[:, :1],
        X[:0],
        X[0, 0, 0],
        X[0, :, 0, 0],
    ],
    ids=lambda x: f"{x.dtype} {tuple(x.shape)} {x.stride() if x.layout is torch.strided else x.layout}",
)
def test_what_is_not_plain_is_left_alone(x):
    out = torch.full_like(x, 7) if x.layout is torch.strided else x
    before = out.clone()
    ones = torch.ones(x.shape[1] if x.dim() > 1 else 1)
    assert not kernels.plain.infer(x, out, ones, ones, None, None, 0.0, 1)
    assert kernels.plain.train(x, out, None, None, None, None, None, 0.0, 0.1, 1) is None
    moments = np.zeros(len(ones)), np.ones(len(ones))
    assert kernels.plain.backward(x, out, x, None, None, *moments, 0, 0.0, False, (True, False, False), 1) is None
    if out.device.type == "cpu" and out.layout is torch.strided:
        assert torch.equal(out, before)


@pytest.mark.parametrize(
    "vector",
    [
        torch.ones(5),
        torch.ones(6, 1),
        torch.ones(6, dtype=torch.float16),
        torch.ones(6, dtype=torch.int64),
        torch.ones(6, device="meta"),
        NEGATIVE[0, :, 0, 0],
        torch.tensor(1.0),
    ],
    ids=lambda vector: f"{vector.dtype} {tuple(vector.shape)} {vector.device}",
)
@pytest.mark.parametrize("place", range(4))
def test_vectors_that_are_not_plain_are_left_alone(vector, place):
    out, vectors = torch.full_like(X, 7), [torch.ones(6) for _ in range(4)]
    vectors[place] = vector
    assert not kernels.plain.infer(X, out, *vectors, 0.0, 1)
    assert kernels.plain.train(X, out, *vectors, None, 0.0, 0.1, 1) is None
    assert torch.equal(out, torch.full_like(X, 7))
    assert all(torch.equal(given, torch.ones(6)) for given in vectors if given is not vector)


@pytest.mark.parametrize("batches", [torch.tensor([3]), torch.tensor(3, dtype=torch.int32), torch.tensor(3.0)], ids=str)
def test_counters_that_are_not_plain_are_left_alone(batches):
    before = batches.clone()
    assert kernels.plain.train(X, torch.empty_like(X), None, None, None, None, batches, 0.0, 0.1, 1) is None
    assert torch.equal(batches, before)


def test_one_value_per_channel_is_left_to_the_error():
    x = torch.ones(1, 6)
    assert kernels.plain.train(x, torch.empty_like(x), None, None, None, None, None, 0.0, 0.1, 1) is None


def test_the_operator_takes_one_value_per_channel():
    """Keras and ONNX do; it is the modules that raise, as torch's do."""
    y, mean, m2 = torch.ops.fastbn.batch_norm_train(torch.full((1, 6), 3.0), None, torch.arange(6.0), 1e-5)
    assert torch.equal(y, torch.arange(6.0)[None])
    assert torch.equal(mean, torch.full((6,), 3.0, dtype=torch.float64))
    assert torch.equal(m2, torch.zeros(6, dtype=torch.float64))


def test_outputs_and_gradients_must_be_like_the_input():
    moments, wanted = (np.zeros(6), np.ones(6)), (True, False, False)
    for other in (X.double(), X[:2], X.contiguous(memory_format=torch.channels_last), X.flatten(2)):
        assert kernels.plain.train(X, other, None, None, None, None, None, 0.0, 0.1, 1) is None
        assert kernels.plain.backward(X, torch.empty_like(X), other, None, None, *moments, 0, 0.0, False, wanted, 1) is None
    for wanted in ((True, True, False), (True, False, True)):  # gradients of parameters that are not there have no type
        assert kernels.plain.backward(X, torch.empty_like(X), X, None, None, *moments, 0, 0.0, False, wanted, 1) is None


def test_negative_views_have_their_values():
    """Their memory holds the other sign."""
    weight = NEGATIVE[1, :, 0, 0]
    assert NEGATIVE.is_neg()
    assert weight.is_neg()
    got = batch_norm(NEGATIVE, None, None, weight, weight, training=True)
    want = batch_norm(NEGATIVE.resolve_neg(), None, None, weight.resolve_neg(), weight.resolve_neg(), training=True)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_running_statistics_of_inference_mode():
    """They have no version to count."""
    with torch.inference_mode():
        module = convert(torch.nn.BatchNorm2d(6))
        module(X)
        assert module.num_batches_tracked == 1
    with torch.no_grad():
        module(X)
    assert module.num_batches_tracked == 2


def test_a_parametrized_weight_and_a_replaced_buffer():
    """Neither lies where a module keeps its own."""

    class Double(torch.nn.Module):
        def forward(self, weight):
            return 2 * weight

    theirs = torch.nn.BatchNorm2d(6)
    ours = convert(copy.deepcopy(theirs))
    for module in (theirs, ours):
        torch.nn.utils.parametrize.register_parametrization(module, "weight", Double())
        mean = module.running_mean
        del module.running_mean
        module.running_mean = mean
    torch.testing.assert_close(ours(X), theirs(X))
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
