"""Networks of torch with modules of fastbn.torch in them: converted there and back, saved, traced, exported to ONNX."""

import copy
import io
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")


from torch_modules import network, pair, tensor  # noqa: E402

import fastbn  # noqa: E402
import fastbn.torch  # noqa: E402
from fastbn.torch import BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm, convert  # noqa: E402

nn = torch.nn


class Derived(nn.BatchNorm2d):
    pass


def test_convert_there_and_back_keeps_everything():
    model = network()
    model[2].eval()
    model[2].name = "mine"
    calls = []
    model[2].register_forward_hook(lambda *_: calls.append(1))
    model[2].weight.requires_grad_(False)
    state, parameters = copy.deepcopy(model.state_dict()), list(model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    assert convert(model) is model
    assert [type(model[place]) for place in (2, 6)] == [BatchNorm2d, BatchNorm1d]
    assert convert(model) is model
    assert [type(module) for module in copy.deepcopy(model)] == [type(module) for module in model]
    model(tensor((4, 3, 8, 8))).sum().backward()
    optimizer.step()
    assert calls
    assert not torch.equal(model[6].bias, state["6.bias"]), "the optimizer still holds the parameters"
    assert (model[2].training, model[2].name, model[2].weight.requires_grad) == (False, "mine", False)
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == list(state)
    convert(model, back=True)
    assert [type(model[place]) for place in (2, 6)] == [nn.BatchNorm2d, nn.BatchNorm1d]
    assert "process_group" not in vars(model[2])


def test_convert_itself_subclasses_and_groups():
    for module in (Derived(3), nn.LazyBatchNorm2d()):
        kind = type(module)
        with pytest.warns(UserWarning, match=kind.__name__):
            assert type(convert(module)) is kind
    assert type(convert(nn.BatchNorm3d(3))) is BatchNorm3d
    assert type(convert(nn.SyncBatchNorm(3))) is SyncBatchNorm
    group = convert(nn.BatchNorm2d(3), process_group="world")
    assert group.process_group == "world"
    assert "process_group" not in vars(convert(group, back=True))
    with pytest.raises(fastbn.ArgumentError, match="Cannot convert back with a process group"):
        convert(group, back=True, process_group="world")


def test_modules_are_saved_and_loaded():
    _, ours = pair(nn.BatchNorm2d)
    ours(tensor((4, 6, 7, 5)))
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert type(loaded) is BatchNorm2d
    torch.testing.assert_close(loaded.eval()(tensor((4, 6, 7, 5))), ours.eval()(tensor((4, 6, 7, 5))), rtol=0, atol=0)
    theirs = nn.BatchNorm2d(6)
    theirs.load_state_dict(ours.state_dict())
    BatchNorm2d(6).load_state_dict(theirs.state_dict())


def test_symbolic_tracing_keeps_the_module():
    model = convert(network())
    traced = torch.fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == [str(place) for place in range(7)]
    x = tensor((4, 3, 8, 8))
    torch.testing.assert_close(traced.eval()(x), model.eval()(x), rtol=0, atol=0)


@pytest.mark.parametrize("dynamo", [False, True], ids=["torchscript", "dynamo"])
@pytest.mark.parametrize("kind", ["plain", "sync"])
def test_exported_to_onnx(kind, dynamo, tmp_path):
    onnx = pytest.importorskip("onnx")
    if dynamo:
        pytest.importorskip("onnxscript")
    model, x = network(), tensor((4, 3, 8, 8))
    model(x)
    if kind == "sync":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    convert(model).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters' own
        torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=dynamo, **({"verbose": False} if dynamo else {}))
    proto = onnx.load(tmp_path / "model.onnx")
    assert {node.domain for node in proto.graph.node} <= {"", "ai.onnx"}
    ops = [node.op_type for node in proto.graph.node]
    assert "BatchNormalization" in ops
    session = pytest.importorskip("onnxruntime").InferenceSession(tmp_path / "model.onnx")
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(got, model(x).detach().numpy(), rtol=1e-4, atol=1e-5)
    # The one behind the ReLU folds forwards into the Linear.
    assert "BatchNormalization" not in [node.op_type for node in fastbn.fold(proto).model.graph.node]


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")  # torch's own
def test_what_is_converted_and_what_is_skipped_and_why():
    compiled = torch.jit.script(nn.BatchNorm2d(2))
    weighted = torch.nn.utils.parametrizations.weight_norm(nn.BatchNorm2d(2), dim=None)
    parts = [nn.BatchNorm1d(2), Derived(2), nn.LazyBatchNorm3d(), compiled, weighted, nn.InstanceNorm2d(2, track_running_stats=True)]
    model = nn.ModuleList(parts)
    with pytest.warns(UserWarning, match=r"'1': Derived is .* derived from torch's.*'2': LazyBatchNorm3d .*'3': torch.jit.*'4': a param"):
        convert(model)
    entries = fastbn.torch.batch_norms(model)
    assert [(entry.name, entry.kind) for entry in entries] == [("0", "fastbn"), *((name, "other") for name in "1234")]
    assert [entry.reason is None for entry in entries] == [True, False, False, False, False]
    with pytest.warns(UserWarning, match="; and 1 more"):
        convert(nn.ModuleList([Derived(2) for _ in range(5)]))
    convert(model, back=True)  # of torch's nothing is to be told
    assert fastbn.torch.batch_norms(model)[0].kind == "torch"
    with pytest.warns(UserWarning, match="a class derived from fastbn's"):
        convert(type("Ours", (BatchNorm2d,), {})(2), back=True)
    with pytest.warns(UserWarning, match="Cannot convert every batch normalization: Derived"):
        convert(Derived(2))


@pytest.mark.parametrize("value", [None, "resnet18", [nn.BatchNorm2d(2)], nn.BatchNorm2d])
def test_what_is_no_module(value):
    with pytest.raises(fastbn.ArgumentTypeError, match=r"Expected a torch.nn.Module, got .* - at `module`"):
        convert(value)
    with pytest.raises(fastbn.ArgumentTypeError, match=r"Expected a torch.nn.Module, got .* - at `model`"):
        fastbn.torch.batch_norms(value)


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")  # torch's own
def test_fusions_that_know_torchs_classes_alone():
    from torch.ao.quantization.fx.tracer import QuantizationTracer
    from torch.fx.experimental.optimization import fuse

    model = convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).eval()
    with pytest.raises(fastbn.TensorError, match=r"Cannot fuse converted .* in torch.fx.*convert\(model, back=True\) first"):
        fuse(model)
    with pytest.raises(AssertionError, match="did not find fuser method"):  # torch's own
        torch.ao.quantization.fuse_modules(model, [["0", "1"]])
    tracer = QuantizationTracer([], [])
    with pytest.raises(fastbn.TensorError, match=r"in torch.ao.quantization: "):
        tracer.trace(model)
    assert len(torch.fx.symbolic_trace(model).graph.nodes) == 4
    assert "batch_norm" not in str(fuse(convert(model, back=True)).graph)


def test_a_converted_model_does_not_look_like_torch_s():
    model = convert(nn.Sequential(nn.BatchNorm2d(4), nn.Linear(2, 2)))
    assert "(0): fastbn.BatchNorm2d(4, eps=1e-05, momentum=0.1" in repr(model)
    assert "fastbn" not in repr(convert(model, back=True))


def test_one_tensor_for_both_running_statistics():
    both = torch.zeros(3)
    with pytest.raises(RuntimeError, match=r"^Expected a tensor of its own, got running_mean - at `running_var`$"):
        fastbn.torch.batch_norm(torch.ones(2, 3), both, both, training=True)
    with pytest.raises(fastbn.errors.ArgumentTypeError, match=r"^Expected a number, got str - at `eps`$"):
        fastbn.torch.batch_norm(torch.ones(2, 3), None, None, training=True, eps="1e-5")
