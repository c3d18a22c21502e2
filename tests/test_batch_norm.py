"""`functional.batch_norm` against the oracle: dtypes, shapes, layouts and flags; outputs, statistics and gradients."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from checks import assert_bitwise, call, call_act, check_call, check_gradients, differentiable
from inputs import (
    DTYPES,
    LARGE_SHAPES,
    LAYOUTS,
    SHAPES,
    arguments,
    channels_last,
    contiguous,
    every,
)
from oracle import BatchNorm
from tolerances import assert_matches

from batchnorm_ext.functional import batch_norm

DTYPE_PAIRS = {
    "f64": (torch.float64, torch.float64),
    "f32": (torch.float32, torch.float32),
    "f16": (torch.float16, torch.float16),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "f16-mixed": (torch.float16, torch.float32),
    "bf16-mixed": (torch.bfloat16, torch.float32),
}
FEW_DTYPE_PAIRS = {name: DTYPE_PAIRS[name] for name in ("f64", "f32", "bf16-mixed")}
MODES = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])


@MODES
@pytest.mark.parametrize("dtypes", **every(DTYPE_PAIRS))
@pytest.mark.parametrize("shape", **every(SHAPES))
def test_shapes_and_dtypes(shape, dtypes, training, device):
    check_call(arguments(shape, *dtypes, device=device), training=training)


@MODES
@pytest.mark.parametrize("dtypes", **every(FEW_DTYPE_PAIRS))
@pytest.mark.parametrize("layout", **every(LAYOUTS))
@pytest.mark.parametrize(
    "shape", [(10, 7), (3, 5, 9), (4, 6, 5, 7), (3, 20, 4, 4), (2, 3, 3, 5, 2)], ids=str
)
def test_layouts(shape, layout, dtypes, training, device):
    check_call(arguments(shape, *dtypes, device=device, layout=layout), training=training)


@MODES
@pytest.mark.parametrize("dtypes", **every({n: DTYPE_PAIRS[n] for n in ("f32", "bf16-mixed")}))
@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("shape", **every(LARGE_SHAPES))
def test_large_shapes(shape, layout, dtypes, training, device):
    check_call(arguments(shape, *dtypes, device=device, layout=layout), training=training)


@MODES
@pytest.mark.parametrize("running", [True, False], ids=["running", "no-running"])
@pytest.mark.parametrize("weight", [True, False], ids=["weight", "no-weight"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("dtypes", **every(DTYPE_PAIRS))
def test_absent_tensors(dtypes, weight, bias, running, training, device):
    if not training and not running:
        pytest.skip("evaluation needs running statistics")
    args = arguments(
        (4, 6, 5, 3), *dtypes, device=device, weight=weight, bias=bias, running=running
    )
    check_call(args, training=training)


@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.5, 1.0, -1.2, 2.0])
def test_momentum(momentum, device):
    check_call(arguments((5, 6, 3, 3), device=device), momentum=momentum)


@MODES
@pytest.mark.parametrize("eps", [1e-12, 1e-5, 1e-3, 0.6, 100.0])
@pytest.mark.parametrize("dtypes", **every(FEW_DTYPE_PAIRS))
def test_eps(dtypes, eps, training, device):
    check_call(arguments((5, 6, 3, 3), *dtypes, device=device), training=training, eps=eps)


@MODES
@pytest.mark.parametrize(
    "wanted", [w for w in itertools.product([True, False], repeat=3) if any(w)], ids=str
)
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_every_subset_of_gradients(wanted, layout, training, device):
    args = arguments((4, 6, 5, 3), torch.float32, device=device, layout=layout)
    for tensor, want in zip((args.x, args.weight, args.bias), wanted, strict=True):
        tensor.requires_grad_(want)
    check_call(args, training=training)


@MODES
def test_no_gradient_wanted(training, device):
    args = arguments((4, 6, 5, 3), device=device, requires_grad=False)
    assert not check_call(args, training=training).requires_grad
    for tensor in (args.x, args.weight, args.bias):
        tensor.requires_grad_()
    with torch.no_grad():
        assert not call(args, training=training).requires_grad
    with torch.inference_mode():
        assert_matches(
            call(args, training=False),
            BatchNorm(
                args.x, args.weight, args.bias, args.running_mean, args.running_var, training=False
            ).y,
            "y",
        )


@MODES
@pytest.mark.parametrize("grad_layout", **every(LAYOUTS))
@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("shape", [(7, 5), (3, 4, 9), (3, 5, 4, 6)], ids=str)
def test_grad_output_of_another_layout(shape, layout, grad_layout, training, device):
    args = arguments(shape, device=device, layout=layout)
    args.dy = grad_layout(args.dy)
    check_call(args, training=training)


@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("grad_layout", [contiguous, channels_last])
def test_gradients_have_the_strides_of_the_input(layout, grad_layout, device):
    """Also where a dimension has one element, since its stride tells the memory format."""
    args = arguments((4, 6, 1, 1), device=device, layout=layout)
    args.dy = grad_layout(args.dy)
    check_call(args)
    y = call(args, training=True)
    assert y.stride() == args.x.stride()
    residual = torch.zeros_like(args.x).requires_grad_()
    for output, inputs in (
        (y, [args.x]),
        (call_act(args, residual, "silu", training=True), [args.x, residual]),
    ):
        for gradient in torch.autograd.grad(output, inputs, args.dy):
            assert gradient.stride() == args.x.stride()


@MODES
@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("reduce", [torch.sum, torch.mean])
def test_expanded_grad_output(reduce, layout, training, device):
    args = arguments((3, 5, 4, 6), device=device, layout=layout)
    expected = BatchNorm(
        args.x, args.weight, args.bias, args.running_mean, args.running_var, training=training
    )
    gradients = torch.autograd.grad(reduce(call(args, training=training)), differentiable(args))
    ones = torch.ones_like(args.x)
    args.dy = ones if reduce is torch.sum else ones / ones.numel()
    check_gradients(args, expected, gradients)


@pytest.mark.parametrize("dims", [(0,), (1,), (2, 3), (0, 2)], ids=str)
def test_partly_expanded_grad_output(dims, device):
    args = arguments((3, 5, 4, 6), device=device)
    size = [1 if d in dims else n for d, n in enumerate(args.x.shape)]
    args.dy = torch.randn(size, device=device).expand(args.x.shape)
    check_call(args)


@MODES
def test_expanded_input(training, device):
    column = torch.randn(4, 5, 1, 1, device=device)
    args = arguments((4, 5, 3, 3), device=device, requires_grad=False)
    args.x = column.expand(4, 5, 3, 3)
    args.weight.requires_grad_()
    check_call(args, training=training)


@MODES
@pytest.mark.parametrize("shape", [(64, 64, 64), (64, 1, 64, 64)], ids=str)
def test_half_sums_beyond_half_range(shape, training, device):
    """262144 ones sum to more than float16 holds; the sums are kept, and with float32 parameters returned, wider."""
    args = arguments((shape[0], 1, *shape[1:]), torch.float16, torch.float32, device=device)
    args.dy = torch.ones_like(args.dy)
    check_call(args, training=training)


@MODES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_parameters_and_statistics(dtype, training, device):
    def strided(tensor):
        spread = torch.full((2 * tensor.numel(),), float("nan"), dtype=dtype, device=device)[::2]
        return spread.copy_(tensor.detach()).requires_grad_(tensor.requires_grad)

    args = arguments((4, 6, 5, 3), dtype, device=device)
    for name in ("weight", "bias", "running_mean", "running_var"):
        setattr(args, name, strided(getattr(args, name)))
    check_call(args, training=training)


@MODES
@pytest.mark.parametrize("name", ["x", "weight", "bias", "running_mean", "running_var"])
@pytest.mark.parametrize("lazily", [torch._neg_view, torch.zeros_like], ids=["negative", "zero"])
def test_tensors_that_are_not_their_memory(name, lazily, training, device):
    """Of these torch keeps the bit that says so, or no memory at all, until an operator looks."""
    args = arguments((4, 3, 5), device=device, requires_grad=False)
    plain = lazily(getattr(args, name)).resolve_neg().clone()
    expected = call(replace(args.clone(), **{name: plain}), training=training)
    if lazily is torch._neg_view:
        lazy = torch._neg_view(-plain)
    else:
        lazy = torch._efficientzerotensor(plain.shape, device=device)
    actual = call(replace(args.clone(), **{name: lazy}), training=training)
    torch.testing.assert_close(actual, expected, equal_nan=True)


def test_keyword_call_and_defaults(device):
    args = arguments((4, 6, 5, 3), device=device)
    expected = BatchNorm(args.x, None, None, args.running_mean, args.running_var, training=False)
    assert_matches(batch_norm(args.x, args.running_mean, args.running_var), expected.y, "y")
    y = batch_norm(
        input=args.x,
        running_mean=None,
        running_var=None,
        weight=args.weight,
        bias=args.bias,
        training=True,
        momentum=0.3,
        eps=1e-3,
    )
    assert_matches(y, BatchNorm(args.x, args.weight, args.bias, eps=1e-3).y, "y")


@pytest.mark.parametrize("layout", **every(LAYOUTS))
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_repeatable_to_the_bit(layout, threads):
    """One thread count, one result: no sum is taken in an order that a race could change."""
    args = arguments((7, 33, 9, 11), layout=layout)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        runs = []
        for _ in range(3):
            trial = args.clone()
            trial.x = layout(args.x.detach()).requires_grad_()
            y = call(trial, training=True)
            runs.append(
                (
                    y,
                    trial.running_mean,
                    trial.running_var,
                    *torch.autograd.grad(y, differentiable(trial), args.dy),
                )
            )
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        for first, again in zip(runs[0], run, strict=True):
            assert_bitwise(again, first)


def test_calls_from_many_threads(device):
    """The lock of the interpreter is free while kernels run: calls at once do not disturb each other."""
    data = [arguments((6, 33, 9, 11), device=device) for _ in range(4)]

    def step(args):
        trial = args.clone()
        y = call(trial, training=True)
        gradients = torch.autograd.grad(y, differentiable(trial), trial.dy)
        return [y.detach(), trial.running_mean, trial.running_var, *gradients]

    expected = [step(args) for args in data]
    with ThreadPoolExecutor(len(data)) as pool:
        for _ in range(5):
            for got, want in zip(pool.map(step, data), expected, strict=True):
                for actual, exact_value in zip(got, want, strict=True):
                    torch.testing.assert_close(actual, exact_value)


@pytest.mark.native
def test_statistics_of_an_empty_batch_are_zero(device):
    """Not what their memory held before: a sum of nothing times NaN is NaN."""
    x = torch.empty(0, 64, 3, 3, device=device)
    for _ in range(4):
        held = [torch.full((64,), torch.nan, device=device) for _ in range(4)]
        del held
        _, mean, inv_std = torch.ops.batchnorm_ext.forward(
            x, None, None, None, None, None, True, 0.1, 1e-5, False, 1
        )
        assert not mean.any()
        assert not inv_std.any()
