"""Fused activation and residual against the oracle and the unfused chain: values, gradients, memory, in-place calls."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from checks import assert_bitwise, differentiable, exact_act, storages_saved, without
from checks import call_act as call
from checks import check_call_act as check
from inputs import DTYPES, LAYOUTS, SHAPES, Arguments, arguments, channels_last, contiguous, every
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

import batchnorm_ext
from batchnorm_ext.functional import batch_norm_act

ACTIVATIONS = ("identity", "relu", "relu6", "leaky_relu", "elu", "silu", "hardswish")
SMOOTH = ("elu", "silu", "hardswish")
INVERTIBLE = ("identity", "leaky_relu", "elu")
MODES = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
EVERY_ACTIVATION = pytest.mark.parametrize("activation", ACTIVATIONS)
RESIDUAL = pytest.mark.parametrize("residual", [True, False], ids=["residual", "no-residual"])
MODULES = {
    1: batchnorm_ext.BatchNormAct1d,
    2: batchnorm_ext.BatchNormAct2d,
    3: batchnorm_ext.BatchNormAct3d,
}


def residual_of(args: Arguments, layout=None) -> torch.Tensor:
    values = torch.randn(args.x.shape, dtype=torch.float64).to(args.x)
    return (layout or torch.clone)(values).requires_grad_(args.x.requires_grad)


def chain(args: Arguments, residual=None, activation="relu", negative_slope=0.01, **options):
    """The same of torch's functions."""
    y = F.batch_norm(args.x, args.running_mean, args.running_var, args.weight, args.bias, **options)
    y = y if residual is None else y + residual
    options = {"negative_slope": negative_slope} if activation == "leaky_relu" else {}
    return y if activation == "identity" else getattr(F, activation)(y, **options)


# ---- values and gradients -----------------------------------------------------------------------


@MODES
@RESIDUAL
@EVERY_ACTIVATION
@pytest.mark.parametrize("shape", **every(SHAPES))
def test_shapes(shape, activation, residual, training, device):
    args = arguments(shape, device=device)
    check(args, residual_of(args) if residual else None, activation, training=training)


@MODES
@RESIDUAL
@EVERY_ACTIVATION
@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize(
    "dtypes",
    [(t, t) for t in DTYPES] + [(t, torch.float32) for t in (torch.float16, torch.bfloat16)],
    ids=str,
)
def test_dtypes(dtypes, layout, activation, residual, training, device):
    args = arguments((3, 20, 5, 7), *dtypes, device=device, layout=layout)
    check(args, residual_of(args, layout) if residual else None, activation, training=training)


@MODES
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("residual_layout", **every(LAYOUTS))
@pytest.mark.parametrize("layout", **every(LAYOUTS))
def test_layouts(layout, residual_layout, activation, training, device):
    args = arguments((3, 17, 4, 6), device=device, layout=layout)
    y = check(args, residual_of(args, residual_layout), activation, training=training)
    plain = batchnorm_ext.functional.batch_norm(args.x, None, None, training=True)
    assert y.stride() == plain.stride()


@MODES
@pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu", "silu"])
@pytest.mark.parametrize("grad_layout", **every(LAYOUTS))
@pytest.mark.parametrize("layout", **every(LAYOUTS))
def test_grad_output_of_another_layout(layout, grad_layout, activation, training, device):
    """Where the mask alone is kept, it is the output's memory order that its bits are in."""
    args = arguments((3, 11, 4, 6), device=device, layout=layout)
    args.weight.requires_grad_(False)
    args.dy = grad_layout(args.dy)
    check(args, residual_of(args), activation, training=training)
    check(args, None, activation, training=training)


@MODES
@EVERY_ACTIVATION
@pytest.mark.parametrize(
    "wanted", [w for w in itertools.product([True, False], repeat=4) if any(w)], ids=str
)
def test_every_subset_of_gradients(wanted, activation, training, device):
    args = arguments((4, 6, 5, 3), device=device)
    residual = residual_of(args)
    for tensor, want in zip((args.x, args.weight, args.bias, residual), wanted, strict=True):
        tensor.requires_grad_(want)
    check(args, residual, activation, training=training)
    if any(wanted[:3]):
        check(args, None, activation, training=training)


@MODES
@EVERY_ACTIVATION
@pytest.mark.parametrize("absent", [("weight",), ("bias",), ("weight", "bias")], ids=str)
def test_absent_parameters(absent, activation, training, device):
    args = without(arguments((4, 6, 5, 3), device=device), *absent)
    check(args, residual_of(args), activation, training=training)
    check(args, None, activation, training=training)


@EVERY_ACTIVATION
def test_no_gradient_wanted(activation, device):
    args = arguments((4, 6, 5, 3), device=device, requires_grad=False)
    assert not check(args, residual_of(args), activation).requires_grad
    for tensor in (args.x, args.weight, args.bias):
        tensor.requires_grad_()
    with torch.no_grad():
        assert not call(args, residual_of(args), activation, training=True).requires_grad


@MODES
@pytest.mark.parametrize("negative_slope", [0.2, 1.0, 0.0, -0.5, 3.0])
def test_negative_slope(negative_slope, training, device):
    args = arguments((4, 6, 5, 3), device=device)
    options = {"negative_slope": negative_slope, "training": training}
    check(args, residual_of(args), "leaky_relu", **options)
    check(args, None, "leaky_relu", **options)


@MODES
@RESIDUAL
@EVERY_ACTIVATION
def test_far_into_the_tails(activation, residual, training, device):
    """No overflow on the way: exponentials of large arguments, and the flat parts."""
    args = arguments((40, 4, 6, 6), device=device)
    with torch.no_grad():
        args.weight.copy_(torch.tensor([1.0, 20.0, -60.0, 0.0]))
        args.bias.copy_(torch.tensor([-100.0, 3.0, 50.0, 0.0]))
    check(args, residual_of(args) if residual else None, activation, training=training)


@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("spread", [0.0, 1e-3], ids=["dy is xhat", "dy is nearly xhat"])
@pytest.mark.parametrize("activation", ["identity", "relu", "relu6", "leaky_relu"])
@pytest.mark.parametrize("shape", [(6, 5, 7, 3), (300, 9), (8, 6, 28, 28)], ids=str)
def test_gradients_that_cancel(shape, activation, spread, layout, device):
    """Where dy resembles xhat, dx is a small difference of terms made of sums, and keeps the sums' errors."""
    compared = 0
    for _ in range(6):
        args = arguments(shape, device=device, layout=layout)
        exact = exact_act(args, None, activation, training=True)
        if exact.clearance() < 1e-6:  # an element may lie on either side of a jump
            continue
        xhat = torch.from_numpy(exact.xhat.astype("float64")).to(args.x)
        args.dy = layout(xhat + spread * torch.randn(shape, device=device))
        for inplace in {False, activation in INVERTIBLE}:
            check(args, None, activation, inplace=inplace)
        compared += 1
    assert compared


@MODES
@RESIDUAL
@EVERY_ACTIVATION
def test_equals_the_unfused_chain(activation, residual, training, device):
    """Also infinities, which the oracle does not judge."""
    args = arguments((4, 6, 5, 3), torch.float64, device=device)
    added = residual_of(args) if residual else None
    if residual:
        with torch.no_grad():
            added[0, 0, 0, :2] = torch.tensor([torch.inf, -torch.inf])
    outcomes = []
    for function in (call, chain):
        trial = args.clone()
        y = function(trial, added, activation, training=training)
        gradients = torch.autograd.grad(y, differentiable(trial, added), args.dy)
        outcomes.append((y, *gradients, trial.running_mean, trial.running_var))
    torch.testing.assert_close(outcomes[0], outcomes[1], equal_nan=True)


@EVERY_ACTIVATION
def test_nan_passes(activation, device):
    args = arguments((4, 6, 5, 3), device=device)
    residual = residual_of(args)
    with torch.no_grad():
        residual[1, 2] = torch.nan
    y = call(args, residual, activation, training=True)
    assert torch.equal(y.isnan(), residual.isnan())


@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [contiguous, channels_last])
@RESIDUAL
def test_gradient_flows_exactly_where_the_output_is_positive(
    residual, layout, dtype, activation, device
):
    """Forward and backward agree on the sign of u in every one of millions of elements, many of them near zero."""
    args = arguments((16, 64, 56, 56), dtype, torch.float32, device=device, layout=layout)
    args.weight.data.mul_(1e-3)
    args.bias.data.zero_()
    added = residual_of(args, layout).detach().mul_(1e-3).requires_grad_() if residual else None
    for training in (True, False):
        args.weight.requires_grad_(training)
        y = call(args, added, activation, training=training)
        # Of the input in evaluation, its gradient is dy times the derivative times a nonzero scale.
        wanted = added if residual else args.x
        if training and not residual:
            gradient = torch.autograd.grad(y, args.bias, torch.ones_like(y))[0]
            passing = (y > 0).double().sum((0, 2, 3))
            total = y[0, 0].numel() * y.size(0)
            slope = 0.01 if activation == "leaky_relu" else 0.0
            torch.testing.assert_close(
                gradient.double(), passing + slope * (total - passing), rtol=1e-5, atol=0
            )
            continue
        gradient = torch.autograd.grad(y, wanted, torch.ones_like(y))[0]
        if residual:
            assert torch.equal(gradient == 1.0, y > 0)
        elif activation == "relu":
            assert torch.equal(gradient != 0.0, y > 0)
        else:
            full = gradient.abs().amax((0, 2, 3), keepdim=True)
            assert torch.equal(gradient.abs() == full, y > 0)


def test_bitwise_repeatable(device):
    args = arguments((7, 33, 9, 11), device=device)
    residual = residual_of(args)
    for activation in ACTIVATIONS:
        runs = []
        for _ in range(2):
            y = call(args, residual, activation, training=True)
            runs.append((y, *torch.autograd.grad(y, [args.x, args.weight, residual], args.dy)))
        for first, again in zip(*runs, strict=True):
            assert_bitwise(first, again, activation)


@EVERY_ACTIVATION
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4), (2, 0, 4, 4), (0, 3)], ids=str)
def test_empty_batches(shape, activation, device):
    args = arguments(shape, device=device)
    residual = residual_of(args)
    y = call(args, residual, activation, training=True)
    assert y.shape == shape
    gradients = torch.autograd.grad(y, [args.x, args.weight, args.bias, residual], args.dy)
    assert [g.shape for g in gradients] == [shape, args.weight.shape, args.bias.shape, shape]
    assert not any(g.any() for g in gradients)


# ---- derivatives --------------------------------------------------------------------------------


def function_of(args: Arguments, activation: str, training: bool):
    def apply(x, weight, bias, residual=None):
        mean, var = (None, None) if training else (args.running_mean, args.running_var)
        return batch_norm_act(
            x, mean, var, weight, bias, training, residual=residual, activation=activation
        )

    return apply


@MODES
@RESIDUAL
@EVERY_ACTIVATION
@pytest.mark.parametrize("shape", [(4, 3), (3, 2, 3)], ids=str)
def test_gradcheck_and_gradgradcheck(shape, activation, residual, training, device):
    args = arguments(shape, torch.float64, device=device)
    inputs = [args.x, args.weight, args.bias] + ([residual_of(args)] if residual else [])
    apply = function_of(args, activation, training)
    assert gradcheck(apply, inputs)
    assert gradgradcheck(apply, inputs)


@MODES
@EVERY_ACTIVATION
@pytest.mark.parametrize(
    "wanted", [w for w in itertools.product([True, False], repeat=4) if any(w)], ids=str
)
def test_gradgradcheck_of_every_subset(wanted, activation, training, device):
    args = arguments((3, 2, 3), torch.float64, device=device)
    inputs = [args.x, args.weight, args.bias, residual_of(args)]
    for tensor, want in zip(inputs, wanted, strict=True):
        tensor.requires_grad_(want)
    apply = function_of(args, activation, training)
    assert gradcheck(apply, inputs, fast_mode=True)
    assert gradgradcheck(apply, inputs, fast_mode=True)


@MODES
@RESIDUAL
@EVERY_ACTIVATION
def test_batched_gradients(activation, residual, training, device):
    """is_grads_batched runs backward under vmap."""
    args = arguments((4, 3, 2), torch.float64, device=device)
    added = residual_of(args) if residual else None
    batch = torch.randn(3, 4, 3, 2, dtype=torch.float64, device=device)
    wanted = differentiable(args, added)
    y = call(args, added, activation, training=training)
    together = torch.autograd.grad(y, wanted, batch, is_grads_batched=True, retain_graph=True)
    pieces = [torch.autograd.grad(y, wanted, dy, retain_graph=True) for dy in batch]
    for stacked, separate in zip(together, zip(*pieces, strict=True), strict=True):
        torch.testing.assert_close(stacked, torch.stack(separate))


@MODES
@EVERY_ACTIVATION
def test_func_transforms(activation, training, device):
    args = arguments((3, 2, 2), torch.float64, device=device, requires_grad=False)
    primals = args.x, args.weight, args.bias, residual_of(args)
    apply = function_of(args, activation, training)

    def unfused(x, weight, bias, residual):
        trial = Arguments(x, weight, bias, args.running_mean, args.running_var, args.dy)
        trial = without(trial, "running_mean", "running_var") if training else trial
        return chain(trial, residual, activation, training=training)

    tangents = tuple(t.cos() for t in primals)
    for transform in (
        lambda f: torch.func.jvp(f, primals, tangents),
        lambda f: torch.func.vjp(f, *primals)[1](args.dy),
        lambda f: torch.func.jacrev(f, argnums=(0, 3))(*primals),
        lambda f: torch.func.vmap(f, (0, None, None, 0))(
            *(torch.stack([t, t.sin()]) if t.dim() > 1 else t for t in primals)
        ),
    ):
        torch.testing.assert_close(transform(apply), transform(unfused))


# ---- what is kept for backward ------------------------------------------------------------------


def saved_bytes(args: Arguments, residual=None, activation="relu", **options) -> int:
    owned = (args.weight, args.bias)
    return sum(storages_saved(lambda: call(args, residual, activation, **options), owned).values())


BIG = (8, 64, 56, 56)


@EVERY_ACTIVATION
def test_training_keeps_the_input(activation, device):
    args = arguments(BIG, device=device)
    assert saved_bytes(args, None, activation, training=True) <= 1.01 * args.x.numel() * 4


@pytest.mark.parametrize("activation", ["identity", "relu", "relu6", "leaky_relu"])
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_training_with_a_residual_keeps_the_input_and_a_bit_an_element(layout, activation, device):
    args = arguments(BIG, device=device, layout=layout)
    residual = residual_of(args, layout)
    assert saved_bytes(args, residual, activation, training=True) <= 1.05 * args.x.numel() * 4


@RESIDUAL
@pytest.mark.parametrize("activation", ["identity", "relu", "relu6", "leaky_relu"])
def test_eval_with_frozen_parameters_keeps_a_bit_an_element_at_most(activation, residual, device):
    args = arguments(BIG, device=device)
    args.weight.requires_grad_(False)
    args.bias.requires_grad_(False)
    added = residual_of(args) if residual else None
    vectors = 3 * 64 * 4
    bits = 0 if activation == "identity" else args.x.numel() // 8
    assert saved_bytes(args, added, activation, training=False) <= vectors + bits


def test_the_identitys_residual_gradient_is_the_output_gradient(device):
    args = arguments((4, 6, 5, 3), device=device)
    residual = residual_of(args)
    y = call(args, residual, "identity", training=True)
    _, gradient = torch.autograd.grad(y, [args.x, residual], args.dy)
    assert gradient.data_ptr() == args.dy.data_ptr()


@MODES
@RESIDUAL
@EVERY_ACTIVATION
def test_inputs_are_only_read(activation, residual, training, device):
    args = without(
        arguments((4, 6, 5, 3), device=device), *(["running_mean", "running_var"] * training)
    )
    added = residual_of(args) if residual else None
    watched = [t for t in (*vars(args).values(), added) if t is not None]
    before = [(t.detach().clone(), t._version) for t in watched]
    y = call(args, added, activation, training=training)
    gradients = torch.autograd.grad(y, differentiable(args, added), args.dy)
    for tensor, (values, version) in zip(watched, before, strict=True):
        assert_bitwise(tensor.detach(), values)
        assert tensor._version == version
    results = {t.untyped_storage().data_ptr() for t in (y, *gradients)}
    allowed = {args.dy.untyped_storage().data_ptr()} if activation == "identity" else set()
    assert not results & {t.untyped_storage().data_ptr() for t in watched} - allowed


def test_buffers_rewritten_between_forward_and_backward(device):
    args = arguments((4, 6, 5, 3), device=device)
    for activation in ACTIVATIONS:
        y = call(args, None, activation, training=False)
        expected = torch.autograd.grad(y, [args.x], args.dy, retain_graph=True)
        args.running_mean.add_(1.0)
        args.running_var.mul_(2.0)
        assert_bitwise(torch.autograd.grad(y, [args.x], args.dy)[0], expected[0])


# ---- modules ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_modules_train_as_the_chain_of_torchs(rank, momentum, device):
    ours = MODULES[rank](5, momentum=momentum, device=device)
    theirs = getattr(nn, f"BatchNorm{rank}d")(5, momentum=momentum, device=device)
    theirs.load_state_dict(ours.state_dict())
    for step in range(3):
        torch.manual_seed(step)
        x = torch.randn((6, 5, 4, 3, 2)[: rank + 2], device=device)
        residual = torch.randn_like(x)
        ours(x, residual).square().sum().backward()
        F.relu(theirs(x) + residual).square().sum().backward()
        torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
        torch.testing.assert_close(ours.bias.grad, theirs.bias.grad)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(x), F.relu(theirs(x)))


def test_module_descriptions():
    act = batchnorm_ext.BatchNormAct2d
    plain = repr(batchnorm_ext.BatchNorm2d(3)).replace("BatchNorm2d", "BatchNormAct2d")[:-1]
    assert repr(act(3)) == f"{plain}, activation=relu)"
    assert repr(act(3, activation="leaky_relu", negative_slope=0.2, inplace=True)) == (
        f"{plain}, activation=leaky_relu, negative_slope=0.2, inplace=True)"
    )
    assert isinstance(act(3), nn.BatchNorm2d)
    assert isinstance(act(3), batchnorm_ext.BatchNorm2d)
    module = act(3, activation="silu", skip_nonfinite=True).freeze()
    assert repr(module).endswith(", skip_nonfinite=True, frozen=True, activation=silu)")


def test_frozen_module_keeps_a_bit_an_element(device):
    module = batchnorm_ext.BatchNormAct2d(64, device=device).freeze(affine=True).train()
    x = torch.randn(BIG, device=device, requires_grad=True)
    owned = tuple(module.parameters())
    saved = sum(storages_saved(lambda: module(x), owned).values())
    assert saved <= x.numel() // 8 + 3 * 64 * 4
    module(x).sum().backward()
    assert module.weight.grad is None


def test_module_counts_a_batch_and_skips_nonfinite_ones(device):
    module = batchnorm_ext.BatchNormAct2d(3, skip_nonfinite=True, device=device)
    x = torch.randn(4, 3, 5, 5, device=device)
    x[0, 0, 0, 0] = torch.inf
    module(x)
    assert module.num_batches_tracked.item() == 1
    assert module.running_mean[0].item() == 0.0
    assert module.running_mean[1:].ne(0.0).all()


def test_symbolic_trace_keeps_the_module_whole():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = batchnorm_ext.BatchNormAct2d(3)

        def forward(self, x, shortcut):
            return self.bn(self.bn(x), shortcut)

    block = Block().eval()
    traced = torch.fx.symbolic_trace(block)
    assert [n.op for n in traced.graph.nodes].count("call_module") == 2
    x, shortcut = torch.randn(2, 2, 3, 4, 4)
    assert_bitwise(traced(x, shortcut), block(x, shortcut))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_leaves_dtypes_alone(dtype, device):
    """As with batch norm itself: the input's dtype is the output's."""
    if device == "cpu" and dtype == torch.float16:
        pytest.skip("autocast on the CPU is about bfloat16")
    module = batchnorm_ext.BatchNormAct2d(3, device=device)
    x = torch.randn(4, 3, 5, 5, device=device)
    for given in (x, x.to(dtype)):
        with torch.autocast(device, dtype=dtype):
            assert module(given, given).dtype == given.dtype


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_updates_statistics_once(use_reentrant, device):
    from torch.utils.checkpoint import checkpoint

    module = batchnorm_ext.BatchNormAct2d(3, device=device)
    alone = batchnorm_ext.BatchNormAct2d(3, device=device)
    x = torch.randn(4, 3, 5, 5, device=device, requires_grad=True)
    dy = torch.randn_like(x)
    expected = torch.autograd.grad(alone(x, x), x, dy)
    y = checkpoint(module, x, x, use_reentrant=use_reentrant)
    y.backward(dy)
    torch.testing.assert_close(x.grad, expected[0])
    torch.testing.assert_close(module.state_dict(), alone.state_dict())


# ---- refused calls ------------------------------------------------------------------------------

BAD_RESIDUALS = {
    "shape": lambda x: torch.randn(1, *x.shape[1:], device=x.device),
    "rank": lambda x: torch.randn(x.numel(), device=x.device),
    "dtype": lambda x: torch.randn(x.shape, device=x.device).bfloat16(),
    "device": lambda x: torch.randn(x.shape, device="meta"),
}


@MODES
@pytest.mark.parametrize("residual", **every(BAD_RESIDUALS))
def test_a_residual_unlike_the_input_is_refused(residual, training, device):
    module = batchnorm_ext.BatchNormAct2d(3, device=device).train(training)
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    x = torch.randn(4, 3, 5, 5, device=device)
    with pytest.raises(
        RuntimeError, match=r"residual must have the (shape|dtype|device) of input, .*, got "
    ):
        module(x, residual(x))
    for name, tensor in module.state_dict().items():
        assert_bitwise(tensor, state[name], name)


def test_unknown_activations_are_refused(device):
    args = arguments((4, 3, 5), device=device)
    match = "activation must be one of identity, relu, relu6, leaky_relu, elu, silu, hardswish, got 'gelu'"
    with pytest.raises(ValueError, match=match):
        call(args, activation="gelu")
    with pytest.raises(ValueError, match=match):
        batchnorm_ext.BatchNormAct1d(3, activation="gelu")


@pytest.mark.parametrize(
    ("activation", "slope"),
    [
        ("relu", 0.01),
        ("silu", 0.01),
        ("hardswish", 0.01),
        ("leaky_relu", 0.0),
        ("leaky_relu", -1.0),
    ],
)
def test_in_place_calls_need_an_invertible_activation(activation, slope, device):
    args = arguments((4, 3, 5), device=device, requires_grad=False)
    match = "inplace=True needs an activation that can be inverted"
    with pytest.raises(ValueError, match=match):
        call(args, activation=activation, negative_slope=slope, inplace=True)
    with pytest.raises(ValueError, match=match):
        batchnorm_ext.BatchNormAct1d(3, activation=activation, negative_slope=slope, inplace=True)


def test_what_batch_norm_refuses_is_refused(device):
    args = arguments((1, 3), device=device)
    before = args.clone()
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        call(args, training=True)
    short = replace(args, x=torch.randn(4, 3, device=device), weight=torch.ones(2, device=device))
    with pytest.raises(RuntimeError, match="weight should contain 3 elements not 2"):
        call(short, training=True)
    with pytest.raises(TypeError, match="batch_norm_act"):
        call(args, training=True, momentum=None)
    assert_bitwise(args.running_mean, before.running_mean)
    assert_bitwise(args.running_var, before.running_var)


# ---- in place -----------------------------------------------------------------------------------


def in_place(args: Arguments, activation: str, residual=None, **options):
    """An in-place call on a copy of x that autograd takes for another operation's result."""
    x = args.x.clone()
    return x, call(replace(args, x=x), residual, activation, inplace=True, **options)


@MODES
@RESIDUAL
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", INVERTIBLE)
def test_in_place_gives_the_same_results(activation, dtype, residual, training, device):
    args = arguments((5, 6, 7, 3), dtype, device=device)
    added = residual_of(args) if residual else None
    check(args, added, activation, training=training, inplace=True)


def test_in_place_on_a_leaf_is_refused(device):
    args = arguments((4, 3, 5), device=device)
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
        call(args, activation="identity", inplace=True, training=True)
    with torch.no_grad():
        call(args, activation="identity", inplace=True, training=True)


def test_an_input_that_is_needed_elsewhere_raises_or_stays(device):
    """Never a wrong gradient: where the output takes the input's memory, autograd notices."""
    args = arguments((4, 3, 5), device=device)
    needed = args.x.exp()  # which saves its result
    before = needed.detach().clone()
    y = call(replace(args, x=needed), activation="identity", inplace=True, training=True)
    if y.data_ptr() == needed.data_ptr():
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
    else:
        assert_bitwise(needed.detach(), before)


@pytest.mark.native
@MODES
@pytest.mark.parametrize("activation", INVERTIBLE)
def test_without_a_gradient_the_output_is_the_input(activation, training, device):
    args = arguments((4, 6, 5, 3), device=device, requires_grad=False)
    residual = residual_of(args)
    expected = call(args.clone(), residual, activation, training=training)
    version = args.x._version
    y = call(args, residual, activation, training=training, inplace=True)
    assert y is args.x
    assert y._version > version
    assert_bitwise(y, expected)


def overwritten(args: Arguments, activation: str, residual=None, **options) -> bool:
    """Whether the call takes its input's memory; if not, that it leaves the input alone."""
    x = args.x.clone()
    before = x.detach().clone()
    y = call(replace(args, x=x), residual, activation, inplace=True, **options)
    if y.data_ptr() != x.data_ptr():
        assert_bitwise(x.detach(), before)
        return False
    assert y is x
    return True


@pytest.mark.native
@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("activation", "slope"), [("identity", 0.0), ("leaky_relu", 0.01), ("leaky_relu", 5.0)]
)
@pytest.mark.parametrize("shape", [(64, 7), (8, 16, 14, 14), (3, 5, 3, 2, 2)], ids=str)
def test_well_conditioned_calls_are_inverted(shape, activation, slope, dtype, layout, device):
    """Up to the bound of the rule, |bias| = 4 |weight|, and for weights as training leaves them."""
    args = arguments(shape, dtype, device=device, layout=layout)
    trained = args.weight.detach().abs() + 0.2, args.bias.detach() * 0.3
    channels = shape[1]
    size = torch.linspace(1e-3, 2.0, channels, dtype=dtype, device=device)
    sign = torch.arange(channels, device=device) % 2 * 2.0 - 1.0
    at_the_bound = (size * sign.to(dtype), 3.999 * size * -sign.to(dtype))
    for weight, bias in (trained, at_the_bound):
        with torch.no_grad():
            args.weight.copy_(weight)
            args.bias.copy_(bias)
        assert overwritten(args, activation, negative_slope=slope, training=True)
        check(args, None, activation, negative_slope=slope, inplace=True)


ILL_CONDITIONED = {
    "zero-weight": (0.0, 0.5),
    "zero-weight-and-bias": (0.0, 0.0),
    "tiny-weight": (1e-6, 0.1),
    "smaller-than-rounding": (1e-30, 0.0),
    "bias-far-from-weight": (0.5, -3.0),
    "nan-weight": (float("nan"), 0.0),
    "nan-bias": (1.0, float("nan")),
}


@pytest.mark.parametrize("parameters", **every(ILL_CONDITIONED))
@pytest.mark.parametrize("activation", ["identity", "leaky_relu"])
def test_a_channel_that_cannot_be_inverted_keeps_the_input(activation, parameters, device):
    args = arguments((6, 5, 7, 3), device=device)
    with torch.no_grad():
        args.weight[2], args.bias[2] = parameters
    assert not overwritten(args, activation, training=True)
    if not any(value != value for value in parameters):
        check(args, None, activation, inplace=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_calls_that_cannot_be_inverted_keep_the_input(dtype, device):
    args = arguments((6, 5, 7, 3), dtype, device=device)
    with torch.no_grad():
        args.weight.fill_(1.0)
        args.bias.zero_()
    if dtype.itemsize == 2:
        assert not overwritten(args, "identity", training=True)
    assert not overwritten(args, "elu", training=True)
    assert not overwritten(args, "elu", training=False)
    assert not overwritten(args, "identity", residual_of(args), training=True)
    for slope in (1e-38, 1e30):
        if dtype != torch.float64:
            assert not overwritten(args, "leaky_relu", negative_slope=slope, training=True)


@pytest.mark.native
def test_elu_is_inverted_where_no_value_can_reach_its_flat_part(device):
    """Of n samples none is further than sqrt(n - 1) deviations from their mean."""
    args = arguments((2, 5), device=device)
    with torch.no_grad():
        args.weight.fill_(0.5)
        args.bias.fill_(0.2)
    assert overwritten(args, "elu", training=True)
    check(args, None, "elu", inplace=True)
    args = arguments((4, 5, 10), device=device)
    with torch.no_grad():
        args.weight.fill_(0.01)
        args.bias.zero_()
    assert overwritten(args, "elu", training=True)
    check(args, None, "elu", inplace=True)


@pytest.mark.native
@RESIDUAL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ["identity", "leaky_relu"])
def test_frozen_calls_are_in_place_in_every_dtype(activation, dtype, residual, device):
    """Where no gradient needs the deviation, nothing is inverted."""
    args = arguments((4, 6, 5, 3), dtype, device=device)
    args.weight.requires_grad_(False)
    args.weight.zero_()
    added = residual_of(args) if residual else None
    assert overwritten(args, activation, added, training=False)
    _, y = in_place(args, activation, added, training=False)
    wanted = differentiable(args, added)
    expected = torch.autograd.grad(call(args, added, activation, training=False), wanted, args.dy)
    for actual, exact in zip(torch.autograd.grad(y, wanted, args.dy), expected, strict=True):
        assert_bitwise(actual, exact)


@pytest.mark.native
def test_in_place_training_keeps_nothing_but_the_output(device):
    args = arguments((8, 64, 56, 56), device=device)
    with torch.no_grad():
        args.weight.fill_(1.0)
        args.bias.zero_()
    x = args.x.clone()
    owned = (args.weight, args.bias)
    for activation in ("identity", "leaky_relu"):
        saved = storages_saved(
            lambda activation=activation: call(
                replace(args, x=x), None, activation, training=True, inplace=True
            ),
            owned,
        )
        assert saved.pop(x.untyped_storage().data_ptr())
        assert sum(saved.values()) <= 3 * 64 * 4


@pytest.mark.parametrize("activation", INVERTIBLE)
def test_views_and_shared_memory(activation, device):
    """In place or not, the results are those of a call that is not."""
    args = arguments((6, 4, 5, 5), device=device)
    base = args.x * 1.0
    view = base.view(6, 4, 25)
    y = call(replace(args, x=view), None, activation, training=True, inplace=True)
    expected = call(args, None, activation, training=True)
    dy = args.dy
    actual = torch.autograd.grad(y, args.x, dy.view(6, 4, 25), retain_graph=True)
    torch.testing.assert_close(actual, torch.autograd.grad(expected, args.x, dy))

    x = args.x * 1.0
    y = call(replace(args, x=x), x, activation, training=True, inplace=True)
    expected = call(args, args.x, activation, training=True)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(
        torch.autograd.grad(y, args.x, dy), torch.autograd.grad(expected, args.x, dy)
    )


@pytest.mark.parametrize("activation", ["identity", "leaky_relu"])
def test_second_derivatives_of_in_place_calls(activation, device):
    args = arguments((4, 3, 5), torch.float64, device=device)
    with torch.no_grad():
        args.weight.fill_(0.7)

    def apply(x, weight, bias):
        return batch_norm_act(
            x * 1.0, None, None, weight, bias, True, activation=activation, inplace=True
        )

    inputs = [args.x, args.weight, args.bias]
    assert gradcheck(apply, inputs)
    assert gradgradcheck(apply, inputs)


def test_rewriting_the_output_of_an_in_place_call_is_noticed(device):
    args = arguments((4, 3, 5), device=device)
    with torch.no_grad():
        args.weight.fill_(1.0)
    x, y = in_place(args, "identity", training=True)
    aliased = y.data_ptr() == x.data_ptr()
    y = y.relu_()
    if aliased:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
    else:
        y.sum().backward()
        assert args.x.grad is not None


def test_module_in_place(device):
    torch.manual_seed(3)
    module = batchnorm_ext.BatchNormAct2d(4, activation="leaky_relu", inplace=True, device=device)
    same = batchnorm_ext.BatchNormAct2d(4, activation="leaky_relu", device=device)
    conv = nn.Conv2d(3, 4, 3, device=device)
    x = torch.randn(5, 3, 9, 9, device=device)
    dy = torch.randn(
        5, 4, 7, 7, device=device
    )  # of a sum of squares, nearly all cancels in front of batch norm
    for _ in range(3):
        outcomes = []
        for layer in (module, same):
            conv.zero_grad()
            layer(conv(x)).backward(dy)
            outcomes.append((conv.weight.grad.clone(), layer.weight.grad, layer.running_var))
        torch.testing.assert_close(*outcomes)
