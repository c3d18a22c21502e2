"""Batch norm modules: subclasses of torch's that run this package's kernels and can stay frozen."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.fx
from torch import Tensor, nn
from torch.compiler import is_compiling

from . import _operators
from ._extension import backend
from .autograd import is_recomputing
from .functional import (
    _kernels_apply,
    batch_norm_act_with_counter,
    batch_norm_with_counter,
    check_activation,
)
from .stepwise import empty_record, joined_record

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormAct1d",
    "BatchNormAct2d",
    "BatchNormAct3d",
]

_Self = TypeVar("_Self", bound="_BatchNorm")
_SIXTEEN_BIT = (torch.float16, torch.bfloat16)


class _BatchNorm(nn.modules.batchnorm._BatchNorm):
    """What the modules of this package add to torch's.

    The instance attributes below have their defaults on the class, so that a torch module turned into one of these
    (`convert_batchnorm`), or unpickled from before they existed, needs none of them.
    """

    skip_nonfinite: bool = False
    running_var_correction: int = 1
    on_single_value: str = "error"
    # While statistics are pooled: the record of all samples so far.
    _pool: Tensor | None = None
    _frozen: bool = False
    _training_when_unfrozen: bool | None = None
    _requires_grad_when_unfrozen: dict[str, bool] | None = None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        skip_nonfinite: bool = False,
        running_var_correction: int = 1,
        on_single_value: str = "error",
        **bias: bool,
    ) -> None:
        if running_var_correction not in (0, 1):
            raise ValueError(f"running_var_correction must be 0 or 1, got {running_var_correction}")
        if on_single_value not in ("error", "running"):
            raise ValueError(
                f"on_single_value must be 'error' or 'running', got {on_single_value!r}"
            )
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, **bias
        )
        options = {
            "skip_nonfinite": skip_nonfinite,
            "running_var_correction": running_var_correction,
            "on_single_value": on_single_value,
        }
        for name, value in options.items():
            if value != getattr(self, name):
                setattr(self, name, value)

    def forward(self, input: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Normalise `input`, of the shape the class documents, in its dtype and memory order.

        `mask`, bool and of the shape of `input` without its channels, says which samples count in training.
        """
        if type(input) is not Tensor and isinstance(input, torch.fx.Proxy):
            return self._traced(input, mask=mask)
        if mask is not None or self._pool is not None:
            return self._forward_act(input, None, "identity", 0.0, mask=mask)
        self._check_input_dim(input)
        call = self._call()
        if not is_compiling():
            # What batch_norm_with_counter begins with, without the time that one more Python call takes.
            output = backend().fast_path(input, *call)
            if output is not None:
                return output
        return batch_norm_with_counter(input, *self._for_batch(input, call))

    def _forward_act(
        self,
        input: Tensor,
        residual: Tensor | None,
        activation: str,
        negative_slope: float,
        inplace: bool = False,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Return ``activation(forward(input, mask) + residual)`` in one call."""
        self._check_input_dim(input)
        epilogue = activation, negative_slope, inplace, mask
        return self._run(input, residual, self._for_batch(input, self._call()), *epilogue)

    def _run(
        self,
        input: Tensor,
        residual: Tensor | None,
        call: tuple[Any, ...],
        activation: str,
        negative_slope: float,
        inplace: bool,
        mask: Tensor | None,
    ) -> Tensor:
        """Run a call of `_call`; while statistics are pooled, it leaves the running ones alone."""
        running_mean, running_var, weight, bias, counter, training, momentum, *options = call
        pooled = self._pool is not None and training
        if pooled:
            running_mean = running_var = counter = None
            momentum = 0.0
            inplace = False  # the input is read once more
        output = batch_norm_act_with_counter(
            *(
                input,
                residual,
                running_mean,
                running_var,
                weight,
                bias,
                counter,
                training,
                momentum,
            ),
            *(*options, activation, negative_slope, inplace, mask),
        )
        if pooled:
            self._add_to_pool(input, mask)
        return output

    def _start_pool(self) -> None:
        if self._pool is not None:
            raise RuntimeError("the statistics of this batch norm are being pooled already")
        if self.running_mean is not None:
            self._pool = empty_record(self.running_mean)

    def _add_to_pool(self, input: Tensor, mask: Tensor | None) -> None:
        assert self._pool is not None
        if torch.compiler.is_compiling() or not is_recomputing():
            native = _kernels_apply(input, None, None, mask)
            self._pool.copy_(joined_record(self._pool, input, mask, native))

    def _end_pool(self) -> Tensor | None:
        """Pool no longer, and return the record of what was pooled."""
        pool, self._pool = self._pool, None
        return pool

    def _move_statistics(self, pool: Tensor, momentum: float | None) -> None:
        """Move the running statistics by what was pooled, if there is anything."""
        records = self._pooled_records(pool)
        if self.track_running_stats and records[:, 1].sum() > 0:
            running = (self.running_mean, self.running_var, self.num_batches_tracked)
            steps = _operators.steps(_kernels_apply(records, *running))
            share = self.momentum if momentum is None else momentum
            options = self.skip_nonfinite, self.running_var_correction
            steps.finalize_statistics(records, *running, share, *options)

    def _pooled_records(self, pool: Tensor) -> Tensor:
        return pool.view(1, -1)

    def _traced(self, input: torch.fx.Proxy, residual: Any = None, *, mask: Any = None) -> Any:
        # A symbolic trace keeps the module whole, as it keeps torch's.
        tracer: Any = input.tracer
        path = tracer.path_of_module(self)
        arguments = (input,) if residual is None else (input, residual)
        options = {} if mask is None else {"mask": mask}
        return tracer.create_proxy("call_module", path, arguments, options)

    def _call(self) -> tuple[Any, ...]:
        """Return what `batch_norm_with_counter` takes behind its input."""
        try:  # nn.Module finds these only after everything else, which would take longer than the kernel
            parameters, buffers = self._parameters, self._buffers
            weight, bias = parameters["weight"], parameters["bias"]
            running_mean, running_var = buffers["running_mean"], buffers["running_var"]
            num_batches_tracked = buffers["num_batches_tracked"]
        except KeyError:  # a parametrization or a plain attribute stands in for one of them
            weight, bias = self.weight, self.bias
            running_mean, running_var = self.running_mean, self.running_var
            num_batches_tracked = self.num_batches_tracked
        training = self.training
        if not training:
            num_batches_tracked = None
        elif not self.track_running_stats:
            # The flag was cleared after construction: the buffers stay, unread and unwritten.
            running_mean = running_var = num_batches_tracked = None
        momentum = self.momentum
        if momentum is None and num_batches_tracked is None:
            momentum = 0.0
        return (
            running_mean,
            running_var,
            weight,
            bias,
            num_batches_tracked,
            training or (running_mean is None and running_var is None),
            momentum,
            self.eps,
            self.skip_nonfinite,
            self.running_var_correction,
        )

    def _for_batch(self, input: Tensor, call: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return `call`, or that of evaluation for a batch of one value per channel, where that is wanted."""
        if self.on_single_value == "error" or not self.training:
            return call
        vectors, (*_, eps, skip_nonfinite, correction) = call[:4], call
        if vectors[0] is None or input.size(0) * math.prod(input.shape[2:]) != 1:
            return call
        return *vectors, None, False, 0.0, eps, skip_nonfinite, correction

    @property
    def frozen(self) -> bool:
        """Whether `freeze` is in force."""
        return self._frozen

    def freeze(self: _Self, affine: bool = False) -> _Self:
        """Normalise with the running statistics, and leave them alone, whatever `train` is called with.

        Parameters
        ----------
        affine : bool
            Also stop gradients of weight and bias. Backward then keeps nothing but vectors of shape (C,).

        Returns
        -------
        The module itself. `unfreeze` undoes it.

        Raises
        ------
        RuntimeError
            The module has no running statistics to normalise with.
        """
        if self.running_mean is None or self.running_var is None:
            raise RuntimeError(
                "freeze() needs running statistics, but this module was made with track_running_stats=False"
            )
        if not self._frozen:
            self._training_when_unfrozen = self.training
            self._requires_grad_when_unfrozen = {}
            self._frozen = True
        if affine and self._requires_grad_when_unfrozen is not None:
            for name, parameter in self.named_parameters(recurse=False):
                self._requires_grad_when_unfrozen.setdefault(name, parameter.requires_grad)
                parameter.requires_grad_(False)
        super().train(False)
        return self

    def unfreeze(self: _Self) -> _Self:
        """Undo `freeze`: the mode that `train` last asked for, and the parameters' former requires_grad flags."""
        if not self._frozen:
            return self
        training = bool(self._training_when_unfrozen)
        requires_grad = self._requires_grad_when_unfrozen or {}
        for name in ("_frozen", "_training_when_unfrozen", "_requires_grad_when_unfrozen"):
            delattr(self, name)
        for name, flag in requires_grad.items():
            getattr(self, name).requires_grad_(flag)
        super().train(training)
        return self

    def train(self: _Self, mode: bool = True) -> _Self:
        """Set training mode, as `torch.nn.Module.train`; a frozen module remembers it for `unfreeze`."""
        if self._frozen:
            self._training_when_unfrozen = mode
            return super().train(False)
        return super().train(mode)

    def reset_running_stats(self) -> None:
        """Reset the running statistics, as torch's modules do; a frozen module keeps them."""
        if not self._frozen:
            super().reset_running_stats()

    def _apply(self: _Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Self:
        """Convert or move the module, as `half`, `to` and `cuda` do.

        Running statistics do not become 16-bit: there the small steps of an average round to nothing.
        """
        before = {name: self._buffers.get(name) for name in ("running_mean", "running_var")}
        super()._apply(fn, recurse)
        for name, wide in before.items():
            narrow = self._buffers.get(name)
            if wide is None or narrow is None or wide.dtype in _SIXTEEN_BIT:
                continue
            if narrow.dtype in _SIXTEEN_BIT:
                self._buffers[name] = wide.to(device=narrow.device, dtype=torch.float32)
        return self

    def __prepare_scriptable__(self) -> nn.Module:
        raise NotImplementedError(
            "torch.jit.script cannot compile batchnorm_ext's modules: call batchnorm_ext.revert_batchnorm(model) "
            "first (the parameters and buffers stay the same), or use torch.jit.trace or torch.export"
        )

    def extra_repr(self) -> str:
        """Return torch's description, and what differs from it."""
        asked = "".join(f", {name}={value}" for name, value in self._extras().items())
        return super().extra_repr() + asked

    def _extras(self) -> dict[str, Any]:
        """Return what was asked of this module that torch's cannot do."""
        defaults = {
            "skip_nonfinite": False,
            "running_var_correction": 1,
            "on_single_value": "error",
            "frozen": False,
        }
        values = {name: getattr(self, name) for name in defaults}
        return {name: value for name, value in values.items() if value != defaults[name]}


_DIFFERENCES = """

    Constructor, state_dict, errors and results are those of :class:`torch.nn.{name}`, which it subclasses.

    Parameters
    ----------
    num_features : int
        Number of channels, C.
    eps, momentum, affine, track_running_stats, device, dtype
        As in torch; also ``bias`` (keyword) where the installed torch has it.
    skip_nonfinite : bool, keyword-only
        Leave the running statistics of a channel alone when its batch mean or variance is not finite.
    running_var_correction : int, keyword-only
        1: `running_var` averages the unbiased variance, the squares over one sample less than there are, as in torch.
        0: the biased variance, which the batch is normalised with, as in TensorFlow, Keras and Flax.
    on_single_value : str, keyword-only
        What to do with a batch of one value per channel in training, of which there is no variance: ``"error"``, as in
        torch, or ``"running"``: normalise with the running statistics, as in evaluation, and leave them alone. A batch
        of which a mask counts one value is none of these.

    Raises
    ------
    ValueError
        A `running_var_correction` or `on_single_value` other than these.

    Shape: input and output {shapes}. ``forward`` has a keyword argument `mask`, as
    `batchnorm_ext.functional.batch_norm` has: the samples that count, of the shape of the input without its channels.

    ``half()``, ``bfloat16()`` and ``to`` a 16-bit dtype leave the running statistics in float32; ``dtype=`` above and
    assignment make them 16-bit.
    """


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    __doc__ = "Batch normalisation of (N, C) or (N, C, L) inputs." + _DIFFERENCES.format(
        name="BatchNorm1d", shapes="(N, C) or (N, C, L)"
    )


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    __doc__ = "Batch normalisation of (N, C, H, W) inputs." + _DIFFERENCES.format(
        name="BatchNorm2d", shapes="(N, C, H, W)"
    )


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    __doc__ = "Batch normalisation of (N, C, D, H, W) inputs." + _DIFFERENCES.format(
        name="BatchNorm3d", shapes="(N, C, D, H, W)"
    )


class _BatchNormAct(_BatchNorm):
    """Batch norm with a residual and an activation behind it."""

    activation: str = "relu"
    negative_slope: float = 0.01
    inplace: bool = False

    def __init__(
        self,
        num_features: int,
        *arguments: Any,
        activation: str = "relu",
        negative_slope: float = 0.01,
        inplace: bool = False,
        **options: Any,
    ) -> None:
        check_activation(activation, negative_slope, inplace)
        super().__init__(num_features, *arguments, **options)
        self.activation, self.negative_slope, self.inplace = activation, negative_slope, inplace

    def forward(
        self, input: Tensor, residual: Tensor | None = None, *, mask: Tensor | None = None
    ) -> Tensor:
        """Return ``activation(batch_norm(input) + residual)``, in the dtype and memory order of `input`.

        `mask` says which samples count, as in `BatchNorm2d`.
        """
        if type(input) is not Tensor and isinstance(input, torch.fx.Proxy):
            return self._traced(input, residual, mask=mask)
        return self._forward_act(
            input, residual, self.activation, self.negative_slope, self.inplace, mask
        )

    def extra_repr(self) -> str:
        """Return the description of batch norm, and what follows it."""
        text = f"{super().extra_repr()}, activation={self.activation}"
        if self.activation == "leaky_relu":
            text += f", negative_slope={self.negative_slope}"
        return text + ", inplace=True" if self.inplace else text


_ADDITIONS = """

    :class:`{name}` in everything but what follows the normalisation; its state_dict is the same.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, device, dtype
        As in :class:`{name}`, and so are `skip_nonfinite`, `running_var_correction` and `on_single_value`.
    activation : str, keyword-only
        ``"identity"``, ``"relu"`` (default), ``"relu6"``, ``"leaky_relu"``, ``"elu"``, ``"silu"`` or
        ``"hardswish"``.
    negative_slope : float, keyword-only
        Of leaky_relu; 0.01 by default.
    inplace : bool, keyword-only
        Allow the output to take the memory of the input, as `batchnorm_ext.functional.batch_norm_act` describes.

    Raises
    ------
    ValueError
        An unknown activation; `inplace` with one that cannot be inverted.

    Shape: input, residual (an optional second argument of forward) and output {shapes}; `mask` as in :class:`{name}`.
    """


class BatchNormAct1d(_BatchNormAct, BatchNorm1d):
    __doc__ = "``activation(batch_norm(input) + residual)`` of (N, C) or (N, C, L) inputs." + (
        _ADDITIONS.format(name="BatchNorm1d", shapes="(N, C) or (N, C, L)")
    )


class BatchNormAct2d(_BatchNormAct, BatchNorm2d):
    __doc__ = "``activation(batch_norm(input) + residual)`` of (N, C, H, W) inputs." + (
        _ADDITIONS.format(name="BatchNorm2d", shapes="(N, C, H, W)")
    )


class BatchNormAct3d(_BatchNormAct, BatchNorm3d):
    __doc__ = "``activation(batch_norm(input) + residual)`` of (N, C, D, H, W) inputs." + (
        _ADDITIONS.format(name="BatchNorm3d", shapes="(N, C, D, H, W)")
    )
