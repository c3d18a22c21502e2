"""Derivatives beyond one backward pass: numerical checks, double backward, forward mode, vmap and torch.func."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from checks import call, differentiable
from inputs import LAYOUTS, arguments, channels_last, contiguous, every
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vjp, vmap

import batchnorm_ext
from batchnorm_ext.functional import batch_norm

MODES = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
AFFINE = pytest.mark.parametrize(
    "affine",
    list(itertools.product([True, False], repeat=2)),
    ids=["affine", "weight-only", "bias-only", "plain"],
)
torch_batch_norm = torch.nn.functional.batch_norm


def function_of(args, training, eps=1e-5, function=batch_norm):
    """The call as a function of its differentiable tensors, free of side effects on the statistics."""
    present = [args.weight is not None, args.bias is not None]

    def apply(x, *parameters):
        rest = iter(parameters)
        weight, bias = (next(rest) if there else None for there in present)
        mean = None if training else args.running_mean
        var = None if training else args.running_var
        return function(x, mean, var, weight, bias, training=training, eps=eps)

    return apply


@MODES
@AFFINE
@pytest.mark.parametrize("shape", [(4, 3), (3, 2, 3), (2, 2, 2, 3)], ids=str)
def test_gradcheck(shape, affine, training, device):
    args = arguments(shape, torch.float64, device=device, weight=affine[0], bias=affine[1])
    assert gradcheck(function_of(args, training), differentiable(args))


@MODES
@AFFINE
@pytest.mark.parametrize("shape", [(4, 3), (2, 2, 2, 3)], ids=str)
def test_gradgradcheck(shape, affine, training, device):
    args = arguments(shape, torch.float64, device=device, weight=affine[0], bias=affine[1])
    assert gradgradcheck(function_of(args, training), differentiable(args))


@MODES
@pytest.mark.parametrize("layout", **every(LAYOUTS))
def test_gradcheck_of_layouts(layout, training, device):
    args = arguments((3, 3, 3, 2), torch.float64, device=device)
    apply = function_of(args, training)

    def laid_out(x, *parameters):  # gradcheck perturbs dense tensors only
        return apply(layout(x), *parameters)

    inputs = differentiable(args)
    assert gradcheck(laid_out, inputs, fast_mode=True)
    assert gradgradcheck(laid_out, inputs, fast_mode=True)


@MODES
@pytest.mark.parametrize(
    "wanted", [w for w in itertools.product([True, False], repeat=3) if any(w)], ids=str
)
def test_gradgradcheck_of_every_subset(wanted, training, device):
    args = arguments((3, 2, 3), torch.float64, device=device)
    apply = function_of(args, training)
    everything = [args.x, args.weight, args.bias]
    for tensor, want in zip(everything, wanted, strict=True):
        tensor.requires_grad_(want)
    assert gradcheck(apply, everything, fast_mode=True)
    assert gradgradcheck(apply, everything, fast_mode=True)


@MODES
def test_gradgradcheck_where_the_variance_is_zero(training, device):
    args = arguments((4, 3, 2), torch.float64, device=device)
    with torch.no_grad():
        args.x[:, 1] = 2.0
        args.running_var[0] = 0.0
    assert gradcheck(function_of(args, training, eps=0.5), differentiable(args))
    assert gradgradcheck(function_of(args, training, eps=0.5), differentiable(args))


@MODES
@pytest.mark.parametrize(
    "dtypes",
    [(torch.float32,) * 2, (torch.float16, torch.float32), (torch.bfloat16, torch.float32)],
    ids=str,
)
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_gradient_penalty(layout, dtypes, training, device):
    """A gradient of a gradient's norm, in the dtypes gradcheck cannot judge, against the float64 result."""
    args = arguments((6, 4, 5, 5), *dtypes, device=device, layout=layout)
    results = []
    for convert in (lambda t: t, lambda t: t.double()):
        inputs = [convert(t.detach()).requires_grad_() for t in differentiable(args)]
        wide = arguments((1, 4), torch.float64, device=device)
        wide.running_mean, wide.running_var = convert(args.running_mean), convert(args.running_var)
        y = function_of(wide, training)(*inputs)
        first = torch.autograd.grad(y, inputs, convert(args.dy), create_graph=True)
        penalty = sum(g.double().square().sum() for g in first)
        results.append(torch.autograd.grad(penalty, inputs, allow_unused=True))
    rounding = torch.finfo(dtypes[0]).eps
    for actual, expected in zip(*results, strict=True):
        if expected is None:
            assert actual is None or not actual.any()
            continue
        assert actual.dtype in dtypes
        size = expected.abs().max()
        torch.testing.assert_close(
            actual.double(), expected, rtol=0, atol=float(20 * rounding * size)
        )


@MODES
def test_bias_without_weight_double_backward(training, device):
    """torch's own second derivative is wrong here; the numerical one decides."""
    args = arguments((4, 3, 2), torch.float64, device=device, weight=False)
    assert gradgradcheck(function_of(args, training), [args.x, args.bias])


class Cut(torch.autograd.Function):
    """The identity, whose backward pass ends here."""

    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, dy):
        return None


@MODES
@pytest.mark.parametrize(
    "function",
    [
        batch_norm,
        lambda *args, **options: batchnorm_ext.functional.batch_norm_act(*args, **options),
        lambda x, mean, var, weight, bias, training: batchnorm_ext.BatchNormFunction.apply(
            x, weight, bias, mean, var, None, training, 0.1, 1e-5, False, 1
        ),
        torch_batch_norm,
    ],
    ids=["batch_norm", "batch_norm_act", "BatchNormFunction", "torch"],
)
def test_an_output_without_gradient_gives_none(function, training, device):
    """Not zeros, which an optimizer would take for a gradient."""
    args = arguments((4, 6, 5, 3), device=device)
    Cut.apply(call(args, function, training=training)).sum().backward()
    assert [t.grad for t in differentiable(args)] == [None, None, None]


@MODES
def test_second_derivative_keeps_statistics(training, device):
    args = arguments((4, 3, 2), torch.float64, device=device)
    y = call(args, training=training)
    after_forward = args.running_mean.clone(), args.running_var.clone()
    first = torch.autograd.grad(y.square().sum(), differentiable(args), create_graph=True)
    torch.autograd.grad(sum(g.square().sum() for g in first), differentiable(args))
    assert torch.equal(args.running_mean, after_forward[0])
    assert torch.equal(args.running_var, after_forward[1])


@MODES
@AFFINE
def test_forward_mode_against_reverse_mode(affine, training, device):
    args = arguments((4, 3, 2), torch.float64, device=device, weight=affine[0], bias=affine[1])
    assert gradcheck(
        function_of(args, training),
        differentiable(args),
        check_forward_ad=True,
        check_backward_ad=False,
        fast_mode=True,
    )


@MODES
def test_forward_mode_values(training, device):
    args = arguments((4, 3, 2), torch.float64, device=device, requires_grad=False)
    tangents = [torch.randn_like(t) for t in (args.x, args.weight, args.bias)]
    outcomes = []
    for function in (batch_norm, torch_batch_norm):
        with forward_ad.dual_level():
            duals = [
                forward_ad.make_dual(t, v)
                for t, v in zip((args.x, args.weight, args.bias), tangents, strict=True)
            ]
            outcomes.append(
                forward_ad.unpack_dual(function_of(args, training, function=function)(*duals))
            )
    torch.testing.assert_close(outcomes[0].primal, outcomes[1].primal)
    torch.testing.assert_close(outcomes[0].tangent, outcomes[1].tangent)


@MODES
@pytest.mark.parametrize("transform", ["grad", "jvp", "vjp", "jacrev", "jacfwd", "hessian"])
def test_func_transforms(transform, training, device):
    args = arguments((3, 2, 2), torch.float64, device=device, requires_grad=False)
    primals = (args.x, args.weight, args.bias)
    outcomes = []
    for function in (batch_norm, torch_batch_norm):
        apply = function_of(args, training, function=function)

        def loss(*inputs, apply=apply):
            return (apply(*inputs) * args.dy).square().sum()

        if transform == "grad":
            outcomes.append(grad(loss, argnums=(0, 1, 2))(*primals))
        elif transform == "jvp":
            outcomes.append(jvp(apply, primals, tuple(t.cos() for t in primals)))
        elif transform == "vjp":
            outcomes.append(vjp(apply, *primals)[1](args.dy))
        elif transform == "hessian":
            outcomes.append(jacfwd(jacrev(loss, argnums=1), argnums=1)(*primals))
        else:
            jacobian = jacrev if transform == "jacrev" else jacfwd
            outcomes.append(jacobian(apply, argnums=(0, 1))(*primals))
    torch.testing.assert_close(outcomes[0], outcomes[1])


@MODES
def test_vmap_over_a_stack_of_batches(training, device):
    args = arguments((4, 3, 2), torch.float64, device=device, requires_grad=False)
    stack = torch.randn(5, 4, 3, 2, dtype=torch.float64, device=device)
    apply = function_of(args, training)
    together = vmap(lambda x: apply(x, args.weight, args.bias))(stack)
    one_by_one = torch.stack([apply(x, args.weight, args.bias) for x in stack])
    torch.testing.assert_close(together, one_by_one)


def test_vmap_over_an_ensemble_of_modules(device):
    """Stacked parameters and statistics, as torch.func.stack_module_state makes them."""
    models = [
        batchnorm_ext.BatchNorm2d(3, device=device, dtype=torch.float64).eval() for _ in range(4)
    ]
    for model in models:
        for tensor in (model.weight, model.bias, model.running_mean, model.running_var):
            tensor.data.uniform_(0.5, 1.5)
    parameters, buffers = torch.func.stack_module_state(models)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, device=device)
    together = vmap(lambda p, b: functional_call(models[0], (p, b), (x,)))(parameters, buffers)
    torch.testing.assert_close(together, torch.stack([model(x) for model in models]))


def test_per_sample_gradients_in_eval(device):
    args = arguments((5, 3, 2, 2), torch.float64, device=device, requires_grad=False)
    apply = function_of(args, False)

    def loss(weight, bias, x):
        return apply(x.unsqueeze(0), weight, bias).square().sum()

    together = vmap(grad(loss, argnums=(0, 1)), in_dims=(None, None, 0))(
        args.weight, args.bias, args.x
    )
    one_by_one = [grad(loss, argnums=(0, 1))(args.weight, args.bias, x) for x in args.x]
    torch.testing.assert_close(together, tuple(map(torch.stack, zip(*one_by_one, strict=True))))


@MODES
def test_batched_gradients(training, device):
    """is_grads_batched runs backward under vmap."""
    args = arguments((4, 3, 2), torch.float64, device=device)
    batch = torch.randn(3, 4, 3, 2, dtype=torch.float64, device=device)
    y = call(args, training=training)
    together = torch.autograd.grad(
        y, differentiable(args), batch, is_grads_batched=True, retain_graph=True
    )
    one_by_one = [
        torch.autograd.grad(y, differentiable(args), dy, retain_graph=True) for dy in batch
    ]
    for stacked, pieces in zip(together, zip(*one_by_one, strict=True), strict=True):
        torch.testing.assert_close(stacked, torch.stack(pieces))


@MODES
def test_autograd_jacobian_and_hvp(training, device):
    args = arguments((3, 2, 2), torch.float64, device=device, requires_grad=False)
    primals = (args.x, args.weight, args.bias)
    vectors = tuple(t.cos() for t in primals)
    outcomes = []
    for function in (batch_norm, torch_batch_norm):
        apply = function_of(args, training, function=function)

        def loss(*inputs, apply=apply):
            return (apply(*inputs) * args.dy).square().sum()

        outcomes.append(
            (
                torch.autograd.functional.jacobian(apply, primals),
                torch.autograd.functional.hvp(loss, primals, vectors),
            )
        )
    torch.testing.assert_close(outcomes[0], outcomes[1])
