"""Statistics of those samples that a mask counts: padded sequences and images, against float64 and against packing."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from checks import (
    assert_bitwise,
    call,
    call_act,
    check_gradients,
    check_running_statistics,
    differentiable,
    no_synchronisation,
)
from inputs import LAYOUTS, arguments, channels_last, contiguous, every
from oracle import BatchNorm, BatchNormAct
from tolerances import assert_matches
from torch import nn
from torch.utils.checkpoint import checkpoint

import batchnorm_ext
from batchnorm_ext.functional import batch_norm, batch_norm_act

SHAPES = {
    "vectors": (33, 5),
    "sequences": (6, 17, 29),
    "images": (3, 8, 9, 11),
    "volumes": (2, 5, 3, 4, 7),
    "few-channels": (5, 3, 40),
    "several-blocks": (16, 300, 14, 14),
}
MODULES = {
    2: batchnorm_ext.BatchNorm1d,
    3: batchnorm_ext.BatchNorm1d,
    4: batchnorm_ext.BatchNorm2d,
    5: batchnorm_ext.BatchNorm3d,
}


def padding(shape: tuple[int, ...], device: str = "cpu") -> torch.Tensor:
    """Of each sample of the batch, the first so many positions, in all spatial dimensions; of one, none."""
    mask = torch.ones(shape[0], *shape[2:], dtype=torch.bool, device=device)
    for index, sample in enumerate(mask):
        if sample.dim() == 0:
            sample.fill_(index % 3 != 1)
        for dim in range(sample.dim()):
            length = sample.size(dim) * (index + 1) // shape[0] if index != 1 else 0
            sample.narrow(dim, length, sample.size(dim) - length).fill_(False)
    return mask


def scattered(shape: tuple[int, ...], device: str = "cpu") -> torch.Tensor:
    return torch.rand(shape[0], *shape[2:], device=device) < 0.5


def expected_of(args, mask, residual=None, activation=None, **options):
    tensors = (args.x, args.weight, args.bias, args.running_mean, args.running_var)
    if activation is None:
        return BatchNorm(*tensors, counted=mask, **options)
    return BatchNormAct(
        *tensors, counted=mask, residual=residual, activation_name=activation, **options
    )


def check_masked(args, mask, residual=None, activation=None, **options):
    expected = expected_of(args, mask, residual, activation, **options)
    before = args.clone()
    if activation is None:
        y = call(args, training=True, mask=mask, **options)
    else:
        y = call_act(args, residual, activation, training=True, mask=mask, **options)
    assert y.dtype == args.x.dtype
    assert_matches(y, expected.y, "y")
    check_running_statistics(args, before, expected)
    gradients = torch.autograd.grad(y, differentiable(args, residual), args.dy)
    check_gradients(args, expected, gradients, residual)
    assert_bitwise(args.x.detach(), before.x.detach(), "x was written to")
    return y, gradients


@pytest.mark.parametrize("masked", [padding, scattered])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", **every(SHAPES))
def test_against_float64(shape, dtype, masked, device):
    parameters = torch.float64 if dtype == torch.float64 else torch.float32
    args = arguments(shape, dtype, parameters, device=device)
    check_masked(args, masked(shape, device))


@pytest.mark.parametrize("layout", **every(LAYOUTS))
def test_layouts(layout, device):
    shape = SHAPES["images"]
    args = arguments(shape, layout=layout, device=device)
    y, (dx, *_) = check_masked(args, scattered(shape, device))
    strides = batch_norm(args.x, None, None, training=True).stride()
    assert y.stride() == dx.stride() == strides


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("activation", ["identity", "relu", "leaky_relu", "silu"])
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_fused(activation, with_residual, layout, device):
    shape = SHAPES["images"]
    args = arguments(shape, torch.float64, layout=layout, device=device)
    residual = None
    if with_residual:
        residual = layout(torch.randn(shape, dtype=torch.float64, device=device)).requires_grad_()
    check_masked(args, padding(shape, device), residual, activation)


@pytest.mark.parametrize("absent", [("weight",), ("bias",), ("weight", "bias")], ids=str)
def test_absent_parameters(absent, device):
    args = arguments(SHAPES["sequences"], device=device)
    check_masked(replace(args, **dict.fromkeys(absent)), padding(SHAPES["sequences"], device))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mean", [0.0, 1e3, 1e5])
def test_large_means_and_what_the_padding_holds(mean, dtype, device):
    """Neither where the mean is, nor what stands in the padding, costs digits of the statistics."""
    shape = (8, 6, 1000)
    mask = padding(shape, device)
    parameters = torch.float64 if dtype == torch.float64 else torch.float32
    args = arguments(shape, dtype, parameters, mean=mean, device=device, requires_grad=False)
    expected = expected_of(args, mask)
    # No type is wider than float64 to keep a large mean in.
    lost = 1.0 + mean if dtype == torch.float64 else 1.0
    for filling in (0.0, -30000.0, float("inf"), float("nan")):
        filled = torch.where(mask.unsqueeze(1), args.x, filling)
        given = replace(args.clone(), x=filled)
        y = call(given, training=True, mask=mask)
        before = args.clone()
        check_running_statistics(given, before, expected)
        counted = mask.unsqueeze(1).expand(shape)
        reference = expected.y.value[counted.cpu().numpy()]
        actual = y[counted].double()
        torch.testing.assert_close(
            actual.cpu(),
            torch.from_numpy(reference.astype("float64")),
            rtol=4 * torch.finfo(dtype).eps,
            atol=64 * torch.finfo(parameters).eps * lost,
        )


def test_a_constant_channel_gives_the_bias(device):
    x = torch.full((4, 3, 50), 12345.678, device=device)
    mask = padding(x.shape, device)
    x[~mask.unsqueeze(1).expand_as(x)] = -7.0
    bias = torch.randn(3, device=device)
    running_var = torch.ones(3, device=device)
    y = batch_norm(x, torch.zeros(3, device=device), running_var, None, bias, True, 1.0, mask=mask)
    counted = mask.unsqueeze(1).expand_as(x)
    assert_bitwise(y[counted], bias.view(1, 3, 1).expand_as(x)[counted])
    assert (running_var < 1e-12).all()


def test_sequences_are_normalised_as_packed_ones(device):
    """What users write by hand: the samples that count as rows of a matrix."""
    shape = (7, 12, 31)
    mask = padding(shape, device)
    packed, padded = (
        batchnorm_ext.BatchNorm1d(12, device=device, dtype=torch.float64) for _ in range(2)
    )
    x = torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)
    dy = torch.randn(shape, dtype=torch.float64, device=device) * mask.unsqueeze(1)
    rows = packed(x.transpose(1, 2)[mask])
    y = padded(x, mask=mask)
    torch.testing.assert_close(y.transpose(1, 2)[mask], rows)
    wanted = (x, *packed.parameters())
    expected = torch.autograd.grad(rows, wanted, dy.transpose(1, 2)[mask])
    actual = torch.autograd.grad(y, (x, *padded.parameters()), dy)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(padded.state_dict(), packed.state_dict())


@pytest.mark.parametrize("dim", MODULES)
def test_modules(dim, device):
    shape = next(shape for shape in SHAPES.values() if len(shape) == dim)
    mask = padding(shape, device)
    module = MODULES[dim](shape[1], device=device)
    x = torch.randn(shape, device=device)
    expected = copy.deepcopy(module)
    buffers = (expected.running_mean, expected.running_var)
    y = batch_norm(x, *buffers, expected.weight, expected.bias, True, mask=mask)
    assert_bitwise(module(x, mask=mask), y)
    assert_bitwise(module.running_mean, expected.running_mean)
    assert_bitwise(module.running_var, expected.running_var)
    assert module.num_batches_tracked == 1
    module.eval()
    assert_bitwise(module(x, mask=mask), module(x))
    module.train().freeze()
    assert_bitwise(module(x, mask=mask), module(x))


@pytest.mark.parametrize("momentum", [0.3, None])
def test_every_sample_counted_is_no_mask(momentum, device):
    shape = SHAPES["images"]
    plain = batchnorm_ext.BatchNormAct2d(8, momentum=momentum, dtype=torch.float64, device=device)
    masked = copy.deepcopy(plain)
    everything = torch.ones(3, 9, 11, dtype=torch.bool, device=device)
    for _ in range(3):
        x = torch.randn(shape, dtype=torch.float64, device=device)
        residual = torch.randn_like(x)
        torch.testing.assert_close(masked(x, residual, mask=everything), plain(x, residual))
    torch.testing.assert_close(masked.state_dict(), plain.state_dict())


def test_first_and_second_derivatives(device):
    shape = (3, 2, 5)
    mask = scattered(shape, device)
    mask[0, :2] = True
    x, residual = (
        torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2)
    )
    weight, bias = (
        torch.randn(2, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2)
    )
    for activation, terms in (("identity", ()), ("silu", (residual,)), ("elu", ())):

        def function(x, weight, bias, residual=None, activation=activation):
            return batch_norm_act(
                *(x, None, None, weight, bias, True),
                residual=residual,
                activation=activation,
                mask=mask,
            )

        assert torch.autograd.gradcheck(function, (x, weight, bias, *terms))
        assert torch.autograd.gradgradcheck(function, (x, weight, bias, *terms))


def test_transforms_and_forward_mode(device):
    """Where the kernels do not apply, the same results from torch's own operations."""
    shape = (4, 3, 6)
    mask = padding(shape, device)
    x, tangent = (torch.randn(shape, dtype=torch.float64, device=device) for _ in range(2))
    weight, bias = (torch.randn(3, dtype=torch.float64, device=device) for _ in range(2))
    dy = torch.randn_like(x)

    def function(x):
        return batch_norm(x, None, None, weight, bias, True, mask=mask)

    y, pull = torch.func.vjp(function, x)
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(y, function(leaf).detach())
    (dx,) = torch.autograd.grad(function(leaf), leaf, dy)
    torch.testing.assert_close(pull(dy)[0], dx)
    _, forward = torch.func.jvp(function, (x,), (tangent,))
    torch.testing.assert_close((forward * dy).sum(), (dx * tangent).sum())
    batched = torch.func.vmap(function)(torch.stack((x, 2 * x)))
    torch.testing.assert_close(batched[0], y)


def test_running_statistics_without_the_kernels(device):
    x = torch.randn(4, 3, 6, dtype=torch.float64, device=device)
    mask = padding(x.shape, device)
    module = batchnorm_ext.BatchNorm1d(3, momentum=None, dtype=torch.float64, device=device)
    traced = copy.deepcopy(module)
    for _ in range(2):
        expected = module(x, mask=mask)
        with torch.autograd.forward_ad.dual_level():
            torch.testing.assert_close(traced(x, mask=mask), expected)
    torch.testing.assert_close(traced.state_dict(), module.state_dict())


def test_symbolic_trace_keeps_the_module_whole():
    module = nn.ModuleList([batchnorm_ext.BatchNorm1d(5), batchnorm_ext.BatchNormAct1d(5)])

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = module

        def forward(self, x, mask):
            return self.norms[1](self.norms[0](x, mask=mask), x, mask=mask)

    chain = Chain()
    traced = torch.fx.symbolic_trace(chain)
    assert [n.op for n in traced.graph.nodes].count("call_module") == 2
    x = torch.randn(4, 5, 9)
    mask = padding(x.shape)
    assert_bitwise(traced(x, mask), chain(x, mask))


def test_compiled_without_breaks(device):
    module = nn.ModuleList([batchnorm_ext.BatchNormAct1d(5, activation="silu", device=device)])
    ours = copy.deepcopy(module)

    def step(module, x, mask):
        return module[0](x, mask=mask)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (7, 9, 12):
        shape = (4, 5, length)
        mask = padding(shape, device)
        x = torch.randn(shape, device=device)
        results = []
        for function, own in ((step, module), (compiled, ours)):
            leaf = x.clone().requires_grad_()
            y = function(own, leaf, mask)
            results.append((y.detach(), *torch.autograd.grad(y.square().sum(), leaf)))
        torch.testing.assert_close(*results)
    torch.testing.assert_close(ours.state_dict(), module.state_dict())


def test_checkpointing_updates_statistics_once(device):
    shape = SHAPES["sequences"]
    mask = padding(shape, device)
    module = batchnorm_ext.BatchNorm1d(17, device=device)
    expected = copy.deepcopy(module)
    x = torch.randn(shape, device=device)
    outcomes = []
    for own, run in ((expected, lambda own, *a, **o: own(*a, **o)), (module, checkpoint)):
        leaf = x.clone().requires_grad_()
        options = {} if own is expected else {"use_reentrant": False}
        y = run(own, leaf, mask=mask, **options)
        outcomes.append(torch.autograd.grad(y.square().sum(), (leaf, *own.parameters())))
    for actual, wanted in zip(*outcomes, strict=True):
        assert_bitwise(actual, wanted)
    torch.testing.assert_close(module.state_dict(), expected.state_dict())


def test_nothing_is_waited_for(device):
    x = torch.randn(4, 5, 9, device=device, requires_grad=True)
    mask = padding(x.shape, device)
    module = batchnorm_ext.BatchNorm1d(5, device=device)
    module(x, mask=mask).sum().backward()
    with no_synchronisation():
        module(x, mask=mask).sum().backward()


@pytest.mark.parametrize("counted", [0, 1])
def test_masks_that_count_less_than_two_samples_are_refused(counted):
    module = batchnorm_ext.BatchNorm1d(5)
    before = copy.deepcopy(module.state_dict())
    mask = torch.zeros(4, 9, dtype=torch.bool)
    mask.view(-1)[:counted] = True
    with pytest.raises(
        ValueError, match=f"more than 1 value per channel.* {counted} that the mask"
    ):
        module(torch.randn(4, 5, 9), mask=mask)
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)


@pytest.mark.gpu
def test_a_mask_that_counts_nothing_leaves_the_statistics_alone():
    module = batchnorm_ext.BatchNorm1d(5, device="cuda")
    before = copy.deepcopy(module.state_dict())
    y = module(torch.randn(4, 5, 9, device="cuda"), mask=torch.zeros(4, 9, dtype=torch.bool).cuda())
    assert y.isfinite().all()
    for name in ("running_mean", "running_var"):
        assert_bitwise(module.state_dict()[name], before[name])


def test_infinite_samples_that_count_are_skipped(device):
    x = torch.randn(4, 5, 9, device=device)
    x[0, 2, 0] = float("inf")
    mask = torch.ones(4, 9, dtype=torch.bool, device=device)
    mask[1] = False
    module = batchnorm_ext.BatchNorm1d(5, skip_nonfinite=True, device=device)
    module(x, mask=mask)
    moved = module.running_mean != 0
    assert moved.tolist() == [True, True, False, True, True]
    assert module.running_var.isfinite().all()


WRONG = {
    "shape": (
        torch.ones(4, 8, dtype=torch.bool),
        RuntimeError,
        r"shape of input.*\[4, 9\].*\[4, 8\]",
    ),
    "channels": (torch.ones(4, 5, 9, dtype=torch.bool), RuntimeError, "shape of input"),
    "dtype": (torch.ones(4, 9), RuntimeError, "type Bool.*Float"),
    "type": ([True], TypeError, "mask must be a Tensor"),
    "device": (torch.ones(4, 9, dtype=torch.bool, device="meta"), RuntimeError, "device of input"),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("mask", "error", "message"), WRONG.values(), ids=WRONG)
def test_what_is_no_mask_is_refused(mask, error, message, training):
    module = batchnorm_ext.BatchNorm1d(5).train(training)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(error, match=message):
        module(torch.randn(4, 5, 9), mask=mask)
    with pytest.raises(error, match=message):
        batch_norm_act(torch.randn(4, 5, 9), None, None, training=True, mask=mask)
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
def test_wrong_vectors_change_nothing(name):
    args = arguments((4, 5, 9), requires_grad=False)
    before = args.clone()
    wrong = replace(args, **{name: torch.ones(4)})
    with pytest.raises(RuntimeError, match=f"{name} should contain 5 elements not 4"):
        call(wrong, training=True, mask=torch.ones(4, 9, dtype=torch.bool))
    for buffer in ("running_mean", "running_var"):
        assert_bitwise(getattr(args, buffer), getattr(before, buffer))
