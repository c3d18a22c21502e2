"""Functional batch norm: torch's signature and checks, and the choice between this package's kernels and torch's."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes

from . import _operators, _reference
from ._extension import backend
from .autograd import BatchNormActFunction, BatchNormFunction, is_recomputing
from .stepwise import StepwiseBatchNormFunction, differentiable_batch_norm

__all__ = ["batch_norm", "batch_norm_act"]

_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))
_PLAIN_TYPES = (Tensor, Parameter, type(None))
_TORCH_ALLOWS_ZERO_EPS = torch.__version__ >= torch.torch_version.TorchVersion("2.13")


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    """Apply batch normalisation to each channel; a drop-in for `torch.nn.functional.batch_norm`.

    ``output = (input - mean) / sqrt(variance + eps) * weight + bias`` per channel, with the mean and the biased
    variance of the batch in training and the running statistics otherwise (Ioffe and Szegedy, "Batch Normalization:
    Accelerating Deep Network Training by Reducing Internal Covariate Shift", 2015, sections 3 and 3.1).

    Parameters
    ----------
    input : Tensor of shape (N, C) or (N, C, ...)
        float64, float32, float16 or bfloat16; any strides.
    running_mean, running_var : Tensor of shape (C,) or None
        Running statistics; both or neither. In training they are updated in place,
        ``running = (1 - momentum) * running + momentum * batch``, with the unbiased variance.
    weight, bias : Tensor of shape (C,), optional
        Scale (default 1) and shift (default 0).
    training : bool
        Whether the statistics of this batch are used.
    momentum : float
        Weight of this batch in the running statistics.
    eps : float
        Added to the variance for numerical stability.
    mask : bool Tensor of shape (N, ...), optional
        In training, the samples that mean and variance are of: false where a sequence or an image is padded. What does
        not count is normalised with the same mean and variance. Without effect in evaluation.

    Returns
    -------
    Tensor
        Of the shape, dtype and memory order of `input`; non-dense inputs give torch's suggested memory format.

    Raises
    ------
    ValueError
        One value per channel in training, or a mask on the CPU that counts less than two; `eps` out of range; only one
        of the running statistics given.
    RuntimeError
        A vector that has not one value per channel, or has a dtype or device that does not go with `input`; a mask of
        another shape, dtype or device; running statistics missing in evaluation, or requiring a gradient. No buffer changes.
    NotImplementedError
        A dtype that batch norm does not exist for.
    TypeError
        `training` is no bool; `momentum` is no number: the cumulative average, ``momentum=None``, is the modules'.

    Notes
    -----
    With a mask on a GPU, forward writes and reads two temporary tensors of the input's size first. The host does not wait
    to see there that a mask counts less than two samples: one of none leaves the running statistics alone, and of a
    single sample the unbiased variance is not finite.
    """
    _check_types("batch_norm", training, momentum)
    if mask is not None:
        return batch_norm_act_with_counter(
            *(input, None, running_mean, running_var, weight, bias, None, training, momentum, eps),
            *(False, 1, "identity", 0.0, False, mask),
        )
    return batch_norm_with_counter(
        input, running_mean, running_var, weight, bias, None, training, momentum, eps, False, 1
    )


def batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str = "relu",
    negative_slope: float = 0.01,
    inplace: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """Apply ``activation(batch_norm(input) + residual)`` in one pass over the data each way.

    The sum is rounded once, behind the activation. For backward no more is kept than batch norm alone keeps, and one
    bit an element where relu, relu6 or leaky_relu follows a residual.

    Parameters
    ----------
    input, running_mean, running_var, weight, bias, training, momentum, eps
        As in `batch_norm`.
    residual : Tensor, optional
        Of the shape, dtype and device of `input`; added in front of the activation.
    activation : str
        ``"identity"``, ``"relu"``, ``"relu6"``, ``"leaky_relu"``, ``"elu"``, ``"silu"`` or ``"hardswish"``, as
        in torch.nn.functional; elu with alpha = 1.
    negative_slope : float
        Of leaky_relu.
    inplace : bool
        Allow the output to take the memory of `input`, which must not be used afterwards: autograd refuses a backward
        pass that needs it. Only with activations that can be inverted: identity, leaky_relu with a positive slope,
        and elu. A permission, not a promise: the call runs out of place where gradients could not be computed from the
        output as exactly as from the input. In training those are calls with a residual, 16-bit types, a channel
        with ``|bias| > 4 |weight|`` or zero weight, and nearly all with elu (docs/numerics.md has the rule), and those
        with a mask. On a GPU the host waits for the parameters to know.
    mask : bool Tensor of shape (N, ...), optional
        As in `batch_norm`.

    Returns
    -------
    Tensor
        Of the shape, dtype and memory order of `input`; non-dense inputs give torch's suggested memory format.

    Raises
    ------
    ValueError
        As `batch_norm`; an unknown activation; `inplace` with one that cannot be inverted.
    RuntimeError
        As `batch_norm`; a residual of another shape, dtype or device; `inplace` with a leaf that requires a gradient.
    """
    _check_types("batch_norm_act", training, momentum)
    if not isinstance(activation, str):
        _reference.check_activation(activation)
    if negative_slope is None or isinstance(negative_slope, str):
        raise TypeError(f"negative_slope must be a float, got {type(negative_slope).__name__}")
    return batch_norm_act_with_counter(
        input,
        residual,
        running_mean,
        running_var,
        weight,
        bias,
        None,
        training,
        momentum,
        eps,
        False,
        1,
        activation,
        negative_slope,
        inplace,
        mask,
    )


def _check_types(function: str, training: object, momentum: object) -> None:
    if not isinstance(training, bool):
        problem, value = "'training' (position 6) must be bool", training
    elif momentum is None or isinstance(momentum, str):
        problem, value = "'momentum' (position 7) must be float", momentum
    else:
        return
    raise TypeError(f"{function}(): argument {problem}, not {type(value).__name__}")


def check_activation(activation: str, negative_slope: float, inplace: bool) -> None:
    """Refuse an unknown activation, and `inplace` with one whose input does not follow from its output."""
    _reference.check_activation(activation)
    invertible = activation in ("identity", "elu") or (
        activation == "leaky_relu" and negative_slope > 0.0
    )
    if inplace and not invertible:
        slope = f" with negative_slope={negative_slope}" if activation == "leaky_relu" else ""
        raise ValueError(
            "inplace=True needs an activation that can be inverted (identity, elu, or leaky_relu with "
            f"negative_slope > 0), got {activation}{slope}"
        )


def batch_norm_with_counter(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    skip_nonfinite: bool,
    correction: int,
) -> Tensor:
    """Apply `batch_norm`; in training also count the batch, which ``momentum=None`` (cumulative average) needs."""
    call = (
        input,
        running_mean,
        running_var,
        weight,
        bias,
        num_batches_tracked,
        training,
        momentum,
        eps,
        skip_nonfinite,
        correction,
    )
    if not torch.compiler.is_compiling():
        output = backend().fast_path(*call)
        if output is not None:
            return output
    if not _kernels_apply(input, running_mean, running_var, weight, bias, num_batches_tracked):
        return _torch_batch_norm(*call)
    _check_call(input, running_mean, running_var, training, eps)
    if training and not torch.compiler.is_compiling() and is_recomputing():
        running_mean = running_var = num_batches_tracked = None
    arguments = (
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
    if _needs_grad(input, weight, bias):
        return BatchNormFunction.apply(*arguments)
    return _operators.forward(*arguments)[0]


def batch_norm_act_with_counter(
    input: Tensor,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    skip_nonfinite: bool,
    correction: int,
    activation: str,
    negative_slope: float,
    inplace: bool,
    mask: Tensor | None = None,
) -> Tensor:
    """Apply `batch_norm_act`; in training also count the batch, which ``momentum=None`` needs."""
    call = (
        input,
        running_mean,
        running_var,
        weight,
        bias,
        num_batches_tracked,
        training,
        momentum,
        eps,
        skip_nonfinite,
        correction,
    )
    if mask is not None:
        _reference.check_mask(mask, input)
        if training:
            return _masked_batch_norm_act(
                mask, residual, *call, activation, negative_slope, inplace
            )
    if residual is None and activation == "identity" and not inplace:
        return batch_norm_with_counter(*call)
    if not torch.compiler.is_compiling():
        output = backend().fast_path_act(
            input, residual, *call[1:], activation, negative_slope, inplace
        )
        if output is not None:
            return output
    check_activation(activation, negative_slope, inplace)
    _reference.check_residual(residual, input)
    if inplace and input.requires_grad and input.is_leaf and torch.is_grad_enabled():
        raise RuntimeError(
            "a leaf Variable that requires grad is being used in an in-place operation."
        )
    if not _kernels_apply(
        input, running_mean, running_var, weight, bias, num_batches_tracked, residual
    ):
        return _torch_epilogue(_torch_batch_norm(*call), residual, activation, negative_slope)
    _check_call(input, running_mean, running_var, training, eps)
    if training and not torch.compiler.is_compiling() and is_recomputing():
        running_mean = running_var = num_batches_tracked = None
    arguments = (
        input,
        residual,
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
        activation,
        negative_slope,
    )
    if _needs_grad(input, residual, weight, bias):
        return BatchNormActFunction.apply(*arguments)
    return _operators.forward_act(*arguments, False)[0]


def _torch_epilogue(
    output: Tensor, residual: Tensor | None, activation: str, negative_slope: float
) -> Tensor:
    if residual is not None:
        output = output + residual
    return _reference.activate(output, activation, negative_slope)


def check_counted(mask: Tensor, input: Tensor) -> None:
    """Refuse a mask on the CPU that counts less than two samples of `input`, unless there are none."""
    if mask.is_cpu and input.numel() > 0 and (counted := int(mask.sum())) < 2:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got {counted} that the mask counts of an "
            f"input of size {input.size()}"
        )


def _masked_batch_norm_act(
    mask: Tensor,
    residual: Tensor | None,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    skip_nonfinite: bool,
    correction: int,
    activation: str,
    negative_slope: float,
    inplace: bool,
) -> Tensor:
    check_activation(activation, negative_slope, inplace)
    _reference.check_residual(residual, input)
    _reference.check_channel_vectors(input, running_mean, running_var, weight, bias)
    _check_call(input, running_mean, running_var, training, eps)
    native = _kernels_apply(
        *(input, running_mean, running_var, weight, bias, num_batches_tracked, residual, mask)
    )
    if not torch.compiler.is_compiling():
        if native:
            check_counted(mask, input)
        if is_recomputing():
            running_mean = running_var = num_batches_tracked = None
    running = (
        running_mean,
        running_var,
        num_batches_tracked,
        momentum,
        eps,
        skip_nonfinite,
        correction,
    )
    if native:
        return StepwiseBatchNormFunction.apply(
            *(input, residual, mask, weight, bias, *running, activation, negative_slope),
            *(native, None, 1),
        )
    output = differentiable_batch_norm(input, mask, weight, bias, *running)
    return _torch_epilogue(output, residual, activation, negative_slope)


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in tensors
    )


@functools.cache
def _has_cuda_kernels() -> bool:
    return bool(backend().build_info()["cuda"])


def _kernels_apply(input: Tensor, *others: Tensor | None) -> bool:
    """Return whether this package's kernels can see these tensors' memory and nothing watches torch's own operator.

    Everything else goes to torch's batch norm: tensor subclasses (DTensor, FakeTensor, functional tensors), tensors
    that stand for the negative of their memory or for zeros without any, other devices and dtypes, export and tracing,
    torch.func transforms, and forward-mode AD. Other dispatch modes, such as selective checkpointing's, see this
    package's operators.
    """
    if input is None or type(input) not in _PLAIN_TYPES:
        return False
    if input.dtype not in _DTYPES or input.dim() < 2:
        return False
    if not (input.is_cpu or (input.is_cuda and _has_cuda_kernels())):
        return False
    for other in others:
        if type(other) not in _PLAIN_TYPES:
            return False
    running_mean, running_var = others[:2]
    if (running_mean is not None and running_mean.requires_grad) or (
        running_var is not None and running_var.requires_grad
    ):
        return False
    if torch.compiler.is_compiling():
        # An exported program outlives this process: it is given torch's operator, which everyone has.
        # Not is_exporting(), which torch 2.11 answers with True in torch.compile as well.
        exporting = torch.compiler._is_exporting_flag
        return not exporting and _operators.operators_available()
    return not (
        input.layout != torch.strided
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or _operators.being_traced()
        or (_operators.being_watched() and not _operators.operators_available())
        or _operators.being_kept_from_writes()
        or any(
            tensor is not None and (tensor.is_neg() or tensor._is_zerotensor())
            for tensor in (input, *others)
        )
    )


def _torch_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    skip_nonfinite: bool,
    correction: int,
) -> Tensor:
    if not isinstance(input, Tensor):
        # Torch's error, or what stands for a tensor in torch's functions.
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    dtype = input.dtype
    if running_mean is not None and running_mean.dtype == torch.float32 != dtype:
        # 16-bit parameters beside float32 statistics, as `.half()` leaves them, are nothing that torch mixes, and its
        # rules for torch.func mix nothing at all.
        weight, bias = (p if p is None or p.dtype != dtype else p.float() for p in (weight, bias))
        if dtype.itemsize == 2 and torch._C._are_functorch_transforms_active():
            input = input.float()
    if training and not torch.compiler.is_compiling() and is_recomputing():
        # Torch's operator keeps for backward what it is given: as many tensors as before, but of no consequence, and
        # copied out of sight of selective checkpointing, which expects the operators it has seen.
        with _disable_current_modes():
            running_mean, running_var = (
                None if running is None else running.clone()
                for running in (running_mean, running_var)
            )
        num_batches_tracked = None
    counter = num_batches_tracked if training else None
    cumulative = momentum is None and counter is not None
    if (
        not (training and (cumulative or skip_nonfinite or correction != 1))
        or running_mean is None
        or running_var is None
        or input.numel() == 0
    ):
        output = F.batch_norm(
            input, running_mean, running_var, weight, bias, training, momentum or 0.0, eps
        )
        if counter is not None:  # last: a refused call counts nothing
            counter.add_(1)
        return output.to(dtype)
    # Torch moves the statistics by a number that the host must know, whatever came: let it only compute the batch's.
    mean, variance = torch.zeros_like(running_mean), torch.zeros_like(running_var)
    for batch, running in ((mean, running_mean), (variance, running_var)):
        if running.requires_grad:  # which torch refuses
            batch.requires_grad_()
    output = F.batch_norm(input, mean, variance, weight, bias, training, 1.0, eps)
    accumulate = _reference.accumulate_dtype(mean.dtype)
    share: float | Tensor = momentum or 0.0
    if correction != 1:
        samples = input.numel() // input.size(1)
        variance = variance * ((samples - 1) / (samples - correction))  # torch's is unbiased
    if counter is not None:
        counter.add_(1)
        share = 1.0 / counter.to(accumulate) if cumulative else share
    _reference.update_running_statistics(
        running_mean,
        running_var,
        mean.to(accumulate),
        variance.to(accumulate),
        share,
        skip_nonfinite,
    )
    return output.to(dtype)


def _check_call(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    eps: float,
) -> None:
    if training and input.size(0) * math.prod(input.shape[2:]) == 1:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {input.size()}"
        )
    if (running_mean is None) != (running_var is None) and training:
        raise ValueError("running_mean and running_var must either both be None or neither be None")
    _check_eps(eps, training)


def _check_eps(eps: float, training: bool) -> None:
    if not eps <= 0.0:  # nor is NaN refused by torch
        return
    if not _TORCH_ALLOWS_ZERO_EPS:
        raise ValueError(f"batch_norm eps must be positive, but got {eps}")
    if training:
        raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
    if eps < 0.0:
        raise ValueError(f"batch_norm eps must be non-negative, but got {eps}")
