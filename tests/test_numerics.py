"""Where batch norm is hard: large means, constant channels, extreme magnitudes, long sums."""

from __future__ import annotations

import math

import pytest
import torch
from checks import assert_bitwise, call, check_call, check_gradients, differentiable
from inputs import (
    DTYPES,
    LAYOUTS,
    STRIDED_LAYOUTS,
    arguments,
    channels_last,
    contiguous,
    every,
    transposed,
)
from oracle import BatchNorm, Exact, exact
from tolerances import assert_matches
from torch import nn

from batchnorm_ext.functional import batch_norm, batch_norm_act

TWO_LAYOUTS = pytest.mark.parametrize("layout", [contiguous, channels_last])


def largest_error(y: torch.Tensor, expected: BatchNorm) -> float:
    return float(abs(exact(y) - expected.y.value).max())


@TWO_LAYOUTS
@pytest.mark.parametrize("ratio", [1e2, 1e4, 1e5, 1e6])
@pytest.mark.parametrize("shape", [(16, 3, 32, 32), (4099, 5)], ids=str)
def test_mean_far_larger_than_the_deviation(shape, ratio, layout, device):
    """No accuracy is lost to a large mean: the tolerance is the same as without one."""
    args = arguments(shape, device=device, layout=layout, mean=ratio, std=1.0)
    expected = BatchNorm(args.x, args.weight, args.bias)
    y = batch_norm(args.x, None, None, args.weight, args.bias, training=True)
    assert_matches(y, expected.y, "y")
    theirs = nn.functional.batch_norm(args.x, None, None, args.weight, args.bias, training=True)
    assert largest_error(y, expected) <= largest_error(theirs, expected)


SIXTEEN_BITS = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


@TWO_LAYOUTS
@SIXTEEN_BITS
@pytest.mark.parametrize("ratio", [1.0, 5.9, 6.1, 30.0])
@pytest.mark.parametrize("shape", [(16, 21, 12, 12), (700, 5), (9, 64, 7, 7)], ids=str)
def test_means_folded_into_shifts_or_not(shape, ratio, dtype, layout, device):
    """With 16 bits, means up to six deviations are folded; either way the tolerance is that of a mean of zero."""
    for training in (True, False):
        args = arguments(shape, dtype, device=device, layout=layout, mean=ratio, std=1.0)
        with torch.no_grad():
            args.running_mean.fill_(ratio)
            args.running_var.fill_(1.0)
        check_call(args, training=training)


@TWO_LAYOUTS
@pytest.mark.parametrize("value", [300.0, math.nan])
@pytest.mark.parametrize("shape", [(16, 21, 12, 12), (700, 5), (9, 64, 7, 7)], ids=str)
def test_a_channel_that_is_not_folded_leaves_the_others_their_bits(shape, value, layout, device):
    args = arguments(shape, torch.float16, device=device, layout=layout)
    others = torch.tensor([c for c in range(shape[1]) if c != 2], device=device)

    def outcome(value):
        with torch.no_grad():
            args.x[:, 2] = args.x[:, 3] if value is None else value
        y = batch_norm(args.x, None, None, args.weight, args.bias, training=True)
        results = (y, *torch.autograd.grad(y, (args.x, args.weight, args.bias), args.dy))
        return [result.index_select(min(1, result.dim() - 1), others) for result in results]

    for folded, mixed in zip(outcome(None), outcome(value), strict=True):
        assert_bitwise(mixed, folded)


@pytest.mark.parametrize("outlier", [1e3, 1e5])
def test_first_element_is_an_outlier(outlier, device):
    """A pivot taken from the data may be the worst of it."""
    args = arguments((16, 3, 32, 32), device=device)
    with torch.no_grad():
        args.x[0, :, 0, 0] = outlier
    check_call(args)


@TWO_LAYOUTS
def test_large_mean_in_eval(layout, device):
    args = arguments((16, 3, 9, 9), device=device, layout=layout, mean=1e4, std=1.0)
    args.running_mean.fill_(1e4)
    check_call(args, training=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", **every(LAYOUTS))
@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, 1e7, 3e38, 1e-40, math.pi])
def test_constant_channel_gives_exactly_the_bias(value, layout, dtype, device):
    if abs(value) > torch.finfo(dtype).max:
        value = 6e4
    args = arguments((5, 7, 3, 3), dtype, device=device, requires_grad=False)
    args.x = layout(torch.full_like(args.x, value))
    y = call(args, training=True)
    assert_bitwise(y, args.bias.view(1, 7, 1, 1).expand(y.shape))
    y = batch_norm(args.x, None, None, training=True)
    assert_bitwise(y, torch.zeros_like(y))


@TWO_LAYOUTS
@pytest.mark.parametrize("size", [3, 1000, 70001])
def test_long_constant_channel_gives_exactly_the_bias(size, layout, device):
    x = layout(torch.full((3, 2, size), 0.1, device=device))
    bias = torch.tensor([0.3, -7.7], device=device)
    mean, var = torch.zeros(2, device=device), torch.ones(2, device=device)
    y = batch_norm(x, mean, var, None, bias, training=True, momentum=1.0)
    assert_bitwise(y, bias.view(1, 2, 1).expand(y.shape))
    assert_bitwise(mean, torch.full((2,), 0.1, device=device))
    assert_bitwise(var, torch.zeros(2, device=device))


@TWO_LAYOUTS
@pytest.mark.parametrize("magnitude", [1e15, 1e18])
def test_large_magnitudes(magnitude, layout, device):
    """The squares stay within float32."""
    args = arguments((8, 3, 6, 6), device=device, layout=layout, mean=0.0, std=magnitude)
    expected = BatchNorm(args.x, args.weight, args.bias)
    y = batch_norm(args.x, None, None, args.weight, args.bias, training=True)
    assert_matches(y, expected.y, "y")


@TWO_LAYOUTS
@pytest.mark.parametrize("magnitude", [1e20, 1e30, 1e37])
def test_magnitudes_whose_squares_overflow(magnitude, layout, device):
    """The squares exceed float32 while variance and output do not, or torch gives zeros for the whole channel."""
    args = arguments((8, 3, 6, 6), device=device, layout=layout, mean=0.0, std=magnitude)
    expected = BatchNorm(args.x, args.weight, args.bias)
    y = batch_norm(args.x, None, None, args.weight, args.bias, training=True)
    assert_matches(y, expected.y, "y")
    if magnitude < 1e37:  # there the sums behind the gradients exceed float32 too
        check_gradients(args, expected, torch.autograd.grad(y, differentiable(args), args.dy))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", **every(STRIDED_LAYOUTS | {"transposed": transposed}))
def test_an_infinite_element_stays_in_its_channel(layout, dtype, training, device):
    """Sums that are not finite are looked at once more, when dx may have taken the place of what they are of."""
    args = arguments((4, 3, 5, 7), dtype, device=device, layout=layout)
    args.dy = transposed(args.dy)
    exact_gradients = BatchNorm(
        *(args.x, args.weight, args.bias, args.running_mean, args.running_var), training=training
    ).gradients(args.dy)
    with torch.no_grad():
        args.x[1, 1, 2, 3] = math.inf
    y = call(args, training=training)
    dx, dweight, dbias = torch.autograd.grad(y, differentiable(args), args.dy)
    finite = [0, 2] if training else [0, 1, 2]
    expected = Exact(
        *(part[:, finite] for part in (exact_gradients[0].value, exact_gradients[0].scale))
    )
    assert_matches(dx[:, finite], expected, "dx")
    expected = Exact(
        *(part[[0, 2]] for part in (exact_gradients[1].value, exact_gradients[1].scale))
    )
    assert_matches(dweight[[0, 2]], expected, "dweight")
    assert_matches(dbias, exact_gradients[2], "dbias")
    if training:
        assert dx[:, 1].isnan().all()
        assert dweight[1].isnan()
    else:
        assert dweight[1] == math.copysign(math.inf, args.dy[1, 1, 2, 3])


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7F800001, -1, -0x7FFFFF], ids=hex)
@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("activation", ["identity", "relu", "silu"])
@TWO_LAYOUTS
def test_nan_of_any_bits_is_nan(layout, activation, dtype, name, bits, device):
    """Also one whose bits a rounding to 16 bits would carry over into those of a number."""
    args = arguments((3, 67, 5, 13), dtype, device=device, layout=layout)
    vectors = {
        each: torch.rand(67, device=device) + 0.5
        for each in ("running_mean", "running_var", "weight", "bias")
    }
    training = name in ("weight", "bias")
    residual = args.dy.flip(0) if activation == "relu" else None
    results = []
    for nan in (torch.tensor(bits, dtype=torch.int32).view(torch.float32), math.nan):
        given = {each: vector.clone() for each, vector in vectors.items()}
        given[name][1] = nan
        x = args.x.detach().requires_grad_()
        y = batch_norm_act(x, **given, training=training, residual=residual, activation=activation)
        results.append((y.detach(), *torch.autograd.grad(y, x, args.dy)))
    for actual, expected in zip(*results, strict=True):
        assert_bitwise(actual, expected)
    assert bool(results[0][0][:, 1].isnan().all())


@TWO_LAYOUTS
@pytest.mark.parametrize("magnitude", [1e-20, 1e-38, 1e-42])
def test_tiny_and_subnormal_inputs(magnitude, layout, device):
    """Far below eps the output is the input over sqrt(eps): small, not lost."""
    args = arguments((8, 3, 6, 6), device=device, layout=layout, mean=0.0, std=magnitude)
    expected = BatchNorm(args.x, args.weight, None)
    y = batch_norm(args.x, None, None, args.weight, None, training=True)
    error = abs(exact(y) - expected.y.value)
    # Subnormal steps of the input, multiplied by 1 / sqrt(eps).
    step = torch.finfo(torch.float32).smallest_normal * torch.finfo(torch.float32).eps * 400
    assert (error <= 1e-6 * abs(expected.y.value).max() + step).all()


def test_half_extremes(device):
    args = arguments(
        (8, 3, 16, 16), torch.float16, torch.float32, device=device, mean=0.0, std=1.5e4
    )
    with torch.no_grad():
        args.x.clamp_(-65504, 65504)
    check_call(args)


def test_output_beyond_half_is_infinite(device):
    """As torch: a result that float16 cannot hold is infinity, not a wrapped number."""
    x = torch.tensor([[-1.0], [1.0]], dtype=torch.float16, device=device)
    weight = torch.tensor([1e6], device=device)
    y = batch_norm(x, None, None, weight, None, training=True)
    assert y.isinf().all()
    assert y[0] < 0 < y[1]


def test_gradient_of_half_parameters_overflows_as_torchs(device):
    x = torch.randn(64, 1, 64, 64, dtype=torch.float16, device=device)
    bias = torch.zeros(1, dtype=torch.float16, device=device, requires_grad=True)
    batch_norm(x, None, None, None, bias, training=True).backward(torch.ones_like(x))
    assert bias.grad.isposinf().all()


@TWO_LAYOUTS
def test_zero_variance_gradients(layout, device):
    args = arguments((6, 4, 5, 5), device=device, layout=layout)
    with torch.no_grad():
        args.x[:, 1] = 3.0
    y = call(args, training=True, eps=1e-3)
    expected = BatchNorm(args.x, args.weight, args.bias, eps=1e-3)
    for gradient, exact_gradient, name in zip(
        torch.autograd.grad(y, differentiable(args), args.dy),
        expected.gradients(args.dy),
        ("dx", "dweight", "dbias"),
        strict=True,
    ):
        assert_matches(gradient, exact_gradient, name)


@TWO_LAYOUTS
def test_long_sums(layout, device):
    """Two million samples of a positive gradient, where one running sum would lose the last digits of every term."""
    args = arguments((32, 1, 256, 256), device=device, layout=layout, mean=3.0, std=0.5)
    args.dy = args.dy.abs() + 1.0
    check_call(args)


@TWO_LAYOUTS
@pytest.mark.parametrize("mean", [100.0, 1e4])
def test_gradients_under_a_large_mean(mean, layout, device):
    check_call(arguments((16, 3, 32, 32), device=device, layout=layout, mean=mean, std=1.0))


def test_weight_extremes(device):
    args = arguments((6, 4, 5, 5), device=device)
    with torch.no_grad():
        args.weight.copy_(torch.tensor([0.0, -1.0, 1e-30, 1e20]))
    check_call(args)


def test_gradient_sums_to_zero_in_training(device):
    """Shifting or scaling a channel changes no output, so dx is orthogonal to both directions."""
    args = arguments((16, 4, 8, 8), torch.float64, device=device)
    y = batch_norm(args.x, None, None, args.weight, None, training=True, eps=1e-30)
    (dx,) = torch.autograd.grad(y, args.x, args.dy)
    torch.testing.assert_close(
        dx.sum((0, 2, 3)), torch.zeros(4, dtype=torch.float64, device=device), rtol=0, atol=1e-12
    )
    projected = (dx * args.x.detach()).sum((0, 2, 3))
    torch.testing.assert_close(
        projected, torch.zeros(4, dtype=torch.float64, device=device), rtol=0, atol=1e-12
    )


@TWO_LAYOUTS
def test_training_output_is_normalised(layout, device):
    args = arguments(
        (32, 8, 16, 16), torch.float64, device=device, layout=layout, mean=7.0, std=3.0
    )
    y = batch_norm(args.x, None, None, training=True, eps=1e-30).detach()
    torch.testing.assert_close(
        y.mean((0, 2, 3)), torch.zeros(8, dtype=torch.float64, device=device), rtol=0, atol=1e-14
    )
    torch.testing.assert_close(
        y.var((0, 2, 3), correction=0),
        torch.ones(8, dtype=torch.float64, device=device),
        rtol=1e-13,
        atol=0,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_two_nearly_equal_samples(dtype, device):
    """The variance is far below eps and made of the last bit."""
    step = torch.finfo(dtype).eps
    x = torch.tensor([[1.0], [1.0 + step]], dtype=dtype, device=device)
    y = batch_norm(x, None, None, training=True, eps=step * step)
    expected = BatchNorm(x, eps=step * step)
    assert_matches(y, expected.y, "y")
