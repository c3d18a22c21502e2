"""Models with our modules as programs of their own: torch.export, AOTInductor, ONNX."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import batchnorm_ext

MODES = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def network(**options: object) -> nn.Module:
    """A model whose running statistics are not the initial ones."""
    torch.manual_seed(5)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), batchnorm_ext.BatchNorm2d(4, **options), nn.ReLU(), nn.Conv2d(4, 2, 3)
    )
    model(batch(6))
    return model


def batch(size: int) -> torch.Tensor:
    return torch.randn(size, 3, 8, 8, generator=torch.Generator().manual_seed(size))


def any_batch() -> tuple[dict[int, torch.export.Dim]]:
    return ({0: torch.export.Dim("batch", min=2, max=64)},)


@MODES
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_exported_for_any_batch_size(training, strict):
    model = network().train(training)
    program = torch.export.export(
        copy.deepcopy(model), (batch(4),), dynamic_shapes=any_batch(), strict=strict
    )
    exported = program.module()
    for size in (2, 5, 8):
        torch.testing.assert_close(exported(batch(size)), model(batch(size)), **CLOSE)
    for (
        name,
        actual,
    ) in exported.state_dict().items():  # without the counter, where nothing reads it
        torch.testing.assert_close(actual, model.state_dict()[name], **CLOSE)


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": None},
        {"skip_nonfinite": True},
        {"momentum": None, "skip_nonfinite": True},
        {"running_var_correction": 0},
    ],
    ids=str,
)
def test_what_torchs_modules_lack_is_exported_too(options):
    """The cumulative average of torch's modules reads the batch counter on the host, which no program can."""
    model = network(**options)
    exported = torch.export.export(copy.deepcopy(model), (batch(4),)).module()
    for step in range(3):
        x = torch.randn(4, 3, 8, 8)
        if step == 1 and "skip_nonfinite" in options:
            x[0] = torch.inf
        torch.testing.assert_close(exported(x), model(x), equal_nan=True, **CLOSE)
    for name, expected in model.state_dict().items():
        assert expected.isfinite().all()
        torch.testing.assert_close(exported.state_dict()[name], expected, **CLOSE)


def test_exported_program_is_saved_without_the_package(tmp_path):
    """It holds torch's operators only, so that another process can load it with torch alone."""
    model = network().eval()
    path = tmp_path / "model.pt2"
    torch.export.save(
        torch.export.export(model, (batch(4),), dynamic_shapes=any_batch()), str(path)
    )
    loaded = torch.export.load(str(path))
    targets = {str(node.target) for node in loaded.graph.nodes if node.op == "call_function"}
    assert not [target for target in targets if "batchnorm_ext" in target]
    torch.testing.assert_close(loaded.module()(batch(7)), model(batch(7)), **CLOSE)


@pytest.mark.slow
def test_aot_inductor_package(tmp_path):
    model = network().eval()
    program = torch.export.export(model, (batch(4),), dynamic_shapes=any_batch())
    path = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "model.pt2")
    )
    compiled = torch._inductor.aoti_load_package(path)
    for size in (3, 9):
        torch.testing.assert_close(compiled(batch(size)), model(batch(size)), **CLOSE)


class OnlyNorm(nn.Module):
    """With a convolution before it, exporters fold batch norm away."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = batchnorm_ext.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(torch.relu(x))


@pytest.mark.parametrize("exporter", ["torch.export", "TorchScript"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_onnx_has_a_batch_normalization_node(exporter, tmp_path, library):
    onnx, runtime = library("onnx"), library("onnxruntime")
    library("onnxscript")
    for model in (OnlyNorm(), network()):
        model.train()(batch(6))
        model.eval()
        path = Path(tmp_path) / "model.onnx"
        if exporter == "torch.export":
            torch.onnx.export(model, (batch(4),), path, dynamo=True, dynamic_shapes=any_batch())
        else:
            axes = {"x": {0: "batch"}}
            torch.onnx.export(
                model, (batch(4),), path, dynamo=False, input_names=["x"], dynamic_axes=axes
            )
        operators = [node.op_type for node in onnx.load(path).graph.node]
        assert ("BatchNormalization" in operators) == isinstance(model, OnlyNorm), operators
        session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
        for size in (2, 7):
            (y,) = session.run(None, {session.get_inputs()[0].name: batch(size).numpy()})
            torch.testing.assert_close(torch.from_numpy(y), model(batch(size)).detach(), **CLOSE)
