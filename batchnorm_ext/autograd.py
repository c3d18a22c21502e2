"""The autograd.Function over the backend's forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _operators, _reference

__all__ = ["BatchNormActFunction", "BatchNormFunction"]


class BatchNormFunction(torch.autograd.Function):
    """Batch normalisation with first and second derivatives (Ioffe and Szegedy, 2015, section 3).

    ``BatchNormFunction.apply(input, weight, bias, running_mean, running_var, num_batches_tracked, training,
    momentum, eps, skip_nonfinite, correction)`` returns the output. Use `batchnorm_ext.functional.batch_norm` or the modules
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
    correction : int
        1 for the unbiased variance in `running_var`, 0 for the biased one.

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
        correction: int,
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
            correction,
        )
        need_dx, need_dweight, need_dbias = ctx.needs_input_grad[:3]
        ctx.training = training
        ctx.eps = eps
        ctx.dweight_dtype = weight.dtype if weight is not None and need_dweight else None
        ctx.dbias_dtype = bias.dtype if bias is not None and need_dbias else None
        ctx.set_materialize_grads(False)
        need_x = need_dweight or (training and need_dx)
        ctx.save_for_backward(input if need_x else None, weight if need_dx else None, mean, inv_std)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * 11
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
        return (*computed, *[None] * 8)


class BatchNormActFunction(torch.autograd.Function):
    """``activation(batch_norm(input) + residual)`` with first and second derivatives.

    ``BatchNormActFunction.apply(input, residual, weight, bias, running_mean, running_var, num_batches_tracked,
    training, momentum, eps, skip_nonfinite, correction, activation, negative_slope)`` returns the output. Use
    `batchnorm_ext.functional.batch_norm_act` or the modules unless you build an operation of your own.

    Parameters
    ----------
    residual : Tensor of the shape, dtype and device of `input`, or None
        Added to the normalised input.
    activation : str
        One of identity, relu, relu6, leaky_relu, elu, silu, hardswish, as in torch.nn.functional.
    negative_slope : float
        Of leaky_relu.

    The others are those of `BatchNormFunction`.

    Notes
    -----
    What is kept for backward beside three vectors of shape (C,) and the weight: the input where a gradient follows
    from its deviation, as in `BatchNormFunction`; and for the activation's derivative, with relu, relu6 and leaky_relu one
    bit an element, unless the input is kept anyway and there is no residual, with the smooth ones input and residual,
    with identity nothing.
    """

    @staticmethod
    def forward(
        ctx: Any,
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
    ) -> Tensor:
        need_dx, _, need_dweight, need_dbias = ctx.needs_input_grad[:4]
        need_deviation = need_dweight or (training and need_dx)
        with_mask, smooth = what_is_kept(activation, residual is not None, need_deviation)
        output, mean, inv_std, shift, mask = _operators.forward_act(
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
            with_mask,
        )
        ctx.set_materialize_grads(False)
        need_input = need_deviation or smooth
        ctx.save_for_backward(
            input if need_input else None,
            residual if smooth else None,
            weight if need_dx or need_input else None,
            bias if smooth else None,
            mean,
            inv_std,
            shift,
            mask,
        )
        ctx.training = training
        ctx.eps = eps
        ctx.strides = output.stride()
        ctx.epilogue = activation, negative_slope
        ctx.dweight_dtype = weight.dtype if weight is not None and need_dweight else None
        ctx.dbias_dtype = bias.dtype if bias is not None and need_dbias else None
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * 14
        input, residual, weight, bias, mean, inv_std, shift, mask = ctx.saved_tensors
        need_dx, need_dresidual = ctx.needs_input_grad[:2]
        saved = (mean, inv_std, shift, mask, ctx.strides, ctx.training)
        wanted = (need_dx, need_dresidual, ctx.dweight_dtype, ctx.dbias_dtype)
        if torch.is_grad_enabled() or not is_plain(grad_output):
            computed = differentiable_backward_act(
                grad_output, input, residual, weight, bias, *saved, ctx.eps, *wanted, *ctx.epilogue
            )
        elif ctx.epilogue[0] == "identity":
            # The residual's gradient is the output's.
            dx, dweight, dbias = _operators.backward(
                *(grad_output, input, weight, mean, inv_std, ctx.training),
                *(need_dx, ctx.dweight_dtype, ctx.dbias_dtype),
            )
            computed = dx, grad_output if need_dresidual else None, dweight, dbias
        else:
            computed = _operators.backward_act(
                grad_output, input, residual, weight, *saved, *wanted, *ctx.epilogue
            )
        return (*computed, *[None] * 10)


def what_is_kept(activation: str, residual: bool, need_deviation: bool) -> tuple[bool, bool]:
    """Return what an activation's derivative needs: (a mask, input and residual).

    Neither for identity, and where a kept input alone determines what relu, relu6 and leaky_relu let pass.
    """
    if _reference.is_passing(activation):
        return residual or not need_deviation, False
    return False, activation != "identity"


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
    """Return the gradients made of torch's own operations, which can be differentiated, batched and watched.

    `mean` and `inv_std` may have the values of several parts of the batch, as `torch.Tensor.tensor_split` cuts it, each
    normalised with its own.
    """
    if input is not None and mean.numel() > grad_output.size(1):
        return _differentiable_backward_of_parts(
            *(grad_output, input, weight, mean, inv_std, training, eps, need_dx),
            *(dweight_dtype, dbias_dtype),
        )
    if training and input is not None and torch.is_grad_enabled():
        # For the second derivatives the batch statistics are a function of the input again.
        mean, inv_std = _differentiable_statistics(input, eps)
    return _reference.backward(
        grad_output, input, weight, mean, inv_std, training, need_dx, dweight_dtype, dbias_dtype
    )


def _differentiable_backward_of_parts(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    inv_std: Tensor,
    training: bool,
    eps: float,
    need_dx: bool,
    *vector_dtypes: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    parts = mean.numel() // grad_output.size(1)
    wide = (None if dtype is None else torch.float64 for dtype in vector_dtypes)
    wanted = training, eps, need_dx, *wide
    dxs, *vectors = zip(
        *(
            differentiable_backward(dy, x, weight, *statistics, *wanted)
            for dy, x, *statistics in zip(
                *(grad_output.tensor_split(parts), input.tensor_split(parts)),
                *(mean.view(parts, -1), inv_std.view(parts, -1)),
                strict=True,
            )
        ),
        strict=True,
    )
    dweight, dbias = (
        None if dtype is None else torch.stack(rows).sum(0).to(dtype)
        for rows, dtype in zip(vectors, vector_dtypes, strict=True)
    )
    return torch.cat(dxs) if need_dx else None, dweight, dbias


def differentiable_backward_act(
    grad_output: Tensor,
    input: Tensor | None,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    inv_std: Tensor,
    shift: Tensor,
    mask: Tensor | None,
    strides: Sequence[int],
    training: bool,
    eps: float,
    need_dx: bool,
    need_dresidual: bool,
    dweight_dtype: torch.dtype | None,
    dbias_dtype: torch.dtype | None,
    activation: str,
    negative_slope: float,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients made of torch's own operations, as `differentiable_backward` does."""
    accumulate = mean.dtype
    dresidual = grad_output
    derivative = None
    if _reference.is_passing(activation):
        saved = (input, weight, mean, inv_std, shift, mask, strides)
        derivative = passing_derivative(
            _operators.backward_act, grad_output, *saved, activation, negative_slope
        )
    if training and input is not None and torch.is_grad_enabled():
        mean, inv_std = _differentiable_statistics(input, eps)
    if derivative is None and activation != "identity":
        assert input is not None
        scale = inv_std if weight is None else (inv_std * weight).to(accumulate)
        if bias is not None:  # the value of `shift`, the derivative of the bias
            shift = shift + (bias - bias.detach()).to(accumulate)
        u = _reference.affine(input, mean, scale, shift)
        derivative = _reference.activation_derivative(
            u if residual is None else u + residual, activation, negative_slope
        )
    dy = grad_output.to(accumulate)
    if derivative is not None:
        dy = dy * derivative
        dresidual = dy.to(grad_output.dtype)
    dx, dweight, dbias = _reference.gradients(
        dy, grad_output, input, weight, mean, inv_std, training, need_dx, dweight_dtype, dbias_dtype
    )
    return dx, dresidual if need_dresidual else None, dweight, dbias


def passing_derivative(
    backward_act: Callable[..., tuple[Tensor | None, ...]],
    grad_output: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    mean: Tensor,
    inv_std: Tensor,
    shift: Tensor,
    mask: Tensor | None,
    strides: Sequence[int],
    activation: str,
    negative_slope: float,
) -> Tensor:
    """Return the derivative of relu, relu6 or leaky_relu, which is piecewise constant, in the accumulate dtype.

    It is the residual's gradient for an output gradient of ones: the backend alone can read its mask.
    """
    with torch.no_grad():
        ones = torch.ones(grad_output.shape, dtype=grad_output.dtype, device=grad_output.device)
        passed = backward_act(
            *(ones, input, None, weight, mean, inv_std, shift, mask, strides, False),
            *(False, True, None, None, activation, negative_slope),
        )[1]
    assert passed is not None
    return _reference.passing_derivative(passed == 1.0, activation, negative_slope, mean.dtype)


def _differentiable_statistics(input: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    mean, _, inv_std = _reference.batch_statistics(input, eps)
    accumulate = _reference.accumulate_dtype(input.dtype)
    return mean.to(accumulate), inv_std.to(accumulate)


def is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor is its memory and nothing else: no subclass, no transform in force, no batch of them."""
    return type(tensor) in (Tensor, torch.nn.Parameter) and (
        torch.compiler.is_compiling()
        or not (
            torch._C._are_functorch_transforms_active()
            or torch._C._functorch.is_legacy_batchedtensor(tensor)
        )
    )


def is_recomputing() -> bool:
    """Return whether autograd is running a backward pass on this thread.

    A forward pass inside a backward pass is activation checkpointing's recomputation of a forward pass that has
    already updated the running statistics.
    """
    return torch._C._current_graph_task_id() != -1
