"""16-bit training: autocast, GradScaler, batches that overflow, and running statistics kept in float32."""

from __future__ import annotations

import copy

import pytest
import torch
from checks import assert_bitwise
from torch import nn

import batchnorm_ext
from batchnorm_ext import convert_batchnorm, revert_batchnorm

HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


def network(device: str = "cpu", **options: object) -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), batchnorm_ext.BatchNorm2d(4, **options), nn.ReLU(), nn.Conv2d(4, 2, 3)
    ).to(device)


def batch(device: str = "cpu", seed: int = 0) -> torch.Tensor:
    return torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).to(device)


def train(model: nn.Module, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """A few steps of automatic mixed precision; every parameter and buffer afterwards."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler(device)
    for step in range(3):
        optimizer.zero_grad()
        with torch.autocast(device, dtype=dtype):
            loss = model(batch(device, step)).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    return [t.detach().clone() for t in model.state_dict().values()]


@HALVES
def test_autocast_and_gradient_scaling_train_as_with_torchs_modules(dtype, device):
    ours = network(device)
    theirs = revert_batchnorm(copy.deepcopy(ours))
    for actual, expected in zip(
        train(ours, dtype, device), train(theirs, dtype, device), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=0.01, atol=0.01)


@HALVES
def test_batch_norm_keeps_its_input_dtype_under_autocast(dtype, device):
    """As torch's operator, which autocast neither widens nor narrows."""
    norm = batchnorm_ext.BatchNorm2d(3).to(device)
    theirs = revert_batchnorm(copy.deepcopy(norm))
    for x in (batch(device), batch(device).to(dtype)):
        with torch.autocast(device, dtype=dtype):
            assert norm(x).dtype == theirs(x).dtype == x.dtype


@pytest.mark.parametrize("skip", [True, False])
def test_overflowing_batch_under_a_gradient_scaler(skip, device):
    """The scaler skips the optimizer's step; skip_nonfinite lets batch norm forget the batch as well."""
    model = network(device, skip_nonfinite=skip)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(device)
    before = [t.detach().clone() for t in model.state_dict().values()]
    x = batch(device)
    x[0, 0, 0, 0] = torch.inf
    with torch.autocast(device, dtype=torch.bfloat16):
        loss = model(x).float().mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    norm = model[1]
    assert norm.num_batches_tracked.item() == 1
    assert bool(norm.running_mean.isfinite().all()) == skip
    assert bool(norm.running_var.isfinite().all()) == skip
    if skip:
        norm.num_batches_tracked.zero_()
        for actual, expected in zip(model.state_dict().values(), before, strict=True):
            assert_bitwise(actual, expected)


CONVERSIONS = {
    "half()": lambda module: module.half(),
    "bfloat16()": lambda module: module.bfloat16(),
    "to(dtype)": lambda module: module.to(torch.bfloat16),
    "to(device, dtype)": lambda module: module.to("cpu", torch.float16),
    "to(tensor)": lambda module: module.to(torch.empty(0, dtype=torch.bfloat16)),
    "double().half()": lambda module: module.double().half(),
}


@pytest.mark.parametrize("narrow", CONVERSIONS.values(), ids=CONVERSIONS.keys())
def test_running_statistics_stay_in_float32(narrow):
    model = network()
    model(batch())
    wide = copy.deepcopy(model)
    model = narrow(model)
    norm = model[1]
    assert norm.weight.dtype == norm.bias.dtype == model[0].weight.dtype != torch.float32
    assert norm.running_mean.dtype == norm.running_var.dtype == torch.float32
    assert_bitwise(norm.running_mean, wide[1].running_mean)
    assert_bitwise(norm.running_var, wide[1].running_var)
    assert norm.num_batches_tracked.dtype == torch.int64


def test_other_conversions_convert_everything():
    norm = batchnorm_ext.BatchNorm2d(3)
    assert norm.double().running_mean.dtype == torch.float64
    assert norm.half().float().running_mean.dtype == torch.float32
    assert norm.to("meta").running_mean.is_meta


@HALVES
def test_sixteen_bit_statistics_for_those_who_ask(dtype):
    for norm in (batchnorm_ext.BatchNorm2d(3, dtype=dtype), batchnorm_ext.BatchNorm2d(3)):
        norm.running_mean = norm.running_mean.to(dtype)
        norm.running_var = norm.running_var.to(dtype)
        norm = norm.to(dtype)
        assert norm.running_mean.dtype == norm.running_var.dtype == dtype
        norm(batch().to(dtype))
        assert norm.running_mean.dtype == dtype


@HALVES
def test_state_dict_of_a_half_model_goes_both_ways(dtype):
    ours = network().to(dtype)
    ours(batch().to(dtype))
    theirs = revert_batchnorm(network()).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    assert theirs[1].running_mean.dtype == dtype
    torch.testing.assert_close(theirs[1].running_mean, ours[1].running_mean.to(dtype))
    again = network().to(dtype)
    again.load_state_dict(theirs.state_dict())
    assert again[1].running_mean.dtype == torch.float32
    torch.testing.assert_close(again[1].running_mean, theirs[1].running_mean.float())
    x = batch().to(dtype)
    torch.testing.assert_close(again.eval()(x), theirs.eval()(x), rtol=0.02, atol=0.02)


@HALVES
def test_reverted_half_model_runs(dtype):
    """Torch's modules mix no dtypes among their vectors."""
    model = network().to(dtype)
    x = batch().to(dtype)
    expected = copy.deepcopy(model)(x)
    torch.testing.assert_close(revert_batchnorm(model)(x), expected, rtol=0.02, atol=0.02)
    model = convert_batchnorm(model)
    torch.testing.assert_close(model(x), expected, rtol=0.02, atol=0.02)


def test_statistics_do_not_stall_in_bfloat16():
    """With torch's bfloat16 statistics an average stops moving once its steps are below half a rounding."""
    norm = batchnorm_ext.BatchNorm1d(2, momentum=0.001).bfloat16()
    x = (torch.randn(64, 2) + 3).bfloat16()
    expected = 3 * (1 - (1 - 0.001) ** 2000)
    for _ in range(2000):
        norm(x)
    torch.testing.assert_close(norm.running_mean, torch.full((2,), expected), rtol=0.1, atol=0.0)


@HALVES
def test_gradients_of_half_parameters_beside_float_statistics(dtype, device):
    half = network(device).to(dtype)[1]
    wide = copy.deepcopy(half).float()
    x = torch.randn(6, 4, 5, 5, device=device).to(dtype)
    dy = torch.randn_like(x)
    half(x).backward(dy)
    wide(x.float()).backward(dy.float())
    rounding = torch.finfo(dtype).eps
    for ours, theirs in ((half.weight, wide.weight), (half.bias, wide.bias)):
        assert ours.grad.dtype == dtype
        torch.testing.assert_close(ours.grad.float(), theirs.grad, rtol=rounding, atol=rounding)
