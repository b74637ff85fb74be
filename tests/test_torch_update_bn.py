"""update_bn: the moments of all the data, where torch's function has averages of batches."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import gloo  # noqa: E402
from test_distributed import together  # noqa: E402

import fastbn  # noqa: E402
import fastbn.torch  # noqa: E402
from fastbn.torch import update_bn  # noqa: E402


@torch.no_grad()
def truth(net, x):
    """The network in float64 with the statistics of all the data at once, one batch normalization after the other."""
    net = net.double().eval()
    y = x.double()
    for layer in net:
        if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm):
            axes = [axis for axis in range(y.dim()) if axis != 1]
            layer.running_mean.copy_(y.mean(axes))
            layer.running_var.copy_(y.var(axes, unbiased=True))
        y = layer(y)
    return {name: value.detach().numpy() for name, value in net.state_dict().items() if "running" in name}


def errors(net, wanted):
    """The largest error of a mean, in its deviations, and of a variance, as part of it."""
    state = {name: value.double().numpy() for name, value in net.state_dict().items()}
    mean = var = 0
    for name, values in wanted.items():
        if name.endswith("running_mean"):
            deviation = np.sqrt(wanted[name.replace("mean", "var")])
            mean = max(mean, (np.abs(state[name] - values) / deviation).max())
        else:
            var = max(var, np.abs(state[name] / values - 1).max())
    return mean, var


@pytest.mark.parametrize("ours", [False, True])
def test_uneven_batches_far_from_zero(ours):
    x = gloo.images()
    x[32:] += 5  # the last batch of 9 is another one than those before
    wanted = truth(gloo.network(), x)
    net, other = gloo.network(), gloo.network().double()
    if ours:
        fastbn.torch.convert(net)
    update_bn(net, x.split(16))
    mean, var = errors(net, wanted)
    assert mean < 3e-5  # float32 activations, 50 deviations from zero
    assert var < 1e-5
    torch.optim.swa_utils.update_bn(x.double().split(16), other)
    mean, var = errors(other, wanted)
    assert mean > 0.01
    assert var > 0.02


def test_in_float64_nothing_is_lost():
    x = (gloo.images() + 1e4).double()
    wanted = truth(gloo.network(), x)
    net = gloo.network().double()
    update_bn(net, x.split(16))
    mean, var = errors(net, wanted)
    assert mean < 1e-9
    assert var < 1e-9


def test_one_pass_merges_the_moments_of_batches_that_normalize_themselves():
    x = gloo.images(40)
    net, other = gloo.network(), gloo.network()
    update_bn(net, x.split(10), mode="one-pass")
    torch.optim.swa_utils.update_bn(x.split(10), other)
    for name, values in net.state_dict().items():
        reference = other.state_dict()[name]
        if name.endswith("running_mean"):  # equal batches: the mean of their means is that of all
            np.testing.assert_allclose(values, reference, rtol=1e-4, atol=1e-4)
        elif name == "1.running_var":  # what lies between the batches is in it
            means = torch.stack([net[0](part).mean((0, 2, 3)) for part in x.split(10)])
            inner = torch.stack([net[0](part).var((0, 2, 3), unbiased=False) for part in x.split(10)])
            count = 40 * 36
            whole = (inner.mean(0) + means.var(0, unbiased=False)) * count / (count - 1)
            np.testing.assert_allclose(values, whole.detach(), rtol=1e-4)
        else:
            assert name.endswith(("running_var", "tracked")) or torch.equal(values, reference)


def test_flags_momenta_and_the_rest_stay():
    net = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2, track_running_stats=False)).train()
    net[1].eval()
    net[1].momentum = 0.3
    unused = net.unused = torch.nn.Identity()
    unused.norm = torch.nn.BatchNorm1d(2)
    unused.norm.running_mean.fill_(7)
    x = torch.arange(20.0).reshape(10, 2)
    for mode in ("population", "one-pass"):
        update_bn(net, x.split(4), mode=mode)
        assert [part.training for part in net.modules()] == [True, True, False, True, True, True]
        assert net[1].momentum == 0.3
        assert net[1].running_mean.tolist() == [9, 10]  # no Dropout
        assert net[1].num_batches_tracked == 3
        assert unused.norm.running_mean.tolist() == [7, 7]
        assert all("forward" not in part.__dict__ for part in net.modules())


def test_a_shared_module_has_the_statistics_of_all_its_calls():
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(1)

        def forward(self, x):
            return self.norm(self.norm(x) + 3)

    net = Twice()
    x = torch.tensor([[1.0], [3.0]])
    update_bn(net, [x, x])
    assert net.norm.running_mean.item() == pytest.approx((2 + 3) / 2)
    values = np.array([1, 3, 1, 3, 2, 4, 2, 4])
    assert net.norm.running_var.item() == pytest.approx(values.var(ddof=1), rel=1e-4)


@pytest.mark.parametrize("mode", ["population", "one-pass"])
def test_a_module_that_is_called_by_keyword(mode):
    class Named(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(2)

        def forward(self, x):
            return self.norm(input=x)

    net = Named()
    update_bn(net, torch.arange(20.0).reshape(10, 2).split(4), mode=mode)
    assert net.norm.running_mean.tolist() == [9, 10]


class Routes(torch.nn.Module):
    """Sends a batch of negative values another way than one of positive ones, and adds what is common behind both."""

    def __init__(self):
        super().__init__()
        self.last, self.minus, self.plus = (torch.nn.BatchNorm1d(1) for _ in range(3))

    def forward(self, x):
        return self.last((self.minus if (x < 0).all() else self.plus)(x) + x)


def test_one_that_only_a_later_batch_reaches_comes_before_what_it_feeds():
    x = torch.tensor([[1.0], [2.0], [3.0], [-1.0], [-5.0], [-3.0], [4.0]])
    net = Routes()
    update_bn(net, x.split(3))
    plus, minus = (x[mask].numpy() for mask in (x[:, 0] > 0, x[:, 0] < 0))
    for norm, values in ((net.plus, plus), (net.minus, minus)):
        assert norm.running_mean.item() == pytest.approx(values.mean())
        assert norm.running_var.item() == pytest.approx(values.var(ddof=1))
    fed = np.concatenate([values + (values - values.mean()) / np.sqrt(values.var(ddof=1) + 1e-5) for values in (plus, minus)])
    assert net.last.running_mean.item() == pytest.approx(fed.mean(), rel=1e-5)
    assert net.last.running_var.item() == pytest.approx(fed.var(ddof=1), rel=1e-5)


def test_calls_in_both_orders_have_no_order():
    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.BatchNorm1d(1), torch.nn.BatchNorm1d(1)

        def forward(self, x):
            return self.a(self.b(x)) if (x < 0).all() else self.b(self.a(x))

    x = torch.tensor([[1.0], [2.0], [-1.0], [-5.0]])
    with pytest.raises(
        fastbn.ArgumentError, match="some batches call 'a' before 'b' and others the other way round; mode='one-pass' takes"
    ):
        update_bn(Both(), x.split(2))
    update_bn(Both(), x.split(2), mode="one-pass")


def test_one_that_is_called_more_often_in_some_batches():
    class Often(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(1)

        def forward(self, x):
            for _ in range(len(x) - 1):
                self.norm(x)
            return x

    net, x = Often(), torch.tensor([[1.0], [2.0], [4.0], [8.0], [16.0]])
    update_bn(net, x.split(3))
    assert net.norm.running_mean.item() == pytest.approx((2 * (1 + 2 + 4) + 8 + 16) / 8)


@pytest.mark.parametrize("mode", ["population", "one-pass"])
def test_one_that_is_called_by_its_forward(mode):
    class Direct(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(2)

        def forward(self, x):
            return self.norm.forward(x)

    net = Direct()
    update_bn(net, torch.arange(20.0).reshape(10, 2).split(4), mode=mode)
    assert net.norm.running_mean.tolist() == [9, 10]
    assert "forward" not in net.norm.__dict__
    net.compile(backend="eager")
    net(torch.arange(20.0).reshape(10, 2))
    update_bn(net, [torch.arange(20.0).reshape(10, 2) + 1], mode=mode)
    assert net.norm.running_mean.tolist() == [10, 11]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit itself
@pytest.mark.parametrize("mode", ["population", "one-pass"])
def test_what_nobody_can_look_into_is_an_error(mode):
    class Past(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(2)

        def forward(self, x):
            return torch.nn.functional.batch_norm(x, self.norm.running_mean, self.norm.running_var)

    x = [torch.zeros(4, 2)]
    with pytest.raises(fastbn.ArgumentError, match="Expected a model that calls its batch normalizations, got one that calls none of them"):
        update_bn(Past(), x, mode=mode)
    net = torch.nn.Sequential(torch.nn.BatchNorm1d(2))
    for compiled in (torch.jit.script(net), torch.nn.Sequential(torch.jit.trace(net.eval(), x[0]))):
        with pytest.raises(
            fastbn.ArgumentTypeError, match=r"Expected batch normalizations that run in Python, got some that torch\.jit has"
        ):
            update_bn(compiled, x, mode=mode)
    update_bn(torch.jit.script(torch.nn.Linear(2, 2)), x, mode=mode)


def test_loaders():
    x = torch.arange(20.0).reshape(10, 2)
    dataset = torch.utils.data.TensorDataset(x, torch.zeros(10))
    for loader in (torch.utils.data.DataLoader(dataset, batch_size=4), [[x, None]], [(x[:3],), (x[3:],)]):
        net = torch.nn.Sequential(torch.nn.BatchNorm1d(2))
        update_bn(net, loader)
        assert net[0].running_mean.tolist() == [9, 10]
    update_bn(net, iter([x]), mode="one-pass")
    update_bn(torch.nn.Linear(2, 2), [x])
    update_bn(torch.nn.parallel.DataParallel(net) if torch.cuda.is_available() else torch.compile(net, backend="eager"), [x + 1])
    assert net[0].running_mean.tolist() == [10, 11]


@pytest.mark.parametrize(("call", "error"), [
    (lambda net: update_bn(net, []), "Expected more than 1 value per channel, got 0 - at `loader`"),
    (lambda net: update_bn(net, [torch.zeros(1, 2)]), "Expected more than 1 value per channel, got 1 - at `loader`"),
    (lambda net: update_bn(net, iter([torch.zeros(4, 2)])), "Expected a loader that can be gone through again, or mode='one-pass', got .*"),
    (lambda net: update_bn(net, [torch.zeros(4, 2)], mode="fast"), "Expected population or one-pass, got 'fast' - at `mode`"),
    (lambda net: update_bn(net, iter([]), mode="one-pass"), "Expected more than 1 value per channel, got 0 - at `loader`"),
    (
        lambda net: update_bn(net, [torch.zeros(4, 2), torch.tensor([[1.0, float("nan")]])]),
        "Expected finite values, got NaN or Inf in the input of a BatchNorm1d - at `loader`",
    ),
    (lambda net: update_bn(net, [torch.full((4, 2), float("inf"))], mode="one-pass"), "Expected finite values, got NaN or Inf in .*"),
    (lambda net: update_bn(net, None), "Expected an iterable of batches, got NoneType - at `loader`"),
    (lambda net: update_bn([torch.zeros(4, 2)], net), r"Expected a torch\.nn\.Module, got list - at `model`"),
    (lambda net: update_bn(net, [torch.zeros(4, 2)], process_group="world"), r"Cannot share .*: torch\.distributed is not init.*"),
    (lambda net: update_bn(net, [torch.zeros(4, 2), torch.zeros(4, 3)]), "mat1 and mat2 shapes cannot be multiplied.*"),
])  # fmt: skip
def test_what_fails_changes_nothing(call, error):
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises((ValueError, TypeError, RuntimeError), match=f"^{error}$"):
        call(net)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(part.training and "forward" not in part.__dict__ for part in net.modules())


@pytest.mark.parametrize("size", [2, 3])
def test_processes_that_have_the_data_between_them(size, tmp_path, environment):
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    codes, _ = together(size, tmp_path, "update", environment)
    assert set(codes) == {0}
    wanted = truth(gloo.network(), gloo.images())
    for mode in ("population", "one-pass"):
        ranks = [np.load(tmp_path / f"{rank}.{mode}.npz") for rank in range(size)]
        for rank in ranks[1:]:
            assert all(rank[name].tobytes() == ranks[0][name].tobytes() for name in wanted)
        if mode == "population":
            net = gloo.network()
            net.load_state_dict({name: torch.from_numpy(np.array(values)) for name, values in ranks[0].items()})
            mean, var = errors(net, wanted)
            assert mean < 3e-5
            assert var < 1e-5


@pytest.mark.parametrize("device", ["nope", "cpu:x", 3.5, "hpu"])
def test_a_device_that_is_none(device):
    with pytest.raises((fastbn.ArgumentError, fastbn.errors.ArgumentTypeError), match=r"^Expected a device of torch .* - at `device`$"):
        update_bn(torch.nn.BatchNorm1d(3), [torch.ones(4, 3)], device=device)
    update_bn(torch.nn.BatchNorm1d(3), [torch.ones(4, 3), torch.zeros(4, 3)], device="cpu")
