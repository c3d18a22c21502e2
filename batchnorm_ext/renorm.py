"""Batch renormalisation: batch norm modules that normalise in training nearly as they will in evaluation."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx
from torch import Tensor

from . import _operators, _reference
from .autograd import is_recomputing
from .functional import _kernels_apply
from .modules import BatchNorm1d, BatchNorm2d, BatchNorm3d, _BatchNorm

__all__ = ["BatchRenorm1d", "BatchRenorm2d", "BatchRenorm3d"]


@torch.no_grad()
def _corrections(
    input: Tensor,
    mask: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    r_max: float,
    d_max: float,
) -> tuple[Tensor, Tensor]:
    """Return r and d of Ioffe (2017), section 3: what leads from the batch's statistics to the running ones."""
    native = _kernels_apply(input, running_mean, running_var, mask)
    record = _operators.steps(native).channel_statistics(input, mask)
    mean, m2 = record[_reference.RECORD_HEADER :].split(input.size(1))
    variance = m2 / record[1]
    running_inv_std = (running_var.double() + eps).rsqrt()
    r = ((variance + eps).sqrt() * running_inv_std).clamp(1.0 / r_max, r_max)
    d = ((mean - running_mean) * running_inv_std).clamp(-d_max, d_max)
    dtype = _reference.accumulate_dtype(input.dtype)
    return r.to(dtype), d.to(dtype)


class _BatchRenorm(_BatchNorm):
    """Batch norm whose training output is corrected towards that of evaluation."""

    r_max: float = 3.0
    d_max: float = 5.0
    # Of the last forward pass. Not a buffer: checkpoints stay those of batch norm.
    _last_corrections: tuple[Tensor, Tensor] | None = None

    def __init__(
        self,
        num_features: int,
        *arguments: Any,
        r_max: float = 3.0,
        d_max: float = 5.0,
        **options: Any,
    ) -> None:
        super().__init__(num_features, *arguments, **options)
        self.r_max, self.d_max = r_max, d_max
        self._check_bounds()

    def _check_bounds(self) -> None:
        if not self.r_max >= 1.0:
            raise ValueError(f"r_max must be at least 1, got {self.r_max}")
        if not self.d_max >= 0.0:
            raise ValueError(f"d_max must not be negative, got {self.d_max}")

    def forward(self, input: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Normalise `input`, of the shape the class documents, in its dtype and memory order.

        `mask` says which samples count, as in `BatchNorm2d`.
        """
        if type(input) is not Tensor and isinstance(input, torch.fx.Proxy):
            return self._traced(input, mask=mask)
        running_mean, running_var, weight, bias, *rest = self._for_batch(input, self._call())
        _, training, *_ = rest
        if not training or running_mean is None or input.numel() == 0:
            return super().forward(input, mask=mask)
        self._check_input_dim(input)
        self._check_bounds()
        if mask is not None:
            _reference.check_mask(mask, input)
        _reference.check_channel_vectors(input, running_mean, running_var, weight, bias)
        eager = not torch.compiler.is_compiling()
        corrections = self._last_corrections if eager and is_recomputing() else None
        if corrections is None:
            corrections = _corrections(
                input, mask, running_mean, running_var, self.eps, self.r_max, self.d_max
            )
            if eager:
                self._last_corrections = corrections
        # r and d are constants to the gradient, so what remains is batch norm with another scale and shift.
        r, d = corrections
        scale = r if weight is None else weight * r
        shift = d if weight is None else weight * d
        shift = shift if bias is None else bias + shift
        call = (running_mean, running_var, scale, shift, *rest)
        return self._run(input, None, call, "identity", 0.0, False, mask)

    def extra_repr(self) -> str:
        """Return the description of batch norm, and the bounds of the correction."""
        return f"{super().extra_repr()}, r_max={self.r_max}, d_max={self.d_max}"


_RENORM = """

    In training the batch's statistics are corrected towards the running ones, so that a small or skewed batch is
    normalised as it will be in evaluation: ``((x - mean) / std * r + d) * weight + bias`` with
    ``r = std / running_std`` within ``[1 / r_max, r_max]`` and ``d = (mean - running_mean) / running_std`` within
    ``[-d_max, d_max]``, both constants to the gradient (Ioffe, "Batch Renormalization: Towards Reducing Minibatch
    Dependence in Batch-Normalized Models", 2017). In evaluation it is :class:`{name}`, whose state_dict it has:
    ``running_std`` is the root of ``running_var + eps``, and r and d see the statistics of the batches before this one.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, device, dtype
        As in :class:`{name}`, and so are `skip_nonfinite`, `running_var_correction` and `on_single_value`. Without running statistics there is nothing to correct towards: plain batch norm.
    r_max, d_max : float, keyword-only
        Bounds of the correction, attributes that may be assigned at any time. 1 and 0 make it plain batch norm, which
        the paper begins with, going over to 3 and 5 once the running statistics have settled.

    Raises
    ------
    ValueError
        `r_max` below 1 or `d_max` below 0.

    Notes
    -----
    The statistics are computed once more than in batch norm: one further read of the input. Activation checkpointing
    recomputes with r and d of the module's last forward pass, so it is exact where a module is called once before
    each backward pass.

    Shape: input and output {shapes}.
    """


class BatchRenorm1d(_BatchRenorm, BatchNorm1d):
    __doc__ = "Batch renormalisation of (N, C) or (N, C, L) inputs." + _RENORM.format(
        name="BatchNorm1d", shapes="(N, C) or (N, C, L)"
    )


class BatchRenorm2d(_BatchRenorm, BatchNorm2d):
    __doc__ = "Batch renormalisation of (N, C, H, W) inputs." + _RENORM.format(
        name="BatchNorm2d", shapes="(N, C, H, W)"
    )


class BatchRenorm3d(_BatchRenorm, BatchNorm3d):
    __doc__ = "Batch renormalisation of (N, C, D, H, W) inputs." + _RENORM.format(
        name="BatchNorm3d", shapes="(N, C, D, H, W)"
    )
