"""fastbn.torch with tensors that have no memory of their own: every place of a call, every road; and derivatives under transforms."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch.autograd.forward_ad as forward_ad  # noqa: E402
from torch._subclasses import FakeTensorMode  # noqa: E402
from torch.utils._pytree import tree_map  # noqa: E402

from fastbn import _native  # noqa: E402
from fastbn._torch import kernels  # noqa: E402
from fastbn.torch import BatchNorm2d, SyncBatchNorm, batch_norm  # noqa: E402

functional = torch.nn.functional
C = 3
NAMES = ("input", "running_mean", "running_var", "weight", "bias")


class Wrapper(torch.Tensor):
    """A tensor that stands for another and has no storage, as DTensor and those of quantization libraries are."""

    @staticmethod
    def __new__(cls, inner):
        options = {"dtype": inner.dtype, "device": inner.device, "requires_grad": inner.requires_grad}
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), **options)

    def __init__(self, inner):
        self.held = inner.detach()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        def held(value):
            return value.held if isinstance(value, Wrapper) else value

        found = func(*tree_map(held, args), **tree_map(held, kwargs or {}))
        return tree_map(lambda value: Wrapper(value) if isinstance(value, torch.Tensor) else value, found)


class Owner(torch.Tensor):
    """A subclass whose memory holds other values than it stands for: its address may not be read either."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_subclass(cls, torch.full_like(inner.detach(), 7), inner.requires_grad)

    def __init__(self, inner):
        self.held = inner.detach()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        def held(value):
            return value.held if isinstance(value, Owner) else value

        return func(*tree_map(held, args), **tree_map(held, kwargs or {}))


def plain(value):
    return value.held if isinstance(value, (Wrapper, Owner)) else value.detach()


def tensor(shape, seed=0, dtype=torch.float32):
    return (torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)) + 0.5).to(dtype)


def arguments(shape=(4, C, 2, 5), dtype=torch.float32):
    given = [tensor(shape, 0, dtype), tensor(C, 1, dtype), tensor(C, 2, dtype).square() + 1, tensor(C, 3, dtype), tensor(C, 4, dtype)]
    return [each.requires_grad_(name in ("input", "weight", "bias")) for name, each in zip(NAMES, given, strict=True)]


def close(got, want):
    torch.testing.assert_close(plain(got), plain(want), rtol=1e-5, atol=1e-5)


@pytest.fixture(params=["compiled", "general"])
def road(request, monkeypatch):
    """Both ways of plain tensors: the second is that of a torch without DLPack's exchange functions."""
    if request.param == "general":
        exchange = _native.PlainTensors(None, torch.empty_like, torch.Tensor, torch.nn.Parameter)
        monkeypatch.setattr(kernels, "plain", exchange)


@pytest.mark.usefixtures("road")
@pytest.mark.parametrize("kind", [Wrapper, Owner])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("place", range(5), ids=NAMES)
def test_every_argument_may_stand_for_another(place, training, kind):
    want, ours, dy = arguments(), arguments(), tensor((4, C, 2, 5), 9)
    ours[place] = kind(ours[place])
    y = batch_norm(*ours, training)
    wanted = functional.batch_norm(*want, training)
    close(y, wanted)
    leaves = [0, 3, 4]
    found = torch.autograd.grad(y, [ours[leaf] for leaf in leaves], kind(dy) if isinstance(y, kind) else dy)
    for got, exact in zip(found, torch.autograd.grad(wanted, [want[leaf] for leaf in leaves], dy), strict=True):
        close(got, exact)
    for moved in (1, 2):
        close(ours[moved], want[moved])


@pytest.mark.usefixtures("road")
@pytest.mark.parametrize("again", [False, True], ids=["once", "create_graph"])
@pytest.mark.parametrize("kind", [Wrapper, Owner])
@pytest.mark.parametrize("training", [True, False])
def test_a_gradient_may_stand_for_another(training, kind, again):
    given, dy = arguments(), tensor((4, C, 2, 5), 9)
    leaves = [given[leaf] for leaf in (0, 3, 4)]
    want = torch.autograd.grad(functional.batch_norm(*given, training), leaves, dy)
    given[1:3] = arguments()[1:3]
    for got, exact in zip(torch.autograd.grad(batch_norm(*given, training), leaves, kind(dy), create_graph=again), want, strict=True):
        close(got, exact)


@pytest.mark.usefixtures("road")
@pytest.mark.parametrize("training", [True, False])
def test_zeros_without_memory(training):
    given = arguments()
    zeros = torch._efficientzerotensor
    leaves = [given[leaf] for leaf in (0, 3, 4)]
    for got in torch.autograd.grad(batch_norm(*given, training), leaves, zeros((4, C, 2, 5))):
        assert not got.abs().max()
    for place in (0, 1, 3, 4):
        given, full = arguments(), arguments()
        given[place], full[place] = zeros(full[place].shape), torch.zeros(full[place].shape)
        if training and place == 1:  # nothing can be written there
            with pytest.raises(RuntimeError):
                batch_norm(*given, training)
        else:
            close(batch_norm(*given, training), functional.batch_norm(*full, training))


@pytest.mark.usefixtures("road")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("place", [*range(5), "grad"], ids=[*NAMES, "grad"])
def test_fake_tensors_beside_real_ones_are_torchs_error(place, training):
    given = arguments()
    with FakeTensorMode():
        fake = torch.ones(C) if place in (1, 2, 3, 4) else torch.ones(4, C, 2, 5)
    if place != "grad":
        given[place] = fake
    with pytest.raises(AssertionError, match="convert all Tensors to FakeTensors first"):
        torch.autograd.grad(batch_norm(*given, training), given[0], fake)


@pytest.mark.parametrize("training", [True, False])
def test_a_mode_of_fake_tensors_around_the_backward_pass(training):
    """It makes fake every tensor that is made within."""
    for shape in ((4, C, 2, 5), (64, C, 32, 32)):  # the memory of large results is lent
        given = arguments(shape)
        y = batch_norm(*given, training)
        with pytest.raises(AssertionError, match="convert all Tensors to FakeTensors first"), FakeTensorMode():
            torch.autograd.grad(y, given[0], torch.ones(shape))


@pytest.mark.parametrize("place", [1, 2, 3, 4], ids=NAMES[1:])
def test_parameters_on_another_device_are_an_error(place):
    given = arguments()
    given[place] = given[place].detach().to("meta")
    with pytest.raises(RuntimeError, match="meta"):
        batch_norm(*given, True)


@pytest.mark.parametrize("place", [1, 2, 3, 4], ids=NAMES[1:])
@pytest.mark.parametrize("other", [[0.0] * C, np.ones(C, np.float32)], ids=["list", "ndarray"])
def test_what_is_no_tensor_is_an_error(place, other):
    given = arguments()
    given[place] = other
    with pytest.raises((TypeError, AttributeError, RuntimeError)):
        batch_norm(*given, True)


def test_modules_whose_buffers_and_parameters_stand_for_others():
    theirs, ours = torch.nn.BatchNorm2d(C), BatchNorm2d(C)
    x = tensor((4, C, 2, 5))
    for name in ("weight", "running_mean", "running_var"):
        delattr(ours, name)
        setattr(ours, name, Wrapper(tensor(C, 5).square() + 1))
        if name == "weight":
            theirs.weight.data.copy_(tensor(C, 5).square() + 1)
        else:
            getattr(theirs, name).copy_(tensor(C, 5).square() + 1)
    close(ours(x), theirs(x))
    assert ours.num_batches_tracked == 1
    close(ours.running_mean, theirs.running_mean)
    close(ours.running_var, theirs.running_var)
    close(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("absent", [1, 2], ids=NAMES[1:3])
def test_one_running_statistic_alone_moves_on_every_road(absent):
    eager, operators = arguments(), arguments()
    eager[absent] = operators[absent] = None
    operators[3] = Wrapper(operators[3])
    close(batch_norm(*operators, True), batch_norm(*eager, True))
    present = 3 - absent
    assert not torch.equal(eager[present], arguments()[present])
    close(operators[present], eager[present])


# ---- transforms of the backward pass ----


def derivatives(function, training):
    """Gradients of a call, batched, again, by each way to a Jacobian and a Hessian, by name."""
    x, mean, var, weight, bias = arguments((4, C, 2), torch.float64)
    call = partial(lambda x, weight, bias: function(x, *(None, None) if training else (mean, var), weight, bias, training))
    leaves, batch = (x, weight, bias), tensor((5, 4, C, 2), 7, torch.float64)
    found, y = {}, call(*leaves)
    found["batched"] = torch.autograd.grad(y, leaves, batch, is_grads_batched=True, retain_graph=True)
    found["mapped"] = torch.func.vmap(lambda dy: torch.autograd.grad(y, leaves, dy, retain_graph=True))(batch)
    graph = torch.autograd.grad(y, leaves, batch, is_grads_batched=True, create_graph=True)
    found["batched, again"] = torch.autograd.grad(sum(each.square().sum() for each in graph), leaves[:2])
    inputs = tuple(leaf.detach() for leaf in leaves)
    found["jacobian"] = torch.autograd.functional.jacobian(call, inputs, vectorize=True)

    def loss(*given):
        return (call(*given).pow(3) * batch[0]).sum()

    rows = torch.autograd.functional.hessian(loss, inputs, vectorize=True)
    found["hessian"] = [block for row in rows for block in row]
    found["hessian, one by one"] = [block for row in torch.autograd.functional.hessian(loss, inputs) for block in row]
    return found


@pytest.mark.usefixtures("road")
@pytest.mark.parametrize("training", [True, False])
def test_batched_gradients(training):
    got, want = derivatives(batch_norm, training), derivatives(functional.batch_norm, training)
    for name in want:
        for one, other in zip(got[name], want[name], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("wrapped", [False, True], ids=["eager", "operators"])
@pytest.mark.parametrize("training", [True, False])
def test_the_tangent_of_a_gradient_outside_its_level(training, wrapped):
    dy, tangent = tensor((4, C, 2), 5, torch.float64), tensor((4, C, 2), 6, torch.float64)
    found = []
    for function in (functional.batch_norm, batch_norm):
        x, mean, var, weight, bias = arguments((4, C, 2), torch.float64)
        if wrapped and function is batch_norm:
            y = torch.ops.fastbn.batch_norm_train(x, weight, bias, 1e-5)[0]
            y = y if training else torch.ops.fastbn.batch_norm(x, mean, var, weight, bias, 1e-5)
        else:
            y = function(x, mean, var, weight, bias, training)
        with forward_ad.dual_level():
            dual = torch.autograd.grad(y, (x, weight, bias), forward_ad.make_dual(dy, tangent), retain_graph=True)
            found.append([part for each in dual for part in forward_ad.unpack_dual(each)])
        primals, tangents = torch.func.jvp(lambda dy, y=y, leaves=(x, weight, bias): torch.autograd.grad(y, leaves, dy), (dy,), (tangent,))
        found[-1] += [*primals, *tangents]
    for got, want in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def plain_formula(x, mean, var, weight, bias, training):
    if training:
        mean, var = x.mean((0, 2)), x.var((0, 2), unbiased=False)
    along = (1, -1, 1)
    return (x - mean.view(along)) / (var.view(along) + 1e-5).sqrt() * weight.view(along) + bias.view(along)


@pytest.mark.parametrize("training", [True, False])
def test_third_derivatives(training):
    """Beside torch's elementary operators: those of its own batch normalization are 0.5 % off."""
    found = []
    for function in (plain_formula, batch_norm):
        x, mean, var, weight, bias = arguments((4, C, 2), torch.float64)
        factor = tensor((4, C, 2), 5, torch.float64)
        first = (function(x, *(None, None) if training else (mean, var), weight, bias, training) * factor).pow(3).sum()
        (once,) = torch.autograd.grad(first, x, create_graph=True)
        (twice,) = torch.autograd.grad((once * factor).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad((twice * factor).square().sum(), (x, weight, bias)))
    for got, want in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9 * float(want.abs().max()))


# ---- processes ----


def test_collectives_and_shards(tmp_path, environment):
    """All-reduced gradients and statistics, DTensor, and a process group, in two processes; see shards.py."""
    if not (torch.distributed.is_available() and hasattr(os, "fork")):
        pytest.skip("torch.distributed or fork is missing here")
    script = Path(__file__).with_name("shards.py")
    done = subprocess.run([sys.executable, str(script), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout == "[0, 0]\n", done.stdout + done.stderr


def test_a_process_group_takes_no_tensors_that_stand_for_others(tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("torch.distributed is missing here")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        module, x = SyncBatchNorm(C), tensor((4, C, 2, 5)).requires_grad_()
        dy = tensor((4, C, 2, 5), 1)
        for stands in (Wrapper(dy), torch.ones(1).expand(5, 4, C, 2, 5)):
            with pytest.raises(RuntimeError, match="Cannot share the gradient with a process group"):
                torch.autograd.grad(module(x), x, stands, is_grads_batched=stands.dim() > 4)
        (zeros,) = torch.autograd.grad(module(x), x, torch._efficientzerotensor(x.shape))
        assert not zeros.abs().max()
        module.weight = torch.nn.Parameter(Wrapper(torch.ones(C)))
        with pytest.raises(RuntimeError, match="Cannot share the batch with a process group: the call is traced"):
            module(x)
    finally:
        torch.distributed.destroy_process_group()
