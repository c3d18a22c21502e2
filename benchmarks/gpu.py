"""What a machine with a GPU should run, in one time-boxed call: build, tests, sanitizers, timing.

``python3 -m benchmarks.gpu OUT`` needs no network and no virtual environment: the interpreter at
hand with torch, pytest and nvcc. Stages run in the order of what one would miss most. Each has its
share of the budget, a stage that takes less leaves the rest to those behind it, one that fails or
hangs costs the others nothing, and ``OUT/summary.json`` is up to date after every stage.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from .contenders import KERNEL_OPS, MODULE_OPS, TRUTH_OF, BatchnormExt, first_line
from .problem import Problem, make_problem, wrong
from .results import ROOT, describe_machine
from .shapes import DTYPES, Case, with_dtypes, with_layouts
from .timing import available_threads

EXIT_NO_GPU = 3
GRACE_S = 15
KILLED_S = 5
SECONDS = "{seconds}"
SAVING_SHARE = 0.85
MEMORY_PER_JOB = 4 << 30
SANITIZERS = ("memcheck", "racecheck", "synccheck")
SANITIZER_ERROR = 99
# Test files of their own stage: streams, graphs, processes and compilers, which can hang or end a process.
SYSTEM_TESTS = ("test_cuda.py", "test_distributed.py", "test_compile.py", "test_benchmarks.py")
WORKERS = max(1, min(8, available_threads() // 2))
SHOWN_FAILURES = 40


@dataclass
class Stage:
    """One command and what became of it.

    Attributes
    ----------
    share
        Its part of the budget, relative to the other stages.
    command
        What is run; `SECONDS` in it stands for the time after which it should save and end.
    decides
        Whether the exit code depends on it.
    state
        ``passed``, ``failed``, ``overran`` (its share of the time), ``skipped`` or ``not run``.
    """

    name: str
    command: list[str]
    share: float
    decides: bool = True
    environment: dict[str, str] = field(default_factory=dict)
    state: str = "not run"
    seconds: float = 0.0
    limit_s: float = 0.0
    exit_code: int | None = None
    note: str = ""
    tail: str = ""

    def run(self, limit_s: float, environment: dict[str, str], log: Path) -> None:
        """Run the command; past the limit it is interrupted, then killed with all it started."""
        self.limit_s = round(limit_s, 1)
        start = time.monotonic()
        seconds = f"{SAVING_SHARE * limit_s:.0f}"
        command = [part.replace(SECONDS, seconds) for part in self.command]
        with log.open("ab") as output:
            output.write(f"\n==== {self.name}: {' '.join(command)}\n".encode())
            output.flush()
            begin = output.tell()
            try:
                process = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env={**os.environ, **environment, **self.environment},
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                self.state, self.note = "failed", str(error)
                return
            try:
                self.exit_code = process.wait(limit_s)
                self.state = "passed" if self.exit_code == 0 else "failed"
            except subprocess.TimeoutExpired:
                self.state = "overran"
            finally:
                _end(process)
        self.seconds = round(time.monotonic() - start, 1)
        with log.open("rb") as output:
            output.seek(begin)
            self.tail = output.read()[-2000:].decode(errors="replace")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Interrupt a process that still runs, so that it can save; then kill its whole session."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):  # a driver call that hangs outlives even that
        process.wait(KILLED_S)


def run_stages(
    stages: Sequence[Stage],
    budget_s: float,
    environment: dict[str, str],
    log: Path,
    finished: Callable[[], None],
) -> None:
    """Run stages in turn, each for at most its share of the time left; `finished` after each."""
    deadline = time.monotonic() + budget_s
    for index, stage in enumerate(stages):
        left = deadline - time.monotonic()
        shares = sum(later.share for later in stages[index:])
        if left <= GRACE_S:
            stage.state, stage.note = "skipped", "the budget was spent"
        elif stage.command:
            limit = left * stage.share / shares
            print(f"{stage.name}: up to {limit:.0f} s", flush=True)
            stage.run(limit, environment, log)
        else:
            stage.state = "skipped"
        print(f"{stage.name}: {stage.state} after {stage.seconds:.0f} s {stage.note}", flush=True)
        finished()


# ------------------------------------------------------------------------------------------ stages


def _jobs() -> int:
    """Compiler processes at once: as many as processors, or as memory is there for."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(available_threads(), memory // MEMORY_PER_JOB))


def _build_stages(site: Path) -> tuple[Stage, Stage]:
    """Compile and install into `site`; and, for where that fails, compile at first use."""
    major, minor = torch.cuda.get_device_capability()
    compiling = {
        "FORCE_CUDA": "1",
        "TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST", f"{major}.{minor}"),
        "MAX_JOBS": os.environ.get("MAX_JOBS", str(_jobs())),
    }
    pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps"]
    pip += ["--no-index", "--upgrade", "--target", str(site), str(ROOT)]
    load = "import batchnorm_ext; batchnorm_ext.load(verbose=True)"
    return (
        Stage("build", pip, share=40, environment=compiling),
        Stage("jit", [sys.executable, "-c", load], share=40, environment=compiling),
    )


def _checking_stages(out: Path) -> list[Stage]:
    """What runs on the built package. A sanitizer that is not installed cannot pass."""
    python = sys.executable
    exercise = [python, "-m", "benchmarks.gpu", "--exercise"]
    benchmark = ["--device", "cuda", "--no-plots", "--output", str(out), "--time-budget", SECONDS]
    benchmark = [python, "-m", "benchmarks", *benchmark]
    limits = [python, "-m", "benchmarks.device_limits", str(out / "device_limits.json")]
    layers = ["layers", "--set", "resnet50", "edges", "--batch", "256"]
    layers += ["--dtype", "bfloat16", "float32"]
    # Each test's name before it runs, and where a test hangs: a log that ends early says why.
    pytest = [python, "-m", "pytest", "-m", "gpu", "-v", "--maxfail=20", "-p", "no:cacheprovider"]
    pytest += ["-o", "faulthandler_timeout=60"]
    system = [f"tests/{name}" for name in SYSTEM_TESTS]
    # Several processes where pytest-xdist is there: most of a test is its oracle, on the CPU.
    workers = ["-n", str(WORKERS)] if find_spec("xdist") else []
    stages = [
        Stage("exercise", exercise, share=6),
        Stage("device limits", limits, share=5, decides=False),
        Stage("layers", [*benchmark[:3], *layers, *benchmark[3:]], share=26, decides=False),
        Stage(
            "tests",
            [*pytest, *workers, "tests", *(f"--ignore={name}" for name in system)],
            share=18,
        ),
        Stage("system tests", [*pytest, *system], share=12),
    ]
    sanitizer = _sanitizer()
    for tool in SANITIZERS:
        # Torch's own kernels are not what is looked at, nor errors of the API that it handles itself.
        options = ["--tool", tool, "--error-exitcode", str(SANITIZER_ERROR)]
        options += ["--kernel-name", "kns=batchnorm_ext", "--report-api-errors", "no"]
        stage = Stage(
            tool,
            [sanitizer, *options, *exercise] if sanitizer else [],
            share=6,
            environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )
        stage.note = "" if sanitizer else "compute-sanitizer was not found"
        stages.append(stage)
    return [*stages, Stage("benchmark", [*benchmark[:3], "default", *benchmark[3:]], 12, False)]


def _sanitizer() -> str:
    beside_nvcc = shutil.which("nvcc") or ""
    folders = [os.environ.get("PATH", ""), str(Path(beside_nvcc).resolve().parent)]
    folders.append("/usr/local/cuda/bin")
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders)) or ""


# ---------------------------------------------------------------------------------------- exercise


def exercise_cases() -> list[Case]:
    """Small tensors that reach every view, vector width, head and tail of the kernels."""
    shapes = {
        "odd plane": (2, 3, 5, 7),
        "rows": (4, 16, 16, 16),
        "columns": (8, 33, 7, 7),
        "one channel": (2, 1, 64, 64),
        "many channels": (3, 300, 4, 4),
        "several blocks": (16, 8, 56, 56),
        "the whole device": (64, 1, 128, 128),
        "volume": (2, 16, 4, 6, 6),
        "signal": (4, 20, 50),
        "vector": (64, 64),
        "odd vector": (65, 3),
    }
    cases = with_layouts([Case(f"exercise/{name}", shape) for name, shape in shapes.items()])
    return with_dtypes(cases, tuple(DTYPES))


def exercise(device: str, cases: Sequence[Case]) -> list[str]:
    """Run every op on every case; returns what is wrong. The truth is computed on the CPU."""
    failures = []
    for case in cases:
        truth = make_problem(case, "cpu")
        for op in (*KERNEL_OPS, *MODULE_OPS):
            try:
                reason = _exercised(truth, op, device)
            except Exception as error:
                reason = first_line(error)
            if reason:
                failures.append(f"{case} {op}: {reason}")
                print(failures[-1], flush=True)
        if len(failures) > SHOWN_FAILURES:
            break
    return failures


def _exercised(truth: Problem, op: str, device: str) -> str | None:
    problem = _moved(truth, device)
    prepared = BatchnormExt().prepare(problem, op)
    problem.reset()
    results = prepared.read(prepared.call(0)) if prepared.read else {}
    results = {name: value.cpu() for name, value in results.items()}
    return wrong(truth, results, TRUTH_OF.get(op, op))


def _moved(problem: Problem, device: str) -> Problem:
    vectors = ("weight", "bias", "running_mean", "running_var")
    moved = {name: getattr(problem, name).to(device, copy=True) for name in vectors}
    x, dy = ([one.to(device) for one in tensors] for tensors in (problem.x, problem.dy))
    return replace(problem, device=device, x=x, dy=dy, **moved)


# -------------------------------------------------------------------------------------------- main


def summary(
    stages: Sequence[Stage], environment: dict[str, Any], budget_s: float
) -> dict[str, Any]:
    """What is written to summary.json."""
    return {
        "passed": passed(stages),
        "budget_s": budget_s,
        "environment": environment,
        "stages": [asdict(stage) for stage in stages],
    }


def passed(stages: Sequence[Stage]) -> bool:
    """Whether every stage that decides has run to its end without an error."""
    return all(stage.state == "passed" for stage in stages if stage.decides)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all stages; 0 when the build, the tests and the sanitizers passed, 3 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("out", type=Path, nargs="?", default=Path("build/gpu"))
    parser.add_argument("--budget", type=float, default=540, help="seconds (%(default)s)")
    parser.add_argument("--exercise", action="store_true", help="only run each kernel once")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        reason = f"no GPU that torch {torch.__version__} (CUDA {torch.version.cuda}) can use"
        print(f"{reason}: nothing was run", file=sys.stderr)
        if not options.exercise:
            _write(options.out, {"passed": False, "reason": reason, "stages": []})
        return EXIT_NO_GPU
    if options.exercise:
        failures = exercise("cuda", exercise_cases())
        print(f"{len(failures)} results are wrong" if failures else "every result is right")
        return 1 if failures else 0
    return run_all(options.out.resolve(), options.budget)


def run_all(out: Path, budget_s: float) -> int:
    """Build, then check and measure with what was built."""
    start = time.monotonic()
    site = ROOT / "build" / "gpu-site"
    log = out / "log.txt"
    out.mkdir(parents=True, exist_ok=True)
    log.write_text("")
    build, jit = _build_stages(site)
    checking = _checking_stages(out)
    try:
        described = describe_machine("cuda", available_threads())
    except Exception as error:  # whatever it is, it must not cost the run
        described = {"unknown": first_line(error)}

    def report(stages: Sequence[Stage]) -> Callable[[], None]:
        return lambda: _write(out, summary(stages, described, budget_s))

    # The order of the search path decides which batchnorm_ext is imported: the installed one, with
    # the checkout behind it for the benchmarks and tests.
    path = os.pathsep.join([str(site), str(ROOT)])
    variables = {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", "BATCHNORM_EXT_BACKEND": "prebuilt"}
    variables["PYTHONUNBUFFERED"] = "1"  # what is killed has said all it had to
    share = build.share / (build.share + sum(stage.share for stage in checking))
    stages = [build, *checking]
    run_stages([build], budget_s * share, {}, log, report(stages))
    if build.state != "passed":
        variables |= {"PYTHONPATH": str(ROOT), "BATCHNORM_EXT_BACKEND": "jit"}
        stages = [build, jit, *checking]
        left = budget_s - (time.monotonic() - start)
        run_stages([jit], left / 2, variables, log, report(stages))
    if "passed" in (build.state, jit.state):
        left = budget_s - (time.monotonic() - start)
        run_stages(checking, left, variables, log, report(stages))
    return 0 if passed(stages) else 1


def _write(out: Path, content: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "summary.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
