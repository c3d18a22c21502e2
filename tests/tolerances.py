"""How far a result may be from the oracle: one table, and a reason for each row."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from oracle import Exact, exact

# Sums and statistics are kept in this type, whatever is stored.
ACCUMULATE = {
    torch.float64: torch.float64,
    torch.float32: torch.float32,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
}


@dataclass(frozen=True)
class Tolerance:
    """Roundings of the accumulate type, each as large as the result's scale, that a result may be off by."""

    roundings: float
    reason: str
    # float64 has no wider type to carry the mean and merge partial sums in.
    in_float64: float | None = None

    def of(self, accumulate: torch.dtype) -> float:
        """The roundings allowed where sums are kept in ``accumulate``."""
        return (
            self.in_float64 if accumulate == torch.float64 and self.in_float64 else self.roundings
        )


TOLERANCES = {
    "y": Tolerance(
        8,
        "x - mean, scale and the final multiply-add round once each, and half of the variance's error comes in. "
        "A large mean is no excuse: the mean is carried beyond the accumulate type.",
        in_float64=24,
    ),
    "dx": Tolerance(
        8,
        "both coefficients, the two differences and the multiply-add round once each, and the saved inv_std, rounded "
        "to the accumulate type, enters up to three times. The sums' own errors, that of inv_std twice, are as large "
        "again: the oracle counts terms made of sums double. They show where dy resembles xhat, so that dx cancels.",
        in_float64=24,
    ),
    "dweight": Tolerance(
        8,
        "partial sums of a bounded length, merged pairwise or in double: the error stays near a few roundings of the "
        "sum of magnitudes, however many samples there are.",
    ),
    "dbias": Tolerance(8, "as dweight, with one rounding less a term."),
    "dresidual": Tolerance(
        8,
        "dy times the activation's derivative, where u is as exact as y in front of the activation.",
        in_float64=24,
    ),
    "running_mean": Tolerance(4, "one interpolation between two values, and the mean's own error."),
    "running_var": Tolerance(
        8,
        "as running_mean; the variance is a sum of squares, whose relative error is twice that of its terms.",
        in_float64=24,
    ),
}


def allowed(
    quantity: str, expected: Exact, stored: torch.dtype, accumulate: torch.dtype
) -> np.ndarray:
    """The largest error allowed for each element of a quantity of TOLERANCES."""
    storage, sums = torch.finfo(stored), torch.finfo(ACCUMULATE[accumulate])
    rounding = np.longdouble(sums.eps) / 2
    error = TOLERANCES[quantity].of(ACCUMULATE[accumulate]) * rounding * expected.scale
    if storage.eps > sums.eps:  # rounded once more, to be stored
        error = error + np.longdouble(storage.eps) / 2 * (np.abs(expected.value) + error)
    return error + np.longdouble(storage.smallest_normal) * storage.eps


def assert_matches(
    actual: torch.Tensor, expected: Exact, quantity: str, accumulate: torch.dtype | None = None
) -> None:
    """Fail, naming the worst element, unless ``actual`` is within its tolerance of the oracle everywhere.

    ``accumulate`` is the dtype of the call's input where the quantity is stored in another one.
    """
    limit = allowed(quantity, expected, actual.dtype, accumulate or actual.dtype)
    value = exact(actual)
    assert value.shape == expected.value.shape, (
        f"{quantity}: shape {value.shape}, not {expected.value.shape}"
    )
    if value.size == 0:
        return
    assert np.isfinite(value).all(), (
        f"{quantity}: {np.count_nonzero(~np.isfinite(value))} non-finite values"
    )
    excess = np.abs(value - expected.value) / limit
    worst = np.unravel_index(np.argmax(excess), excess.shape)
    assert excess[worst] <= 1, (
        f"{quantity}{list(map(int, worst))} is {float(value[worst])!r}, expected {float(expected.value[worst])!r}: "
        f"{float(excess[worst]):.3g} times the error allowed ({float(limit[worst]):.3g}), "
        f"{np.count_nonzero(excess > 1)} of {excess.size} elements too far off"
    )
