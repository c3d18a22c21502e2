"""The autograd.Function over the backend's forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _operators, _reference

__all__ = ["BatchNormFunction"]


class BatchNormFunction(torch.autograd.Function):
    """Batch normalisation with first and second derivatives (Ioffe and Szegedy, 2015, section 3).

    ``BatchNormFunction.apply(input, weight, bias, running_mean, running_var, num_batches_tracked, training,
    momentum, eps, skip_nonfinite)`` returns the output. Use `batchnorm_ext.functional.batch_norm` or the modules
    unless you build an operation of your own: they add torch's argument checks and its fallbacks.

    Parameters
    ----------
    input : Tensor of shape (N, C, ...)
        float64, float32, float16 or bfloat16, with any strides.
    weight, bias : Tensor of shape (C,) or None
        Scale and shift, in the dtype of `input` or the dtype sums are kept in (float32; float64 for float64).
    running_mean, running_var : Tensor of shape (C,) or None
        Updated in place in training, used instead of batch statistics otherwise.
    num_batches_tracked : int64 Tensor with one element, or None
        Incremented in training.
    training : bool
        Whether statistics of this batch normalise.
    momentum : float or None
        Weight of this batch in the running statistics; None weighs all batches alike.
    eps : float
        Added to the variance.
    skip_nonfinite : bool
        Whether a channel whose batch statistics are not finite leaves its running statistics alone.

    Notes
    -----
    What is kept for backward: two vectors of shape (C,), the weight when the input needs a gradient, and the input
    unless no gradient depends on it. The running statistics are never kept, so rewriting them between forward and
    backward is no error.
    """

    @staticmethod
    def forward(
        ctx: Any,
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
    ) -> Tensor:
        output, mean, inv_std = _operators.forward(
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
        need_dx, need_dweight, need_dbias = ctx.needs_input_grad[:3]
        ctx.training = training
        ctx.eps = eps
        ctx.dweight_dtype = weight.dtype if weight is not None and need_dweight else None
        ctx.dbias_dtype = bias.dtype if bias is not None and need_dbias else None
        need_x = need_dweight or (training and need_dx)
        ctx.save_for_backward(input if need_x else None, weight if need_dx else None, mean, inv_std)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, mean, inv_std = ctx.saved_tensors
        wanted = (ctx.needs_input_grad[0], ctx.dweight_dtype, ctx.dbias_dtype)
        if torch.is_grad_enabled() or not is_plain(grad_output):
            computed = differentiable_backward(
                grad_output, input, weight, mean, inv_std, ctx.training, ctx.eps, *wanted
            )
        else:
            computed = _operators.backward(
                grad_output, input, weight, mean, inv_std, ctx.training, *wanted
            )
        return (*computed, None, None, None, None, None, None, None)


def differentiable_backward(
    grad_output: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    mean: Tensor,
    inv_std: Tensor,
    training: bool,
    eps: float,
    need_dx: bool,
    dweight_dtype: torch.dtype | None,
    dbias_dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients made of torch's own operations, which can be differentiated, batched and watched."""
    if training and input is not None and torch.is_grad_enabled():
        # For the second derivatives the batch statistics are a function of the input again.
        mean, _, inv_std = _reference.batch_statistics(input, eps)
        accumulate = _reference.accumulate_dtype(input.dtype)
        mean, inv_std = mean.to(accumulate), inv_std.to(accumulate)
    return _reference.backward(
        grad_output, input, weight, mean, inv_std, training, need_dx, dweight_dtype, dbias_dtype
    )


def is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor is its memory and nothing else: no subclass, no torch.func transform in force."""
    return type(tensor) in (Tensor, torch.nn.Parameter) and (
        torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active()
    )


def is_recomputing() -> bool:
    """Return whether autograd is running a backward pass on this thread.

    A forward pass inside a backward pass is activation checkpointing's recomputation of a forward pass that has
    already updated the running statistics.
    """
    return torch._C._current_graph_task_id() != -1
