"""Batch renormalisation against its formulas in float64; what it shares with batch norm."""

from __future__ import annotations

import copy

import pytest
import torch
from checks import assert_bitwise
from inputs import channels_last, contiguous, with_random_state
from torch import nn
from torch.utils.checkpoint import checkpoint

import batchnorm_ext

OURS = {
    2: batchnorm_ext.BatchRenorm1d,
    4: batchnorm_ext.BatchRenorm2d,
    5: batchnorm_ext.BatchRenorm3d,
}
PLAIN = {2: batchnorm_ext.BatchNorm1d, 4: batchnorm_ext.BatchNorm2d, 5: batchnorm_ext.BatchNorm3d}
SHAPES = {"vectors": (16, 5), "images": (4, 5, 6, 7), "volumes": (2, 5, 3, 4, 2)}
BOUNDS = {"free": (1e9, 1e9), "paper": (3.0, 5.0), "tight": (1.1, 0.2), "none": (1.0, 0.0)}


def module_for(shape, dtype=torch.float32, device="cpu", **options):
    """A module whose parameters and running statistics are not the initial ones."""
    return with_random_state(OURS[len(shape)](shape[1], device=device, dtype=dtype, **options))


def exact(module, x, dy):
    """Output, gradients of x, weight and bias, and running statistics in float64 by the paper's algorithm 1."""
    x = x.detach().double().requires_grad_()
    weight, bias = (p.detach().double().requires_grad_() for p in (module.weight, module.bias))
    running_mean, running_var = (
        b.detach().double() for b in (module.running_mean, module.running_var)
    )
    dims = [d for d in range(x.dim()) if d != 1]

    def wide(vector):
        return vector.view(-1, *(1,) * (x.dim() - 2))

    mean, variance = x.mean(dims), x.var(dims, correction=0)
    std, running_std = (variance + module.eps).sqrt(), (running_var + module.eps).sqrt()
    r = (std / running_std).detach().clamp(1 / module.r_max, module.r_max)
    d = ((mean - running_mean) / running_std).detach().clamp(-module.d_max, module.d_max)
    y = ((x - wide(mean)) / wide(std) * wide(r) + wide(d)) * wide(weight) + wide(bias)
    gradients = torch.autograd.grad(y, (x, weight, bias), dy.double())
    unbiased = x.detach().var(dims)
    momentum = module.momentum
    return (
        y.detach(),
        *gradients,
        torch.lerp(running_mean, mean.detach(), momentum),
        torch.lerp(running_var, unbiased, momentum),
    )


@pytest.mark.parametrize("bounds", BOUNDS.values(), ids=BOUNDS)
@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_against_the_formulas(shape, dtype, layout, bounds, device):
    parameters = torch.float32 if dtype == torch.bfloat16 else dtype
    module = module_for(shape, parameters, device, r_max=bounds[0], d_max=bounds[1])
    x = layout((torch.randn(shape, device=device) * 2 + 1).to(dtype)).requires_grad_()
    dy = torch.randn(shape, device=device).to(dtype)
    expected = exact(module, x, dy)
    y = module(x)
    assert y.dtype == dtype
    gradients = torch.autograd.grad(y, (x, module.weight, module.bias), dy)
    unit = torch.finfo(dtype).eps
    actual = (y, *gradients, module.running_mean, module.running_var)
    for one, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.double(), want, rtol=16 * unit, atol=256 * unit)
    assert module.num_batches_tracked.item() == 1


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_without_correction_it_is_batch_norm(shape, device):
    renorm = module_for(shape, device=device, r_max=1.0, d_max=0.0)
    plain = PLAIN[len(shape)](shape[1], device=device)
    plain.load_state_dict(renorm.state_dict())
    x = torch.randn(shape, device=device)
    assert_bitwise(renorm(x), plain(x))
    renorm.r_max, renorm.d_max = 3.0, 5.0
    assert_bitwise(renorm.eval()(x), plain.eval()(x))
    plain.load_state_dict(renorm.state_dict())
    renorm.load_state_dict(plain.state_dict())


def test_a_batch_is_normalised_as_in_evaluation(device):
    """With the bounds out of the way, the output of training is that of the running statistics before it."""
    module = module_for((8, 5, 3, 3), device=device, r_max=1e9, d_max=1e9)
    x = torch.randn(8, 5, 3, 3, device=device)
    expected = copy.deepcopy(module).eval()(x)
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("affine", [True, False])
def test_gradcheck(affine, device):
    """With both corrections at their bounds, which makes them constants to the numeric derivative too."""
    module = OURS[4](3, affine=affine, r_max=1.01, d_max=0.01, device=device, dtype=torch.float64)
    module.running_mean.fill_(-4.0)
    module.running_var.fill_(0.01)
    x = torch.randn(3, 3, 2, 2, dtype=torch.float64, device=device, requires_grad=True)

    def call(x, *parameters):
        values = dict(zip(dict(module.named_parameters()), parameters, strict=True))
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        return torch.func.functional_call(module, {**values, **buffers}, (x,))

    torch.autograd.gradcheck(call, (x, *module.parameters()))
    torch.autograd.gradgradcheck(call, (x, *module.parameters()))


@pytest.mark.parametrize(
    "bounds", [{"r_max": 0.9}, {"d_max": -0.1}, {"r_max": float("nan")}], ids=str
)
def test_bounds_that_are_none_are_refused(bounds):
    with pytest.raises(ValueError, match=next(iter(bounds))):
        batchnorm_ext.BatchRenorm2d(3, **bounds)
    module = batchnorm_ext.BatchRenorm2d(3)
    vars(module).update(bounds)
    with pytest.raises(ValueError, match=next(iter(bounds))):
        module(torch.randn(2, 3, 4, 4))
    assert module.num_batches_tracked.item() == 0


def test_wrong_shapes_change_nothing(device):
    module = batchnorm_ext.BatchRenorm2d(3, device=device)
    before = copy.deepcopy(module.state_dict())
    for x, kind in ((torch.randn(2, 4, 5, 5), RuntimeError), (torch.randn(1, 3, 1, 1), ValueError)):
        with pytest.raises(kind):
            module(x.to(device))
    for name, value in module.state_dict().items():
        assert_bitwise(value, before[name], name)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_recomputes_with_the_same_corrections(reentrant, device):
    module = module_for((4, 5, 6, 7), device=device)
    other = copy.deepcopy(module)
    x = torch.randn(4, 5, 6, 7, device=device, requires_grad=True)
    results = []
    for each, call in (
        (module, module),
        (other, lambda x: checkpoint(other, x, use_reentrant=reentrant)),
    ):
        gradients = torch.autograd.grad(call(x).exp().sum(), x) if not reentrant else None
        if reentrant:
            x.grad = None
            call(x).exp().sum().backward()
            gradients = (x.grad.clone(),)
        results.append((*gradients, *each.buffers()))
    for actual, expected in zip(*results, strict=True):
        assert_bitwise(actual, expected)


def test_compiles_without_a_graph_break(device):
    module = module_for((4, 5, 6, 7), device=device)
    eager = copy.deepcopy(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        x = torch.randn(4, 5, 6, 7, device=device, requires_grad=True)
        outcomes = []
        for call in (compiled, eager):
            y = call(x)
            outcomes.append((y, *torch.autograd.grad(y.exp().sum(), x)))
        for actual, expected in zip(*outcomes, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    for actual, expected in zip(module.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(actual, expected)


def test_half_module_and_frozen_module(device):
    module = module_for((4, 5, 6, 7), device=device).bfloat16()
    assert module.running_var.dtype == torch.float32
    x = torch.randn(4, 5, 6, 7, device=device).bfloat16().requires_grad_()
    expected = exact(module, x, torch.ones_like(x))
    y = module(x)
    torch.testing.assert_close(y.double(), expected[0], rtol=0.05, atol=0.05)
    y.sum().backward()
    assert module.weight.grad.dtype == torch.bfloat16
    before = module.running_mean.clone()
    module.freeze().train()
    module(x)
    assert_bitwise(module.running_mean, before)


def test_it_is_a_batch_norm_and_says_what_else():
    module = batchnorm_ext.BatchRenorm2d(3, momentum=0.01, r_max=2.0)
    assert isinstance(module, nn.BatchNorm2d)
    assert list(module.state_dict()) == list(nn.BatchNorm2d(3).state_dict())
    assert repr(module).endswith("r_max=2.0, d_max=5.0)")
    untracked = batchnorm_ext.BatchRenorm2d(3, track_running_stats=False)
    x = torch.randn(2, 3, 4, 4)
    assert_bitwise(untracked(x), batchnorm_ext.BatchNorm2d(3)(x))
    assert module(torch.empty(0, 3, 4, 4)).shape == (0, 3, 4, 4)
