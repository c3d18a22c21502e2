"""Models with our modules trained by several processes: DistributedDataParallel and FSDP, through gloo."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import batchnorm_ext
from batchnorm_ext import convert_batchnorm, revert_batchnorm

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(),
    reason="this torch was built without gloo",
)
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    processes = Ranks(2)
    yield processes
    processes.stop()


def network() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        batchnorm_ext.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3),
        batchnorm_ext.BatchNorm2d(4, momentum=None),
        nn.Flatten(),
        nn.Linear(64, 2),
    )


def batch(rank: int, step: int) -> torch.Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(10 * step + rank))


def state(model: nn.Module) -> list[list[float]]:
    return [t.detach().double().flatten().tolist() for t in model.state_dict().values()]


def train(model: nn.Module, rank: int, forwards: int = 1, steps: int = 3) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(steps):
        optimizer.zero_grad()
        sum(model(batch(rank, 100 * i + step)).square().mean() for i in range(forwards)).backward()
        optimizer.step()


def ddp(rank: int, forwards: int, broadcast: bool) -> list[list[list[float]]]:
    ours = DistributedDataParallel(network(), broadcast_buffers=broadcast)
    train(ours, rank, forwards)
    results = [state(ours)]
    if forwards == 1 or not broadcast:
        # Torch's modules save the very buffers that the second broadcast writes to.
        theirs = DistributedDataParallel(revert_batchnorm(network()), broadcast_buffers=broadcast)
        train(theirs, rank, forwards)
        results.append(state(theirs))
    return results


def ddp_fused(rank: int) -> list[list[list[float]]]:
    models = [network(), convert_batchnorm(network(), fuse_activations=True)]
    assert "fused: 1 + relu" in repr(models[1])
    for model in models:
        train(DistributedDataParallel(model), rank, forwards=2)
    return [state(model) for model in models]


def test_distributed_data_parallel_fused(ranks):
    for plain, fused in ranks.run(2, ddp_fused):
        for actual, expected in zip(fused, plain, strict=True):
            torch.testing.assert_close(torch.tensor(actual), torch.tensor(expected), **CLOSE)


@pytest.mark.parametrize("broadcast", [True, False])
@pytest.mark.parametrize("forwards", [1, 2])
def test_distributed_data_parallel(ranks, forwards, broadcast):
    """Also with two forward passes before one backward pass, between which rank 0's buffers are sent to all."""
    results = ranks.run(2, ddp, forwards, broadcast)
    for ours, *theirs in results:
        assert torch.tensor(ours[0]).isfinite().all()
        for expected in theirs:
            for one, other in zip(ours, expected, strict=True):
                torch.testing.assert_close(one, other, **CLOSE)
    keys = list(network().state_dict())
    for name, one, other in zip(keys, results[0][0], results[1][0], strict=True):
        if "running" not in name:
            torch.testing.assert_close(one, other, rtol=0, atol=0)
    counters = [v for k, v in zip(keys, results[0][0], strict=True) if k.endswith("tracked")]
    assert counters == [[3.0 * forwards]] * 2


def fsdp(rank: int, mixed: bool) -> list[list[list[float]]]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import DTensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    full = MixedPrecisionPolicy()
    policies = [MixedPrecisionPolicy(param_dtype=torch.bfloat16) if mixed else full, full]
    results = []
    for model, policy in zip((network(), revert_batchnorm(network())), policies, strict=True):
        for layer in (model[0], model[1], model[3]):
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        train(model, rank)
        values = [
            v.full_tensor() if isinstance(v, DTensor) else v for v in model.state_dict().values()
        ]
        results.append([v.double().flatten().tolist() for v in values])
    return results


@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "bfloat16"])
def test_fully_sharded(ranks, mixed):
    """Also with parameters and activations in 16 bits beside float32 buffers, which torch's modules refuse."""
    close = {"rtol": 0.05, "atol": 0.02} if mixed else CLOSE
    for ours, theirs in ranks.run(2, fsdp, mixed):
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, **close)


def gradients_of_accumulation(rank: int) -> list[list[list[float]]]:
    results = []
    for model in (network(), revert_batchnorm(network())):
        parallel = DistributedDataParallel(copy.deepcopy(model), broadcast_buffers=False)
        with parallel.no_sync():
            parallel(batch(rank, 0)).square().mean().backward()
        parallel(batch(rank, 1)).square().mean().backward()
        results.append([p.grad.double().flatten().tolist() for p in parallel.parameters()])
    return results


def test_gradient_accumulation_without_synchronisation(ranks):
    for ours, theirs in ranks.run(2, gradients_of_accumulation):
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, **CLOSE)
