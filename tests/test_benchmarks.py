"""The benchmarks: statistics, verification, schema, reports, requirements, the demo, the GPU run and tuning."""

from __future__ import annotations

import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from weakref import WeakSet

import pytest
import torch
import torch.nn.functional as F

from batchnorm_ext import _build, _extension
from benchmarks import commands, demo, device_limits, gpu, measure, shapes, tuning
from benchmarks.accuracy import measure_accuracy
from benchmarks.contenders import (
    FUSED_OPS,
    KERNEL_OPS,
    MODULE_OPS,
    OUTPUT,
    BatchnormExt,
    BatchnormExtFused,
    Contender,
    Floor,
    OneDnn,
    Prepared,
    TorchCompile,
    TorchEager,
    functional_forward,
    verified,
)
from benchmarks.measure import layer_tasks
from benchmarks.memory import peak_bytes, saved_bytes
from benchmarks.models import resnet50, small_resnet
from benchmarks.problem import make_problem, truth
from benchmarks.report import render, render_comparison
from benchmarks.requirement import Requirement, unmet
from benchmarks.results import ROOT, Record, SchemaError, check_row, commit, results_path
from benchmarks.session import Session, Task
from benchmarks.shapes import Case
from benchmarks.stats import Ratio, geometric_mean, ratio_of_medians, summarize
from benchmarks.timing import (
    cold_buffers,
    count_launches,
    cpu_sampler,
    cuda_sampler,
    interleave,
    thread_counts,
    wall_sampler,
)
from benchmarks.training import measure_model

SMALL = Case("test/small", (4, 3, 5, 7))
ENVIRONMENT = {
    "device": "Some CPU, 2 cores",
    "driver": "",
    "cuda": "",
    "torch": "2.13.0",
    "python": "3.11.7",
    "commit": "0123abc",
    "date": "2026-01-02T03:04:05+00:00",
    "threads": 1,
    "seed": 0,
    "backend": "prebuilt",
    "build": {"instruction_set": "avx2"},
}


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing here is about speed, and threads that wait for each other make it slow."""
    before = torch.get_num_threads()
    monkeypatch.setattr(demo, "available_threads", lambda: 1)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_session(contenders: list[Contender], environment: dict | None = None) -> Session:
    record = Record(environment or dict(ENVIRONMENT))
    threads = record.environment["threads"]
    return Session("cpu", threads, record, {one.name: one for one in contenders})


def make_record(
    times: dict[str, float], case: str = "resnet50/64x56", op: str = "forward"
) -> Record:
    """A record of one case with the given times; ratios with intervals of 10 %."""
    record = Record(dict(ENVIRONMENT))
    for name, median in times.items():
        ratio = median / times["batchnorm_ext"]
        extra = {"ratio": ratio, "ratio_low": 0.95 * ratio, "ratio_high": 1.05 * ratio}
        record.add_row(
            case=case,
            shape=[8, 64, 56, 56],
            dtype="float32",
            layout="contiguous",
            op=op,
            cache="hot",
            contender=name,
            median_us=float(median),
            p10_us=0.9 * median,
            p90_us=1.1 * median,
            rounds=10,
            bytes_min=12845056,
            floor_us=float(times.get("floor", 1.0)),
            threads=1,
            **(extra if name != "batchnorm_ext" else {}),
        )
    return record


# -------------------------------------------------------------------------------------- statistics


def test_summary_is_median_and_deciles() -> None:
    assert summarize(range(1, 12)) == (6, 2, 10)


def test_ratio_of_constant_samples_is_exact() -> None:
    assert ratio_of_medians([6.0] * 5, [2.0] * 5) == (3, 3, 3)


def test_slow_rounds_cancel_in_the_ratio() -> None:
    slow_rounds = [1.0, 1.0, 50.0, 1.0, 1.0, 1.0, 50.0, 1.0, 1.0]
    ratio = ratio_of_medians([3 * one for one in slow_rounds], slow_rounds)
    assert ratio == pytest.approx((3, 3, 3))


def test_interval_covers_the_ratio_as_often_as_it_says() -> None:
    draw = random.Random(1)
    covered = 0
    for trial in range(100):
        first = [draw.gauss(2.0, 0.2) for _ in range(25)]
        second = [draw.gauss(1.0, 0.1) for _ in range(25)]
        ratio = ratio_of_medians(first, second, seed=trial)
        covered += ratio.low <= 2 <= ratio.high
    assert covered >= 85


def test_geometric_mean_of_ratios() -> None:
    mean = geometric_mean([Ratio(2, 1.8, 2.2), Ratio(8, 7.2, 8.8)])
    assert mean.value == pytest.approx(4)
    assert 1.8 * 2 < mean.low < 4 < mean.high < 2.2 * 2
    exact = geometric_mean([Ratio(3, 3, 3)])
    assert exact == pytest.approx((3, 3, 3))


# ------------------------------------------------------------------------------------------ timing


def test_interleave_samples_everyone_once_a_round_in_changing_order() -> None:
    seen: list[str] = []
    samplers = {name: lambda name=name: (seen.append(name), 1.0)[1] for name in "abc"}
    samples = interleave(samplers, 60.0, random.Random(0), rounds=(5, 8))
    assert {name: len(found) for name, found in samples.items()} == {"a": 8, "b": 8, "c": 8}
    rounds = ["".join(seen[i : i + 3]) for i in range(0, len(seen), 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(set(rounds)) > 1


def test_interleave_runs_the_least_rounds_past_its_time() -> None:
    samples = interleave({"a": lambda: 1.0}, 0.0, random.Random(0), rounds=(5, 40))
    assert len(samples["a"]) == 5


def test_interleave_loses_patience_with_slow_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.timing.PATIENCE_S", 0.01)
    samplers = {"a": lambda: (time.sleep(0.02), 1.0)[1]}
    samples = interleave(samplers, 0.0, random.Random(0), rounds=(5, 40))
    assert len(samples["a"]) == 2


def test_cpu_sampler_measures_seconds_of_one_call() -> None:
    sampler = cpu_sampler(lambda index: time.sleep(0.002), buffers=2)
    assert 0.002 <= sampler() < 0.01


class FakeCuda:
    """A device on which each call takes 10 µs: what streams, events and graphs do to its clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock_ms = 0.0
        self.captured: int | None = None
        device = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = device.clock_ms

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, end: Event) -> float:
                return end.at - self.at

        class Graph:
            def replay(self) -> None:
                device.clock_ms += 0.01 * self.calls

        class Stream:
            def wait_stream(self, other: Stream) -> None:
                pass

        @contextmanager
        def capture(graph: Graph) -> Iterator[None]:
            device.captured = 0
            yield
            graph.calls, device.captured = device.captured, None

        fakes = {"Event": Event, "CUDAGraph": Graph, "Stream": Stream, "graph": capture}
        fakes |= {"current_stream": Stream, "stream": nullcontext, "synchronize": lambda: None}
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    def call(self) -> None:
        if self.captured is None:
            self.clock_ms += 0.01
        else:
            self.captured += 1


@pytest.mark.parametrize("buffers", [1, 4], ids=["hot", "cold"])
def test_cuda_sampler_divides_by_the_calls_of_its_graph(
    buffers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = FakeCuda(monkeypatch)
    results: WeakSet[torch.Tensor] = WeakSet()
    most_alive, indices = 0, set()

    def call(index: int) -> torch.Tensor:
        nonlocal most_alive
        device.call()
        indices.add(index)
        result = torch.empty(1)
        results.add(result)
        most_alive = max(most_alive, len(results))
        return result

    sample = cuda_sampler(call, buffers)
    assert sample() == pytest.approx(1e-5)
    assert indices == set(range(buffers))
    assert buffers <= most_alive <= 2 * buffers + 1


@pytest.mark.parametrize(("seconds", "calls"), [(5e-6, 200), (2e-3, 10), (0.3, 1)])
def test_wall_sampler_waits_for_blocks_of_calls_no_longer_than_needed(
    seconds: float, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def call(index: int) -> None:
        clock[0] += seconds

    sample = wall_sampler(call, 1)
    before = clock[0]
    assert sample() == pytest.approx(seconds)
    assert clock[0] - before == pytest.approx(calls * seconds)


@pytest.mark.parametrize(("seconds", "expected"), [(60, [3, 3, None, None]), (0, [None] * 4)])
def test_launches_are_counted_behind_all_timing_and_once_for_all_states_of_the_cache(
    seconds: float, expected: list[int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = make_session([BatchnormExt(), Floor()])
    counts = iter([3])  # and no profiler any more
    monkeypatch.setattr(measure, "count_launches", lambda call: next(counts))
    session.caches = ("hot", "cold")
    for op in ("forward", "backward"):
        measure.measure(session, SMALL, op, 0.0)
    ours = [row for row in session.record.rows if row["contender"] == "batchnorm_ext"]
    assert not any("launches" in row for row in ours)
    measure.record_launches(session, seconds)
    assert [row.get("launches") for row in ours] == expected
    for row in session.record.rows:
        check_row(row)
        assert "launches" not in row or row in ours


def test_launches_get_a_share_of_a_run_on_cuda(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = [Task("some", lambda session, seconds: None, 3.0), Task("other", lambda *_: None, 7.0)]
    assert measure.launches_task(tasks).weight == pytest.approx(1.0)
    ran: list[str] = []
    monkeypatch.setattr(
        Session, "run", lambda self, tasks, *_: ran.extend(task.label for task in tasks)
    )
    monkeypatch.setattr(commands, "describe_environment", lambda *_: dict(ENVIRONMENT))
    monkeypatch.setitem(commands.MEASURING, "overhead", (lambda options: list(tasks), 5, ""))
    common = ["--output", str(tmp_path), "--no-plots", "--contenders", "floor"]
    for device in ("cpu", "cuda"):
        commands.main(["overhead", "--device", device, *common])
    assert ran == ["some", "other", "some", "other", "launches of our calls"]


def test_cold_buffers_exceed_the_cache_unless_one_call_does() -> None:
    assert cold_buffers(1 << 40, "cpu") == 2
    assert cold_buffers(1 << 20, "cpu") > 2


def test_thread_counts() -> None:
    assert [thread_counts(n) for n in (1, 2, 6)] == [[1], [1, 2], [1, 2, 4]]


# ------------------------------------------------------------------------------------------ shapes


def test_network_sets_have_all_their_batch_norms() -> None:
    def norms(network: torch.nn.Module) -> list[int]:
        return [m.num_features for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]

    resnet = shapes.resnet50(1)
    counted = sorted(c for case in resnet for c in [case.channels] * case.count)
    assert counted == sorted(norms(resnet50()))
    assert sum(case.count for case in shapes.mobilenetv2(1)) == 52


def test_cpu_set_is_as_broad_as_it_claims() -> None:
    cases = shapes.cpu_set()
    assert {case.dtype for case in cases} == set(shapes.DTYPES)
    assert {case.layout for case in cases} == set(shapes.LAYOUTS)
    assert {len(case.shape) for case in cases} == {2, 3, 4, 5}
    assert {1, 3, 20, 2048} <= {case.channels for case in cases}
    assert {1, 224} <= {case.shape[-1] for case in cases if len(case.shape) == 4}
    assert min(case.bytes for case in cases) < 1 << 10
    assert max(case.bytes for case in cases) > 100_000_000
    assert len({str(case) for case in cases}) == len(cases)
    assert all(case.layout == "contiguous" for case in cases if len(case.shape) < 4)


def test_spread_keeps_the_number_and_the_order() -> None:
    cases = shapes.cpu_set()
    chosen = shapes.spread(cases, 7)
    positions = [cases.index(case) for case in chosen]
    assert len(set(positions)) == 7
    assert positions == sorted(positions)


# ------------------------------------------------------------------------------------ verification


@pytest.mark.parametrize("shape", [(4, 3, 5, 7), (6, 4), (2, 3, 2, 3, 4)], ids=str)
def test_truth_is_what_torch_computes_in_float64(shape: tuple[int, ...]) -> None:
    problem = make_problem(Case("test", shape, "float64"), "cpu")
    x = problem.x[0].clone().requires_grad_()
    weight, bias = (one.clone().requires_grad_() for one in (problem.weight, problem.bias))
    mean, var = problem.running_mean.clone(), problem.running_var.clone()
    y = F.batch_norm(x, mean, var, weight, bias, True, problem.momentum, problem.eps)
    gradients = torch.autograd.grad(y, (x, weight, bias), problem.dy[0])
    running = (problem.running_mean, problem.running_var)
    evaluated = F.batch_norm(x, *running, weight, bias, False, problem.momentum, problem.eps)
    expected = {
        "forward": {"y": y, "running_mean": mean, "running_var": var},
        "eval": {"y": evaluated},
        "backward": dict(zip(("dx", "dweight", "dbias"), gradients, strict=True)),
    }
    residual = problem.residual[0].clone().requires_grad_()
    y = F.relu(F.batch_norm(x, None, None, weight, bias, True) + residual)
    gradients = torch.autograd.grad(y, (x, residual, weight, bias), problem.dy[0])
    names = ("dx", "dresidual", "dweight", "dbias")
    expected["act_forward_backward"] = dict(zip(names, gradients, strict=True))
    for op, results in expected.items():
        for name, value in truth(problem, op).items():
            found = results[name].detach()
            rows = found.transpose(0, 1).flatten(1) if found.dim() > 1 else found.unsqueeze(1)
            torch.testing.assert_close(rows, value)


@pytest.mark.parametrize("op", [*KERNEL_OPS, *FUSED_OPS, *MODULE_OPS])
@pytest.mark.parametrize(
    "case",
    [
        Case("test/nchw", (4, 16, 5, 7)),
        Case("test/nhwc", (4, 3, 5, 7), layout="channels_last"),
        Case("test/bf16", (4, 16, 6, 6), dtype="bfloat16"),
        Case("test/fp16", (16, 20), dtype="float16"),
        Case("test/fp64", (2, 4, 3, 4, 5), dtype="float64", layout="channels_last"),
    ],
    ids=str,
)
def test_contenders_are_verified_and_right(case: Case, op: str) -> None:
    contenders = {one.name: one for one in (BatchnormExt(), Floor(), TorchEager(), OneDnn())}
    outcome = verified(contenders, make_problem(case, "cpu", buffers=2), op)
    assert outcome.excluded == {}
    assert {"batchnorm_ext", "floor", "torch_eager"} <= outcome.ready.keys()
    for prepared in outcome.ready.values():
        prepared.call(1)


@pytest.mark.slow
@pytest.mark.parametrize("op", [*KERNEL_OPS, *FUSED_OPS])
def test_torch_compile_is_verified_and_right(op: str) -> None:
    outcome = verified({"torch_compile": TorchCompile()}, make_problem(SMALL, "cpu"), op)
    assert outcome.excluded == {}
    assert "torch_compile" in outcome.ready


class Unbiased(Contender):
    """Normalises with the unbiased variance: wrong by a factor of sqrt(n / (n - 1))."""

    name = "torch_eager"

    def forward(self, problem) -> Prepared:
        dims = [0, *range(2, problem.x[0].dim())]
        shape = (1, -1, *(1,) * (problem.x[0].dim() - 2))
        weight, bias = problem.weight.view(shape), problem.bias.view(shape)

        def call(i: int) -> torch.Tensor:
            var, mean = torch.var_mean(problem.x[i], dims, correction=1, keepdim=True)
            return (problem.x[i] - mean) * (var + problem.eps).rsqrt() * weight + bias

        return Prepared(call, OUTPUT)


class ForgetsStatistics(Contender):
    """Right output, running statistics left alone."""

    name = "torch_eager"

    def forward(self, problem) -> Prepared:
        call = functional_forward(
            lambda x, mean, var, *rest: F.batch_norm(x, None, None, *rest), problem, True
        )
        running = {"running_mean": problem.running_mean, "running_var": problem.running_var}
        return Prepared(call, lambda y: {"y": y, **running})


class WrongShape(Contender):
    name = "torch_eager"

    def forward(self, problem) -> Prepared:
        return Prepared(lambda i: problem.x[i][:1], OUTPUT)


class Nan(Contender):
    name = "torch_eager"

    def forward(self, problem) -> Prepared:
        return Prepared(lambda i: problem.x[i] * math.nan, OUTPUT)


class Breaks(Contender):
    name = "torch_eager"

    def forward(self, problem) -> Prepared:
        raise RuntimeError("no kernel for this")


@pytest.mark.parametrize(
    ("contender", "reason"),
    [
        (Unbiased, "y is off by"),
        (ForgetsStatistics, "running_mean is off by"),
        (WrongShape, "y has shape [1, 3, 5, 7], expected [4, 3, 5, 7]"),
        (Nan, "y is off by nan"),
        (Breaks, "failed: RuntimeError: no kernel for this"),
    ],
)
def test_wrong_contender_is_reported_and_not_timed(contender: type, reason: str) -> None:
    session = make_session([BatchnormExt(), Floor(), contender()])
    session.run(layer_tasks([SMALL], ("forward",)), 1.0)
    assert {row["contender"] for row in session.record.rows} == {"batchnorm_ext", "floor"}
    (excluded,) = session.record.excluded
    assert (excluded["contender"], excluded["op"]) == ("torch_eager", "forward")
    assert excluded["reason"].startswith(reason)
    assert reason in render(session.record)


def test_scattered_cases_are_all_there_and_spread_early() -> None:
    for count in range(120):
        cases = [replace(SMALL, count=index) for index in range(count)]
        order = [case.count for case in shapes.scattered(cases)]
        assert sorted(order) == list(range(count))
        if count > 60:
            begun = sorted(order[:8])
            ends = [*begun[1:], begun[0] + count]
            assert max(b - a for a, b in zip(begun, ends, strict=True)) < 3 * count / 8
    begun = gpu.exercise_cases()[:8]
    assert {case.dtype for case in begun} == set(shapes.DTYPES)
    assert {case.layout for case in begun} == set(shapes.LAYOUTS)
    assert len({case.name for case in begun}) > 4


# ----------------------------------------------------------------------------- sessions and schema


def test_measurement_makes_rows_of_the_schema() -> None:
    session = make_session([BatchnormExt(), Floor(), TorchEager()])
    session.run(layer_tasks([replace(SMALL, count=3)], KERNEL_OPS), 2.0)
    rows = session.record.rows
    assert len(rows) == 9
    for row in rows:
        check_row(row)
        factor = {"forward": 2, "eval": 2, "backward": 3}[row["op"]]
        assert row["bytes_min"] == factor * 4 * 4 * 3 * 5 * 7
        assert row["count"] == 3
        assert ("ratio" in row) == (row["contender"] != "batchnorm_ext")
        floor = next(r for r in rows if (r["op"], r["contender"]) == (row["op"], "floor"))
        assert row["floor_us"] == floor["median_us"]


class NotesGradientMode(BatchnormExt):
    """As this package, and what the mode was when it was called."""

    def prepare(self, problem, op) -> Prepared:
        prepared = super().prepare(problem, op)
        modes = self.modes = set()
        return replace(
            prepared, call=lambda i: (modes.add(torch.is_grad_enabled()), prepared.call(i))[1]
        )


@pytest.mark.parametrize("op", [*KERNEL_OPS, *FUSED_OPS, *MODULE_OPS])
def test_calls_record_a_graph_only_where_the_op_needs_one(op: str) -> None:
    contender = NotesGradientMode()
    session = make_session([contender])
    session.run(layer_tasks([SMALL], (op,)), 0.5)
    assert [row["op"] for row in session.record.rows] == [op]
    assert contender.modes == {op in (*FUSED_OPS, "module_forward", "module_forward_backward")}


def test_budget_skips_what_comes_too_late() -> None:
    session = make_session([Floor()])
    slow = Task("slow", lambda session, seconds: time.sleep(0.05))
    session.run([slow, Task("late", lambda session, seconds: None)], 0.01)
    assert session.skipped == ["late"]


def test_failed_task_costs_the_others_nothing() -> None:
    def broken(session: Session, seconds: float) -> None:
        raise RuntimeError("no memory left")

    session = make_session([Floor()])
    first, last = layer_tasks([SMALL], ("forward", "eval"))
    session.run([first, Task("broken", broken), last], 1.0)
    assert session.failed == ["broken: RuntimeError: no memory left"]
    assert [row["op"] for row in session.record.rows] == ["forward", "eval"]
    session.run([*(Task("broken", broken) for _ in range(9)), last], 1.0)
    assert len(session.failed) == 6
    assert len(session.skipped) == 5


class Compiling(Floor):
    name = "torch_compile"
    compiles = True

    def forward(self, problem) -> Prepared:
        time.sleep(0.05)
        return super().forward(problem)


def test_compiling_takes_its_share_of_the_time_and_says_so() -> None:
    session = make_session([Floor(), Compiling()])
    cases = [replace(SMALL, shape=(n, 3, 5, 7)) for n in range(2, 42)]
    tasks = layer_tasks(cases, ("forward",))
    for task in tasks:
        task.run(session, 0.01)
    compiled = sum(row["contender"] == "torch_compile" for row in session.record.rows)
    assert 2 <= compiled <= 4  # 40 tasks of 0.01 s, of which 30 % buys 2.4 compilations of 0.05 s
    session.run([], 1.0)
    (entry,) = session.record.missing
    assert entry["reason"].startswith(f"takes part in {compiled} of 40 measurements")


def test_interrupt_keeps_what_was_measured() -> None:
    def interrupt(session: Session, seconds: float) -> None:
        raise KeyboardInterrupt

    session = make_session([Floor()])
    first, last = layer_tasks([SMALL], ("forward", "eval"))
    session.run([first, Task("interrupted", interrupt), last], 1.0)
    assert session.interrupted
    assert [row["op"] for row in session.record.rows] == ["forward"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"median_us": None}, "median_us has type NoneType"),
        ({"rounds": True}, "rounds has type bool"),
        ({"contender": "nobody"}, "unknown contender nobody"),
        ({"cache": "warm"}, "cache must be cold or hot"),
        ({"speed": 1.0}, "unknown key speed"),
        ({"p90_us": 1.0}, "times out of order"),
    ],
)
def test_schema_refuses(change: dict, message: str) -> None:
    row = make_record({"batchnorm_ext": 10.0}).rows[0]
    with pytest.raises(SchemaError, match=message):
        check_row(row | change)


def test_schema_refuses_a_row_without_a_key() -> None:
    row = make_record({"batchnorm_ext": 10.0}).rows[0]
    del row["floor_us"]
    with pytest.raises(SchemaError, match="lacks floor_us"):
        check_row(row)


def test_record_survives_its_file(tmp_path: Path) -> None:
    record = make_record({"batchnorm_ext": 10.0, "floor": 5.0})
    record.missing.append({"contender": "jax", "reason": "not installed"})
    path = results_path(record.environment, tmp_path)
    assert path == tmp_path / "some-cpu-2-cores" / "2026-01-02-0123abc.json"
    record.save(path)
    assert Record.load(path) == record
    path.write_text(json.dumps({"schema": "other"}))
    with pytest.raises(SchemaError, match="has schema other"):
        Record.load(path)


def test_sources_stand_for_the_commit_where_there_is_no_git(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", "")
    assert commit() == f"sources-{_build.source_hash()[:7]}"


def test_newer_rows_replace_older_ones_of_the_same_case() -> None:
    older = make_record({"batchnorm_ext": 10.0, "floor": 5.0})
    newer = make_record({"batchnorm_ext": 7.0})
    merged = older.merged(newer)
    times = {row["contender"]: row["median_us"] for row in merged.rows}
    assert times == {"batchnorm_ext": 7.0, "floor": 5.0}


# ----------------------------------------------------------------------------------------- reports


def test_report_marks_the_case_we_lose() -> None:
    text = render(make_record({"batchnorm_ext": 10.0, "floor": 5.0, "torch_eager": 8.0}))
    assert "In 1 of 1 comparisons" in text
    assert "| 0.80x ▼ |" in " ".join(text.split())
    assert "2.00 (1.90 to 2.10)" in text  # times the floor


def test_report_says_that_nobody_is_faster() -> None:
    text = render(make_record({"batchnorm_ext": 10.0, "floor": 5.0, "torch_eager": 40.0}))
    assert "In none of 1 comparisons." in text
    assert "4.00x" in text


def test_report_warns_of_noise_and_of_the_fallback() -> None:
    record = make_record({"batchnorm_ext": 10.0, "torch_eager": 8.0})
    for row in record.rows:
        row |= {"p10_us": 4.0, "p90_us": 20.0}
    record.environment["backend"] = "torch"
    text = render(record)
    assert "the machine was busy" in text
    assert "pure-PyTorch fallback" in text


def test_scaling_is_reported_for_threads_and_batch() -> None:
    record = Record(dict(ENVIRONMENT))
    for threads, time_us in [(1, 30.0), (2, 16.0)]:
        (row,) = make_record({"batchnorm_ext": time_us}, "scaling/64x56").rows
        record.rows.append(row | {"threads": threads})
    for batch, time_us in [(1, 5.0), (4, 20.0)]:
        (row,) = make_record({"batchnorm_ext": time_us}, "scaling/batch").rows
        record.rows.append(row | {"shape": [batch, 64, 56, 56]})
    text = " ".join(render(record).split())
    assert "| 30 (1.00x) | 16 (1.88x) |" in text
    assert "| 1 | 5.0 | | 4 | 5.0 |" in text


def test_networks_are_added_up_only_when_complete() -> None:
    record = Record(dict(ENVIRONMENT))
    for case in shapes.resnet50(8):
        times = {"batchnorm_ext": 1000.0, "floor": 500.0}
        rows = make_record(times, case.name).rows
        record.rows += [row | {"shape": list(case.shape), "count": case.count} for row in rows]
    assert "batchnorm_ext 53.00, floor 26.50" in render(record)
    del record.rows[:2]
    assert "All batch norms of a network" not in render(record)


def test_comparison_tells_slower_faster_and_unchanged() -> None:
    before, after = (Record(dict(ENVIRONMENT)) for _ in range(2))
    for case, old, new in [("a/a", 10.0, 20.0), ("b/b", 10.0, 4.0), ("c/c", 10.0, 10.5)]:
        before.rows += make_record({"batchnorm_ext": old}, case).rows
        after.rows += make_record({"batchnorm_ext": new}, case).rows
    text = render_comparison(before, after)
    assert "3 cases in common: 1 slower, 1 faster" in text
    order = [line.split()[1] for line in text.splitlines() if line.startswith("| ") and "/" in line]
    assert order == ["a/a", "c/c", "b/b"]


def test_plots_are_drawn_for_what_was_measured(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.plots import draw_all

    record = make_record({"batchnorm_ext": 10.0, "floor": 5.0, "torch_eager": 40.0})
    record.accuracy += [
        {"contender": "torch_eager", "mean_over_std": x, "dtype": "float32", "dx": 1e-7 * x}
        for x in (0.0, 1e6)
    ]
    record.memory.append(
        {
            **{"case": "memory/x", "shape": [2, 3], "dtype": "float32", "layout": "contiguous"},
            **{
                "mode": "training",
                "contender": "torch_eager",
                "input_bytes": 24,
                "saved_bytes": 24,
                "peak_bytes": 72,
            },
        }
    )
    names = {path.name for path in draw_all(record, tmp_path)}
    kinds = ("time_over_bytes", "speedup", "bandwidth", "accuracy", "memory")
    assert names == {f"{kind}.{suffix}" for kind in kinds for suffix in ("png", "svg")}
    assert all((tmp_path / name).stat().st_size > 1000 for name in names)
    assert draw_all(Record(dict(ENVIRONMENT)), tmp_path / "none") == []


# ------------------------------------------------------------------------------------ requirements


def test_requirement_reads_and_writes_its_text() -> None:
    assert Requirement.parse("forward<=1.5:floor") == Requirement("forward", 1.5, "floor")
    worst = Requirement.parse("worst: eval <= 1:torch_eager")
    assert worst == Requirement("eval", 1.0, "torch_eager", every_case=True)
    assert str(worst) == "worst:eval<=1:torch_eager"


@pytest.mark.parametrize("text", ["forward<1:floor", "forward<=1", "forward<=1:nobody", ""])
def test_requirement_refuses_other_text(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        Requirement.parse(text)


@pytest.mark.parametrize(
    ("text", "failure"),
    [
        ("forward<=1.6:floor", None),
        ("forward<=1.4:floor", "not met: 1.41"),
        ("worst:forward<=1.6:floor", "not met in 1 of 2 cases, worst 2.00"),
        ("backward<=1:floor", "cannot be decided"),
        ("forward<=1:jax", "cannot be decided"),
    ],
)
def test_requirements_are_held_against_the_record(text: str, failure: str | None) -> None:
    record = make_record({"batchnorm_ext": 10.0, "floor": 5.0})
    record.rows += make_record({"batchnorm_ext": 10.0, "floor": 10.0}, "resnet50/64x112").rows
    found = unmet(record, [Requirement.parse(text)])
    assert found == [] if failure is None else failure in found[0]


# ------------------------------------------------------------------------------------ command line


def run_command(tmp_path: Path, *arguments: str) -> tuple[int, Record]:
    common = ["--device", "cpu", "--threads", "1", "--output", str(tmp_path), "--no-plots"]
    contenders = ["--contenders", "batchnorm_ext", "floor", "torch_eager", "apex"]
    code = commands.main([*arguments, *common, *contenders])
    (path,) = tmp_path.glob("*/*.json")
    return code, Record.load(path)


def test_command_writes_results_and_decides_requirements(tmp_path: Path) -> None:
    demand = ["--require", "module_forward<=1000000:torch_eager"]
    code, record = run_command(tmp_path, "overhead", "--time-budget", "2", *demand)
    assert code == 0
    assert {row["op"] for row in record.rows} <= set(MODULE_OPS)
    code, again = run_command(
        tmp_path, "overhead", "--time-budget", "2", "--require", "module_forward<=0.0001:floor"
    )
    assert code == commands.EXIT_REQUIREMENT
    assert len(again.rows) >= 3
    assert (next(tmp_path.glob("*")) / "report.md").read_text().startswith("# Batch norm on ")


def test_command_reports_an_interrupt_and_keeps_the_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(session: Session, seconds: float) -> None:
        raise KeyboardInterrupt

    tasks = [*layer_tasks([SMALL], ("forward",)), Task("interrupted", interrupt)]
    monkeypatch.setitem(commands.MEASURING, "overhead", (lambda options: tasks, 5, ""))
    code, record = run_command(tmp_path, "overhead")
    assert code == commands.EXIT_INTERRUPTED
    assert len(record.rows) == 3


def test_report_of_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "some.json"
    make_record({"batchnorm_ext": 10.0, "floor": 5.0}).save(path)
    assert commands.main(["report", str(path), "--no-plots"]) == 0
    assert "Batch norm on Some CPU" in (tmp_path / "report.md").read_text()
    assert commands.main(["report", str(path), str(path)]) == 0
    assert "1 cases in common: 0 slower, 0 faster" in capsys.readouterr().out
    assert commands.main(["report", str(tmp_path / "none.json")]) == 1
    assert "cannot read results" in capsys.readouterr().err


def test_every_subcommand_has_tasks() -> None:
    for name, (build, _, _) in commands.MEASURING.items():
        options = commands.parser().parse_args([name, "--device", "cpu"])
        assert build(options), name
    options = commands.parser().parse_args(
        ["layers", "--set", "resnet50", "--dtype", "float16", "--sample", "3", "--scaling"]
    )
    labels = [task.label for task in commands.layers_tasks(options)]
    assert sum(" float16 " in label for label in labels) == 3 * len(KERNEL_OPS)
    assert any(label.startswith("scaling/batch") for label in labels)


# ----------------------------------------------------------------------------------------- studies


def test_saved_bytes_counts_each_storage_once() -> None:
    x = torch.randn(1000, requires_grad=True)
    assert saved_bytes(lambda: x * x) == 4000
    assert saved_bytes(lambda: x.view(10, 100).sin() * x.view(10, 100)) == 8000
    assert saved_bytes(lambda: x.sin(), (x,)) == 0


def test_peak_bytes_sees_what_is_held_at_once() -> None:
    size = 64 << 20
    peak = peak_bytes(lambda: torch.ones(size // 4), "cpu")
    if peak is None:
        pytest.skip("this system does not tell a process its peak")
    assert 0.99 * size <= peak < 2 * size


def test_accuracy_finds_the_error_of_a_shifted_mean() -> None:
    session = make_session([TorchEager(), Floor()])
    for offset in (0.0, 1e5):
        measure_accuracy(session, offset)
    near, far = session.record.accuracy
    assert near["y"] < 1e-6 < 1e-5 < far["y"]
    assert near.keys() >= {"mean", "variance", "y", "dx", "dweight", "dbias"}
    assert near["variance"] < 1e-6
    json.dumps(session.record.accuracy, allow_nan=False)


def test_model_step_is_verified_and_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.training.resnet50", lambda: small_resnet(3, 1000, (4, 8)))
    session = make_session([BatchnormExt(), BatchnormExtFused(), Floor(), TorchEager(), OneDnn()])
    measure_model(session, Case("model/resnet50", (4, 3, 16, 16)), 0.1)
    assert session.record.excluded == []
    assert {row["contender"] for row in session.record.rows} == session.contenders.keys()
    remembered = {row["contender"] for row in session.record.memory}
    assert remembered == session.contenders.keys() - {"onednn"}
    kept = {row["contender"]: row["saved_bytes"] for row in session.record.memory}
    assert kept["floor"] < kept["batchnorm_ext"] <= kept["torch_eager"]
    assert "| kept for backward, MB |" in render(session.record)
    channels_and_areas = [(4, 256), (4, 256), (4, 256), (8, 64), (8, 64), (8, 64)]
    elements = sum(4 * channels * area for channels, area in channels_and_areas)
    assert session.record.rows[0]["bytes_min"] == 5 * 4 * elements


# -------------------------------------------------------------------------------- demo and GPU run


def test_demo_trains_and_leaves_its_curves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("sklearn", "matplotlib"):
        pytest.importorskip(module)
    small = ["--epochs", "5", "--widths", "8", "16", "--benchmark-seconds", "0"]
    assert demo.main(["--output", str(tmp_path), *small]) == 0
    assert (tmp_path / "loss_curves.png").stat().st_size > 1000
    text = capsys.readouterr().out
    assert "nn.BatchNorm2d" in text
    assert "native kernels" in text or "pure PyTorch" in text


def test_demo_networks_start_alike_and_stay_close() -> None:
    pytest.importorskip("sklearn")
    digits = demo.Digits.load("cpu", seed=0)
    trainings = demo.train(digits, epochs=1, seed=0, widths=[4, 8], seconds=60)
    theirs, ours = trainings["torch_eager"].losses, trainings["batchnorm_ext"].losses
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    assert ours == pytest.approx(theirs, rel=1e-2)
    assert len(digits.labels) + len(digits.test_labels) == 1797


def stage(name: str, code: str, share: float = 1.0, **fields: object) -> gpu.Stage:
    return gpu.Stage(name, [sys.executable, "-c", code], share, **fields)


def test_stages_are_timed_logged_and_judged(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    stages = [
        stage("good", "import os; print(os.environ['WORD'])", environment={"WORD": "said"}),
        stage("bad", "raise SystemExit(7)"),
        stage("endless", "import time; time.sleep(600)", share=0.05),
        gpu.Stage("absent", [], 1.0),
        gpu.Stage("not a program", ["/does/not/exist"], 1.0),
        stage("silent", "pass", proof=r"[1-9]\d* passed"),
        stage("verbose", "print('first'); print('said again\\n' * 10**6); print('12 passed')"),
        stage("last", f"assert float('{gpu.SECONDS}') > 0; print('12 passed')", proof="12 passed"),
    ]
    stages[-2].proof = stages[-1].proof
    old, new = tmp_path / "old.csv", tmp_path / "new.csv"
    old.write_text("12 counted")
    stages += [
        stage("nothing counted", "print('12 counted')", proof="12 c", proof_file=str(old)),
        stage(
            "counted", f"open({str(new)!r}, 'w').write('12 c')", proof="12 c", proof_file=str(new)
        ),
    ]
    reports: list[list[str]] = []
    gpu.run_stages(stages, 60, {}, log, lambda: reports.append([one.state for one in stages]))
    states = ["passed", "failed", "overran", "skipped", "failed", "failed", "passed", "passed"]
    states += ["failed", "passed"]
    assert reports[-1] == states
    assert len(reports) == len(stages)
    assert stages[0].tail.strip() == "said"
    assert stages[1].exit_code == 7
    assert stages[5].exit_code == 0
    assert "passed" in stages[5].note
    assert stages[8].note == "nothing in old.csv matches 12 c"
    assert "==== endless" in log.read_text()
    assert len(log.read_text()) < 3 * gpu.LOGGED_BYTES
    assert not gpu.passed(stages)
    assert gpu.passed([stages[0], stages[-1]])
    json.dumps(gpu.summary(stages, {}, 60))


def test_stages_at_once_wait_for_none_of_each_other(tmp_path: Path) -> None:
    meet = "import pathlib, time; pathlib.Path('{own}').touch(); print('{own}')\n"
    meet += "while not pathlib.Path('{other}').exists(): time.sleep(0.05)"
    own, other = (str(tmp_path / name) for name in ("one", "other"))
    stages = [
        stage("one", meet.format(own=own, other=other), at_once="both"),
        gpu.Stage("absent", [], 1.0, at_once="both"),
        stage("other", meet.format(own=other, other=own), at_once="both"),
        stage("last", "pass"),
    ]
    log = tmp_path / "log.txt"
    gpu.run_stages(stages, 120, {}, log, lambda: None)
    assert [one.state for one in stages] == ["passed", "skipped", "passed", "passed"]
    assert [stages[0].tail.strip(), stages[2].tail.strip()] == [own, other]
    assert [log.read_text().count(f"==== {one.name}:") for one in stages] == [1, 0, 1, 1]


def test_stage_that_does_not_decide_cannot_fail_the_run() -> None:
    assert gpu.passed([gpu.Stage("benchmark", [], 1.0, decides=False, state="overran")])


def test_spent_budget_skips_stages(tmp_path: Path) -> None:
    stages = [stage("late", "pass")]
    gpu.run_stages(stages, 1.0, {}, tmp_path / "log.txt", lambda: None)
    assert stages[0].state == "skipped"
    assert not gpu.passed(stages)


def test_gpu_run_without_a_gpu_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([str(tmp_path / "out")]) == gpu.EXIT_NO_GPU
    assert "nothing was run" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["passed"] is False


@pytest.mark.parametrize("pip_works", [True, False])
def test_gpu_run_checks_what_it_has_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pip_works: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Some GPU")
    monkeypatch.setenv("PYTHONPATH", "inherited")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    say = (
        "import os; print(*map(os.environ.get, ('BATCHNORM_EXT_BACKEND', 'TORCH_CUDA_ARCH_LIST')))"
    )
    say += "; print(os.environ['PYTHONPATH'])"
    build = stage("build", f"raise SystemExit({int(not pip_works)})")
    jit = stage("jit", say, environment={"TORCH_CUDA_ARCH_LIST": "9.0"})
    monkeypatch.setattr(gpu, "_build_stages", lambda: (build, jit))
    monkeypatch.setattr(gpu, "_is_built", lambda: False)
    assert gpu.run_all(tmp_path, 60, [stage("tests", say)]) == (0 if pip_works else 1)
    found = json.loads((tmp_path / "summary.json").read_text())
    states = {one["name"]: one["state"] for one in found["stages"]}
    if pip_works:
        assert states == {"build": "passed", "tests": "passed"}
    else:
        assert states == {"build": "failed", "jit": "passed", "tests": "passed"}
    assert found["passed"] is pip_works
    told, path = found["stages"][-1]["tail"].split("\n")[:2]
    assert told == ("prebuilt None" if pip_works else "jit 9.0")
    folders = [str(ROOT), str(gpu.SITE)] if pip_works else [str(ROOT)]
    assert path.split(os.pathsep) == [*folders, "inherited"]
    assert found["environment"]["device"] == "Some GPU"


def test_build_that_overran_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Some GPU")
    monkeypatch.setattr(gpu, "BUILD_SHARE", 0.05)
    monkeypatch.setattr(gpu, "GRACE_S", 1)
    begun = tmp_path / "begun"
    code = f"import pathlib, time; begun = pathlib.Path({str(begun)!r}); again = begun.exists(); "
    build = stage("build", code + "begun.touch(); time.sleep(0 if again else 600)")
    monkeypatch.setattr(gpu, "_build_stages", lambda: (build, stage("jit", "raise SystemExit(1)")))
    monkeypatch.setattr(gpu, "_is_built", lambda: False)
    assert gpu.run_all(tmp_path, 60, [stage("tests", "pass")]) == 0
    found = json.loads((tmp_path / "summary.json").read_text())
    assert [one["name"] for one in found["stages"]] == ["build", "tests"]
    assert (tmp_path / "log.txt").read_text().count("==== build:") == 2


def test_gpu_run_uses_what_was_built_for_the_same_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(gpu, "SITE", tmp_path)
    (tmp_path / "batchnorm_ext").mkdir()
    assert not gpu._is_built()
    fits = _build.Stamp(
        *(_build.VERSION, torch.__version__, torch.version.cuda or "", "9.0"),
        *(_build.source_hash(), _build.python_tag()),
    )._replace(cuda="13.0")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for stamp, is_built in (
        (fits, True),
        (fits._replace(cuda=""), False),
        (fits._replace(arch_list="8.0"), False),
        (fits._replace(source_hash="0"), False),
        (fits._replace(torch="1.0"), False),
    ):
        _build.write_stamp(tmp_path / "batchnorm_ext" / "_C.json", stamp)
        assert gpu._is_built() == is_built, stamp


@pytest.mark.parametrize("right", [True, False])
def test_sanitizers_come_first_where_results_are_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, right: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(gpu, "_is_built", lambda: True)
    stages = [stage(name, "pass") for name in ("layers", "memcheck", "racecheck")]
    stages.insert(0, stage(gpu.EXERCISE, f"raise SystemExit({int(not right)})"))
    assert gpu.run_all(tmp_path, 200, stages) == (0 if right else 1)
    log = (tmp_path / "log.txt").read_text()
    ran = re.findall(r"^==== (\w+):", log, re.MULTILINE)
    others = ["layers", "memcheck", "racecheck"] if right else ["memcheck", "racecheck", "layers"]
    assert ran == ["exercise", *others]


def test_gpu_run_of_some_stages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "run_all", lambda out, budget, stages: [one.name for one in stages])
    assert gpu.main([str(tmp_path), "--stages", "traffic", "layers"]) == ["layers", "traffic"]
    every = [one.name for one in gpu._checking_stages(tmp_path)]
    assert gpu.main([str(tmp_path)]) == [name for name in every if name != gpu.TUNING]
    with pytest.raises(SystemExit):
        gpu.main([str(tmp_path), "--stages", "layer"])
    assert "no stage layer; there are exercise, " in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["ended", "killed"])
def test_what_stages_started_ends_with_the_run(tmp_path: Path, number: signal.Signals) -> None:
    """A stage has a session of its own, which the end of the run must reach, and what it started in turn."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    lasting = f"""
import os, time
os.fork()
held = open({str(fifo)!r}, "w")
print("here", end="", file=held, flush=True)
time.sleep(60)
"""
    program = f"""
import pathlib, signal, sys
from benchmarks import gpu
signal.signal(signal.SIGTERM, gpu._end_all)
stages = [gpu.Stage(name, [sys.executable, "-c", {lasting!r}], 1.0, at_once="both") for name in "ab"]
gpu.run_stages(stages, 600, {{}}, pathlib.Path({str(tmp_path / "log.txt")!r}), lambda: None)
"""
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    with fifo.open() as holders:
        assert holders.read(16) == 4 * "here"
        start = time.monotonic()
        process.send_signal(number)
        assert process.wait(30) == (128 + number if number == signal.SIGTERM else -number)
        assert holders.read() == ""  # the end, when nobody holds it open any more
    assert time.monotonic() - start < 30


def test_no_stage_starts_before_the_end_of_the_run_would_reach_it(tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    program = f"""
import os, pathlib, sys, time
from benchmarks import gpu

def watchdog(leader):
    time.sleep(1)  # in which the stage would begin
    os._exit(7)

gpu._watchdog = watchdog
stages = [gpu.Stage("a", [sys.executable, "-c", "open({str(begun)!r}, 'w')"], 1.0)]
gpu.run_stages(stages, 600, {{}}, pathlib.Path({str(tmp_path / "log.txt")!r}), lambda: None)
"""
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 7
    assert not begun.exists()


def test_stage_whose_command_is_not_there_fails(tmp_path: Path) -> None:
    missing = gpu.Stage("missing", [str(tmp_path / "no such command")], 1.0)
    gpu.run_stages([missing], 60, {}, tmp_path / "log.txt", lambda: None)
    assert (missing.state, missing.exit_code) == ("failed", 127)
    assert "no such command" in missing.tail


def test_gpu_stages_name_the_architecture_and_every_sanitizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(gpu, "_tool", lambda name: f"/opt/{name}")
    for one in gpu._build_stages():
        assert one.environment["TORCH_CUDA_ARCH_LIST"] == "9.0"
        assert int(one.environment["MAX_JOBS"]) >= 1
    stages = gpu._checking_stages(tmp_path)
    measuring = {one.name: one for one in stages if not one.decides}
    assert list(measuring) == ["device-limits", "layers", "traffic", "benchmark", "tuning"]
    assert measuring.pop("tuning").command[1:3] == ["-m", "benchmarks.tuning"]
    assert measuring.pop("device-limits").command[1:3] == ["-m", "benchmarks.device_limits"]
    traffic = measuring.pop("traffic")
    assert traffic.command[0] == "/opt/ncu"
    assert traffic.command[traffic.command.index("--cache-control") + 1] == "none"
    assert traffic.proof_file in traffic.command
    counted = '"0","41","python3","127.0.0.1","batchnorm_ext::resident","dram__bytes_read.sum","byte","51"'
    assert re.search(traffic.proof, counted)
    assert not re.search(traffic.proof, "==ERROR== ERR_NVGPUCTRPERM - dram__bytes_read.sum")
    for one in measuring.values():
        commands.parser().parse_args([word.replace(gpu.SECONDS, "9") for word in one.command[3:]])
    checking = [one for one in stages if one.decides]
    assert [one.name for one in checking] == ["exercise", "tests", "system-tests", *gpu.SANITIZERS]
    tested = [word for one in checking for word in one.command if word.startswith("tests/")]
    assert sorted(tested) == sorted(
        f"tests/{path.name}" for path in Path(__file__).parent.glob("test_*.py")
    )
    for one in checking[1:]:  # pytest that skips everything, a sanitizer that looked at nothing
        ends = ["= 0 passed, 12 skipped in 1s =", "= 12 skipped in 1s =", "Error: timed-out"]
        assert not any(re.search(one.proof, end) for end in ends)
        ends = ["= 3 failed, 12 passed, 1 skipped in 1s ="]
        ends += ["ERROR SUMMARY: 0 errors", "RACECHECK SUMMARY: 0 hazards displayed (0 errors)"]
        assert any(re.search(one.proof, end) for end in ends)
        assert not re.search(one.proof, "RACECHECK SUMMARY: 10 hazards displayed (0 errors)")
    tests, system_tests = checking[1:3]
    files = [word for word in tests.command if word.startswith("tests/")]
    assert files[: len(gpu.FIRST_TESTS)] == [f"tests/{name}" for name in gpu.FIRST_TESTS]
    assert files[-1] == f"tests/{gpu.LAST_TESTS}"
    # What hangs is ended while there is time for what it has not reached.
    assert min(tests.share, system_tests.share) > 2 * gpu.TEST_S
    assert checking[0].share > gpu.STARTING_S + gpu.STALLED_S
    monkeypatch.setattr(gpu, "_tool", lambda name: "")
    absent = [one for one in gpu._checking_stages(tmp_path) if one.name in gpu.SANITIZERS]
    assert all(one.command == [] and "not found" in one.note for one in absent)


def test_tools_are_found_where_packages_put_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(gpu, "TOOL_FOLDERS", ("/does/not/exist", f"{tmp_path}/*"))
    for version in ("2025.3", "2025.4"):
        tool = tmp_path / version / "ncu"
        tool.parent.mkdir()
        tool.write_text("")
        tool.chmod(0o755)
    assert gpu._tool("ncu") == str(tool)
    assert gpu._tool("compute-sanitizer") == ""


def test_device_limits_are_measured_and_kept_whatever_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "new" / "limits.json"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_limits.main([str(out)]) == device_limits.EXIT_NO_GPU
    assert not out.exists()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(device_limits, "describe_machine", lambda *_: {"device": "Some GPU"})
    monkeypatch.setattr(
        device_limits, "measure_peers", lambda measured: measured({"peers": [{"us": 1.0}]})
    )
    compiler = tmp_path / "bin" / "nvcc"
    compiler.parent.mkdir()
    monkeypatch.setattr(device_limits, "find_toolkit", lambda: _build.Toolkit(tmp_path, (13, 0)))
    program = """#!/bin/sh
[ $1 = columns ] && exit 1
echo "{\\"$1\\": 2}"
"""
    for body, works in (("exit 1", False), (f"cat >$7 <<'END'\n{program}END\nchmod +x $7", True)):
        compiler.write_text(f"#!/bin/sh\n{body}\n")
        compiler.chmod(0o755)
        assert device_limits.main([str(out)]) == 1
        found = json.loads(out.read_text())
        assert found["peers"] == [{"us": 1.0}]
        assert "failed" in str(found.keys())
        measured = [name for name in device_limits.EXPERIMENTS if name in found]
        assert measured == [n for n in device_limits.EXPERIMENTS if works and n != "columns"]


@pytest.mark.parametrize("experiment", tuning.EXPERIMENTS, ids=lambda one: one.constant)
def test_constants_of_the_plan_can_be_given_values(
    experiment: tuning.Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a constant is in is compiled anew; the other objects are those of the build at hand."""
    csrc = _build.source_root()
    sources = [csrc / "cuda" / "launch" / name for name in ("launch_plan.cpp", "forward_half.cu")]
    sources.append(csrc / "cpu" / "blocking.cpp")
    known = []
    for source in sources:
        output = tmp_path / f"{source.stem}.o"
        output.write_text(f"old {source.name}\n")
        command = f"cat {csrc}/cuda/launch/launch_plan.h {source} >{output}"
        known.append(tuning.Compilation(source, output, command))
    joined = [sys.executable, "-c", JOIN]
    monkeypatch.setattr(tuning, "_link_command", lambda: joined)
    monkeypatch.setattr(tuning, "_libraries", lambda: [])
    for i, value in enumerate(experiment.values):
        text = tuning.build(tmp_path / str(i), experiment.constant, value, known).read_text()
        assert re.search(rf"\b{experiment.constant}(\[\])? = {re.escape(value)};", text)
        assert "old launch_plan.cpp" not in text
        assert "old blocking.cpp" in text
        in_a_header = experiment.constant == "exchange_bytes"
        assert ("old forward_half.cu" in text) != in_a_header


JOIN = """
import pathlib, sys
*objects, _, library = sys.argv[1:]
pathlib.Path(library).write_text("".join(pathlib.Path(one).read_text() for one in objects))
"""


def test_constant_that_is_not_defined_once_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cuda").mkdir()
    for name in ("a.h", "b.h"):
        (tmp_path / "cuda" / name).write_text("constexpr int kTwice = 2;\n")
    with pytest.raises(ValueError, match=r"kTwice must be defined once; it is in a\.h, b\.h"):
        tuning.with_value(tmp_path, "kTwice", "3")
    with pytest.raises(ValueError, match="kNever must be defined once; it is in no file"):
        tuning.with_value(tmp_path, "kNever", "3")


@pytest.mark.native
@pytest.mark.parametrize("op", KERNEL_OPS)
def test_builds_are_compared_and_wrong_ones_told(op: str) -> None:
    native = _extension.backend()
    broken = SimpleNamespace(forward=native.forward, backward=native.backward)
    name = "backward" if op == "backward" else "forward"
    original = getattr(native, name)

    def shifted(*given: object) -> tuple[torch.Tensor, ...]:
        first, *others = original(*given)
        return (first + 1, *others)

    setattr(broken, name, shifted)
    modules = {tuning.BASE: native, "same": native, "wrong": broken}
    base, same, wrong = tuning.compare(modules, SMALL, op, "cpu", seconds=0.0)
    assert base["ratio"][0] == 1
    assert same["us"] > 0
    assert "is off by" in wrong["failed"]
    assert "ratio" not in wrong
    assert "is off by" in tuning.told({"constant": "kSome", **wrong})


@pytest.mark.parametrize("case", gpu.exercise_cases()[::9], ids=str)
def test_exercise_finds_nothing_wrong(case: Case, device: str) -> None:
    assert gpu.exercise(device, [case]) == []


def test_exercise_ends_in_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was not reached is said; that nothing was reached is a failure."""
    assert gpu.exercise("cpu", [SMALL, SMALL], until=0) == ["no time for the last 2 of 2 cases"]
    assert gpu.exercise_in_processes(until=0) == 1
    times = iter([1])
    monkeypatch.setattr(gpu.time, "time", lambda: next(times, 3))
    assert gpu.exercise("cpu", [SMALL, SMALL], until=2) == []
    assert "no time for the last 1 of 2 cases" in capsys.readouterr().out


def test_exercise_goes_on_behind_a_case_that_costs_the_device(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stand_in(first: int, until: str) -> list[str]:
        """Loses the device at case 1 and says nothing any more at case 3."""
        ends = {0: "sys.exit(4)", 2: "time.sleep(600)"}.get(first, "")
        code = (
            f"import sys, time; print('case {first}: a\\ncase {first + 1}: b', flush=True); {ends}"
        )
        return [sys.executable, "-c", code]

    monkeypatch.setattr(gpu, "STALLED_S", 5)
    monkeypatch.setattr(gpu, "_exercise_command", stand_in)
    assert gpu.exercise_in_processes(time.time() + 120) == 1
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("case ")]
    assert told[2] == "case 1 ended its process: 4"
    assert told[5] == "case 3 ended its process: -9"
    assert told[6:] == ["case 4: a", "case 5: b"]


@pytest.mark.parametrize(
    ("first_says", "ends", "told"),
    [
        ("", "raise ImportError", ["case -1 ended its process: 1", "case 0: a"]),
        (
            "case 0: a",
            "raise MemoryError",
            ["case 0: a", "case 0 ended its process: 1", "case 1: a"],
        ),
        (
            "case 0: a",
            "time.sleep(600)",
            ["case 0: a", "case 0 ended its process: -9", "case 1: a"],
        ),
        ("case 0: a", f"sys.exit({gpu.EXIT_WRONG})", ["case 0: a"]),
    ],
    ids=["not started", "exception", "first case stalls", "wrong results"],
)
def test_exercise_goes_on_unless_it_came_to_its_end(
    first_says: str,
    ends: str,
    told: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    begun = []

    def stand_in(first: int, until: str) -> list[str]:
        begun.append(first)
        says, end = (first_says, ends) if len(begun) == 1 else (f"case {first}: a", "")
        code = f"import sys, time; print({says!r}, flush=True); {end}"
        return [sys.executable, "-c", code]

    monkeypatch.setattr(gpu, "FIRST_CASE_S", 3)
    monkeypatch.setattr(gpu, "_exercise_command", stand_in)
    assert gpu.exercise_in_processes(time.time() + 120) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("case ")] == told


def test_exercise_of_data_that_do_not_fit_is_a_failure_of_their_case(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(case: Case, device: str) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(gpu, "make_problem", full)
    failures = gpu.exercise("cpu", [SMALL, SMALL])
    assert failures == [f"{SMALL} data: OutOfMemoryError: CUDA out of memory."] * 2


def test_exercise_tells_wrong_results_from_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for found, code in (([], 0), (["wrong"], gpu.EXIT_WRONG)):
        monkeypatch.setattr(gpu, "exercise", lambda *_, found=found: found)
        assert gpu.main(["--exercise-from", "0"]) == code
    assert gpu.EXIT_WRONG not in (0, 1, gpu.EXIT_LOST, gpu.EXIT_NO_GPU)


def test_lost_device_is_told_from_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", failing)
    gpu._still_there("cpu")
    with pytest.raises(gpu.DeviceLost, match="illegal memory access"):
        gpu._still_there("cuda")


def test_exercise_finds_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BatchnormExt, "forward", Unbiased.forward)
    (failure,) = gpu.exercise("cpu", [SMALL])
    assert failure.startswith("test/small 4x3x5x7 float32 contiguous forward: y is off by")


@pytest.mark.gpu
@pytest.mark.parametrize("buffers", [1, 3])
def test_cuda_sampler_times_the_device(buffers: int) -> None:
    x = [torch.randn(1 << 24, device="cuda") for _ in range(buffers)]
    seconds = cuda_sampler(lambda i: x[i].clone(), buffers)()
    assert 1e-5 < seconds < 1e-2


@pytest.mark.gpu
def test_launches_are_counted() -> None:
    x = torch.randn(1 << 10, device="cuda")
    assert count_launches(lambda i: (x + 1) * 2) == 2
