"""The data of one case on one device, and the float64 truth that contenders are checked against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from .shapes import DTYPES, Case

EPS = 1e-5
MOMENTUM = 0.1
CHECKED_ELEMENTS = 1 << 22

# Fused calls: a ReLU's argument within rounding of zero may fall on either side of it, and takes
# its whole gradient along. That is the square root of as many elements as rounding is relative.
TOLERANCE_OF_RELU: dict[str, float] = {
    "float64": 1e-6,
    "float32": 5e-3,
    "float16": 5e-2,
    "bfloat16": 1e-1,
}

# Relative error allowed in the Euclidean norm: above what rounding the result to the dtype and the
# order of summation cost, below what a wrong formula costs.
TOLERANCE: dict[str, float] = {
    "float64": 1e-10,
    "float32": 3e-5,
    "float16": 2e-3,
    "bfloat16": 1e-2,
}


@dataclass
class Problem:
    """Tensors of a case; `x` and `dy` hold one entry per rotated buffer."""

    case: Case
    device: str
    x: list[Tensor]
    dy: list[Tensor]
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    momentum: float = MOMENTUM
    eps: float = EPS
    _initial: tuple[Tensor, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self._initial = (self.running_mean.clone(), self.running_var.clone())

    @cached_property
    def residual(self) -> list[Tensor]:
        """What fused calls add: one tensor per rotated buffer, made when first asked for."""
        return [one.flip(0) for one in self.dy]

    def reset(self) -> None:
        """Put the running statistics back to where they started."""
        self.running_mean.copy_(self._initial[0])
        self.running_var.copy_(self._initial[1])

    @property
    def buffers(self) -> int:
        return len(self.x)


def make_problem(case: Case, device: str, buffers: int = 1, seed: int = 0) -> Problem:
    """Random data, each channel of its own mean and scale; fp32 parameters for 16-bit data."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = DTYPES[case.dtype]
    compute = torch.promote_types(dtype, torch.float32)
    channels = case.channels
    per_channel = (1, channels, *(1,) * (len(case.shape) - 2))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=compute)

    def uniform(low: float, high: float) -> Tensor:
        span = torch.rand(channels, generator=generator, device=device, dtype=compute)
        return low + (high - low) * span

    mean, std = normal(channels).view(per_channel), uniform(0.5, 2.0).view(per_channel)

    def activations(mean: Tensor | float, std: Tensor | float) -> list[Tensor]:
        first = (normal(*case.shape) * std + mean).to(dtype)
        first = first.contiguous(memory_format=case.memory_format)
        return [first, *(first.clone() for _ in range(buffers - 1))]

    return Problem(
        case=case,
        device=device,
        x=activations(mean, std),
        dy=activations(0.0, 1.0),
        weight=uniform(0.5, 1.5),
        bias=normal(channels),
        running_mean=normal(channels),
        running_var=uniform(0.5, 2.0),
    )


def checked_channels(case: Case) -> list[int]:
    """Channels the truth is computed for: all of a small tensor, a spread of a large one."""
    samples = case.bytes // DTYPES[case.dtype].itemsize // case.channels
    wanted = min(case.channels, max(2, CHECKED_ELEMENTS // max(1, samples)))
    if wanted >= case.channels:
        return list(range(case.channels))
    return sorted({round(i * (case.channels - 1) / (wanted - 1)) for i in range(wanted)})


def truth(problem: Problem, op: str) -> dict[str, Tensor]:
    """Results of `op` in float64 for `checked_channels`, from the current running statistics."""
    picks = checked_channels(problem.case)

    def rows(tensor: Tensor) -> Tensor:
        return tensor[:, picks].double().transpose(0, 1).flatten(1)

    def column(tensor: Tensor) -> Tensor:
        return tensor[picks].double().unsqueeze(1)

    x, weight, bias = rows(problem.x[0]), column(problem.weight), column(problem.bias)
    running_mean, running_var = column(problem.running_mean), column(problem.running_var)
    samples = x.shape[1]
    if op == "eval":
        inv_std = (running_var + problem.eps).rsqrt()
        return {"y": (x - running_mean) * inv_std * weight + bias}

    mean = x.mean(1, keepdim=True)
    centred = x - mean
    m2 = centred.square().sum(1, keepdim=True)
    inv_std = (m2 / samples + problem.eps).rsqrt()
    xhat = centred * inv_std
    if op == "forward":
        unbiased = m2 / max(1, samples - 1)
        return {
            "y": xhat * weight + bias,
            "running_mean": torch.lerp(running_mean, mean, problem.momentum),
            "running_var": torch.lerp(running_var, unbiased, problem.momentum),
        }
    dy = rows(problem.dy[0])
    fused = {}
    if op == "act_forward_backward":
        dy = dy * (xhat * weight + bias + rows(problem.residual[0]) > 0)
        fused["dresidual"] = dy
    dweight, dbias = (dy * xhat).sum(1, keepdim=True), dy.sum(1, keepdim=True)
    dx = weight * inv_std * (dy - (dbias + xhat * dweight) / samples)
    return {"dx": dx, "dweight": dweight, "dbias": dbias} | fused


def errors(problem: Problem, results: Mapping[str, Tensor], op: str) -> dict[str, float]:
    """Relative error of each result against `truth`, in the Euclidean norm.

    The running statistics of the problem must be what the results were computed from (`reset`).
    """
    picks = checked_channels(problem.case)
    expected = truth(problem, op)
    found = {}
    for name, value in results.items():
        flat = value[:, picks].transpose(0, 1).flatten(1) if value.dim() > 1 else value[picks]
        difference = flat.double().reshape(expected[name].shape) - expected[name]
        found[name] = float(difference.norm() / expected[name].norm().clamp_min(1e-300))
    return found


def wrong(problem: Problem, results: Mapping[str, Tensor], op: str) -> str | None:
    """Why results are not those of batch norm, or None where they are."""
    table = TOLERANCE_OF_RELU if op == "act_forward_backward" else TOLERANCE
    tolerance = table[problem.case.dtype]
    for name, value in results.items():
        of_x = name in ("y", "dx", "dresidual")
        expected = problem.x[0].shape if of_x else problem.weight.shape
        if value.shape != expected:
            return f"{name} has shape {list(value.shape)}, expected {list(expected)}"
    for name, error in errors(problem, results, op).items():
        if not error <= tolerance:
            return f"{name} is off by {error:.1e}, allowed {tolerance:.0e}"
    return None
