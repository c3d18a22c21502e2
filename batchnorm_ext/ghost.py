"""Ghost batch norm: batch norm modules that normalise a large batch in parts, each with its own statistics."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.fx
from torch import Tensor

from . import _reference
from ._extension import backend
from .functional import _kernels_apply, check_counted
from .modules import BatchNorm1d, BatchNorm2d, BatchNorm3d, _BatchNorm

__all__ = ["GhostBatchNorm1d", "GhostBatchNorm2d", "GhostBatchNorm3d"]


def _joined(parts: list[Tensor]) -> Tensor:
    """Return the parts of a batch as one, in their memory order, of which `torch.cat` keeps the usual ones alone."""
    order = sorted(range(parts[0].dim()), key=parts[0].stride, reverse=True)
    joined = torch.cat([part.permute(order) for part in parts], order.index(0))
    return joined.permute([order.index(dim) for dim in range(joined.dim())])


class _GhostBatchNorm(_BatchNorm):
    """Batch norm of parts of the batch in training, and of all of it in evaluation."""

    virtual_batch_size: int

    def __init__(
        self, num_features: int, *arguments: Any, virtual_batch_size: int, **options: Any
    ) -> None:
        if virtual_batch_size < 1:
            raise ValueError(f"virtual_batch_size must be at least 1, got {virtual_batch_size}")
        super().__init__(num_features, *arguments, **options)
        self.virtual_batch_size = virtual_batch_size

    def forward(self, input: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Normalise `input`, of the shape the class documents, in its dtype and memory order.

        `mask` says which samples count, as in `BatchNorm2d`.
        """
        if type(input) is not Tensor and isinstance(input, torch.fx.Proxy):
            return self._traced(input, mask=mask)
        self._check_input_dim(input)
        parts = -(-input.size(0) // self.virtual_batch_size)
        if parts <= 1 or not self.training or input.numel() == 0:
            return super().forward(input, mask=mask)
        eager = not torch.compiler.is_compiling()
        if mask is None and self._pool is None and eager:
            output = backend().fast_path(input, *self._call(), parts)
            if output is not None:
                return output
        # Nothing may be refused once the first part has updated the running statistics.
        inputs = input.tensor_split(parts)
        size = inputs[-1].shape
        if self.on_single_value == "error" and size[0] * math.prod(size[2:]) == 1:
            raise ValueError(
                "Expected more than 1 value per channel when training, got a part of size "
                f"{size} of an input of size {input.size()}"
            )
        masks: Any = [None] * parts
        if mask is not None:
            _reference.check_mask(mask, input)
            masks = mask.tensor_split(parts)
            if eager and _kernels_apply(input, None, None, mask):
                for part, counted in zip(inputs, masks, strict=True):
                    check_counted(counted, part)
        normalize = super().forward
        return _joined(
            [normalize(part, mask=counted) for part, counted in zip(inputs, masks, strict=True)]
        )

    def extra_repr(self) -> str:
        """Return the description of batch norm, and the size of the parts."""
        return f"{super().extra_repr()}, virtual_batch_size={self.virtual_batch_size}"


_GHOST = """

    In training the batch is cut into as few parts of at most `virtual_batch_size` samples as it takes, as equal as can
    be, and the result is that of :class:`{name}` called on each part in turn: each is normalised with its own
    statistics, and moves the running ones (Hoffer, Hubara and Soudry, "Train longer, generalize better: closing the
    generalization gap in large batch training of neural networks", 2017, algorithm 1). Large batches so keep the noise
    that small ones regularise with. In evaluation it is :class:`{name}`, whose state_dict it has.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, device, dtype
        As in :class:`{name}`, and so are `skip_nonfinite`, `running_var_correction` and `on_single_value`. `momentum` is
        of a part, and `num_batches_tracked` counts parts.
    virtual_batch_size : int, keyword-only
        The most samples of a part, N of its input; an attribute that may be assigned at any time. 1 normalises each
        sample by itself, as instance norm does.

    Raises
    ------
    ValueError
        `virtual_batch_size` below 1; a part of one value per channel, or with a mask on the CPU one of which less than
        two samples count. No buffer changes.

    Notes
    -----
    A call is one node of autograd's graph and no more than that: parts are read and written where they lie, by the
    kernels of batch norm, one part after the other. With a mask, while statistics are pooled, and where the kernels do
    not serve, parts are called one by one and joined. The memory order of an input is kept where its samples are outermost.

    Shape: input and output {shapes}.
    """


class GhostBatchNorm1d(_GhostBatchNorm, BatchNorm1d):
    __doc__ = "Ghost batch norm of (N, C) or (N, C, L) inputs." + _GHOST.format(
        name="BatchNorm1d", shapes="(N, C) or (N, C, L)"
    )


class GhostBatchNorm2d(_GhostBatchNorm, BatchNorm2d):
    __doc__ = "Ghost batch norm of (N, C, H, W) inputs." + _GHOST.format(
        name="BatchNorm2d", shapes="(N, C, H, W)"
    )


class GhostBatchNorm3d(_GhostBatchNorm, BatchNorm3d):
    __doc__ = "Ghost batch norm of (N, C, D, H, W) inputs." + _GHOST.format(
        name="BatchNorm3d", shapes="(N, C, D, H, W)"
    )
