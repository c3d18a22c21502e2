"""How a call is timed: wall clock on the CPU, replayed graphs between events on CUDA."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

Call = Callable[[int], Any]
Sampler = Callable[[], float]

BEST_OF = 3
CPU_BLOCK_S = 1e-4
SLOW_CALL_S = 0.2
CUDA_GRAPH_S = 1e-3
MAX_GRAPH_CALLS = 200
WALL_BLOCK_S = 2e-2
MAX_WALL_CALLS = 200
MIN_ROUNDS, MAX_ROUNDS = 5, 40
PATIENCE, PATIENCE_S = 2.0, 5.0
COLD_FACTOR = 3
MAX_COLD_BUFFERS = 64


@cache
def last_level_cache(device: str) -> int:
    """Bytes of the cache in front of memory: L2 of a GPU, the last level of this CPU."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).L2_cache_size)
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    known = [int(size.read_text().strip().rstrip("K")) * 1024 for size in sizes]
    return max(known, default=32 << 20)


def cold_buffers(bytes_touched: int, device: str) -> int:
    """How many buffer sets to rotate so that a set has left the cache when its turn comes."""
    needed = COLD_FACTOR * last_level_cache(device) // max(1, bytes_touched) + 1
    return min(MAX_COLD_BUFFERS, max(2, needed))


def is_cold_anyway(bytes_touched: int, device: str) -> bool:
    """Whether one call on one buffer already sweeps the cache."""
    return bytes_touched > 2 * last_level_cache(device)


def settle_allocator() -> None:
    """Bring glibc's adaptive thresholds to the state any training loop reaches at once.

    The first freed block of 32 MiB raises the size from which blocks are mapped afresh; before
    that the first contender measured would pay page faults that later ones do not.
    """
    torch.empty(31 << 20, dtype=torch.uint8).fill_(1)


def cpu_sampler(call: Call, buffers: int) -> Sampler:
    """Best of a few blocks of calls; each block is long against the clock's resolution."""

    def block(passes: int) -> float:
        start = time.perf_counter()
        for _ in range(passes):
            for index in range(buffers):
                call(index)
        return (time.perf_counter() - start) / (passes * buffers)

    block(1)
    one_pass = block(1) * buffers
    passes = max(1, round(CPU_BLOCK_S / one_pass))
    repeats = BEST_OF if one_pass < SLOW_CALL_S else 1
    return lambda: min(block(passes) for _ in range(repeats))


def cuda_sampler(call: Call, buffers: int) -> Sampler:
    """Device time of one call from events around replays of a graph of many calls.

    With rotating buffers the results of a graph's calls stay alive together, so that no call
    writes over lines that an earlier one left in the cache; with one buffer they may.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for index in range(buffers):
            call(index)
        seconds = _between_events(lambda: [call(index) for index in range(buffers)])
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()

    cold = buffers > 1
    passes = 1 if cold else min(MAX_GRAPH_CALLS, max(1, round(CUDA_GRAPH_S / seconds)))
    graph = torch.cuda.CUDAGraph()
    kept = []
    with torch.cuda.graph(graph):
        for index in [*range(buffers)] * passes:
            result = call(index)
            if cold:
                kept.append(result)
    graph.replay()

    def sample() -> float:
        return min(_between_events(graph.replay) for _ in range(BEST_OF)) / (passes * buffers)

    return sample


def _between_events(work: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def wall_sampler(call: Call, buffers: int) -> Sampler:
    """Host time of a call on CUDA, including the wait for the device at the end of a block."""

    def block(calls: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for index in range(calls):
            call(index % buffers)
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / calls

    block(1)
    calls = min(MAX_WALL_CALLS, max(1, round(WALL_BLOCK_S / block(1))))
    block(calls)
    return lambda: block(calls)


def interleave(
    samplers: Mapping[str, Sampler],
    seconds: float,
    order: random.Random,
    rounds: tuple[int, int] = (MIN_ROUNDS, MAX_ROUNDS),
) -> dict[str, list[float]]:
    """Rounds in which every contender is sampled once, in an order drawn anew for each round.

    Parameters
    ----------
    samplers
        A sampler for each contender; each returns seconds of one call.
    seconds
        When to stop. The least number of rounds is run all the same, unless that takes several
        times as long; two rounds are run in any case.
    order
        Source of the order within a round.
    rounds
        Least and greatest number of rounds.

    Returns
    -------
    dict
        Seconds for each contender, one sample a round, rounds in the same order for all.
    """
    least, most = rounds
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    start = time.monotonic()
    patience = max(PATIENCE * seconds, PATIENCE_S)
    for done in range(most):
        spent = time.monotonic() - start
        if (done >= least and spent >= seconds) or (done >= 2 and spent >= patience):
            break
        for name in order.sample(list(samplers), len(samplers)):
            samples[name].append(samplers[name]())
    return samples


def count_launches(call: Call) -> int | None:
    """Kernels, copies and fills that one call puts on the device; None where it cannot be seen."""
    from torch.profiler import ProfilerActivity, profile

    call(0)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as trace:
        call(0)
        torch.cuda.synchronize()
    device_events = [
        event for event in trace.events() if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    return len(device_events) or None


def sampler_for(device: str, host: bool = False) -> Callable[[Call, int], Sampler]:
    """The way calls are timed on a device; `host` asks for the host's share of it."""
    if device != "cuda":
        return cpu_sampler
    return wall_sampler if host else cuda_sampler


def available_threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def thread_counts(threads: int) -> Sequence[int]:
    """Thread counts of the scaling study: powers of two up to what is there."""
    counts = [1]
    while counts[-1] * 2 <= threads:
        counts.append(counts[-1] * 2)
    return counts
