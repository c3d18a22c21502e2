"""Timing one op of one case for all contenders, as rows of the record."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch

from .contenders import (
    FUSED_OPS,
    KERNEL_OPS,
    MINIMUM_TRAFFIC,
    MODULE_OPS,
    NO_GRAD_OPS,
    first_line,
    verified,
)
from .problem import make_problem
from .session import Session, Task
from .shapes import Case, scaling, tiny
from .stats import Summary, ratio_of_medians, summarize
from .timing import (
    Call,
    Sampler,
    cold_buffers,
    count_launches,
    interleave,
    is_cold_anyway,
    sampler_for,
    thread_counts,
)

OURS = "batchnorm_ext"
LAUNCHES_SHARE = 0.1
BATCHES = (1, 4, 16, 64, 256)


def layer_tasks(
    cases: list[Case], ops: tuple[str, ...] = KERNEL_OPS, threads: int | None = None
) -> list[Task]:
    """One task for each case and op; large tensors get more of the time."""
    return [
        Task(
            f"{case} {op}",
            lambda session, seconds, case=case, op=op: measure(session, case, op, seconds, threads),
            weight=1.0 + min(4.0, case.bytes / (32 << 20)),
        )
        for case in cases
        for op in ops
    ]


def overhead_tasks() -> list[Task]:
    """Whole module calls on tensors so small that the call itself is the cost."""
    return layer_tasks(tiny(), MODULE_OPS)


def scaling_tasks(threads: int) -> list[Task]:
    """Out-of-cache tensors at each thread count, and one layer over the batch."""
    tasks: list[Task] = []
    for count in thread_counts(threads):
        tasks += layer_tasks(scaling(), ("forward", "backward"), count)
    layer = scaling()[0]
    batches = [
        replace(layer, name="scaling/batch", shape=(batch, *layer.shape[1:])) for batch in BATCHES
    ]
    return tasks + layer_tasks(batches, ("forward",))


def launches_task(tasks: Sequence[Task]) -> Task:
    """What comes behind all timing, since in a process that was profiled launches take longer."""
    weight = LAUNCHES_SHARE * sum(task.weight for task in tasks)
    return Task("launches of our calls", record_launches, weight)


def record_launches(session: Session, seconds: float) -> None:
    """Add what a call of ours puts on the device to its rows, each call once, as far as the time goes."""
    deadline = time.monotonic() + seconds
    counts: dict[tuple[Case, str], int | None] = {}
    for row in session.record.rows:
        if row["contender"] != OURS or row["op"] not in MINIMUM_TRAFFIC:
            continue
        case = Case(row["case"], tuple(row["shape"]), row["dtype"], row["layout"])
        what = (case, row["op"])
        if what not in counts and time.monotonic() < deadline:
            counts[what] = _launches(session, case, row["op"])
        if counts.get(what):
            row["launches"] = counts[what]


def measure(
    session: Session, case: Case, op: str, seconds: float, threads: int | None = None
) -> None:
    """Verify, then time every contender on one op of one case, in each state of the cache."""
    touched = case.bytes * MINIMUM_TRAFFIC[op]
    sweeps_cache = session.device == "cpu" and is_cold_anyway(touched, session.device)
    caches = ("cold",) if sweeps_cache else session.caches
    torch.set_num_threads(threads or session.threads)
    try:
        for cache in caches:
            deadline = time.monotonic() + seconds / len(caches)
            rotate = cache == "cold" and not sweeps_cache
            buffers = cold_buffers(touched, session.device) if rotate else 1
            problem = make_problem(case, session.device, buffers, session.seed)
            outcome = verified(session.affordable(seconds / len(caches)), problem, op)
            deadline += session.prepared(outcome)
            for name, reason in outcome.excluded.items():
                exclude(session, name, case, op, reason)
            calls = {name: prepared.call for name, prepared in outcome.ready.items()}
            left = deadline - time.monotonic()
            time_calls(session, case, op, cache, calls, left, buffers=buffers)
    finally:
        torch.set_num_threads(session.threads)


def exclude(session: Session, contender: str, case: Case, op: str, reason: str) -> None:
    """Record that a contender is left out of one measurement, and why."""
    session.record.excluded.append(
        {"contender": contender, "case": str(case), "op": op, "reason": reason}
    )


def time_calls(
    session: Session,
    case: Case,
    op: str,
    cache: str,
    calls: Mapping[str, Call],
    seconds: float,
    *,
    buffers: int = 1,
    bytes_min: int | None = None,
) -> None:
    """Time calls in interleaved rounds and record a row for each contender."""
    with torch.set_grad_enabled(op not in NO_GRAD_OPS):
        samplers = _samplers(session, case, op, calls, buffers)
        if not samplers:
            return
        samples = interleave(samplers, seconds, session.order)
    times = {name: _microseconds(summarize(found)) for name, found in samples.items()}
    for name, found in samples.items():
        extra: dict[str, Any] = {}
        if name != OURS and OURS in samples:
            ratio = ratio_of_medians(found, samples[OURS], session.seed)
            extra |= zip(("ratio", "ratio_low", "ratio_high"), map(_digits, ratio), strict=True)
        if session.device != "cuda":
            extra["threads"] = torch.get_num_threads()
        if case.count > 1:
            extra["count"] = case.count
        session.record.add_row(
            case=case.name,
            shape=list(case.shape),
            dtype=case.dtype,
            layout=case.layout,
            op=op,
            cache=cache,
            contender=name,
            **times[name],
            rounds=len(found),
            bytes_min=bytes_min or case.bytes * MINIMUM_TRAFFIC[op],
            floor_us=times["floor"]["median_us"] if "floor" in times else None,
            **extra,
        )


def _samplers(
    session: Session, case: Case, op: str, calls: Mapping[str, Call], buffers: int
) -> dict[str, Sampler]:
    make = sampler_for(session.device, host=op not in (*KERNEL_OPS, *FUSED_OPS))
    samplers: dict[str, Sampler] = {}
    for name, call in calls.items():
        try:
            samplers[name] = make(call, buffers)
        except Exception as error:  # for instance a call that a CUDA graph cannot hold
            exclude(session, name, case, op, f"cannot be timed: {first_line(error)}")
    return samplers


def _launches(session: Session, case: Case, op: str) -> int | None:
    """What `count_launches` finds; None where there is no profiler."""
    with suppress(Exception), torch.set_grad_enabled(op not in NO_GRAD_OPS):
        problem = make_problem(case, session.device, seed=session.seed)
        return count_launches(session.contenders[OURS].prepare(problem, op).call)
    return None


def _microseconds(summary: Summary) -> dict[str, float]:
    names = ("median_us", "p10_us", "p90_us")
    return dict(zip(names, (_digits(1e6 * value) for value in summary), strict=True))


def _digits(value: float) -> float:
    return float(f"{value:.5g}")
