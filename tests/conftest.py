"""What every test runs under: the backend that was asked for, a seed, devices, and the `gpu` marker."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import batchnorm_ext
from batchnorm_ext import _extension, modules

# Of the GPU's memory, what a process may keep from test to test.
KEPT_BYTES = 4 << 30
# Where benchmarks/ is: behind all else, so that the installed package stays the one that is tested.
ROOT = str(Path(__file__).resolve().parent.parent)
if ROOT not in sys.path:
    sys.path.append(ROOT)
REQUESTED = os.environ.get("BATCHNORM_EXT_BACKEND", "auto")


def _backend_problem() -> str | None:
    """Why the backend in use is not the one this run is meant to test, if so."""
    try:
        backend = _extension.backend()
    except Exception as error:
        return f"BATCHNORM_EXT_BACKEND={REQUESTED}: {error}"
    name = backend.__name__
    is_reference = name.rpartition(".")[2] == "_reference"
    if is_reference != (REQUESTED == "torch"):
        wanted = "the pure-PyTorch backend" if REQUESTED == "torch" else "the native module"
        return (
            f"BATCHNORM_EXT_BACKEND={REQUESTED} asks for {wanted}, but batchnorm_ext uses {name}. "
            "`python -m batchnorm_ext` says why; BATCHNORM_EXT_BACKEND=torch tests the pure-PyTorch backend."
        )
    if not is_reference and _gpu_wanted() and not backend.build_info()["cuda"]:
        return "there is a GPU, but the native module was built for the CPU only; FORCE_ONLY_CPU=1 says that is intended"
    return None


def _gpu_wanted() -> bool:
    return torch.cuda.is_available() and os.environ.get("FORCE_ONLY_CPU") != "1"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "native: about the native module, not the pure-PyTorch backend"
    )


def pytest_sessionstart(session: pytest.Session) -> None:
    if session.config.option.collectonly:
        return
    problem = _backend_problem()
    if problem is not None:
        pytest.exit(problem, returncode=pytest.ExitCode.USAGE_ERROR)


def pytest_report_header(config: pytest.Config) -> str:
    if config.option.collectonly:
        return ""
    backend = _extension.backend()
    return f"batchnorm_ext: {os.path.dirname(batchnorm_ext.__file__)}, backend {backend.__name__}, {backend.build_info()}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    no_gpu = pytest.mark.skip(
        reason="needs a CUDA device" if not torch.cuda.is_available() else "FORCE_ONLY_CPU=1"
    )
    pure_python = pytest.mark.skip(
        reason="about the native module; BATCHNORM_EXT_BACKEND=torch was asked for"
    )
    for item in items:
        if item.get_closest_marker("gpu") and not _gpu_wanted():
            item.add_marker(no_gpu)
        if item.get_closest_marker("native") and REQUESTED == "torch":
            item.add_marker(pure_python)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, Any, None]:
    """Leave a process that has lost its device, where every further test would fail: pytest-xdist starts another."""
    outcome = yield
    report = outcome.get_result()
    if not (report.failed and torch.cuda.is_initialized()):
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        reason = f"{item.nodeid} lost the device: {error}"
        capture = item.config.pluginmanager.getplugin("capturemanager")
        with capture.global_and_fixture_disabled() if capture else contextlib.nullcontext():
            print(f"{report.longreprtext}\n{reason}", file=sys.stderr, flush=True)
        if hasattr(item.config, "workerinput"):
            os._exit(pytest.ExitCode.INTERNAL_ERROR)
        pytest.exit(reason, returncode=pytest.ExitCode.INTERNAL_ERROR)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Each device the package computes on."""
    return request.param


@pytest.fixture
def library() -> Callable[[str], ModuleType]:
    """Imports a library of requirements/integrations.txt, or skips the test: REQUIRE_LIBRARIES=1 makes that a failure."""

    def imported(name: str) -> ModuleType:
        try:
            return importlib.import_module(name)
        except Exception as error:  # absent, or built for another torch, say
            if os.environ.get("REQUIRE_LIBRARIES") == "1":
                raise
            pytest.skip(f"{name} of requirements/integrations.txt: {error}")

    return imported


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The fused calls made: the activation, with a plus where a residual is added."""
    made: list[str] = []
    real = modules.batch_norm_act_with_counter

    def recorded(input, residual, *others):
        made.append(("+" if residual is not None else "") + others[-4])
        return real(input, residual, *others)

    monkeypatch.setattr(modules, "batch_norm_act_with_counter", recorded)
    return made


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(20150211)


@pytest.fixture(autouse=True)
def _shares_the_device() -> Generator[None, Any, None]:
    """What tests of large tensors took, other processes of pytest-xdist may need."""
    yield
    if torch.cuda.is_initialized() and torch.cuda.memory_reserved() > KEPT_BYTES:
        torch.cuda.empty_cache()


@pytest.fixture(autouse=True, scope="session")
def _repeatable() -> Generator[None, Any, None]:
    """Of the layers around batch norm, too, the same bits twice, and in full float32."""
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        yield
