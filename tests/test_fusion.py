"""convert_batchnorm(fuse_activations=True): which batch norms run with what follows them, and what stays as it was."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from checks import assert_bitwise
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

import batchnorm_ext
from batchnorm_ext import convert_batchnorm, revert_batchnorm
from benchmarks.memory import saved_bytes
from benchmarks.models import resnet50, small_resnet


def fused(module: nn.Module) -> nn.Module:
    """A fused copy; nothing may have been left."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return convert_batchnorm(copy.deepcopy(module), fuse_activations=True)


def image(channels: int = 4, dims: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(3, channels, *(6,) * dims, generator=generator, dtype=dtype)


def assert_trains_alike(ours: nn.Module, theirs: nn.Module, x: Tensor, rtol: float = 1e-6) -> None:
    """Output, gradients, parameters and buffers of three training steps, then evaluation."""
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (ours, theirs)]
    for _ in range(3):
        results = []
        for module, optimizer in zip((ours, theirs), optimizers, strict=True):
            given = x.clone().requires_grad_()
            optimizer.zero_grad()
            y = module.train()(given * 1.0)  # which may be written to
            (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
            results.append([y.detach(), given.grad, *(p.grad for p in module.parameters())])
            optimizer.step()
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=rtol, atol=0.01 * rtol)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        torch.testing.assert_close(
            ours.state_dict(), theirs.state_dict(), rtol=rtol, atol=0.01 * rtol
        )
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x.clone()), theirs.eval()(x.clone()))


def conv(channels: int, width: int, kernel: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, width, kernel, stride, kernel // 2, bias=False)


# ---- blocks in the style of libraries -----------------------------------------------------------


class SharedReLUBlock(nn.Module):
    """One in-place ReLU object for all, a branch on an attribute, ``+=`` (as torchvision writes it)."""

    def __init__(self, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(4, 4, 1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = conv(4, 4, 3, stride), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = (
            nn.Sequential(conv(4, 4, 1, stride), nn.BatchNorm2d(4)) if stride > 1 else None
        )

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ManyActivationsBlock(nn.Module):
    """An activation for each batch norm, Identity for what is not used (as timm writes it)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.act1 = conv(4, 4), nn.BatchNorm2d(4), nn.SiLU(inplace=True)
        self.conv2, self.bn2, self.act2 = conv(4, 4), nn.BatchNorm2d(4), nn.SiLU(inplace=True)
        self.drop_block, self.aa = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.act1(self.drop_block(self.bn1(self.conv1(x))))
        x = self.aa(x)
        x = self.bn2(self.conv2(x))
        x += shortcut
        return self.act2(x)


class ConvLayer(nn.Module):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.convolution, self.normalization = conv(4, 4), nn.BatchNorm2d(4)
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        hidden_state = self.convolution(input)
        hidden_state = self.normalization(hidden_state)
        hidden_state = self.activation(hidden_state)
        return hidden_state


class NestedBlock(nn.Module):
    """The last batch norm lies two modules below the sum (as transformers writes it)."""

    def __init__(self) -> None:
        super().__init__()
        self.shortcut = nn.Sequential(conv(4, 4, 1), nn.BatchNorm2d(4))
        self.layer = nn.Sequential(ConvLayer(nn.ReLU()), ConvLayer(nn.Identity()))
        self.activation = nn.ReLU()

    def forward(self, hidden_state: Tensor, output_hidden_states: bool = False) -> Tensor:
        residual = hidden_state
        hidden_state = self.layer(hidden_state)
        residual = self.shortcut(residual)
        hidden_state += residual
        return self.activation(hidden_state)


class PreActivationBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(4), conv(4, 8, 1)
        self.norm2, self.conv2 = nn.BatchNorm2d(8), conv(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        new = self.conv1(F.relu(self.norm1(x), inplace=True))
        return torch.cat([x, self.conv2(self.norm2(new).relu())], 1)


class DenseLayer(nn.Module):
    """Joins the tensors of a list, or takes one; may checkpoint; questions for scripting (as torchvision writes it)."""

    def __init__(self, channels: int, growth: int, memory_efficient: bool = False) -> None:
        super().__init__()
        self.norm1, self.relu1 = nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
        self.conv1 = conv(channels, 8, 1)
        self.norm2, self.relu2 = nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.conv2 = conv(8, growth)
        self.drop_rate, self.memory_efficient = 0.0, memory_efficient

    def bottleneck(self, inputs: list[Tensor]) -> Tensor:
        return self.conv1(self.relu1(self.norm1(torch.cat(inputs, 1))))

    def forward(self, input: Tensor | list[Tensor]) -> Tensor:
        inputs = [input] if isinstance(input, Tensor) else input
        if self.memory_efficient and any(tensor.requires_grad for tensor in inputs):
            if torch.jit.is_scripting():
                raise RuntimeError("no checkpoints in scripts")
            new = torch.utils.checkpoint.checkpoint(
                lambda *tensors: self.bottleneck(list(tensors)), *inputs, use_reentrant=False
            )
        else:
            new = self.bottleneck(inputs)
        new = self.conv2(self.relu2(self.norm2(new)))
        if self.drop_rate > 0:
            new = F.dropout(new, self.drop_rate, self.training)
        return new


class DenseBlock(nn.ModuleDict):
    def __init__(self, channels: int, growth: int, layers: int, **options: bool) -> None:
        super().__init__()
        for i in range(layers):
            self[f"layer{i}"] = DenseLayer(channels + i * growth, growth, **options)

    def forward(self, features: Tensor) -> Tensor:
        parts = [features]
        for layer in self.values():
            parts.append(layer(parts))
        return torch.cat(parts, 1)


class DenseNet(nn.Module):
    """Named parts of one Sequential, the last a batch norm whose ReLU is a function outside of it."""

    def __init__(self, **options: bool) -> None:
        super().__init__()
        transition = nn.Sequential(
            OrderedDict(norm=nn.BatchNorm2d(8), relu=nn.ReLU(inplace=True), conv=conv(8, 4, 1))
        )
        self.features = nn.Sequential(
            OrderedDict(
                conv0=conv(4, 4),
                norm0=nn.BatchNorm2d(4),
                relu0=nn.ReLU(inplace=True),
                denseblock1=DenseBlock(4, 2, 2, **options),
                transition1=transition,
                denseblock2=DenseBlock(4, 2, 1, **options),
                norm5=nn.BatchNorm2d(6),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(F.relu(self.features(x), inplace=True), (1, 1))


class LinearBottleneck(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(conv(4, 4), nn.BatchNorm2d(4), nn.Hardswish(), conv(4, 4))
        self.conv.append(nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


class InvertedResidual(nn.Module):
    """ReLU6 behind the expansion and the depthwise convolution, none behind the projection (as torchvision writes it)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Sequential(conv(4, 8, 1), nn.BatchNorm2d(8), nn.ReLU6(inplace=True)),
            nn.Sequential(conv(8, 8), nn.BatchNorm2d(8), nn.Hardtanh(0.0, 6.0)),
            conv(8, 4, 1),
            nn.BatchNorm2d(4),
        )
        nn.init.constant_(self.conv[0][1].bias, 5.5)  # near the upper bound

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


class Functions(nn.Module):
    """Each way to write an activation or a sum as a function, and a question that a trace could answer wrongly."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(12))

    def forward(self, x: Tensor) -> Tensor:
        n = self.norms
        x = torch.relu(n[0](x))
        x = F.leaky_relu(n[1](x), 0.2)
        x = F.leaky_relu(n[2](x), negative_slope=0.3)
        x = F.elu(n[3](x))
        x = F.silu(n[4](x), inplace=True)
        x = F.relu6(n[9](x)) + F.hardtanh(n[10](x), 0, 6, True)
        x = x + F.hardtanh(n[11](x), min_val=0.0, max_val=6.0)
        y = F.hardswish(n[5](x))
        y = F.relu(torch.add(n[6](y), x))
        y = n[7](y).add(x).relu_()
        return torch.tanh(n[8](y)) if hasattr(x, "no_such_attribute") else F.relu(n[8](y) + y)


class UsedTwice(nn.Module):
    """One batch norm in two places, with and without activation."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(torch.relu(self.norm(x))) * 2


def rank(dims: int) -> nn.Sequential:
    norm = getattr(nn, f"BatchNorm{dims}d")
    return nn.Sequential(norm(4), nn.LeakyReLU(0.3), norm(4, momentum=None), nn.ELU())


BLOCKS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "shared relu": (SharedReLUBlock, ["relu", "+relu"]),
    "shared relu, downsample": (lambda: SharedReLUBlock(2), ["relu", "+relu"]),
    "many activations": (ManyActivationsBlock, ["silu", "+silu"]),
    "nested": (NestedBlock, ["relu", "+relu"]),
    "preactivation": (PreActivationBlock, ["relu", "relu"]),
    "linear bottleneck": (LinearBottleneck, ["hardswish", "+identity"]),
    "functions": (
        Functions,
        ["relu", *["leaky_relu"] * 2, "elu", "silu", *["relu6"] * 3, "hardswish", *["+relu"] * 3],
    ),
    "used twice": (UsedTwice, ["relu"]),
    "hardswish": (
        lambda: nn.Sequential(conv(4, 4), nn.BatchNorm2d(4, 1e-3), nn.Hardswish(inplace=True)),
        ["hardswish"],
    ),
    "inverted residual": (InvertedResidual, ["relu6", "relu6", "+identity"]),
    "dense layer": (lambda: DenseLayer(4, 2), ["relu", "relu"]),
    "dense network": (DenseNet, ["relu"] * 9),
    "bn-relu-conv": (
        lambda: nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), conv(4, 4)),
        ["relu"],
    ),
    "no affine": (
        lambda: nn.Sequential(
            conv(4, 4), nn.BatchNorm2d(4, affine=False, track_running_stats=False), nn.ReLU()
        ),
        ["relu"],
    ),
    "1d": (lambda: rank(1), ["leaky_relu", "elu"]),
    "3d": (lambda: rank(3), ["leaky_relu", "elu"]),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_train_as_before(name, fused_calls):
    make, expected = BLOCKS[name]
    torch.manual_seed(1)
    theirs = make().double()
    ours = fused(theirs)
    x = image(dims=int(name[0]) if name[0].isdigit() else 2)
    ours(x.clone())
    assert fused_calls[: len(expected)] == expected
    ours = fused(theirs)
    assert_trains_alike(ours, theirs, x)


def test_resnet50(fused_calls):
    """53 batch norms: 49 with an activation behind them, 16 of these with a sum; 4 are the residual of another."""
    torch.manual_seed(2)
    theirs = resnet50(5).double()
    ours = fused(theirs)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    ours.eval()(x)
    assert (fused_calls.count("relu"), fused_calls.count("+relu")) == (33, 16)
    norms = [m for m in ours.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert (
        len(norms)
        == 53
        == len(fused_calls) + sum(".shortcut.1" in n for n in dict(ours.named_modules()))
    )
    assert {type(m) for m in norms} == {batchnorm_ext.BatchNorm2d}
    torch.testing.assert_close(ours(x), theirs.eval()(x))
    # Fifty layers and as few as eight values a channel: rounding grows from step to step.
    assert_trains_alike(ours, theirs, x, rtol=1e-3)


# ---- everything else stays ----------------------------------------------------------------------


def test_tree_objects_flags_and_state_dict_stay():
    theirs = small_resnet(3)
    theirs[1].weight.requires_grad_(False)
    theirs[3].eval()
    ours = copy.deepcopy(theirs)
    before = list(ours.modules()), list(ours.parameters()), list(ours.buffers())
    kinds = [type(m) for m in before[0]]
    called = []
    ours[3].register_forward_hook(lambda *_: called.append("block"))
    assert convert_batchnorm(ours, fuse_activations=True) is ours
    after = list(ours.modules()), list(ours.parameters()), list(ours.buffers())
    for old, new in zip(before, after, strict=True):
        assert [id(o) for o in old] == [id(n) for n in new]
    assert all(isinstance(m, kind) for m, kind in zip(ours.modules(), kinds, strict=True))
    assert [m.training for m in ours.modules()] == [m.training for m in theirs.modules()]
    assert [p.requires_grad for p in ours.parameters()] == [
        p.requires_grad for p in theirs.parameters()
    ]
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert "fused: body.1 + relu, body.4 + add + relu" in repr(ours)
    assert type(ours).__name__ == "Sequential"
    ours(torch.randn(2, 3, 8, 8))
    assert called == ["block"]


def test_revert_undoes_it():
    theirs = nn.Sequential(small_resnet(3), SharedReLUBlock(2), nn.Sequential(NestedBlock()))
    ours = fused(theirs)
    assert revert_batchnorm(ours) is ours
    assert repr(ours) == repr(theirs)
    for a, b in zip(ours.modules(), theirs.modules(), strict=True):
        assert type(a) is type(b)
        assert vars(a).keys() == vars(b).keys()


def test_converting_twice_and_plain_conversion_in_between(fused_calls):
    module = fused(SharedReLUBlock())
    kind = type(module)
    for again in (True, False):
        convert_batchnorm(module, fuse_activations=again)
        assert type(module) is kind
        assert type(revert_batchnorm(copy.deepcopy(module))) is SharedReLUBlock
    module(image(dtype=torch.float32))
    assert fused_calls == ["relu", "+relu"]


@pytest.mark.parametrize("how", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_fused(how, fused_calls):
    module = fused(nn.Sequential(SharedReLUBlock(2), NestedBlock(), DenseLayer(4, 2)))
    clone = how(module)
    x = image(dtype=torch.float32)
    assert_bitwise(clone.eval()(x), module.eval()(x))
    assert fused_calls == [*["relu", "+relu"] * 2, "relu", "relu"] * 2
    clone.train()
    clone(x)
    if how is not copy.copy:
        assert clone[0].bn1.num_batches_tracked == 1
        assert module[0].bn1.num_batches_tracked == 0


def test_saved_for_backward():
    """A block of two convolutions keeps their inputs and outputs, a bit an element, and no copy of a sum or ReLU."""
    theirs = SharedReLUBlock()
    ours = fused(theirs)
    x = torch.randn(8, 4, 32, 32, requires_grad=True)
    kept = [saved_bytes(lambda m=m: m(x), tuple(m.parameters())) for m in (ours, theirs)]
    size = x.untyped_storage().nbytes()
    assert kept[0] <= 4.1 * size
    assert kept[1] >= 4.9 * size


def test_compiled_without_breaks():
    torch.manual_seed(0)
    theirs = nn.Sequential(SharedReLUBlock(2), NestedBlock(), DenseNet())
    ours = fused(theirs)
    x = image(dtype=torch.float32)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ours, backend=counter, fullgraph=True)
    for mode in (True, True, False, False):
        y, expected = compiled.train(mode)(x), theirs.train(mode)(x)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 2  # training, evaluation
    torch.compiler.reset()


def test_traced_and_exported():
    """Traces of others see the container's own forward, and torch's operators."""
    module = fused(SharedReLUBlock(2)).eval()
    x = image(dtype=torch.float32)
    expected = module(x)
    program = torch.export.export(module, (x,)).module()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(module, x)
    for other in (program, traced, torch.fx.symbolic_trace(module)):
        torch.testing.assert_close(other(x), expected, rtol=1e-5, atol=1e-6)


def test_checkpointing_and_autocast(fused_calls):
    module = fused(SharedReLUBlock())
    x = image(dtype=torch.float32).requires_grad_()
    y = torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False)
    y.sum().backward()
    assert module.bn1.num_batches_tracked == 1
    assert fused_calls == ["relu", "+relu"] * 2
    fused_calls.clear()
    with torch.autocast(
        "cpu", torch.bfloat16
    ):  # the block's input stays float32, what is added to it is not
        y = module(x)
    assert y.dtype == torch.float32
    assert fused_calls == ["relu"]


# ---- what is not fused --------------------------------------------------------------------------


class Custom(nn.Module):
    """A batch norm, a ReLU, and a given forward."""

    def __init__(self, body: Callable[..., Tensor]) -> None:
        super().__init__()
        self.norm, self.act, self.body = nn.BatchNorm2d(4), nn.ReLU(), body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def into_the_shortcut(m: Custom, x: Tensor) -> Tensor:
    shortcut = x * 1.0
    shortcut += m.norm(x * 2.0)
    return m.act(shortcut) + shortcut


def alias_sees_the_sum(m: Custom, x: Tensor) -> Tensor:
    y = m.norm(x)
    z = y
    y += x
    return m.act(y) + z


UNFUSED: dict[str, Callable[[], nn.Module]] = {
    "another activation": lambda: nn.Sequential(nn.BatchNorm2d(4), nn.GELU()),
    "other bounds": lambda: nn.Sequential(nn.BatchNorm2d(4), nn.Hardtanh(0, 4)),
    "function with other bounds": lambda: Custom(lambda m, x: F.hardtanh(m.norm(x))),
    "elu with an alpha": lambda: nn.Sequential(nn.BatchNorm2d(4), nn.ELU(0.5)),
    "function with an alpha": lambda: Custom(lambda m, x: F.elu(m.norm(x), 0.5)),
    "derived activation": lambda: nn.Sequential(nn.BatchNorm2d(4), type("Own", (nn.ReLU,), {})()),
    "output used elsewhere": lambda: Custom(lambda m, x: (lambda y: m.act(y) + y)(m.norm(x))),
    "written into the shortcut": lambda: Custom(into_the_shortcut),
    "alias of the sum": lambda: Custom(alias_sees_the_sum),
    "sum with itself": lambda: Custom(lambda m, x: (lambda y: y + y)(m.norm(x))),
    "sum with a number": lambda: Custom(lambda m, x: m.act(m.norm(x) + 1.0)),
    "scaled sum": lambda: Custom(lambda m, x: torch.add(m.norm(x), x, alpha=2)),
    "something between": lambda: Custom(lambda m, x: m.act(m.norm(x) * 2)),
}


@pytest.mark.parametrize("name", UNFUSED)
def test_other_patterns_are_left_alone(name, fused_calls):
    theirs = UNFUSED[name]().double()
    ours = fused(theirs)
    assert_trains_alike(ours, theirs, image())
    assert fused_calls == []


def branch_on_values(m: Custom, x: Tensor) -> Tensor:
    return m.act(m.norm(x)) if x.sum() > 0 else x


def branch_on_mode(m: Custom, x: Tensor) -> Tensor:
    return m.act(m.norm(x)) * (2 if m.training else 1)


def without_gradient(m: Custom, x: Tensor) -> Tensor:
    with torch.no_grad():
        return m.act(m.norm(x))


def checkpointed(m: Custom, x: Tensor) -> Tensor:
    return torch.utils.checkpoint.checkpoint(lambda y: m.act(m.norm(y)), x, use_reentrant=False)


def counting(m: Custom, x: Tensor) -> Tensor:
    m.calls = getattr(m, "calls", 0) + 1
    return m.act(m.norm(x)) * m.calls


def dice(m: Custom, x: Tensor) -> Tensor:
    return m.act(m.norm(x)) * float(torch.rand(()) > 2)


def constant(m: Custom, x: Tensor) -> Tensor:
    return m.act(m.norm(x)) * torch.ones(6, dtype=x.dtype if type(x) is Tensor else None)


def checked(m: Custom, x: Tensor) -> Tensor:
    if x.shape[1] != 4:
        raise ValueError("four channels")
    return m.act(m.norm(x))


REFUSED: dict[str, tuple[Callable[[Custom, Tensor], Tensor], str]] = {
    "values": (branch_on_values, "control flow"),
    "mode": (branch_on_mode, "differs between training and evaluation"),
    "no_grad": (without_gradient, "switches autocast, gradients"),
    "checkpoint": (checkpointed, "control flow|switches autocast, gradients"),
    "attributes": (counting, "changes attributes"),
    "random numbers": (dice, "random numbers"),
    "constant": (constant, "changes attributes|cannot trace"),
    "shape": (checked, "control flow"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_untraceable_forwards_are_left_and_named(name, fused_calls):
    body, reason = REFUSED[name]
    theirs = nn.Sequential(Custom(body).double(), nn.BatchNorm2d(4).double(), nn.ReLU())
    ours = copy.deepcopy(theirs)
    members = set(vars(ours[0]))
    chance = torch.get_rng_state()
    with pytest.warns(UserWarning, match=rf"^batch norms that might[^;]*: 0 \([^;]*({reason})"):
        convert_batchnorm(ours, fuse_activations=True)
    assert torch.equal(torch.get_rng_state(), chance)
    assert set(vars(ours[0])) == members
    assert type(ours[0]) is Custom
    ours(image())
    assert fused_calls == ["relu"]  # the one behind it
    theirs(image())
    if name not in (
        "random numbers",
        "checkpoint",
    ):  # whose statistics ours move once, torch's twice
        assert_trains_alike(ours, theirs, image())


class AutocastInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=True):
            return F.relu(self.norm(x))


class RequiredKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor, *, scale: float) -> Tensor:
        return F.relu(self.norm(x)) * scale


class OwnReduce(nn.Sequential):
    def __reduce__(self):
        return OwnReduce, tuple(self)


def replaced_forward() -> nn.Module:
    module = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())
    module.forward = lambda x: x
    return module


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (AutocastInside, "switches autocast"),
        (RequiredKeyword, "required keyword, scale"),
        (lambda: OwnReduce(nn.BatchNorm2d(4), nn.ReLU()), "way of its own"),
        (lambda: torch.fx.symbolic_trace(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())), "compiled"),
        (replaced_forward, "replaced on the instance"),
    ],
)
def test_other_reasons_are_named(make, reason):
    module = make()
    kind = type(module)
    with pytest.warns(UserWarning, match=reason):
        convert_batchnorm(module, fuse_activations=True)
    assert type(module) is kind


@pytest.mark.parametrize("where", ["norm", "act"])
def test_hooks_see_what_they_saw(where, fused_calls):
    """At conversion a hook keeps a chain as it is; one registered later sends calls through the modules."""
    seen: list[Tensor] = []

    def hook(module, args, output):
        seen.append(output.clone())

    x = image()
    theirs = Custom(lambda m, x: m.act(m.norm(x))).double()
    getattr(theirs, where).register_forward_hook(hook)
    ours = copy.deepcopy(theirs)
    with pytest.warns(UserWarning, match=rf"{where} \(it has hooks\)"):
        convert_batchnorm(ours, fuse_activations=True)
    ours(x)
    theirs(x)
    torch.testing.assert_close(seen[0], seen[1])
    later = fused(Custom(lambda m, x: m.act(m.norm(x))).double())
    handle = getattr(later, where).register_forward_hook(hook)
    later(x)
    torch.testing.assert_close(seen[2], seen[0])
    assert fused_calls == []
    handle.remove()
    later(x)
    assert fused_calls == ["relu"]


# ---- calls that the trace does not describe -----------------------------------------------------


class Flexible(nn.Module):
    """Takes a tensor or a list, and an option."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act = nn.BatchNorm2d(4), nn.LeakyReLU(0.2)

    def forward(self, input: Tensor | list[Tensor], double: bool = False) -> Tensor:
        parts = [input] if isinstance(input, Tensor) else input
        y = self.act(self.norm(torch.cat(parts, 1)))
        return 2 * y if double else y


def test_other_calls_take_the_own_forward(fused_calls):
    theirs = Flexible().double()
    ours = fused(theirs)
    x = image()
    for arguments, options, count in (
        ((x,), {}, 1),
        (([x[:, :1], x[:, 1:]],), {}, 1),
        (((x[:, :1], x[:, 1:]),), {}, 0),  # a tuple
        ((), {"input": [x]}, 1),
        ((x, True), {}, 0),
        ((x,), {"double": True}, 0),
        ((), {"input": x}, 1),
        ((), {"input": x, "double": False}, 0),
    ):
        fused_calls.clear()
        torch.testing.assert_close(ours(*arguments, **options), theirs(*arguments, **options))
        assert len(fused_calls) == count
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def more_than_joined(m: Custom, x: Tensor | list[Tensor]) -> Tensor:
    parts = [x] if isinstance(x, Tensor) else x
    return m.act(m.norm(torch.cat(parts, 1))) + parts[0]


def questioned(m: Custom, x: Tensor | list[Tensor]) -> Tensor:
    parts = [x] if isinstance(x, Tensor) else x[:1]
    return m.act(m.norm(torch.cat(parts, 1)))


def counted(m: Custom, x: Tensor | list[Tensor]) -> Tensor:
    parts = [x] if isinstance(x, Tensor) else [t * len(x) for t in x]
    return m.act(m.norm(torch.cat(parts, 1)))


@pytest.mark.parametrize("body", [more_than_joined, questioned, counted])
def test_lists_that_are_more_than_joined_take_the_own_forward(body, fused_calls):
    theirs = Custom(body).double()
    ours = copy.deepcopy(theirs)
    with pytest.warns(UserWarning, match=r": Custom \(with a list of tensors: "):
        convert_batchnorm(ours, fuse_activations=True)
    x = image()
    torch.testing.assert_close(ours([x, x[:, :0]]), theirs([x, x[:, :0]]))
    assert fused_calls == []
    torch.testing.assert_close(ours(x), theirs(x))


def test_checkpoints_of_a_dense_network_stay(fused_calls):
    """What cannot be traced is left: here the layers, each by its name."""
    theirs = DenseNet(memory_efficient=True).double()
    ours = copy.deepcopy(theirs)
    with pytest.warns(UserWarning, match=r"features\.denseblock1\.layer0 \(torch\.fx cannot trace"):
        convert_batchnorm(ours, fuse_activations=True)
    torch.testing.assert_close(ours(image()), theirs(image()))
    assert fused_calls == ["relu"] * 3


def test_replaced_modules_are_used(fused_calls):
    x = image()
    theirs = Flexible().double()
    ours = fused(theirs)
    for module in (ours, theirs):
        module.act.negative_slope = 0.7
    torch.testing.assert_close(ours(x), theirs(x))
    for module in (ours, theirs):
        module.act = nn.Tanh()
    torch.testing.assert_close(ours(x), theirs(x))
    for module in (ours, theirs):
        module.norm = nn.Identity()
    torch.testing.assert_close(ours(x), theirs(x))
    assert fused_calls == []
    sliced = fused(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Tanh()))[:1].double()
    torch.testing.assert_close(sliced(x), nn.BatchNorm2d(4).double()(x))


@pytest.mark.parametrize("shape", [(1, 4, 1, 1), (3, 1, 6, 6), (2, 3, 4, 6, 6)])
def test_residuals_that_broadcast(shape):
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x: Tensor, other: Tensor) -> Tensor:
            return F.relu(self.norm(x) + other)

    theirs = Sum().double()
    ours = fused(theirs)
    other = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(ours(image(), other), theirs(image(), other))
    torch.testing.assert_close(ours(image(), image()), theirs(image(), image()))


def test_frozen_after_fusion():
    theirs = nn.Sequential(SharedReLUBlock(2), NestedBlock()).double()
    x = image()
    theirs(x)
    ours = batchnorm_ext.freeze_batchnorm(fused(theirs)).train()
    torch.testing.assert_close(ours(x), theirs.eval()(x))
