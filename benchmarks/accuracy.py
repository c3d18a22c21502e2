"""Accuracy: errors against float64 as the mean of the data moves away from its deviation."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from .contenders import Contender, NotApplicable, first_line, results_of
from .problem import Problem, errors, make_problem
from .session import Session, Task
from .shapes import Case

OFFSETS = (0.0, 1.0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6)
RESULTS = ("mean", "variance", "y", "dx", "dweight", "dbias")


def accuracy_tasks() -> list[Task]:
    return [
        Task(
            f"accuracy, mean/std {offset:g}",
            lambda s, _, offset=offset: measure_accuracy(s, offset),
            weight=3.0,
        )
        for offset in OFFSETS
    ]


def offset_problem(offset: float, device: str, seed: int) -> Problem:
    """fp32 data of mean `offset` and deviation 1; momentum 1 brings the statistics to light."""
    case = Case("accuracy", (32, 16, 56, 56))
    problem = make_problem(case, device, seed=seed)
    generator = torch.Generator(device).manual_seed(seed)
    noise = torch.randn(case.shape, generator=generator, device=device, dtype=torch.float64)
    return replace(problem, x=[(noise + offset).float()], momentum=1.0)


def measure_accuracy(session: Session, offset: float) -> None:
    """Record the relative errors of statistics, output and gradients of every contender."""
    for name, contender in session.contenders.items():
        if name == "floor":
            continue
        problem = offset_problem(offset, session.device, session.seed)
        try:
            found = _errors_of(contender, problem)
        except NotApplicable:
            continue
        except Exception as error:  # a peer that fails is reported, the others go on
            session.record.excluded.append(
                {
                    "contender": name,
                    "case": str(problem.case),
                    "op": f"accuracy at {offset:g}",
                    "reason": first_line(error),
                }
            )
            continue
        entry = {"contender": name, "mean_over_std": offset, "dtype": problem.case.dtype}
        session.record.accuracy.append(entry | found)


def _errors_of(contender: Contender, problem: Problem) -> dict[str, float | None]:
    found: dict[str, float] = {}
    for op in ("forward", "backward"):
        prepared = contender.prepare(problem, op)
        problem.reset()
        results = results_of(prepared, op)
        problem.reset()
        found |= errors(problem, results, op)
    names = {"running_mean": "mean", "running_var": "variance"}
    return {names.get(name, name): _json_number(error) for name, error in found.items()}


def _json_number(value: float) -> Any:
    """Three digits; None where the value is not finite, which JSON cannot say."""
    return float(f"{value:.3g}") if math.isfinite(value) else None
