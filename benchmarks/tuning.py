"""What constants of the CUDA launch plan are worth: builds that differ in one, timed beside each other.

``python -m benchmarks.tuning OUT.json`` compiles what a constant is in once for each value, links it
to the other objects of the build in ``build``, loads all of these modules into one process and times
them in interleaved rounds, after their results have been held against float64.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from batchnorm_ext import _build
from batchnorm_ext._extension import _load_library, backend

from .contenders import GRADIENTS, MINIMUM_TRAFFIC, OUTPUT, Prepared, first_line, results_of
from .problem import Problem, make_problem, wrong
from .results import ROOT, describe_machine
from .shapes import Case
from .stats import ratio_of_medians, summarize
from .timing import available_threads, cold_buffers, interleave, sampler_for

EXIT_NO_GPU = 3
BASE = "as it is"
DEFAULT_BUDGET_S = 240
ROUNDS = (3, 12)


class Experiment(NamedTuple):
    """A constant, the values it is given in turn, and the tensors on which that might matter."""

    constant: str
    values: tuple[str, ...]
    cases: tuple[Case, ...]
    ops: tuple[str, ...] = ("forward", "backward")


def _cases(layout: str, *shapes: tuple[int, ...], dtype: str = "bfloat16") -> tuple[Case, ...]:
    return tuple(Case("tuning", shape, dtype, layout) for shape in shapes)


_IN_PART = _cases("channels_last", (256, 64, 56, 56), (256, 64, 112, 112), (64, 256, 56, 56))
_ROWS = _cases("channels_last", (32, 256, 56, 56), (256, 256, 14, 14), (256, 2048, 7, 7))
_FEW = _cases("contiguous", (64, 3, 224, 224), (256, 64, 112, 112), (256, 64, 56, 56))
_SMALL = _cases("contiguous", (32, 64, 56, 56), (32, 256, 14, 14), (32, 512, 7, 7))
_RUNS = _cases("contiguous", (64, 256, 28, 28), (64, 256, 20, 20))
_NEARLY_A_CLUSTER = _cases("contiguous", (32, 16, 96, 96))

# In the order of what is expected to matter. Each value changes the plan of some of its tensors on an H200.
# kReservedBytes this large leaves no room for anything to be held.
EXPERIMENTS = (
    Experiment("kReservedBytes", ("1 << 30",), (*_IN_PART[:1], *_ROWS, *_FEW, *_SMALL)),
    Experiment("kWorthStreaming", ("0", "1024"), _IN_PART),
    Experiment("kResidentRowBytes", ("{256}", "{256, 128}", "{128, 64}", "{64}"), _ROWS),
    Experiment("kWorthTheGrid", ("1", "2"), (*_SMALL, *_NEARLY_A_CLUSTER)),
    Experiment("kMergedBytes", ("0", "64 << 10"), (*_ROWS[:2], *_FEW)),
    Experiment("kBusyQuarters", ("5",), _FEW[2:]),
    Experiment("kStreamedRowBytes", ("64",), _IN_PART[:2]),
    Experiment("exchange_bytes", ("32 << 20",), (*_ROWS, *_FEW[:1])),
    Experiment("kLongRunBytes", ("512", "2048"), _RUNS),
    Experiment("kTileRowBytes", ("128", "512"), _ROWS, ("eval",)),
    Experiment("kThreadVectors", ("4 * kChunkVectors",), _ROWS, ("eval",)),
)


# ------------------------------------------------------------------------------------------- builds


def with_value(csrc: Path, constant: str, value: str) -> Path:
    """Give the constant another value in this copy of the sources; the file that it is in.

    Raises
    ------
    ValueError
        It is defined nowhere, or more than once.
    """
    definition = re.compile(rf"(\b{constant}(?:\[\])? = )[^;]+;")
    files = [path for path in sorted(csrc.glob("cuda/**/*.*")) if path.is_file()]
    found = [path for path in files if definition.search(path.read_text())]
    if len(found) != 1 or len(definition.findall(found[0].read_text())) != 1:
        names = ", ".join(path.name for path in found) or "no file"
        raise ValueError(f"{constant} must be defined once; it is in {names}")
    found[0].write_text(definition.sub(lambda match: f"{match[1]}{value};", found[0].read_text()))
    return found[0]


class Compilation(NamedTuple):
    """How one object of the build at hand was made."""

    source: Path
    output: Path
    command: str


def compilations() -> list[Compilation]:
    """Those of the build for this torch, as ninja tells them.

    Raises
    ------
    FileNotFoundError
        Nothing was built in the checkout.
    """
    builds = sorted((ROOT / "build" / f"torch-{torch.__version__}").glob("temp.*/build.ninja"))
    if not builds:
        raise FileNotFoundError("nothing was compiled here: python -m benchmarks.gpu does it")
    command = ["ninja", "-C", str(builds[0].parent), "-t", "compdb"]
    environment = os.environ | {"PATH": _build.path_with_ninja()}
    listed = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    answer = listed.stdout[listed.stdout.index("[") :]
    return [
        Compilation(Path(one["file"]), Path(one["output"]), one["command"])
        for one in json.loads(answer)
        if Path(one["output"]).suffix == ".o"
    ]


def build(folder: Path, constant: str, value: str, known: Sequence[Compilation]) -> Path:
    """A module in `folder` that differs from the build at hand in one constant."""
    csrc = folder / "csrc"
    shutil.copytree(_build.source_root(), csrc)
    changed = with_value(csrc, constant, value).relative_to(csrc)
    objects = []
    for one in known:
        relative = one.source.relative_to(_build.source_root())
        concerned = relative == changed if changed.suffix in (".cpp", ".cu") else _is_cuda(relative)
        if concerned:
            made = folder / relative.with_suffix(".o").name
            command = one.command.replace(str(one.output), str(made))
            command = command.replace(str(_build.source_root()), str(csrc))
            subprocess.run(command, shell=True, check=True, capture_output=True, text=True)
            objects.append(made)
        else:
            objects.append(one.output)
    library = folder / "_C.so"
    command = [*_link_command(), *map(str, objects), "-o", str(library)]
    subprocess.run([*command, *_libraries()], check=True, capture_output=True, text=True)
    return library


def _is_cuda(source: Path) -> bool:
    return source.parts[0] == "cuda"


def _link_command() -> list[str]:
    return [*shlex.split(os.environ.get("CXX", "c++")), "-shared", "-fopenmp"]


@cache
def _libraries() -> list[str]:
    """What a CUDA extension is linked to, as torch's tools have it."""
    tools = _build.torch_extension_tools(_build.describe(_build.find_toolkit()))
    extension = tools.CUDAExtension("_C", [])
    folders = [
        *extension.library_dirs,
        str(ROOT / "build" / f"torch-{torch.__version__}" / "generated"),
    ]
    return [*(f"-L{folder}" for folder in folders), *(f"-l{name}" for name in extension.libraries)]


# ------------------------------------------------------------------------------------------- timing


def prepared(native: ModuleType, problem: Problem, op: str) -> Prepared:
    """An op of a native module as calls and results."""
    p = problem

    def forward(i: int, training: bool) -> Any:
        running = (p.running_mean, p.running_var, None)
        return native.forward(
            *(p.x[i], p.weight, p.bias), *running, training, p.momentum, p.eps, False, 1
        )

    if op != "backward":
        training = op == "forward"
        return Prepared(lambda i: forward(i, training), lambda results: OUTPUT(results[0]))
    saved = [forward(i, True)[1:] for i in range(p.buffers)]
    dtypes = (p.weight.dtype, p.bias.dtype)
    return Prepared(
        lambda i: native.backward(p.dy[i], p.x[i], p.weight, *saved[i], True, True, *dtypes),
        GRADIENTS,
    )


def compare(
    modules: Mapping[str, ModuleType], case: Case, op: str, device: str, seconds: float
) -> Iterator[dict[str, Any]]:
    """A row for each module: microseconds and the ratio to the first, or what is wrong."""
    buffers = cold_buffers(case.bytes * MINIMUM_TRAFFIC[op], device)
    problem = make_problem(case, device, buffers)
    samplers, rows = {}, {}
    for name, native in modules.items():
        rows[name] = {"value": name, "case": str(case), "op": op}
        try:
            ready = prepared(native, problem, op)
            problem.reset()
            if reason := wrong(problem, results_of(ready, op), op):
                raise ValueError(reason)
            samplers[name] = sampler_for(device)(ready.call, buffers)
        except Exception as error:  # one value that does not work must not cost the others
            rows[name]["failed"] = first_line(error)
    times = interleave(samplers, seconds, random.Random(0), ROUNDS)
    base = next(iter(modules))
    for name, row in rows.items():
        if name in times and base in times:
            median, low, high = (1e6 * value for value in summarize(times[name]))
            ratio = ratio_of_medians(times[name], times[base], 0)
            row |= {"us": median, "p10_us": low, "p90_us": high, "ratio": tuple(ratio)}
        yield row


def run(
    experiments: Sequence[Experiment], seconds: float, found: Callable[[dict[str, Any]], None]
) -> int:
    """Build and time; returns how many values could not be measured."""
    end = time.monotonic() + seconds
    known = compilations()
    _libraries()
    failed = 0
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(available_threads()) as pool:
        libraries = {
            (one.constant, value): pool.submit(
                build, Path(folder) / f"{one.constant}-{i}", one.constant, value, known
            )
            for one in experiments
            for i, value in enumerate(one.values)
        }
        weights = [len(one.cases) * len(one.ops) for one in experiments]
        for index, one in enumerate(experiments):
            modules = {BASE: backend()}
            for value in one.values:
                name = f"batchnorm_ext_{one.constant}_{one.values.index(value)}._C"
                try:
                    library = libraries[one.constant, value].result()
                    modules[value] = _load_library(name, library)
                except (subprocess.CalledProcessError, ImportError, ValueError) as error:
                    failed += 1
                    text = first_line(error) + (getattr(error, "stderr", None) or "")[-2000:]
                    found({"constant": one.constant, "value": value, "failed": text})
            left = max(0.0, end - time.monotonic()) / sum(weights[index:])
            for case in one.cases:
                for op in one.ops:
                    if time.monotonic() > end:
                        found({"constant": one.constant, "case": str(case), "failed": "no time"})
                        continue
                    for row in compare(modules, case, op, "cuda", left):
                        failed += "failed" in row
                        found({"constant": one.constant, **row})
    return failed


def told(row: Mapping[str, Any]) -> str:
    """A row as a line of text."""
    words = [row["constant"], "=", *(row[key] for key in ("value", "case", "op") if key in row)]
    if "ratio" in row:
        low, high = row["ratio"][1:]
        words.append(f"{row['us']:.1f} us, {row['ratio'][0]:.3f} ({low:.3f} to {high:.3f})")
    return " ".join([*words, row.get("failed", "")]).rstrip()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the results; 1 where a value could not be measured, 3 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tuning", description=__doc__)
    parser.add_argument("out", type=Path, help="file to write")
    names = [one.constant for one in EXPERIMENTS]
    parser.add_argument("--constants", nargs="+", choices=names, metavar="NAME", default=names)
    parser.add_argument("--time-budget", type=float, default=DEFAULT_BUDGET_S, metavar="S")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no GPU that torch can use: nothing was measured", file=sys.stderr)
        return EXIT_NO_GPU
    environment = describe_machine("cuda", available_threads())
    rows: list[dict[str, Any]] = []

    def found(row: dict[str, Any]) -> None:
        rows.append(row)
        print(told(row), flush=True)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        content = {"environment": environment, "rows": rows}
        options.out.write_text(json.dumps(content, indent=1) + "\n")

    chosen = [one for one in EXPERIMENTS if one.constant in options.constants]
    return 1 if run(chosen, options.time_budget, found) else 0


if __name__ == "__main__":
    sys.exit(main())
