"""What only a GPU has: streams, graphs, several devices, cuDNN beside us, no synchronisation, tensors beyond 2^31."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from checks import assert_bitwise, call, check_call, differentiable, no_synchronisation
from inputs import LAYOUTS, arguments, channels_last, contiguous, every
from torch import nn

import batchnorm_ext
from batchnorm_ext.functional import batch_norm

pytestmark = pytest.mark.gpu
TWO_LAYOUTS = pytest.mark.parametrize("layout", [contiguous, channels_last])
DTYPE_PAIRS = {
    "f32": (torch.float32, torch.float32),
    "f16-mixed": (torch.float16, torch.float32),
    "bf16-mixed": (torch.bfloat16, torch.float32),
}
# Batch norms of ResNet-50 and what leaves their sizes: one block, many blocks, few channels, many channels.
SHAPES = {
    "stem": (16, 64, 112, 112),
    "first-stage": (16, 256, 56, 56),
    "last-stage": (32, 2048, 7, 7),
    "one-channel": (64, 1, 256, 256),
    "three-channels-odd": (7, 3, 333, 257),
    "vectors": (4096, 1024),
    "more-features-than-rows": (3, 40000),
    "many-tiny-channels": (2, 70000, 1, 3),
    "million-rows": (880801, 1, 1, 1),
}
# What holds a channel of each on an H200, contiguous: one block, a cluster, groups across the grid, once and in turn,
# all blocks in part, or none. Elsewhere others may; the results are the same.
HELD_BY = {
    "block": (8, 32, 9, 9),
    "cluster": (32, 64, 56, 56),
    "grid": (32, 3, 224, 224),
    "grid-in-turn": (64, 64, 112, 112),
    "grid-odd": (33, 5, 201, 203),
    "residue": (9, 1, 4096, 2048),
    "streaming": (24, 1, 4096, 2048),
}
# Of tests with more elements, several at once would need more memory than there is.
LARGE_ELEMENTS = 2**26
BY_HOLDER = pytest.mark.parametrize(
    "shape",
    [
        pytest.param(
            shape, id=name, marks=[pytest.mark.large] if math.prod(shape) > LARGE_ELEMENTS else []
        )
        for name, shape in HELD_BY.items()
    ],
)
# Tensors in float64, of the input's size, that a comparison with float64 holds at once.
WIDE_TENSORS = 14


@pytest.fixture(autouse=True)
def _large_tests_take_turns(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Those of all processes of pytest-xdist, whose groups do not outlive the loss of a process."""
    if request.node.get_closest_marker("large") is None:
        yield
        return
    import fcntl  # not on Windows

    with (tmp_path_factory.getbasetemp().parent / "large.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        torch.cuda.empty_cache()


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@TWO_LAYOUTS
@pytest.mark.parametrize("dtypes", **every(DTYPE_PAIRS))
@pytest.mark.parametrize("shape", **every(SHAPES))
def test_large_shapes_against_float64_on_the_device(shape, dtypes, layout, training):
    """The oracle's formulas in float64 by torch, where extended precision on the CPU would take minutes."""
    needed = WIDE_TENSORS * 8 * math.prod(shape) / 2**30
    if not enough_memory(needed):
        pytest.skip(f"needs {needed:.0f} GiB of free GPU memory")
    args = arguments(shape, *dtypes, device="cuda", layout=layout)
    wide = args.clone()
    for name, tensor in vars(args).items():
        setattr(wide, name, tensor.detach().double().requires_grad_(tensor.requires_grad))
    sizes = sizes_of_terms(wide, training)
    results = []
    for inputs, function in ((args, batch_norm), (wide, nn.functional.batch_norm)):
        with torch.backends.cudnn.flags(enabled=False):  # which has limits of its own
            y = call(inputs, function, training=training)
            gradients = torch.autograd.grad(y, differentiable(inputs), inputs.dy)
        results.append((y, *gradients, inputs.running_mean, inputs.running_var))
    assert_within(8, sizes, *results, dtypes[0])


def assert_within(roundings, sizes, actual, expected, dtype):
    """Each result within so many roundings of terms of these sizes."""
    for (name, size), one, other in zip(sizes.items(), actual, expected, strict=True):
        unit = torch.finfo(dtype if name in ("y", "dx") else torch.float32).eps
        error = (one.double() - other.double()).detach().abs()
        worst = float((error / (roundings * unit * size)).max())
        assert worst <= 1, f"{name}: {worst:.3g} times the error allowed"


def sizes_of_terms(args, training):
    """How large what is added up to each result is: roundings are relative to that."""
    x, dy = args.x.detach(), args.dy
    dims = [d for d in range(x.dim()) if d != 1]
    per_channel = [-1 if d == 1 else 1 for d in range(x.dim())]

    def spread(vector):
        return vector.detach().view(per_channel)

    mean = x.mean(dims) if training else args.running_mean.clone()
    var = x.var(dims, correction=0) if training else args.running_var.clone()
    inv_std = (var + 1e-5).rsqrt()
    xhat = (x - spread(mean)) * spread(inv_std)
    # A mean that is rounded moves all of a channel's deviations alike.
    shift = 1 + (mean * inv_std).abs()
    sum_dy = dy.sum(dims).abs()
    scale = spread((args.weight * inv_std).abs())
    return {
        "y": spread(args.weight.abs()) * (1 + xhat.abs()) + spread(args.bias.abs()),
        "dx": scale * (dy.abs() + xhat.abs() + spread(shift)),
        "dweight": (dy * xhat).square().sum(dims).sqrt() + sum_dy * shift,
        "dbias": dy.square().sum(dims).sqrt() + sum_dy,
        "running_mean": args.running_mean.abs() + mean.abs() + var.sqrt(),
        "running_var": args.running_var + var,
    }


@pytest.mark.parametrize("cudnn", [True, False], ids=["cudnn-on", "cudnn-off"])
@TWO_LAYOUTS
@pytest.mark.parametrize("dtypes", **every(DTYPE_PAIRS))
def test_parity_with_torch_whatever_cudnn_does(dtypes, layout, cudnn):
    args = arguments((8, 32, 28, 28), *dtypes, device="cuda", layout=layout)
    other = args.clone()
    other.x = layout(args.x.detach()).requires_grad_()
    results = []
    with torch.backends.cudnn.flags(enabled=cudnn):
        for inputs, function in ((args, batch_norm), (other, nn.functional.batch_norm)):
            y = call(inputs, function, training=True)
            results.append(
                (
                    y,
                    *torch.autograd.grad(y, differentiable(inputs), args.dy),
                    inputs.running_mean,
                    inputs.running_var,
                )
            )
    wide = args.clone()
    for name, tensor in vars(wide).items():
        setattr(wide, name, tensor.detach().double())
    assert_within(32, sizes_of_terms(wide, training=True), *results, dtypes[0])


@TWO_LAYOUTS
@pytest.mark.parametrize("dtypes", **every(DTYPE_PAIRS))
@BY_HOLDER
def test_whatever_holds_a_channel(shape, dtypes, layout):
    """The same results as in float64, and to the bit those of the same call repeated."""
    test_large_shapes_against_float64_on_the_device(shape, dtypes, layout, training=True)
    args = arguments(shape, *dtypes, device="cuda", layout=layout)
    runs = [training_call(args, layout) for _ in range(4)]
    for again in runs[1:]:
        assert_all_bitwise(again, runs[0])


def training_call(args, layout, training=True):
    """Everything a training step computes, from fresh buffers."""
    trial = args.clone()
    trial.x = layout(args.x.detach()).requires_grad_()
    y = call(trial, training=training)
    gradients = torch.autograd.grad(y, differentiable(trial), args.dy)
    return (y, *gradients, trial.running_mean, trial.running_var)


def assert_all_bitwise(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        assert_bitwise(one, other)


@BY_HOLDER
def test_launches_of_a_call(shape):
    """One each way where channels, or enough of them, are held on the chip by however many blocks; else three."""
    module = batchnorm_ext.BatchNorm2d(shape[1], device="cuda", dtype=torch.float32)
    x = torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn_like(x)
    torch.autograd.grad(module(x), [x, *module.parameters()], dy)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        torch.autograd.grad(module(x), [x, *module.parameters()], dy)
        torch.cuda.synchronize()
    names = [e.name for e in profile.events() if e.device_type == torch.profiler.DeviceType.CUDA]
    resident = [name for name in names if "resident" in name]
    assert len(names) == (2 if resident else 6), names
    if torch.cuda.get_device_capability() == (9, 0):
        assert bool(resident) == (shape != HELD_BY["streaming"]), names


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("layout", **every(LAYOUTS))
def test_repeatable_to_the_bit(layout, training):
    args = arguments((16, 96, 28, 28), device="cuda", layout=layout)
    runs = [training_call(args, layout, training) for _ in range(5)]
    for again in runs[1:]:
        assert_all_bitwise(again, runs[0])


TRAINING_STEP = """
import sys, torch, batchnorm_ext
torch.manual_seed(0)
module = batchnorm_ext.BatchNorm2d(6, device="cuda")
x = torch.randn(4, 6, 33, 7, device="cuda", requires_grad=True)
y = module(x)
gradients = torch.autograd.grad(y, [x, *module.parameters()], torch.randn_like(y))
torch.save([y, *gradients, *module.buffers()], sys.argv[1])
"""


@pytest.mark.timeout(120)  # of two processes, which start
def test_launch_blocking(tmp_path):
    """CUDA_LAUNCH_BLOCKING changes when the host goes on, not what is computed."""
    results = []
    for blocking in ("0", "1"):
        path = tmp_path / blocking
        subprocess.run(
            [sys.executable, "-c", TRAINING_STEP, str(path)],
            env=os.environ | {"CUDA_LAUNCH_BLOCKING": blocking},
            check=True,
            timeout=300,
        )
        results.append(torch.load(path))
    for free, blocked in zip(*results, strict=True):
        assert_bitwise(blocked, free)


def test_deterministic_mode_is_served():
    args = arguments((4, 6, 5, 5), device="cuda")
    torch.use_deterministic_algorithms(True)
    try:
        check_call(args)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("momentum", [0.1, None])
@TWO_LAYOUTS
def test_a_training_step_never_waits_for_the_device(layout, momentum):
    """Nor does the cumulative average, whose momentum comes from the batch counter on the device."""
    module = batchnorm_ext.BatchNorm2d(6, momentum=momentum, skip_nonfinite=True, device="cuda")
    x = layout(torch.randn(4, 6, 5, 5, device="cuda")).requires_grad_()
    dy = torch.randn_like(x)
    module(x).backward(dy)
    with no_synchronisation():
        module(x).backward(dy)
        module.eval()(x).backward(dy)
    assert module.num_batches_tracked.item() == 2


@pytest.mark.parametrize("momentum", [0.1, None])
def test_one_kernel_launch_serves_the_batch_counter_too(momentum):
    """No second kernel for num_batches_tracked, nor for the average that depends on it."""
    module = batchnorm_ext.BatchNorm2d(6, momentum=momentum, device="cuda")
    x = torch.randn(4, 6, 5, 5, device="cuda")
    module(x)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        module(x)
        torch.cuda.synchronize()
    kernels = [e.name for e in profile.events() if e.device_type == torch.profiler.DeviceType.CUDA]
    assert len(kernels) == 1, kernels
    assert "batchnorm_ext" in kernels[0]


@pytest.mark.parametrize("momentum", [0.1, None])
@TWO_LAYOUTS
@BY_HOLDER
def test_graph_capture_and_replay(shape, layout, momentum):
    """Captured once, replayed on new data: each replay is a training step with its own statistics and gradients."""
    module = batchnorm_ext.BatchNorm2d(shape[1], momentum=momentum, device="cuda")
    eager = batchnorm_ext.BatchNorm2d(shape[1], momentum=momentum, device="cuda")
    x = layout(torch.randn(shape, device="cuda")).requires_grad_()
    dy = torch.randn_like(x)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            torch.autograd.grad(module(x), [x, *module.parameters()], dy)
    torch.cuda.current_stream().wait_stream(side)
    module.reset_running_stats()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = module(x)
        gradients = torch.autograd.grad(y, [x, *module.parameters()], dy)
    module.reset_running_stats()
    for step in range(1, 4):
        with torch.no_grad():
            x.copy_(torch.randn_like(x) * step + step)
            dy.copy_(torch.randn_like(dy))
        graph.replay()
        expected = eager(x)
        assert_bitwise(y, expected)
        for actual, want in zip(
            gradients, torch.autograd.grad(expected, [x, *eager.parameters()], dy), strict=True
        ):
            assert_bitwise(actual, want)
        for (name, actual), want in zip(module.named_buffers(), eager.buffers(), strict=True):
            assert_bitwise(actual, want, name)
        assert module.num_batches_tracked.item() == step


def test_make_graphed_callables():
    module = nn.Sequential(nn.Conv2d(3, 8, 3), batchnorm_ext.BatchNorm2d(8), nn.ReLU()).cuda()
    x = torch.randn(4, 3, 8, 8, device="cuda", requires_grad=True)
    expected_module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).cuda()
    expected_module.load_state_dict(module.state_dict())
    graphed = torch.cuda.make_graphed_callables(module, (x,))
    y = graphed(x)
    y.sum().backward()
    torch.testing.assert_close(y, expected_module(x), rtol=1e-4, atol=1e-5)


@TWO_LAYOUTS
@BY_HOLDER
def test_side_streams(shape, layout):
    """Work goes to the current stream: two streams run interleaved chains without touching each other's memory."""
    data = [arguments(shape, device="cuda", layout=layout) for _ in range(2)]
    expected = [training_call(args, layout) for args in data]
    streams = [torch.cuda.Stream() for _ in data]
    for _ in range(5):
        torch.cuda.synchronize()
        outputs = []
        for args, stream in zip(data, streams, strict=True):
            with torch.cuda.stream(stream):
                outputs.append(training_call(args, layout))
        torch.cuda.synchronize()
        for got, want in zip(outputs, expected, strict=True):
            assert_all_bitwise(got, want)


@BY_HOLDER
def test_graphs_on_several_streams(shape):
    """Graphs captured on one stream, replayed at once on others: what their blocks meet by is each launch's own."""
    data = [arguments(shape, device="cuda") for _ in range(2)]
    expected = [training_call(args, contiguous) for args in data]
    captures = []
    for args in data:
        graph = torch.cuda.CUDAGraph()
        trial = args.clone()
        with torch.cuda.graph(graph):
            y = call(trial, training=True)
            captured = (y, *torch.autograd.grad(y, differentiable(trial), args.dy))
        captures.append((graph, captured, trial))  # whose statistics each replay writes
    streams = [torch.cuda.Stream() for _ in data]
    for _ in range(5):
        torch.cuda.synchronize()
        for (graph, *_), stream in zip(captures, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        for (_, got, _), want in zip(captures, expected, strict=True):
            assert_all_bitwise(got, want[: len(got)])


def test_output_is_ordered_after_work_on_the_stream():
    """The kernel reads x only after what was queued before it has written x."""
    x = torch.zeros(64, 64, 56, 56, device="cuda")
    source = torch.randn_like(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        x.copy_(source)
        y = batch_norm(x, None, None, training=True)
    stream.synchronize()
    assert_bitwise(y, batch_norm(source, None, None, training=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@TWO_LAYOUTS
def test_tensors_on_a_device_that_is_not_current(layout):
    assert torch.cuda.current_device() == 0
    args = arguments((8, 32, 14, 14), device="cuda:1", layout=layout)
    y = check_call(args)
    assert y.device == torch.device("cuda:1")
    assert torch.cuda.current_device() == 0


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_vectors_on_another_gpu_are_refused():
    args = arguments((4, 3, 5), device="cuda:0", requires_grad=False)
    for name in ("weight", "bias", "running_mean", "running_var"):
        with pytest.raises(RuntimeError, match=name):
            call(arguments_with(args, name), training=True)


def arguments_with(args, name):
    moved = args.clone()
    setattr(moved, name, getattr(moved, name).to("cuda:1"))
    return moved


def enough_memory(gibibytes: float) -> bool:
    return torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > gibibytes * 2**30


HUGE = {
    "many-rows": ((2**31 + 8192, 1), contiguous),
    "one-long-row": ((1, 1, 2**31 + 8192), contiguous),
    "many-features": ((2**16 + 1, 2**15), contiguous),
    "images": ((3, 2, 20000, 20000), contiguous),
    "images-channels-last": ((3, 2, 20000, 20000), channels_last),
}


@pytest.mark.large
@pytest.mark.parametrize(("shape", "layout"), **every(HUGE))
def test_more_than_2_to_31_elements(shape, layout):
    """A period that divides the data exactly, so the answer is known without a second tensor of that size."""
    if not enough_memory(24):
        pytest.skip("needs 24 GiB of free GPU memory")
    x = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
    if layout is channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    x[..., 0::2] = -1.0
    x[..., 1::2] = 3.0
    if x.dim() == 2:  # along the batch, the dimension that statistics run over
        x[0::2], x[1::2] = -1.0, 3.0
    odd = shape[0] % 2 if x.dim() == 2 else 0
    mean, var = torch.zeros(shape[1], device="cuda"), torch.ones(shape[1], device="cuda")
    with torch.no_grad():
        y = batch_norm(x, mean, var, training=True, momentum=1.0, eps=1e-12)
    samples = x.numel() // shape[1]
    lows = (samples + odd) // 2
    true_mean = (3.0 * (samples - lows) - lows) / samples
    true_var = ((samples - lows) * (3.0 - true_mean) ** 2 + lows * (1.0 + true_mean) ** 2) / (
        samples - 1
    )
    torch.testing.assert_close(mean, torch.full_like(mean, true_mean), rtol=1e-6, atol=0)
    torch.testing.assert_close(var, torch.full_like(var, true_var), rtol=1e-6, atol=0)
    del x
    for corner in (
        (y.reshape(-1)[:4096], y.reshape(-1)[-4096:]) if y.is_contiguous() else (y[..., -4096:],)
    ):
        torch.testing.assert_close(
            corner.abs().float(), torch.ones_like(corner, dtype=torch.float32), rtol=0.01, atol=0
        )


@pytest.mark.large
def test_backward_of_more_than_2_to_31_elements():
    if not enough_memory(32):
        pytest.skip("needs 32 GiB of free GPU memory")
    x = torch.empty(2**31 + 8192, 1, dtype=torch.bfloat16, device="cuda")
    x[0::2], x[1::2] = -1.0, 3.0
    x.requires_grad_()
    weight, bias = (
        torch.ones(1, device="cuda", requires_grad=True),
        torch.zeros(1, device="cuda", requires_grad=True),
    )
    y = batch_norm(x, None, None, weight, bias, training=True, eps=1e-12)
    dy = torch.ones_like(y)
    dy[1::2] = 2.0
    dx, dweight, dbias = torch.autograd.grad(y, [x, weight, bias], dy)
    half = x.numel() // 2
    assert dbias.item() == pytest.approx(3.0 * half, rel=1e-6)
    assert dweight.item() == pytest.approx(1.0 * half, rel=1e-6)
    assert dx[:4096].abs().max() < 1e-2
    assert dx[-4096:].abs().max() < 1e-2


@TWO_LAYOUTS
def test_memory_is_returned(layout):
    """Nothing is kept between calls."""
    args = arguments((16, 64, 28, 28), device="cuda", layout=layout)
    torch.autograd.grad(call(args, training=True), differentiable(args), args.dy)
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        torch.autograd.grad(call(args, training=True), differentiable(args), args.dy)
    assert torch.cuda.memory_allocated() == before
