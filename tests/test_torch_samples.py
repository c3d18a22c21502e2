"""torch's own samples for batch norm, as its wheel ships them, run through our functions and modules."""

from __future__ import annotations

import copy

import pytest
import torch
from checks import check_call, differentiable
from inputs import DTYPES, Arguments
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import batchnorm_ext
from batchnorm_ext.functional import batch_norm

pytest.importorskip("expecttest", reason="torch's sample inputs import it")
pytest.importorskip("hypothesis", reason="torch's sample inputs import it")
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db

OPERATOR = next(
    op for op in op_db if op.name == "nn.functional.batch_norm" and not op.variant_test_name
)
MODULES = [
    info
    for info in module_db
    if info.module_cls in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
]
SAMPLES = range(len(list(OPERATOR.sample_inputs("cpu", torch.float32))))


def sample(index: int, device: str, dtype: torch.dtype, *, noncontiguous: bool = False):
    chosen = list(OPERATOR.sample_inputs(device, dtype, requires_grad=True))[index]
    return chosen.noncontiguous() if noncontiguous else chosen


def arguments_of(chosen) -> tuple[Arguments, dict[str, object]]:
    options = {"training": False} | chosen.kwargs
    options["weight"], options["bias"] = (
        *chosen.args[2:4],
        options.pop("weight", None),
        options.pop("bias", None),
    )[:2]
    detached = [None if t is None else t.detach() for t in chosen.args[:2]]
    weight, bias = options.pop("weight"), options.pop("bias")
    dy = torch.randn_like(chosen.input) if chosen.input.numel() else torch.empty_like(chosen.input)
    return Arguments(chosen.input, weight, bias, *detached, dy), options


@pytest.mark.parametrize("noncontiguous", [False, True], ids=["contiguous", "noncontiguous"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index", SAMPLES)
def test_operator_samples(index, dtype, noncontiguous, device):
    chosen = sample(index, device, dtype, noncontiguous=noncontiguous)
    args, options = arguments_of(chosen)
    if args.x.dim() == 1:  # an empty vector, which only torch's own operator takes
        y = batch_norm(
            args.x, args.running_mean, args.running_var, args.weight, args.bias, **options
        )
        assert y.shape == args.x.shape
        return
    check_call(args, **options)


@pytest.mark.parametrize("index", SAMPLES)
def test_operator_samples_against_torch(index, device):
    """The same call on torch's function: output, gradients and statistics."""
    outcomes = []
    for function in (batch_norm, nn.functional.batch_norm):
        args, options = arguments_of(sample(index, device, torch.float64))
        torch.manual_seed(0)
        args = args.clone()
        options.setdefault("momentum", 0.1)
        outcomes.append([args, options, function])
    # Two draws of a sample differ: both calls get the first one's tensors.
    outcomes[1][0] = outcomes[0][0].clone()
    results = []
    for args, options, function in outcomes:
        y = function(args.x, args.running_mean, args.running_var, args.weight, args.bias, **options)
        gradients = torch.autograd.grad(y, differentiable(args), args.dy, allow_unused=True)
        results.append((y, gradients, args.running_mean, args.running_var))
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("forward_mode", [False, True], ids=["reverse", "forward"])
@pytest.mark.parametrize("index", SAMPLES)
def test_operator_sample_gradients(index, forward_mode, device):
    args, options = arguments_of(sample(index, device, torch.float64))
    if args.x.numel() == 0:
        pytest.skip("no values to perturb")
    running = (None, None) if options["training"] else (args.running_mean, args.running_var)

    def apply(x, *vectors):
        return batch_norm(x, *running, *vectors, **options)

    tensors = differentiable(args)
    assert gradcheck(
        apply,
        tensors,
        fast_mode=True,
        check_forward_ad=forward_mode,
        check_backward_ad=not forward_mode,
    )
    if not forward_mode:
        assert gradgradcheck(apply, tensors, fast_mode=True)


def module_cases():
    for info in MODULES:
        for training in (True, False):
            found = info.module_inputs_func(
                info, device="cpu", dtype=torch.float64, requires_grad=True, training=training
            )
            for position, case in enumerate(found):
                name = f"{info.module_cls.__name__}-{case.desc or position}-{'training' if training else 'eval'}"
                yield pytest.param(info.module_cls, case, training, id=name)


@pytest.mark.parametrize(("theirs", "case", "training"), module_cases())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_module_samples(theirs, case, training, dtype, device):
    ours = getattr(batchnorm_ext, theirs.__name__)
    results = []
    (x,) = case.forward_input.args
    for family in (ours, theirs):
        build = case.constructor_input
        module = family(*build.args, **build.kwargs, device=device, dtype=dtype).train(training)
        mine = x.detach().to(device, dtype).requires_grad_()
        outputs = []
        for _ in range(3):  # the statistics move on, also the cumulative ones
            y = module(mine)
            outputs.append(y)
        tensors = [mine, *module.parameters()]
        # Of batch norm outputs a sum of squares is constant, and its gradient nothing but rounding.
        first = torch.autograd.grad(y.exp().sum(), tensors, create_graph=True)
        second = ()
        if dtype == torch.float64:
            second = torch.autograd.grad(sum(g.square().sum() for g in first), tensors)
        results.append((outputs, first, second, module.state_dict()))
    rtol = 1e-9 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(results[0], results[1], rtol=rtol, atol=rtol)


@pytest.mark.parametrize("info", MODULES, ids=[info.module_cls.__name__ for info in MODULES])
def test_module_errors(info):
    ours = getattr(batchnorm_ext, info.module_cls.__name__)
    cases = info.module_error_inputs_func(
        info, device="cpu", dtype=torch.float32, requires_grad=False, training=True
    )
    assert cases
    for case in cases:
        build, call = (
            case.module_error_input.constructor_input,
            case.module_error_input.forward_input,
        )
        if case.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(case.error_type, match=case.error_regex):
                ours(*build.args, **build.kwargs)
            continue
        module = ours(*build.args, **build.kwargs)
        before = copy.deepcopy(module.state_dict())
        with pytest.raises(case.error_type, match=case.error_regex):
            module(*call.args, **call.kwargs)
        torch.testing.assert_close(module.state_dict(), before)
