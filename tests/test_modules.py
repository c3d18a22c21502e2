"""The modules: everything a torch module does besides computing, and freezing."""

from __future__ import annotations

import copy
import inspect
import io
import pickle

import pytest
import torch
from checks import assert_bitwise
from oracle import BatchNorm
from tolerances import assert_matches
from torch import nn

import batchnorm_ext

RANKS = pytest.mark.parametrize("rank", [1, 2, 3])
OPTIONS = {
    "default": {},
    "not-affine": {"affine": False},
    "not-tracking": {"track_running_stats": False},
    "cumulative": {"momentum": None},
    "momentum-eps": {"momentum": 0.01, "eps": 1e-3},
    "double": {"dtype": torch.float64},
}
if "bias" in inspect.signature(nn.BatchNorm2d).parameters:
    OPTIONS["no-bias"] = {"bias": False}
    OPTIONS["no-bias-not-affine"] = {"affine": False, "bias": True}


def both(rank: int, channels: int = 5, **options):
    """Our module and torch's, with the same random state."""
    name = f"BatchNorm{rank}d"
    ours, theirs = (
        getattr(batchnorm_ext, name)(channels, **options),
        getattr(nn, name)(channels, **options),
    )
    with torch.no_grad():
        for tensor in theirs.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def inputs(
    rank: int, channels: int = 5, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> torch.Tensor:
    return torch.randn((4, channels, 3, 2, 3)[: rank + 2], dtype=dtype, device=device) * 2 + 1


def assert_same_behaviour(ours: nn.Module, theirs: nn.Module, x: torch.Tensor) -> None:
    """Outputs, gradients and state agree through training steps and evaluation."""
    for training in (True, True, False, True):
        ours.train(training)
        theirs.train(training)
        outputs = []
        for module in (ours, theirs):
            module.zero_grad()
            mine = x.clone().requires_grad_()
            y = module(mine)
            y.square().sum().backward()
            outputs.append((y, mine.grad, [p.grad for p in module.parameters()]))
        torch.testing.assert_close(outputs[0], outputs[1], rtol=2e-5, atol=1e-4)
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


@RANKS
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_drop_in(rank, options, device):
    ours, theirs = (module.to(device) for module in both(rank, **options))
    assert_same_behaviour(
        ours, theirs, inputs(rank, dtype=options.get("dtype", torch.float32), device=device)
    )


@RANKS
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_looks_like_torchs(rank, options):
    ours, theirs = both(rank, **options)
    assert isinstance(ours, type(theirs))
    assert type(ours).__name__ == type(theirs).__name__
    assert repr(ours) == repr(theirs)
    assert repr(nn.Sequential(ours)) == repr(nn.Sequential(theirs))
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert [n for n, _ in ours.named_buffers()] == [n for n, _ in theirs.named_buffers()]
    assert ours._version == theirs._version
    assert ours.__constants__ == theirs.__constants__
    for name in ("num_features", "eps", "momentum", "affine", "track_running_stats"):
        assert getattr(ours, name) == getattr(theirs, name)


@RANKS
def test_constructor_accepts_what_torchs_does(rank):
    name = f"BatchNorm{rank}d"
    theirs = inspect.signature(getattr(nn, name).__init__).parameters
    positional = [p for p in theirs.values() if p.kind is p.POSITIONAL_OR_KEYWORD][1:]
    assert [p.name for p in positional][:7] == [
        "num_features",
        "eps",
        "momentum",
        "affine",
        "track_running_stats",
        "device",
        "dtype",
    ]
    module = getattr(batchnorm_ext, name)(7, 1e-3, 0.2, False, False, "cpu", torch.float64)
    expected = getattr(nn, name)(7, 1e-3, 0.2, False, False, "cpu", torch.float64)
    assert repr(module) == repr(expected)
    if "bias" in theirs:
        assert getattr(batchnorm_ext, name)(7, bias=False).bias is None
    else:
        with pytest.raises(TypeError, match="bias"):
            getattr(batchnorm_ext, name)(7, bias=False)


@RANKS
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_state_dict_goes_both_ways(rank, options):
    ours, theirs = both(rank, **options)
    x = inputs(rank, dtype=options.get("dtype", torch.float32))
    ours(x)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert ours.state_dict()._metadata == theirs.state_dict()._metadata
    assert theirs.load_state_dict(ours.state_dict()).missing_keys == []
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
    buffer = io.BytesIO()
    torch.save(theirs.state_dict(), buffer)
    buffer.seek(0)
    fresh = type(ours)(5, **options)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    for name, tensor in fresh.state_dict().items():
        assert_bitwise(tensor, theirs.state_dict()[name], name)


@RANKS
def test_checkpoint_without_a_batch_counter(rank):
    """Checkpoints from before torch 0.4.1 have none, and version 1 or no version."""
    ours, theirs = both(rank)
    state = theirs.state_dict()
    del state["num_batches_tracked"]
    state._metadata[""]["version"] = 1
    ours.load_state_dict(state)
    assert ours.num_batches_tracked.item() == 0
    plain = {
        name: tensor
        for name, tensor in theirs.state_dict().items()
        if name != "num_batches_tracked"
    }
    type(ours)(5).load_state_dict(plain)
    current = theirs.state_dict()
    del current["num_batches_tracked"]
    with pytest.raises(RuntimeError, match="num_batches_tracked"):
        type(ours)(5).load_state_dict(current)


@RANKS
def test_load_with_assign_from_meta(rank):
    _, theirs = both(rank)
    with torch.device("meta"):
        ours = getattr(batchnorm_ext, f"BatchNorm{rank}d")(5)
    assert all(t.is_meta for t in ours.state_dict().values())
    ours.load_state_dict(theirs.state_dict(), assign=True)
    x = inputs(rank)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


@RANKS
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("frozen", [False, True])
def test_copies_are_complete_and_independent(rank, copied, frozen):
    ours, theirs = both(rank)
    ours.skip_nonfinite = True
    if frozen:
        ours.freeze()
    clone = copied(ours)
    assert type(clone) is type(ours)
    assert clone.skip_nonfinite
    assert clone.frozen == frozen
    assert repr(clone) == repr(ours)
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    clone.unfreeze()
    theirs.train()
    torch.testing.assert_close(clone.train()(inputs(rank)).shape, inputs(rank).shape)
    for name, tensor in ours.state_dict().items():
        assert_bitwise(tensor, before[name], name)
    assert clone.num_batches_tracked.item() == ours.num_batches_tracked.item() + 1
    assert ours.frozen == frozen


def test_whole_module_saved_and_loaded(tmp_path):
    ours, _ = both(2)
    torch.save(ours, tmp_path / "module.pt")
    loaded = torch.load(tmp_path / "module.pt", weights_only=False)
    x = inputs(2)
    assert_bitwise(loaded.eval()(x), ours.eval()(x))


@RANKS
def test_meta_device(rank):
    module = getattr(batchnorm_ext, f"BatchNorm{rank}d")(5, device="meta")
    for training in (True, False):
        y = module.train(training)(torch.empty((4, 5, 3, 2, 3)[: rank + 2], device="meta"))
        assert y.is_meta
    module.to_empty(device="cpu")
    module.reset_parameters()
    theirs = getattr(nn, f"BatchNorm{rank}d")(5)
    assert_same_behaviour(module, theirs, inputs(rank))


def test_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        module = batchnorm_ext.BatchNorm2d(5)
        x = torch.empty(4, 5, 3, 3, requires_grad=True).to(memory_format=torch.channels_last)
        y = module(x)
        assert y.shape == x.shape
        assert y.is_contiguous(memory_format=torch.channels_last)
        y.sum().backward()
        assert module.weight.grad.shape == (5,)


@RANKS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_converted_to_another_dtype(rank, dtype, device):
    ours, theirs = both(rank)
    ours, theirs = ours.to(device, dtype), theirs.to(device, dtype)
    x = inputs(rank, dtype=dtype, device=device)
    y = ours(x)
    assert y.dtype == dtype
    assert ours.running_mean.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert ours.num_batches_tracked.dtype == torch.int64
    assert_matches(y, BatchNorm(x, theirs.weight, theirs.bias).y, "y")


@RANKS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(rank, dtype, device):
    """Under autocast batch norm gets the half output of the layer before, with float32 parameters."""
    ours, theirs = (m.to(device) for m in both(rank))
    x = inputs(rank, device=device)
    with torch.autocast(device, dtype=dtype):
        y, expected = ours(x.to(dtype)), theirs(x.to(dtype))
        full = ours(x)
    assert y.dtype == expected.dtype == dtype
    assert full.dtype == torch.float32
    torch.testing.assert_close(
        y, expected, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps * 4
    )
    assert ours.running_mean.dtype == torch.float32


def test_hooks_and_backward_hooks():
    module = batchnorm_ext.BatchNorm2d(3)
    seen = []
    module.register_forward_pre_hook(lambda m, args: seen.append("pre"))
    module.register_forward_hook(lambda m, args, y: seen.append("post"))
    module.register_full_backward_hook(lambda m, gi, go: seen.append("backward"))
    module(torch.randn(2, 3, 4, 4, requires_grad=True)).sum().backward()
    assert seen == ["pre", "post", "backward"]


def test_subclass_of_tensor_still_works():
    class Tagged(torch.Tensor):
        pass

    x = torch.randn(4, 5, 3, 3)
    module = batchnorm_ext.BatchNorm2d(5)
    expected = nn.BatchNorm2d(5)(x)
    y = module(x.as_subclass(Tagged))
    assert isinstance(y, Tagged)
    torch.testing.assert_close(y.as_subclass(torch.Tensor), expected)
    y = module(nn.Parameter(x))
    torch.testing.assert_close(y, expected)


class Exponential(nn.Module):
    def forward(self, raw: torch.Tensor) -> torch.Tensor:
        return raw.exp()


def test_parametrized_weight():
    results = []
    x = inputs(2)
    for module in both(2):
        nn.utils.parametrize.register_parametrization(module, "weight", Exponential())
        y = module(x)
        y.square().sum().backward()
        results.append((y, [p.grad for p in module.parameters()]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-4)


def test_plain_tensors_in_place_of_parameters():
    results = []
    x = inputs(2)
    for module in both(2):
        weight = module.weight.detach().clone()
        del module.weight
        module.weight = (weight * 2).requires_grad_()
        del module.running_mean
        module.running_mean = torch.ones(5)
        y = module(x)
        results.append(
            (y, torch.autograd.grad(y.square().sum(), module.weight), module.running_mean)
        )
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_module_where_torchs_operator_serves(dtype):
    """16-bit parameters beside float32 statistics go through transforms and traces as well."""
    module = both(2)[0].to(dtype).eval()
    x = inputs(2, dtype=dtype)
    expected = module(x)
    close = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
    stacked = torch.func.vmap(module)(torch.stack([x, x]))
    torch.testing.assert_close(stacked[1], expected, **close)
    output, _ = torch.func.jvp(module, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(output, expected, **close)
    program = torch.export.export(module, (x,))
    torch.testing.assert_close(program.module()(x), expected, **close)
    compiled = torch.compile(copy.deepcopy(module).train(), backend="aot_eager")
    torch.testing.assert_close(compiled(x), module.train()(x), **close)


def test_symbolic_trace_keeps_the_module_whole():
    """As it keeps torch's, so that tools which look for batch norm in a graph find it."""
    model = nn.Sequential(nn.Conv2d(3, 5, 3), batchnorm_ext.BatchNorm2d(5), nn.ReLU())
    traced = torch.fx.symbolic_trace(model)
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["0", "1", "2"]
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(traced.eval()(x), model.eval()(x))


def test_scripting_says_what_to_do_instead():
    with pytest.raises(NotImplementedError, match="revert_batchnorm"):
        torch.jit.script(batchnorm_ext.BatchNorm2d(5))


@RANKS
def test_freeze_survives_train(rank):
    ours, theirs = both(rank)
    x = inputs(rank)
    expected = theirs.eval()(x)
    state = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    ours.train()
    assert ours.freeze() is ours
    for _ in range(2):
        model = nn.Sequential(ours).train()
        assert not ours.training
        torch.testing.assert_close(model(x), expected)
        model.eval()
        torch.testing.assert_close(model(x), expected)
    for name, tensor in ours.state_dict().items():
        assert_bitwise(tensor, state[name], name)
    assert ours.weight.requires_grad
    assert ours.bias.requires_grad
    ours.train()
    assert ours.unfreeze() is ours
    assert ours.training
    ours(x)
    assert ours.num_batches_tracked.item() == state["num_batches_tracked"].item() + 1


@pytest.mark.parametrize("mode", [True, False])
def test_unfreeze_returns_to_the_mode_last_asked_for(mode):
    module = batchnorm_ext.BatchNorm2d(3)
    assert module.freeze().unfreeze().training
    module.freeze()
    module.train(mode)
    assert not module.training
    assert module.unfreeze().training is mode
    assert module.unfreeze().training is mode


def test_freeze_affine_restores_requires_grad():
    module = batchnorm_ext.BatchNorm2d(3)
    module.bias.requires_grad_(False)
    module.freeze(affine=True)
    assert not module.weight.requires_grad
    module.freeze(affine=True)
    module.unfreeze()
    assert module.weight.requires_grad
    assert not module.bias.requires_grad


def test_freeze_trains_through_the_frozen_layer():
    ours, theirs = both(2)
    ours.freeze()
    theirs.eval()
    x = inputs(2)
    pieces = []
    for module in (ours, theirs):
        mine = x.clone().requires_grad_()
        module(mine).square().sum().backward()
        pieces.append((mine.grad, module.weight.grad, module.bias.grad))
    torch.testing.assert_close(pieces[0], pieces[1])


def test_freeze_without_statistics_is_refused():
    module = batchnorm_ext.BatchNorm2d(3, track_running_stats=False)
    with pytest.raises(RuntimeError, match="track_running_stats=False"):
        module.freeze()
    assert not module.frozen


def test_repr_tells_what_torchs_lacks():
    module = batchnorm_ext.BatchNorm2d(3, skip_nonfinite=True).freeze()
    assert repr(module).endswith("skip_nonfinite=True, frozen=True)")
    assert "skip" not in repr(batchnorm_ext.BatchNorm2d(3))


def test_training_step_matches_torchs_in_a_network():
    def network(family):
        torch.manual_seed(5)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False),
            family.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, stride=2, bias=False),
            family.BatchNorm2d(8),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(8 * 9, 16, bias=False),
            family.BatchNorm1d(16),
            nn.Linear(16, 4),
        )

    models = network(batchnorm_ext), network(nn)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in models]
    for _ in range(5):
        x, target = torch.randn(12, 3, 9, 9), torch.randint(4, (12,))
        losses = []
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), target)
            loss.backward()
            optimizer.step()
            losses.append(loss)
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)
    for model in models:
        model.eval()
    torch.testing.assert_close(models[0](x), models[1](x), rtol=1e-3, atol=1e-4)


def test_fuse_conv_bn_eval():
    ours, _ = both(2)
    conv = nn.Conv2d(3, 5, 3).eval()
    ours.eval()
    fused = torch.nn.utils.fusion.fuse_conv_bn_eval(conv, ours)
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(fused(x), ours(conv(x)))


def test_torch_sync_batchnorm_conversion_accepts_ours():
    ours, _ = both(2)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(ours))[0]
    assert isinstance(converted, nn.SyncBatchNorm)
    torch.testing.assert_close(converted.state_dict(), ours.state_dict())


def test_public_names():
    for name in batchnorm_ext.__all__:
        assert getattr(batchnorm_ext, name) is not None
    signature = inspect.signature(batchnorm_ext.functional.batch_norm)
    theirs = inspect.signature(nn.functional.batch_norm)
    assert list(signature.parameters) == [*theirs.parameters, "mask"]
    assert signature.parameters["mask"].kind is inspect.Parameter.KEYWORD_ONLY
    for name, parameter in theirs.parameters.items():
        assert signature.parameters[name].default == parameter.default
    assert batchnorm_ext.__version__


def test_function_can_be_applied_directly():
    x, weight, bias = torch.randn(4, 3, 5), torch.rand(3), torch.rand(3)
    y = batchnorm_ext.BatchNormFunction.apply(
        x, weight, bias, None, None, None, True, 0.1, 1e-5, False, 1
    )
    torch.testing.assert_close(y, nn.functional.batch_norm(x, None, None, weight, bias, True))
