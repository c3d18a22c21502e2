"""Batch norm over the joint batch of several processes: the module, its autograd.Function, and conversion."""

from __future__ import annotations

import copy
import warnings
import weakref
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import _fusion, _operators, _reference
from .autograd import is_recomputing, passing_derivative, what_is_kept
from .convert import _LAZY, _OURS, _TORCHS
from .functional import _check_eps, _kernels_apply, check_activation
from .modules import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d, _BatchNorm, _BatchNormAct

__all__ = [
    "BatchNormActNd",
    "BatchNormNd",
    "SyncBatchNorm",
    "SyncBatchNormAct",
    "SyncBatchNormFunction",
    "revert_sync_batchnorm",
]

_M = TypeVar("_M", bound=nn.Module)


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


def _gather(values: Tensor, group: str, ranks: int) -> Tensor:
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


# ---- the operation ------------------------------------------------------------------------------


class SyncBatchNormFunction(torch.autograd.Function):
    """Training batch norm over the joint batch of a process group, with first and second derivatives.

    ``SyncBatchNormFunction.apply(input, residual, weight, bias, running_mean, running_var, num_batches_tracked,
    momentum, eps, skip_nonfinite, activation, negative_slope, group, ranks)`` returns the output for this process's
    part of the batch; `group` is the name of the process group and `ranks` its size. One collective in forward, one in
    backward if the input needs a gradient. Use `SyncBatchNorm` or `SyncBatchNormAct` unless you build an operation of
    your own.

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
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        num_batches_tracked: Tensor | None,
        momentum: float | None,
        eps: float,
        skip_nonfinite: bool,
        activation: str,
        negative_slope: float,
        group: str,
        ranks: int,
    ) -> Tensor:
        native = _kernels_apply(
            input, running_mean, running_var, weight, bias, num_batches_tracked, residual
        )
        steps = _operators.steps() if native else _reference  # which works on any device
        records = _gather(steps.channel_statistics(input), group, ranks)
        # On the device, so that the host waits for nothing.
        torch._assert_async(
            (records[:, 0] == _reference.signature(input)).all(),
            "SyncBatchNorm: inputs of the ranks differ in their number of channels or their dtype",
        )
        mean, variance, count = steps.finalize_statistics(
            records, running_mean, running_var, num_batches_tracked, momentum, skip_nonfinite
        )
        need_dx, _, need_dweight, need_dbias = ctx.needs_input_grad[:4]
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
        input, residual, weight, bias, mean, inv_std, shift, mask, count = ctx.saved_tensors
        need_dx, need_dresidual = ctx.needs_input_grad[:2]
        steps = _operators.steps() if ctx.native else _reference
        activation = ctx.epilogue[0]
        dx = dweight = dbias = None
        dresidual = grad_output
        if torch.is_grad_enabled():
            # Someone will differentiate these gradients: build them of differentiable operations, with the batch
            # statistics a function of every rank's input again.
            derivative = None
            if _reference.is_passing(activation):
                derivative = passing_derivative(
                    *(steps.backward_act, grad_output, input, weight, mean, inv_std, shift, mask),
                    *(ctx.strides, *ctx.epilogue),
                )
            dx, dresidual, sum_dy_xhat, sum_dy = _differentiable_gradients(
                *(grad_output, input, residual, weight, bias, count, ctx.eps),
                *(derivative, activation, need_dx, ctx.group),
            )
        else:
            need_sum_dy_xhat = need_dx or ctx.dweight_dtype is not None
            sums_wanted = (torch.float64 if need_sum_dy_xhat else None, torch.float64)
            fused = (residual, weight, mean, inv_std, shift, mask)
            if activation == "identity":
                _, sum_dy_xhat, sum_dy = steps.backward(
                    grad_output, input, None, mean, inv_std, True, False, *sums_wanted
                )
            else:
                _, dresidual, sum_dy_xhat, sum_dy = steps.backward_act(
                    *(grad_output, input, *fused, ctx.strides, True, False, need_dresidual),
                    *(*sums_wanted, *ctx.epilogue),
                )
            if need_dx:
                sums = _sum(torch.cat((sum_dy, sum_dy_xhat)), ctx.group).chunk(2)
                if activation == "identity":
                    dx = steps.input_gradient(
                        grad_output, input, weight, mean, inv_std, *sums, count
                    )
                else:
                    dx = steps.input_gradient_act(
                        grad_output, input, *fused, *sums, count, *ctx.epilogue
                    )
        if ctx.dweight_dtype is not None and sum_dy_xhat is not None:
            dweight = sum_dy_xhat.to(ctx.dweight_dtype)
        if ctx.dbias_dtype is not None:
            dbias = sum_dy.to(ctx.dbias_dtype)
        return (dx, dresidual if need_dresidual else None, dweight, dbias, *[None] * 10)


def _differentiable_gradients(
    grad_output: Tensor,
    input: Tensor | None,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    count: Tensor,
    eps: float,
    derivative: Tensor | None,
    activation: str,
    need_dx: bool,
    group: str,
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor]:
    """Return (dx, dresidual, sum_dy_xhat, sum_dy), the sums over this process's samples.

    `derivative` is that of the activation where it is piecewise constant.
    """
    dims = _reference.reduced_dims(grad_output)

    def over_ranks(values: Tensor) -> Tensor:
        return _DifferentiableSum.apply(values, group)

    def per_channel(vector: Tensor) -> Tensor:
        return _reference.per_channel(vector, grad_output)

    xhat = inv_std = None
    if input is not None:
        x = input.double()
        mean = over_ranks(x.sum(dims)) / count
        centred = x - per_channel(mean)
        variance = over_ranks(centred.square().sum(dims)) / count
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
    dx = (dy - per_channel(mean_dy) - xhat * per_channel(mean_dy_xhat)) * per_channel(scale)
    return dx.to(input.dtype), dresidual, sum_dy_xhat, sum_dy


# ---- modules ------------------------------------------------------------------------------------


class BatchNormNd(_BatchNorm):
    """Batch normalisation of (N, C, ...) inputs with any number of dimensions, as `SyncBatchNorm` takes them.

    What `revert_sync_batchnorm` makes of a synchronised module that never was a module of known dimension.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")


class SyncBatchNorm(BatchNormNd):
    """Batch normalisation over the joint batch of all processes of a group.

    In training, mean and variance are those of the samples of all ranks together (Ioffe and Szegedy, 2015, section 3,
    with the statistics merged as in Chan, Golub and LeVeque, 1979); outputs, input gradients and running statistics
    are those of one process that sees the whole batch, and parameter gradients become so under
    DistributedDataParallel. One collective in forward and one in backward, on any backend that torch.distributed has
    for the device, gloo on the CPU included; the host waits for neither, unless gloo serves a GPU. At a module's first
    call one more lets the ranks compare channels and dtype. Ranks may have different numbers of samples, also none.

    In evaluation, when frozen, without an initialised process group, and in a group of one, this is the plain batch
    norm of this package, without a collective.

    Constructor, state_dict and results are those of :class:`torch.nn.SyncBatchNorm`. It is no subclass of it, since
    DistributedDataParallel refuses those on the CPU; it is a subclass of torch's common base of batch norms.

    Parameters
    ----------
    num_features : int
        Number of channels, C.
    eps, momentum, affine, track_running_stats, device, dtype
        As in torch; also ``bias`` (keyword) where the installed torch has it.
    process_group : torch.distributed.ProcessGroup, optional
        The processes to synchronise with; all by default. A process outside of its group does not synchronise.
    skip_nonfinite : bool, keyword-only
        Leave the running statistics of a channel alone when its batch mean or variance is not finite.

    Raises
    ------
    ValueError
        At the first synchronised call: the ranks' inputs differ in their number of channels or their dtype.
    RuntimeError
        The same at a later call; or a rank is gone, or does not arrive within the group's timeout.

    Shape: input and output (N, C, ...).
    """

    process_group: dist.ProcessGroup | None = None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: dist.ProcessGroup | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        skip_nonfinite: bool = False,
        **bias: bool,
    ) -> None:
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            device,
            dtype,
            skip_nonfinite=skip_nonfinite,
            **bias,
        )
        self.process_group = process_group

    def forward(self, input: Tensor) -> Tensor:
        """Normalise `input`, this process's part of the batch, in its dtype and memory order."""
        group = self._synchronising_group() if self.training else None
        if group is None:
            return super().forward(input)
        return self._synchronised(input, None, "identity", 0.0, group)

    def _forward_act(
        self,
        input: Tensor,
        residual: Tensor | None,
        activation: str,
        negative_slope: float,
        inplace: bool = False,
    ) -> Tensor:
        group = self._synchronising_group() if self.training else None
        if group is None:
            return super()._forward_act(input, residual, activation, negative_slope, inplace)
        check_activation(activation, negative_slope, inplace)
        return self._synchronised(input, residual, activation, negative_slope, group)

    def _synchronised(
        self,
        input: Tensor,
        residual: Tensor | None,
        activation: str,
        negative_slope: float,
        group: dist.ProcessGroup,
    ) -> Tensor:
        self._check_input_dim(input)
        _reference.check_residual(residual, input)
        _check_eps(self.eps, True)
        running_mean = running_var = num_batches_tracked = None
        momentum = self.momentum
        if self.track_running_stats:
            running_mean, running_var = self.running_mean, self.running_var
            num_batches_tracked = self.num_batches_tracked
        for name, vector in (
            ("running_mean", running_mean),
            ("running_var", running_var),
            ("weight", self.weight),
            ("bias", self.bias),
        ):
            _reference.check_channel_vector(name, vector, input)
        if not torch.compiler.is_compiling():
            _check_agreement(self, input, group)
            if is_recomputing():
                running_mean = running_var = num_batches_tracked = None
        return SyncBatchNormFunction.apply(
            input,
            residual,
            self.weight,
            self.bias,
            running_mean,
            running_var,
            num_batches_tracked,
            momentum,
            self.eps,
            self.skip_nonfinite,
            activation,
            negative_slope,
            group.group_name,
            group.size(),
        )

    def _synchronising_group(self) -> dist.ProcessGroup | None:
        if not (dist.is_available() and dist.is_initialized()):
            return None
        group = dist.group.WORLD if self.process_group is None else self.process_group
        return group if dist.get_world_size(group) > 1 else None

    def __deepcopy__(self, memo: dict[int, Any]) -> SyncBatchNorm:
        # A process group cannot be copied, and must not be.
        memo[id(self.process_group)] = self.process_group
        duplicate = self.__class__.__new__(self.__class__)
        memo[id(self)] = duplicate
        duplicate.__setstate__(copy.deepcopy(self.__dict__, memo))
        return duplicate

    @classmethod
    def convert_sync_batchnorm(
        cls, module: _M, process_group: dist.ProcessGroup | None = None
    ) -> _M:
        """Make every batch norm in `module`, and `module` itself if it is one, a `SyncBatchNorm`.

        Torch's ``BatchNorm1d/2d/3d`` and ``SyncBatchNorm`` and this package's modules are converted, lazy ones when
        they materialise; those with an activation become a `SyncBatchNormAct` with the same. Each stays the same object: parameters, buffers, hooks, frozen state, flags, and every
        reference to it (shared modules too) are untouched. Classes derived from them may have a forward of their
        own, which would be lost: they are left alone, with a warning.

        Parameters
        ----------
        module : torch.nn.Module
            Changed in place.
        process_group : torch.distributed.ProcessGroup, optional
            The processes to synchronise with. By default modules that have a group keep it, and the others
            synchronise with all processes.

        Returns
        -------
        torch.nn.Module
            `module` itself; `revert_sync_batchnorm` undoes it.
        """
        for name, child in module.named_modules():
            kind = type(child)
            if kind in _CONVERTED:
                child._reverts_to = kind
                child.__class__ = SyncBatchNormAct if issubclass(kind, _BatchNormAct) else cls
            elif kind in _LAZY:
                child._reverts_to = child.cls_to_become
                child.cls_to_become = cls
            elif not isinstance(child, SyncBatchNorm):
                if isinstance(child, nn.modules.batchnorm._BatchNorm):
                    warnings.warn(
                        f"{name or kind.__name__}: {kind.__qualname__} may have a forward of its own and is not "
                        "synchronised",
                        stacklevel=2,
                    )
                continue
            if process_group is not None:
                child.process_group = process_group
        return module


class BatchNormActNd(_BatchNormAct, BatchNormNd):
    """``activation(batch_norm(input) + residual)`` of inputs with any number of dimensions.

    What `revert_sync_batchnorm` makes of a `SyncBatchNormAct` that never was a module of known dimension.
    """


class SyncBatchNormAct(_BatchNormAct, SyncBatchNorm):
    """``activation(batch_norm(input) + residual)`` over the joint batch of all processes of a group.

    :class:`SyncBatchNorm` with what `BatchNormAct2d` adds to `BatchNorm2d`: the keyword arguments `activation`,
    `negative_slope` and `inplace`, and an optional residual as forward's second argument. Synchronised calls never
    take the input's memory, which `inplace` only permits.
    """


_fusion.NORMS.update((BatchNormNd, SyncBatchNorm))

# What `convert_sync_batchnorm` converts; what it does not know the dimension of reverts to BatchNormNd.
_CONVERTED = frozenset(
    (
        *_OURS,
        *_TORCHS,
        *(BatchNormAct1d, BatchNormAct2d, BatchNormAct3d),
        *(nn.SyncBatchNorm, BatchNormNd, BatchNormActNd),
    )
)


def revert_sync_batchnorm(module: _M) -> _M:
    """Make every synchronised batch norm in `module` a plain one again, the same object.

    Modules made by `SyncBatchNorm.convert_sync_batchnorm` become what they were. If torch's class cannot do what was
    asked of them since (frozen, `skip_nonfinite`), they become this package's class of the same name. Modules made as
    `SyncBatchNorm`, this package's or torch's, become `BatchNormNd`, those made as `SyncBatchNormAct` `BatchNormActNd`.

    Parameters
    ----------
    module : torch.nn.Module
        Changed in place.

    Returns
    -------
    torch.nn.Module
        `module` itself.
    """
    for child in module.modules():
        if type(child) in _LAZY:
            child.cls_to_become = child.__dict__.pop("_reverts_to", child.cls_to_become)
            child.__dict__.pop("process_group", None)
        elif isinstance(child, (SyncBatchNorm, nn.SyncBatchNorm)):
            unknown = BatchNormActNd if isinstance(child, SyncBatchNormAct) else BatchNormNd
            kind = child.__dict__.pop("_reverts_to", unknown)
            if kind is nn.SyncBatchNorm:
                kind = BatchNormNd
            if isinstance(child, SyncBatchNorm) and (child.frozen or child.skip_nonfinite):
                kind = _OURS.get(kind, kind)
            child.__dict__.pop("process_group", None)
            child.__class__ = kind
    return module


# ---- agreement between ranks --------------------------------------------------------------------

# Which modules have compared their input with the other ranks', and in which group. Not an attribute of the module,
# since a copy, or a pickle loaded by one rank only, has not.
_agreed: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def _check_agreement(module: nn.Module, input: Tensor, group: dist.ProcessGroup) -> None:
    """Compare channels and dtype with the other ranks, once a module, before anything depends on them.

    Collectives of different sizes end a gloo process and hang an NCCL one. Later calls compare on the device.
    """
    name = group.group_name
    if _agreed.get(module) == name:
        return
    if input.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    mine = torch.tensor([_reference.signature(input)], device=input.device)
    signatures = _gather(mine, name, group.size()).flatten().tolist()
    if len(set(signatures)) > 1:
        theirs = ", ".join(map(_reference.described_signature, signatures))
        raise ValueError(
            "SyncBatchNorm: the ranks' inputs must have the same number of channels and the same dtype, got "
            f"(in rank order) {theirs}"
        )
    _agreed[module] = name
