"""Refused calls: torch's type and text where torch refuses too, else one that names the argument; no buffer changes."""

from __future__ import annotations

import math
import re

import pytest
import torch
from checks import assert_bitwise
from inputs import DTYPES
from torch import nn

import batchnorm_ext
from batchnorm_ext.functional import batch_norm, batch_norm_act

OURS = {1: batchnorm_ext.BatchNorm1d, 2: batchnorm_ext.BatchNorm2d, 3: batchnorm_ext.BatchNorm3d}
TORCHS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def error_of(function, *args, **kwargs):
    """The exception the call raises; a call that is served fails the test."""
    try:
        function(*args, **kwargs)
    except Exception as error:
        return error
    return pytest.fail("the call was served")


def call_with(function, shape=(4, 3, 5), *, dtype=torch.float32, device="cpu", **changes):
    """Call ``function`` with good arguments but for ``changes``; return the error and the statistics afterwards."""
    arguments = {
        "input": torch.randn(shape, device=device).to(dtype),
        "running_mean": torch.full((3,), 0.25, device=device, dtype=dtype),
        "running_var": torch.full((3,), 1.5, device=device, dtype=dtype),
        "weight": torch.ones(3, device=device, dtype=dtype),
        "bias": torch.zeros(3, device=device, dtype=dtype),
        "training": True,
    } | changes
    before = {
        n: arguments[n].clone()
        for n in ("running_mean", "running_var")
        if isinstance(arguments[n], torch.Tensor)
    }
    error = error_of(function, **arguments)
    for name, values in before.items():
        assert_bitwise(arguments[name], values, name)
    return error


AS_IN_TORCH = {
    "running_mean-too-long": {"running_mean": torch.zeros(4)},
    "running_mean-too-short": {"running_mean": torch.zeros(2)},
    "running_var-too-long": {"running_var": torch.ones(4)},
    "running_var-too-short": {"running_var": torch.ones(2)},
    "weight-too-long": {"weight": torch.ones(4)},
    "weight-too-short": {"weight": torch.ones(2)},
    "bias-too-long": {"bias": torch.ones(4)},
    "bias-too-short": {"bias": torch.ones(2)},
    "empty-weight": {"weight": torch.ones(0)},
    "eval-running_mean-too-long": {"running_mean": torch.zeros(4), "training": False},
    "eval-running_var-too-short": {"running_var": torch.ones(2), "training": False},
    "eval-weight-too-long": {"weight": torch.ones(4), "training": False},
    "only-running_var": {"running_mean": None},
    "only-running_mean": {"running_var": None},
    "eval-without-running_mean": {"running_mean": None, "training": False},
    "eval-without-running_var": {"running_var": None, "training": False},
    "eval-without-either": {"running_mean": None, "running_var": None, "training": False},
    "eps-zero": {"eps": 0.0},
    "eps-negative": {"eps": -1.0},
    "eval-eps-negative": {"eps": -1e-5, "training": False},
    "one-value-per-channel": {"shape": (1, 3)},
    "one-value-per-channel-image": {"shape": (1, 3, 1, 1)},
    "no-channel-dimension": {"shape": (3,)},
    "eval-no-channel-dimension": {"shape": (3,), "training": False},
    "eval-no-dimension": {"shape": (), "training": False},
    "integers": {"dtype": torch.int32},
    "booleans": {"dtype": torch.bool},
    "complex": {"dtype": torch.complex64},
    "momentum-None": {"momentum": None},
    "momentum-text": {"momentum": "0.1"},
    "training-a-number": {"training": 1},
    "training-None": {"training": None},
    "running_mean-requires-grad": {"running_mean": torch.zeros(3, requires_grad=True)},
    "running_var-requires-grad": {"running_var": torch.ones(3, requires_grad=True)},
}


@pytest.mark.parametrize("changes", list(AS_IN_TORCH.values()), ids=list(AS_IN_TORCH))
def test_as_in_torch(changes, device):
    changes = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in changes.items()}
    for name in ("running_mean", "running_var"):
        if name in changes and changes[name] is not None and changes[name].is_leaf is False:
            changes[name] = changes[name].detach().requires_grad_()
    expected = call_with(nn.functional.batch_norm, device=device, **changes)
    actual = call_with(batch_norm, device=device, **changes)
    assert type(actual) is type(expected)
    assert str(actual) == str(expected)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("input", [None, [1.0, 2.0], 3.0], ids=str)
def test_inputs_that_are_no_tensors(input, training, device):
    statistics = torch.zeros(3, device=device), torch.ones(3, device=device)
    expected, actual = (
        error_of(function, input, *statistics, training=training)
        for function in (nn.functional.batch_norm, batch_norm)
    )
    assert type(actual) is type(expected)
    assert str(actual) == str(expected)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_eps_that_is_no_number_is_none_to_torch_either(training, device):
    statistics = torch.zeros(3, device=device), torch.ones(3, device=device)
    assert (
        batch_norm(
            torch.randn(4, 3, device=device), *statistics, None, None, training, 0.1, math.nan
        )
        .isnan()
        .all()
    )


def test_zero_eps_in_eval_follows_the_installed_torch(device):
    x = torch.randn(4, 3, device=device)
    arguments = (x, torch.zeros(3, device=device), torch.ones(3, device=device))
    try:
        expected = nn.functional.batch_norm(*arguments, eps=0.0)
    except ValueError as refused:
        with pytest.raises(ValueError, match=re.escape(str(refused))):
            batch_norm(*arguments, eps=0.0)
    else:
        torch.testing.assert_close(batch_norm(*arguments, eps=0.0), expected)


WIDER = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
@pytest.mark.parametrize("other", [*DTYPES, torch.int32], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixed_dtypes(dtype, other, name, training, device):
    """Vectors share the input's dtype or the one sums are kept in; anything else is refused, by name."""
    if other in (dtype, WIDER.get(dtype)):
        pytest.skip("a pair that is served")
    error = call_with(
        batch_norm,
        dtype=dtype,
        device=device,
        training=training,
        **{name: torch.ones(3, dtype=other, device=device)},
    )
    assert type(error) is RuntimeError
    assert "dtype" in str(error)
    assert name in str(error)


def test_vector_of_another_rank_is_refused(device):
    for name in ("weight", "bias", "running_mean", "running_var"):
        error = call_with(batch_norm, device=device, **{name: torch.ones(3, 1, device=device)})
        assert type(error) is RuntimeError
        assert str(error) == f"{name} must have shape [3] (channels of input), got [3, 1]"


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_expanded_buffers_are_refused_where_they_would_be_updated(name, device):
    """Torch's operator leaves the last channel's statistics in all of them."""
    expanded = torch.full((1,), 0.5, device=device).expand(3)
    error = call_with(batch_norm, device=device, **{name: expanded})
    assert type(error) is RuntimeError
    assert str(error).startswith(f"{name} is updated, and so must have memory for each")
    x = torch.randn(4, 3, 5, device=device)
    arguments = (torch.zeros(3, device=device), torch.full((3,), 0.5, device=device))
    expected = batch_norm(x, *arguments)
    assert_bitwise(batch_norm(x, arguments[0], expanded[:1].expand(3)), expected)
    one_channel = batch_norm(x[:, :1], *(a[:1].expand(1) for a in arguments), training=True)
    assert one_channel.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
def test_vectors_on_another_device(name):
    for device, other in (("cuda", "cpu"), ("cpu", "cuda")):
        error = call_with(batch_norm, device=device, **{name: torch.ones(3, device=other)})
        assert isinstance(error, RuntimeError)
        assert name in str(error)
        assert other in str(error)


def module_error(module, x):
    """The exception of a module's call, which must leave its state as it was."""
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    error = error_of(module, x)
    for name, tensor in module.state_dict().items():
        assert_bitwise(tensor, state[name], name)
    return error


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((3,), {}),
        ((2, 3), {}),
        ((2, 3, 4), {}),
        ((2, 3, 4, 4), {}),
        ((2, 3, 4, 4, 4), {}),
        ((2, 3, 2, 2, 2, 2), {}),
        ((1, 3), {}),
        ((1, 3, 1), {}),
        ((1, 3, 1, 1), {}),
        ((1, 3, 1, 1, 1), {}),
        ((2, 4), {}),
        ((2, 4, 4, 4), {}),
        ((2, 2, 4, 4, 4), {}),
        ((2, 4), {"affine": False, "track_running_stats": False, "num_features": 4, "eps": -1.0}),
        ((2, 3, 4, 4), {"eps": -1.0}),
        ((2, 3, 4, 4, 4), {"eps": 0.0}),
        ((2, 4, 4, 4), {"affine": False}),
        ((2, 4, 4, 4), {"track_running_stats": False}),
    ],
    ids=str,
)
def test_modules_refuse_what_torch_refuses_and_stay_unchanged(rank, shape, options, device):
    options = {"num_features": 3} | options
    x = torch.randn(shape, device=device)
    for training in (True, False):
        theirs = TORCHS[rank](**options, device=device).train(training)
        ours = OURS[rank](**options, device=device).train(training)
        try:
            served = theirs(x)
        except Exception as refused:
            expected = refused
        else:
            torch.testing.assert_close(ours(x), served)
            continue
        error = module_error(ours, x)
        assert type(error) is type(expected)
        assert str(error) == str(expected)


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"skip_nonfinite": True}], ids=str)
def test_running_statistics_that_require_gradients(name, options, device):
    module = OURS[1](3, device=device, **options)
    getattr(module, name).requires_grad_()
    error = module_error(module, torch.randn(4, 3, device=device))
    assert type(error) is RuntimeError
    assert f"not differentiable with respect to argument '{name}'" in str(error)


def test_one_sample_of_no_channels(device):
    x = torch.empty(1, 0, device=device)
    errors = [
        error_of(function, x, None, None, training=True)
        for function in (batch_norm, nn.functional.batch_norm)
    ]
    assert type(errors[0]) is type(errors[1]) is ValueError
    assert str(errors[0]) == str(errors[1])


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_modules_of_another_dtype_than_the_input(rank, device):
    module = OURS[rank](3, device=device)
    shape = (2, 3, 4, 4, 4)[: rank + 2]
    error = module_error(module, torch.randn(shape, dtype=torch.float64, device=device))
    assert type(error) is RuntimeError
    assert "mixed dtype" in str(error)


@pytest.mark.parametrize(
    "options", [{"num_features": -1}, {}, {"num_features": 3, "nonsense": True}], ids=str
)
def test_constructors_refuse_what_torch_refuses(options):
    for rank in (1, 2, 3):
        errors = [error_of(family[rank], **options) for family in (OURS, TORCHS)]
        assert type(errors[0]) is type(errors[1])
    if "num_features" in options and "nonsense" not in options:
        assert str(errors[0]) == str(errors[1])


@pytest.mark.parametrize(
    "option", [{"running_var_correction": 2}, {"on_single_value": "skip"}], ids=str
)
def test_unknown_options_are_refused(option):
    (name,) = option
    for kind in (batchnorm_ext.BatchNorm2d, batchnorm_ext.SyncBatchNorm):
        with pytest.raises(ValueError, match=name):
            kind(3, **option)


def test_skip_nonfinite_is_keyword_only():
    with pytest.raises(TypeError):
        batchnorm_ext.BatchNorm2d(3, 1e-5, 0.1, True, True, None, None, True, True)


@pytest.mark.native
def test_backend_checks_without_the_python_layer():
    """Called directly, the native module refuses the same calls; nothing is read past a vector's end."""
    from batchnorm_ext._extension import backend

    x = torch.randn(4, 3, 5)
    good = dict.fromkeys(("weight", "bias", "running_mean", "running_var"), torch.ones(3))
    for name in good:
        vectors = {**good, name: torch.ones(2)}
        with pytest.raises(RuntimeError, match=f"{name} should contain 3 elements not 2"):
            backend().forward(x, *vectors.values(), None, True, 0.1, 1e-5, False, 1)
    for counter in (torch.zeros((), dtype=torch.int32), torch.zeros(2, dtype=torch.int64)):
        with pytest.raises(RuntimeError, match="num_batches_tracked"):
            backend().forward(x, *good.values(), counter, True, 0.1, 1e-5, False, 1)
    mean = inv_std = torch.ones(3)
    for wrong in (torch.randn(4, 3, 4), torch.randn(4, 2, 5), torch.randn(60)):
        with pytest.raises(RuntimeError):
            backend().backward(wrong, x, None, mean, inv_std, True, True, None, None)
    for wrong in (torch.ones(2), torch.ones(3, dtype=torch.float64)):
        with pytest.raises(RuntimeError):
            backend().backward(x, x, None, wrong, inv_std, True, True, None, None)
        with pytest.raises(RuntimeError):
            backend().backward(x, x, None, mean, wrong, True, True, None, None)
    with pytest.raises(RuntimeError):
        backend().backward(x, None, None, mean, inv_std, True, True, None, None)


@pytest.mark.native
def test_backend_checks_of_fused_calls_without_the_python_layer():
    """Nothing is read past the end of a residual, a mask or a vector."""
    from batchnorm_ext._extension import backend

    x = torch.randn(4, 3, 5)
    vector = torch.ones(3)
    statistics = (vector, vector, vector.clone(), vector.clone(), None)
    rest = (True, 0.1, 1e-5, False, 1)
    for residual in (x[:2], x.double(), x.transpose(1, 2)):
        with pytest.raises(RuntimeError, match="residual must have the"):
            backend().forward_act(x, residual, *statistics, *rest, "relu", 0.0, True)
    with pytest.raises(ValueError, match="got 'gelu'"):
        backend().forward_act(x, None, *statistics, *rest, "gelu", 0.0, False)
    _, mean, inv_std, shift, mask = backend().forward_act(
        x, x, *statistics, *rest, "relu", 0.0, True
    )
    good = {
        "input": x,
        "residual": None,
        "weight": vector,
        "mean": mean,
        "inv_std": inv_std,
        "shift": shift,
        "mask": mask,
        "strides": x.stride(),
    }
    bad = [
        {"mask": mask[:-1]},
        {"mask": mask.float()},
        {"mask": None, "input": None},
        {"mask": None, "residual": x[:2]},
        {"shift": shift[:2]},
        {"shift": shift.double()},
        {"input": None, "strides": (1,)},
        {"input": x[:2]},
    ]
    for changes in bad:
        training = "strides" not in changes
        with pytest.raises(RuntimeError):
            backend().backward_act(
                x, *(good | changes).values(), training, True, True, None, None, "relu", 0.0
            )
    with pytest.raises(RuntimeError, match="mask"):
        backend().backward_act(x, *good.values(), True, True, True, None, None, "silu", 0.0)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"activation": nn.ReLU()}, ValueError),
        ({"activation": None}, ValueError),
        ({"negative_slope": "0.1"}, TypeError),
        ({"residual": 1.0}, TypeError),
    ],
    ids=str,
)
def test_fused_arguments_of_another_type_are_named(changes, kind, device):
    error = call_with(batch_norm_act, device=device, **changes)
    assert type(error) is kind
    assert str(error).startswith(next(iter(changes)))
