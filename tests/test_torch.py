"""fastbn.torch beside torch itself, and against float64: modules, gradients, bad input."""

import copy
import doctest
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")


from torch_modules import assert_same, pair, step, tensor  # noqa: E402

import fastbn  # noqa: E402
import fastbn.torch  # noqa: E402
from fastbn import reference  # noqa: E402
from fastbn.torch import BatchNorm2d, batch_norm, convert  # noqa: E402

nn, functional = torch.nn, torch.nn.functional
KINDS = [(nn.BatchNorm1d, (8, 6)), (nn.BatchNorm1d, (8, 6, 5)), (nn.BatchNorm2d, (4, 6, 7, 5)), (nn.BatchNorm3d, (2, 6, 3, 4, 5))]
OPTIONS = [
    {},
    {"momentum": None},
    {"momentum": 0.3, "eps": 0.1},
    {"affine": False},
    {"bias": False},
    {"track_running_stats": False},
    {"affine": False, "track_running_stats": False},
]


# ---- modules beside torch's ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("kind", "shape"), KINDS, ids=str)
def test_modules_do_what_torchs_do(kind, shape, options, dtype):
    theirs, ours = pair(kind, **options, dtype=dtype)
    assert isinstance(ours, kind)
    for batch in range(3):
        x, dy = tensor(shape, batch, dtype), tensor(shape, 10 + batch, dtype)
        assert_same(step(ours, x, dy), step(theirs, x, dy), rtol=1e-5, atol=1e-5)
    # Three updates round three times, in either.
    assert_same(ours.state_dict(), theirs.state_dict(), rtol=6 * torch.finfo(dtype).eps, atol=6 * torch.finfo(dtype).eps)
    assert_same(step(ours.eval(), x, dy), step(theirs.eval(), x, dy), rtol=1e-5, atol=1e-5)
    assert_same(ours.state_dict(), theirs.state_dict(), rtol=6 * torch.finfo(dtype).eps, atol=6 * torch.finfo(dtype).eps)


def strided(kind, shape=(4, 6, 7, 5), dtype=torch.float32):
    base = tensor(shape, dtype=dtype)
    return {
        "channels last": base.contiguous(memory_format=torch.channels_last),
        "cropped": tensor((4, 6, 9, 8), dtype=dtype)[:, :, 1:8, 2:7],
        "every second channel": tensor((4, 12, 7, 5), dtype=dtype)[:, ::2],
        "every second column": tensor((4, 6, 7, 10), dtype=dtype)[..., ::2],
        "turned": tensor((5, 7, 6, 4), dtype=dtype).permute(3, 2, 1, 0),
        "expanded": tensor((1, 6, 7, 5), dtype=dtype).expand(shape),
        "expanded columns": tensor((4, 6, 7, 1), dtype=dtype).expand(shape),
    }[kind]


STRIDED = ["channels last", "cropped", "every second channel", "every second column", "turned", "expanded", "expanded columns"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of_dy", ["contiguous", *STRIDED])
@pytest.mark.parametrize("kind", STRIDED)
def test_strides_are_read_as_they_are_and_kept(kind, of_dy, dtype):
    _, module = pair(nn.BatchNorm2d)
    x = strided(kind, dtype=dtype)
    dy = tensor(x.shape, 1, dtype) if of_dy == "contiguous" else strided(of_dy, dtype=dtype)
    want = step(copy.deepcopy(module), x.contiguous(), dy.contiguous())
    got = step(module, x, dy)
    # In other memory orders the sums are added in another order.
    tolerance = {"rtol": 2**-7, "atol": 2**-7} if dtype is torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    assert_same(got, want, **tolerance)
    assert got["y"].stride() == torch.empty_like(x).stride()
    assert got["dx"].stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("training", [True, False])
def test_negative_views_are_read_with_their_sign(training):
    _, ours = pair(nn.BatchNorm2d)
    ours.train(training)
    x, dy = (torch.complex(tensor((4, 6, 7, 5), seed), tensor((4, 6, 7, 5), seed + 1)).conj().imag for seed in (0, 2))
    assert x.is_neg()
    assert_same(step(copy.deepcopy(ours), x, dy), step(ours, x.resolve_neg().clone(), dy.resolve_neg().clone()), rtol=1e-5, atol=1e-5)
    vector = torch.complex(tensor(6), tensor(6, 1)).conj().imag
    got, want = (batch_norm(x, None, None, vector, bias, True) for bias in (vector, vector.resolve_neg()))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("shape", [(0, 6, 7, 5), (3, 6, 0, 5)])
def test_an_empty_batch(shape):
    _, ours = pair(nn.BatchNorm2d)
    before = copy.deepcopy(ours.state_dict())
    got = step(ours, tensor(shape), tensor(shape))
    assert got["y"].shape == got["dx"].shape == shape
    assert got["dweight"].tolist() == got["dbias"].tolist() == [0] * 6
    assert int(ours.num_batches_tracked) == 1
    for name in ("running_mean", "running_var"):
        assert torch.equal(ours.state_dict()[name], before[name])
    assert ours.eval()(tensor(shape)).shape == shape


@pytest.mark.parametrize("data", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("parameters", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_mixed_types_against_float64(training, parameters, data):
    _, ours = pair(nn.BatchNorm2d)
    ours.to(parameters)
    x, dy = tensor((4, 6, 7, 5), 3, data), tensor((4, 6, 7, 5), 4, data)
    ours(x)
    ours.train(training)
    got = step(ours, x, dy)
    stats = fastbn.batch_stats(x.double().numpy())
    stats = stats if training else fastbn.BatchStats(1, ours.running_mean.double().numpy(), ours.running_var.double().numpy())
    weight, bias = (parameter.detach().double().numpy() for parameter in ours.parameters())
    y = reference.batch_norm(x.double().numpy(), stats.mean, stats.var, weight, bias)
    gradients = reference.batch_norm_backward(dy.double().numpy(), x.double().numpy(), stats, weight, bias, training=training)
    for name, want in zip(("y", "dx", "dweight", "dbias"), (y, *gradients), strict=True):
        dtype = data if name in ("y", "dx") else parameters
        assert got[name].dtype is dtype
        unit = max(torch.finfo(dtype).eps, 2**-23 if data is not torch.float64 else 2**-52)
        np.testing.assert_allclose(got[name].double().numpy(), want, rtol=unit, atol=4 * unit * np.abs(want).max())
    assert ours.running_mean.dtype is parameters


def test_autocast_gives_what_it_gives_torch():
    theirs, ours = (nn.Sequential(nn.Conv2d(3, 6, 3), module) for module in pair(nn.BatchNorm2d))
    ours[0] = theirs[0]
    with torch.autocast("cpu", torch.bfloat16):
        want, got = theirs(tensor((2, 3, 6, 6))), ours(tensor((2, 3, 6, 6)))
    assert got.dtype is want.dtype is torch.bfloat16
    torch.testing.assert_close(got, want, rtol=2**-7, atol=2**-7)
    got.float().sum().backward()
    assert ours[1].weight.grad.dtype is torch.float32


def test_better_than_torch_far_from_zero():
    """Where torch loses every digit, the contract of the array functions holds."""
    x = tensor((8, 3, 32, 32), dtype=torch.float64) + 1e6
    want = functional.batch_norm(x.float().double(), None, None, training=True)
    assert (batch_norm(x.float(), None, None, training=True) - want).abs().max() < 2e-6 * (1 + want.abs().max())


@pytest.mark.parametrize("frozen", ["input", "weight", "bias", "parameters", "input and bias"])
@pytest.mark.parametrize("training", [True, False])
def test_only_what_requires_a_gradient_gets_one(training, frozen):
    gradients = []
    for module in pair(nn.BatchNorm2d):
        module.train(training)
        module.weight.requires_grad_(not any(name in frozen for name in ("weight", "parameters")))
        module.bias.requires_grad_(not any(name in frozen for name in ("bias", "parameters")))
        x = tensor((4, 6, 7, 5)).requires_grad_("input" not in frozen)
        module(x).backward(tensor((4, 6, 7, 5), 1))
        gradients.append([x.grad, module.weight.grad, module.bias.grad])
    for theirs, ours in zip(*gradients, strict=True):
        assert (theirs is None) is (ours is None)
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_gradients_of_a_parameter_used_as_input():
    theirs, ours = pair(nn.BatchNorm1d)
    x = nn.Parameter(tensor((8, 6)))
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_a_step_that_changes_the_statistics_of_an_open_graph_is_found():
    """The frozen pass needs the statistics that the training pass then overwrites; torch's gives a wrong gradient."""
    _, module = pair(nn.BatchNorm2d)
    y = module.eval()(tensor((4, 6, 7, 5)).requires_grad_())
    module.train()(tensor((4, 6, 7, 5)))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_inference_mode():
    theirs, ours = pair(nn.BatchNorm2d)
    with torch.inference_mode():
        torch.testing.assert_close(ours(tensor((4, 6, 7, 5))), theirs(tensor((4, 6, 7, 5))), rtol=1e-5, atol=1e-5)
        made_inside = convert(nn.BatchNorm2d(6))
        made_inside(tensor((4, 6, 7, 5)))
    torch.testing.assert_close(ours.running_var, theirs.running_var)


def test_checkpoint_and_hooks_of_saved_tensors():
    _, ours = pair(nn.BatchNorm2d)
    x, dy = tensor((4, 6, 7, 5)), tensor((4, 6, 7, 5), 1)
    want = step(copy.deepcopy(ours), x, dy)["dx"]
    leaf = x.clone().requires_grad_()
    torch.utils.checkpoint.checkpoint(ours, leaf, use_reentrant=False).backward(dy)
    torch.testing.assert_close(leaf.grad, want, rtol=0, atol=0)


def test_the_bits_do_not_depend_on_threads():
    _, ours = pair(nn.BatchNorm2d, channels=64)
    x, dy = tensor((4, 64, 40, 40)), tensor((4, 64, 40, 40), 1)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(step(copy.deepcopy(ours), x, dy))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert_same(other, results[0], rtol=0, atol=0)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")
def test_torchs_number_of_threads_is_respected(environment):
    code = """
import os, torch, fastbn.torch
torch.set_num_threads(1)
x = torch.ones(4, 64, 60, 60)
counts = [len(os.listdir("/proc/self/task"))]
fastbn.set_num_threads(3)
for threads in (1, 3):
    torch.set_num_threads(threads)
    fastbn.torch.batch_norm(x, None, None, training=True)
    counts.append(len(os.listdir("/proc/self/task")))
print([count - counts[0] for count in counts])
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "[0, 0, 2]\n"
    fewer = subprocess.run(
        [sys.executable, "-c", code.replace("set_num_threads(3)", "set_num_threads(1)")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert fewer.stdout == "[0, 0, 0]\n"


# ---- bad input ----


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(2, 5, 3, 3), r"Expected shape \(5,\), a value per channel of the input, got shape \(6,\) - at `running_mean`"),
        (torch.ones(2, 6, 3), "4D"),
        (torch.ones(6), "4D"),
        (
            torch.ones(2, 6, 3, 3, dtype=torch.int64),
            "Expected a tensor of float32, float64, float16 or bfloat16, got torch.int64 - at `input`",
        ),
        (torch.ones(2, 6, 3, 3, dtype=torch.complex64), r"got torch\.complex64 - at `input`"),
        (
            torch.ones(2, 6, 3, 3).to_sparse(),
            r"Expected a dense tensor in CPU memory, got one of layout torch\.sparse_coo on cpu - at `input`",
        ),
        (torch.ones(2, 6, 3, 3, device="meta"), "Expected a tensor on meta, as the input, got one on cpu - at `running_mean`"),
    ],
    ids=["channels", "rank 3", "rank 1", "integers", "complex", "sparse", "device"],
)
def test_bad_input_raises_what_torch_raises_and_moves_nothing(x, message, training):
    theirs, ours = pair(nn.BatchNorm2d)
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises((ValueError, RuntimeError)) as of_torch:
        theirs.train(training)(x)
    with pytest.raises((ValueError, RuntimeError), match=message) as of_ours:
        ours.train(training)(x)
    assert issubclass(of_ours.type, ValueError) is issubclass(of_torch.type, ValueError)
    assert "\n" not in str(of_ours.value)
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d])
def test_one_value_per_channel_in_training(kind):
    theirs, ours = pair(kind)
    x = torch.ones((1, 6, 1, 1, 1)[: {nn.BatchNorm1d: 2, nn.BatchNorm2d: 4, nn.BatchNorm3d: 5}[kind]])
    for module in (theirs, ours):
        with pytest.raises(ValueError, match="xpected more than 1 value per channel when training"):
            module(x)
    assert int(ours.num_batches_tracked) == 0
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"running_mean": None}, RuntimeError, "Expected running_mean and running_var when not training, got None"),
        ({"weight": torch.ones(2)}, RuntimeError, r"got shape \(2,\) - at `weight`"),
        ({"bias": torch.ones(3, 1)}, RuntimeError, r"got shape \(3, 1\) - at `bias`"),
        ({"bias": torch.ones(3, dtype=torch.int32)}, RuntimeError, r"got torch\.int32 - at `bias`"),
        ({"eps": -1.0}, ValueError, "at `eps`"),
        ({"input": torch.ones(3)}, ValueError, r"Expected at least 2 dimensions, got shape \(3,\) - at `input`"),
    ],
    ids=str,
)
def test_bad_arguments_of_the_function(change, error, message):
    given = {"input": torch.ones(2, 3), "running_mean": torch.zeros(3), "running_var": torch.ones(3)} | change
    with pytest.raises(error, match=message):
        batch_norm(**given)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_tensors_of_another_device():
    with pytest.raises(RuntimeError, match="Expected a dense tensor in CPU memory"):
        BatchNorm2d(3)(torch.ones(2, 3, 4, 4, device="cuda"))


def test_examples():
    assert doctest.testmod(fastbn.torch).failed == 0
