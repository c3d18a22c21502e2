"""Ghost batch norm: batch norm of each part of the batch in turn, in one call."""

from __future__ import annotations

import copy

import pytest
import torch
from checks import assert_bitwise
from inputs import channels_last, contiguous, every, with_random_state
from torch import nn
from torch.utils.checkpoint import checkpoint

import batchnorm_ext

GHOST = {
    2: batchnorm_ext.GhostBatchNorm1d,
    3: batchnorm_ext.GhostBatchNorm1d,
    4: batchnorm_ext.GhostBatchNorm2d,
    5: batchnorm_ext.GhostBatchNorm3d,
}
PLAIN = {
    2: batchnorm_ext.BatchNorm1d,
    3: batchnorm_ext.BatchNorm1d,
    4: batchnorm_ext.BatchNorm2d,
    5: batchnorm_ext.BatchNorm3d,
}
SHAPES = {
    "vectors": (37, 5),
    "many-vectors": (300, 64),
    "sequences": (7, 6, 11),
    "images": (10, 5, 6, 7),
    "one-channel": (7, 1, 5, 5),
    "short-planes": (9, 20, 3, 3),
    "volumes": (5, 4, 3, 4, 2),
}
LAYOUTS = {
    "contiguous": contiguous,
    "channels-last": channels_last,
    # The batch is innermost in memory, or not dense at all.
    "batch-innermost": lambda x: (
        x.movedim(0, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 0)
    ),
    "strided": lambda x: x.repeat_interleave(2, 0)[::2],
}


def modules_for(shape, size, *, dtype=torch.float32, device="cpu", **options):
    """A ghost batch norm and a plain one, both with the same parameters and statistics, not the initial ones."""
    kind = GHOST[len(shape)]
    ghost = with_random_state(
        kind(shape[1], virtual_batch_size=size, device=device, dtype=dtype, **options)
    )
    plain = PLAIN[len(shape)](shape[1], device=device, dtype=dtype, **options)
    plain.load_state_dict(ghost.state_dict())
    return ghost, plain


def in_parts(plain, x, size, mask=None):
    """What ghost batch norm is, part by part."""
    parts = -(-x.size(0) // size)
    masks = [None] * parts if mask is None else mask.tensor_split(parts)
    outputs = [
        plain(part, mask=counted)
        for part, counted in zip(x.tensor_split(parts), masks, strict=True)
    ]
    return torch.cat(outputs)


def assert_same_state(ghost, plain):
    torch.testing.assert_close(ghost.state_dict(), plain.state_dict(), equal_nan=True)


@pytest.mark.parametrize("layout", **every(LAYOUTS))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [2, 4, 128])
@pytest.mark.parametrize("shape", **every(SHAPES))
def test_each_part_is_a_batch(shape, size, dtype, layout, device):
    size = max(size, 3) if len(shape) == 2 else size  # 37 vectors in pairs leave one alone
    parameters = torch.float32 if dtype == torch.bfloat16 else dtype
    ghost, plain = modules_for(shape, size, dtype=parameters, device=device)
    x = layout((torch.randn(shape, device=device) * 2 + 1).to(dtype)).requires_grad_()
    dy = torch.randn(shape, device=device).to(dtype)
    y, expected = ghost(x), in_parts(plain, x, size)
    assert y.dtype == dtype
    dx, *vectors = torch.autograd.grad(y, (x, ghost.weight, ghost.bias), dy)
    want_dx, *want_vectors = torch.autograd.grad(expected, (x, plain.weight, plain.bias), dy)
    # Alignment, and a copy in another order, let kernels add up in another order.
    torch.testing.assert_close((y, dx), (expected, want_dx))
    assert_same_state(ghost, plain)
    if layout in (contiguous, channels_last):
        strides = zip(y.stride(), x.stride(), shape, strict=True)
        assert all(one == other for one, other, extent in strides if extent > 1)
    for gradient, want in zip(vectors, want_vectors, strict=True):
        assert gradient.dtype == parameters
        torch.testing.assert_close(gradient, want)


def test_parts_are_as_few_and_as_equal_as_can_be(device):
    """Seven samples in threes: 3, 2 and 2, none of which is a single one."""
    ghost, _ = modules_for((7, 4), 3, device=device)
    x = torch.randn(7, 4, device=device)
    y = (ghost(x) - ghost.bias) / ghost.weight
    for part in y.split([3, 2, 2]):
        torch.testing.assert_close(part.mean(0), torch.zeros(4, device=device), rtol=0, atol=1e-4)
    assert ghost.num_batches_tracked.item() == 3


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_gradcheck(layout, affine, device):
    shape = (5, 3, 2, 2)
    ghost, _ = modules_for(shape, 2, dtype=torch.float64, device=device, affine=affine)
    x = layout(torch.randn(shape, dtype=torch.float64, device=device)).requires_grad_()

    def call(x, *_):
        return ghost(x)

    torch.autograd.gradcheck(call, (x, *ghost.parameters()))
    torch.autograd.gradgradcheck(call, (x, *ghost.parameters()))


@pytest.mark.parametrize("wanted", ["x", "weight", "bias"])
def test_single_gradients(wanted, device):
    shape = (6, 3, 4, 4)
    ghost, plain = modules_for(shape, 4, device=device)
    x = torch.randn(shape, device=device)
    dy = torch.randn(shape, device=device)
    results = []
    for module, call in ((ghost, ghost), (plain, lambda x: in_parts(plain, x, 4))):
        tensors = {"x": x.clone(), **dict(module.named_parameters())}
        for name, tensor in tensors.items():
            tensor.requires_grad_(name == wanted)
        results.append(torch.autograd.grad(call(tensors["x"]), tensors[wanted], dy)[0])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": None},
        {"skip_nonfinite": True},
        {"running_var_correction": 0},
        {"track_running_stats": False},
        {"affine": False},
    ],
    ids=str,
)
def test_options_of_batch_norm(options, device):
    shape = (9, 3, 4, 4)
    ghost, plain = modules_for(shape, 3, device=device, **options)
    for _ in range(2):
        x = torch.randn(shape, device=device)
        x[4, 1] = float("inf")
        torch.testing.assert_close(ghost(x), in_parts(plain, x, 3), equal_nan=True)
        assert_same_state(ghost, plain)


def test_evaluation_and_frozen_modules_know_no_parts(device):
    shape = (9, 3, 4, 4)
    ghost, plain = modules_for(shape, 2, device=device)
    x = torch.randn(shape, device=device)
    assert_bitwise(ghost.eval()(x), plain.eval()(x))
    before = copy.deepcopy(ghost.state_dict())
    assert_bitwise(ghost.freeze().train()(x), plain(x))
    for name, value in ghost.state_dict().items():
        assert_bitwise(value, before[name], name)
    untracked = GHOST[4](3, virtual_batch_size=2, track_running_stats=False, device=device).eval()
    assert_bitwise(untracked(x), PLAIN[4](3, track_running_stats=False, device=device).eval()(x))


def test_masks(device):
    shape = (8, 3, 5)
    ghost, plain = modules_for(shape, 3, device=device)
    x = torch.randn(shape, device=device, requires_grad=True)
    mask = torch.rand(8, 5, device=device) > 0.4
    y, expected = ghost(x, mask=mask), in_parts(plain, x, 3, mask)
    torch.testing.assert_close(y, expected)
    assert_same_state(ghost, plain)
    dy = torch.randn(shape, device=device)
    for actual, wanted in zip(
        *(torch.autograd.grad(one, x, dy) for one in (y, expected)), strict=True
    ):
        torch.testing.assert_close(actual, wanted)


def test_pooled_statistics_are_those_of_all_parts(device):
    shape = (9, 3, 4, 4)
    ghost, plain = modules_for(shape, 2, dtype=torch.float64, device=device)
    x = torch.randn(shape, dtype=torch.float64, device=device)
    for module in (ghost, plain):
        with batchnorm_ext.pooled_statistics(module):
            module(x)
    for actual, expected in zip(ghost.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(actual, expected)
    assert ghost.num_batches_tracked.item() == 1


def test_what_is_refused_changes_nothing():
    shape = (7, 3)
    ghost, _ = modules_for(shape, 2)
    before = copy.deepcopy(ghost.state_dict())
    one_left = torch.ones(7, 4, dtype=torch.bool)
    one_left[5:] = False
    one_left[6, 0] = True
    refused = {
        "a part of size": lambda: ghost(torch.randn(shape)),
        "got a part of size torch.Size": lambda: ghost(torch.randn(7, 3, 1)),
        "got 1 that the mask counts": lambda: ghost(torch.randn(7, 3, 4), mask=one_left),
        "elements not": lambda: ghost(torch.randn(8, 4)),
        "mask must have the shape": lambda: ghost(torch.randn(8, 3), mask=torch.ones(7).bool()),
        "expected 2D or 3D": lambda: ghost(torch.randn(8, 3, 4, 4)),
    }
    for message, call in refused.items():
        with pytest.raises((ValueError, RuntimeError), match=message):
            call()
    for name, value in ghost.state_dict().items():
        assert_bitwise(value, before[name], name)
    with pytest.raises(ValueError, match="virtual_batch_size must be at least 1, got 0"):
        batchnorm_ext.GhostBatchNorm2d(3, virtual_batch_size=0)


def test_a_part_of_one_value_is_normalised_as_in_evaluation(device):
    shape = (7, 3)
    ghost, plain = modules_for(shape, 2, device=device, on_single_value="running")
    x = torch.randn(shape, device=device)
    torch.testing.assert_close(ghost(x), in_parts(plain, x, 2))
    assert_same_state(ghost, plain)
    assert ghost.num_batches_tracked.item() == 3


def test_empty_batches_and_small_ones(device):
    ghost, plain = modules_for((2, 3, 4, 4), 2, device=device)
    for shape in ((0, 3, 4, 4), (5, 3, 0, 4), (1, 3, 4, 4), (2, 3, 4, 4)):
        x = torch.randn(shape, device=device)
        assert_bitwise(ghost(x), plain(x))
        assert_same_state(ghost, plain)


def test_parts_of_one_image_are_instance_norm(device):
    ghost = GHOST[4](3, virtual_batch_size=1, device=device)
    x = torch.randn(4, 3, 5, 5, device=device)
    torch.testing.assert_close(ghost(x), nn.functional.instance_norm(x))


@pytest.mark.native
def test_a_call_is_one_node_and_keeps_the_input_alone(device):
    ghost, _ = modules_for((9, 3, 4, 4), 2, device=device)
    x = torch.randn(9, 3, 4, 4, device=device, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = ghost(x)
    assert y.grad_fn.name() == "batchnorm_ext::BatchNormBackward"
    large = [tensor for tensor in kept if tensor.numel() >= x.numel()]
    assert [tensor.data_ptr() for tensor in large] == [x.data_ptr()]


def test_saved_tensors_may_come_back_in_another_memory_order(device):
    shape = (6, 3, 4, 5)
    ghost, plain = modules_for(shape, 4, device=device)
    x = torch.randn(shape, device=device, requires_grad=True)
    turn = LAYOUTS["batch-innermost"]
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: t, lambda t: turn(t) if t.dim() == 4 else t
    ):
        y = ghost(x)
    dy = torch.randn(shape, device=device)
    gradient = torch.autograd.grad(y, x, dy)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(in_parts(plain, x, 4), x, dy)[0])


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_updates_statistics_once(reentrant, device):
    shape = (9, 3, 4, 4)
    ghost, plain = modules_for(shape, 2, device=device)
    x = torch.randn(shape, device=device, requires_grad=True)
    checkpoint(ghost, x, use_reentrant=reentrant).exp().sum().backward()
    expected = torch.autograd.grad(in_parts(plain, x, 2).exp().sum(), x)[0]
    torch.testing.assert_close(x.grad, expected)
    assert_same_state(ghost, plain)


def test_compiles_without_a_graph_break(device):
    shape = (9, 3, 4, 4)
    ghost, plain = modules_for(shape, 2, device=device)
    compiled = torch.compile(ghost, fullgraph=True, backend="aot_eager")
    for training in (True, False):
        ghost.train(training)
        plain.train(training)
        x = torch.randn(shape, device=device, requires_grad=True)
        expected = in_parts(plain, x, 2)
        y = compiled(x)
        torch.testing.assert_close(y, expected)
        for actual, wanted in zip(
            *(torch.autograd.grad(one.exp().sum(), x) for one in (y, expected)), strict=True
        ):
            torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)
    for actual, wanted in zip(ghost.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(actual, wanted)


def test_compiled_autograd():
    shape = (9, 3, 4, 4)
    ghost, _ = modules_for(shape, 2)
    x = torch.randn(shape, requires_grad=True)
    expected = torch.autograd.grad(ghost(x).exp().sum(), (x, *ghost.parameters()))
    loss = ghost(x).exp().sum()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        loss.backward()
    for actual, wanted in zip((x, *ghost.parameters()), expected, strict=True):
        torch.testing.assert_close(actual.grad, wanted)


def test_transforms_see_the_parts_too(device):
    shape = (6, 3, 4, 4)
    ghost, plain = modules_for(shape, 4, device=device, track_running_stats=False)
    x, tangent = torch.randn(2, *shape, device=device)
    for actual, expected in zip(
        torch.func.jvp(ghost, (x,), (tangent,)),
        torch.func.jvp(lambda x: in_parts(plain, x, 4), (x,), (tangent,)),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected)


def test_it_is_a_batch_norm_and_says_what_else():
    module = batchnorm_ext.GhostBatchNorm2d(3, momentum=0.01, virtual_batch_size=32)
    assert isinstance(module, nn.BatchNorm2d)
    assert list(module.state_dict()) == list(nn.BatchNorm2d(3).state_dict())
    assert repr(module).endswith("virtual_batch_size=32)")
    traced = torch.fx.symbolic_trace(nn.Sequential(module))
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "output"]
