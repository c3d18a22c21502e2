"""The native functions as operators for torch.compile and dispatch modes: their registration and fake kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from . import _reference
from ._extension import backend


@torch.compiler.assume_constant_result
def operators_available() -> bool:
    """Obtain the backend, outside of tracing, and return whether it brought operators along."""
    return backend() is not _reference and _register_fakes()


def _register_fakes() -> bool:
    if not _registered:
        torch.library.register_fake("batchnorm_ext::forward", _fake_forward)
        torch.library.register_fake("batchnorm_ext::backward", _fake_backward)
        torch.library.register_fake("batchnorm_ext::forward_act", _fake_forward_act)
        torch.library.register_fake("batchnorm_ext::backward_act", _fake_backward_act)
        torch.library.register_fake("batchnorm_ext::channel_statistics", _fake_channel_statistics)
        torch.library.register_fake("batchnorm_ext::finalize_statistics", _fake_finalize_statistics)
        torch.library.register_fake("batchnorm_ext::normalize", _fake_forward)
        torch.library.register_fake("batchnorm_ext::normalize_act", _fake_forward_act)
        torch.library.register_fake("batchnorm_ext::input_gradient", _fake_input_gradient)
        torch.library.register_fake("batchnorm_ext::input_gradient_act", _fake_input_gradient)
        _registered.append(True)
    return True


_registered: list[bool] = []


def _fake_forward(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    statistics = input.new_empty(input.size(1), dtype=_reference.accumulate_dtype(input.dtype))
    return torch.empty_like(_reference.dense(input)), statistics, torch.empty_like(statistics)


def _fake_forward_act(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *others: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    output, mean, inv_std = _fake_forward(input, weight, bias)
    with_mask = others[-1]
    mask = (
        input.new_empty(_mask_bytes(output), dtype=torch.uint8) if with_mask else input.new_empty(0)
    )
    return output, mean, inv_std, torch.empty_like(mean), mask


def _mask_bytes(output: Tensor) -> int:
    """Return what the function of this name in csrc/core/params.h does."""
    elements, channels = output.numel(), output.size(1)
    inner = elements if channels == 1 else output.stride(1)
    if elements == 0:
        return 0
    if inner == 1:
        return elements // channels * ((channels + 7) // 8)
    started = torch.sym_min(
        inner % 8, 1
    )  # without a condition that a compiled program would depend on
    return elements // inner * ((inner + 14 * started) // 8)


def _fake_backward(
    grad_output: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    mean: Tensor,
    inv_std: Tensor,
    training: bool,
    need_dx: bool,
    dweight_dtype: torch.dtype | None,
    dbias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    def vector(dtype: torch.dtype | None) -> Tensor:
        return (
            grad_output.new_empty(0) if dtype is None else mean.new_empty(mean.shape, dtype=dtype)
        )

    like = grad_output
    if dweight_dtype is not None or (training and need_dx):
        assert input is not None
        like = input
    dx = torch.empty_like(_reference.dense(like)) if need_dx else grad_output.new_empty(0)
    return dx, vector(dweight_dtype), vector(dbias_dtype)


def _fake_backward_act(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    like = input
    if mask is not None and not (dweight_dtype is not None or (training and need_dx)):
        like = grad_output.new_empty_strided(grad_output.shape, strides)
    assert like is not None
    dx, dweight, dbias = _fake_backward(
        grad_output, like, weight, mean, inv_std, training, need_dx, dweight_dtype, dbias_dtype
    )
    if need_dx:
        dx = torch.empty_like(_reference.dense(like))
    dresidual = (
        torch.empty_like(_reference.dense(like)) if need_dresidual else grad_output.new_empty(0)
    )
    return dx, dresidual, dweight, dbias


def _fake_channel_statistics(input: Tensor, counted: Tensor | None = None) -> Tensor:
    return input.new_empty(_reference.RECORD_HEADER + 2 * input.size(1), dtype=torch.float64)


def _fake_finalize_statistics(records: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    channels = (records.size(1) - _reference.RECORD_HEADER) // 2
    return records.new_empty(channels), records.new_empty(channels), records.new_empty(1)


def _fake_input_gradient(grad_output: Tensor, input: Tensor, *_: object) -> Tensor:
    return torch.empty_like(_reference.dense(input))


def being_traced() -> bool:
    """Return whether a dispatch mode records a program, as make_fx and fake tensors do."""
    modes = torch._C._TorchDispatchModeKey
    return any(
        torch._C._get_dispatch_mode(mode) is not None
        for mode in (modes.PROXY, modes.FAKE, modes.FUNCTIONAL)
    )


def being_watched() -> bool:
    """Return whether a dispatch mode sees the operators that are called, as in selective checkpointing."""
    return torch._C._len_torch_dispatch_stack() > 0


def being_kept_from_writes() -> bool:
    """Return whether torch.autograd.graph.allow_mutation_on_saved_tensors is in force.

    Its mode looks at each argument that an operator may write, and fails where that is None.
    """
    return being_watched() and any(
        isinstance(mode, torch.autograd.graph._CloneArgBeforeMutateMode)
        for mode in _get_current_dispatch_mode_stack()
    )


def _as_operator() -> bool:
    return (torch.compiler.is_compiling() or being_watched()) and operators_available()


def _directly() -> Any:
    # Without operators, what can be traced is plain PyTorch.
    return _reference if torch.compiler.is_compiling() else backend()


def forward(*arguments: object) -> tuple[Tensor, Tensor, Tensor]:
    """The backend's `forward`, as an operator where torch.compile or a dispatch mode is to see it."""
    if _as_operator():
        return torch.ops.batchnorm_ext.forward(*arguments)
    return _directly().forward(*arguments)


def backward(*arguments: object) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The backend's `backward`, as an operator where torch.compile or a dispatch mode is to see it."""
    if not _as_operator():
        return _directly().backward(*arguments)
    dx, dweight, dbias = torch.ops.batchnorm_ext.backward(*arguments)
    need_dx, dweight_dtype, dbias_dtype = arguments[6:]
    return (
        dx if need_dx else None,
        None if dweight_dtype is None else dweight,
        None if dbias_dtype is None else dbias,
    )


def forward_act(*arguments: object) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """The backend's `forward_act`, as an operator where torch.compile or a dispatch mode is to see it."""
    if not _as_operator():
        return _directly().forward_act(*arguments)
    *results, mask = torch.ops.batchnorm_ext.forward_act(*arguments)
    with_mask = arguments[14]
    return (*results, mask if with_mask else None)


def backward_act(
    *arguments: object,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The backend's `backward_act`, as an operator where torch.compile or a dispatch mode is to see it."""
    if not _as_operator():
        return _directly().backward_act(*arguments)
    results = torch.ops.batchnorm_ext.backward_act(*arguments)
    need_dx, need_dresidual, dweight_dtype, dbias_dtype = arguments[10:14]
    asked = need_dx, need_dresidual, dweight_dtype is not None, dbias_dtype is not None
    dx, dresidual, dweight, dbias = (
        t if want else None for t, want in zip(results, asked, strict=True)
    )
    return dx, dresidual, dweight, dbias


def steps(native: bool) -> Any:
    """What has the steps one by one: the backend, as operators where torch.compile or a dispatch mode is to see them.

    Not `native`, for tensors that the kernels do not see, plain PyTorch, which works on any device.
    """
    if not native:
        return _reference
    return torch.ops.batchnorm_ext if _as_operator() else _directly()
