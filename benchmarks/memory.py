"""Memory: what is kept for backward, and the peak of a training step of one layer."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .contenders import ModuleOps, NotApplicable
from .problem import make_problem
from .session import Session, Task
from .shapes import Case, with_layouts


def memory_cases(device: str) -> list[Case]:
    """Tensors far larger than what else a process allocates, in each layout."""
    batch = 64 if device == "cuda" else 16
    cases = with_layouts([Case("memory/256x56", (batch, 256, 56, 56))])
    return [*cases, replace(cases[0], dtype="bfloat16"), Case("memory/1d", (batch, 512, 2000))]


# How the layer is used: trained; evaluated with frozen parameters, as in fine-tuning, where only
# the gradient of the input is asked for; trained on an input of which every other element is a gap.
MODES = ("training", "frozen", "strided")


def memory_tasks(device: str) -> list[Task]:
    cases = memory_cases(device)
    uses = [(case, "training") for case in cases] + [(cases[0], mode) for mode in MODES[1:]]
    return [
        Task(
            f"memory {case} {mode}",
            lambda session, _, case=case, mode=mode: measure_memory(session, case, mode),
            weight=3.0,  # most of it for torch.compile to compile
        )
        for case, mode in uses
    ]


def measure_memory(session: Session, case: Case, mode: str) -> None:
    """Record saved and peak bytes of every contender that is a module."""
    for name, contender in session.contenders.items():
        if not isinstance(contender, ModuleOps):
            continue
        problem = make_problem(case, session.device, seed=session.seed)
        try:
            module = contender.module(problem)
        except NotApplicable:
            continue
        x, dy = problem.x[0], problem.dy[0]
        if mode == "strided":
            x = torch.stack([x, x], -1)[..., 0]
        x.requires_grad_()
        module.train(mode != "frozen").requires_grad_(mode != "frozen")
        wanted = (x, *(one for one in module.parameters() if one.requires_grad))
        keep = tuple(module.parameters())

        def step(module: Any = module, wanted: Any = wanted, dy: Tensor = dy) -> None:
            torch.autograd.grad(module(wanted[0]), wanted, dy)

        step()  # what is set up once is no cost of a step
        session.record.memory.append(
            {
                "case": case.name,
                "shape": list(case.shape),
                "dtype": case.dtype,
                "layout": case.layout,
                "mode": mode,
                "contender": name,
                "input_bytes": case.bytes,
                "saved_bytes": saved_bytes(lambda module=module, x=x: module(x), keep),
                "peak_bytes": peak_bytes(step, session.device),
            }
        )


def saved_bytes(forward: Callable[[], Tensor], parameters: tuple[Tensor, ...] = ()) -> int:
    """Bytes of the distinct storages that autograd keeps for backward, parameters aside."""
    kept: dict[int, int] = {}
    excluded = {parameter.untyped_storage().data_ptr() for parameter in parameters}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in excluded:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    del output
    return sum(kept.values())


def peak_bytes(step: Callable[[], Any], device: str) -> int | None:
    """Most memory a step holds above what was held before it; None where the system hides it."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        before = _own_memory("VmRSS")
        step()
        return max(0, _own_memory("VmHWM") - before)
    except OSError:
        return None


def _own_memory(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"^{name}:\s*(\d+) kB$", status, re.MULTILINE)
    return int(found.group(1)) * 1024 if found else 0
