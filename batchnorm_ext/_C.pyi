# Types of the native module; tests hold this file against the module itself.
from collections.abc import Sequence

import torch
from torch import Tensor

def forward(
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
) -> tuple[Tensor, Tensor, Tensor]: ...
def backward(
    grad_output: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    mean: Tensor,
    inv_std: Tensor,
    training: bool,
    need_dx: bool,
    dweight_dtype: torch.dtype | None,
    dbias_dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]: ...
def fast_path(
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
    correction: int,
    parts: int = 1,
) -> Tensor | None: ...
def forward_act(
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
    with_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]: ...
def backward_act(
    grad_output: Tensor,
    input: Tensor | None,
    residual: Tensor | None,
    weight: Tensor | None,
    mean: Tensor,
    inv_std: Tensor,
    shift: Tensor,
    mask: Tensor | None,
    strides: Sequence[int],
    training: bool,
    need_dx: bool,
    need_dresidual: bool,
    dweight_dtype: torch.dtype | None,
    dbias_dtype: torch.dtype | None,
    activation: str,
    negative_slope: float,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]: ...
def fast_path_act(
    input: Tensor,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    skip_nonfinite: bool,
    correction: int,
    activation: str,
    negative_slope: float,
    inplace: bool,
) -> Tensor | None: ...
def channel_statistics(input: Tensor, counted: Tensor | None = None) -> Tensor: ...
def finalize_statistics(
    records: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    skip_nonfinite: bool,
    correction: int,
) -> tuple[Tensor, Tensor, Tensor]: ...
def normalize(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]: ...
def input_gradient(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    inv_std: Tensor,
    sum_dy: Tensor,
    sum_dy_xhat: Tensor,
    count: Tensor,
) -> Tensor: ...
def normalize_act(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    eps: float,
    activation: str,
    negative_slope: float,
    with_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]: ...
def input_gradient_act(
    grad_output: Tensor,
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    mean: Tensor,
    inv_std: Tensor,
    shift: Tensor,
    mask: Tensor | None,
    sum_dy: Tensor,
    sum_dy_xhat: Tensor,
    count: Tensor,
    activation: str,
    negative_slope: float,
) -> Tensor: ...
def build_info() -> dict[str, str]: ...
