"""A representative part of the suite on every instruction set that this machine runs, and on one thread."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from batchnorm_ext._extension import backend

CAPABILITIES = ("default", "avx2", "avx512")
NAMES = {"default": "baseline", "avx2": "avx2", "avx512": "avx512"}
# Every kernel at shapes with vector heads, tails and several blocks; the layouts; the hard numbers; what is around.
SELECTION = [
    "test_activation.py",
    "test_batch_norm.py::test_shapes_and_dtypes",
    "test_batch_norm.py::test_layouts",
    "test_batch_norm.py::test_large_shapes",
    "test_batch_norm.py::test_repeatable_to_the_bit",
    "test_mixed_precision.py",
    "test_modules.py",
    "test_numerics.py",
    "test_running_statistics.py::test_nonfinite_values_stay_in_their_channel",
]
HERE = Path(__file__).parent


def supported() -> list[str]:
    """The capabilities up to this machine's own."""
    best = {"DEFAULT": "default", "AVX2": "avx2", "AVX512": "avx512"}.get(
        torch.backends.cpu.get_cpu_capability()
    )
    return list(CAPABILITIES[: CAPABILITIES.index(best) + 1]) if best else []


def run(environment: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        env=os.environ | environment,
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def run_selection(environment: dict[str, str]) -> None:
    pytest_quietly = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not gpu"]
    outcome = run(environment, *pytest_quietly, *SELECTION)
    assert outcome.returncode == 0, outcome.stdout[-4000:] + outcome.stderr[-2000:]


@pytest.mark.native
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_selection_under(capability):
    if capability not in supported():
        pytest.skip(f"this machine's torch runs {torch.backends.cpu.get_cpu_capability()} at most")
    if backend().build_info()["instruction_set"] == NAMES[capability]:
        pytest.skip("what the rest of the session runs on")
    environment = {"ATEN_CPU_CAPABILITY": capability}
    question = "from batchnorm_ext._extension import backend; print(backend().build_info()['instruction_set'])"
    assert run(environment, "-c", question).stdout.split()[-1] == NAMES[capability]
    run_selection(environment)


@pytest.mark.native
@pytest.mark.skipif(torch.get_num_threads() == 1, reason="what the rest of the session runs on")
def test_selection_on_one_thread():
    """Sums are longest where no thread shares them."""
    run_selection({"OMP_NUM_THREADS": "1"})
