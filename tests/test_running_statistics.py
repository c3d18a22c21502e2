"""The running statistics and the batch counter: what one forward changes, and what it must leave alone."""

from __future__ import annotations

import copy
import functools
import math

import pytest
import torch
from checks import assert_bitwise, call, check_running_statistics
from inputs import arguments
from oracle import BatchNorm, Exact, exact
from tolerances import assert_matches
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import batchnorm_ext
from batchnorm_ext.functional import batch_norm

BatchNorm2d = batchnorm_ext.BatchNorm2d


def batches(count, shape=(4, 3, 5, 5), dtype=torch.float32, device="cpu"):
    return [(torch.randn(shape) * (i + 1) + i).to(device=device, dtype=dtype) for i in range(count)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("momentum", [0.1, 0.9, -0.5, 0.0, 1.0])
def test_exponential_average_over_several_batches(momentum, dtype, device):
    module = BatchNorm2d(3, momentum=momentum, device=device)
    for count, x in enumerate(batches(4, dtype=dtype, device=device), start=1):
        if dtype == torch.float64:
            module.double()
        expected = BatchNorm(
            x, None, None, module.running_mean, module.running_var, momentum=momentum
        )
        module(x)
        assert_matches(module.running_mean, expected.running_mean, "running_mean", dtype)
        assert_matches(module.running_var, expected.running_var, "running_var", dtype)
        assert module.num_batches_tracked.item() == count


def test_cumulative_average_is_the_mean_over_batches(device):
    module = BatchNorm2d(3, momentum=None, device=device, dtype=torch.float64)
    seen = []
    for x in batches(5, dtype=torch.float64, device=device):
        seen.append((x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=True)))
        module(x)
        torch.testing.assert_close(module.running_mean, torch.stack([m for m, _ in seen]).mean(0))
        torch.testing.assert_close(module.running_var, torch.stack([v for _, v in seen]).mean(0))
    assert module.num_batches_tracked.item() == 5
    module.reset_running_stats()
    module(x)
    torch.testing.assert_close(module.running_mean, seen[-1][0])
    assert module.num_batches_tracked.item() == 1


def test_cumulative_average_after_very_many_batches(device):
    """The counter is 64 bits wide, and 1 / count is not rounded to float before it is used."""
    module = BatchNorm2d(3, momentum=None, device=device, dtype=torch.float64)
    count = 2**53 + 2
    module.num_batches_tracked.fill_(count - 1)
    (x,) = batches(1, dtype=torch.float64, device=device)
    expected = BatchNorm(
        x, None, None, module.running_mean, module.running_var, momentum=None, batches=count - 1
    )
    module(x)
    assert module.num_batches_tracked.item() == count
    assert_matches(module.running_mean, expected.running_mean, "running_mean")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bit_buffers_are_rounded_once(dtype, device):
    args = arguments((16, 8, 5, 5), dtype, device=device)
    for momentum in (0.1, 0.5, 1.0):
        before = args.clone()
        expected = BatchNorm(
            args.x, None, None, args.running_mean, args.running_var, momentum=momentum
        )
        call(args, training=True, momentum=momentum)
        check_running_statistics(args, before, expected)


def test_eval_reads_only(device):
    module = BatchNorm2d(3, device=device)
    for x in batches(2, device=device):
        module(x)
    module.eval()
    state = {name: (t.clone(), t._version) for name, t in module.state_dict().items()}
    for x in batches(2, device=device):
        module(x)
    for name, tensor in module.state_dict().items():
        assert_bitwise(tensor, state[name][0], name)
        assert tensor._version == state[name][1]


def test_versions_are_bumped_by_training(device):
    module = BatchNorm2d(3, device=device)
    names = ("running_mean", "running_var", "num_batches_tracked")
    before = [getattr(module, name)._version for name in names]
    module(batches(1, device=device)[0])
    for name, version in zip(names, before, strict=True):
        assert getattr(module, name)._version > version, name


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("flag", [True, False], ids=["flag-set", "flag-cleared"])
def test_flag_flipped_after_construction(flag, training, device):
    """track_running_stats is read at each call: cleared, the buffers are not updated; set too late, there are none."""
    (x,) = batches(1, device=device)
    pair = []
    for family in (batchnorm_ext, nn):
        torch.manual_seed(3)
        module = family.BatchNorm2d(3, track_running_stats=not flag, device=device).train(training)
        if not flag:
            module.running_mean.uniform_()
            module.running_var.uniform_()
        module.track_running_stats = flag
        pair.append((module(x), module.state_dict()))
    torch.testing.assert_close(pair[0][0], pair[1][0])
    assert list(pair[0][1]) == list(pair[1][1])
    for name, tensor in pair[0][1].items():
        torch.testing.assert_close(tensor, pair[1][1][name])


@pytest.mark.parametrize(
    "removed", [("running_mean", "running_var"), ("num_batches_tracked",)], ids=str
)
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_buffers_taken_away(removed, momentum, training, device):
    """As torch.func.replace_all_batch_norm_modules_ does it: the attributes set to None."""
    (x,) = batches(1, device=device)
    results = []
    for family in (batchnorm_ext, nn):
        module = family.BatchNorm2d(3, momentum=momentum, device=device).train(training)
        for name in removed:
            setattr(module, name, None)
        results.append((module(x), module.state_dict()))
    torch.testing.assert_close(results[0], results[1])


def test_replace_all_batch_norm_modules(device):
    model = nn.Sequential(BatchNorm2d(3, device=device), nn.ReLU())
    torch.func.replace_all_batch_norm_modules_(model)
    (x,) = batches(1, device=device)
    for training in (True, False):
        torch.testing.assert_close(
            model.train(training)(x),
            torch.relu(nn.functional.batch_norm(x, None, None, training=True)),
        )


@pytest.mark.parametrize(
    "shape", [(0, 3, 5, 5), (4, 3, 0, 5), (0, 3), (0, 3, 7), (4, 3, 0)], ids=str
)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_without_samples(shape, training, momentum, device):
    """Nothing to learn from: the statistics stay, the batch is counted as torch counts it, gradients are zero."""
    family = "BatchNorm2d" if len(shape) == 4 else "BatchNorm1d"
    ours = getattr(batchnorm_ext, family)(3, momentum=momentum, device=device).train(training)
    theirs = getattr(nn, family)(3, momentum=momentum, device=device).train(training)
    x = torch.empty(shape, device=device, requires_grad=True)
    y = ours(x)
    assert y.shape == x.shape
    theirs(torch.empty(shape, device=device))
    assert_bitwise(ours.running_mean, torch.zeros(3, device=device))
    assert_bitwise(ours.running_var, torch.ones(3, device=device))
    assert_bitwise(ours.num_batches_tracked, theirs.num_batches_tracked)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert_bitwise(ours.weight.grad, torch.zeros(3, device=device))
    assert_bitwise(ours.bias.grad, torch.zeros(3, device=device))


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_no_channels(training, device):
    """torch's module raises an IndexError here; an empty result is the natural one."""
    module = BatchNorm2d(0, device=device).train(training)
    x = torch.empty(4, 0, 5, 5, device=device, requires_grad=True)
    y = module(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape
    assert module.weight.grad.shape == module.bias.grad.shape == (0,)
    assert module.num_batches_tracked.item() == int(training)
    assert batch_norm(torch.empty(0, 0, device=device), None, None, training=True).shape == (0, 0)


def test_single_value_per_channel_in_eval(device):
    args = arguments((1, 3), device=device)
    expected = BatchNorm(
        args.x, args.weight, args.bias, args.running_mean, args.running_var, training=False
    )
    assert_matches(call(args, training=False), expected.y, "y")


BAD = {"nan": math.nan, "inf": math.inf, "minus-inf": -math.inf}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("skip", [True, False], ids=["skip", "no-skip"])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_nonfinite_values_stay_in_their_channel(layout, momentum, skip, bad, device):
    module = BatchNorm2d(3, momentum=momentum, skip_nonfinite=skip, device=device)
    clean = BatchNorm2d(3, momentum=momentum, device=device)
    for index, x in enumerate(batches(3, device=device)):
        x = x.contiguous(
            memory_format=getattr(torch, layout + "_format" if layout == "contiguous" else layout)
        )
        clean_y = clean(x)
        x = x.clone()
        if index == 1:
            x[1, 2, 3, 4] = bad
        y = module(x)
        assert_bitwise(y[:, :2], clean_y[:, :2])
        if index == 1:
            assert torch.isnan(y[:, 2]).any()
    for name in ("running_mean", "running_var"):
        ours, want = getattr(module, name), getattr(clean, name)
        assert_bitwise(ours[:2], want[:2], name)
        assert torch.isfinite(ours).all() == skip
    assert module.num_batches_tracked.item() == 3


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_skipped_channel_keeps_its_statistics_to_the_bit(bad, device):
    module = BatchNorm2d(3, skip_nonfinite=True, device=device)
    first, second = batches(2, device=device)
    module(first)
    before = module.running_mean.clone(), module.running_var.clone()
    second[0, 1] = bad
    module(second)
    assert_bitwise(module.running_mean[1], before[0][1])
    assert_bitwise(module.running_var[1], before[1][1])
    assert not torch.equal(module.running_mean[0], before[0][0])


@pytest.mark.parametrize("layout", ["contiguous_format", "channels_last"])
@pytest.mark.parametrize("shape", [(4, 3, 5, 5), (8, 3, 120, 120)], ids=["small", "split"])
@pytest.mark.parametrize(
    "values", [*([value] for value in BAD.values()), [math.inf, -math.inf]], ids=str
)
def test_nonfinite_statistics_without_skipping_are_those_of_the_values(
    values, shape, layout, device
):
    """The mean of values one of which is infinite is infinite, wherever it stands; as torch's on the CPU."""
    for first in (0, shape[0] - 1):
        module = BatchNorm2d(3, device=device)
        x = torch.randn(shape, device=device).contiguous(memory_format=getattr(torch, layout))
        for index, value in enumerate(values):
            x[first - index, 1, 2, 2] = value
        module(x)
        statistics = torch.stack((module.running_mean, module.running_var))
        exact = x.double()
        expected = torch.stack((exact.mean((0, 2, 3)) * 0.1, exact.var((0, 2, 3)) * 0.1 + 0.9))
        torch.testing.assert_close(
            statistics.double(), expected, rtol=1e-5, atol=1e-5, equal_nan=True
        )


def test_gradient_of_a_nonfinite_channel_leaves_the_others(device):
    args = arguments((4, 3, 5, 5), device=device)
    clean = torch.autograd.grad(
        call(args, training=True), [args.x, args.weight, args.bias], args.dy
    )
    with torch.no_grad():
        args.x[1, 2, 3, 4] = math.nan
    dx, dweight, dbias = torch.autograd.grad(
        call(args, training=True), [args.x, args.weight, args.bias], args.dy
    )
    assert_bitwise(dx[:, :2], clean[0][:, :2])
    assert_bitwise(dweight[:2], clean[1][:2])
    assert_bitwise(dbias, clean[2])
    assert torch.isnan(dweight[2])


def test_statistics_do_not_drift_from_a_stationary_stream(device):
    """Thousands of small steps toward a fixed value: float32 buffers reach it."""
    module = BatchNorm2d(1, momentum=1e-3, device=device)
    x = torch.tensor([2.0, 4.0], device=device).view(2, 1, 1, 1)
    with torch.no_grad():
        for _ in range(2000):
            module(x)
    share = 1 - (1 - 1e-3) ** 2000
    assert module.running_mean.item() == pytest.approx(3.0 * share, rel=1e-4)
    assert module.running_var.item() == pytest.approx(1.0 + 1.0 * share, rel=1e-4)


def block(channels, depth, family, device="cpu", **options):
    layers = []
    for _ in range(depth):
        layers += [
            nn.Conv2d(channels, channels, 1, device=device),
            family.BatchNorm2d(channels, device=device, **options),
        ]
    return nn.Sequential(*layers).double()


CHECKPOINTS = {
    "reentrant": lambda model, x: checkpoint(model, x, use_reentrant=True),
    "non-reentrant": lambda model, x: checkpoint(model, x, use_reentrant=False),
    "no-early-stop": lambda model, x: checkpoint(
        model, x, use_reentrant=False, determinism_check="none"
    ),
    "nested": lambda model, x: checkpoint(
        lambda t: checkpoint(model[2:], model[:2](t), use_reentrant=False), x, use_reentrant=False
    ),
    "nested-reentrant": lambda model, x: checkpoint(
        lambda t: checkpoint(model[2:], model[:2](t), use_reentrant=True), x, use_reentrant=True
    ),
    "selective": lambda model, x: checkpoint(
        model,
        x,
        use_reentrant=False,
        context_fn=functools.partial(
            create_selective_checkpoint_contexts, [torch.ops.aten.convolution.default]
        ),
    ),
    "sequential": lambda model, x: torch.utils.checkpoint.checkpoint_sequential(
        model, 2, x, use_reentrant=False
    ),
}


@pytest.mark.parametrize("run", CHECKPOINTS.values(), ids=CHECKPOINTS.keys())
@pytest.mark.parametrize("momentum", [0.1, None])
def test_checkpointing_updates_statistics_once(run, momentum, device):
    """The recomputation inside backward is the same batch again; torch's modules count it twice."""
    torch.manual_seed(1)
    plain = block(4, 2, batchnorm_ext, device, momentum=momentum)
    model = block(4, 2, batchnorm_ext, device, momentum=momentum)
    model.load_state_dict(plain.state_dict())
    for step in range(2):
        x = torch.randn(3, 4, 5, 5, dtype=torch.float64, device=device)
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        plain(inputs[0]).exp().sum().backward()
        run(model, inputs[1]).exp().sum().backward()
        torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
        for expected, actual in zip(plain.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(actual.grad, expected.grad)
        torch.testing.assert_close(dict(model.named_buffers()), dict(plain.named_buffers()))
        assert model[1].num_batches_tracked.item() == step + 1


def test_forward_after_backward_counts_again(device):
    module = BatchNorm2d(3, device=device)
    for count, x in enumerate(batches(3, device=device), start=1):
        module(x).sum().backward()
        assert module.num_batches_tracked.item() == count


def test_two_forwards_then_two_backwards(device):
    """Weight sharing: each backward uses its own batch's statistics, though the buffers moved on."""
    module = BatchNorm2d(3, device=device, dtype=torch.float64)
    alone = BatchNorm2d(3, device=device, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in batches(2, dtype=torch.float64, device=device)]
    outputs = [module(x) for x in inputs]
    for x, y in zip(inputs, outputs, strict=True):
        (dx,) = torch.autograd.grad(y.pow(3).sum(), x)
        again = x.detach().requires_grad_()
        assert_bitwise(dx, torch.autograd.grad(alone(again).pow(3).sum(), again)[0])


def test_eval_then_training_update_before_backward(device):
    args = arguments((4, 3, 5, 5), torch.float64, device=device)
    expected = BatchNorm(
        args.x, args.weight, args.bias, args.running_mean, args.running_var, training=False
    )
    y = call(args, training=False)
    call(args, training=True)
    dx, dweight, _ = torch.autograd.grad(y, [args.x, args.weight, args.bias], args.dy)
    exact_dx, exact_dweight, _ = expected.gradients(args.dy)
    assert_matches(dx, exact_dx, "dx")
    assert_matches(dweight, exact_dweight, "dweight")


def test_statistics_move_without_autograd(device):
    data = batches(3, device=device)
    states = []
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        module = BatchNorm2d(3, device=device)
        for x in data:
            with context():
                module(x)
        states.append(module.state_dict())
    for state in states[1:]:
        for name, tensor in state.items():
            assert_bitwise(tensor, states[0][name], name)


def test_swa_update_bn(device):
    """torch.optim.swa_utils.update_bn sets momentum to None, resets, and averages over a loader."""
    module = nn.Sequential(BatchNorm2d(3, device=device, dtype=torch.float64))
    data = batches(4, dtype=torch.float64, device=device)
    torch.optim.swa_utils.update_bn(data, module)
    torch.testing.assert_close(
        module[0].running_mean, torch.stack([x.mean((0, 2, 3)) for x in data]).mean(0)
    )
    torch.testing.assert_close(
        module[0].running_var, torch.stack([x.var((0, 2, 3)) for x in data]).mean(0)
    )
    assert module[0].momentum == 0.1


def test_unbiased_variance_of_two_samples(device):
    x = torch.tensor([[1.0], [4.0]], device=device)
    mean, var = torch.zeros(1, device=device), torch.zeros(1, device=device)
    batch_norm(x, mean, var, training=True, momentum=1.0)
    assert mean.item() == 2.5
    assert_matches(
        var, Exact(exact(torch.tensor([4.5])), exact(torch.tensor([4.5]))), "running_var"
    )


# ---- the biased variance ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("layout", ["contiguous_format", "channels_last"])
@pytest.mark.parametrize("skip", [True, False], ids=["skip", "no-skip"])
def test_biased_variance_in_running_var(skip, layout, momentum, dtype, device):
    options = {"momentum": momentum, "skip_nonfinite": skip, "running_var_correction": 0}
    module = BatchNorm2d(3, device=device, **options)
    fused = batchnorm_ext.BatchNormAct2d(3, activation="silu", device=device, **options)
    if dtype == torch.float64:
        module.double()
        fused.double()
    for count, x in enumerate(batches(3, (2, 3, 1, 2), dtype, device)):
        x = x.contiguous(memory_format=getattr(torch, layout))
        running = module.running_mean, module.running_var
        rule = {"momentum": momentum, "batches": count, "correction": 0}
        expected = BatchNorm(x, None, None, *running, **rule)
        y = module(x)
        assert_matches(y, expected.y, "y")
        fused(x)
        for updated in (module, fused):
            assert_matches(updated.running_mean, expected.running_mean, "running_mean", dtype)
            assert_matches(updated.running_var, expected.running_var, "running_var", dtype)


def test_biased_variance_by_torchs_operator(device):
    """What the kernels do not see, such as a conjugate's negative part, takes torch's operator."""
    modules = [BatchNorm2d(3, running_var_correction=0, device=device) for _ in range(2)]
    for x in batches(2, (3, 3, 1, 2), device=device):
        modules[0](x)
        modules[1](torch._neg_view(-x))
    torch.testing.assert_close(modules[0].state_dict(), modules[1].state_dict())


def test_biased_variance_of_masked_and_of_pooled_batches(device):
    parts = batches(2, device=device)
    mask = torch.rand(4, 5, 5, device=device) < 0.1
    mask[0, 0, :2] = True
    module = BatchNorm2d(3, running_var_correction=0, device=device)
    running = module.running_mean, module.running_var
    masked = BatchNorm(parts[0], None, None, *running, counted=mask, correction=0)
    pooled = BatchNorm(torch.cat(parts), None, None, *running, correction=0)
    with batchnorm_ext.pooled_statistics(module):
        for x in parts:
            module(x)
    assert_matches(module.running_var, pooled.running_var, "running_var")
    module.reset_running_stats()
    module(parts[0], mask=mask)
    assert_matches(module.running_var, masked.running_var, "running_var")


# ---- a single value per channel -----------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["BatchNorm1d", "BatchNormAct1d", "BatchRenorm1d", "SyncBatchNorm"]
)
@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1)], ids=str)
def test_a_single_value_is_normalised_as_in_evaluation(shape, kind, device):
    module = getattr(batchnorm_ext, kind)(3, on_single_value="running", device=device)
    module(torch.randn(4, *shape[1:], device=device) + 2)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    x = torch.randn(shape, device=device, requires_grad=True)
    y = module(x)
    y.sum().backward()
    expected = copy.deepcopy(module).eval()
    z = x.detach().requires_grad_()
    assert_bitwise(y, expected(z))
    expected(z).sum().backward()
    assert_bitwise(x.grad, z.grad)
    for name, value in state.items():
        assert_bitwise(module.state_dict()[name], value, name)
    assert module.training
    module(torch.randn(4, *shape[1:], device=device))
    assert module.num_batches_tracked.item() == 2


def test_a_single_value_without_running_statistics_is_an_error(device):
    module = batchnorm_ext.BatchNorm1d(
        3, track_running_stats=False, on_single_value="running", device=device
    )
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        module(torch.randn(1, 3, device=device))


def test_a_single_value_counts_nothing_in_a_pool(device):
    module = batchnorm_ext.BatchNorm1d(3, on_single_value="running", device=device)
    x = torch.randn(4, 3, device=device)
    expected = BatchNorm(x, None, None, module.running_mean, module.running_var)
    with batchnorm_ext.pooled_statistics(module):
        module(x)
        module(x[:1] + 100)
    assert_matches(module.running_mean, expected.running_mean, "running_mean")
    assert_matches(module.running_var, expected.running_var, "running_var")


# ---- pooled over several passes -----------------------------------------------------------------


def joined(batches, module, **options):
    """The oracle of one batch made of several."""
    running = (module.running_mean, module.running_var)
    return BatchNorm(torch.cat(batches), None, None, *running, **options)


def assert_pooled(module, expected, dtype):
    assert_matches(module.running_mean, expected.running_mean, "running_mean", dtype)
    assert_matches(module.running_var, expected.running_var, "running_var", dtype)
    assert module.num_batches_tracked.item() == 1
    assert module._pool is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
def test_pooled_batches_count_as_one(momentum, dtype, device):
    parameters = torch.float64 if dtype == torch.float64 else torch.float32
    module = BatchNorm2d(3, momentum=momentum, device=device, dtype=parameters)
    plain = BatchNorm2d(3, device=device, dtype=parameters)
    parts = [x[: i + 1] for i, x in enumerate(batches(4, dtype=dtype, device=device))]
    expected = joined(parts, module, momentum=momentum)
    with batchnorm_ext.pooled_statistics(module):
        for x in parts:
            assert_bitwise(module(x), plain(x))
            assert_bitwise(module.running_mean, torch.zeros_like(module.running_mean))
            assert module.num_batches_tracked.item() == 0
    assert_pooled(module, expected, dtype)


def test_pooled_statistics_of_a_model_are_those_of_all_its_data(device):
    """With the weights at hand, and whatever the running statistics were (precise batch norm)."""
    first, second = BatchNorm2d(3, device=device), nn.BatchNorm2d(3, device=device)
    model = nn.Sequential(first, nn.ReLU(), second).double()
    for norm in (first, second):
        norm.running_mean.fill_(7.0)
    data = batches(3, dtype=torch.float64, device=device)
    expected = joined(data, first, momentum=1.0)
    inner = [model[1](nn.functional.batch_norm(x, None, None, training=True)) for x in data]
    then = joined(inner, second, momentum=1.0, eps=0.0)
    with torch.no_grad(), batchnorm_ext.pooled_statistics(model, momentum=1.0):
        for x in data:
            model(x)
    assert_pooled(first, expected, torch.float64)
    assert type(second) is BatchNorm2d
    for name in ("running_mean", "running_var"):
        wanted = torch.from_numpy(getattr(then, name).value.astype("float64"))
        torch.testing.assert_close(getattr(second, name).cpu(), wanted)


@pytest.mark.parametrize("activation", ["relu", "identity"])
def test_pooled_fused_calls_and_masks(activation, device):
    module = batchnorm_ext.BatchNormAct2d(
        3,
        activation=activation,
        inplace=activation == "identity",
        dtype=torch.float64,
        device=device,
    )
    parts = batches(3, dtype=torch.float64, device=device)
    masks = [torch.rand(4, 5, 5, device=device) < 0.5 for _ in parts]
    expected = joined(parts, module, counted=torch.cat(masks))
    with batchnorm_ext.pooled_statistics(module):
        for x, mask in zip(parts, masks, strict=True):
            module(x.clone(), mask=mask)
    assert_pooled(module, expected, torch.float64)
    module.reset_running_stats()
    expected = joined(parts, module)
    with torch.no_grad(), batchnorm_ext.pooled_statistics(module):
        for x in parts:
            module(x.clone(), x if activation == "relu" else None)
    assert_pooled(module, expected, torch.float64)


def test_pooled_renormalisation_corrects_as_before(device):
    module = batchnorm_ext.BatchRenorm2d(3, dtype=torch.float64, device=device)
    module.running_var.fill_(2.0)
    alone = batchnorm_ext.BatchRenorm2d(3, momentum=0.0, dtype=torch.float64, device=device)
    alone.running_var.fill_(2.0)
    parts = batches(3, dtype=torch.float64, device=device)
    expected = joined(parts, module)
    with batchnorm_ext.pooled_statistics(module):
        for x in parts:
            torch.testing.assert_close(module(x), alone(x))
    assert_pooled(module, expected, torch.float64)


def test_pooled_passes_are_checkpointed_and_compiled(device):
    parts = batches(3, dtype=torch.float64, device=device)
    for run in (
        lambda module, x: checkpoint(module, x, use_reentrant=False),
        torch.compile(lambda module, x: module(x), fullgraph=True, backend="aot_eager"),
    ):
        module = BatchNorm2d(3, dtype=torch.float64, device=device)
        expected = joined(parts, module)
        with batchnorm_ext.pooled_statistics(module):
            for x in parts:
                run(module, x.clone().requires_grad_()).sum().backward()
        assert_pooled(module, expected, torch.float64)


def test_what_is_not_training_is_not_pooled(device):
    frozen, evaluated, untracked, unused = (BatchNorm2d(3, device=device) for _ in range(4))
    frozen.freeze()
    evaluated.eval()
    untracked.track_running_stats = False
    model = nn.ModuleList(
        (frozen, evaluated, untracked, unused, nn.BatchNorm2d(3, track_running_stats=False))
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with batchnorm_ext.pooled_statistics(model):
        for module in (frozen, evaluated, untracked):
            module(batches(1, device=device)[0])
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_an_exception_leaves_the_statistics_alone(device):
    module = BatchNorm2d(3, device=device)
    (x,) = batches(1, device=device)

    def fail_behind(norm):
        with batchnorm_ext.pooled_statistics(nn.Sequential(BatchNorm2d(3), module)):
            norm(x)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_behind(module)
    assert_bitwise(module.running_mean, torch.zeros_like(module.running_mean))
    assert module.num_batches_tracked.item() == 0
    with batchnorm_ext.pooled_statistics(module):
        with pytest.raises(RuntimeError, match="pooled already"):
            fail_behind(module)
        module(x)
    assert module.num_batches_tracked.item() == 1


def test_pooled_infinities_are_skipped(device):
    module = BatchNorm2d(3, skip_nonfinite=True, device=device)
    parts = batches(2, device=device)
    parts[1][0, 1, 0, 0] = float("inf")
    with batchnorm_ext.pooled_statistics(module):
        for x in parts:
            module(x)
    assert (module.running_mean != 0).tolist() == [True, False, True]
