"""The command line: what each subcommand measures, and what it leaves behind."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from . import peers
from .accuracy import accuracy_tasks
from .contenders import (
    FUSED_OPS,
    KERNEL_OPS,
    BatchnormExt,
    BatchnormExtFused,
    Contender,
    Floor,
    OneDnn,
    TorchCompile,
    TorchEager,
    TorchEagerNoCudnn,
)
from .measure import launches_task, layer_tasks, overhead_tasks, scaling_tasks
from .memory import memory_tasks
from .report import render, render_comparison
from .requirement import Requirement, unmet
from .results import CONTENDERS, RESULTS, Record, describe_environment, results_path
from .session import Session, Task
from .shapes import (
    DTYPES,
    LAYOUTS,
    Case,
    cpu_set,
    gpu_set,
    resnet50,
    scattered,
    sets,
    spread,
    sweep,
    with_dtypes,
    with_layouts,
)
from .timing import available_threads, settle_allocator
from .training import model_tasks

EXIT_FAILED = 1
EXIT_REQUIREMENT = 2
EXIT_INTERRUPTED = 130

ALL_CONTENDERS: tuple[type[Contender], ...] = (
    *(BatchnormExt, BatchnormExtFused, Floor, TorchEager, TorchEagerNoCudnn, TorchCompile, OneDnn),
    *(peers.Apex, peers.InplaceAbn, peers.Jax),
)


def default_tasks(options: argparse.Namespace) -> list[Task]:
    """A little of everything: what fits five minutes and ends in a table and all plots."""
    if options.device == "cuda":
        shapes = spread(gpu_set(), 30)
    else:
        layers = spread(with_layouts(resnet50(8)), 6)
        shapes = [*with_dtypes(layers, ("float32", "bfloat16")), *spread(cpu_set(), 10)]
    batch, size = (64, 224) if options.device == "cuda" else (2, 160)
    return [
        *layer_tasks(scattered(shapes)),
        *layer_tasks(spread(shapes, 6), FUSED_OPS),
        *overhead_tasks(),
        *accuracy_tasks(),
        *memory_tasks(options.device),
        *model_tasks(batch, size, "float32", "contiguous"),
    ]


def layers_tasks(options: argparse.Namespace) -> list[Task]:
    """The chosen sets in the chosen dtypes and layouts; scaling with the cpu set."""
    named = sets(options.batch)
    chosen: list[Case] = []
    for name in options.set or [{"cpu": "cpu", "cuda": "gpu"}[options.device]]:
        cases = named[name]
        if options.dtype and name not in ("cpu", "gpu"):
            cases = with_dtypes(cases, options.dtype)
        chosen += cases
    chosen = [
        case
        for case in chosen
        if (not options.dtype or case.dtype in options.dtype)
        and (not options.layout or case.layout in options.layout)
    ]
    if options.sample:
        chosen = spread(chosen, options.sample)
    tasks = layer_tasks(scattered(chosen), tuple(options.op or KERNEL_OPS))
    if options.device == "cpu" and options.scaling:
        tasks += scaling_tasks(options.threads)
    return tasks


def sweep_tasks(options: argparse.Namespace) -> list[Task]:
    cases = with_dtypes(with_layouts(sweep()), options.dtype or ("float32",))
    return layer_tasks(cases, tuple(options.op or KERNEL_OPS))


MEASURING: dict[str, tuple[Callable[[argparse.Namespace], list[Task]], float, str]] = {
    "default": (default_tasks, 300, "a little of everything, in five minutes"),
    "layers": (layers_tasks, 1500, "layers of networks: forward, backward, eval"),
    "sweep": (sweep_tasks, 300, "N, C and HW, each over three decades"),
    "overhead": (lambda options: overhead_tasks(), 90, "module calls on tiny tensors"),
    "memory": (lambda options: memory_tasks(options.device), 120, "saved and peak bytes"),
    "accuracy": (lambda options: accuracy_tasks(), 120, "errors against float64"),
    "model": (
        lambda options: model_tasks(
            options.batch, options.size, (options.dtype or ["float32"])[0], options.layout[0]
        ),
        240,
        "a training step of ResNet-50: time and memory",
    ),
}


def parser() -> argparse.ArgumentParser:
    """The command line of ``python -m benchmarks``."""
    top = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure batch norm beside torch's and other packages'. Without a subcommand: "
        "a five-minute run that ends in a table and plots.",
    )
    commands = top.add_subparsers(dest="command", metavar="subcommand")
    for name, (_, budget, text) in MEASURING.items():
        _measuring_arguments(commands.add_parser(name, help=text, description=text), name, budget)
    report = commands.add_parser("report", help="render a file, or compare two")
    report.add_argument("results", type=Path, help="file to render")
    report.add_argument("newer", type=Path, nargs="?", help="file to compare with the first")
    report.add_argument("--output", type=Path, help="folder for report and plots")
    report.add_argument("--no-plots", action="store_true")
    report.add_argument("--require", action="append", type=Requirement.parse, default=[])
    return top


def _measuring_arguments(command: argparse.ArgumentParser, name: str, budget: float) -> None:
    add = command.add_argument
    add("--device", choices=("cpu", "cuda"), default="cuda" if _has_cuda() else "cpu")
    add("--time-budget", type=float, default=budget, metavar="S", help="seconds (%(default)s)")
    add("--seed", type=int, default=0, help="of data and of the order of rounds")
    add("--threads", type=int, default=available_threads(), help="CPU threads (%(default)s)")
    add("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="NAME")
    add("--cache", nargs="+", choices=("cold", "hot"), help="cold and hot on CUDA, hot on a CPU")
    add("--output", type=Path, help="folder for results, report and plots (benchmarks/results)")
    add("--no-plots", action="store_true")
    add(
        "--require",
        action="append",
        type=Requirement.parse,
        default=[],
        metavar="OP<=RATIO:CONTENDER",
        help="fail unless the geometric mean of our time over a contender's is at most RATIO; "
        "'worst:OP<=RATIO:CONTENDER' holds every single case to it",
    )
    if name in ("layers", "sweep", "model"):
        add("--dtype", nargs="+", choices=tuple(DTYPES))
        add("--batch", type=int, default=32 if _has_cuda() else 8)
    if name in ("layers", "sweep"):
        add("--op", nargs="+", choices=(*KERNEL_OPS, *FUSED_OPS))
    if name == "layers":
        add("--layout", nargs="+", choices=LAYOUTS)
        add("--set", nargs="+", choices=tuple(sets(1)), help="default: the set of the device")
        add("--sample", type=int, metavar="K", help="K cases spread over the sets")
        add("--scaling", action="store_true", help="threads and batches too")
    if name == "model":
        add("--layout", nargs=1, choices=LAYOUTS, default=["contiguous"])
        add("--size", type=int, default=224, help="height and width of the images")


def _has_cuda() -> bool:
    return torch.cuda.is_available()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or (given[0].startswith("-") and given[0] not in ("-h", "--help")):
        given.insert(0, "default")
    options = parser().parse_args(given)
    return _report(options) if options.command == "report" else _measure(options)


def _report(options: argparse.Namespace) -> int:
    try:
        record, *newer = (Record.load(one) for one in (options.results, options.newer) if one)
    except (OSError, ValueError) as error:
        print(f"cannot read results: {error}", file=sys.stderr)
        return 1
    if newer:
        print(render_comparison(record, *newer))
        return 0
    print(_write_report(record, options.output or options.results.parent, options.no_plots))
    return _check(record, options.require)


def _measure(options: argparse.Namespace) -> int:
    torch.set_num_threads(options.threads)
    settle_allocator()
    environment = describe_environment(options.device, options.threads, options.seed)
    start = time.monotonic()  # the native module is there, if it had to be compiled first
    session = start_session(options, Record(environment))
    path = results_path(environment, options.output or RESULTS)
    before = Record.load(path) if path.exists() else Record(environment)
    tasks = MEASURING[options.command][0](options)
    if options.device == "cuda":
        tasks.append(launches_task(tasks))
    left = options.time_budget - (time.monotonic() - start)
    session.run(tasks, left, lambda: before.merged(session.record).save(path))
    merged = before.merged(session.record)
    merged.save(path)
    print(_write_report(merged, path.parent, options.no_plots))
    if session.skipped:
        print(f"warning: the budget ended before {len(session.skipped)} tasks", end="")
        print(f" ({session.skipped[0]}, ...); --time-budget gives more")
    print(f"results: {path}")
    if session.interrupted:
        print("interrupted: what was measured until then is kept")
        return EXIT_INTERRUPTED
    if session.failed:
        print(f"{len(session.failed)} tasks failed, {session.failed[0]}", file=sys.stderr)
        return EXIT_FAILED
    return _check(session.record, options.require)


def start_session(options: argparse.Namespace, record: Record) -> Session:
    """A session with the contenders that this machine has; the others are recorded as missing."""
    contenders = {}
    for kind in ALL_CONTENDERS:
        if kind.name not in options.contenders or options.device not in kind.devices:
            continue
        contender = kind()
        reason = contender.missing()
        if reason is None:
            contenders[kind.name] = contender
        else:
            record.missing.append({"contender": kind.name, "reason": reason})
    caches = options.cache or (("cold", "hot") if options.device == "cuda" else ("hot",))
    return Session(
        options.device, options.threads, record, contenders, seed=options.seed, caches=caches
    )


def _write_report(record: Record, folder: Path, no_plots: bool) -> str:
    """Write report.md and the plots beside the results; returns the report for the terminal."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").write_text(render(record) + "\n")
    text = render(record, tables=False)
    if not no_plots:
        try:
            from .plots import draw_all
        except ImportError as error:
            return f"{text}\n\nno plots: {error}"
        draw_all(record, folder / "plots")
    return text


def _check(record: Record, requirements: Sequence[Requirement]) -> int:
    failures = unmet(record, requirements)
    for failure in failures:
        print(f"required: {failure}", file=sys.stderr)
    return EXIT_REQUIREMENT if failures else 0
