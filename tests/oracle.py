"""Batch norm by its definition, in extended precision, one channel at a time: what the tests compare numbers with.

Beside each result stands its scale: the size of the terms that were added to make it. An error is judged against the
scale, so that a sum which happens to cancel is not held to a precision that its terms do not have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

Array = np.ndarray


@dataclass(frozen=True)
class Exact:
    """A result in extended precision, and the size of the terms it was made of."""

    value: Array
    scale: Array


def exact(tensor: torch.Tensor) -> Array:
    """The tensor's values, which every dtype under test converts without loss."""
    return tensor.detach().to(device="cpu", dtype=torch.float64).numpy().astype(np.longdouble)


def _per_channel(vector: Array, rank: int) -> Array:
    return vector.reshape((1, -1) + (1,) * (rank - 2))


def _channel_axes(x: Array) -> tuple[int, ...]:
    return (0, *range(2, x.ndim))


def _vector(tensor: torch.Tensor | None, channels: int, default: float) -> Array:
    if tensor is None:
        return np.full(channels, default, dtype=np.longdouble)
    return exact(tensor).reshape(-1)


class BatchNorm:
    """One batch norm call: statistics, output, running updates and gradients.

    Parameters
    ----------
    x : Tensor
        Input of shape (N, C, ...).
    weight, bias : Tensor or None
        Shape (C,); 1 and 0 where None.
    running_mean, running_var : Tensor or None
        The running statistics before the call.
    training : bool
        Whether the batch's own statistics normalise.
    momentum : float or None
        None is the cumulative average, 1 / (batches + 1).
    batches : int
        How many batches the running statistics have seen before this one.
    counted : bool Tensor of shape (N, ...) or None
        Which samples the batch's own statistics are of; all where None.
    correction : int
        How many samples less than there are divide the squares in the running variance.
    """

    def __init__(
        self,
        x: torch.Tensor,
        weight: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        running_mean: torch.Tensor | None = None,
        running_var: torch.Tensor | None = None,
        *,
        training: bool = True,
        momentum: float | None = 0.1,
        eps: float = 1e-5,
        batches: int = 0,
        counted: torch.Tensor | None = None,
        correction: int = 1,
    ) -> None:
        self.training = training
        self._x = exact(x)
        rank, channels = x.dim(), x.shape[1]
        self._axes = _channel_axes(self._x)
        self._counted = np.ones((x.shape[0], 1, *x.shape[2:]), dtype=bool)
        if counted is not None:
            self._counted = counted.cpu().numpy()[:, np.newaxis]
        self._samples = int(self._counted.sum())
        # Samples that do not count stand in for the mean where the others are summed, each with a rounding of its own.
        stand_ins = self._counted.size / max(self._samples, 1)
        self._weight = _vector(weight, channels, 1.0)
        self._bias = _vector(bias, channels, 0.0)
        old_mean = None if running_mean is None else _vector(running_mean, channels, 0.0)
        old_var = None if running_var is None else _vector(running_var, channels, 1.0)

        if training:
            self.mean = self._mean(self._x)
            deviation = self._x - _per_channel(self.mean, rank)
            self.variance = self._mean(deviation**2)
        else:
            assert old_mean is not None
            assert old_var is not None
            self.mean, self.variance = old_mean, old_var
            deviation = self._x - _per_channel(self.mean, rank)
        self.inv_std = 1 / np.sqrt(self.variance + np.longdouble(eps))
        self.xhat = deviation * _per_channel(self.inv_std, rank)

        weighted = self.xhat * _per_channel(self._weight, rank)
        # The statistics carry an error of their own, as large as a typical deviation's. Where x is float64 there is no
        # wider type to keep a large mean in, and its rounding, relative to the deviation, is added.
        self._lost = np.abs(self.mean) if x.dtype == torch.float64 else np.zeros(channels)
        typical = np.abs(self._weight) * self.inv_std * (np.sqrt(self.variance) + self._lost)
        typical = typical * stand_ins
        self.y = Exact(
            weighted + _per_channel(self._bias, rank),
            np.abs(weighted) + _per_channel(typical + np.abs(self._bias), rank),
        )

        self.running_mean = self.running_var = None
        if training and old_mean is not None and old_var is not None:
            share = np.longdouble(1 / (batches + 1) if momentum is None else momentum)
            corrected = self.variance * self._samples / np.longdouble(self._samples - correction)
            magnitude = self._mean(np.abs(self._x)) + stand_ins * np.sqrt(self.variance)
            self.running_mean = self._moved(old_mean, Exact(self.mean, magnitude), share)
            self.running_var = self._moved(
                old_var,
                Exact(corrected, stand_ins * (corrected + self._lost * np.sqrt(corrected))),
                share,
            )

    def _mean(self, values: Array) -> Array:
        return np.where(self._counted, values, 0).sum(axis=self._axes) / np.longdouble(
            self._samples
        )

    @staticmethod
    def _moved(old: Array, new: Exact, share: np.longdouble) -> Exact:
        kept, added = (1 - share) * old, share * new.value
        return Exact(kept + added, np.abs(old) + np.abs(kept) + np.abs(share) * new.scale)

    def gradients(self, dy: torch.Tensor) -> tuple[Exact, Exact, Exact]:
        """The gradients of x, weight and bias for the output gradient ``dy``."""
        gradient = exact(dy)
        return self._gradients(Exact(gradient, np.abs(gradient)))

    def _gradients(self, dy: Exact) -> tuple[Exact, Exact, Exact]:
        rank = self._x.ndim
        gradient = dy.value
        terms = gradient * self.xhat
        sum_dy = gradient.sum(axis=self._axes)
        sum_dy_xhat = terms.sum(axis=self._axes)
        magnitude_dy = dy.scale.sum(axis=self._axes)
        magnitude_dy_xhat = (dy.scale * np.abs(self.xhat)).sum(axis=self._axes)
        # The mean is saved in the accumulate type: rounding it shifts every xhat of the channel together.
        shift = np.abs(self.mean) * self.inv_std

        slope = _per_channel(self._weight * self.inv_std, rank)
        dx, dx_scale = gradient, dy.scale
        if self.training:
            count = max(self._samples, 1)
            mean_dy = _per_channel(sum_dy / count, rank)
            mean_dy_xhat = _per_channel(sum_dy_xhat / count, rank)
            dx = gradient - np.where(self._counted, mean_dy + self.xhat * mean_dy_xhat, 0)
            per_xhat = (magnitude_dy_xhat + shift * np.abs(sum_dy)) / count
            means = _per_channel(
                (magnitude_dy + shift * np.abs(sum_dy_xhat)) / count, rank
            ) + np.abs(self.xhat) * _per_channel(per_xhat, rank)
            # What is made of sums comes with their errors, which are as large again as those of the arithmetic here.
            dx_scale = dy.scale + 2 * means
        return (
            Exact(dx * slope, dx_scale * np.abs(slope)),
            Exact(sum_dy_xhat, magnitude_dy_xhat + shift * np.abs(sum_dy)),
            Exact(sum_dy, magnitude_dy),
        )


@dataclass(frozen=True)
class Activation:
    """Value and derivative of an activation, the most that either changes by a change of its argument, and jumps."""

    value: Callable[[Array], Array]
    derivative: Callable[[Array], Array]
    steepest: float = 1.0
    most_curved: float = 0.0
    jumps: tuple[float, ...] = ()  # where the derivative is not continuous


def activation(name: str, negative_slope: float = 0.01) -> Activation:
    """An activation by its definition. At a kink the derivative is that of the left side, as in torch."""
    slope = np.longdouble(negative_slope)

    def sigmoid(u: Array) -> Array:
        return 1 / (1 + np.exp(-u))

    return {
        "identity": Activation(lambda u: u, np.ones_like),
        "relu": Activation(
            lambda u: np.maximum(u, 0), lambda u: (u > 0).astype(u.dtype), jumps=(0,)
        ),
        "relu6": Activation(
            lambda u: np.clip(u, 0, 6), lambda u: ((u > 0) & (u < 6)).astype(u.dtype), jumps=(0, 6)
        ),
        "leaky_relu": Activation(
            lambda u: np.where(u > 0, u, slope * u),
            lambda u: np.where(u > 0, np.longdouble(1), slope),
            max(1.0, abs(negative_slope)),
            jumps=(0,),
        ),
        "elu": Activation(
            lambda u: np.where(u > 0, u, np.expm1(np.minimum(u, 0))),
            lambda u: np.where(u > 0, 1, np.exp(np.minimum(u, 0))),
            1.0,
            1.0,
        ),
        "silu": Activation(
            lambda u: u * sigmoid(u),
            lambda u: sigmoid(u) * (1 + u * (1 - sigmoid(u))),
            1.1,
            0.5,
        ),
        "hardswish": Activation(
            lambda u: u * np.clip(u + 3, 0, 6) / 6,
            lambda u: np.where(u <= -3, 0, np.where(u >= 3, 1, u / 3 + np.longdouble(0.5))),
            1.5,
            0.34,
            (-3, 3),
        ),
    }[name]


class BatchNormAct(BatchNorm):
    """As BatchNorm, of ``activation(batch_norm(x) + residual)``."""

    def __init__(
        self,
        *tensors: torch.Tensor | None,
        residual: torch.Tensor | None = None,
        activation_name: str = "relu",
        negative_slope: float = 0.01,
        **options: object,
    ) -> None:
        super().__init__(*tensors, **options)
        self._activation = activation(activation_name, negative_slope)
        added = 0 if residual is None else exact(residual)
        self.u = Exact(self.y.value + added, self.y.scale + np.abs(added))
        self.y = Exact(
            self._activation.value(self.u.value), self.u.scale * self._activation.steepest
        )

    def clearance(self) -> float:
        """How far u is from where the derivative jumps, at least, in units of its scale.

        Closer than its rounding, either side is right.
        """
        distances = [np.abs(self.u.value - at) / self.u.scale for at in self._activation.jumps]
        return float(min((d.min(initial=np.inf) for d in distances), default=np.inf))

    def gradients(self, dy: torch.Tensor) -> tuple[Exact, Exact, Exact, Exact]:
        """The gradients of x, weight, bias and residual for the output gradient ``dy``."""
        derivative = self._activation.derivative(self.u.value)
        spread = np.abs(derivative) + self._activation.most_curved * self.u.scale
        gradient = Exact(exact(dy) * derivative, np.abs(exact(dy)) * spread)
        return (*self._gradients(gradient), gradient)
