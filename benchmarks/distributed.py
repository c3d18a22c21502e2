"""`python -m benchmarks.distributed`: SyncBatchNorm against hand-written synchronisation, and bare collectives."""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import batchnorm_ext
from batchnorm_ext.distributed import BatchNormNd

from .results import describe_environment
from .stats import ratio_of_medians, summarize
from .timing import available_threads

SHAPES = ((8, 64, 56, 56), (8, 256, 14, 14), (8, 2048, 7, 7))
CHANNELS = (64, 512, 2048)
CALLS_A_ROUND = 5
TOLERANCE = 1e-4


class AllReduce(torch.autograd.Function):
    """A sum over the ranks, and back."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        values = values.clone()
        dist.all_reduce(values)
        return values

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient


class HandWritten(nn.BatchNorm2d):
    """What is commonly written by hand: one differentiable all-reduce of sums and sums of squares."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise with the mean and variance of all ranks' samples."""
        dims = [0, 2, 3]
        count = input.new_full((1,), input.numel() // input.size(1))
        sums = torch.cat((input.sum(dims), input.square().sum(dims), count))
        sums = AllReduce.apply(sums)
        mean, square = (sums[:-1] / sums[-1]).chunk(2)
        variance = square - mean.square()
        with torch.no_grad():
            unbiased = variance * sums[-1] / (sums[-1] - 1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(unbiased, self.momentum)
            self.num_batches_tracked.add_(1)
        scale = self.weight * (variance + self.eps).rsqrt()
        shift = self.bias - mean * scale
        return input * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


def contenders(channels: int, device: str) -> dict[str, nn.Module]:
    modules = {
        "batchnorm_ext": batchnorm_ext.SyncBatchNorm(channels),
        "hand_written": HandWritten(channels),
        "not_synchronised": BatchNormNd(channels),
    }
    if device == "cuda":
        modules["torch"] = nn.SyncBatchNorm(channels)
    return {name: module.to(device) for name, module in modules.items()}


def wait_for_device(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def verify(modules: dict[str, nn.Module], x: Tensor, dy: Tensor) -> None:
    """Raise unless all that synchronise give the same output and input gradient."""
    results = {}
    for name, module in modules.items():
        if name == "not_synchronised":
            continue
        mine = x.detach().clone().requires_grad_()
        y = module(mine)
        y.backward(dy)
        results[name] = (y, mine.grad)
    expected = results.pop("batchnorm_ext")
    for name, actual in results.items():
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=TOLERANCE, atol=TOLERANCE, msg=name)


def interleaved(
    calls: dict[str, Callable[[], Any]], seconds: float, device: str
) -> dict[str, list[float]]:
    """Microseconds of a call in each round, the slowest rank's; every rank runs the same order."""
    order = random.Random(0)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    deadline = time.monotonic() + seconds
    going = torch.ones(1)
    while going.item():
        for name in order.sample(list(calls), len(calls)):
            dist.barrier()
            start = time.perf_counter()
            for _ in range(CALLS_A_ROUND):
                calls[name]()
            wait_for_device(device)
            took = torch.tensor([(time.perf_counter() - start) / CALLS_A_ROUND * 1e6])
            dist.all_reduce(took, dist.ReduceOp.MAX)
            samples[name].append(took.item())
        going = torch.tensor([float(time.monotonic() < deadline or len(samples[name]) < 5)])
        dist.broadcast(going, 0)
    return samples


def time_layers(device: str, seconds: float) -> list[dict[str, Any]]:
    rows = []
    for shape in SHAPES:
        x = torch.randn(shape, device=device)
        dy = torch.randn(shape, device=device)
        modules = contenders(shape[1], device)
        verify(modules, x, dy)
        mine = x.requires_grad_()

        def step(module: nn.Module, mine: Tensor = mine, dy: Tensor = dy) -> None:
            mine.grad = None
            module(mine).backward(dy)

        calls = {name: (lambda module=module: step(module)) for name, module in modules.items()}
        samples = interleaved(calls, seconds / len(SHAPES), device)
        for name, times in samples.items():
            ratio = ratio_of_medians(times, samples["batchnorm_ext"])
            median, p10, p90 = summarize(times)
            rows.append(
                {
                    "shape": list(shape),
                    "contender": name,
                    "median_us": median,
                    "p10_us": p10,
                    "p90_us": p90,
                    "best_us": min(times),
                    "rounds": len(times),
                    "ratio": ratio.value,
                    "ratio_low": ratio.low,
                    "ratio_high": ratio.high,
                }
            )
    return rows


def time_collectives(device: str, seconds: float) -> list[dict[str, Any]]:
    """Bare collectives of the sizes that a layer of so many channels exchanges."""
    ranks, group = dist.get_world_size(), dist.group.WORLD.group_name
    ops = torch.ops._c10d_functional
    rows = []
    for channels in CHANNELS:
        record = torch.ones(2 * channels + 2, dtype=torch.float64, device=device)
        sums = torch.ones(2 * channels, dtype=torch.float64, device=device)
        calls = {
            "all_gather": lambda r=record: ops.wait_tensor(
                ops.all_gather_into_tensor(r, ranks, group)
            ),
            "all_reduce": lambda s=sums: ops.wait_tensor(ops.all_reduce(s, "sum", group)),
        }
        for name, times in interleaved(calls, seconds / len(CHANNELS), device).items():
            median, p10, p90 = summarize(times)
            rows.append(
                {
                    "collective": name,
                    "channels": channels,
                    "bytes": 8 * (record if name == "all_gather" else sums).numel(),
                    "median_us": median,
                    "p10_us": p10,
                    "p90_us": p90,
                    "best_us": min(times),
                    "rounds": len(times),
                }
            )
    return rows


def serve(rank: int, ranks: int, store: str, options: argparse.Namespace) -> None:
    """What each process does; the first one reports."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    backend = "gloo"
    if options.device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.device_count() >= ranks else "gloo"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=ranks)
    torch.manual_seed(rank)
    found = {
        "ranks": ranks,
        "backend": backend,
        "layers": time_layers(options.device, options.seconds * 2 / 3),
        "collectives": time_collectives(options.device, options.seconds / 3),
    }
    if rank == 0:
        Path(store + ".json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def table(found: dict[str, Any]) -> str:
    """The findings for one number of ranks as markdown."""
    lines = [
        f"{found['ranks']} ranks, {found['backend']}; forward and backward, µs; ratio to batchnorm_ext",
        "",
        "| shape | contender | median | best | ratio of medians (95 %) |",
        "|---|---|---:|---:|---:|",
    ]
    for row in found["layers"]:
        shape = "x".join(map(str, row["shape"]))
        interval = f"{row['ratio']:.2f} ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})"
        lines.append(
            f"| {shape} | {row['contender']} | {row['median_us']:.0f} | {row['best_us']:.0f} | {interval} |"
        )
    lines += [
        "",
        "| collective | channels | bytes a rank | median µs | best |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in found["collectives"]:
        lines.append(
            f"| {row['collective']} | {row['channels']} | {row['bytes']} | {row['median_us']:.0f} | {row['best_us']:.0f} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark for each number of ranks asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distributed", description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seconds", type=float, default=30.0, help="for each number of ranks")
    parser.add_argument("--output", type=Path, help="where to write the findings as JSON")
    options = parser.parse_args(arguments)
    record: dict[str, Any] = {
        "environment": describe_environment(options.device, available_threads(), seed=0),
        "runs": [],
    }
    for ranks in options.ranks:
        with tempfile.TemporaryDirectory() as folder:
            store = os.path.join(folder, "store")
            torch.multiprocessing.spawn(serve, (ranks, store, options), ranks)
            found = json.loads(Path(store + ".json").read_text())
        record["runs"].append(found)
        print(table(found), end="\n\n", flush=True)
    if options.output is not None:
        options.output.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
