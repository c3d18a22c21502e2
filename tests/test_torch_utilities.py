"""Torch's own tools around our modules: weight averaging, fusion, conversion, hooks, modes, flags, torch.func."""

from __future__ import annotations

import concurrent.futures
import copy
import pickle
from collections.abc import Iterator

import pytest
import torch
from checks import assert_bitwise
from torch import nn
from torch.func import functional_call, grad, hessian, stack_module_state, vmap

import batchnorm_ext
from batchnorm_ext import freeze_batchnorm, revert_batchnorm, unfreeze_batchnorm


def network(device: str = "cpu", **options: object) -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        batchnorm_ext.BatchNorm2d(4, **options),
        nn.ReLU(),
        nn.Conv2d(4, 2, 3),
        batchnorm_ext.BatchNorm2d(2, **options),
    ).to(device)


def batch(device: str = "cpu", seed: int = 0, size: int = 6) -> torch.Tensor:
    return torch.randn(size, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).to(device)


def gradients(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    loss = model(x).exp().sum()  # of batch norm outputs, a sum of squares is constant
    return list(torch.autograd.grad(loss, [x, *model.parameters()]))


def assert_all_bitwise(actual, expected) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert_bitwise(one, other)


# ---- weight averaging, fusion, conversion -------------------------------------------------------


def test_update_bn():
    """Stochastic weight averaging recomputes the statistics as cumulative averages over a loader."""
    loader = [batch(seed=i) for i in range(4)]
    ours = network()
    theirs = revert_batchnorm(copy.deepcopy(ours))
    torch.optim.swa_utils.update_bn(loader, ours)
    torch.optim.swa_utils.update_bn(loader, theirs)
    for (name, actual), expected in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(actual, expected, msg=name)
    assert ours[1].momentum == 0.1


def test_update_bn_leaves_frozen_statistics_alone():
    model = network()
    model(batch())
    model[1].freeze()
    before = copy.deepcopy(model[1].state_dict())
    torch.optim.swa_utils.update_bn([batch(seed=1)], model)
    assert_all_bitwise(model[1].state_dict().values(), before.values())
    assert model[4].num_batches_tracked.item() == 1


def test_averaged_model_carries_our_modules():
    model = network()
    averaged = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    for step in range(2):
        model(batch(seed=step))
        averaged.update_parameters(model)
    assert type(averaged.module[1]) is batchnorm_ext.BatchNorm2d
    assert averaged.eval()(batch()).isfinite().all()


@pytest.mark.parametrize("bias", [True, False])
def test_fuse_conv_bn_eval(bias):
    conv, norm = nn.Conv2d(3, 4, 3, bias=bias), batchnorm_ext.BatchNorm2d(4)
    norm(conv(batch()))
    conv.eval()
    norm.eval()
    fused = torch.nn.utils.fusion.fuse_conv_bn_eval(conv, norm)
    torch.testing.assert_close(fused(batch()), norm(conv(batch())), rtol=1e-4, atol=1e-5)


def test_torchs_convert_sync_batchnorm_takes_ours():
    model = network()
    model(batch())
    expected = model.state_dict()
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(converted[1]) is nn.SyncBatchNorm
    assert_all_bitwise(converted.state_dict().values(), expected.values())


def test_replace_all_batch_norm_modules():
    model = torch.func.replace_all_batch_norm_modules_(network())
    theirs = revert_batchnorm(copy.deepcopy(model))
    torch.testing.assert_close(model(batch()), theirs(batch()))
    assert model[1].running_mean is None


# ---- freezing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_frozen_model_survives_copying(copied):
    model = freeze_batchnorm(network(), affine=True)
    clone = copied(model).train()
    before = copy.deepcopy(clone.state_dict())
    clone(batch())
    assert_all_bitwise(clone.state_dict().values(), before.values())
    assert not clone[1].weight.requires_grad
    unfreeze_batchnorm(clone)
    assert clone[1].training
    assert clone[1].weight.requires_grad
    assert not model[1].training


@pytest.mark.parametrize("affine", [True, False])
def test_frozen_model_trains_as_with_torchs_modules_in_eval(affine):
    ours = network()
    ours(batch())
    theirs = revert_batchnorm(copy.deepcopy(ours))
    freeze_batchnorm(ours, affine=affine).train()
    for norm in (theirs.train()[1], theirs[4]):
        norm.eval().requires_grad_(not affine)
    x = batch(seed=1)
    for model in (ours, theirs):
        model(x).exp().sum().backward()
    for actual, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (actual.grad is None) == (expected.grad is None)
        if actual.grad is not None:
            torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-4, atol=1e-5)


def test_nothing_but_vectors_is_kept_behind_a_frozen_layer():
    norm = freeze_batchnorm(batchnorm_ext.BatchNorm2d(4), affine=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        norm(torch.randn(8, 4, 16, 16, requires_grad=True))
    assert sum(t.numel() for t in kept) == 3 * 4  # mean, inv_std and weight


# ---- what autograd keeps ------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_saved_tensors_are_offloaded(training, device):
    model = network(device).train(training)
    x = batch(device).requires_grad_()
    expected = gradients(copy.deepcopy(model), x)
    with torch.autograd.graph.save_on_cpu(pin_memory=device == "cuda"):
        loss = model(x).exp().sum()
    assert_all_bitwise(torch.autograd.grad(loss, [x, *model.parameters()]), expected)


def test_saved_tensors_may_be_compressed():
    model = nn.Sequential(batchnorm_ext.BatchNorm2d(3))
    x = batch().requires_grad_()
    expected = gradients(copy.deepcopy(model), x)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.half(), lambda t: t.float()):
        loss = model(x).exp().sum()
    actual = torch.autograd.grad(loss, [x, *model.parameters()])
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_saved_tensors_may_be_mutated_where_torch_copies_them(training, device):
    x = torch.randn(6, 3, 4, 4, device=device)
    gradients = []
    for family in (nn.BatchNorm2d, batchnorm_ext.BatchNorm2d):
        module = family(3, device=device).train(training)
        z = x.clone().requires_grad_()
        with torch.autograd.graph.allow_mutation_on_saved_tensors():
            moved = z * 2
            y = module(moved)
            moved.add_(1.0)
            y.square().sum().backward()
        gradients.append([z.grad, module.weight.grad, module.running_mean])
    torch.testing.assert_close(*gradients)


def test_two_forwards_before_one_backward():
    """As with a siamese network; torch's modules call it an in-place error when buffers are rewritten between."""
    model, separate = network(), network()
    inputs = [batch(seed=i).requires_grad_() for i in range(2)]
    loss = torch.zeros(())
    for x in inputs:
        loss = loss + model(x).exp().sum()
        for buffer in model.buffers():  # what DistributedDataParallel does with what rank 0 sends
            buffer.copy_(buffer.clone())
    actual = torch.autograd.grad(loss, [*inputs, *model.parameters()])
    first, second = (gradients(separate, x) for x in inputs)
    expected = [first[0], second[0], *(a + b for a, b in zip(first[1:], second[1:], strict=True))]
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert model[1].num_batches_tracked.item() == 2


def test_backward_of_one_graph_in_many_threads():
    model = network()
    wanted = [batch().requires_grad_(), *model.parameters()]
    loss = model(wanted[0]).exp().sum()
    expected = torch.autograd.grad(loss, wanted, retain_graph=True)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        calls = [
            pool.submit(torch.autograd.grad, loss, wanted, retain_graph=True) for _ in range(40)
        ]
        for one in calls:
            assert_all_bitwise(one.result(), expected)


@pytest.mark.native
def test_hooks_on_the_node():
    """Autograd's node has a name of its own in graphs and profiles, and takes hooks like any."""
    module = batchnorm_ext.BatchNorm2d(3)
    x = batch().requires_grad_()
    y = module(x)
    assert y.grad_fn.name() == "batchnorm_ext::BatchNormBackward"
    fused = batchnorm_ext.BatchNormAct2d(3)(x)
    assert fused.grad_fn.name() == "batchnorm_ext::BatchNormActBackward"
    assert len(y.grad_fn.next_functions) == 3
    seen = []
    y.grad_fn.register_prehook(lambda grads: tuple(2.0 * g for g in grads))
    y.grad_fn.register_hook(lambda gradients, _: seen.extend(gradients))
    dy = torch.randn_like(y)
    actual = torch.autograd.grad(y, [x, *module.parameters()], dy)
    other = copy.deepcopy(module)
    expected = torch.autograd.grad(other(x), [x, *other.parameters()], 2.0 * dy)
    assert_all_bitwise(actual, expected)
    assert_all_bitwise(seen, expected)


# ---- modes and flags ----------------------------------------------------------------------------


@pytest.fixture
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_deterministic")
def test_deterministic_algorithms(device, monkeypatch):
    """Nothing to refuse and nothing to change: no result depends on the order of threads."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    norm = batchnorm_ext.BatchNorm2d(3).to(device)
    x = batch(device, size=32).requires_grad_()
    first = gradients(copy.deepcopy(norm), x)
    for _ in range(3):
        assert_all_bitwise(gradients(copy.deepcopy(norm), x), first)


def test_anomaly_detection():
    model = network()
    x = batch().requires_grad_()
    expected = gradients(copy.deepcopy(model), x)
    with torch.autograd.detect_anomaly(check_nan=True):
        assert_all_bitwise(gradients(model, x), expected)


def test_inference_mode():
    model = network()
    with torch.inference_mode():
        model(batch())
        y = model.eval()(batch())
    assert y.is_inference()
    assert model[1].num_batches_tracked.item() == 1
    torch.testing.assert_close(model(batch()), y.clone())


@pytest.mark.native
def test_dispatch_modes_see_our_operators():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(str(function))
            return function(*args, **(kwargs or {}))

    names: list[str] = []
    model = network()
    with Recorder():
        model(batch()).sum().backward()
    assert names.count("batchnorm_ext.forward.default") == 2
    assert not [name for name in names if "batch_norm" in name]
    assert model[1].num_batches_tracked.item() == 1


def test_flop_counter_counts_the_convolutions():
    from torch.utils.flop_counter import FlopCounterMode

    model = network()
    theirs = revert_batchnorm(copy.deepcopy(model))
    counts = []
    for each in (model, theirs):
        with FlopCounterMode(display=False) as counter:
            each(batch()).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.native
def test_profiler_names_our_calls():
    model = network()
    with torch.profiler.profile() as profile:
        model(batch()).sum().backward()
    events = {event.key: event.count for event in profile.key_averages()}
    assert events["batchnorm_ext::forward"] == 2
    assert events["batchnorm_ext::BatchNormBackward"] == 2


def test_default_device_mode():
    with torch.device("meta"):
        model = network("meta")
        y = model(torch.empty(6, 3, 8, 8))
    assert y.is_meta


# ---- torch.func ---------------------------------------------------------------------------------


def test_gradients_of_an_ensemble():
    models = [network() for _ in range(3)]
    for seed, model in enumerate(models):
        torch.manual_seed(seed)
        for p in model.parameters():
            nn.init.normal_(p)
    parameters, buffers = stack_module_state(models)
    x = batch()

    def loss(parameters, buffers):
        return functional_call(models[0], (parameters, buffers), (x,)).exp().sum()

    together = vmap(grad(loss))(parameters, buffers)
    for index, model in enumerate(models):
        for (name, _), expected in zip(
            model.named_parameters(), gradients(model, x.requires_grad_())[1:], strict=True
        ):
            torch.testing.assert_close(together[name][index], expected, rtol=1e-3, atol=1e-3)


def test_hessian_of_a_small_network():
    norm = batchnorm_ext.BatchNorm1d(
        2, track_running_stats=False
    )  # torch.func writes to no buffers
    model = nn.Sequential(nn.Linear(3, 2), norm, nn.Tanh()).double()
    theirs = revert_batchnorm(copy.deepcopy(model))
    x = torch.randn(5, 3, dtype=torch.float64)
    results = []
    for each in (model, theirs):
        parameters = dict(each.named_parameters())
        results.append(
            hessian(lambda p, m=each: functional_call(m, p, (x,)).exp().sum())(parameters)
        )
    for name, row in results[0].items():
        for other, block in row.items():
            torch.testing.assert_close(block, results[1][name][other])


def test_functional_call_reaches_the_kernels():
    model, other = network(), network()
    for p in other.parameters():
        nn.init.normal_(p)
    state = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    torch.testing.assert_close(
        functional_call(model, state, (batch(),)), copy.deepcopy(other)(batch())
    )
    assert other[1].num_batches_tracked.item() == 1
    assert model[1].num_batches_tracked.item() == 0
