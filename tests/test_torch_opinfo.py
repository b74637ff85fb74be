"""fastbn.torch on the samples that torch tests its own batch normalization with: ModuleInfo and OpInfo of `torch.testing._internal`.

Differences that are by design stand in `BY_DESIGN`, each with a test that it is there.
"""

import copy
import itertools
import re
import warnings
from functools import partial

import pytest

torch = pytest.importorskip("torch")

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal import (
            common_device_type,  # noqa: F401 - before the others, which import it in a circle
            composite_compliance,
        )
        from torch.testing._internal.common_methods_invocations import op_db
        from torch.testing._internal.common_modules import module_db
except ImportError as missing:  # the suite's own requirements, expecttest and numpy among them
    pytest.skip(f"torch's samples cannot be loaded: {missing}", allow_module_level=True)

from torch._subclasses.fake_utils import CrossRefFakeMode  # noqa: E402

import fastbn.torch  # noqa: E402
from fastbn.torch import batch_norm  # noqa: E402

functional = torch.nn.functional
KINDS = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d)
MODULES = [info for info in module_db if info.module_cls in KINDS]
(OP,) = [info for info in op_db if info.name == "nn.functional.batch_norm" and not info.variant_test_name]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
TOLERANCE = {
    torch.float32: {"rtol": 2e-5, "atol": 2e-5},
    torch.float64: {"rtol": 1e-9, "atol": 1e-9},
    # torch rounds what it computes of half precision more than once.
    torch.float16: {"rtol": 2**-8, "atol": 2**-8},
    torch.bfloat16: {"rtol": 2**-5, "atol": 2**-5},
}
BY_DESIGN = {
    "one dimension": "torch takes an empty tensor of shape (0,), which has no channels; here an input has at least 2 dimensions",
    "eps of 0": "torch refuses eps=0; here a constant channel gives bias then",
    "words of errors": "the class of an error is torch's, its sentence is ours",
}


def same(got, want, dtype):
    torch.testing.assert_close(got, want, **TOLERANCE[dtype], equal_nan=True)


# ---- ModuleInfo ----


def module_cases():
    for info, training in itertools.product(MODULES, (True, False)):
        inputs = info.module_inputs_func(info, device="cpu", dtype=torch.float32, requires_grad=True, training=training)
        for place, given in enumerate(inputs):
            yield pytest.param(info, training, place, id=f"{info.name}-{given.desc or 'plain'}-{'train' if training else 'eval'}")


def made(info, given, dtype, training):
    arguments = given.constructor_input
    theirs = info.module_cls(*arguments.args, **arguments.kwargs, dtype=dtype).train(training)
    ours = getattr(fastbn.torch, info.module_cls.__name__)(*arguments.args, **arguments.kwargs, dtype=dtype).train(training)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("info", "training", "place"), list(module_cases()))
def test_modules_on_torchs_samples(info, training, place, dtype):
    given = info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=training)[place]
    (x,) = given.forward_input.args
    found, states = [], []
    for module in made(info, given, dtype, training):
        module = copy.deepcopy(module)
        y = module(x)
        leaves = [x, *module.parameters()]
        dy = torch.linspace(-1, 2, y.numel(), dtype=dtype).view(y.shape)
        found.append([y, *torch.autograd.grad(y, leaves, dy, allow_unused=True)])
        again = torch.autograd.grad(module(x).pow(3).sum(), x, create_graph=True)[0]
        found[-1].append(torch.autograd.grad((again * dy).sum(), x)[0])
        states.append(module.state_dict())
        assert f"{info.module_cls.__name__}({given.constructor_input.args[0]}," in repr(module)
    for got, want in zip(found[1], found[0], strict=True):
        same(got, want, dtype)
    assert list(states[1]) == list(states[0])
    for name in states[0]:
        same(states[1][name], states[0][name], dtype)


@pytest.mark.parametrize("info", MODULES, ids=lambda info: info.name)
def test_modules_on_torchs_wrong_samples(info):
    for wrong in info.module_error_inputs_func(info, device="cpu", dtype=torch.float32, requires_grad=False, training=True):
        arguments = wrong.module_error_input.constructor_input
        module = getattr(fastbn.torch, info.module_cls.__name__)(*arguments.args, **arguments.kwargs)
        (x,) = wrong.module_error_input.forward_input.args
        if arguments.kwargs == {"eps": 0.0}:
            assert "eps of 0" in BY_DESIGN
            torch.testing.assert_close(module(x), info.module_cls(arguments.args[0], eps=1e-12)(x), rtol=1e-4, atol=1e-4)
            continue
        assert "words of errors" in BY_DESIGN
        with pytest.raises(wrong.error_type, match=r"^Expected .* - at `eps`$") as caught:
            module(x)
        assert not re.search(wrong.error_regex, str(caught.value))


# ---- OpInfo ----


def samples(dtype, requires_grad=True):
    """Yield (input, args, kwargs) of every sample that torch and we both take."""
    for sample in OP.sample_inputs("cpu", dtype, requires_grad=requires_grad):
        if sample.input.dim() > 1:
            yield sample.input, sample.args, sample.kwargs


def variants(sample):
    """Yield a sample as it is, with a gap between its elements, and with its channels last."""
    input, args, kwargs = sample
    yield sample
    gaps = input.detach().repeat_interleave(2, -1)[..., ::2].requires_grad_()
    yield gaps, args, kwargs
    if input.dim() == 4:
        yield input.detach().contiguous(memory_format=torch.channels_last).requires_grad_(), args, kwargs


def copied(args):
    """The running statistics move."""
    return [each.clone() if each is not None and not each.requires_grad else each for each in args]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_function_on_torchs_samples(dtype):
    count = 0
    for input, args, kwargs in (each for sample in samples(dtype) for each in variants(sample)):
        found = []
        for function in (functional.batch_norm, batch_norm):
            given = copied(args)
            y = function(input, *given, **kwargs)
            leaves = [each for each in (input, *given) if each is not None and each.requires_grad]
            dy = torch.linspace(-1, 2, y.numel()).view(y.shape).to(dtype)
            found.append([y, *torch.autograd.grad(y, leaves, dy), *[each for each in given[:2] if each is not None]])
        for got, want in zip(found[1], found[0], strict=True):
            same(got, want, dtype)
        count += 1
    assert count > 20


def test_one_dimension_is_the_only_sample_that_we_refuse():
    assert "one dimension" in BY_DESIGN
    refused = [sample for sample in OP.sample_inputs("cpu", torch.float32) if sample.input.dim() == 1]
    assert {tuple(sample.input.shape) for sample in refused} == {(0,)}
    for sample in refused:
        with pytest.raises(ValueError, match="Expected at least 2 dimensions"):
            batch_norm(sample.input, *sample.args, **sample.kwargs)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("number", range(len(list(samples(torch.float64)))))
def test_derivatives_on_torchs_samples(number):
    input, args, kwargs = list(samples(torch.float64))[number]
    leaves = [input, *[each for each in args if each is not None and each.requires_grad]]

    def call(input, *parameters):
        given = [each if each is None or not each.requires_grad else None for each in copied(args)]
        if parameters:
            given[2:] = parameters
        return batch_norm(input, *given, **kwargs)

    options = {"check_batched_grad": True, "check_grad_dtypes": True}
    assert torch.autograd.gradcheck(call, leaves, **options, check_forward_ad=True, check_batched_forward_grad=True)
    assert torch.autograd.gradgradcheck(call, leaves, **options)


@pytest.mark.parametrize("number", range(len(list(samples(torch.float32)))))
def test_subclasses_in_every_combination_of_places(number):
    """Every tensor of a call, and of its backward pass, may be a subclass without storage: torch's check of composite compliance."""
    input, args, kwargs = list(samples(torch.float32))[number]
    given = (input, *copied(args))

    def equal(got, want, **options):
        same(got, want, torch.float32)

    def call(*given, **kwargs):
        return batch_norm(given[0], *copied(given[1:]), **kwargs)

    composite_compliance.check_with_mode(call, given, kwargs, equal)
    composite_compliance.check_all_permutations(call, given, kwargs, equal)
    composite_compliance.check_backward_formula(call, given, kwargs, assert_equal_fn=equal)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_fake_tensors_have_the_shapes_and_strides_of_real_ones():
    for sample in (each for one in samples(torch.float32) for each in variants(one)):
        input, args, kwargs = sample
        with CrossRefFakeMode():
            y = batch_norm(input, *copied(args), **kwargs)
            torch.autograd.grad(y, input, torch.ones_like(y))


def mapped(function, mean, var, bias, kwargs, weight, input):
    return function(input, mean, var, weight, bias, **kwargs)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_mapped_calls_on_torchs_samples():
    """torch.func.vmap over the input, over a parameter, and over both."""
    for input, args, kwargs in samples(torch.float64, requires_grad=False):
        # torch cannot move statistics that are not mapped.
        mean, var = (None, None) if kwargs.get("training") else args[:2]
        rows = torch.stack([input, 2 * input + 1, -input])
        found = []
        for function in (functional.batch_norm, batch_norm):
            call = partial(mapped, function, mean, var, args[3], kwargs)
            found.append([torch.func.vmap(partial(call, args[2]))(rows)])
            if args[2] is not None:
                weights = torch.stack([args[2], 2 * args[2], -args[2]])
                found[-1].append(torch.func.vmap(call, in_dims=(0, None))(weights, input))
                found[-1].append(torch.func.vmap(call)(weights, rows))
        for got, want in zip(found[1], found[0], strict=True):
            same(got, want, torch.float64)
