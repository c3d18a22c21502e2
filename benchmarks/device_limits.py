"""What the plan of the CUDA kernels rests on, measured on the GPU at hand, within a minute or two.

``python -m benchmarks.device_limits OUT.json`` compiles ``device_limits.cu`` and runs it: bandwidth
by blocks of a multiprocessor, clusters that fit, latency of meetings between blocks and of
launches, cost of narrow rows, what the second-level cache keeps. Then it times the peers.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from batchnorm_ext._build import find_toolkit

from .contenders import Contender, Floor, TorchEager, TorchEagerNoCudnn
from .problem import make_problem
from .results import ROOT, describe_machine
from .shapes import Case, with_dtypes, with_layouts
from .timing import available_threads, cold_buffers, cuda_sampler

EXIT_NO_GPU = 3
SOURCE = Path(__file__).with_suffix(".cu")
PEERS: tuple[type[Contender], ...] = (Floor, TorchEager, TorchEagerNoCudnn)
PEER_OPS = ("forward", "backward")
EXPERIMENTS = ("clusters", "exchanges", "launches", "bandwidth", "columns", "retention")
COMPILE_S, EXPERIMENT_S = 120, 15


def compile_command(nvcc: str, capability: tuple[int, int], program: Path) -> list[str]:
    """How the measuring program is compiled; it includes the kernels' own primitives."""
    architecture = "-arch=sm_{}{}".format(*capability)
    include = f"-I{ROOT / 'csrc'}"
    return [nvcc, "-std=c++17", "-O3", architecture, include, str(SOURCE), "-o", str(program)]


def measure_device(measured: Callable[[dict[str, Any]], None]) -> None:
    """Compile the measuring program and run its experiments; `measured` gets what each prints."""
    nvcc = str(find_toolkit().home / "bin" / "nvcc")
    failures = []
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "device_limits"
        _output(compile_command(nvcc, torch.cuda.get_device_capability(), program), COMPILE_S)
        for experiment in EXPERIMENTS:
            try:
                measured(json.loads(_output([str(program), experiment], EXPERIMENT_S)))
            except RuntimeError as error:
                failures.append(str(error))
                print(error, file=sys.stderr)
    if failures:
        raise RuntimeError("\n".join(failures))


def _output(command: Sequence[str], seconds: float) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(str(error)) from None
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def measure_peers(measured: Callable[[dict[str, Any]], None]) -> None:
    """Microseconds of torch's batch norm and of the floor, with data in the cache and out of it."""
    cases = with_layouts([Case("limits/256x56", (32, 256, 56, 56))])
    rows = []
    for case in with_dtypes(cases, ("bfloat16", "float32")):
        for cache in ("cold", "hot"):
            touched = 3 * torch.Size(case.shape).numel() * 2
            buffers = cold_buffers(touched, "cuda") if cache == "cold" else 1
            problem = make_problem(case, "cuda", buffers)
            for peer in PEERS:
                for op in PEER_OPS:
                    sample = cuda_sampler(peer().prepare(problem, op).call, buffers)
                    us = 1e6 * min(sample() for _ in range(3))
                    row = {"case": str(case), "cache": cache, "peer": peer.name, "op": op, "us": us}
                    rows.append(row)
                    measured({"peers": rows})


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the results; 3 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device_limits", description=__doc__)
    parser.add_argument("out", type=Path, help="file to write")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no GPU that torch can use: nothing was measured", file=sys.stderr)
        return EXIT_NO_GPU
    results: dict[str, Any] = {"environment": describe_machine("cuda", available_threads())}

    def measured(found: dict[str, Any]) -> None:
        results.update(found)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n")

    failed = False
    for name, measure in {"device": measure_device, "peers": measure_peers}.items():
        try:
            measure(measured)
        except Exception as error:  # whatever it is, it must not cost the other part
            measured({f"{name} failed": str(error)})
            print(error, file=sys.stderr)
            failed = True
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
