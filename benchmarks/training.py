"""Whole training steps of ResNet-50, with this batch norm, with torch's, and with none."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import batchnorm_ext

from .measure import OURS, exclude, time_calls
from .models import resnet50
from .session import Session, Task
from .shapes import DTYPES, Case

# Relative error of the first layer's gradient against float64: fifty layers of fp32 rounding pass
# it with room to spare, a wrong formula in one of them does not.
GRADIENT_TOLERANCE = 0.05


def model_tasks(batch: int, size: int, dtype: str, layout: str) -> list[Task]:
    """Two to three contenders; the weight makes up for steps that take a second on a CPU."""
    case = Case("model/resnet50", (batch, 3, size, size), dtype, layout)
    run = lambda session, seconds: measure_model(session, case, seconds)  # noqa: E731
    return [Task(f"{case} train_step", run, weight=20.0)]


def measure_model(session: Session, case: Case, seconds: float) -> None:
    """Time forward, loss, backward and SGD under autocast to the case's dtype."""
    torch.manual_seed(session.seed)
    device, memory_format = session.device, case.memory_format
    images = torch.randn(case.shape, device=device).contiguous(memory_format=memory_format)
    labels = torch.randint(1000, case.shape[:1], device=device)
    reference = resnet50().to(device, memory_format=memory_format)
    networks = {
        OURS: batchnorm_ext.convert_batchnorm(copy.deepcopy(reference)),
        "torch_eager": copy.deepcopy(reference),
        "floor": without_batchnorm(copy.deepcopy(reference)),
    }
    expected, traffic = _truth(reference, images, labels)
    calls = {}
    for name in networks.keys() & session.contenders.keys():
        if name != "floor":
            error = _relative_error(networks[name], images, labels, expected)
            if not error <= GRADIENT_TOLERANCE:
                reason = f"gradient of the first layer is off by {error:.1e}"
                exclude(session, name, case, "train_step", reason)
                continue
        calls[name] = _training_step(networks[name], images, labels, DTYPES[case.dtype])
    time_calls(session, case, "train_step", "cold", calls, seconds, bytes_min=traffic)


def without_batchnorm(network: nn.Module) -> nn.Module:
    """The network with nothing in place of each batch norm."""
    for name, child in network.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(network, name, nn.Identity())
        else:
            without_batchnorm(child)
    return network


def _truth(network: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """The first layer's gradient in float64, and the bytes that the batch norms must move."""
    elements = 0

    def count(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal elements
        elements += inputs[0].numel()

    wide = copy.deepcopy(network).double()
    for module in wide.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(count)
    return _first_gradient(wide, images.double(), labels), 5 * elements * images.itemsize


def _first_gradient(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    first = next(network.parameters())
    return torch.autograd.grad(F.cross_entropy(network(images), labels), first)[0]


def _relative_error(network: nn.Module, images: Tensor, labels: Tensor, expected: Tensor) -> float:
    gradient = _first_gradient(network, images, labels).double()
    return float((gradient - expected).norm() / expected.norm())


def _training_step(
    network: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype
) -> Callable[[int], None]:
    # A learning rate of zero does all the work of a step and leaves every step alike.
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0, momentum=0.9)
    autocast = torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32)

    def step(_: int) -> None:
        optimizer.zero_grad()
        with autocast:
            loss = F.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()

    return step
