"""Whole training steps of ResNet-50: with this batch norm, fused or not, with torch's, and with none."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import batchnorm_ext

from .measure import OURS, exclude, time_calls
from .memory import peak_bytes, saved_bytes
from .models import resnet50
from .session import Session, Task
from .shapes import DTYPES, Case

# Relative error of the first layer's gradient against float64: fifty layers of fp32 rounding pass
# it with room to spare, a wrong formula in one of them does not.
GRADIENT_TOLERANCE = 0.05
# Less time than this does not do for compiling the whole network, forward and backward.
COMPILING_S = 100


def model_tasks(batch: int, size: int, dtype: str, layout: str) -> list[Task]:
    """Up to six contenders; the weight makes up for steps that take a second on a CPU."""
    case = Case("model/resnet50", (batch, 3, size, size), dtype, layout)
    run = lambda session, seconds: measure_model(session, case, seconds)  # noqa: E731
    return [Task(f"{case} train_step", run, weight=20.0)]


def measure_model(session: Session, case: Case, seconds: float) -> None:
    """Time forward, loss, backward and SGD under autocast to the case's dtype, and record their memory."""
    torch.manual_seed(session.seed)
    device, memory_format = session.device, case.memory_format
    images = torch.randn(case.shape, device=device).contiguous(memory_format=memory_format)
    labels = torch.randint(1000, case.shape[:1], device=device)
    reference = resnet50().to(device, memory_format=memory_format)
    networks = {
        OURS: batchnorm_ext.convert_batchnorm(copy.deepcopy(reference)),
        "batchnorm_ext_fused": batchnorm_ext.convert_batchnorm(
            copy.deepcopy(reference), fuse_activations=True
        ),
        "torch_eager": copy.deepcopy(reference),
        "floor": without_batchnorm(copy.deepcopy(reference)),
    }
    if "torch_compile" in session.contenders:
        if seconds < COMPILING_S:
            reason = f"not compiled in less than {COMPILING_S} s"
            exclude(session, "torch_compile", case, "train_step", reason)
        else:
            networks["torch_compile"] = torch.compile(copy.deepcopy(reference), dynamic=False)
    if "onednn" in session.contenders:
        if (case.dtype, case.layout) == ("float32", "contiguous"):
            networks["onednn"] = Blocked(copy.deepcopy(reference))
        else:
            reason = "mkldnn tensors have a layout of their own, and no autocast"
            exclude(session, "onednn", case, "train_step", reason)
    expected, traffic = _truth(reference, images, labels)
    calls = {}
    for name in (name for name in networks if name in session.contenders):
        if name != "floor":
            error = _relative_error(networks[name], images, labels, expected)
            if not error <= GRADIENT_TOLERANCE:
                reason = f"gradient of the first layer is off by {error:.1e}"
                exclude(session, name, case, "train_step", reason)
                continue
        step = _Step(networks[name], images, labels, DTYPES[case.dtype])
        step()  # what is set up once is no cost of a step
        calls[name] = step
        if name == "onednn":  # which hides what it keeps
            continue
        session.record.memory.append(
            {
                "case": case.name,
                "shape": list(case.shape),
                "dtype": case.dtype,
                "layout": case.layout,
                "mode": "train_step",
                "contender": name,
                "input_bytes": images.untyped_storage().nbytes(),
                "saved_bytes": saved_bytes(step.loss, tuple(networks[name].parameters())),
                "peak_bytes": peak_bytes(step, device),
            }
        )
    time_calls(session, case, "train_step", "cold", calls, seconds, bytes_min=traffic)


class Blocked(nn.Module):
    """A network on oneDNN's tensors, in the layouts that its convolutions pick."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Return the network's output for `images` as an ordinary tensor."""
        return self.network(images.to_mkldnn()).to_dense()


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
    # Convolutions in TF32 would hide what batch norm does under what they lose.
    with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
        gradient = _first_gradient(network, images, labels).double()
    return float((gradient - expected).norm() / expected.norm())


class _Step:
    """A training step; a learning rate of zero does all its work and leaves every step alike."""

    def __init__(
        self, network: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype
    ) -> None:
        self.network, self.images, self.labels = network, images, labels
        self.optimizer = torch.optim.SGD(network.parameters(), lr=0.0, momentum=0.9)
        self.autocast = torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32)

    def loss(self) -> Tensor:
        with self.autocast:
            return F.cross_entropy(self.network(self.images), self.labels)

    def __call__(self, _: int = 0) -> None:
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()
