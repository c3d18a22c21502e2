"""Memory: which strides results have, what is kept for backward, and that inputs are only read."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from checks import assert_bitwise, call, differentiable, storages_saved
from inputs import (
    DENSE_LAYOUTS,
    LAYOUTS,
    STRIDED_LAYOUTS,
    Arguments,
    arguments,
    channels_last,
    contiguous,
    every,
)

from batchnorm_ext.functional import batch_norm

MODES = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])


@MODES
@pytest.mark.parametrize("layout", **every(DENSE_LAYOUTS))
@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 5), (4, 6, 5, 3), (2, 6, 3, 5, 4)], ids=str)
def test_dense_inputs_keep_their_strides(shape, layout, training, device):
    args = arguments(shape, device=device, layout=layout)
    y = call(args, training=training)
    (dx,) = torch.autograd.grad(y, [args.x], layout(args.dy))
    assert y.stride() == args.x.stride()
    assert dx.stride() == args.x.stride()


@MODES
@pytest.mark.parametrize("layout", **every(STRIDED_LAYOUTS))
@pytest.mark.parametrize("shape", [(4, 6, 5, 3), (2, 6, 3, 5, 4)], ids=str)
def test_strided_inputs_give_torchs_memory_format(shape, layout, training, device):
    args = arguments(shape, device=device, layout=layout)
    y = call(args, training=training)
    assert (
        y.stride() == call(args.clone(), torch.nn.functional.batch_norm, training=training).stride()
    )


@pytest.mark.parametrize("shape", [(4, 1, 9, 9), (4, 9, 1, 1), (1, 9, 4, 4)], ids=str)
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_ambiguous_strides_follow_the_input(shape, layout, device):
    """With one channel or one pixel both formats describe the same memory; the next layer reads the strides."""
    args = arguments(shape, device=device, layout=layout)
    y = call(args, training=True)
    assert y.stride() == args.x.stride()


def saved_bytes(args: Arguments, **options: object) -> int:
    """Bytes kept for backward beside the parameters."""
    return sum(storages_saved(lambda: call(args, **options), (args.weight, args.bias)).values())


def test_training_keeps_the_input_and_two_vectors(device):
    args = arguments((8, 16, 10, 10), device=device)
    assert saved_bytes(args, training=True) == args.x.numel() * 4 + 2 * 16 * 4


def test_half_training_keeps_the_half_input(device):
    args = arguments((8, 16, 10, 10), torch.float16, torch.float32, device=device)
    assert saved_bytes(args, training=True) == args.x.numel() * 2 + 2 * 16 * 4


@pytest.mark.parametrize("bias", [True, False], ids=["bias-trains", "frozen"])
def test_eval_without_a_weight_gradient_keeps_no_input(bias, device):
    args = arguments((8, 16, 10, 10), device=device)
    args.weight.requires_grad_(False)
    args.bias.requires_grad_(bias)
    assert saved_bytes(args, training=False) <= 2 * 16 * 4
    y = call(args, training=False)
    scale = args.weight / (args.running_var + 1e-5).sqrt()
    dx = torch.autograd.grad(y, [args.x], args.dy)[0]
    torch.testing.assert_close(dx, args.dy * scale.view(-1, 1, 1), rtol=1e-6, atol=0)


def test_only_a_bias_gradient_keeps_no_input(device):
    args = arguments((8, 16, 10, 10), device=device)
    args.x.requires_grad_(False)
    args.weight.requires_grad_(False)
    assert saved_bytes(args, training=True) <= 2 * 16 * 4


def test_buffers_rewritten_between_forward_and_backward(device):
    """A second forward, or a broadcast of buffers, between forward and backward is no in-place error."""
    args = arguments((4, 6, 5, 3), device=device)
    for training in (True, False):
        alone = args.clone()
        expected = torch.autograd.grad(
            call(alone, training=training), differentiable(alone), args.dy
        )
        trial = args.clone()
        y = call(trial, training=training)
        call(trial, training=True)
        trial.running_mean.fill_(7.0)
        trial.running_var.fill_(0.0)
        for actual, want in zip(
            torch.autograd.grad(y, differentiable(trial), args.dy), expected, strict=True
        ):
            assert_bitwise(actual, want)


@MODES
@pytest.mark.parametrize(
    "rewrite", [torch.relu_, lambda y: y.add_(1.5).mul_(2.0)], ids=["relu_", "add_"]
)
def test_output_may_be_rewritten(rewrite, training, device):
    """As the in-place activation after a batch norm does."""
    args = arguments((4, 6, 5, 3), torch.float64, device=device)
    results = []
    for function in (batch_norm, torch.nn.functional.batch_norm):
        trial = args.clone()
        y = rewrite(call(trial, function, training=training))
        results.append((y, torch.autograd.grad(y, differentiable(trial), args.dy)))
    torch.testing.assert_close(results[0], results[1])


@MODES
def test_saved_tensors_kept_elsewhere(training, device):
    args = arguments((4, 6, 5, 3), device=device)
    expected = args.clone()
    expected = torch.autograd.grad(
        call(expected, training=training), differentiable(expected), args.dy
    )
    with torch.autograd.graph.save_on_cpu():
        y = call(args, training=training)
    for actual, want in zip(
        torch.autograd.grad(y, differentiable(args), args.dy), expected, strict=True
    ):
        assert_bitwise(actual, want)


def test_rewriting_the_input_is_an_error(device):
    args = arguments((4, 6, 5, 3), device=device)
    x = args.x.detach().clone()
    y = batch_norm(x, None, None, args.weight, args.bias, training=True)
    x.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(args.dy)


def test_rewriting_the_weight_is_an_error(device):
    args = arguments((4, 6, 5, 3), device=device)
    y = call(args, training=False)
    with torch.no_grad():
        args.weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(args.dy)


@pytest.mark.native
def test_statistics_changed_by_a_hook_are_refused(device):
    """What a saved-tensor hook gives back is checked like any argument, before anything is computed from it."""
    args = arguments((4, 6, 5, 3), device=device)
    shorten = lambda t: t[..., :3].contiguous() if t.shape == (2, 6) else t  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, shorten):
        y = call(args, training=True)
    with pytest.raises(RuntimeError, match=r"statistics must be what forward returned.*\[2, 6\]"):
        y.backward(args.dy)


def test_backward_twice_needs_retain_graph(device):
    args = arguments((4, 6, 5, 3), device=device)
    y = call(args, training=True)
    first = torch.autograd.grad(y, differentiable(args), args.dy, retain_graph=True)
    second = torch.autograd.grad(y, differentiable(args), args.dy)
    for a, b in zip(first, second, strict=True):
        assert_bitwise(a, b)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, differentiable(args), args.dy)


@MODES
@pytest.mark.parametrize("layout", **every(LAYOUTS))
def test_inputs_are_only_read(layout, training, device):
    args = arguments((4, 6, 5, 3), device=device, layout=layout)
    args.dy = layout(args.dy)
    watched = {
        n: t for n, t in vars(args).items() if training is False or not n.startswith("running")
    }
    before = {n: (t.detach().clone(), t._version) for n, t in watched.items()}
    y = call(args, training=training)
    torch.autograd.grad(y, differentiable(args), args.dy)
    for name, tensor in watched.items():
        values, version = before[name]
        assert_bitwise(tensor.detach(), values, name)
        assert tensor._version == version, name


def test_running_statistics_written_in_training_bump_their_version(device):
    args = arguments((4, 6, 5, 3), device=device)
    versions = args.running_mean._version, args.running_var._version
    call(args, training=True)
    assert args.running_mean._version > versions[0]
    assert args.running_var._version > versions[1]


@MODES
def test_results_share_no_memory_with_inputs(training, device):
    args = arguments((2, 3, 2, 2), device=device)
    y = call(args, training=training)
    outputs = [y, *torch.autograd.grad(y, differentiable(args), args.dy)]
    pointers = {t.untyped_storage().data_ptr() for t in vars(args).values()}
    assert not pointers & {t.untyped_storage().data_ptr() for t in outputs}


def tensors_allocated(function: Callable[[], object], nbytes: int) -> int:
    """How many times the function asks for at least so many bytes."""
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    sizes = (event for event in profile.profiler.kineto_results.events() if event.nbytes() > 0)
    return sum(event.nbytes() >= nbytes for event in sizes)


@MODES
@pytest.mark.native
@pytest.mark.parametrize("layout", **every(LAYOUTS))
def test_strided_inputs_are_copied_once_and_the_copy_is_overwritten(layout, training):
    args = arguments((4, 6, 15, 13), layout=layout)
    nbytes = args.x.numel() * args.x.element_size()
    y = call(args, training=training)
    assert tensors_allocated(lambda: call(args, training=training), nbytes) == 1
    assert (
        tensors_allocated(
            lambda: torch.autograd.grad(y, differentiable(args), torch.ones_like(y)), nbytes
        )
        == 2
    )


@pytest.mark.gpu
def test_peak_memory_of_eval_forward():
    args = arguments((32, 64, 56, 56), device="cuda", requires_grad=False)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = call(args, training=False)
    assert torch.cuda.max_memory_allocated() - before <= y.numel() * 4 + (1 << 20)
