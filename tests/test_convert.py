"""convert, revert, freeze and unfreeze on whole models: the same objects, the same results."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from checks import assert_bitwise
from torch import nn

import batchnorm_ext
from batchnorm_ext import convert_batchnorm, freeze_batchnorm, revert_batchnorm, unfreeze_batchnorm

CLASSES = {
    nn.BatchNorm1d: batchnorm_ext.BatchNorm1d,
    nn.BatchNorm2d: batchnorm_ext.BatchNorm2d,
    nn.BatchNorm3d: batchnorm_ext.BatchNorm3d,
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.shared = self.norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shared(torch.relu(self.norm(self.conv(x)))) + x


def model() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4, momentum=None),
        nn.ModuleList([Block(), Block()])[0],
        nn.ModuleDict({"inner": Block()})["inner"],
        nn.Flatten(),
        nn.Linear(4 * 36, 6),
        nn.BatchNorm1d(6, affine=False),
        nn.BatchNorm1d(6, track_running_stats=False),
    )


def x() -> torch.Tensor:
    return torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(4))


def objects(module: nn.Module) -> dict[str, int]:
    """The identity of every module, parameter and buffer."""
    found = {f"module {n}": id(m) for n, m in module.named_modules(remove_duplicate=False)}
    found |= {f"parameter {n}": id(p) for n, p in module.named_parameters(remove_duplicate=False)}
    return found | {f"buffer {n}": id(b) for n, b in module.named_buffers(remove_duplicate=False)}


def train_once(module: nn.Module) -> list[torch.Tensor]:
    module.zero_grad()
    y = module(x())
    y.exp().sum().backward()  # of batch norm outputs, a sum of squares is constant
    return [
        y.detach(),
        *(p.grad.clone() for p in module.parameters() if p.requires_grad),
        *module.state_dict().values(),
    ]


def test_conversion_keeps_every_object_and_result():
    module, reference = model(), model()
    before = objects(module)
    assert convert_batchnorm(module) is module
    assert objects(module) == before
    kinds = [type(m) for m in reference.modules()]
    assert [type(m) for m in module.modules()] == [CLASSES.get(kind, kind) for kind in kinds]
    torch.testing.assert_close(train_once(module), train_once(reference), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(module.eval()(x()), reference.eval()(x()), rtol=1e-4, atol=1e-4)
    assert revert_batchnorm(module) is module
    assert objects(module) == before
    assert [type(m) for m in module.modules()] == kinds
    assert repr(module) == repr(reference)
    module.train()
    reference.train()
    for a, b in zip(module.modules(), reference.modules(), strict=True):
        assert set(vars(a)) == set(vars(b))


def test_the_root_itself_is_converted():
    for theirs, ours in CLASSES.items():
        module = theirs(3)
        assert convert_batchnorm(module) is module
        assert type(module) is ours
        assert type(convert_batchnorm(module)) is ours
        assert type(revert_batchnorm(module)) is theirs
        assert type(revert_batchnorm(module)) is theirs


def test_flags_hooks_and_optimizer_survive():
    module = model()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    norm = module[1]
    norm.eval()
    norm.weight.requires_grad_(False)
    norm.eps, norm.momentum = 0.25, 0.5
    calls = []
    norm.register_forward_hook(lambda *_: calls.append("module"))
    module[2].norm.weight.register_hook(lambda g: calls.append("weight"))
    norm.note = "kept"
    convert_batchnorm(module)
    assert module[1] is norm
    assert not norm.training
    assert module[2].norm.training
    assert not norm.weight.requires_grad
    assert (norm.eps, norm.momentum, norm.note) == (0.25, 0.5, "kept")
    before = module[2].norm.weight.detach().clone()
    train_once(module)
    assert sorted(calls) == ["module", "weight"]
    optimizer.step()
    assert not torch.equal(module[2].norm.weight, before)


def test_shared_module_stays_shared():
    module = convert_batchnorm(model())
    assert module[2].norm is module[2].shared
    module(x())
    assert module[2].norm.num_batches_tracked.item() == 2


def test_unrelated_modules_are_left_alone():
    class Own(nn.BatchNorm2d):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) * 2

    module = nn.Sequential(
        Own(3), nn.SyncBatchNorm(3), nn.InstanceNorm2d(3, affine=True), nn.GroupNorm(1, 3)
    )
    kinds = [type(m) for m in module]
    for function in (convert_batchnorm, revert_batchnorm):
        function(module)
        assert [type(m) for m in module] == kinds
    empty = nn.Identity()
    assert convert_batchnorm(empty) is empty


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_lazy_modules_become_ours(rank):
    lazy = getattr(nn, f"LazyBatchNorm{rank}d")
    batch = torch.randn((4, 6, 3, 3, 3)[: rank + 2])
    module = convert_batchnorm(nn.Sequential(lazy(eps=1e-3)))
    reference = nn.Sequential(lazy(eps=1e-3))
    torch.testing.assert_close(module(batch), reference(batch))
    assert type(module[0]) is getattr(batchnorm_ext, f"BatchNorm{rank}d")
    torch.testing.assert_close(module.state_dict(), reference.state_dict())
    kept = revert_batchnorm(convert_batchnorm(nn.Sequential(lazy())))
    kept(batch)
    assert type(kept[0]) is getattr(nn, f"BatchNorm{rank}d")
    other = nn.Sequential(lazy())
    other(batch)
    assert type(other[0]) is getattr(nn, f"BatchNorm{rank}d")


def test_converted_models_are_copied_and_pickled():
    module = convert_batchnorm(model())
    module(x())
    clone = copy.deepcopy(module)
    assert type(clone[1]) is batchnorm_ext.BatchNorm2d
    for a, b in zip(train_once(clone), train_once(module), strict=True):
        assert_bitwise(a, b)


def test_checkpoints_load_across_conversion():
    reference = model()
    reference(x())
    module = convert_batchnorm(model())
    assert module.load_state_dict(reference.state_dict()) == nn.modules.module._IncompatibleKeys(
        [], []
    )
    torch.testing.assert_close(module.eval()(x()), reference.eval()(x()), rtol=1e-4, atol=1e-4)
    assert model().load_state_dict(module.state_dict()).missing_keys == []


@pytest.mark.parametrize("affine", [True, False])
def test_freeze_whole_model(affine):
    module, reference = model().train(), model().train()
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    tracking = [m for m in norms if m.track_running_stats]
    assert freeze_batchnorm(module, affine=affine) is module
    module.train()
    assert module.training
    assert not any(m.training for m in tracking)
    assert all(m.training for m in norms if m not in tracking)
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    for submodule in reference.modules():
        if isinstance(submodule, nn.modules.batchnorm._BatchNorm) and submodule.track_running_stats:
            submodule.eval()
    torch.testing.assert_close(module(x()), reference(x()), rtol=1e-4, atol=1e-4)
    module(x()).sum().backward()
    for name, tensor in module.state_dict().items():
        assert_bitwise(tensor, state[name], name)
    assert all(m.weight.requires_grad != affine for m in tracking if m.affine)
    assert unfreeze_batchnorm(module) is module
    assert all(m.training for m in norms)
    assert all(m.weight.requires_grad for m in norms if m.affine)
    module(x())
    assert tracking[0].num_batches_tracked.item() == 1


def test_revert_says_what_is_lost():
    module = nn.Sequential(
        batchnorm_ext.BatchNorm2d(3, skip_nonfinite=True, running_var_correction=0),
        batchnorm_ext.BatchNorm2d(3, on_single_value="running"),
    )
    module[1].freeze()
    with pytest.warns(UserWarning, match="dropped") as caught:
        revert_batchnorm(module)
    texts = [str(w.message) for w in caught]
    assert any("skip_nonfinite or running_var_correction" in text for text in texts)
    assert any("on_single_value or freeze()" in text and text[:2] == "1:" for text in texts)
    assert vars(module[0]).keys() == vars(nn.BatchNorm2d(3)).keys()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        revert_batchnorm(nn.Sequential(batchnorm_ext.BatchNorm2d(3)))


def test_convert_on_meta_and_half_models():
    with torch.device("meta"):
        module = convert_batchnorm(model())
    assert all(p.is_meta for p in module.parameters())
    half = convert_batchnorm(model()).to(torch.bfloat16)
    reference = model().to(torch.bfloat16)
    torch.testing.assert_close(
        half.eval()(x().bfloat16()), reference.eval()(x().bfloat16()), rtol=0.02, atol=0.05
    )
