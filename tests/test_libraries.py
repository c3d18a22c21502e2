"""Models and trainers of other libraries with our modules in place of torch's."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import batchnorm_ext
from batchnorm_ext import convert_batchnorm, freeze_batchnorm, revert_batchnorm

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def norms(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def step(model: nn.Module, x: torch.Tensor, output=lambda y: y) -> list[torch.Tensor]:
    """One training step: the output, every gradient, and the state afterwards."""
    torch.manual_seed(1)  # dropout
    y = output(model.train()(x))
    model.zero_grad()
    y.float().pow(2).mean().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return [y.detach(), *gradients, *(t.clone() for t in model.state_dict().values())]


def assert_trains_alike(
    model: nn.Module, x: torch.Tensor, output=lambda y: y, fuse: bool = False
) -> nn.Module:
    """Hold the converted model against the model itself, in double precision; return the converted one."""
    theirs = model.double()
    ours = convert_batchnorm(copy.deepcopy(theirs), fuse_activations=fuse)
    assert len(norms(ours)) == len(norms(theirs)) > 0
    for actual, expected in zip(
        step(ours, x.double(), output), step(theirs, x.double(), output), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-8)
    with torch.no_grad():
        torch.testing.assert_close(
            output(ours.eval()(x.double())), output(theirs.eval()(x.double()))
        )
    return ours


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5"])
def test_torchvision(name, library):
    models = library("torchvision.models")
    torch.manual_seed(0)
    ours = assert_trains_alike(models.get_model(name, num_classes=5), torch.randn(2, 3, 48, 48))
    assert {type(m) for m in norms(ours)} == {batchnorm_ext.BatchNorm2d}


@pytest.mark.parametrize("layer", ["ours as norm_layer", "converted"])
def test_timm(layer, library):
    """timm derives BatchNormAct2d from torch's module with a forward of its own: conversion leaves that alone."""
    timm = library("timm")
    torch.manual_seed(0)
    if layer == "converted":
        ours = assert_trains_alike(
            timm.create_model("resnet18", num_classes=5), torch.randn(2, 3, 48, 48)
        )
    else:
        ours = timm.create_model("resnet18", num_classes=5, norm_layer=batchnorm_ext.BatchNorm2d)
        step(ours, torch.randn(2, 3, 48, 48))
    assert {type(m) for m in norms(ours)} == {batchnorm_ext.BatchNorm2d}
    activated = timm.create_model("efficientnet_b0", num_classes=5)
    kinds = {type(m) for m in norms(activated)}
    assert {type(m) for m in norms(convert_batchnorm(activated))} == kinds


def test_timm_freezes_and_unfreezes_ours(library):
    """It swaps batch norm by isinstance for a frozen kind of its own."""
    library("timm")
    from timm.layers import FrozenBatchNormAct2d
    from timm.utils.model import freeze_batch_norm_2d, unfreeze_batch_norm_2d

    model = nn.Sequential(nn.Conv2d(3, 4, 3), batchnorm_ext.BatchNorm2d(4))
    x = torch.randn(4, 3, 8, 8)
    model(x)
    expected = copy.deepcopy(model).eval()(x)
    frozen = freeze_batch_norm_2d(model)
    assert not isinstance(frozen[1], FrozenBatchNormAct2d)
    torch.testing.assert_close(frozen(x), expected)
    torch.testing.assert_close(unfreeze_batch_norm_2d(frozen).eval()(x), expected)


def test_timm_exponential_moving_average(library):
    library("timm")
    from timm.utils import ModelEmaV3

    model = nn.Sequential(nn.Conv2d(3, 4, 3), batchnorm_ext.BatchNorm2d(4))
    average = ModelEmaV3(model, decay=0.5)
    model(torch.randn(4, 3, 8, 8))
    average.update(model)
    expected = 0.5 * model[1].running_mean
    torch.testing.assert_close(average.module[1].running_mean, expected)


def test_transformers_resnet(tmp_path, library):
    library("torchvision")  # which transformers imports on first use, where it is installed
    transformers = library("transformers")
    config = transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_type="basic",
        num_labels=3,
    )
    torch.manual_seed(0)
    model = transformers.ResNetForImageClassification(config)
    ours = assert_trains_alike(model, torch.randn(2, 3, 32, 32), lambda y: y.logits)
    ours.save_pretrained(tmp_path)
    again = transformers.ResNetForImageClassification.from_pretrained(tmp_path).double().eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(again(x).logits, ours.eval()(x).logits)


def fused_chains(model: nn.Module, fused_calls: list[str]) -> int:
    """How many batch norms a forward pass runs together with what follows them."""
    fused_calls.clear()
    model.eval()(torch.randn(1, 3, 64, 64, dtype=torch.float64))
    return len(fused_calls)


# Of a ResNet's batch norms all but the last of each projected shortcut, which is the residual of another; of
# MobileNets' and EfficientNet's those with an activation or a sum.
FUSED = {
    "resnet18": (20, 17),
    "resnet50": (53, 49),
    "mobilenet_v2": (52, 45),
    "mobilenet_v3_small": (34, 29),
    "efficientnet_b0": (49, 33),
    "shufflenet_v2_x0_5": (56, 37),
}


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.filterwarnings("error:batch norms that might")
def test_torchvision_fused(name, fused_calls, library):
    models = library("torchvision.models")
    torch.manual_seed(0)
    model = models.get_model(name, num_classes=5)
    for module in model.modules():
        if hasattr(module, "p"):
            module.p = (
                0.0  # dropout and stochastic depth, which draw as many numbers but at other times
            )
    ours = assert_trains_alike(model, torch.randn(2, 3, 64, 64), fuse=True)
    assert (len(norms(ours)), fused_chains(ours, fused_calls)) == FUSED[name]


@pytest.mark.filterwarnings("error:batch norms that might")
def test_timm_fused(fused_calls, library):
    timm = library("timm")
    torch.manual_seed(0)
    ours = assert_trains_alike(
        timm.create_model("resnet50", num_classes=5), torch.randn(2, 3, 64, 64), fuse=True
    )
    assert (len(norms(ours)), fused_chains(ours, fused_calls)) == (53, 49)


@pytest.mark.parametrize("layer_type", ["basic", "bottleneck"])
@pytest.mark.filterwarnings("error:batch norms that might")
def test_transformers_resnet_fused(layer_type, tmp_path, fused_calls, library):
    library("torchvision")
    transformers = library("transformers")
    config = transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 2],
        layer_type=layer_type,
        num_labels=3,
    )
    torch.manual_seed(0)
    model = transformers.ResNetForImageClassification(config)
    ours = assert_trains_alike(model, torch.randn(2, 3, 64, 64), lambda y: y.logits, fuse=True)
    shortcuts = sum(n.endswith("shortcut.normalization") for n in dict(ours.named_modules()))
    assert fused_chains(ours, fused_calls) == len(norms(ours)) - shortcuts > 6
    ours.save_pretrained(tmp_path)
    again = transformers.ResNetForImageClassification.from_pretrained(tmp_path).double().eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(again(x).logits, ours.eval()(x).logits)
    kinds = [type(m) for m in model.modules()]
    assert [type(m) for m in revert_batchnorm(ours).modules()] == kinds


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("callbacks", ["plain", "weight averaging"])
def test_lightning(precision, callbacks, tmp_path, library):
    lightning = library("lightning")
    from lightning.pytorch.callbacks import StochasticWeightAveraging

    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(5)
            self.model = nn.Sequential(
                nn.Conv2d(3, 4, 3),
                batchnorm_ext.BatchNorm2d(4),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(144, 2),
            )

        def training_step(self, batch, index):
            return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05)

    generator = torch.Generator().manual_seed(3)
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    data = torch.utils.data.TensorDataset(
        torch.randn(16, 3, 8, 8, generator=generator).to(dtype), torch.arange(16) % 2
    )
    states = []
    for revert in (False, True):
        module = Classifier()
        if revert:
            revert_batchnorm(module)
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_epochs=3,
            precision=precision,
            callbacks=[StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1)]
            if callbacks == "weight averaging"
            else [],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=8))
        states.append({name: t.float() for name, t in module.state_dict().items()})
    loose = {"rtol": 0.1, "atol": 0.1} if "bf16" in precision else {"rtol": 1e-3, "atol": 1e-4}
    for name, actual in states[0].items():
        torch.testing.assert_close(actual, states[1][name], **loose)


def test_freezing_the_backbone_of_a_detector(library):
    """Fine-tuning keeps the statistics of pretraining, also where a trainer calls train() on everything."""
    models = library("torchvision.models")
    backbone = freeze_batchnorm(models.resnet18(), affine=True).train()
    before = {n: t.clone() for n, t in backbone.state_dict().items() if "running" in n}
    backbone(torch.randn(2, 3, 48, 48)).sum().backward()
    for name, values in before.items():
        torch.testing.assert_close(backbone.state_dict()[name], values, rtol=0, atol=0)
    assert all(m.weight.grad is None for m in norms(backbone))
