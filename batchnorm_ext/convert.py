"""Batch norms of whole models: turned from torch's into this package's and back, fused, frozen, their statistics pooled."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import TypeVar

from torch import nn

from . import _fusion
from .modules import BatchNorm1d, BatchNorm2d, BatchNorm3d, _BatchNorm

__all__ = [
    "convert_batchnorm",
    "freeze_batchnorm",
    "pooled_statistics",
    "revert_batchnorm",
    "unfreeze_batchnorm",
]

_M = TypeVar("_M", bound=nn.Module)

_OURS: dict[type[nn.Module], type[_BatchNorm]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
}
_TORCHS = {ours: torchs for torchs, ours in _OURS.items()}
_LAZY: dict[type[nn.Module], type[_BatchNorm]] = {
    nn.LazyBatchNorm1d: BatchNorm1d,
    nn.LazyBatchNorm2d: BatchNorm2d,
    nn.LazyBatchNorm3d: BatchNorm3d,
}


def convert_batchnorm(module: _M, fuse_activations: bool = False) -> _M:
    """Make every `torch.nn.BatchNorm1d/2d/3d` in `module`, and `module` itself if it is one, one of this package.

    Each module object stays the same object: its parameters, buffers, hooks, training and requires_grad flags, and
    every reference to it (shared modules too) are untouched; only its class changes, to a subclass of what it was.
    Lazy modules become this package's when they materialise. Classes derived from torch's are left alone, since they
    may have a forward of their own.

    Parameters
    ----------
    module : torch.nn.Module
        Changed in place.
    fuse_activations : bool
        Also run each batch norm in one call with what follows it: a sum with another tensor (a residual connection),
        one of `torch.nn`'s ReLU, ReLU6, LeakyReLU, ELU (alpha = 1), SiLU and Hardswish or its function, or both.
        `Notes` has the conditions.

    Returns
    -------
    torch.nn.Module
        `module` itself.

    Warns
    -----
    UserWarning
        Once, naming the containers whose batch norms `fuse_activations` had to leave alone, and why.

    Notes
    -----
    `fuse_activations` traces each container of batch norms with torch.fx: blocks, `nn.Sequential`, not the model as a
    whole. A container becomes an instance of a subclass of its class, of the same name, whose forward runs the fused
    calls; the module tree, `state_dict` and every other module stay as they are. Calls that the trace does not
    describe take the container's own forward: other than its required arguments, arguments that are no tensors (nor
    lists of tensors that are joined by torch.cat, as in DenseNet), hooks on a batch norm, activation or opened
    container, a replaced module. Plain attributes that decide what forward does are read once, at conversion; after
    changing one, convert again.

    Fused results differ from unfused ones by rounding: the sum is rounded once, behind the activation.
    """
    for child in module.modules():
        if type(child) in _OURS:
            child.__class__ = _OURS[type(child)]
        elif type(child) in _LAZY:
            child.cls_to_become = _LAZY[type(child)]  # type: ignore[assignment]
    if fuse_activations:
        left = _fusion.fuse(module)
        if left:
            warnings.warn(
                "batch norms that might have been fused were left as they are: "
                + "; ".join(f"{name} ({reason})" for name, reason in left.items()),
                stacklevel=2,
            )
    return module


def revert_batchnorm(module: _M) -> _M:
    """Undo `convert_batchnorm`: every batch norm of this package in `module` becomes torch's, the same object, and
    every fused container runs its own forward again.

    What torch's modules cannot do is given up: a frozen module stays in evaluation mode only until the next
    ``train()``, with a warning, and `skip_nonfinite`, `running_var_correction` and `on_single_value` are dropped, with
    a warning. Running statistics take the dtype of the weight.

    Parameters
    ----------
    module : torch.nn.Module
        Changed in place.

    Returns
    -------
    torch.nn.Module
        `module` itself.
    """
    _fusion.unfuse(module)
    for name, child in module.named_modules():
        if type(child) in _LAZY:
            child.__dict__.pop("cls_to_become", None)
        if type(child) not in _TORCHS:
            continue
        lost = ["freeze()" if name == "frozen" else name for name in child._extras()]
        if lost:
            warnings.warn(
                f"{name or type(child).__name__}: torch.nn has no {' or '.join(lost)}; dropped",
                stacklevel=2,
            )
        for attribute in _BatchNorm.__annotations__:
            child.__dict__.pop(attribute, None)
        child.__class__ = _TORCHS[type(child)]
        if child.weight is not None and child.running_mean is not None:
            # What `.half()` left in float32 beside the parameters is nothing that torch mixes.
            child.running_mean = child.running_mean.to(child.weight.dtype)
            child.running_var = child.running_var.to(child.weight.dtype)
    return module


def freeze_batchnorm(module: _M, affine: bool = False) -> _M:
    """Freeze every batch norm in `module`: running statistics are used and not updated, also after ``train()``.

    Torch's own batch norm modules cannot stay frozen and are converted first, as by `convert_batchnorm`. Modules
    without running statistics have nothing to freeze and stay as they are.

    Parameters
    ----------
    module : torch.nn.Module
        Changed in place.
    affine : bool
        Also stop gradients of the weights and biases.

    Returns
    -------
    torch.nn.Module
        `module` itself; `unfreeze_batchnorm` undoes it.
    """
    for child in _ours(convert_batchnorm(module)):
        if child.running_mean is not None:
            child.freeze(affine=affine)
    return module


def unfreeze_batchnorm(module: _M) -> _M:
    """Undo `freeze_batchnorm`, in place: each batch norm returns to the mode last asked for.

    Returns
    -------
    torch.nn.Module
        `module` itself.
    """
    for child in _ours(module):
        child.unfreeze()
    return module


@contextlib.contextmanager
def pooled_statistics(module: nn.Module, momentum: float | None = None) -> Iterator[None]:
    """Update the running statistics once, at the end, with all samples that training passes see inside of the context.

    Each pass is still normalised with the statistics of its own batch. For gradients that are accumulated over small
    batches::

        with batchnorm_ext.pooled_statistics(model):
            for x, target in parts_of_a_batch:
                (loss(model(x), target) / parts).backward()

    and to estimate the statistics of the whole training data with the weights at hand (precise batch norm: Wu and
    Johnson, "Rethinking 'Batch' in BatchNorm", 2021, section 3)::

        with torch.no_grad(), batchnorm_ext.pooled_statistics(model.train(), momentum=1.0):
            for x, _ in loader:
                model(x)

    Parameters
    ----------
    module : torch.nn.Module
        Torch's own batch norm modules in it are converted first, as by `convert_batchnorm`.
    momentum : float, optional
        The share of what was pooled in the new running statistics; each module's own by default.

    Raises
    ------
    RuntimeError
        Inside of another such context for the same modules.

    Notes
    -----
    Means and variances are merged as those of parts of one batch (Chan, Golub and LeVeque, 1979), so batches may have
    different sizes, and masks are heeded. All that was pooled counts as one batch: for `num_batches_tracked`, for
    ``momentum=None``, and for `skip_nonfinite`. An exception that leaves the context leaves the running statistics
    as they were. `SyncBatchNorm` pools over the ranks, which must all leave the context. Each pass reads the input of
    a batch norm once more.
    """
    pooling: list[_BatchNorm] = []
    try:
        for child in _ours(convert_batchnorm(module)):
            child._start_pool()
            pooling.append(child)
        yield
    finally:
        pools = [child._end_pool() for child in pooling]
    for child, pool in zip(pooling, pools, strict=True):
        if pool is not None:
            child._move_statistics(pool, momentum)


def _ours(module: nn.Module) -> Iterator[_BatchNorm]:
    return (child for child in module.modules() if isinstance(child, _BatchNorm))
