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
from .autograd import BatchNormFunction, is_recomputing

__all__ = ["batch_norm"]

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

    Returns
    -------
    Tensor
        Of the shape, dtype and memory order of `input`; non-dense inputs give torch's suggested memory format.

    Raises
    ------
    ValueError
        One value per channel in training; `eps` out of range; only one of the running statistics given.
    RuntimeError
        A vector that has not one value per channel, or has a dtype or device that does not go with `input`; running
        statistics missing in evaluation, or requiring a gradient. No buffer changes.
    NotImplementedError
        A dtype that batch norm does not exist for.
    TypeError
        `momentum` is no number; the cumulative average, ``momentum=None``, is the modules'.
    """
    if momentum is None or isinstance(momentum, str):
        raise TypeError(
            "batch_norm(): argument 'momentum' (position 7) must be float, not "
            + type(momentum).__name__
        )
    return batch_norm_with_counter(
        input, running_mean, running_var, weight, bias, None, training, momentum, eps, False
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
    )
    if not torch.compiler.is_compiling():
        output = backend().fast_path(*call)
        if output is not None:
            return output
    if not _kernels_apply(input, running_mean, running_var, weight, bias, num_batches_tracked):
        return _torch_batch_norm(*call)
    if training:
        _check_batch_size(input)
    if (running_mean is None) != (running_var is None) and training:
        raise ValueError("running_mean and running_var must either both be None or neither be None")
    _check_eps(eps, training)
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
    )
    needs_grad = torch.is_grad_enabled() and (
        input.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
    )
    if needs_grad:
        return BatchNormFunction.apply(*arguments)
    return _operators.forward(*arguments)[0]


@functools.cache
def _has_cuda_kernels() -> bool:
    return bool(backend().build_info()["cuda"])


def _kernels_apply(input: Tensor, *others: Tensor | None) -> bool:
    """Return whether this package's kernels can see these tensors' memory and nothing watches torch's own operator.

    Everything else goes to torch's batch norm: tensor subclasses (DTensor, FakeTensor, functional tensors), other
    devices and dtypes, export and tracing, torch.func transforms, and forward-mode AD. Other dispatch modes, such as
    selective checkpointing's, see this package's operators.
    """
    if type(input) not in _PLAIN_TYPES or input.dtype not in _DTYPES or input.dim() < 2:
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
) -> Tensor:
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
        not (training and (cumulative or skip_nonfinite))
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
    output = F.batch_norm(input, mean, variance, weight, bias, training, 1.0, eps)
    accumulate = _reference.accumulate_dtype(mean.dtype)
    share: float | Tensor = momentum or 0.0
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


def _check_batch_size(input: Tensor) -> None:
    if input.size(0) * math.prod(input.shape[2:]) == 1:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {input.size()}"
        )


def _check_eps(eps: float, training: bool) -> None:
    if eps > 0.0:
        return
    if not _TORCH_ALLOWS_ZERO_EPS:
        raise ValueError(f"batch_norm eps must be positive, but got {eps}")
    if training:
        raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
    if eps < 0.0:
        raise ValueError(f"batch_norm eps must be non-negative, but got {eps}")
