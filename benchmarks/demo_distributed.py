"""The demo on several processes: `torchrun --nproc-per-node 2 -m benchmarks.demo_distributed`."""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from batchnorm_ext import SyncBatchNorm, convert_batchnorm

from .demo import BATCH, Digits, Training
from .models import small_resnet
from .timing import available_threads

# Both networks compute in float32, in a different order: what rounding makes of that over the steps.
LARGEST_LOSS_DIFFERENCE = 0.05


def main(arguments: Sequence[str] | None = None) -> int:
    """Train on a share of each batch per process; process 0 also trains alone on whole batches."""
    parser = argparse.ArgumentParser(prog="benchmarks.demo_distributed", description=__doc__)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    dist.init_process_group("gloo")  # with GPUs: "nccl", and this process's tensors on its own GPU
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(max(1, available_threads() // ranks))

    torch.manual_seed(options.seed)
    network = small_resnet(widths=options.widths)
    alone = Training(convert_batchnorm(copy.deepcopy(network)))
    synchronised = SyncBatchNorm.convert_sync_batchnorm(network)
    shared = Training(DistributedDataParallel(synchronised))

    digits = Digits.load("cpu", options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    share = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
    losses = []
    for epoch in range(options.epochs):
        for images, labels in digits.batches(generator):
            shared.step(images[share], labels[share])
            loss = torch.tensor(shared.losses[-1] * len(labels[share]) / BATCH)
            dist.all_reduce(loss)
            losses.append(loss.item())
            if rank == 0:
                alone.step(images, labels)
        if rank == 0:
            print(
                f"epoch {epoch + 1}: loss {losses[-1]:.4f} on {ranks} processes, "
                f"{alone.losses[-1]:.4f} on one",
                flush=True,
            )
    shared.test(digits)
    status = 0
    if rank == 0:
        alone.test(digits)
        print(
            f"test accuracy {shared.accuracy:.1%} on {ranks} processes, {alone.accuracy:.1%} on one"
        )
        difference = max(abs(a - b) for a, b in zip(losses, alone.losses, strict=True))
        print(f"largest difference of the losses {difference:.1e}")
        status = int(difference > LARGEST_LOSS_DIFFERENCE)
    dist.barrier()
    dist.destroy_process_group()
    return status


if __name__ == "__main__":
    sys.exit(main())
