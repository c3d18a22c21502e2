"""Random calls against the oracle: whatever shape, strides, dtypes, flags and values hypothesis comes up with."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import pytest
import torch
from checks import (
    assert_bitwise,
    call,
    check_call,
    check_call_act,
    differentiable,
    exact_act,
)
from inputs import Arguments, arguments, channels_last
from oracle import BatchNorm
from tolerances import assert_matches

from batchnorm_ext._reference import ACTIVATIONS

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

EXAMPLES = int(os.environ.get("BATCHNORM_EXT_TEST_EXAMPLES", "100"))
bounded = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.filter_too_much,
        HealthCheck.function_scoped_fixture,  # a device is the same for all examples
    ],
)
DTYPE_PAIRS = [
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
]
shapes = st.tuples(
    st.integers(1, 9), st.integers(1, 40), st.lists(st.integers(1, 9), max_size=3).map(tuple)
).map(lambda parts: (*parts[:2], *parts[2]))


@dataclass(frozen=True)
class Strides:
    """Any order of dimensions, with gaps and an offset, for a tensor of ``len(order)`` dimensions."""

    order: tuple[int, ...]
    steps: tuple[int, ...]
    offset: int

    def applied_to(self, x: torch.Tensor) -> torch.Tensor:
        sizes = [x.shape[d] * step for d, step in zip(self.order, self.steps, strict=True)]
        storage = torch.full(
            (math.prod(sizes) + self.offset,), math.nan, dtype=x.dtype, device=x.device
        )
        view = storage[self.offset :].view(sizes)[
            tuple(slice(None, None, step) for step in self.steps)
        ]
        target = view.permute([self.order.index(d) for d in range(x.dim())])
        return target.copy_(x.detach()).requires_grad_(x.requires_grad)


@dataclass(frozen=True)
class Call:
    """One call, small enough to print; ``arguments`` makes its tensors."""

    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, torch.dtype]
    mean: float
    std: float
    seed: int
    present: tuple[bool, bool, bool]
    wanted: tuple[bool, bool, bool]
    strides: tuple[Strides, Strides]
    options: dict[str, object]

    def arguments(self, device: str) -> Arguments:
        torch.manual_seed(self.seed)
        weight, bias, running = self.present
        args = arguments(
            self.shape,
            *self.dtypes,
            device=device,
            weight=weight,
            bias=bias,
            running=running,
            mean=self.mean,
            std=self.std,
        )
        args.x, args.dy = self.strides[0].applied_to(args.x), self.strides[1].applied_to(args.dy)
        for tensor, want in zip((args.x, args.weight, args.bias), self.wanted, strict=True):
            if tensor is not None:
                tensor.requires_grad_(want)
        return args


def strides(rank: int) -> st.SearchStrategy[Strides]:
    return st.builds(
        Strides,
        st.permutations(range(rank)).map(tuple),
        st.tuples(*[st.sampled_from([1, 1, 1, 2, 3])] * rank),
        st.integers(0, 3),
    )


@st.composite
def calls(draw, training: bool | None = None) -> Call:
    shape = draw(shapes)
    training = draw(st.booleans()) if training is None else training
    assume(not training or shape[0] * math.prod(shape[2:]) > 1)
    flags = st.tuples(st.booleans(), st.booleans(), st.booleans())
    present = draw(flags)
    return Call(
        shape=shape,
        dtypes=draw(st.sampled_from(DTYPE_PAIRS)),
        mean=draw(st.sampled_from([0.0, 0.5, -20.0])),
        std=draw(st.sampled_from([1.0, 0.01, 30.0])),
        seed=draw(st.integers(0, 2**31)),
        present=(*present[:2], present[2] or not training),
        wanted=draw(flags),
        strides=(draw(strides(len(shape))), draw(strides(len(shape)))),
        options={
            "training": training,
            "momentum": draw(st.sampled_from([0.1, 0.0, 1.0, -0.7, 0.999])),
            "eps": draw(st.sampled_from([1e-5, 1e-3, 1.0])),
        },
    )


@bounded
@given(calls())
def test_any_call_matches_the_oracle(device, drawn):
    check_call(drawn.arguments(device), **drawn.options)


@dataclass(frozen=True)
class Epilogue:
    """What a fused call adds to a call; ``arguments`` makes its residual."""

    activation: str
    negative_slope: float
    inplace: bool
    residual: Strides | None
    wanted: bool

    @property
    def options(self) -> dict[str, object]:
        return {"negative_slope": self.negative_slope, "inplace": self.inplace}

    def residual_of(self, args: Arguments) -> torch.Tensor | None:
        if self.residual is None:
            return None
        values = torch.randn(args.x.shape, dtype=torch.float64).to(args.x)
        return self.residual.applied_to(values).requires_grad_(self.wanted)


@st.composite
def epilogues(draw, rank: int) -> Epilogue:
    activation = draw(st.sampled_from(ACTIVATIONS))
    slope = draw(st.sampled_from([0.01, 0.3, 5.0, 0.0, -0.5]))
    invertible = activation in ("identity", "elu") or (activation == "leaky_relu" and slope > 0)
    return Epilogue(
        activation=activation,
        negative_slope=slope,
        inplace=invertible and draw(st.booleans()),
        residual=draw(st.none() | strides(rank)),
        wanted=draw(st.booleans()),
    )


fused_calls = calls().flatmap(lambda drawn: st.tuples(st.just(drawn), epilogues(len(drawn.shape))))


@bounded
@given(fused_calls)
def test_any_fused_call_matches_the_oracle(device, drawn):
    plain, epilogue = drawn
    args = plain.arguments(device)
    residual = epilogue.residual_of(args)
    options = plain.options | epilogue.options
    # Where u is nearer to a jump of the derivative than its rounding, either gradient is right.
    margin = 1e-13 if args.x.dtype == torch.float64 else 1e-6
    assume(exact_act(args, residual, epilogue.activation, **options).clearance() > margin)
    check_call_act(args, residual, epilogue.activation, **options)


@bounded
@given(calls(training=True), st.integers(2, 4))
def test_several_batches_move_the_statistics_as_the_oracle_does(device, drawn, count):
    args, options = drawn.arguments(device), drawn.options
    assume(args.running_mean is not None)
    for _ in range(count):
        expected = BatchNorm(args.x, None, None, args.running_mean, args.running_var, **options)
        call(args, **options)
        assert_matches(args.running_mean, expected.running_mean, "running_mean", args.x.dtype)
        assert_matches(args.running_var, expected.running_var, "running_var", args.x.dtype)


@bounded
@given(shapes, st.sampled_from(DTYPE_PAIRS), st.floats(-1e4, 1e4), st.booleans())
def test_constant_channels_give_exactly_the_bias(device, shape, dtypes, value, last):
    assume(shape[0] * math.prod(shape[2:]) > 1)
    args = arguments(shape, *dtypes, device=device, requires_grad=False)
    args.x.fill_(value)
    if last:
        args.x = channels_last(args.x)
    bias = args.bias.to(dtypes[0]).view(1, -1, *[1] * (len(shape) - 2)).expand(shape)
    assert_bitwise(call(args, training=True), bias)


@bounded
@given(calls())
def test_repeated_calls_agree_to_the_bit(device, drawn):
    runs = []
    for _ in range(2):
        args = drawn.arguments(device)
        y = call(args, **drawn.options)
        gradients = torch.autograd.grad(y, differentiable(args), args.dy) if y.requires_grad else ()
        runs.append(
            [y, *gradients, *(t for t in (args.running_mean, args.running_var) if t is not None)]
        )
    for first, second in zip(*runs, strict=True):
        assert_bitwise(first, second)
