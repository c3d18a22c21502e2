"""Batch normalisation for PyTorch with fused native kernels; a drop-in for `torch.nn.BatchNorm1d/2d/3d`.

>>> import torch, batchnorm_ext
>>> layer = batchnorm_ext.BatchNorm2d(64)                  # instead of torch.nn.BatchNorm2d
>>> model = batchnorm_ext.convert_batchnorm(model)         # or a whole model, in place  # doctest: +SKIP
"""

from . import functional
from ._extension import load
from ._version import __version__
from .autograd import BatchNormFunction
from .convert import (
    convert_batchnorm,
    freeze_batchnorm,
    pooled_statistics,
    revert_batchnorm,
    unfreeze_batchnorm,
)
from .distributed import SyncBatchNorm, SyncBatchNormAct, revert_sync_batchnorm
from .ghost import GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d
from .modules import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    BatchNormAct1d,
    BatchNormAct2d,
    BatchNormAct3d,
)
from .renorm import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormAct1d",
    "BatchNormAct2d",
    "BatchNormAct3d",
    "BatchNormFunction",
    "BatchRenorm1d",
    "BatchRenorm2d",
    "BatchRenorm3d",
    "GhostBatchNorm1d",
    "GhostBatchNorm2d",
    "GhostBatchNorm3d",
    "SyncBatchNorm",
    "SyncBatchNormAct",
    "__version__",
    "convert_batchnorm",
    "freeze_batchnorm",
    "functional",
    "load",
    "pooled_statistics",
    "revert_batchnorm",
    "revert_sync_batchnorm",
    "unfreeze_batchnorm",
]
