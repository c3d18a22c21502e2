"""Batch norm step by step: over the joint batch of several processes, and over those samples that a mask counts."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import _operators, _reference
from .autograd import passing_derivative, what_is_kept

__all__ = [
    "StepwiseBatchNormFunction",
    "differentiable_batch_norm",
    "empty_record",
    "gather",
    "joined_record",
]


# ---- collectives --------------------------------------------------------------------------------
# The functional ones: nodes of the graph under torch.compile, one call of the process group in eager mode.


@torch.compiler.assume_constant_result
def _only_on_the_host(group: str, device: str) -> bool:
    """Return whether the group's backend for a device wants the values in host memory.

    Gloo takes tensors of a GPU in some collectives, copies them to the host itself, and in others ends the process
    (pytorch/pytorch#152645).
    """
    if device == "cpu":
        return False
    resolve: Any = dist.distributed_c10d._resolve_process_group
    return bool(resolve(group)._get_backend(torch.device(device)).name() == "gloo")


def _sendable(values: Tensor, group: str) -> Tensor:
    return values.cpu() if _only_on_the_host(group, values.device.type) else values


def gather(values: Tensor, group: str, ranks: int) -> Tensor:
    """Return the `values` of every rank, in rank order, as the rows of a matrix."""
    sent = _sendable(values, group)
    gathered = torch.ops._c10d_functional.all_gather_into_tensor(sent, ranks, group)
    gathered = torch.ops._c10d_functional.wait_tensor(gathered)
    return gathered.to(values.device).view(ranks, -1)


def _sum(values: Tensor, group: str) -> Tensor:
    """Return the sum of `values` over the ranks, on every rank the same to the bit."""
    reduced = torch.ops._c10d_functional.all_reduce(_sendable(values, group), "sum", group)
    return torch.ops._c10d_functional.wait_tensor(reduced).to(values.device)


class _DifferentiableSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, group: str) -> Tensor:
        ctx.group = group
        return _sum(values, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # Every rank's output depends on every rank's input.
        return _DifferentiableSum.apply(gradient.contiguous(), ctx.group), None


# ---- records ------------------------------------------------------------------------------------


def empty_record(vector: Tensor) -> Tensor:
    """Return the record of no sample of as many channels as `vector` has values."""
    size = _reference.RECORD_HEADER + 2 * vector.numel()
    return torch.zeros(size, dtype=torch.float64, device=vector.device)


@torch.no_grad()
def joined_record(record: Tensor, input: Tensor, counted: Tensor | None, native: bool) -> Tensor:
    """Return the record of the samples of `record` and of those of `input` that are counted."""
    steps = _operators.steps(native)
    joined = torch.stack((record, steps.channel_statistics(input, counted)))
    mean, variance, count = steps.finalize_statistics(joined, None, None, None, 0.0, False, 1)
    return torch.cat((record[:1], count, mean, variance * count))


# ---- the operation ------------------------------------------------------------------------------


class StepwiseBatchNormFunction(torch.autograd.Function):
    """Training batch norm in steps, with first and second derivatives.

    ``StepwiseBatchNormFunction.apply(input, residual, counted, weight, bias, running_mean, running_var,
    num_batches_tracked, momentum, eps, skip_nonfinite, correction, activation, negative_slope, native, group, ranks)`` returns the
    output for this process's part of the batch. Use the modules or `batchnorm_ext.functional.batch_norm_act` unless you
    build an operation of your own.

    Parameters
    ----------
    counted : bool Tensor of shape (N, ...), or None
        The samples that mean and variance are of, by default all. The others are normalised with the same mean and
        variance, and their gradients reach weight, bias and, through mean and variance, the samples that count.
    native : bool
        Whether the backend's kernels see these tensors; else plain PyTorch runs.
    group, ranks : str, int
        Name and size of the process group whose ranks hold the batch together, with one collective in forward, and
        one in backward if the input needs a gradient; None and 1 for a batch of this process alone.

    The others are those of `batchnorm_ext.autograd.BatchNormActFunction`.

    Notes
    -----
    As in torch, the gradients of weight and bias are sums over this process's samples only: DistributedDataParallel
    and FSDP reduce them, as they do every parameter's. Ranks may have any number of samples, also none.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        residual: Tensor | None,
        counted: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        num_batches_tracked: Tensor | None,
        momentum: float | None,
        eps: float,
        skip_nonfinite: bool,
        correction: int,
        activation: str,
        negative_slope: float,
        native: bool,
        group: str | None,
        ranks: int,
    ) -> Tensor:
        steps = _operators.steps(native)
        record = steps.channel_statistics(input, counted)
        if group is None:
            records = record.view(1, -1)
        else:
            records = gather(record, group, ranks)
            # On the device, so that the host waits for nothing.
            torch._assert_async(
                (records[:, 0] == _reference.signature(input)).all(),
                "SyncBatchNorm: inputs of the ranks differ in their number of channels or their dtype",
            )
        mean, variance, count = steps.finalize_statistics(
            records,
            running_mean,
            running_var,
            num_batches_tracked,
            momentum,
            skip_nonfinite,
            correction,
        )
        need_dx, _, _, need_dweight, need_dbias = ctx.needs_input_grad[:5]
        need_deviation = need_dx or need_dweight
        with_mask, smooth = what_is_kept(activation, residual is not None, need_deviation)
        shift = mask = None
        if residual is None and activation == "identity":
            output, mean, inv_std = steps.normalize(input, weight, bias, mean, variance, eps)
        else:
            output, mean, inv_std, shift, mask = steps.normalize_act(
                *(input, residual, weight, bias, mean, variance, eps),
                *(activation, negative_slope, with_mask),
            )
        ctx.native, ctx.eps, ctx.group = native, eps, group
        ctx.epilogue = activation, negative_slope
        ctx.strides = output.stride()
        ctx.dweight_dtype = weight.dtype if weight is not None and need_dweight else None
        ctx.dbias_dtype = bias.dtype if bias is not None and need_dbias else None
        need_input = need_deviation or smooth
        ctx.save_for_backward(
            input if need_input else None,
            residual if smooth else None,
            counted if need_dx else None,
            weight if need_dx or need_input else None,
            bias if smooth else None,
            mean,
            inv_std,
            shift,
            mask if with_mask else None,
            count,
        )
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, residual, counted, weight, bias, *saved, count = ctx.saved_tensors
        need_dx, need_dresidual = ctx.needs_input_grad[:2]
        steps = _operators.steps(ctx.native)
        activation = ctx.epilogue[0]
        dx = dweight = dbias = None
        dresidual = grad_output
        if torch.is_grad_enabled():
            # Someone will differentiate these gradients: build them of differentiable operations, with the batch
            # statistics a function of every rank's input again.
            derivative = None
            if _reference.is_passing(activation):
                derivative = passing_derivative(
                    *(steps.backward_act, grad_output, input, weight, *saved),
                    *(ctx.strides, *ctx.epilogue),
                )
            dx, dresidual, sum_dy_xhat, sum_dy = _differentiable_gradients(
                *(grad_output, input, residual, counted, weight, bias, count, ctx.eps),
                *(derivative, activation, need_dx, ctx.group),
            )
        else:
            need_sum_dy_xhat = need_dx or ctx.dweight_dtype is not None
            sums_wanted = (torch.float64 if need_sum_dy_xhat else None, torch.float64)

            def gradients(
                training: bool, with_dx: bool, with_dresidual: bool, *vectors: Any
            ) -> tuple[Any, ...]:
                if activation == "identity":
                    dx, *sums = steps.backward(
                        *(grad_output, input, weight, *saved[:2], training, with_dx, *vectors)
                    )
                    return dx, grad_output, *sums
                return steps.backward_act(
                    *(grad_output, input, residual, weight, *saved, ctx.strides, training),
                    *(with_dx, with_dresidual, *vectors, *ctx.epilogue),
                )

            _, dresidual, sum_dy_xhat, sum_dy = gradients(True, False, need_dresidual, *sums_wanted)
            if need_dx:
                sums: tuple[Any, ...] = (sum_dy, sum_dy_xhat)
                if ctx.group is not None:
                    sums = _sum(torch.cat(sums), ctx.group).chunk(2)
                if activation == "identity":
                    dx = steps.input_gradient(grad_output, input, weight, *saved[:2], *sums, count)
                else:
                    dx = steps.input_gradient_act(
                        *(grad_output, input, residual, weight, *saved, *sums, count),
                        *ctx.epilogue,
                    )
                if counted is not None:
                    # To a sample that does not count, mean and variance are constants.
                    frozen, *_ = gradients(False, True, False, None, None)
                    torch.where(counted.unsqueeze(1), dx, frozen, out=dx)
        if ctx.dweight_dtype is not None and sum_dy_xhat is not None:
            dweight = sum_dy_xhat.to(ctx.dweight_dtype)
        if ctx.dbias_dtype is not None:
            dbias = sum_dy.to(ctx.dbias_dtype)
        return (dx, dresidual if need_dresidual else None, None, dweight, dbias, *[None] * 12)


def _differentiable_gradients(
    grad_output: Tensor,
    input: Tensor | None,
    residual: Tensor | None,
    counted: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    count: Tensor,
    eps: float,
    derivative: Tensor | None,
    activation: str,
    need_dx: bool,
    group: str | None,
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor]:
    """Return (dx, dresidual, sum_dy_xhat, sum_dy), the sums over this process's samples.

    `derivative` is that of the activation where it is piecewise constant.
    """
    dims = _reference.reduced_dims(grad_output)

    def over_ranks(values: Tensor) -> Tensor:
        return values if group is None else _DifferentiableSum.apply(values, group)

    def per_channel(vector: Tensor) -> Tensor:
        return _reference.per_channel(vector, grad_output)

    def counting(values: Tensor) -> Tensor:
        return values if counted is None else torch.where(counted.unsqueeze(1), values, 0.0)

    xhat = inv_std = None
    if input is not None:
        x = input.double()
        mean = over_ranks(counting(x).sum(dims)) / count
        centred = x - per_channel(mean)
        variance = over_ranks(counting(centred).square().sum(dims)) / count
        inv_std = (variance + eps).rsqrt()
        xhat = centred * per_channel(inv_std)
        if derivative is None and activation != "identity":
            u = xhat if weight is None else xhat * per_channel(weight)
            u = u if bias is None else u + per_channel(bias)
            u = u if residual is None else u + residual
            derivative = _reference.activation_derivative(u, activation, 0.0)
    dy = grad_output.double()
    dresidual = grad_output
    if derivative is not None:
        dy = dy * derivative
        dresidual = dy.to(grad_output.dtype)
    sum_dy = dy.sum(dims)
    if input is None or xhat is None or inv_std is None:
        return None, dresidual, None, sum_dy
    sum_dy_xhat = (dy * xhat).sum(dims)
    if not need_dx:
        return None, dresidual, sum_dy_xhat, sum_dy
    mean_dy, mean_dy_xhat = (over_ranks(torch.cat((sum_dy, sum_dy_xhat))) / count).chunk(2)
    scale = inv_std if weight is None else inv_std * weight
    correction = counting(per_channel(mean_dy) + xhat * per_channel(mean_dy_xhat))
    dx = (dy - correction) * per_channel(scale)
    return dx.to(input.dtype), dresidual, sum_dy_xhat, sum_dy


def differentiable_batch_norm(
    input: Tensor,
    counted: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    skip_nonfinite: bool,
    correction: int,
) -> Tensor:
    """Return training batch norm over the samples that are counted, made of torch's own operations.

    For transforms, traces and tensors that the kernels do not see.
    """
    x = input.double()
    mean, variance = _reference.counted_statistics(input, counted)
    with torch.no_grad():
        count = counted.sum(dtype=torch.float64).view(1)
        record = torch.cat((torch.zeros_like(count), count, mean, variance * count))
        _reference.finalize_statistics(
            record.view(1, -1),
            running_mean,
            running_var,
            num_batches_tracked,
            momentum,
            skip_nonfinite,
            correction,
        )
    scale = (variance + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    output = (x - _reference.per_channel(mean, x)) * _reference.per_channel(scale, x)
    if bias is not None:
        output = output + _reference.per_channel(bias, x)
    return output.to(input.dtype)
