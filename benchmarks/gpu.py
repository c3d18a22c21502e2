"""What a machine with a GPU should run, in one time-boxed call: build, tests, sanitizers, timing.

``python3 -m benchmarks.gpu OUT`` needs no network and no virtual environment: the interpreter at
hand with torch, pytest and nvcc. Stages run in the order of what one would miss most; where the
kernels fail their exercise, the sanitizers come first. Each has its share of the budget, a stage
that takes less leaves the rest to those behind it, one that fails or hangs costs the others
nothing, and ``OUT/summary.json`` is up to date after every stage. ``--stages`` runs some of them.
What was compiled is kept in ``build/gpu-site`` and used again while it fits the sources.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from glob import glob
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from types import FrameType
from typing import IO, Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

import batchnorm_ext
from batchnorm_ext import _build

from .contenders import (
    KERNEL_OPS,
    MINIMUM_TRAFFIC,
    MODULE_OPS,
    TRUTH_OF,
    BatchnormExt,
    first_line,
    results_of,
    torch_module,
)
from .problem import TOLERANCE, TOLERANCE_OF_RELU, Problem, make_problem, wrong
from .results import ROOT, describe_machine
from .shapes import DTYPES, Case, scattered, with_dtypes, with_layouts
from .timing import COLD_FACTOR, available_threads, last_level_cache

EXIT_NO_GPU = 3
EXIT_LOST = 4
EXIT_WRONG = 5  # not 1, which is Python's own for an exception
GRACE_S = 15
KILLED_S = 5
SECONDS, UNTIL = "{seconds}", "{until}"
SAVING_SHARE = 0.85
BUILD_SHARE = 0.45
LOGGED_BYTES = 1 << 20
MEMORY_PER_JOB = 4 << 30
# Where packages of the toolkit and of its profiler put them; the latter, one folder a version.
TOOL_FOLDERS = ("/usr/local/cuda/bin", "/opt/nvidia/nsight-compute/*")
EXERCISE, TUNING = "exercise", "tuning"
# Peers of the layers measured first: those that need no compiling.
QUICK_CONTENDERS = ("batchnorm_ext", "floor", "torch_eager", "torch_eager_no_cudnn")
SANITIZERS = ("memcheck", "racecheck", "synccheck")
SANITIZER_ERROR = 99
NO_HAZARD, SOME_PASSED = r"SUMMARY: 0 (errors|hazards)", r"\b[1-9]\d* passed"
# Test files of their own stage: streams, graphs, processes and compilers, which can hang or end a process.
SYSTEM_TESTS = ("test_cuda.py", "test_distributed.py", "test_compile.py", "test_benchmarks.py")
# Those that come first, and the half of all tests that comes last; between them from short to long: a
# stage that overruns should have seen what matters most, and something of everything.
FIRST_TESTS = ("test_batch_norm.py", "test_running_statistics.py", "test_numerics.py")
LAST_TESTS = "test_activation.py"
WORKERS = max(1, min(8, available_threads() // 2))
# Of one test, so that one that hangs ends before its stage does. Some have a longer limit of their own.
TEST_S = 25
SITE = ROOT / "build" / "gpu-site"
SHOWN_FAILURES = 40
# Of the exercise: how long a process may take to start, its first case, which loads the kernels, and
# another, and how often one may be lost.
STARTING_S, FIRST_CASE_S, STALLED_S = 30, 60, 8
MAX_LOST = 6


@dataclass
class Stage:
    """One command and what became of it.

    Attributes
    ----------
    share
        Its part of the budget, relative to the other stages.
    command
        What is run; `SECONDS` in it stands for the time after which it should save and end, `UNTIL` for
        the same as a moment of `time.time`.
    proof
        What the end of its output must match, if given: that it did what it was to do.
    proof_file
        The file that must match it instead, if given; one left from before is removed.
    decides
        Whether the exit code depends on it.
    at_once
        Stages of one such name that follow each other run at the same time.
    state
        ``passed``, ``failed``, ``overran`` (its share of the time), ``skipped`` or ``not run``.
    """

    name: str
    command: list[str]
    share: float
    decides: bool = True
    environment: dict[str, str] = field(default_factory=dict)
    at_once: str = ""
    proof: str = ""
    proof_file: str = ""
    state: str = "not run"
    seconds: float = 0.0
    limit_s: float = 0.0
    exit_code: int | None = None
    note: str = ""
    tail: str = ""

    def run(self, limit_s: float, environment: dict[str, str], output: IO[bytes]) -> None:
        """Run the command; past the limit it is interrupted, then killed with all it started."""
        self.limit_s = round(limit_s, 1)
        start = time.monotonic()
        seconds = SAVING_SHARE * limit_s
        until = f"{time.time() + seconds:.0f}"
        command = [
            part.replace(SECONDS, f"{seconds:.0f}").replace(UNTIL, until) for part in self.command
        ]
        output.write(f"\n==== {self.name}: {' '.join(command)}\n".encode())
        output.flush()
        begin = output.tell()
        if self.proof_file:
            Path(self.proof_file).unlink(missing_ok=True)
        # It waits for a word that this process knows of it, and ends where that never comes.
        process = subprocess.Popen(
            ["sh", "-c", 'read _ && exec "$0" "$@"', *command],
            cwd=ROOT,
            env={**os.environ, **environment, **self.environment},
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        _running.add(process.pid)
        watchdog = _watchdog(process.pid)
        try:
            assert process.stdin is not None
            with suppress(BrokenPipeError), process.stdin as word:
                word.write(b"\n")
            self.exit_code = process.wait(limit_s)
            self.state = "passed" if self.exit_code == 0 else "failed"
        except subprocess.TimeoutExpired:
            self.state = "overran"
        finally:
            _end(process)
            _running.discard(process.pid)
            with watchdog:
                watchdog.kill()
        self.seconds = round(time.monotonic() - start, 1)
        self.tail = _shortened(output, begin)[-2000:].decode(errors="replace")
        found, where = self.tail, "its last words"
        if self.proof_file:
            found, where = _text_of(Path(self.proof_file)), Path(self.proof_file).name
        if self.state == "passed" and not re.search(self.proof, found):
            self.state, self.note = "failed", f"nothing in {where} matches {self.proof}"


def _shortened(output: IO[bytes], begin: int) -> bytes:
    """What a stage said, of which only its first and last words stay where it was too much."""
    output.seek(begin)
    said = output.read()
    left_out = len(said) - LOGGED_BYTES
    if left_out > 0:
        half = LOGGED_BYTES // 2
        said = said[:half] + f"\n[{left_out} bytes left out]\n".encode() + said[-half:]
        output.seek(output.truncate(begin))
        output.write(said)
        output.flush()
    return said


def _text_of(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def _watchdog(leader: int) -> subprocess.Popen[bytes]:
    """A process that kills a session once this process is gone, which may be killed itself.

    It waits for the end of its input, which nobody else holds open.
    """
    return subprocess.Popen(
        ["sh", "-c", "read _; kill -s KILL -- -$0", str(leader)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


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


# Leaders of the sessions that stages run in, which no signal to this process reaches.
_running: set[int] = set()


def _end_all(number: int, _: FrameType | None) -> NoReturn:
    for leader in tuple(_running):
        with suppress(ProcessLookupError):
            os.killpg(leader, signal.SIGKILL)
    os._exit(128 + number)


def run_stages(
    stages: Sequence[Stage],
    budget_s: float,
    environment: dict[str, str],
    log: Path,
    finished: Callable[[], None],
) -> None:
    """Run stages in turn, each for at most its share of the time left; `finished` after each."""
    deadline = time.monotonic() + budget_s
    shares = sum(stage.share for stage in stages)
    for group in _groups(stages):
        left = deadline - time.monotonic()
        share = sum(stage.share for stage in group)
        if left <= GRACE_S:
            for stage in group:
                stage.state, stage.note = "skipped", "the budget was spent"
        else:
            _run_together(group, left * share / shares, environment, log)
        shares -= share
        for stage in group:
            print(
                f"{stage.name}: {stage.state} after {stage.seconds:.0f} s {stage.note}", flush=True
            )
            finished()


def _groups(stages: Sequence[Stage]) -> list[list[Stage]]:
    """Stages that run at once, in their order; most of them alone."""
    keyed = groupby(enumerate(stages), lambda pair: pair[1].at_once or pair[0])
    return [[stage for _, stage in pairs] for _, pairs in keyed]


def _run_together(
    group: Sequence[Stage], limit_s: float, environment: dict[str, str], log: Path
) -> None:
    runnable = [stage for stage in group if stage.command]
    for stage in group:
        if stage.command:
            print(f"{stage.name}: up to {limit_s:.0f} s", flush=True)
        else:
            stage.state = "skipped"
    with ExitStack() as opened:
        output = opened.enter_context(log.open("ab+"))
        if len(runnable) == 1:  # into the log at once: what comes next may be the end of all
            runnable[0].run(limit_s, environment, output)
            return
        outputs = [opened.enter_context(tempfile.TemporaryFile()) for _ in runnable]
        threads = [
            threading.Thread(target=stage.run, args=(limit_s, environment, own))
            for stage, own in zip(runnable, outputs, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread, own in zip(threads, outputs, strict=True):
            thread.join()
            own.seek(0)
            shutil.copyfileobj(own, output)


# ------------------------------------------------------------------------------------------ stages


def _jobs() -> int:
    """Compiler processes at once: as many as processors, or as memory is there for.

    Half the processors anyway: a virtual machine may get its memory only as it is used.
    """
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    threads = available_threads()
    return max(1, threads // 2, min(threads, memory // MEMORY_PER_JOB))


def _build_stages() -> tuple[Stage, Stage]:
    """Compile and install into `SITE`; and, for where that fails, compile at first use."""
    major, minor = torch.cuda.get_device_capability()
    compiling = {
        "FORCE_CUDA": "1",
        "TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST", f"{major}.{minor}"),
        "MAX_JOBS": os.environ.get("MAX_JOBS", str(_jobs())),
    }
    pip = [sys.executable, "-m", "pip", "install", "--verbose", "--no-build-isolation"]
    pip += ["--no-deps", "--no-index", "--upgrade", "--target", str(SITE), str(ROOT)]
    load = "import batchnorm_ext; batchnorm_ext.load(verbose=True)"
    return (
        Stage("build", pip, share=1, environment=compiling),
        Stage("jit", [sys.executable, "-c", load], share=1, environment=compiling),
    )


def _is_built() -> bool:
    """Whether `SITE` has what compiling would put there."""
    stamp = _build.read_stamp(SITE / "batchnorm_ext" / "_C.json")
    if stamp is None or not stamp.cuda:
        return False
    problem = stamp.mismatch(torch.__version__, torch.version.cuda or "", _build.source_hash())
    return problem is None and _build.covers(stamp.arch_list, torch.cuda.get_device_capability())


def _checking_stages(out: Path) -> list[Stage]:
    """What runs on the built package. A tool that is not installed cannot pass.

    Shares are the seconds that a stage may take of 540, where two minutes went into the build.
    """
    python = sys.executable
    itself = [python, "-m", "benchmarks.gpu"]
    measured = ["--device", "cuda", "--no-plots", "--output", str(out), "--time-budget", SECONDS]
    benchmark = [python, "-m", "benchmarks"]
    limits = [python, "-m", "benchmarks.device_limits", str(out / "device_limits.json")]
    layers = ["layers", "--set", "resnet50", "edges", "--batch", "256"]
    layers += ["--dtype", "bfloat16", "float32", "--cache", "cold"]
    layers += ["--contenders", *QUICK_CONTENDERS]
    paths = sorted((ROOT / "tests").glob("test_*.py"), key=lambda path: path.stat().st_size)
    between = [p.name for p in paths if p.name not in (*SYSTEM_TESTS, *FIRST_TESTS, LAST_TESTS)]
    # Of many processes, each; compilers would start as many again.
    one_thread = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    stages = [
        Stage(EXERCISE, [*itself, "--exercise", "--until", UNTIL], share=50),
        Stage("device-limits", limits, share=50, decides=False),
        Stage("layers", [*benchmark, *layers, *measured], share=76, decides=False),
        Stage(
            "tests",
            _pytest([*FIRST_TESTS, *between, LAST_TESTS]),
            share=65,
            environment=one_thread,
            proof=SOME_PASSED,
        ),
        Stage(
            "system-tests",
            _pytest(SYSTEM_TESTS),
            share=70,
            environment=one_thread,
            proof=SOME_PASSED,
        ),
    ]
    sanitizer = _tool("compute-sanitizer")
    for tool in SANITIZERS:
        # Torch's own kernels are not what is looked at, nor errors of the API that it handles itself.
        options = ["--tool", tool, "--error-exitcode", str(SANITIZER_ERROR)]
        options += ["--kernel-name", "kns=batchnorm_ext", "--report-api-errors", "no"]
        # Without the last, it gives up on a program that takes long to import torch.
        options += ["--launch-timeout", "0"]
        stage = Stage(
            tool,
            [sanitizer, *options, *_exercise_command(0, UNTIL)] if sanitizer else [],
            share=21,
            proof=NO_HAZARD,
            environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", **one_thread},
            at_once="sanitizers",
        )
        stage.note = "" if sanitizer else "compute-sanitizer was not found"
        stages.append(stage)
    profiler = _tool("ncu")
    table = str(out / "traffic.csv")
    # With the cache as it is: what launches of a call leave there to the next is part of the call.
    counted = ["--clock-control", "none", "--cache-control", "none"]
    counted += ["--csv", "--print-units", "base", "--log-file", table]
    counted += ["--metrics", ",".join(COUNTERS), "--kernel-name-base", "demangled"]
    counted += ["--kernel-name", "regex:.*batchnorm_ext.*", *itself, "--traffic"]
    traffic = Stage("traffic", [profiler, *counted] if profiler else [], share=28, decides=False)
    traffic.note = "" if profiler else "ncu was not found"
    # A profiler that may not read the counters runs the program all the same, and ends with 0.
    traffic.proof, traffic.proof_file = rf'"{re.escape(COUNTERS[0])}",', table
    stages += [traffic, Stage("benchmark", [*benchmark, "default", *measured], 18, False)]
    tuning = [python, "-m", "benchmarks.tuning", str(out / "tuning.json")]
    return [*stages, Stage(TUNING, [*tuning, "--time-budget", SECONDS], 100, False)]


def _pytest(files: Iterable[str]) -> list[str]:
    """Each test's name before it runs, and where one hangs: a log that ends early says why.

    In several processes, since most of a test is its oracle, on the CPU. Where a test hangs or costs
    one of them the device, another takes its place. What a test waits for before it begins, so that
    large ones take turns, is no part of its time.
    """
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--maxfail=40"]
    command += ["-p", "no:cacheprovider", "-o", f"faulthandler_timeout={TEST_S * 2 // 3}"]
    if find_spec("xdist"):
        command += ["-n", str(WORKERS), "--max-worker-restart", "16"]
    if find_spec("pytest_timeout"):
        command += ["--timeout", str(TEST_S), "--timeout-method", "thread"]
        command += ["-o", "timeout_func_only=true"]
    return [*command, *(f"tests/{name}" for name in files)]


def _tool(name: str) -> str:
    beside_nvcc = shutil.which("nvcc") or ""
    folders = [os.environ.get("PATH", ""), str(Path(beside_nvcc).resolve().parent)]
    for pattern in TOOL_FOLDERS:
        folders += sorted(glob(pattern), reverse=True)
    return shutil.which(name, path=os.pathsep.join(folders)) or ""


# ---------------------------------------------------------------------------------------- exercise


class Fused(NamedTuple):
    """A fused call: its activation, whether it has a residual, overwrites its input, trains."""

    activation: str
    residual: bool = False
    inplace: bool = False
    training: bool = True


FUSED = (
    Fused("relu", residual=True),
    Fused("silu"),
    Fused("elu", inplace=True),
    Fused("leaky_relu", residual=True),
    Fused("relu", residual=True, training=False),
    Fused("hardswish", residual=True),
    Fused("leaky_relu", inplace=True),
    Fused("identity", residual=True),
)
FUSED_OF_A_CASE = 3
VECTORS = ("weight", "bias", "running_mean", "running_var")


def exercise_cases() -> list[Case]:
    """Small tensors that reach every view, vector width, head and tail of the kernels.

    In an order of which each beginning has some of everything.
    """
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
    in_turn = with_layouts([Case("exercise/groups in turn", (24, 12, 112, 112))])
    return scattered(
        [*with_dtypes(cases, tuple(DTYPES)), *with_dtypes(in_turn, ("float32", "bfloat16"))]
    )


def exercise(
    device: str, cases: Sequence[Case], first: int = 0, until: float = float("inf")
) -> list[str]:
    """Run every op on every case; returns what is wrong. The truth is torch's arithmetic in float64.

    Ends at `until`, a moment of `time.time`: what it takes to start a process, long under a
    sanitizer, is part of the time that there is.

    Raises
    ------
    DeviceLost
        An error after which no kernel runs in this process.
    """
    failures = []
    for index in range(first, len(cases)):
        if time.time() > until:
            reason = f"no time for the last {len(cases) - index} of {len(cases)} cases"
            print(reason, flush=True)
            return failures if index > first else [reason]
        case = cases[index]
        print(f"case {index}: {case}", flush=True)
        try:
            calls = _exercises(make_problem(case, device), index)
        except Exception as error:  # out of memory, say
            calls = [("data", partial(first_line, error))]
        for name, run in calls:
            try:
                reason = run()
            except Exception as error:
                reason = first_line(error)
            if reason:
                failures.append(f"{case} {name}: {reason}")
                print(failures[-1], flush=True)
                _still_there(device)
        if len(failures) > SHOWN_FAILURES:
            break
    return failures


def _exercises(truth: Problem, index: int) -> list[tuple[str, Callable[[], str | None]]]:
    """Names of calls, and the calls, each of which says what is wrong."""
    fused = [FUSED[(FUSED_OF_A_CASE * index + i) % len(FUSED)] for i in range(FUSED_OF_A_CASE)]
    return [
        *((op, partial(_exercised, truth, op)) for op in (*KERNEL_OPS, *MODULE_OPS)),
        ("cumulative average", partial(_exercised_cumulative, truth)),
        *((str(one), partial(_exercised_fused, truth, one)) for one in fused),
    ]


class DeviceLost(Exception):
    """No kernel runs in this process any more."""


def _still_there(device: str) -> None:
    if device != "cuda":
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        raise DeviceLost(first_line(error)) from None


def exercise_in_processes(until: float) -> int:
    """Exercise all cases; one that hangs or costs the process its device costs no other case."""
    first, lost, failed = 0, 0, time.time() >= until
    count = len(exercise_cases())
    while first < count and lost <= MAX_LOST and time.time() < until:
        process = subprocess.Popen(
            _exercise_command(first, str(until)),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        last = _watched(process)
        if process.returncode in (0, EXIT_WRONG):
            failed = failed or process.returncode == EXIT_WRONG
            break
        print(f"case {last} ended its process: {process.returncode}", flush=True)
        first, lost, failed = max(first, last + 1), lost + 1, True
    return 1 if failed else 0


def _exercise_command(first: int, until: str) -> list[str]:
    own = ["--exercise-from", str(first), "--until", until]
    return [sys.executable, "-m", "benchmarks.gpu", *own]


def _watched(process: subprocess.Popen[str]) -> int:
    """Pass on what a process says, and kill it when it says nothing; the last case it named."""
    last, cases = -1, 0
    assert process.stdout is not None
    timer = threading.Timer(STARTING_S, process.kill)
    timer.start()
    for line in process.stdout:
        print(line, end="", flush=True)
        if line.startswith("case "):
            last, cases = int(line.split(":")[0].split()[1]), cases + 1
        timer.cancel()
        limit_s = (STARTING_S, FIRST_CASE_S, STALLED_S)[min(cases, 2)]
        timer = threading.Timer(limit_s, process.kill)
        timer.start()
    timer.cancel()
    process.wait()
    return last


def _exercised(truth: Problem, op: str) -> str | None:
    problem = _with_own_vectors(truth)
    prepared = BatchnormExt().prepare(problem, op)
    problem.reset()
    return wrong(truth, results_of(prepared, op), TRUTH_OF.get(op, op))


def _exercised_cumulative(truth: Problem) -> str | None:
    """Two batches alike: their average is each of them."""
    problem = _with_own_vectors(truth)
    module = batchnorm_ext.convert_batchnorm(torch_module(problem))
    module.momentum = None
    for _ in range(2):
        module(problem.x[0])
    if module.num_batches_tracked.item() != 2:
        return f"num_batches_tracked is {module.num_batches_tracked.item()}, not 2"
    wide = truth.x[0].double().transpose(0, 1).flatten(1)
    expected = {"running_mean": wide.mean(1), "running_var": wide.var(1)}
    actual = {name: getattr(module, name) for name in expected}
    return _differs(actual, expected, TOLERANCE[truth.case.dtype])


def _exercised_fused(truth: Problem, fused: Fused) -> str | None:
    """Output and gradients against torch's operators in float64."""
    problem = _with_own_vectors(truth)
    vectors = {name: getattr(truth, name).double() for name in VECTORS}
    wide = replace(truth, x=[truth.x[0].double()], dy=[truth.dy[0].double()], **vectors)

    def ours(*given: Any, residual: Tensor | None) -> Tensor:
        options = {"activation": fused.activation, "inplace": fused.inplace}
        return batchnorm_ext.functional.batch_norm_act(*given, residual=residual, **options)

    def theirs(*given: Any, residual: Tensor | None) -> Tensor:
        with torch.backends.cudnn.flags(enabled=False):
            y = F.batch_norm(*given)
        y = y if residual is None else y + residual
        return y if fused.activation == "identity" else getattr(F, fused.activation)(y)

    actual, expected = (
        _fused_results(function, one, fused) for function, one in ((ours, problem), (theirs, wide))
    )
    return _differs(actual, expected, TOLERANCE_OF_RELU[truth.case.dtype])


def _fused_results(
    function: Callable[..., Tensor], problem: Problem, fused: Fused
) -> dict[str, Tensor]:
    p = problem
    leaves = {"x": p.x[0], "weight": p.weight, "bias": p.bias}
    if fused.residual:
        leaves["residual"] = p.dy[0].flip(0)
    wanted = {name: tensor.detach().requires_grad_() for name, tensor in leaves.items()}
    x = wanted["x"] * 1.0  # what calls in place may overwrite
    y = function(
        *(x, p.running_mean.clone(), p.running_var.clone(), wanted["weight"], wanted["bias"]),
        *(fused.training, p.momentum, p.eps),
        residual=wanted.get("residual"),
    )
    output = y.detach().clone()
    gradients = torch.autograd.grad(y, list(wanted.values()), p.dy[0])
    return {"y": output} | {f"d{name}": g for name, g in zip(wanted, gradients, strict=True)}


def _differs(
    actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float
) -> str | None:
    for name, wanted in expected.items():
        difference = actual[name].double() - wanted
        error = float(difference.norm() / wanted.norm().clamp_min(1e-300))
        if not error <= tolerance:
            return f"{name} is off by {error:.1e}, allowed {tolerance:.0e}"
    return None


def _with_own_vectors(problem: Problem) -> Problem:
    return replace(problem, **{name: getattr(problem, name).clone() for name in VECTORS})


# ----------------------------------------------------------------------------------------- traffic

COUNTERS = ("dram__bytes_read.sum", "dram__bytes_write.sum", "gpu__time_duration.sum")


def traffic_cases() -> list[Case]:
    """One tensor for each way a channel is held on the chip or not, most of them larger than any cache."""
    shapes = {
        "clusters": (128, 256, 28, 28),
        "large clusters": (256, 2048, 7, 7),
        "grid": (256, 64, 112, 112),
        "huge planes": (4, 128, 1024, 1024),
    }
    contiguous = with_dtypes([Case(f"traffic/{n}", s) for n, s in shapes.items()], ("bfloat16",))
    last = Case("traffic/channels last", (32, 64, 56, 56), "bfloat16", "channels_last")
    residue = Case("traffic/residue", (256, 64, 56, 56), "bfloat16", "channels_last")
    streaming = Case("traffic/streaming", (256, 64, 112, 112), "bfloat16", "channels_last")
    return [*contiguous, last, residue, streaming]


def traffic() -> None:
    """Each op of each case, for a profiler that counts what memory moves; says the least it may be.

    What backward needs of forward runs before the line that names it. The profiler leaves the cache
    alone, which is swept before each call instead: by reading, so that no line of it is left to be
    written back at the call's expense. What a call leaves there to be written is not counted.
    """
    sweep = torch.zeros(COLD_FACTOR * last_level_cache("cuda") // 4, device="cuda")
    for case in traffic_cases():
        problem = make_problem(case, "cuda")
        for op in ("forward", "backward", "eval"):
            prepared = BatchnormExt().prepare(problem, op)
            sweep.sum()
            torch.cuda.synchronize()
            print(f"{case} {op}: at least {MINIMUM_TRAFFIC[op] * case.bytes} bytes", flush=True)
            prepared.call(0)
        torch.cuda.synchronize()


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
    parser.add_argument("--stages", nargs="+", metavar="NAME", help="only these (all but tuning)")
    parser.add_argument("--exercise", action="store_true", help="only run each kernel once")
    parser.add_argument("--exercise-from", type=int, metavar="CASE", help="in this process")
    parser.add_argument("--until", type=float, default=float("inf"), help="end of an exercise")
    parser.add_argument("--traffic", action="store_true", help="only large calls, for a profiler")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        reason = f"no GPU that torch {torch.__version__} (CUDA {torch.version.cuda}) can use"
        print(f"{reason}: nothing was run", file=sys.stderr)
        if not (options.exercise or options.traffic or options.exercise_from is not None):
            _write(options.out, {"passed": False, "reason": reason, "stages": []})
        return EXIT_NO_GPU
    if options.traffic:
        traffic()
        return 0
    if options.exercise:
        return exercise_in_processes(options.until)
    if options.exercise_from is not None:
        try:
            failures = exercise("cuda", exercise_cases(), options.exercise_from, options.until)
        except DeviceLost as error:
            print(f"the device is lost: {error}", flush=True)
            os._exit(EXIT_LOST)  # what is left to do for the device would only fail
        print(f"failures: {len(failures)}" if failures else "every result is right")
        return EXIT_WRONG if failures else 0
    out = options.out.resolve()
    stages = _checking_stages(out)
    names = [stage.name for stage in stages]
    unknown = set(options.stages or ()).difference(names)
    if unknown:
        parser.error(f"no stage {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    wanted = options.stages or [name for name in names if name != TUNING]
    chosen = [stage for stage in stages if stage.name in wanted]
    return run_all(out, options.budget, chosen)


def run_all(out: Path, budget_s: float, checking: Sequence[Stage]) -> int:
    """Build, then check and measure with what was built."""
    start = time.monotonic()
    signal.signal(signal.SIGTERM, _end_all)
    log = out / "log.txt"
    out.mkdir(parents=True, exist_ok=True)
    log.write_text("")
    build, jit = _build_stages()
    try:
        described = describe_machine("cuda", available_threads())
    except Exception as error:  # whatever it is, it must not cost the run
        described = {"unknown": first_line(error)}
    # The checkout's Python, and of what was installed the native module.
    path = _python_path(ROOT, SITE)
    variables = {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", "BATCHNORM_EXT_BACKEND": "prebuilt"}
    variables["PYTHONUNBUFFERED"] = "1"  # what is killed has said all it had to
    building = [build]
    if _is_built():
        build.state, build.note = "passed", "built earlier"

    def report() -> None:
        _write(out, summary([*building, *checking], described, budget_s))

    def run(stages: Sequence[Stage], share: float, variables: dict[str, str]) -> None:
        left = budget_s - (time.monotonic() - start)
        run_stages(stages, share * left, variables, log, report)

    while build.state in ("not run", "overran"):  # it goes on from the objects that there are
        run([build], BUILD_SHARE, {})
    if build.state == "failed":
        building.append(jit)
        variables |= {"PYTHONPATH": _python_path(ROOT), "BATCHNORM_EXT_BACKEND": "jit"}
        variables |= jit.environment  # or later stages would look for a module of other settings
        run([jit], BUILD_SHARE, variables)
    if "passed" in (build.state, jit.state):
        exercising = [stage for stage in checking if stage.name == EXERCISE]
        others = [stage for stage in checking if stage.name != EXERCISE]
        shares = [sum(stage.share for stage in stages) for stages in (exercising, others)]
        run(exercising, shares[0] / sum(shares), variables)
        if any(stage.state != "passed" for stage in exercising):
            others.sort(key=lambda stage: stage.name not in SANITIZERS)
        run(others, 1.0, variables)
    return 0 if passed([*building, *checking]) else 1


def _python_path(*folders: Path) -> str:
    """These folders, before those that the variable has."""
    inherited = os.environ.get("PYTHONPATH")
    return os.pathsep.join([*map(str, folders), *([inherited] if inherited else [])])


def _write(out: Path, content: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "summary.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
