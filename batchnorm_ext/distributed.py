"""Batch norm over the joint batch of several processes: the modules, their conversion, agreement between ranks."""

from __future__ import annotations

import copy
import warnings
import weakref
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import _fusion, _reference
from .autograd import is_recomputing
from .convert import _LAZY, _OURS, _TORCHS
from .functional import _check_eps, _kernels_apply, check_activation
from .modules import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d, _BatchNorm, _BatchNormAct
from .stepwise import StepwiseBatchNormFunction, gather

__all__ = [
    "BatchNormActNd",
    "BatchNormNd",
    "SyncBatchNorm",
    "SyncBatchNormAct",
    "revert_sync_batchnorm",
]

_M = TypeVar("_M", bound=nn.Module)


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
    skip_nonfinite, running_var_correction, on_single_value : keyword-only
        As in `BatchNorm2d`; `on_single_value` matters to calls that do not synchronise.

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
        **options: Any,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, **options
        )
        self.process_group = process_group

    def forward(self, input: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Normalise `input`, this process's part of the batch, in its dtype and memory order.

        `mask` says which of its samples count, as in `BatchNorm2d`.
        """
        group = self._synchronising_group() if self.training else None
        if group is None:
            return super().forward(input, mask=mask)
        return self._synchronised(input, None, mask, "identity", 0.0, group)

    def _forward_act(
        self,
        input: Tensor,
        residual: Tensor | None,
        activation: str,
        negative_slope: float,
        inplace: bool = False,
        mask: Tensor | None = None,
    ) -> Tensor:
        group = self._synchronising_group() if self.training else None
        if group is None:
            return super()._forward_act(input, residual, activation, negative_slope, inplace, mask)
        check_activation(activation, negative_slope, inplace)
        return self._synchronised(input, residual, mask, activation, negative_slope, group)

    def _synchronised(
        self,
        input: Tensor,
        residual: Tensor | None,
        mask: Tensor | None,
        activation: str,
        negative_slope: float,
        group: dist.ProcessGroup,
    ) -> Tensor:
        self._check_input_dim(input)
        _reference.check_residual(residual, input)
        if mask is not None:
            _reference.check_mask(mask, input)
        _check_eps(self.eps, True)
        running_mean = running_var = num_batches_tracked = None
        if self.track_running_stats and self._pool is None:
            running_mean, running_var = self.running_mean, self.running_var
            num_batches_tracked = self.num_batches_tracked
        _reference.check_channel_vectors(input, running_mean, running_var, self.weight, self.bias)
        if not torch.compiler.is_compiling():
            _check_agreement(self, input, group)
            if is_recomputing():
                running_mean = running_var = num_batches_tracked = None
        weight, bias = self.weight, self.bias
        native = _kernels_apply(
            *(input, running_mean, running_var, weight, bias, num_batches_tracked, residual, mask)
        )
        output = StepwiseBatchNormFunction.apply(
            *(input, residual, mask, weight, bias, running_mean, running_var, num_batches_tracked),
            *(self.momentum, self.eps, self.skip_nonfinite, self.running_var_correction),
            *(activation, negative_slope),
            *(native, group.group_name, group.size()),
        )
        if self._pool is not None:
            self._add_to_pool(input, mask)
        return output

    def _pooled_records(self, pool: Tensor) -> Tensor:
        group = self._synchronising_group()
        if group is None:
            return super()._pooled_records(pool)
        return gather(pool, group.group_name, group.size())

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
    asked of them since (frozen, `skip_nonfinite` and the like), they become this package's class of the same name. Modules made as
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
            if isinstance(child, SyncBatchNorm) and child._extras():
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
    signatures = gather(mine, name, group.size()).flatten().tolist()
    if len(set(signatures)) > 1:
        theirs = ", ".join(map(_reference.described_signature, signatures))
        raise ValueError(
            "SyncBatchNorm: the ranks' inputs must have the same number of channels and the same dtype, got "
            f"(in rank order) {theirs}"
        )
    _agreed[module] = name
