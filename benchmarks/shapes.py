"""Which tensors are measured: named cases and the sets they form."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
LAYOUTS = ("contiguous", "channels_last")


@dataclass(frozen=True)
class Case:
    """One batch norm input: where it comes from, its shape, dtype and memory layout.

    Attributes
    ----------
    name
        ``set/layer``, for example ``resnet50/64x56``.
    shape
        ``(N, C, *spatial)``.
    dtype, layout
        Keys of `DTYPES` and `LAYOUTS`; ``channels_last`` means the 3d variant for five dimensions.
    count
        How often the network has this layer.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    layout: str = "contiguous"
    count: int = 1

    @property
    def channels(self) -> int:
        return self.shape[1]

    @property
    def bytes(self) -> int:
        """Size of the input in bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    @property
    def memory_format(self) -> torch.memory_format:
        if self.layout == "contiguous":
            return torch.contiguous_format
        return torch.channels_last if len(self.shape) == 4 else torch.channels_last_3d

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        return f"{self.name} {shape} {self.dtype} {self.layout}"


def _layers(network: str, layers: Iterable[tuple[int, int, int]], batch: int) -> list[Case]:
    """Cases of a 2d network given as ``(channels, height, count)``."""
    return [
        Case(f"{network}/{channels}x{size}", (batch, channels, size, size), count=count)
        for channels, size, count in layers
    ]


def resnet50(batch: int) -> list[Case]:
    """The 53 batch norms of ResNet-50 at 224 x 224."""
    layers = [
        *((64, 112, 1), (64, 56, 6), (256, 56, 4), (128, 56, 1), (128, 28, 7), (512, 28, 5)),
        *((256, 28, 1), (256, 14, 11), (1024, 14, 7), (512, 14, 1), (512, 7, 5), (2048, 7, 4)),
    ]
    return _layers("resnet50", layers, batch)


def mobilenetv2(batch: int) -> list[Case]:
    """The 52 batch norms of MobileNetV2 at 224 x 224, from its table of inverted residuals."""
    blocks = [
        *((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2)),
        *((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
    ]
    size, channels = 112, 32
    norms = [(channels, size)]
    for expansion, width, repeats, first_stride in blocks:
        for repeat in range(repeats):
            hidden = channels * expansion
            if expansion != 1:
                norms.append((hidden, size))
            size //= first_stride if repeat == 0 else 1
            norms += [(hidden, size), (width, size)]
            channels = width
    norms.append((1280, size))
    unique = dict.fromkeys(norms)
    return _layers("mobilenetv2", [(c, s, norms.count((c, s))) for c, s in unique], batch)


def unet(batch: int) -> list[Case]:
    """A U-Net at 256 x 256 with two convolutions a stage."""
    layers = [(64, 256, 4), (128, 128, 4), (256, 64, 4), (512, 32, 4), (1024, 16, 2)]
    return _layers("unet", layers, batch)


def volumes(batch: int) -> list[Case]:
    """Layers of a 3d residual network and of a 3d U-Net."""
    shapes = [(64, 8, 56), (128, 4, 28), (256, 2, 14), (32, 64, 64), (64, 32, 32)]
    return [
        Case(f"3d/{channels}x{depth}x{size}", (batch, channels, depth, size, size))
        for channels, depth, size in shapes
    ]


def sequences() -> list[Case]:
    """Signals (N, C, L) and feature vectors (N, C)."""
    return [
        *(Case("1d/signal", shape) for shape in [(16, 64, 1000), (64, 128, 250), (8, 512, 100)]),
        *(Case("1d/vector", shape) for shape in [(32, 64), (256, 1024), (4096, 256), (65536, 64)]),
    ]


def edges() -> list[Case]:
    """Few or odd channels, one pixel, large images, a tiny tensor."""
    shapes = {
        "one-channel": [(32, 1, 28, 28), (8, 1, 224, 224)],
        "rgb": [(8, 3, 224, 224), (64, 3, 224, 224)],
        "odd-channels": [(16, 20, 28, 28), (64, 20, 14, 14)],
        "pooled": [(32, 2048, 1, 1), (256, 2048, 1, 1)],
        "image": [(4, 64, 224, 224)],
        "tiny": [(2, 4, 2, 2)],
    }
    return [Case(f"edges/{name}", shape) for name, found in shapes.items() for shape in found]


def with_layouts(cases: Iterable[Case]) -> list[Case]:
    """Each case in every layout its dimensions allow; (N, C) and (N, C, L) have one."""
    return [
        replace(case, layout=layout)
        for case in cases
        for layout in (LAYOUTS if len(case.shape) >= 4 else LAYOUTS[:1])
    ]


def with_dtypes(cases: Iterable[Case], dtypes: Sequence[str]) -> list[Case]:
    return [replace(case, dtype=dtype) for case in cases for dtype in dtypes]


def spread(cases: Sequence[Case], wanted: int) -> list[Case]:
    """`wanted` cases at even distances through the list, so that every part of it is present."""
    if wanted >= len(cases):
        return list(cases)
    return [cases[round((i + 0.5) * len(cases) / wanted - 0.5)] for i in range(wanted)]


def scattered(cases: Sequence[Case]) -> list[Case]:
    """The cases in an order of which any beginning is spread over all of them, by the golden section.

    Steps that share no divisor with the length also take turns in what alternates from case to
    case, such as dtypes and layouts.
    """
    count = len(cases)
    steps = (step for step in range(round(0.618 * count), count) if math.gcd(step, count) == 1)
    step = next(steps, 1)
    return [cases[index * step % count] for index in range(count)]


def cpu_shapes() -> list[Case]:
    """The broad CPU set: small and large batches of each family, in and far out of cache."""
    return [
        *resnet50(8),
        *spread(resnet50(1), 4),
        *(case for case in resnet50(32) if case.name.endswith(("/64x56", "/256x56", "/512x7"))),
        *spread(mobilenetv2(8), 8),
        *spread(mobilenetv2(32), 3),
        *spread(unet(1), 2),
        *volumes(2),
        *sequences(),
        *edges(),
    ]


def cpu_set() -> list[Case]:
    """`cpu_shapes` in every layout; fp32 and bf16 throughout, fp16 and fp64 on every third."""
    shapes = cpu_shapes()
    return [
        *with_dtypes(with_layouts(shapes), ("float32", "bfloat16")),
        *with_dtypes(with_layouts(shapes[::3]), ("float16", "float64")),
    ]


def gpu_set() -> list[Case]:
    """Classes of tensors a GPU meets: large, medium and latency-bound, in both layouts."""
    large = Case("large/128x1024", (4, 128, 1024, 1024))
    return [
        *with_dtypes(with_layouts(resnet50(256)), ("bfloat16", "float16", "float32")),
        *with_dtypes(with_layouts(resnet50(32)), ("bfloat16",)),
        *with_dtypes(with_layouts([large]), ("float16", "bfloat16")),
        *with_dtypes(with_layouts(spread(mobilenetv2(128), 6)), ("bfloat16",)),
        *with_dtypes(with_layouts(unet(8)), ("bfloat16",)),
        *with_dtypes(with_layouts(volumes(4)), ("bfloat16",)),
        *with_dtypes([*sequences(), *with_layouts(edges())], ("float32", "bfloat16")),
    ]


def sets(batch: int) -> dict[str, list[Case]]:
    """Every named set; `batch` sizes the networks."""
    return {
        "cpu": cpu_set(),
        "gpu": gpu_set(),
        "resnet50": with_layouts(resnet50(batch)),
        "mobilenetv2": with_layouts(mobilenetv2(batch)),
        "unet": with_layouts(unet(max(1, batch // 8))),
        "3d": with_layouts(volumes(max(1, batch // 4))),
        "1d": sequences(),
        "edges": with_layouts(edges()),
    }


def sweep() -> list[Case]:
    """N, C and HW each over three decades around one base shape."""
    batch, channels, size = 16, 64, 28
    return [
        *(Case("sweep/batch", (n, channels, size, size)) for n in (1, 4, 16, 64, 256, 1024)),
        *(Case("sweep/channels", (batch, c, size, size)) for c in (1, 3, 16, 64, 256, 1024)),
        *(Case("sweep/spatial", (batch, channels, s, s)) for s in (1, 3, 7, 14, 28, 56, 112)),
    ]


def scaling() -> list[Case]:
    """Out-of-cache tensors for threads, and one layer over the batch for linearity."""
    return [
        Case("scaling/64x56", (32, 64, 56, 56)),
        Case("scaling/256x56", (32, 256, 56, 56)),
        Case("scaling/256x56", (32, 256, 56, 56), layout="channels_last"),
        Case("scaling/64x56", (32, 64, 56, 56), dtype="bfloat16"),
    ]


def tiny() -> list[Case]:
    """Tensors on which the call itself is the cost."""
    return [Case("tiny/2x4x2x2", (2, 4, 2, 2)), Case("tiny/16x64", (16, 64))]
