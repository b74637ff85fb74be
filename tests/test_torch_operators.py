"""The operators of fastbn.torch: derivatives, transforms, compiled, exported and traced networks."""

import copy
import warnings

import pytest

torch = pytest.importorskip("torch")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch_modules import assert_same, network, pair, step, tensor  # noqa: E402

from fastbn.torch import BatchNorm2d, batch_norm, convert  # noqa: E402

nn = torch.nn


def arguments(dtype=torch.float64):
    x, weight, bias = tensor((4, 3, 5), 0, dtype), tensor(3, 1, dtype, 1.5), tensor(3, 2, dtype)
    return [each.requires_grad_() for each in (x, weight, bias)], tensor(3, 3, dtype), tensor(3, 4, dtype, 5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_gradcheck_and_gradgradcheck(training, affine):
    leaves, mean, var = arguments()
    leaves = leaves if affine else leaves[:1]

    def call(x, weight=None, bias=None):
        return batch_norm(x, None if training else mean, None if training else var, weight, bias, training)

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


def test_operators_pass_opcheck():
    (x, weight, bias), mean, var = arguments(torch.float32)
    ops, wide = torch.ops.fastbn, (mean.double(), var.double())
    last = tensor((2, 3, 4, 5)).contiguous(memory_format=torch.channels_last).requires_grad_()
    for op, given in [
        (ops.batch_norm_train, (x, weight, bias, 1e-5)),
        (ops.batch_norm_train, (last, None, None, 1e-5)),
        (ops.batch_norm_train, (tensor((0, 3, 4)), weight, bias, 1e-5)),
        (ops.batch_norm, (x, mean, var, weight, bias, 1e-5)),
        (ops.batch_norm, (last.detach().bfloat16(), mean, var, None, None, 1e-5)),
        (ops.batch_norm_backward, (tensor((4, 3, 5), 5), x, *wide, weight, 20, 1e-5, True)),
        (ops.batch_norm_backward, (tensor((4, 3, 5), 5).requires_grad_(), x, *wide, None, 1, 1e-5, False)),
        (ops.update_running, (mean.clone(), var.clone(), *wide, 20, 0.1)),
        (ops.update_running, (mean.bfloat16(), var.bfloat16(), *wide, 0, 0.1)),
    ]:
        torch.library.opcheck(op.default, given)


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operators = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.operators.add(str(operator))
        return operator(*args, **(kwargs or {}))


def test_the_operators_and_the_eager_way_give_the_same_bits():
    _, ours = pair(nn.BatchNorm2d)
    twin = copy.deepcopy(ours)
    x, dy = tensor((4, 6, 7, 5)), tensor((4, 6, 7, 5), 1)
    for training in (True, False):
        want = step(ours.train(training), x, dy)
        with Seen() as seen:
            got = step(twin.train(training), x, dy)
        assert {"fastbn.batch_norm_backward.default", f"fastbn.batch_norm{'_train' * training}.default"} <= seen.operators
        assert_same(got, want, rtol=0, atol=0)
    assert_same(twin.state_dict(), ours.state_dict(), rtol=0, atol=0)


def test_functional_transforms_take_torchs_operators():
    theirs, ours = (module.eval() for module in pair(nn.BatchNorm2d))  # torch's training step refuses to count batches there
    x, dy = tensor((4, 6, 7, 5)), tensor((4, 6, 7, 5), 1)
    want, got = (torch.func.vjp(lambda x, module=module: torch.func.functional_call(module, {}, (x,)), x) for module in (theirs, ours))
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=0)
    torch.testing.assert_close(got[1](dy)[0], want[1](dy)[0], rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")  # torch's own
def test_forward_mode_takes_torchs_operators():
    theirs, ours = pair(nn.BatchNorm2d)
    x, tangent = tensor((4, 6, 7, 5)), tensor((4, 6, 7, 5), 1)
    found = []
    for module in (theirs, ours):
        with torch.autograd.forward_ad.dual_level():
            found.append(torch.autograd.forward_ad.unpack_dual(module(torch.autograd.forward_ad.make_dual(x, tangent))).tangent)
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


@pytest.mark.parametrize("training", [True, False])
def test_compiled_networks(training):
    model = convert(network()).train(training)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for batch in range(2):
        x, dy = tensor((4, 3, 8, 8), batch), tensor((4, 5), batch)
        want, got = step(model, x, dy), step(compiled, x, dy)
        assert_same({name.replace("_orig_mod.", ""): value for name, value in got.items()}, want, rtol=1e-5, atol=1e-5)
    assert_same(twin.state_dict(), model.state_dict(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_exported_programs(training):
    model = convert(network()).train(training)
    twin, x = copy.deepcopy(model), tensor((4, 3, 8, 8))
    program = torch.export.export(twin, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    called = {str(node.target) for node in program.graph.nodes if "fastbn" in str(node.target)}
    assert called == ({"fastbn.batch_norm_train.default", "fastbn.update_running.default"} if training else {"fastbn.batch_norm.default"})
    module = program.module()
    x = tensor((6, 3, 8, 8), 1)
    torch.testing.assert_close(module(x), model(x), rtol=1e-5, atol=1e-5)
    assert_same(dict(module.state_dict()), model.state_dict(), rtol=1e-6, atol=1e-6)


def test_traced_networks():
    model = convert(network())
    twin, x = copy.deepcopy(model), tensor((4, 3, 8, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(twin.eval(), (x,))
    x = tensor((6, 3, 8, 8), 1)
    torch.testing.assert_close(traced(x), model.eval()(x), rtol=0, atol=0)


def test_modules_on_the_meta_device():
    module = BatchNorm2d(6, device="meta")
    assert module(torch.empty(2, 6, 4, 4, device="meta")).shape == (2, 6, 4, 4)
