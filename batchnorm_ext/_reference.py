"""The native module's functions in plain PyTorch: the path that works where nothing could be compiled.

Every function has the signature, the results and the errors of its namesake in the native module. Sums are kept in
float32 (float64 for float64 inputs) as there; speed is torch's own elementwise speed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ._version import __version__

# What may follow batch norm in its kernels; the definitions are those of torch.nn.functional.
ACTIVATIONS = ("identity", "relu", "relu6", "leaky_relu", "elu", "silu", "hardswish")

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


def check_channel_vector(name: str, vector: Tensor | None, input: Tensor) -> None:
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


def check_channel_vectors(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
) -> None:
    for name, vector in (
        ("running_mean", running_mean),
        ("running_var", running_var),
        ("weight", weight),
        ("bias", bias),
    ):
        check_channel_vector(name, vector, input)


def _check_written(name: str, buffer: Tensor | None) -> None:
    if buffer is not None and any(
        size > 1 and stride == 0 for size, stride in zip(buffer.shape, buffer.stride(), strict=True)
    ):
        raise RuntimeError(
            f"{name} is updated, and so must have memory for each of its elements, got strides "
            f"{list(buffer.stride())}; clone() it"
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
    mean, variance = _mean_and_variance(x)
    return mean, variance, (variance + eps).rsqrt()


def _mean_and_variance(x: Tensor) -> tuple[Tensor, Tensor]:
    wide, dims = x.to(torch.float64), reduced_dims(x)
    variance, mean = torch.var_mean(wide, dims, correction=0, keepdim=True)
    if x.dtype == torch.float64:
        # Updated value by value, a mean collects roundings, which show where it is of no wider type.
        mean = mean + (wide - mean).mean(dims, keepdim=True)
    # And it becomes inf - inf = NaN where the mean of all values is infinite.
    mean = torch.where(mean.isnan(), wide.mean(dims, keepdim=True), mean)
    return mean.flatten(), variance.flatten()


def _factor(momentum: float | None, counter: Tensor | None) -> float | Tensor:
    """Return the weight of this batch in the running statistics; `counter` counts it already."""
    if momentum is not None:
        return momentum
    if counter is None:
        raise RuntimeError("momentum=None needs num_batches_tracked")
    return 1.0 / counter.double()


def update_running_statistics(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    variance: Tensor,
    momentum: float | Tensor,
    skip_nonfinite: bool,
) -> None:
    """Move the running statistics towards the batch's by the share `momentum`, in place."""
    for running, batch in ((running_mean, mean), (running_var, variance)):
        updated = running.to(batch.dtype) * (1 - momentum) + batch * momentum
        if skip_nonfinite:
            finite = mean.isfinite() & variance.isfinite()
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
    correction: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise `input`; in training also update the running statistics. Return (output, mean, inv_std)."""
    statistics = _statistics(
        input,
        weight,
        bias,
        running_mean,
        running_var,
        num_batches_tracked,
        training,
        momentum,
        eps,
        skip_nonfinite,
        correction,
    )
    u, mean, inv_std, _ = _normalized(input, weight, bias, *statistics)
    return _stored(u, input), mean, inv_std


@torch.no_grad()
def forward_act(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    skip_nonfinite: bool,
    correction: int,
    activation: str,
    negative_slope: float,
    with_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Do `forward`, add `residual` and apply the activation. Return (output, mean, inv_std, shift, mask).

    The mask has one bit for each element, set where relu, relu6 or leaky_relu lets it pass.
    """
    check_residual(residual, input)
    check_activation(activation)
    statistics = _statistics(
        input,
        weight,
        bias,
        running_mean,
        running_var,
        num_batches_tracked,
        training,
        momentum,
        eps,
        skip_nonfinite,
        correction,
    )
    normalized = _normalized(input, weight, bias, *statistics)
    return _activated(input, residual, *normalized, activation, negative_slope, with_mask)


def _activated(
    input: Tensor,
    residual: Tensor | None,
    u: Tensor,
    mean: Tensor,
    inv_std: Tensor,
    shift: Tensor,
    activation: str,
    negative_slope: float,
    with_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    if residual is not None:
        u = u + residual
    mask = _packed(_passes(u, activation)) if with_mask else None
    return _stored(activate(u, activation, negative_slope), input), mean, inv_std, shift, mask


def _statistics(
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
    correction: int,
) -> tuple[Tensor, Tensor]:
    """Check the arguments of a call, and return the mean and inv_std that normalise, in float64."""
    _check_input(input)
    check_channel_vectors(input, running_mean, running_var, weight, bias)
    _check_counter(num_batches_tracked, input)
    if training:
        _check_written("running_mean", running_mean)
        _check_written("running_var", running_var)
    tracked = training and running_mean is not None and running_var is not None
    if not training and running_mean is None:
        raise RuntimeError("running_mean must be defined in evaluation mode")
    if not training and running_var is None:
        raise RuntimeError("running_var must be defined in evaluation mode")
    if tracked and momentum is None and num_batches_tracked is None:
        raise RuntimeError("momentum=None needs num_batches_tracked")

    channels = input.size(1)
    samples = input.numel() // channels if channels else 0
    if training and num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    if training and samples > 0:
        mean, variance, inv_std = batch_statistics(input, eps)
        if running_mean is not None and running_var is not None:
            factor = _factor(momentum, num_batches_tracked)
            degrees = samples - correction
            batch_variance = variance * samples / degrees if degrees > 0 else variance / 0.0
            update_running_statistics(
                running_mean, running_var, mean, batch_variance, factor, skip_nonfinite
            )
    elif training:
        mean = torch.zeros(channels, dtype=torch.float64, device=input.device)
        inv_std = torch.zeros_like(mean)
    else:
        assert running_mean is not None
        assert running_var is not None
        mean = running_mean.to(torch.float64, copy=True)  # saved: must not change with the buffer
        inv_std = (running_var.to(torch.float64) + eps).rsqrt()
    return mean, inv_std


def _normalized(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, inv_std: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (u, mean, inv_std, shift) in the accumulate dtype; u is what is left to round, or to activate."""
    accumulate = accumulate_dtype(input.dtype)
    # As in the kernels: what rounding the mean to the accumulate dtype dropped goes into the shift.
    rounded_mean, rounded_inv_std = mean.to(accumulate), inv_std.to(accumulate)
    scale = _scale(rounded_inv_std, weight)
    residue = torch.nan_to_num(mean - rounded_mean, nan=0.0)
    shift = (-residue * scale if bias is None else bias - residue * scale).to(accumulate)
    u = affine(input, rounded_mean, scale.to(accumulate), shift)
    return u, rounded_mean, rounded_inv_std, shift


def _scale(inv_std: Tensor, weight: Tensor | None) -> Tensor:
    # Of the rounded inv_std, which is all that backward knows; in float64.
    return inv_std.double() if weight is None else inv_std.double() * weight


def affine(input: Tensor, mean: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Return ``(input - mean) * scale + shift`` for vectors in the accumulate dtype, in that dtype."""
    centred = input.to(mean.dtype) - per_channel(mean, input)
    return torch.addcmul(per_channel(shift, input), centred, per_channel(scale, input))


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
    check_channel_vector("weight", weight, grad_output)
    dy = grad_output.to(mean.dtype)
    return gradients(
        dy, grad_output, input, weight, mean, inv_std, training, need_dx, dweight_dtype, dbias_dtype
    )


def gradients(
    dy: Tensor,
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
    """Return (dx, dweight, dbias) for `dy` in the accumulate dtype; dx is stored as `grad_output` is."""
    need_x = dweight_dtype is not None or (training and need_dx)
    dims = reduced_dims(grad_output)
    scale = inv_std if weight is None else inv_std * weight
    xhat = None
    if need_x:
        if input is None:
            raise RuntimeError("input is needed for the gradients asked for")
        if input.shape != grad_output.shape:
            raise RuntimeError(
                f"grad_output must have the shape of input {list(input.shape)}, got {list(grad_output.shape)}"
            )
        xhat = (input.to(mean.dtype) - per_channel(mean, input)) * per_channel(inv_std, input)
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


@torch.no_grad()
def backward_act(
    grad_output: Tensor,
    input: Tensor | None,
    residual: Tensor | None,
    weight: Tensor | None,
    mean: Tensor,
    inv_std: Tensor,
    shift: Tensor,
    mask: Tensor | None,
    strides: Sequence[int],
    training: bool,
    need_dx: bool,
    need_dresidual: bool,
    dweight_dtype: torch.dtype | None,
    dbias_dtype: torch.dtype | None,
    activation: str,
    negative_slope: float,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients (dx, dresidual, dweight, dbias) of `forward_act`, None where not asked for.

    `mask` takes the place of `input`, `residual` and `weight` where the activation's derivative is all that they are
    needed for. `strides` are those of the output.
    """
    _check_input(grad_output)
    check_residual(residual, grad_output)
    check_channel_vector("weight", weight, grad_output)
    check_activation(activation)
    saved = (input, residual, weight, mean, inv_std, shift, mask)
    dy = grad_output * _derivative(grad_output, *saved, activation, negative_slope)
    layout = grad_output
    if input is None and grad_output.stride() != tuple(strides):
        layout = grad_output.new_empty_strided(grad_output.shape, strides)
    dx, dweight, dbias = gradients(
        dy, layout, input, weight, mean, inv_std, training, need_dx, dweight_dtype, dbias_dtype
    )
    dresidual = _stored(dy, layout if input is None else input) if need_dresidual else None
    return dx, dresidual, dweight, dbias


def _derivative(
    grad_output: Tensor,
    input: Tensor | None,
    residual: Tensor | None,
    weight: Tensor | None,
    mean: Tensor,
    inv_std: Tensor,
    shift: Tensor,
    mask: Tensor | None,
    activation: str,
    negative_slope: float,
) -> Tensor:
    """Return the activation's derivative in the accumulate dtype, from the mask or else from the same u as forward's."""
    if mask is not None:
        passes = _unpacked(mask, grad_output)
        return passing_derivative(passes, activation, negative_slope, mean.dtype)
    if input is None:
        raise RuntimeError("input is needed for the gradients asked for")
    u = affine(input, mean, _scale(inv_std, weight).to(mean.dtype), shift)
    if residual is not None:
        u = u + residual
    return activation_derivative(u, activation, negative_slope)


# ---- activations --------------------------------------------------------------------------------


def check_activation(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")


def check_residual(residual: Tensor | None, input: Tensor) -> None:
    if residual is None:
        return
    if not isinstance(residual, Tensor):
        raise TypeError(f"residual must be a Tensor, got {type(residual).__name__}")
    for what in ("shape", "dtype", "device"):
        actual, expected = getattr(residual, what), getattr(input, what)
        if actual != expected:
            if what == "shape":
                actual, expected = list(actual), list(expected)
            raise RuntimeError(f"residual must have the {what} of input, {expected}, got {actual}")


def check_mask(mask: Tensor, input: Tensor) -> None:
    """Refuse what is no mask of the samples of `input`: bool, of its shape without the channel dimension."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a Tensor, got {type(mask).__name__}")
    expected = [size for dim, size in enumerate(input.shape) if dim != 1]
    if list(mask.shape) != expected:
        raise RuntimeError(
            f"mask must have the shape of input without its channels, {expected}, got {list(mask.shape)}"
        )
    if mask.dtype != torch.bool:
        raise RuntimeError(
            f"mask must be of type Bool, true where a sample counts, got {_name(mask.dtype)}"
        )
    if mask.device != input.device:
        raise RuntimeError(
            f"mask must be on {input.device} (the device of input), got {mask.device}"
        )


def is_passing(activation: str) -> bool:
    """Return whether one bit an element, whether it passes, is all that the derivative depends on."""
    return activation in ("relu", "relu6", "leaky_relu")


def activate(u: Tensor, activation: str, negative_slope: float) -> Tensor:
    """Return the activation of `u`."""
    if activation == "relu":
        return F.relu(u)
    if activation == "relu6":
        return F.relu6(u)
    if activation == "leaky_relu":
        return F.leaky_relu(u, negative_slope)
    if activation == "elu":
        return F.elu(u)
    if activation == "silu":
        return F.silu(u)
    if activation == "hardswish":
        return F.hardswish(u)
    return u


def activation_derivative(u: Tensor, activation: str, negative_slope: float) -> Tensor:
    """Return the derivative of `activate`, made of operations that can be differentiated again."""
    if is_passing(activation):
        return passing_derivative(_passes(u, activation), activation, negative_slope, u.dtype)
    if activation == "elu":
        # The clamp: where() would make NaN of the infinite exponentials that it does not choose.
        return torch.where(u <= 0.0, u.clamp(max=0.0).exp(), 1.0)
    if activation == "silu":
        sigmoid = u.sigmoid()
        return sigmoid * (1.0 + u * (1.0 - sigmoid))
    if activation == "hardswish":
        return torch.where(u <= -3.0, 0.0, torch.where(u >= 3.0, 1.0, u / 3.0 + 0.5))
    return torch.ones_like(u)


def inverse(
    output: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    inv_std: Tensor,
    shift: Tensor,
    activation: str,
    negative_slope: float,
) -> Tensor:
    """Return the input of a call without a residual whose activation can be inverted."""
    u = output
    if activation == "leaky_relu":
        u = torch.where(output <= 0.0, output / negative_slope, output)
    elif activation == "elu":
        u = torch.where(output <= 0.0, output.clamp(max=0.0).log1p(), output)
    scale = _scale(inv_std, weight).to(mean.dtype)
    return (u - per_channel(shift, u)) / per_channel(scale, u) + per_channel(mean, u)


def passing_derivative(
    passes: Tensor, activation: str, negative_slope: float, dtype: torch.dtype
) -> Tensor:
    """Return the derivative of relu, relu6 or leaky_relu by whether an element passes."""
    blocked = negative_slope if activation == "leaky_relu" else 0.0
    return torch.where(passes, torch.ones((), dtype=dtype, device=passes.device), blocked)


def _passes(u: Tensor, activation: str) -> Tensor:
    blocked = u <= 0.0  # false for NaN, which passes
    return ~(blocked | (u >= 6.0) if activation == "relu6" else blocked)


def _packed(bits: Tensor) -> Tensor:
    """Return a bool tensor's values, in the order of its dimensions, eight to a byte."""
    padded = F.pad(bits.reshape(-1).to(torch.uint8), (0, -bits.numel() % 8))
    return (padded.view(-1, 8) << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(
        1, dtype=torch.uint8
    )


def _unpacked(mask: Tensor, like: Tensor) -> Tensor:
    bits = mask.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8, device=mask.device) & 1
    return bits.view(-1)[: like.numel()].view(like.shape).bool()


# ---- memory order -------------------------------------------------------------------------------


def dense(tensor: Tensor) -> Tensor:
    # Dynamo cannot ask; copies of what has gaps then keep the order of its strides instead.
    if torch.compiler.is_dynamo_compiling() or torch.ops.aten.is_non_overlapping_and_dense(tensor):
        return tensor
    # torch's own choice for batch norm: the input's suggested memory format.
    return tensor.contiguous(memory_format=torch._prims_common.suggest_memory_format(tensor))


# ---- the steps one by one, as synchronisation across processes needs them ----

# Of a statistics record: what identifies the input it describes, and its number of samples.
RECORD_HEADER = 2


def signature(input: Tensor) -> int:
    """Return the number that stands for `input`'s channel count and dtype in a statistics record."""
    return input.size(1) * len(_DTYPES) + _DTYPES.index(input.dtype)


def described_signature(number: int) -> str:
    """Return in words what `signature` stands for."""
    channels, dtype = divmod(number, len(_DTYPES))
    return f"{channels} channels of {str(_DTYPES[dtype]).removeprefix('torch.')}"


def channel_statistics(input: Tensor, counted: Tensor | None = None) -> Tensor:
    """Return the batch's statistics record, float64 of shape (2 C + 2,): signature, count, means, m2s.

    `counted`, bool and of the shape of `input` without its channels, says which samples it is of.
    """
    _check_input(input)
    channels = input.size(1)
    samples = input.numel() // channels if channels else 0
    header = torch.zeros(RECORD_HEADER, dtype=torch.float64, device=input.device)
    header[0] = signature(input)
    header[1] = samples
    if samples == 0:
        return torch.cat((header, header.new_zeros(2 * channels)))
    if counted is None:
        mean, variance = _mean_and_variance(input)
        return torch.cat((header, mean, variance * samples))
    header[1] = counted.sum()
    mean, variance = counted_statistics(input, counted)
    return torch.cat((header, mean, variance * header[1]))


def counted_statistics(input: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance in float64 of the samples that are counted, zeros of none, differentiably."""
    dims, places = reduced_dims(input), counted.unsqueeze(1)
    divisor = counted.sum(dtype=torch.float64).clamp(min=1.0)

    def mean_of(values: Tensor) -> Tensor:
        return torch.where(places, values, 0.0).sum(dims) / divisor

    wide = input.double()
    mean = mean_of(wide)
    centred = wide - per_channel(mean, wide)
    if input.dtype == torch.float64:  # what a sum of values far from zero has rounded
        correction = mean_of(centred)
        mean = torch.where(correction.isfinite(), mean + correction, mean)
        centred = wide - per_channel(mean, wide)
    return mean, mean_of(centred.square())


def finalize_statistics(
    records: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    skip_nonfinite: bool,
    correction: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge the rows of `records` and update the running statistics. Return (mean, variance, count) in float64.

    The merge is that of Chan, Golub and LeVeque (1979), "Updating formulae and a pairwise algorithm for computing
    sample variances". Rows that count no samples do not matter.
    """
    _check_written("running_mean", running_mean)
    _check_written("running_var", running_var)
    channels = (records.size(1) - RECORD_HEADER) // 2
    counts = records[:, 1:RECORD_HEADER]
    means, m2s = records[:, RECORD_HEADER:].split(channels, dim=1)
    count = counts.sum(0)
    empty = count == 0
    divisor = torch.where(empty, 1.0, count)
    # Around one of the means, so that a large mean common to all costs nothing.
    pivot = means[0]
    shares = counts / divisor
    mean = pivot + (shares * (means - pivot)).sum(0)
    # An infinite mean among them is no pivot, but makes the mean of all infinite.
    mean = torch.where(mean.isnan(), (shares * means).sum(0), mean)
    m2 = (m2s + counts * (means - mean).square()).sum(0)
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    if running_mean is not None and running_var is not None:
        factor = _factor(momentum, num_batches_tracked)
        # No sample at all has no weight either, and leaves the running statistics alone.
        factor = torch.where(empty, torch.zeros_like(count), factor)
        batch_variance = torch.where(empty, 0.0, m2 / (count - correction))
        update_running_statistics(
            running_mean, running_var, mean, batch_variance, factor, skip_nonfinite
        )
    return mean, m2 / divisor, count


def normalize(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise `input` with float64 `mean` and `variance`. Return (output, mean, inv_std)."""
    _check_input(input)
    check_channel_vector("weight", weight, input)
    check_channel_vector("bias", bias, input)
    u, mean, inv_std, _ = _normalized(input, weight, bias, mean, (variance + eps).rsqrt())
    return _stored(u, input), mean, inv_std


def normalize_act(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    eps: float,
    activation: str,
    negative_slope: float,
    with_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Do `normalize`, add `residual` and apply the activation. Return (output, mean, inv_std, shift, mask)."""
    _check_input(input)
    check_residual(residual, input)
    check_channel_vector("weight", weight, input)
    check_channel_vector("bias", bias, input)
    check_activation(activation)
    normalized = _normalized(input, weight, bias, mean, (variance + eps).rsqrt())
    return _activated(input, residual, *normalized, activation, negative_slope, with_mask)


def input_gradient(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    inv_std: Tensor,
    sum_dy: Tensor,
    sum_dy_xhat: Tensor,
    count: Tensor,
) -> Tensor:
    """Return dx for the float64 sums over all `count` samples of the batch that `input` is a part of."""
    _check_input(grad_output)
    check_channel_vector("weight", weight, grad_output)
    dy = grad_output.to(mean.dtype)
    return _input_gradient(dy, input, weight, mean, inv_std, sum_dy, sum_dy_xhat, count)


def input_gradient_act(
    grad_output: Tensor,
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    mean: Tensor,
    inv_std: Tensor,
    shift: Tensor,
    mask: Tensor | None,
    sum_dy: Tensor,
    sum_dy_xhat: Tensor,
    count: Tensor,
    activation: str,
    negative_slope: float,
) -> Tensor:
    """Do `input_gradient` behind a residual and an activation."""
    _check_input(grad_output)
    check_channel_vector("weight", weight, grad_output)
    saved = (input, residual, weight, mean, inv_std, shift, mask)
    dy = grad_output * _derivative(grad_output, *saved, activation, negative_slope)
    return _input_gradient(dy, input, weight, mean, inv_std, sum_dy, sum_dy_xhat, count)


def _input_gradient(
    dy: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    inv_std: Tensor,
    sum_dy: Tensor,
    sum_dy_xhat: Tensor,
    count: Tensor,
) -> Tensor:
    dy_scale = _scale(inv_std, weight)
    x_scale = dy_scale * inv_std * (sum_dy_xhat / count)

    def coefficient(vector: Tensor) -> Tensor:
        return per_channel(vector.to(mean.dtype), input)

    dx = (dy - coefficient(sum_dy / count)) * coefficient(dy_scale)
    centred = input.to(mean.dtype) - coefficient(mean)
    dx = torch.addcmul(dx, centred, coefficient(x_scale), value=-1)
    return _stored(dx, input)


def fast_path(*_: object) -> None:
    """Return None: every call takes the way that looks closer."""


fast_path_act = fast_path


def _stored(result: Tensor, like: Tensor) -> Tensor:
    """Return `result` in the dtype of `like` and in the memory order that the native module would give it."""
    # No conversion where there is nothing to convert: torch 2.11 compiles a function that returns the result of one
    # to gradients of zero.
    if result.dtype != like.dtype:
        result = result.to(like.dtype)
    layout = torch.empty_like(dense(like))
    return result if result.stride() == layout.stride() else layout.copy_(result)


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
