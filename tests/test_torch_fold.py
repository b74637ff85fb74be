"""fastbn.torch.fold: PyTorch in, PyTorch out, without batch normalizations; every refusal has a reason, and the original stays as it is."""

import copy
import io
import json
import pickle

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

from torch_modules import tensor  # noqa: E402
from torch_networks import torch_networks  # noqa: E402

import fastbn  # noqa: E402
from fastbn._torch.replacements import Shift, Zeros  # noqa: E402
from fastbn.exported import torch_modules, torch_parity  # noqa: E402
from fastbn.torch import convert, fold  # noqa: E402

nn, functional = torch.nn, torch.nn.functional


def settled(model):
    """The model in evaluation, its batch normalizations with statistics as after a training."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            if module.affine:
                module.weight.data.uniform_(0.5, 1.5, generator=generator)
                module.bias.data.normal_(generator=generator)
    return model.eval()


def norms(model):
    return [name for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def assert_same(before, after, *inputs, tolerance=2e-5):
    with torch.no_grad():
        want, got = before(*inputs), after(*inputs)
    assert got.dtype == want.dtype
    assert (got - want).abs().max() <= tolerance * want.abs().max()


def folded(model, example, left=(), **options):
    """Fold a model, and hold what every fold must hold."""
    state = copy.deepcopy(model.state_dict())
    result = fold(model, example, **options)
    assert norms(result.model) == [kept.bn for kept in result.kept] == list(left), str(result)
    assert result.parity is None or result.parity.ok, result.parity
    now = model.state_dict()
    assert list(now) == list(state)
    assert all(torch.equal(now[name], state[name]) for name in state), "the original has changed"
    if isinstance(example, torch.Tensor):
        assert_same(model, result.model, example)
    return result


# ---- whole networks ----

# Batch normalizations left: as of the same networks as ONNX files.
LEFT = {"small_cnn": ["10.0"], "levit_like": [], "tabular_mlp": [], "tdnn": ["steps.11"], "repvgg": [], "unet": []}


@pytest.mark.parametrize("name", LEFT)
def test_as_much_folds_as_of_the_exported_graph(name):
    torch.manual_seed(0)
    model, inputs, _ = torch_networks()[name]
    result = folded(settled(model), inputs, LEFT[name])
    assert_same(model, result.model, *inputs)
    assert all(each.error is None or each.error <= each.bound for each in result.folded)
    assert any(each.error is not None for each in result.folded)
    report = result.to_dict()
    assert json.loads(json.dumps(report))["batch_normalizations"]["after"] == len(LEFT[name])
    assert f"-> {len(LEFT[name])}" in str(result)
    assert "in torch and in float64" in str(result)
    names = {name for name, _ in result.model.named_modules()}
    assert {each for entry in result.folded for each in entry.into.split("+")} <= names


def small():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3, bias=False), nn.Flatten(), nn.Linear(20, 6)]
    return settled(nn.Sequential(*layers, nn.BatchNorm1d(6)))


IMAGE = tensor((2, 3, 6, 6))


def test_the_result_is_a_plain_model():
    model = small()
    model[0].weight.requires_grad_(False)
    model[0].weight.data = model[0].weight.data.to(memory_format=torch.channels_last)
    result = folded(model, IMAGE)
    new = result.model
    assert [type(module) for module in new] == [nn.Conv2d, nn.Identity, nn.ReLU, nn.Conv2d, nn.Flatten, nn.Linear, nn.Identity]
    assert list(new.state_dict()) == ["0.weight", "0.bias", "3.weight", "5.weight", "5.bias"], "biases where they are needed alone"
    assert [each.requires_grad for each in new.parameters()] == [False, False, True, True, True]
    assert new[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not any(module.training for module in new.modules())
    file = io.BytesIO()
    torch.save(new, file)
    file.seek(0)
    for other in (copy.deepcopy(new), pickle.loads(pickle.dumps(new)), torch.load(file, weights_only=False)):
        assert_same(new, other, IMAGE, tolerance=0)
    assert_same(new, torch.compile(new, backend="eager"), IMAGE, tolerance=0)
    new.train()(IMAGE).sum().backward()  # it can be trained, without its batch normalizations
    assert repr(result) == "<ModelFold of torch: 2 of 2 BatchNormalization folded, parity ok>"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_other_types(dtype):
    model = small().to(dtype)
    result = fold(model, IMAGE.to(dtype))
    assert norms(result.model) == []
    assert {each.dtype for each in result.model.parameters()} == {dtype}
    assert result.parity.status in ("ok", "inconclusive")
    unit = torch.finfo(dtype).eps
    assert_same(small().double(), copy.deepcopy(result.model).double(), IMAGE.double(), tolerance=8 * unit)


def test_modules_of_ours_and_several_processes():
    model = convert(small())
    assert norms(folded(model, IMAGE).model) == []
    assert norms(folded(nn.SyncBatchNorm.convert_sync_batchnorm(small()), IMAGE).model) == []


def test_ways_to_give_the_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.bn = nn.Linear(3, 4), nn.BatchNorm1d(4)

        def forward(self, x, options, *, scale=None):
            y = self.bn(self.fc(x + options["shift"]))
            return {"y": y if scale is None else y * scale, "shape": y.shape}

    model, x = settled(Two()), tensor((5, 3))
    for example in ((x, {"shift": x}), [x, {"shift": x}], {"x": x, "options": {"shift": x}, "scale": x[:, :1]}):
        result = folded(model, example)
        assert "output['y']" in str(result)
    assert folded(model, (x, {"shift": x}), verify=False).parity is None


# ---- what stays of a batch normalization ----


class Product(nn.Module):
    """A matrix product with a parameter: a place for the scale, none for the shift."""

    def __init__(self):
        super().__init__()
        self.weight, self.bn = nn.Parameter(tensor((4, 6))), nn.BatchNorm1d(6)

    def forward(self, x):
        return self.bn(x @ self.weight)


def test_an_addition_and_zeros_that_stay():
    model = settled(Product())
    result = folded(model, tensor((3, 4)))
    assert type(result.model.bn) is Shift
    assert repr(result.model.bn) == "Shift((6,))"
    assert "an addition keeps the shift" in result.folded[0].note
    with torch.no_grad():
        assert torch.equal(pickle.loads(pickle.dumps(result.model))(tensor((3, 4))), result.model(tensor((3, 4))))

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.skip = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.conv(x) + self.skip(x)

    result = folded(settled(Branches()), IMAGE)
    assert type(result.model.skip) is Zeros
    assert result.folded[0].note == "zeros stay in the place of 'skip'"


# ---- what cannot be rewritten, and why ----


class Net(nn.Module):
    """Linear, then batch normalization, in the way that a test wants."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.fc, self.bn = nn.Linear(4, 4), nn.BatchNorm1d(4)
        for name, part in parts.items():
            setattr(self, name, part)
        self.call = forward

    def forward(self, x):
        return self.call(self, x)


class Derived(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x).tanh()


def tied(net):
    net.other.weight = net.fc.weight
    return net


def hooked(net, name):
    net.get_submodule(name).register_forward_hook(lambda *_: None)
    return net


def parametrized(net):
    torch.nn.utils.parametrizations.weight_norm(net.fc)
    return net


def plain(net, x):
    return net.bn(net.fc(x))


def by_function(net, x):
    bn = net.bn
    return functional.batch_norm(net.fc(x), bn.running_mean, bn.running_var, bn.weight, bn.bias)


def listed(net):
    net.steps = [net.fc, net.bn]
    return net


REFUSED = {
    "functional": (lambda: Net(by_function), "no-module", "it is not called as a module"),
    "twice": (lambda: Net(lambda net, x: net.bn(net.fc(net.bn(net.fc(x)).tanh()))), "no-module", "it is called 2 times"),
    "shared": (lambda: tied(Net(lambda net, x: net.bn(net.fc(x)) + net.other(x), other=nn.Linear(4, 4))), "no-module", "shared by 2"),
    "read twice": (lambda: Net(lambda net, x: net.bn(net.fc(x)) + x @ net.fc.weight), "no-module", "'fc.weight' is read in 2 places"),
    "weight norm": (lambda: parametrized(Net(plain)), "no-module", "computed"),
    "a hook": (lambda: hooked(Net(plain), "bn"), "no-module", "'bn' has hooks"),
    "a hook of the linear layer": (lambda: hooked(Net(plain), "fc"), "no-module", "'fc' has hooks"),
    "a class of its own": (lambda: Net(plain, bn=Derived(4)), "no-module", "Derived is a class derived from torch's"),
    "a number": (lambda: Net(lambda net, x: net.bn(x @ torch.eye(4)).tanh()), "no-module", "a number in the code of the model"),
    "a list": (lambda: listed(Net(lambda net, x: net.steps[1](net.steps[0](x)))), "parity", "whole model differs"),
    "in training": (lambda: Net(plain, bn=nn.BatchNorm1d(4, track_running_stats=False)), "training", "statistics"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_reason(name):
    make, code, sentence = REFUSED[name]
    model = settled(make())
    result = fold(model, tensor((5, 4)))
    assert [kept.code for kept in result.kept] == [code] * len(result.kept)
    assert sentence in result.kept[0].reason, result.kept[0].reason
    assert "--" not in str(result)  # an option of the command is none of this function
    assert result.folded == []
    assert_same(model, result.model, tensor((5, 4)), tolerance=0)


def test_a_refused_way_leaves_another():
    """Backwards a number of the code is in the way, forwards there is a linear layer."""
    model = settled(Net(lambda net, x: net.fc(net.bn(x @ torch.eye(4)))))
    result = folded(model, tensor((5, 4)))
    assert result.folded[0].into == "fc"


def test_a_value_that_is_written_over():
    """The Identity hands out what it reads, which the ReLU writes over."""

    class Before(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.bn, self.relu = nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(inplace=True)

        def forward(self, x):
            x = self.one(x)
            y = self.relu(self.bn(x))
            return self.two(x) + y

    model = settled(Before())
    with torch.no_grad():
        model.bn.bias[:] = model.bn.running_mean * model.bn.weight / (model.bn.running_var + model.bn.eps).sqrt()  # no shift
    result = folded(model, tensor((5, 4)))
    assert model.relu.inplace
    assert not result.model.relu.inplace
    assert folded(small(), IMAGE).model[2].inplace is False

    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.fc = nn.BatchNorm1d(4), nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(self.bn(x).relu_())

    model = settled(First())
    model.bn.running_mean.zero_()
    model.bn.bias.data.zero_()
    result = fold(model, tensor((5, 4)))
    assert [kept.code for kept in result.kept] == ["parity"]
    assert "argument" in result.kept[0].reason


def test_a_wrong_weight_is_found(monkeypatch):
    """One fold of two is made wrong: it alone is left out."""
    made = torch_modules._tensor
    monkeypatch.setattr(torch_modules, "_tensor", lambda array: made(array) * (1 + 1e-2 * (array.shape[0] == 4)))
    model = small()
    result = fold(model, IMAGE)
    assert [kept.bn for kept in result.kept] == ["1"]
    assert result.kept[0].code == "parity"
    assert_same(model, result.model, IMAGE)


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_what_cannot_be_folded():
    x = tensor((5, 4))
    with pytest.raises(fastbn.ArgumentTypeError, match=r"Expected a torch.nn.Module, got str - at `model`"):
        fold("resnet18", x)
    with pytest.raises(fastbn.ArgumentError, match=r"in training mode: call model.eval\(\) first"):
        fold(Net(plain), x)
    with pytest.raises(fastbn.ArgumentError, match="on the device 'meta'"):
        fold(Net(plain).eval().to("meta"), x.to("meta"))
    with pytest.raises(fastbn.ArgumentError, match=r"Cannot run the model on its example inputs: .*meta tensor"):
        fold(Net(plain).eval(), x.to("meta"))
    with pytest.raises(fastbn.ArgumentError, match="jit has compiled"):
        fold(torch.jit.script(nn.BatchNorm1d(4).eval()), x)
    with pytest.raises(fastbn.ArgumentError, match=r"a part that torch.jit has compiled, 'bn'"):
        fold(Net(plain, bn=torch.jit.script(nn.BatchNorm1d(4))).eval(), x)
    with pytest.raises(fastbn.ArgumentError, match=r"what torch.compile returns"):
        fold(torch.compile(Net(plain).eval(), backend="eager"), x)
    with pytest.raises(fastbn.ArgumentError, match="lazy modules that were never called: 'fc'"):
        fold(Net(plain, fc=nn.LazyLinear(4)).eval(), x)
    with pytest.raises(fastbn.ArgumentError, match="Cannot run the model on its example inputs: RuntimeError: mat1"):
        fold(Net(plain).eval(), tensor((5, 3)))
    with pytest.raises(fastbn.ModelError, match="Cannot export the model"):
        fold(Net(lambda net, x: torch.linalg.qr(net.bn(net.fc(x)))[0]).eval(), x)
    uncopied = Net(plain).eval()
    uncopied.state = uncopied.fc(x)
    with pytest.raises(fastbn.ArgumentError, match="Cannot copy the model"):
        fold(uncopied, x)


class Reshaped(nn.Module):
    """A model whose answers have a shape or a sign of their own."""

    def __init__(self, shape, stays=True):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.shape, self.stays = shape, stays

    def forward(self, x):
        if not self.stays and bool((x != 0).any()):
            raise ValueError("zeros alone")
        return x.reshape(self.shape) * self.weight

    def double(self):
        raise TypeError("it has no other type")


def test_outputs_of_other_shapes_and_without_elements_are_compared():
    example = (torch.zeros(2, 3),), {}
    compared = torch_parity.Comparison(Reshaped((6,)), example, 0)
    parity = compared.check(Reshaped((3, 2)))
    assert (parity.status, parity.reason) == ("failed", "the output 'output' has another shape")
    nothing = torch_parity.Comparison(Reshaped((0,)), ((torch.zeros(0, 3),), {}), 0)
    assert nothing.check(Reshaped((0,))).status != "failed"


def test_an_example_that_may_not_be_another_one():
    example = (torch.zeros(2, 3),), {}
    compared = torch_parity.Comparison(Reshaped((6,), stays=False), example, 0)
    assert compared.check(Reshaped((6,))).status != "failed"
    with pytest.raises(ValueError, match="zeros alone"):
        torch_parity.Comparison(Reshaped((6,), stays=False), ((torch.ones(2, 3),), {}), 0)
