"""SyncBatchNorm on several processes: the joined batch, collectives, failures, conversion, GPUs."""

from __future__ import annotations

import copy
import math
import os
import pickle
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from checks import assert_bitwise, no_synchronisation
from inputs import channels_last, sliced_batch
from oracle import BatchNorm, BatchNormAct, Exact
from ranks import Ranks
from tolerances import assert_matches
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import batchnorm_ext
from batchnorm_ext import (
    SyncBatchNorm,
    SyncBatchNormAct,
    convert_batchnorm,
    revert_batchnorm,
    revert_sync_batchnorm,
)
from batchnorm_ext.distributed import BatchNormActNd, BatchNormNd
from batchnorm_ext.stepwise import StepwiseBatchNormFunction
from benchmarks.models import basic_block

pytestmark = pytest.mark.timeout(120)  # processes take theirs to start

# How many samples each rank has: uneven, and with ranks that have none.
PARTS = {1: (6,), 2: (4, 3), 3: (3, 0, 4), 4: (0, 2, 1, 5)}


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    processes = Ranks(4)
    yield processes
    processes.stop()


def part_of(parts: tuple[int, ...], rank: int) -> slice:
    begin = sum(parts[:rank])
    return slice(begin, begin + parts[rank])


def tensor(*shape: int, seed: int = 0, **options: Any) -> torch.Tensor:
    """The same random values on every rank."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(**options)


def parametrized(module: nn.Module, seed: int = 7) -> nn.Module:
    """The module with random parameters and running statistics, the same on every rank."""
    with torch.no_grad():
        for index, (name, values) in enumerate(module.state_dict().items()):
            if values.is_floating_point():
                values.copy_(tensor(*values.shape, seed=seed + index))
                if name.endswith("running_var"):
                    values.abs_().add_(0.1)
    return module


def collectives(action: Any) -> list[str]:
    """What the process group was asked to do during the action."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        action()
    return sorted(event.name for event in profile.events() if event.name.startswith("gloo:"))


# ---- the joined batch ---------------------------------------------------------------------------


def matches_the_joined_batch(
    rank: int,
    parts: tuple[int, ...],
    dtype: torch.dtype,
    layout: Any,
    spatial: tuple[int, ...],
    device: str = "cpu",
    masked: bool = False,
) -> None:
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    channels = 5
    x = (tensor(sum(parts), channels, *spatial) * 2 + 30).to(dtype)
    dy = tensor(*x.shape, seed=1).to(dtype)
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    module = parametrized(SyncBatchNorm(channels, dtype=accumulate))
    counted = tensor(sum(parts), *spatial, seed=2) > 0 if masked else None
    expected = BatchNorm(
        *(x, module.weight, module.bias, module.running_mean, module.running_var), counted=counted
    )
    exact_dx, exact_dweight, exact_dbias = expected.gradients(dy)

    own = part_of(parts, rank)
    module.to(device)

    def own_part(exact: Exact) -> Exact:
        return Exact(exact.value[own], exact.scale[own])

    mine = layout(x[own].to(device)).requires_grad_()
    y = module(mine, mask=counted[own].to(device)) if masked else module(mine)
    y.backward(layout(dy[own].to(device)))
    assert y.dtype == mine.grad.dtype == dtype
    if y.numel():
        assert_matches(y, own_part(expected.y), "y")
        assert_matches(mine.grad, own_part(exact_dx), "dx")
    assert_matches(module.running_mean, expected.running_mean, "running_mean", dtype)
    assert_matches(module.running_var, expected.running_var, "running_var", dtype)
    assert module.num_batches_tracked == 1
    for quantity, gradient, exact in (
        ("dweight", module.weight.grad, exact_dweight),
        ("dbias", module.bias.grad, exact_dbias),
    ):
        total = gradient.double()
        dist.all_reduce(total)
        assert_matches(total, exact, quantity, dtype)
    if layout is channels_last and len(spatial) == 2 and y.numel():
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert mine.grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", [torch.clone, channels_last, sliced_batch])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("parts", PARTS.values(), ids=map(str, PARTS))
def test_equals_one_process_on_the_joined_batch(ranks, parts, dtype, layout):
    ranks.run(len(parts), matches_the_joined_batch, parts, dtype, layout, (3, 7))


@pytest.mark.parametrize("spatial", [(), (9,), (2, 3, 4)], ids=["2-D", "3-D", "5-D"])
def test_inputs_of_any_rank(ranks, spatial):
    ranks.run(2, matches_the_joined_batch, (3, 2), torch.float32, torch.clone, spatial)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("parts", PARTS.values(), ids=map(str, PARTS))
def test_masks_on_the_joined_batch(ranks, parts, dtype):
    ranks.run(
        *(len(parts), matches_the_joined_batch, parts, dtype, channels_last, (3, 7), "cpu", True)
    )


def pooled(rank: int) -> None:
    x = tensor(7, 5, 9)
    module = parametrized(SyncBatchNorm(5).double())
    expected = BatchNorm(x, None, None, module.running_mean, module.running_var)
    own = (slice(0, 2), slice(4, 6)) if rank == 0 else (slice(2, 4), slice(6, 7))
    with batchnorm_ext.pooled_statistics(module):
        for part in own:
            module(x[part])
    assert_matches(module.running_mean, expected.running_mean, "running_mean")
    assert_matches(module.running_var, expected.running_var, "running_var")
    assert module.num_batches_tracked == 1


def test_pooled_statistics_of_all_ranks(ranks):
    ranks.run(2, pooled)


def one_rank_counts_nothing(rank: int) -> None:
    x = tensor(6, 5, 9)
    mask = torch.ones(6, 9, dtype=torch.bool)
    mask[3:] = False
    own = slice(3 * rank, 3 * rank + 3)
    alone, together = (
        parametrized(m(5).double()) for m in (batchnorm_ext.BatchNorm1d, SyncBatchNorm)
    )
    torch.testing.assert_close(together(x[own], mask=mask[own]), alone(x, mask=mask)[own])
    torch.testing.assert_close(together.state_dict(), alone.state_dict())


def test_a_rank_whose_mask_counts_nothing(ranks):
    ranks.run(2, one_rank_counts_nothing)


def fused_matches_the_joined_batch(
    rank: int, parts: tuple[int, ...], dtype: torch.dtype, activation: str
) -> None:
    x, residual, dy = (tensor(sum(parts), 5, 3, 7, seed=s).to(dtype) for s in range(3))
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    module = parametrized(SyncBatchNormAct(5, dtype=accumulate, activation=activation))
    own = part_of(parts, rank)
    for added in (None, residual):
        module.zero_grad()
        expected = BatchNormAct(
            x,
            *(module.weight, module.bias, module.running_mean, module.running_var),
            residual=added,
            activation_name=activation,
        )
        dx, dweight, dbias, dresidual = expected.gradients(dy)
        mine = channels_last(x[own]).requires_grad_()
        shortcut = None if added is None else added[own].clone().requires_grad_()
        y = module(mine, shortcut)
        y.backward(dy[own])
        checked = [(y, expected.y, "y"), (mine.grad, dx, "dx")]
        if shortcut is not None:
            checked.append((shortcut.grad, dresidual, "dresidual"))
        for actual, exact, quantity in checked:
            assert_matches(actual, Exact(exact.value[own], exact.scale[own]), quantity)
        assert_matches(module.running_mean, expected.running_mean, "running_mean", dtype)
        for gradient, exact, quantity in (
            (module.weight.grad, dweight, "dweight"),
            (module.bias.grad, dbias, "dbias"),
        ):
            total = gradient.double()
            dist.all_reduce(total)
            assert_matches(total, exact, quantity, dtype)


@pytest.mark.parametrize("activation", ["identity", "relu", "relu6", "leaky_relu", "elu", "silu"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("parts", [PARTS[2], PARTS[3]], ids=str)
def test_fused_activation_and_residual(ranks, parts, dtype, activation):
    ranks.run(len(parts), fused_matches_the_joined_batch, parts, dtype, activation)


def agrees_with_torch(rank: int, parts: tuple[int, ...]) -> None:
    x, dy = tensor(sum(parts), 4, 5, 5), tensor(sum(parts), 4, 5, 5, seed=1)
    module = parametrized(SyncBatchNorm(4, dtype=torch.float64))
    joined = nn.BatchNorm2d(4, dtype=torch.float64)
    joined.load_state_dict(module.state_dict())
    own = part_of(parts, rank)
    whole = x.clone().requires_grad_()
    mine = x[own].clone().requires_grad_()
    for _ in range(3):
        expected, y = joined(whole), module(mine)
    expected.backward(dy)
    y.backward(dy[own])
    for gradient in (module.weight.grad, module.bias.grad):
        dist.all_reduce(gradient)
    for actual, target in (
        (y, expected[own]),
        (mine.grad, whole.grad[own]),
        (module.weight.grad, joined.weight.grad),
        (module.bias.grad, joined.bias.grad),
        (module.running_mean, joined.running_mean),
        (module.running_var, joined.running_var),
    ):
        torch.testing.assert_close(actual, target, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("parts", PARTS.values(), ids=map(str, PARTS))
def test_float64_agrees_with_torch_on_the_joined_batch(ranks, parts):
    ranks.run(len(parts), agrees_with_torch, parts)


def keeps_precision(rank: int) -> None:
    x = (tensor(8, 3, 64) + 1e4).float()
    module = SyncBatchNorm(3, affine=False)
    expected = BatchNorm(x, None, None, module.running_mean, module.running_var)
    own = slice(2 * rank, 2 * rank + 2)
    y = module(x[own])
    assert_matches(y, Exact(expected.y.value[own], expected.y.scale[own]), "y")
    assert_matches(module.running_var, expected.running_var, "running_var")
    constant = SyncBatchNorm(3)(torch.full((2, 3, 5), 1e7))
    assert_bitwise(constant, torch.zeros(2, 3, 5))


def test_a_large_mean_costs_no_precision(ranks):
    ranks.run(4, keeps_precision)


def everything_but_the_parameters(rank: int) -> list[bytes]:
    module = SyncBatchNorm(33)
    x = tensor(7, 33, 6, seed=rank).float() * 100
    mine = x.requires_grad_()
    y = module(mine)
    (y * tensor(7, 33, 6, seed=9).float()).sum().backward()
    same_on_all = (module.running_mean, module.running_var)
    mine_only = (y, mine.grad, module.weight.grad)
    return [pickle.dumps([t.tolist() for t in group]) for group in (same_on_all, mine_only)]


@pytest.mark.parametrize("count", [2, 3, 4])
def test_bitwise_the_same_on_every_rank_and_repeatable(ranks, count):
    first = ranks.run(count, everything_but_the_parameters)
    assert len({statistics for statistics, _ in first}) == 1
    assert ranks.run(count, everything_but_the_parameters) == first


# ---- options ------------------------------------------------------------------------------------


def survives_poison(mine: torch.Tensor, own: float | None, poison: float) -> None:
    poisoned = mine.clone()
    if own is not None:
        poisoned[0, 1, 0] = own
    guarded, unguarded = SyncBatchNorm(3, skip_nonfinite=True).double(), SyncBatchNorm(3).double()
    guarded(poisoned)
    unguarded(poisoned)
    assert guarded.running_mean[1] == 0
    assert guarded.running_var[1] == 1
    assert_bitwise(unguarded.running_mean[1], torch.tensor(poison).double())
    assert_bitwise(guarded.running_mean[::2], unguarded.running_mean[::2])


def options_hold(rank: int) -> None:
    x = tensor(6, 3, 4)
    mine = x[:4] if rank == 0 else x[4:]

    cumulative, joined = SyncBatchNorm(3, momentum=None).double(), nn.BatchNorm1d(3, momentum=None)
    joined.double()
    for factor in (1, 2, 3):
        cumulative(mine * factor)
        joined(x * factor)
    torch.testing.assert_close(cumulative.running_var, joined.running_var, rtol=1e-10, atol=0)
    assert cumulative.num_batches_tracked == 3

    biased = SyncBatchNorm(3, momentum=1.0, running_var_correction=0).double()
    biased(mine)
    expected = x.var((0, 2), correction=0)
    torch.testing.assert_close(biased.running_var, expected, rtol=1e-10, atol=0)

    untracked = SyncBatchNorm(3, affine=False, track_running_stats=False)
    y = untracked(mine)
    expected = nn.BatchNorm1d(3, affine=False, track_running_stats=False)(x)
    torch.testing.assert_close(y, expected[:4] if rank == 0 else expected[4:])
    untracked.eval()
    torch.testing.assert_close(
        untracked(mine), nn.functional.batch_norm(mine, None, None, training=True)
    )

    cleared = SyncBatchNorm(3)
    cleared.track_running_stats = False
    cleared(mine.float())
    assert_bitwise(cleared.running_mean, torch.zeros(3))
    assert cleared.num_batches_tracked == 0

    for poison, poisoned_rank in ((math.nan, 1), (math.inf, 0), (-math.inf, 1)):
        survives_poison(mine, poison if rank == poisoned_rank else None, poison)

    with torch.no_grad():
        module = SyncBatchNorm(3).double()
        assert not module(mine).requires_grad
        assert module.num_batches_tracked == 1

    nothing = SyncBatchNorm(3)
    assert nothing(torch.empty(0, 3, 4)).shape == (0, 3, 4)
    assert_bitwise(nothing.running_var, torch.ones(3))


def test_options(ranks):
    ranks.run(2, options_hold)


def needs_what_is_asked_for(rank: int) -> None:
    x, dy = tensor(4, 3, 5, seed=rank), tensor(4, 3, 5, seed=5 + rank)
    complete = SyncBatchNorm(3).double()
    mine = x.clone().requires_grad_()
    complete(mine).backward(dy)
    gradients = {"x": mine.grad, "weight": complete.weight.grad, "bias": complete.bias.grad}
    for wanted in ({"x"}, {"weight"}, {"bias"}, {"x", "bias"}, {"weight", "bias"}):
        module = SyncBatchNorm(3).double()
        module.weight.requires_grad_("weight" in wanted)
        module.bias.requires_grad_("bias" in wanted)
        mine = x.clone().requires_grad_("x" in wanted)
        seen = collectives(lambda module=module, mine=mine: module(mine).backward(dy))
        assert len(seen) == (3 if "x" in wanted else 2), seen  # with the first call's comparison
        for name, source in (("x", mine), ("weight", module.weight), ("bias", module.bias)):
            if name in wanted:
                assert_bitwise(source.grad, gradients[name], name)
            else:
                assert source.grad is None


def test_every_subset_of_gradients(ranks):
    ranks.run(2, needs_what_is_asked_for)


def differentiates_twice(rank: int) -> None:
    parts = PARTS[3]
    x, dy, v = (tensor(sum(parts), 3, 4, seed=s) for s in range(3))
    own = part_of(parts, rank)

    def second(module: nn.Module, x: torch.Tensor, dy: torch.Tensor, v: torch.Tensor) -> list[Any]:
        x, dy = x.clone().requires_grad_(), dy.clone().requires_grad_()
        (dx,) = torch.autograd.grad(module(x), x, dy, create_graph=True)
        return list(torch.autograd.grad(dx, (x, dy, module.weight), v))

    module = parametrized(SyncBatchNorm(3).double())
    joined = nn.BatchNorm1d(3).double()
    joined.load_state_dict(module.state_dict())
    actual = second(module, x[own], dy[own], v[own])
    expected = second(joined, x, dy, v)
    dist.all_reduce(actual[2])
    for a, e in zip(actual, [expected[0][own], expected[1][own], expected[2]], strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)


def test_double_backward(ranks):
    ranks.run(3, differentiates_twice)


def fused_differentiates_twice(rank: int) -> None:
    parts = PARTS[3]
    x, residual, dy, v = (tensor(sum(parts), 3, 4, seed=s) for s in range(4))
    own = part_of(parts, rank)

    def second(module: nn.Module, *tensors: torch.Tensor) -> list[Any]:
        x, residual, dy = (t.clone().requires_grad_() for t in tensors[:3])
        (dx,) = torch.autograd.grad(module(x, residual), x, dy, create_graph=True)
        wanted = x, residual, dy, module.weight
        return list(torch.autograd.grad(dx, wanted, tensors[3], materialize_grads=True))

    for activation in ("identity", "leaky_relu", "silu"):
        module = parametrized(SyncBatchNormAct(3, activation=activation).double())
        joined = batchnorm_ext.BatchNormAct1d(3, activation=activation).double()
        joined.load_state_dict(module.state_dict())
        actual = second(module, x[own], residual[own], dy[own], v[own])
        expected = second(joined, x, residual, dy, v)
        dist.all_reduce(actual[3])
        for a, e in zip(actual, [*(e[own] for e in expected[:3]), expected[3]], strict=True):
            torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)


def test_double_backward_of_fused_calls(ranks):
    ranks.run(3, fused_differentiates_twice)


def fused(module: nn.Module) -> nn.Module:
    return convert_batchnorm(module, fuse_activations=True)


FUSED_AND_SYNCHRONISED = {
    "synchronised first": lambda m: fused(SyncBatchNorm.convert_sync_batchnorm(m)),
    "fused first": lambda m: SyncBatchNorm.convert_sync_batchnorm(fused(m)),
    "torch's, converted": lambda m: fused(
        SyncBatchNorm.convert_sync_batchnorm(nn.SyncBatchNorm.convert_sync_batchnorm(m))
    ),
    "torch's, fused first": lambda m: SyncBatchNorm.convert_sync_batchnorm(
        nn.SyncBatchNorm.convert_sync_batchnorm(fused(m))
    ),
}


def fused_containers(rank: int, order: str) -> None:
    """A block with a sum equals an unfused one on the joined batch, and runs each chain in one call."""
    theirs = parametrized(basic_block(3, 4, 2)).double()
    ours = FUSED_AND_SYNCHRONISED[order](copy.deepcopy(theirs))
    own = part_of(PARTS[2], rank)
    x = tensor(sum(PARTS[2]), 3, 6, 6)
    dy = tensor(sum(PARTS[2]), 4, 3, 3, seed=1)

    def step(module: nn.Module, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        given = x[part].clone().requires_grad_()
        y = module(given)
        y.backward(dy[part])
        return y, given.grad

    outcome = step(theirs, slice(None))
    epilogues = []
    apply = StepwiseBatchNormFunction.apply

    def recorded(*arguments: Any) -> torch.Tensor:
        epilogues.append((arguments[1] is not None, arguments[12]))
        return apply(*arguments)

    with mock.patch.object(StepwiseBatchNormFunction, "apply", recorded):
        for actual, expected in zip(step(ours, own), outcome, strict=True):
            torch.testing.assert_close(actual, expected[own], rtol=1e-9, atol=1e-10)
    assert epilogues == [(False, "relu"), (False, "identity"), (True, "relu")]
    assert list(ours.state_dict()) == list(theirs.state_dict())
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-9, atol=1e-10)
    for mine, whole in zip(ours.parameters(), theirs.parameters(), strict=True):
        dist.all_reduce(mine.grad)
        torch.testing.assert_close(mine.grad, whole.grad, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("order", FUSED_AND_SYNCHRONISED)
def test_fused_containers_synchronise(ranks, order):
    ranks.run(2, fused_containers, order)


@pytest.mark.parametrize("order", FUSED_AND_SYNCHRONISED)
@pytest.mark.parametrize(
    "reverts",
    [(revert_batchnorm, revert_sync_batchnorm), (revert_sync_batchnorm, revert_batchnorm)],
    ids=["fusion first", "synchronisation first"],
)
def test_fusion_and_synchronisation_are_reverted_in_any_order(order, reverts):
    theirs = parametrized(basic_block(3, 4, 2))
    ours = FUSED_AND_SYNCHRONISED[order](copy.deepcopy(theirs))
    for revert in reverts:
        revert(ours)
    assert type(ours) is type(theirs)
    assert vars(ours).keys() == vars(theirs).keys()
    expected: type[nn.Module] = nn.BatchNorm2d
    if "torch's" in order:
        expected = BatchNormNd
    elif (order, reverts[0]) == ("fused first", revert_batchnorm):
        expected = batchnorm_ext.BatchNorm2d  # what it was when it was synchronised
    assert type(ours.body[1]) is expected
    x = tensor(3, 3, 6, 6).float()
    torch.testing.assert_close(ours(x), theirs(x))


def checkpointed(rank: int) -> None:
    x = tensor(4, 3, 5, seed=rank)
    outcomes = []
    for use in ("none", "reentrant", "non-reentrant"):
        module = SyncBatchNorm(3).double()
        mine = x.clone().requires_grad_()
        if use == "none":
            y = module(mine)
        else:
            y = checkpoint(module, mine, use_reentrant=use == "reentrant")
        y.square().sum().backward()
        outcomes.append((module.running_var, module.num_batches_tracked, mine.grad))
    for outcome in outcomes[1:]:
        for actual, expected in zip(outcome, outcomes[0], strict=True):
            assert_bitwise(actual, expected)


def test_checkpointing_updates_the_statistics_once(ranks):
    ranks.run(2, checkpointed)


def compiled(rank: int) -> None:
    parts = PARTS[2]
    torch._dynamo.reset()
    eager = parametrized(SyncBatchNorm(3))
    module = copy.deepcopy(eager)
    x = tensor(sum(parts), 3, 4, 4).float()[part_of(parts, rank)]
    function = torch.compile(module, fullgraph=True, backend="aot_eager")
    outcomes = []
    for call in (eager, function):
        mine = x.clone().requires_grad_()
        for _ in range(2):
            y = call(mine)
        y.exp().sum().backward()
        outcomes.append((y, mine.grad))
    outcomes[0] += (*eager.buffers(), eager.weight.grad, eager.bias.grad)
    outcomes[1] += (*module.buffers(), module.weight.grad, module.bias.grad)
    for actual, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(actual, expected)


def test_compiles_without_a_graph_break(ranks):
    ranks.run(2, compiled)


# ---- which ranks, and how often -----------------------------------------------------------------


def counts_collectives(rank: int) -> None:
    module = SyncBatchNorm(3)
    x = tensor(2, 3, 4, seed=rank).float().requires_grad_()
    first = collectives(lambda: module(x))
    assert len(first) == 2  # once, the ranks compare their channels and dtypes
    for _ in range(2):
        y: list[torch.Tensor] = []
        assert collectives(lambda y=y: y.append(module(x))) == ["gloo:all_gather"]
        assert collectives(lambda y=y: y[0].sum().backward()) == ["gloo:all_reduce"]
    if rank == 0:  # alone: the others do not take part
        module.eval()
        assert collectives(lambda: module(x).sum().backward()) == []
        plain = BatchNormNd(3)
        plain.load_state_dict(module.state_dict())
        assert_bitwise(module(x), plain.eval()(x))
        module.freeze()
        module.train()
        assert collectives(lambda: module(x).sum().backward()) == []
    dist.barrier()


def test_one_collective_forward_and_one_backward(ranks):
    ranks.run(3, counts_collectives)


def plain_when_alone(rank: int) -> None:
    x = tensor(4, 3, 5).float()
    module, plain = parametrized(SyncBatchNorm(3)), parametrized(batchnorm_ext.BatchNorm1d(3))
    outcomes = []
    for m in (module, plain):
        mine = x.clone().requires_grad_()
        y = m(mine)
        y.square().sum().backward()
        outcomes.append((y, mine.grad, m.weight.grad, m.running_mean, m.running_var))
    for actual, expected in zip(*outcomes, strict=True):
        assert_bitwise(actual, expected)
    if dist.is_initialized():
        assert collectives(lambda: module(x)) == []
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        module(torch.ones(1, 3))


def test_a_group_of_one_and_no_group_are_plain_batch_norm(ranks):
    ranks.run(1, plain_when_alone)
    plain_when_alone(0)


def subgroups(rank: int) -> None:
    pairs = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    own = pairs[rank % 2]
    x = tensor(8, 3, 5)
    module = SyncBatchNorm(3, process_group=own).double()
    joined = nn.BatchNorm1d(3).double()
    with_partner = torch.cat((x[rank % 2 :: 4], x[rank % 2 + 2 :: 4]))
    expected = joined(with_partner)[2 * (rank // 2) :][:2]
    torch.testing.assert_close(module(x[rank::4]), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(module.running_var, joined.running_var, rtol=1e-10, atol=0)

    duplicate = copy.deepcopy(module)
    assert duplicate.process_group is own
    assert duplicate.weight is not module.weight
    torch.testing.assert_close(duplicate(x[rank::4]), expected, rtol=1e-10, atol=1e-10)

    if rank % 2:  # not one of its group
        outside = SyncBatchNorm(3, process_group=pairs[0]).double()
        torch.testing.assert_close(outside(x), nn.BatchNorm1d(3).double()(x))
    dist.barrier()


def test_process_groups(ranks):
    ranks.run(4, subgroups)


# ---- training -----------------------------------------------------------------------------------


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3, stride=2),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 9, 5),
    ).double()


def trained(model: nn.Module, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for x, labels in batches:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def trains_as_one(rank: int, wrapped: str) -> None:
    world = dist.get_world_size()
    labels = torch.arange(12) % 5
    batches = [(tensor(12, 3, 9, 9, seed=step), labels) for step in range(20)]
    own = slice(rank * 12 // world, (rank + 1) * 12 // world)

    alone = network()
    trained(alone, batches)
    model = SyncBatchNorm.convert_sync_batchnorm(network())
    if wrapped == "ddp":
        trained(DistributedDataParallel(model), [(x[own], y[own]) for x, y in batches])
        state = model.state_dict()
    else:
        from torch.distributed.fsdp import fully_shard

        for child in (model[0], model[3], model):
            fully_shard(child)
        trained(model, [(x[own], y[own]) for x, y in batches])
        state = {
            name: value.full_tensor() if hasattr(value, "full_tensor") else value
            for name, value in model.state_dict().items()
        }
    for name, expected in alone.state_dict().items():
        torch.testing.assert_close(state[name], expected, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_twenty_steps_under_ddp_equal_those_of_one_process(ranks, count):
    ranks.run(count, trains_as_one, "ddp")


def test_twenty_steps_under_fsdp_equal_those_of_one_process(ranks):
    ranks.run(2, trains_as_one, "fsdp")


# ---- failures -----------------------------------------------------------------------------------


def disagrees(rank: int) -> None:
    for x in (
        torch.ones(4, 3 + rank),
        torch.ones(4, 3, dtype=[torch.float32, torch.float64][rank]),
    ):
        module = SyncBatchNorm(x.size(1), affine=False)
        module.to(x.dtype)
        with pytest.raises(ValueError, match=r"rank order.*3 channels of float32, .* channels of"):
            module(x)
        assert_bitwise(module.running_var, torch.ones(x.size(1), dtype=x.dtype))

    module = SyncBatchNorm(3, affine=False, track_running_stats=False)
    module(torch.ones(4, 3))
    with pytest.raises(RuntimeError, match="differ in their number of channels or their dtype"):
        module(torch.ones(4, 3, dtype=[torch.float32, torch.float64][rank]))


def test_ranks_that_disagree_are_refused(ranks):
    ranks.run(2, disagrees)


def one_dies(rank: int) -> None:
    module = SyncBatchNorm(3)
    x = torch.ones(4, 3)
    module(x)
    if rank == 1:
        os._exit(1)
    module(x)


def test_a_rank_that_dies_ends_the_others_with_an_error():
    processes = Ranks(2)
    (first_ok, first), (second_ok, second) = processes.answers(2, one_dies)
    processes.stop()
    assert not first_ok
    assert "Error" in first
    assert (second_ok, second) == (False, "ended")


def test_wrong_arguments_change_nothing(ranks):
    ranks.run(2, refuses_wrong_arguments)


def refuses_wrong_arguments(rank: int) -> None:
    module = SyncBatchNorm(3)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match="at least 2D"):
        module(torch.ones(3))
    with pytest.raises(RuntimeError, match="running_mean should contain 4 elements not 3"):
        module(torch.ones(2, 4))
    with pytest.raises(RuntimeError, match="mixed dtype"):
        module(torch.ones(2, 3, dtype=torch.float64))
    module.eps = 0.0
    with pytest.raises(ValueError, match="eps"):
        module(torch.ones(2, 3))
    for name, value in module.state_dict().items():
        assert_bitwise(value, before[name], name)


# ---- conversion ---------------------------------------------------------------------------------


def model() -> nn.Sequential:
    shared = nn.BatchNorm2d(4)
    return parametrized(
        nn.Sequential(
            nn.Conv2d(3, 4, 1),
            shared,
            nn.Sequential(batchnorm_ext.BatchNorm2d(4, skip_nonfinite=True), shared),
            nn.SyncBatchNorm(4),
        )
    )


def test_conversion_keeps_every_object():
    original = model()
    called = []
    original[1].register_forward_hook(lambda *_: called.append(True))
    original[1].weight.requires_grad_(False)
    original[2][0].freeze()
    children, state = list(original.modules()), original.state_dict(keep_vars=True)

    converted = SyncBatchNorm.convert_sync_batchnorm(original)
    assert converted is original
    assert all(a is b for a, b in zip(converted.modules(), children, strict=True))
    for name, value in converted.state_dict(keep_vars=True).items():
        assert value is state[name], name
    assert [type(m) for m in (*converted[1:2], *converted[2], converted[3])] == [SyncBatchNorm] * 4
    assert converted[1] is converted[2][1]
    assert isinstance(converted[1], nn.modules.batchnorm._BatchNorm)
    assert converted[2][0].frozen
    assert converted[2][0].skip_nonfinite
    converted.train()
    assert not converted[2][0].training
    converted(torch.ones(2, 3, 5, 5))
    assert len(called) == 2

    reverted = revert_sync_batchnorm(converted)
    assert reverted is original
    assert type(reverted[1]) is nn.BatchNorm2d
    assert type(reverted[2][0]) is batchnorm_ext.BatchNorm2d
    assert type(reverted[3]) is BatchNormNd
    for name, value in reverted.state_dict(keep_vars=True).items():
        assert value is state[name], name
    assert vars(reverted[1]).keys() == vars(nn.BatchNorm2d(4)).keys()
    assert vars(reverted[3]).keys() == vars(nn.BatchNorm2d(4)).keys()


def test_conversion_of_a_single_module_and_repeated_conversion():
    module = nn.BatchNorm1d(3)
    assert SyncBatchNorm.convert_sync_batchnorm(module) is module
    assert type(SyncBatchNorm.convert_sync_batchnorm(module)) is SyncBatchNorm
    assert module.process_group is None
    assert type(revert_sync_batchnorm(module)) is nn.BatchNorm1d


def test_conversion_keeps_activations():
    fused = batchnorm_ext.BatchNormAct2d(3, activation="leaky_relu", negative_slope=0.2)
    model = nn.Sequential(fused, SyncBatchNormAct(3, activation="silu"))
    x = torch.randn(4, 3, 5, 5)
    expected = copy.deepcopy(fused)(x)
    SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(fused) is SyncBatchNormAct
    assert "activation=leaky_relu, negative_slope=0.2" in repr(fused)
    assert_bitwise(fused(x), expected)
    revert_sync_batchnorm(model)
    assert [type(m) for m in model] == [batchnorm_ext.BatchNormAct2d, BatchNormActNd]
    assert model[1].activation == "silu"
    assert_bitwise(model[0].eval()(x), copy.deepcopy(fused).eval()(x))


def test_revert_keeps_what_torch_cannot_do():
    module = SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm2d(3))
    module.freeze()
    assert type(revert_sync_batchnorm(module)) is batchnorm_ext.BatchNorm2d
    assert module.frozen


def test_lazy_modules_become_synchronised_when_they_materialise():
    lazy = SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.LazyBatchNorm2d()))
    lazy(torch.ones(2, 3, 4, 4))
    assert type(lazy[0]) is SyncBatchNorm
    assert type(revert_sync_batchnorm(lazy)[0]) is nn.BatchNorm2d

    lazy = nn.Sequential(nn.LazyBatchNorm2d())
    revert_sync_batchnorm(SyncBatchNorm.convert_sync_batchnorm(lazy))
    lazy(torch.ones(2, 3, 4, 4))
    assert type(lazy[0]) is nn.BatchNorm2d


def test_derived_classes_are_left_alone_with_a_warning():
    class WithForward(nn.BatchNorm2d):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input).relu()

    module = nn.Sequential(WithForward(3), nn.InstanceNorm2d(3))
    with pytest.warns(UserWarning, match=r"0: .*WithForward may have a forward of its own"):
        SyncBatchNorm.convert_sync_batchnorm(module)
    assert type(module[0]) is WithForward
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SyncBatchNorm.convert_sync_batchnorm(nn.InstanceNorm2d(3))


def test_torch_can_convert_ours():
    module = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(SyncBatchNorm(3)))
    assert type(module[0]) is nn.SyncBatchNorm


def test_checkpoints_of_torch_load_and_back():
    # Apex's SyncBatchNorm has the same keys.
    torchs, ours = parametrized(nn.SyncBatchNorm(4)), SyncBatchNorm(4)
    ours.load_state_dict(torchs.state_dict())
    x = tensor(3, 4, 5).float()
    torch.testing.assert_close(ours.eval()(x), torchs.eval()(x))
    torchs.load_state_dict(parametrized(ours, seed=20).state_dict())
    assert_bitwise(torchs.running_var, ours.running_var)


def test_constructor_repr_and_pickle():
    module = SyncBatchNorm(4, 1e-3, 0.2, True, True, None, "cpu", torch.float64)
    assert module.weight.dtype == torch.float64
    assert repr(module).startswith("SyncBatchNorm(4, eps=0.001, momentum=0.2")
    duplicate = pickle.loads(pickle.dumps(module))
    assert repr(duplicate) == repr(module)
    with pytest.raises(ValueError, match="at least 2D"):
        module(torch.ones(4))


# ---- GPUs ---------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [torch.clone, channels_last])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("parts", [(4, 3), (3, 0, 4)], ids=str)
def test_ranks_that_share_a_gpu(ranks, parts, dtype, layout):
    """Through gloo: NCCL wants a GPU for each rank."""
    ranks.run(len(parts), matches_the_joined_batch, parts, dtype, layout, (3, 7), "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("layout", [torch.clone, channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gpu_for_each_rank(dtype, layout):
    count = min(4, torch.cuda.device_count())
    processes = Ranks(count, "cpu:gloo,cuda:nccl")
    processes.run(count, matches_the_joined_batch, PARTS[count], dtype, layout, (3, 7), "cuda")
    processes.stop()


def synchronised_step(
    x: torch.Tensor, dy: torch.Tensor, module: nn.Module
) -> tuple[torch.Tensor, ...]:
    """A step of the module with the collectives that a group of one would not need."""
    y = StepwiseBatchNormFunction.apply(
        *(x, None, None, module.weight, module.bias),
        *(module.running_mean, module.running_var, module.num_batches_tracked),
        *(module.momentum, module.eps, module.skip_nonfinite, 1, "identity", 0.0),
        *(True, dist.group.WORLD.group_name, 1),
    )
    return (y, *torch.autograd.grad(y, (x, module.weight, module.bias), dy))


def collectives_of_one(rank: int, device: str) -> None:
    x, dy = tensor(6, 5, 3, 7), tensor(6, 5, 3, 7, seed=1)
    outcomes = []
    for step in (synchronised_step, plain_step):
        module = parametrized(SyncBatchNorm(5, dtype=torch.float64)).to(device)
        mine = x.to(device).requires_grad_()
        gradient = dy.to(device)
        step(mine, gradient, module)
        with no_synchronisation():
            outcomes.append((*step(mine, gradient, module), *module.buffers()))
    for actual, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def plain_step(x: torch.Tensor, dy: torch.Tensor, module: nn.Module) -> tuple[torch.Tensor, ...]:
    y = module(x)  # which is alone
    return (y, *torch.autograd.grad(y, (x, module.weight, module.bias), dy))


def captured(rank: int) -> None:
    x, dy = torch.randn(2, 6, 5, 3, 7, device="cuda")
    x.requires_grad_()
    module = SyncBatchNorm(5).cuda()
    warmth = torch.cuda.Stream()
    warmth.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warmth):
        for _ in range(3):
            synchronised_step(x, dy, module)
    torch.cuda.current_stream().wait_stream(warmth)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = synchronised_step(x, dy, module)
    eager = copy.deepcopy(module)
    for step in range(3):
        with torch.no_grad():
            x.copy_(torch.randn_like(x) * (step + 1) + step)
            dy.copy_(torch.randn_like(dy))
        graph.replay()
        expected = synchronised_step(x, dy, eager)
        for actual, want in zip(
            (*results, *module.buffers()), (*expected, *eager.buffers()), strict=True
        ):
            assert_bitwise(actual, want)


@pytest.fixture(scope="module")
def alone() -> Iterator[Ranks]:
    has_nccl = torch.cuda.is_available() and dist.is_nccl_available()
    processes = Ranks(1, "cpu:gloo,cuda:nccl" if has_nccl else "gloo")
    yield processes
    processes.stop()


def test_collectives_of_a_group_of_one(alone, device):
    """The collectives themselves where there is one GPU; the host waits for none of them."""
    alone.run(1, collectives_of_one, device)


@pytest.mark.gpu
def test_collectives_in_a_cuda_graph(alone):
    """Captured once, each replay is a step with collectives, statistics and gradients of its own."""
    alone.run(1, captured)
