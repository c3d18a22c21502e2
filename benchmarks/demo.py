"""The demo: a network trained on handwritten digits, with torch's batch norm and with ours."""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import batchnorm_ext
from batchnorm_ext._extension import obtained

from .commands import start_session
from .contenders import KERNEL_OPS
from .measure import OURS, layer_tasks, overhead_tasks
from .models import small_resnet
from .report import FLOOR, table
from .results import Record, describe_environment
from .session import Progress
from .shapes import Case, with_dtypes
from .timing import available_threads, settle_allocator

TORCH = "torch_eager"
NAMES = {TORCH: "nn.BatchNorm2d", OURS: "batchnorm_ext"}
BATCH = 128
TEST_IMAGES = 360


@dataclass
class Digits:
    """scikit-learn's bundled digits, 1797 images of 8 x 8, split for training and testing."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @classmethod
    def load(cls, device: str, seed: int) -> Digits:
        from sklearn.datasets import load_digits

        data = load_digits()
        order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(seed))
        images = torch.tensor(data.images, dtype=torch.float32)[order].unsqueeze(1).to(device)
        images = (images - images.mean()) / images.std()
        labels = torch.tensor(data.target)[order].to(device)
        return cls(
            images[TEST_IMAGES:], labels[TEST_IMAGES:], images[:TEST_IMAGES], labels[:TEST_IMAGES]
        )

    def batches(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch in random order; an incomplete last batch is left out."""
        order = torch.randperm(len(self.labels), generator=generator).to(self.labels.device)
        for picks in order.split(BATCH):
            if len(picks) == BATCH:
                yield self.images[picks], self.labels[picks]


@dataclass
class Training:
    """A network on its way: its losses, step times and accuracy."""

    network: nn.Module
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    accuracy: float = 0.0

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.SGD(
            self.network.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True
        )

    def step(self, images: Tensor, labels: Tensor) -> None:
        """One timed step: forward, backward, update."""
        start = _now(images.device.type)
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.network(images), labels)
        loss.backward()
        self.optimizer.step()
        self.seconds.append(_now(images.device.type) - start)
        self.losses.append(loss.item())

    def test(self, digits: Digits) -> None:
        self.network.eval()
        with torch.no_grad():
            right = self.network(digits.test_images).argmax(1) == digits.test_labels
        self.accuracy = right.float().mean().item()
        self.network.train()

    @property
    def step_ms(self) -> float:
        """Median, so that the first steps of a fresh process do not count."""
        return 1e3 * statistics.median(self.seconds)


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def train(
    digits: Digits, epochs: int, seed: int, widths: Sequence[int], seconds: float
) -> dict[str, Training]:
    """Train the same network with both batch norms on the same batches, step by step in turn.

    The order within a pair of steps alternates, so that neither always finds the cache warm. No
    epoch begins after `seconds`.
    """
    deadline = time.monotonic() + seconds
    torch.manual_seed(seed)
    device = digits.images.device
    network = small_resnet(widths=widths)
    trainings = {
        TORCH: Training(copy.deepcopy(network).to(device)),
        OURS: Training(batchnorm_ext.convert_batchnorm(copy.deepcopy(network)).to(device)),
    }
    generator = torch.Generator().manual_seed(seed)
    pair = list(trainings.values())
    with Progress(epochs * (len(digits.labels) // BATCH), unit="step") as bar:
        for epoch in range(epochs):
            if time.monotonic() > deadline:
                break
            for images, labels in digits.batches(generator):
                for training in pair:
                    training.step(images, labels)
                pair.reverse()
                losses = ", ".join(f"{NAMES[n]} {t.losses[-1]:.3f}" for n, t in trainings.items())
                bar.show(f"epoch {epoch + 1}/{epochs}", f"loss {losses}")
                bar.advance()
    for training in trainings.values():
        training.test(digits)
    return trainings


def short_benchmark(device: str, seconds: float, seed: int) -> Record:
    """A few layers and a tiny module call, beside `nn.BatchNorm2d` and the floor."""
    shapes = [(32, 64, 28, 28), (8, 256, 56, 56), (32, 512, 7, 7)]
    cases = [Case("demo/layer", shape) for shape in shapes]
    cases.append(Case("demo/layer", shapes[0], layout="channels_last"))
    cases += with_dtypes([Case("demo/layer", shapes[1])], ["bfloat16"])
    options = argparse.Namespace(
        device=device,
        threads=available_threads(),
        seed=seed,
        contenders=[OURS, FLOOR, TORCH],
        cache=["hot"],
    )
    record = Record(describe_environment(device, options.threads, seed))
    session = start_session(options, record)
    session.run([*layer_tasks(cases, KERNEL_OPS), *overhead_tasks()], seconds)
    return record


def benchmark_table(record: Record) -> str:
    """Times of the short benchmark and how many times faster than torch's ours is."""
    found: dict[tuple[str, ...], dict[str, dict]] = {}
    for row in record.rows:
        shape = "x".join(map(str, row["shape"]))
        op = row["op"].replace("module_", "module ").replace("forward_backward", "fwd + bwd")
        key = (shape, row["dtype"], row["layout"], op)
        found.setdefault(key, {})[row["contender"]] = row
    lines = [
        [
            *key,
            *(f"{rows[name]['median_us']:.1f}" for name in NAMES),
            f"{rows[TORCH]['ratio']:.2f}x",
        ]
        for key, rows in found.items()
        if NAMES.keys() <= rows.keys()
    ]
    header = ["shape", "dtype", "layout", "op", *(f"{n} µs" for n in NAMES.values()), "faster"]
    return table(header, lines)


def plot_losses(trainings: dict[str, Training], path: Path) -> None:
    """Loss curves of both trainings and their step times in one picture."""
    from .plots import COLOURS, INK, STYLE, plt

    with plt.rc_context(STYLE):
        figure, (curves, times) = plt.subplots(
            1, 2, figsize=(10, 3.6), gridspec_kw={"width_ratios": [3, 1]}
        )
        for (name, training), line in zip(trainings.items(), ("-", "--"), strict=True):
            curves.plot(
                training.losses, line, color=COLOURS[name], label=NAMES[name], linewidth=1.4
            )
        curves.set(yscale="log", xlabel="step", ylabel="training loss")
        curves.legend()
        times.bar(
            [NAMES[name] for name in trainings],
            [training.step_ms for training in trainings.values()],
            color=[COLOURS[name] for name in trainings],
        )
        times.set_ylabel("median time of a step, ms")
        times.tick_params(axis="x", labelsize=7)
        figure.suptitle("The same ResNet on handwritten digits", color=INK)
        figure.tight_layout()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def describe_backend() -> str:
    """Which module does the work, in words."""
    module = obtained()
    info = module.backend.build_info()
    if module.how == "torch":
        return "pure PyTorch: no native module could be had (python -m batchnorm_ext says why)"
    cuda = f"CUDA {info['cuda']} for {info['arch_list']}" if info["cuda"] else "no CUDA"
    return f"native kernels, {module.how}; CPU {info['instruction_set']}, {cuda}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns 0 when both networks have learned to read digits."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo_output"))
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--train-seconds", type=float, default=120, help="no epoch begins later")
    parser.add_argument("--benchmark-seconds", type=float, default=40)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(available_threads())
    settle_allocator()

    print(f"batchnorm_ext {batchnorm_ext.__version__}: {describe_backend()}")
    name = (
        torch.cuda.get_device_name(0) if device == "cuda" else f"CPU, {available_threads()} threads"
    )
    print(f"torch {torch.__version__} on {name}\n")
    print("Training a ResNet on 8 x 8 handwritten digits, once with each batch norm, in turn:")
    digits = Digits.load(device, options.seed)
    trainings = train(digits, options.epochs, options.seed, options.widths, options.train_seconds)
    picture = options.output / "loss_curves.png"
    plot_losses(trainings, picture)
    steps = [
        [
            NAMES[name],
            f"{training.losses[0]:.4f}",
            f"{training.losses[-1]:.4f}",
            f"{training.accuracy:.1%}",
            f"{training.step_ms:.2f}",
        ]
        for name, training in trainings.items()
    ]
    header = ["batch norm", "first loss", "last loss", "test accuracy", "ms per step (median)"]
    print(table(header, steps))
    print(f"loss curves: {picture}\n")

    print("Batch norm alone (medians of interleaved rounds, each result checked against float64):")
    record = short_benchmark(device, options.benchmark_seconds, options.seed)
    text = benchmark_table(record)
    print(text)
    (options.output / "benchmark.md").write_text(text + "\n")
    for entry in record.excluded:
        print(f"left out: {entry['contender']}, {entry['case']} {entry['op']}: {entry['reason']}")
    print("`python -m benchmarks` measures more, and beside more peers.")
    learned = all(training.accuracy > 0.9 for training in trainings.values())
    if not learned:
        print("a network has not learned to read digits: that is wrong", file=sys.stderr)
    return 0 if learned and not record.excluded else 1


if __name__ == "__main__":
    sys.exit(main())
