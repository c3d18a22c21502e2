"""Residual networks that are trained here: ResNet-50 to time a step, a small one for the demo."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


def _convolution(channels: int, width: int, kernel: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(channels, width, kernel, stride, kernel // 2, bias=False)


class Residual(nn.Module):
    """``relu(body(x) + shortcut(x))``; the shortcut projects where shape or stride change."""

    def __init__(self, body: nn.Sequential, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = body
        self.shortcut = nn.Sequential()
        if stride != 1 or channels != width:
            self.shortcut.append(_convolution(channels, width, 1, stride))
            self.shortcut.append(nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(self.body(x) + self.shortcut(x))


def basic_block(channels: int, width: int, stride: int) -> Residual:
    """Two 3 x 3 convolutions (He et al., 2016, figure 5 left)."""
    body = nn.Sequential(
        _convolution(channels, width, 3, stride),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        _convolution(width, width, 3, 1),
        nn.BatchNorm2d(width),
    )
    return Residual(body, channels, width, stride)


def bottleneck_block(channels: int, width: int, stride: int) -> Residual:
    """1 x 1, 3 x 3 (with the stride) and 1 x 1 convolutions (He et al., 2016, figure 5 right)."""
    body = nn.Sequential(
        _convolution(channels, width, 1, 1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        _convolution(width, width, 3, stride),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        _convolution(width, 4 * width, 1, 1),
        nn.BatchNorm2d(4 * width),
    )
    return Residual(body, channels, 4 * width, stride)


def resnet50(classes: int = 1000) -> nn.Sequential:
    """ResNet-50 with the stride in the 3 x 3 convolution."""
    network = nn.Sequential(
        _convolution(3, 64, 7, 2), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
    )
    channels = 64
    for width, blocks, first_stride in [(64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)]:
        for block in range(blocks):
            network.append(bottleneck_block(channels, width, first_stride if block == 0 else 1))
            channels = 4 * width
    return network.extend(_head(channels, classes))


def small_resnet(
    input_channels: int = 1, classes: int = 10, widths: Sequence[int] = (16, 32, 64)
) -> nn.Sequential:
    """A residual network for images of 8 x 8 pixels: one block a width, halving the image."""
    channels = widths[0]
    network = nn.Sequential(
        _convolution(input_channels, channels, 3, 1), nn.BatchNorm2d(channels), nn.ReLU()
    )
    for stage, width in enumerate(widths):
        network.append(basic_block(channels, width, 1 if stage == 0 else 2))
        channels = width
    return network.extend(_head(channels, classes))


def _head(channels: int, classes: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))
