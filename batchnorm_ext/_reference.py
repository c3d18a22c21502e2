"""The native module's functions in plain PyTorch: the path that works where nothing could be compiled.

Every function has the signature, the results and the errors of its namesake in the native module. Sums are kept in
float32 (float64 for float64 inputs) as there; speed is torch's own elementwise speed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._version import __version__

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_SCALAR_TYPE_NAMES = {
    torch.float64: "Double",
    torch.float32: "Float",
    torch.float16: "Half",
    torch.bfloat16: "BFloat16",
    torch.int64: "Long",
    torch.int32: "Int",
}


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that sums over elements of `dtype` are kept and saved in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def reduced_dims(input: Tensor) -> list[int]:
    """Return the dimensions that statistics run over: all but the channel dimension, 1."""
    return [dim for dim in range(input.dim()) if dim != 1]


def per_channel(vector: Tensor, like: Tensor) -> Tensor:
    """Return `vector`, of shape (C,), viewed so that it broadcasts along dimension 1 of `like`."""
    return vector.view([1, -1] + [1] * (like.dim() - 2))


def _name(dtype: torch.dtype) -> str:
    return _SCALAR_TYPE_NAMES.get(dtype, str(dtype).removeprefix("torch."))


def _check_channel_vector(name: str, vector: Tensor | None, input: Tensor) -> None:
    if vector is None:
        return
    channels = input.size(1)
    if vector.numel() != channels:
        raise RuntimeError(f"{name} should contain {channels} elements not {vector.numel()}")
    if vector.dim() != 1:
        raise RuntimeError(
            f"{name} must have shape [{channels}] (channels of input), got {list(vector.shape)}"
        )
    if vector.device != input.device:
        raise RuntimeError(
            f"{name} must be on {input.device} (the device of input), got {vector.device}"
        )
    accumulate = accumulate_dtype(input.dtype)
    if vector.dtype not in (input.dtype, accumulate):
        raise RuntimeError(
            f"mixed dtype ({input.device.type.upper()}): expect parameter to have scalar type of "
            f"{_name(accumulate)}, but {name} has {_name(vector.dtype)} for an input of {_name(input.dtype)}"
        )


def _check_input(input: Tensor) -> None:
    if input.dim() < 2:
        raise RuntimeError(f"input must have shape (N, C, ...), got {list(input.shape)}")
    if input.dtype not in _DTYPES:
        raise NotImplementedError(f"\"batch_norm\" not implemented for '{_name(input.dtype)}'")


def _check_counter(counter: Tensor | None, input: Tensor) -> None:
    if counter is None:
        return
    if counter.dtype != torch.int64 or counter.numel() != 1:
        raise RuntimeError(
            "num_batches_tracked must be one value of type Long, got shape "
            f"{list(counter.shape)} of type {_name(counter.dtype)}"
        )
    if counter.device != input.device:
        raise RuntimeError(
            f"num_batches_tracked must be on {input.device} (the device of input), got {counter.device}"
        )


def batch_statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, biased variance and ``1 / sqrt(variance + eps)`` of each channel in float64, differentiably."""
    variance, mean = torch.var_mean(x.to(torch.float64), reduced_dims(x), correction=0)
    return mean, variance, (variance + eps).rsqrt()


def _update_running_statistics(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    unbiased_variance: Tensor,
    momentum: float | Tensor,
    skip_nonfinite: bool,
) -> None:
    for running, batch in ((running_mean, mean), (running_var, unbiased_variance)):
        updated = running.to(torch.float64) * (1 - momentum) + batch * momentum
        if skip_nonfinite:
            finite = mean.isfinite() & unbiased_variance.isfinite()
            updated = torch.where(finite, updated, running.to(updated.dtype))
        running.copy_(updated)


@torch.no_grad()
def forward(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    skip_nonfinite: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise `input`; in training also update the running statistics. Return (output, mean, inv_std)."""
    _check_input(input)
    for name, vector in (
        ("running_mean", running_mean),
        ("running_var", running_var),
        ("weight", weight),
        ("bias", bias),
    ):
        _check_channel_vector(name, vector, input)
    _check_counter(num_batches_tracked, input)
    tracked = training and running_mean is not None and running_var is not None
    if not training and running_mean is None:
        raise RuntimeError("running_mean must be defined in evaluation mode")
    if not training and running_var is None:
        raise RuntimeError("running_var must be defined in evaluation mode")
    if tracked and momentum is None and num_batches_tracked is None:
        raise RuntimeError("momentum=None needs num_batches_tracked")

    channels = input.size(1)
    samples = input.numel() // channels if channels else 0
    accumulate = accumulate_dtype(input.dtype)
    if training and num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    if training and samples > 0:
        mean, variance, inv_std = batch_statistics(input, eps)
        if tracked:
            factor = 1.0 / num_batches_tracked.double() if momentum is None else momentum
            unbiased = variance * samples / (samples - 1) if samples > 1 else variance / 0.0
            _update_running_statistics(
                running_mean, running_var, mean, unbiased, factor, skip_nonfinite
            )
    elif training:
        mean = torch.zeros(channels, dtype=torch.float64, device=input.device)
        inv_std = torch.zeros_like(mean)
    else:
        mean = running_mean.to(torch.float64, copy=True)  # saved: must not change with the buffer
        inv_std = (running_var.to(torch.float64) + eps).rsqrt()

    # As in the kernels: what rounding the mean to the accumulate dtype dropped goes into the shift.
    scale = inv_std if weight is None else inv_std * weight
    rounded = mean.to(accumulate)
    residue = torch.nan_to_num(mean - rounded, nan=0.0) if training else mean - rounded
    shift = -residue * scale if bias is None else bias - residue * scale
    centred = input.to(accumulate) - per_channel(rounded, input)
    output = torch.addcmul(
        per_channel(shift.to(accumulate), input), centred, per_channel(scale.to(accumulate), input)
    )
    layout = torch.empty_like(dense(input))
    return layout.copy_(output), rounded, inv_std.to(accumulate)


def backward(
    grad_output: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    mean: Tensor,
    inv_std: Tensor,
    training: bool,
    need_dx: bool,
    dweight_dtype: torch.dtype | None,
    dbias_dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients (dx, dweight, dbias) of `forward`, None where not asked for.

    Built of differentiable operations: with `mean` and `inv_std` computed from `input` by `batch_statistics`, its
    own gradients are the second derivatives of batch norm.
    """
    _check_input(grad_output)
    _check_channel_vector("weight", weight, grad_output)
    need_x = dweight_dtype is not None or (training and need_dx)
    accumulate = mean.dtype
    dims = reduced_dims(grad_output)
    dy = grad_output.to(accumulate)
    scale = inv_std if weight is None else inv_std * weight
    xhat = None
    if need_x:
        if input is None:
            raise RuntimeError("input is needed for the gradients asked for")
        if input.shape != grad_output.shape:
            raise RuntimeError(
                f"grad_output must have the shape of input {list(input.shape)}, got {list(grad_output.shape)}"
            )
        xhat = (input.to(accumulate) - per_channel(mean, input)) * per_channel(inv_std, input)
    dx = dweight = dbias = None
    if need_dx:
        if xhat is not None and training and grad_output.numel() > 0:
            correction = dy.mean(dims, keepdim=True) + xhat * (dy * xhat).mean(dims, keepdim=True)
            dx = (dy - correction) * per_channel(scale, dy)
        else:
            dx = dy * per_channel(scale, dy)
        dx = dx.to(grad_output.dtype)
        layout = torch.empty_like(dense(grad_output if input is None else input))
        if dx.stride() != layout.stride() and not torch.is_grad_enabled():
            dx = layout.copy_(dx)
    if dweight_dtype is not None and xhat is not None:
        dweight = (dy * xhat).sum(dims).to(dweight_dtype)
    if dbias_dtype is not None:
        dbias = dy.sum(dims).to(dbias_dtype)
    return dx, dweight, dbias


def dense(tensor: Tensor) -> Tensor:
    if torch.ops.aten.is_non_overlapping_and_dense(tensor):
        return tensor
    # torch's own choice for batch norm: the input's suggested memory format.
    return tensor.contiguous(memory_format=torch._prims_common.suggest_memory_format(tensor))


def build_info() -> dict[str, str]:
    """Describe this path with the keys of the native module's function of the same name."""
    return {
        "version": __version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "arch_list": "",
        "instruction_set": "torch",
        "compiler": "",
        "source_hash": "",
    }
