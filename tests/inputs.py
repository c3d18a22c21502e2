"""The shapes, memory layouts and call arguments the tests share, and why each is among them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

SHAPES = {
    "smallest-batch": (2, 1),
    "odd-rows-odd-features": (3, 5),
    "more-rows-than-features": (67, 3),
    "more-channels-than-threads": (4, 2048),
    "one-by-one-spatial": (9, 20, 1, 1),
    "one-channel": (2, 1, 28, 28),
    "one-sample": (1, 3, 5, 7),
    "one-long-row": (1, 1, 4099),
    "last-stage-of-resnet": (4, 64, 7, 7),
    "whole-vectors": (2, 16, 8, 8),
    "vector-heads-and-tails": (3, 17, 3, 5),
    "primes": (5, 3, 7, 11),
    "sequence": (4, 6, 33),
    "sequence-shorter-than-a-vector": (6, 10, 3),
    "volume": (2, 5, 3, 4, 7),
}
# Longer than a cache block, and than the runs whose partial sums are merged.
LARGE_SHAPES = {
    "more-than-a-cache-block": (6, 4, 113, 127),
    "channels-in-several-blocks": (16, 300, 14, 14),
    "rows-in-several-blocks": (9001, 33),
}


def every(table: dict[str, object]) -> dict[str, object]:
    """The table as arguments of ``pytest.mark.parametrize``: values and their ids."""
    return {"argvalues": list(table.values()), "ids": list(table)}


def _strided_like(
    x: torch.Tensor, storage_shape: tuple[int, ...], view: Callable[[torch.Tensor], torch.Tensor]
):
    # What lies between the elements must never be read into the result.
    target = view(torch.full(storage_shape, float("nan"), dtype=x.dtype, device=x.device))
    assert target.shape == x.shape
    target.copy_(x)
    return target


def contiguous(x: torch.Tensor) -> torch.Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """Channels innermost; for 3-D inputs an (N, L, C) tensor seen as (N, C, L)."""
    return x.movedim(1, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 1)


def batch_innermost(x: torch.Tensor) -> torch.Tensor:
    """Dense, with the batch as the dimension that moves fastest."""
    return x.movedim(0, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 0)


def transposed(x: torch.Tensor) -> torch.Tensor:
    """Dense, with the last two dimensions in the other order."""
    return x.transpose(-1, -2).clone(memory_format=torch.contiguous_format).transpose(-1, -2)


def sliced_batch(x: torch.Tensor) -> torch.Tensor:
    return _strided_like(x, (2 * x.shape[0], *x.shape[1:]), lambda t: t[::2])


def sliced_channels(x: torch.Tensor) -> torch.Tensor:
    return _strided_like(x, (x.shape[0], 3 * x.shape[1], *x.shape[2:]), lambda t: t[:, 1::3])


def sliced_last(x: torch.Tensor) -> torch.Tensor:
    return _strided_like(x, (*x.shape[:-1], 2 * x.shape[-1] + 1), lambda t: t[..., 1::2])


def misaligned(x: torch.Tensor) -> torch.Tensor:
    """Contiguous, one element past an aligned address."""
    return _strided_like(x, (x.numel() + 1,), lambda t: t[1:].view(x.shape))


def padded_channels_last(x: torch.Tensor) -> torch.Tensor:
    """Channels innermost, with a gap after each row of channels."""
    moved = x.movedim(1, -1)
    shape = (*moved.shape[:-1], moved.shape[-1] + 3)
    return _strided_like(moved, shape, lambda t: t[..., : moved.shape[-1]]).movedim(-1, 1)


DENSE_LAYOUTS = {
    "contiguous": contiguous,
    "channels-last": channels_last,
    "batch-innermost": batch_innermost,
    "transposed": transposed,
    "misaligned": misaligned,
}
STRIDED_LAYOUTS = {
    "sliced-batch": sliced_batch,
    "sliced-channels": sliced_channels,
    "sliced-last": sliced_last,
    "padded-channels-last": padded_channels_last,
}
LAYOUTS = DENSE_LAYOUTS | STRIDED_LAYOUTS


@dataclass
class Arguments:
    """The tensors of one batch norm call."""

    x: torch.Tensor
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    running_mean: torch.Tensor | None
    running_var: torch.Tensor | None
    dy: torch.Tensor

    def clone(self) -> Arguments:
        """Independent tensors with the same values, dtypes and requires_grad, dense."""

        def copy(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return (
                None
                if tensor is None
                else tensor.detach().clone().requires_grad_(tensor.requires_grad)
            )

        return Arguments(*map(copy, vars(self).values()))


def arguments(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    parameter_dtype: torch.dtype | None = None,
    *,
    device: str = "cpu",
    layout: Callable[[torch.Tensor], torch.Tensor] = contiguous,
    weight: bool = True,
    bias: bool = True,
    running: bool = True,
    requires_grad: bool = True,
    mean: float = 0.5,
    std: float = 2.0,
) -> Arguments:
    """Random tensors for one call; parameters and statistics default to the dtype torch's mixed mode keeps them in."""
    parameter_dtype = parameter_dtype or dtype
    channels = shape[1]

    def normal(size: tuple[int, ...], center: float, spread: float) -> torch.Tensor:
        return torch.randn(size, dtype=torch.float64, device=device) * spread + center

    def vector(values: torch.Tensor) -> torch.Tensor:
        return values.to(device=device, dtype=parameter_dtype)

    x = layout(normal(shape, mean, std).to(device=device, dtype=dtype))
    parameters = [vector(normal((channels,), 1.0, 0.5)), vector(normal((channels,), 0.0, 1.0))]
    statistics = [
        vector(normal((channels,), 0.3, 1.0)),
        vector(torch.rand(channels, dtype=torch.float64, device=device) + 0.5),
    ]
    dy = normal(shape, 0.1, 1.0).to(device=device, dtype=dtype)
    return Arguments(
        x.requires_grad_(requires_grad),
        parameters[0].requires_grad_(requires_grad) if weight else None,
        parameters[1].requires_grad_(requires_grad) if bias else None,
        statistics[0] if running else None,
        statistics[1] if running else None,
        dy,
    )


def with_random_state(module: torch.nn.Module) -> torch.nn.Module:
    """The batch norm with parameters and running statistics that are not the initial ones."""
    with torch.no_grad():
        for name, values in module.state_dict().items():
            if values.is_floating_point():
                values.normal_()
                if name == "running_var":
                    values.abs_().add_(0.2)
    return module
