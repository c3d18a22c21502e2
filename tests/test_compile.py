"""torch.compile, export, tracing and scripting of models with our modules: the results of eager."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from inputs import DENSE_LAYOUTS, SHAPES, arguments, every
from torch import nn

import batchnorm_ext
from batchnorm_ext.functional import batch_norm

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning"),
    pytest.mark.timeout(120),  # compilers take theirs
]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def network(device: str = "cpu", **options: object) -> nn.Module:
    torch.manual_seed(8)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        batchnorm_ext.BatchNorm2d(6, **options),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3),
        batchnorm_ext.BatchNorm2d(4, **options),
        nn.Flatten(),
        batchnorm_ext.BatchNorm1d(4 * 16, affine=False, **options),
    ).to(device)


def batches(count: int, device: str = "cpu") -> list[torch.Tensor]:
    return [
        torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(i)).to(device)
        for i in range(count)
    ]


def train(model, module: nn.Module, data: list[torch.Tensor]) -> list[torch.Tensor]:
    results = []
    for x in data:
        module.zero_grad()
        y = model(x)
        y.exp().sum().backward()
        results += [y.detach(), *(p.grad.clone() for p in module.parameters())]
    return results + [t.clone() for t in module.state_dict().values()]


@pytest.mark.parametrize("momentum", [0.1, None])
def test_compiled_training_and_eval(momentum, device):
    module = network(device, momentum=momentum)
    compiled_module = copy.deepcopy(module)
    compiled = torch.compile(compiled_module, backend="aot_eager")
    data = batches(3, device)
    torch.testing.assert_close(
        train(compiled, compiled_module, data), train(module, module, data), rtol=1e-4, atol=1e-4
    )
    module.eval()
    compiled_module.eval()
    torch.testing.assert_close(compiled(data[0]), module(data[0]), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(data[1]), module(data[1]), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compiled_by_inductor(device):
    """The layers around ours are fused; ours stays an operator of the graph, or torch's own is generated."""
    torch.manual_seed(8)
    module = nn.Sequential(batchnorm_ext.BatchNorm2d(6), nn.ReLU()).to(device)
    eager = copy.deepcopy(module)
    compiled = torch.compile(module)
    x = torch.randn(4, 6, 5, 5, device=device)
    torch.testing.assert_close(
        train(compiled, module, [x]), train(eager, eager, [x]), rtol=1e-4, atol=1e-4
    )


def test_no_graph_break():
    module = network()
    x = batches(1)[0]
    eager = copy.deepcopy(module)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), eager(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_no_recompilation_from_step_to_step(momentum):
    """Nor a graph break; torch's own cumulative average reads the batch counter on the host."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    module = network(momentum=momentum)
    compiled = torch.compile(module, backend=counter)
    for x in batches(4):
        compiled(x).sum().backward()
    assert counter.frame_count == 1
    assert module[1].num_batches_tracked.item() == 4


@pytest.mark.parametrize("channels_last", [False, True])
def test_compiled_memory_format(channels_last):
    module = batchnorm_ext.BatchNorm2d(6)
    compiled = torch.compile(copy.deepcopy(module), backend="aot_eager")
    x = torch.randn(4, 6, 5, 5)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    y, expected = compiled(x), module(x)
    assert y.stride() == expected.stride()
    torch.testing.assert_close(y, expected)


def test_compiled_functional():
    x, weight, bias = torch.randn(4, 3, 5), torch.rand(3), torch.rand(3)
    mean, var = torch.zeros(3), torch.ones(3)

    def function(x, mean, var):
        return batch_norm(x * 2, mean, var, weight, bias, training=True) + 1

    eager_mean, eager_var = mean.clone(), var.clone()
    expected = function(x, eager_mean, eager_var)
    torch.testing.assert_close(torch.compile(function, backend="aot_eager")(x, mean, var), expected)
    torch.testing.assert_close((mean, var), (eager_mean, eager_var))


def test_compiled_dynamic_shapes():
    module = network()
    module = nn.Sequential(*list(module)[:5])
    eager = copy.deepcopy(module)
    compiled = torch.compile(module, backend="aot_eager", dynamic=True)
    for size in (8, 9, 12):
        x = torch.randn(3, 3, size, size)
        torch.testing.assert_close(compiled(x), eager(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(module.state_dict(), eager.state_dict())


def test_compiled_half_with_float_parameters():
    module = batchnorm_ext.BatchNorm2d(6)
    eager = copy.deepcopy(module)
    x = torch.randn(4, 6, 5, 5).bfloat16()
    y = torch.compile(module, backend="aot_eager")(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, eager(x), rtol=0.01, atol=0.01)


def test_compiled_checkpoint():
    from torch.utils.checkpoint import checkpoint

    module = network()
    eager = copy.deepcopy(module)
    x = batches(1)[0]

    def run(model, x):
        return checkpoint(model, x, use_reentrant=False)

    compiled = torch.compile(lambda x: run(module, x), backend="aot_eager")
    compiled(x).exp().sum().backward()
    eager(x).exp().sum().backward()
    for actual, expected in zip(module.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_export_uses_operators_everyone_has(training):
    module = network().train(training)
    x = batches(1)[0]
    program = torch.export.export(copy.deepcopy(module), (x,))
    assert "batchnorm_ext" not in program.graph_module.code
    torch.testing.assert_close(program.module()(x), module(x), rtol=1e-4, atol=1e-5)


def test_jit_trace_in_eval():
    module = network().eval()
    x, other = batches(2)
    traced = torch.jit.trace(module, x)
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.jit.load(buffer)(other), module(other), rtol=1e-4, atol=1e-5)


def test_make_fx():
    from torch.fx.experimental.proxy_tensor import make_fx

    module = network().eval()
    x = batches(1)[0]
    torch.testing.assert_close(make_fx(module)(x)(x), module(x), rtol=1e-4, atol=1e-5)


class Block(nn.Module):
    """Fused activations of every kind, one of them behind a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            batchnorm_ext.BatchNormAct2d(
                6, activation=activation, inplace=activation == "leaky_relu"
            )
            for activation in ("relu", "relu6", "leaky_relu", "elu", "silu", "hardswish")
        )
        self.conv = nn.Conv2d(3, 6, 3)
        self.last = batchnorm_ext.BatchNormAct2d(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x = self.conv(x)
        for layer in self.layers:
            x = layer(x * 0.9)
        return self.last(x, shortcut)


def block(device: str) -> nn.Module:
    torch.manual_seed(8)
    return Block().to(device)


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "training"])
@pytest.mark.parametrize("dynamic", [True, None], ids=["dynamic", "static"])
def test_compiled_fused_calls(dynamic, frozen, device):
    """One graph; frozen layers keep bits in the memory order of their output, whose strides are then symbolic."""
    module = block(device)
    if frozen:
        batchnorm_ext.freeze_batchnorm(module, affine=True)
    eager = copy.deepcopy(module)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for layout in (torch.contiguous_format, torch.channels_last):
        data = [x.contiguous(memory_format=layout) for x in batches(2, device)]
        results = []
        for model, parameters in ((compiled, module), (eager, eager)):
            outcome = []
            for x in data:
                parameters.zero_grad()
                y = model(x)
                y.cos().sum().backward()
                outcome += [y.detach(), parameters.conv.weight.grad.clone()]
            results.append(outcome + [t.clone() for t in parameters.state_dict().values()])
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_fused_calls_of_any_batch_size_are_compiled_once():
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    module = block("cpu")
    eager = copy.deepcopy(module)
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    for size in (7, 9, 11, 13):
        x = torch.randn(size, 3, 8, 8)
        y, expected = compiled(x), eager(x)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        y.cos().sum().backward()
    assert counter.frame_count == 2


@pytest.mark.native
def test_the_graph_holds_our_fused_operators():
    from torch._dynamo.backends.common import aot_autograd

    graphs = []

    def keep(graph, inputs):
        graphs.append(graph.code)
        return graph

    compiler = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    module = block("cpu")
    torch.compile(module, backend=compiler, fullgraph=True)(batches(1)[0]).sum().backward()
    forward, backward = graphs
    calls = len(module.layers) + 1
    assert forward.count("batchnorm_ext.forward_act") == calls
    assert backward.count("batchnorm_ext.backward_act") == calls


@pytest.mark.slow
def test_fused_calls_compiled_by_inductor(device):
    module = block(device)
    eager = copy.deepcopy(module)
    (x,) = batches(1, device)
    results = []
    for model, parameters in ((torch.compile(module), module), (eager, eager)):
        y = model(x)
        y.cos().sum().backward()
        results.append([y, *(p.grad for p in parameters.parameters())])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_export_of_fused_calls_uses_operators_everyone_has():
    module = block("cpu").eval()
    (x,) = batches(1)
    program = torch.export.export(copy.deepcopy(module), (x,))
    assert "batchnorm_ext" not in program.graph_module.code
    torch.testing.assert_close(program.module()(x), module(x), rtol=1e-4, atol=1e-5)


@pytest.mark.native
def test_selective_checkpointing_may_keep_fused_results():
    import functools

    from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

    module = block("cpu")
    eager = copy.deepcopy(module)
    (x,) = batches(1)
    eager(x).cos().sum().backward()
    kept = [torch.ops.batchnorm_ext.forward_act.default]
    contexts = functools.partial(create_selective_checkpoint_contexts, kept)
    checkpoint(module, x, use_reentrant=False, context_fn=contexts).cos().sum().backward()
    for actual, expected in zip(module.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(module.state_dict(), eager.state_dict())


@pytest.mark.native
@pytest.mark.parametrize("layout", **every(DENSE_LAYOUTS))
@pytest.mark.parametrize("shape", **every(SHAPES))
def test_fake_masks_have_the_size_of_real_ones(shape, layout, device):
    from batchnorm_ext import _operators

    args = arguments(shape, device=device, layout=layout)
    statistics = (args.weight, args.bias, args.running_mean, args.running_var, None)
    call = (args.x.detach(), None, *statistics, False, 0.1, 1e-5, False, 1, "relu", 0.0, True)
    mask = _operators.forward_act(*call)[-1]
    fake = _operators._fake_forward_act(*call)[-1]
    assert (mask.shape, mask.dtype) == (fake.shape, fake.dtype)


@pytest.mark.native
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_fused_operators_pass_opcheck(activation, training, dtype, device):
    pytest.importorskip("hypothesis")
    from batchnorm_ext import _operators

    assert _operators.operators_available()
    weight, bias = torch.rand(2, 3, device=device)
    mean, var = torch.zeros(3, device=device), torch.ones(3, device=device)
    counter = torch.zeros((), dtype=torch.int64, device=device)
    ours = torch.ops.batchnorm_ext
    epilogue = (activation, 0.1)
    with_mask = activation == "relu"

    def check(operator, *arguments):
        torch.library.opcheck(
            operator.default, arguments, test_utils=("test_schema", "test_faketensor")
        )

    for shape in ((4, 3, 5, 5), (7, 3, 1, 1)):
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(shape, device=device, dtype=dtype).contiguous(memory_format=layout)
            rest = (weight, bias, mean, var, counter, training, 0.1, 1e-5, False, 1, *epilogue)
            for residual in (None, x + 1):
                check(ours.forward_act, x, residual, *rest, with_mask)
            joined = (mean.double(), var.double(), 1e-5)
            check(ours.normalize_act, x, x, weight, bias, *joined, *epilogue, with_mask)
            _, *saved = ours.forward_act(x, x, *rest, with_mask)
            *saved, mask = saved
            mask = mask if with_mask else None
            for wanted in ((True, True, torch.float32, torch.float32), (False, True, None, None)):
                check(
                    ours.backward_act,
                    *(x, x, x, weight, *saved, mask, x.stride(), training, *wanted, *epilogue),
                )
            sums = torch.zeros(2, 3, dtype=torch.float64, device=device)
            count = torch.tensor([9.0], dtype=torch.float64, device=device)
            check(ours.input_gradient_act, x, x, x, weight, *saved, mask, *sums, count, *epilogue)
            if with_mask and not training:
                dy = x.contiguous()
                check(
                    ours.backward_act,
                    *(dy, None, None, weight, *saved, mask, x.stride(), training),
                    *(True, False, None, torch.float32, *epilogue),
                )


@pytest.mark.native
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operators_pass_opcheck(training, dtype, device):
    """torch's own checks of an operator: schema, fake kernels, and tracing with dynamic shapes."""
    pytest.importorskip("hypothesis")
    from batchnorm_ext import _operators

    assert _operators.operators_available()
    x = torch.randn(4, 3, 5, 5, device=device, dtype=dtype)
    weight, bias = torch.rand(3, device=device), torch.rand(3, device=device)
    mean, var = torch.zeros(3, device=device), torch.ones(3, device=device)
    counter = torch.zeros((), dtype=torch.int64, device=device)
    tests = ("test_schema", "test_faketensor")
    for layout in (torch.contiguous_format, torch.channels_last):
        x = x.contiguous(memory_format=layout)
        forward = torch.ops.batchnorm_ext.forward.default
        torch.library.opcheck(
            forward,
            (x, weight, bias, mean, var, counter, training, 0.1, 1e-5, False, 1),
            test_utils=tests,
        )
        saved_mean, inv_std = torch.zeros(3, device=device), torch.ones(3, device=device)
        backward = torch.ops.batchnorm_ext.backward.default
        for wanted in (
            (True, torch.float32, torch.float32),
            (True, None, None),
            (False, None, torch.float32),
        ):
            torch.library.opcheck(
                backward, (x, x, weight, saved_mean, inv_std, training, *wanted), test_utils=tests
            )


def test_any_batch_size_is_compiled_once():
    """The second size makes the batch dimension dynamic; no later one compiles again."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    module = network()[:5]
    eager = copy.deepcopy(module)
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    for size in (7, 9, 11, 13, 15):
        x = torch.randn(size, 3, 8, 8)
        y, expected = compiled(x), eager(x)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        y.exp().sum().backward()
    assert counter.frame_count == 2
    torch.testing.assert_close(module.state_dict(), eager.state_dict())


def test_switching_modes_and_freezing_in_a_compiled_model():
    module = network()
    eager = copy.deepcopy(module)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for index, x in enumerate(batches(6)):
        for model in (module, eager):
            model.train(index % 2 == 0)
            if index == 2:
                model[1].freeze()
            if index == 4:
                model[1].unfreeze()
        torch.testing.assert_close(compiled(x), eager(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(module.state_dict(), eager.state_dict())


def test_compiled_model_skips_nonfinite_batches():
    module = network(skip_nonfinite=True)
    x = batches(1)[0]
    x[0, 0] = torch.nan
    torch.compile(module, backend="aot_eager", fullgraph=True)(x)
    assert all(buffer.isfinite().all() for buffer in module.buffers())
    assert module[1].num_batches_tracked.item() == 1


def test_compiled_options_of_the_running_statistics():
    module = network(running_var_correction=0, on_single_value="running")
    eager = copy.deepcopy(module)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for x in (*batches(2), torch.randn(1, 3, 8, 8)):
        torch.testing.assert_close(compiled(x), eager(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(module.state_dict(), eager.state_dict())
    assert [module[i].num_batches_tracked.item() for i in (1, 6)] == [3, 2]


def test_compiled_under_autocast_and_inference_mode():
    module = network()
    eager = copy.deepcopy(module)
    x = batches(1)[0]

    def run(model, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    y, expected = compiled(module, x), run(eager, x)
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(module, x), run(eager, x), rtol=0.02, atol=0.02)


def test_compiled_autograd():
    """The backward pass of an eager model, compiled as a whole."""
    module = network()
    eager = copy.deepcopy(module)
    x = batches(1)[0]
    eager(x).exp().sum().backward()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        module(x).exp().sum().backward()
    for actual, expected in zip(module.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("inplace", [False, True], ids=["out-of-place", "in-place"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_compiled_autograd_of_fused_calls(training, inplace):
    module = batchnorm_ext.BatchNormAct2d(3, activation="leaky_relu", inplace=inplace)
    module.train(training)
    x, residual = (torch.randn(4, 3, 5, 5, requires_grad=True) for _ in range(2))
    wanted = [x, residual, *module.parameters()]
    chains = {  # in training a call with a residual is not in place
        "residual": lambda: module(x * 1.0, residual).exp().sum(),
        "alone": lambda: module(x * residual).exp().sum(),
    }
    for name, chain in chains.items():
        expected = torch.autograd.grad(chain(), wanted)
        for tensor in wanted:
            tensor.grad = None
        loss = chain()
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
            loss.backward()
        for tensor, gradient in zip(wanted, expected, strict=True):
            torch.testing.assert_close(
                tensor.grad, gradient, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.native
def test_the_graph_holds_our_operators():
    from torch._dynamo.backends.common import aot_autograd

    graphs = []

    def keep(graph, inputs):
        graphs.append(graph.code)
        return graph

    compiled = torch.compile(
        network(), backend=aot_autograd(fw_compiler=keep, bw_compiler=keep), fullgraph=True
    )
    compiled(batches(1)[0]).sum().backward()
    forward, backward = graphs
    assert forward.count("batchnorm_ext.forward") == 3
    assert backward.count("batchnorm_ext.backward") == 3


@pytest.mark.native
def test_selective_checkpointing_may_keep_our_results():
    """A policy can name our operator; its results are then kept, not computed again."""
    import functools

    from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

    module = network()
    eager = copy.deepcopy(module)
    x = batches(1)[0]
    eager(x).exp().sum().backward()
    assert torch.ops.batchnorm_ext.forward is not None
    kept = [torch.ops.batchnorm_ext.forward.default]
    contexts = functools.partial(create_selective_checkpoint_contexts, kept)
    checkpoint(module, x, use_reentrant=False, context_fn=contexts).exp().sum().backward()
    for actual, expected in zip(module.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad)
    torch.testing.assert_close(module.state_dict(), eager.state_dict())


@pytest.mark.gpu
@pytest.mark.parametrize("momentum", [0.1, None])
def test_reduce_overhead_replays_the_same_training(momentum):
    """CUDA graphs: the buffers are updated in place by each replay."""
    module = network("cuda", momentum=momentum)
    eager = copy.deepcopy(module)
    compiled = torch.compile(module, mode="reduce-overhead", fullgraph=True)
    data = batches(6, "cuda")
    for x in data:
        torch.compiler.cudagraph_mark_step_begin()
        module.zero_grad()
        eager.zero_grad()
        y = compiled(x)
        y.exp().sum().backward()
        expected = eager(x)
        expected.exp().sum().backward()
        torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(module.state_dict(), eager.state_dict(), rtol=1e-3, atol=1e-3)
    assert module[1].num_batches_tracked.item() == len(data)
