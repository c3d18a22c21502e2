"""A run from the first task to the last: the time budget, the progress bar, and Ctrl-C."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .contenders import Contender, Outcome, first_line
from .results import Record

SAVE_EVERY_S = 20
COMPILING_SHARE = 0.3
FAILURES_IN_A_ROW = 5


@dataclass(frozen=True)
class Task:
    """One thing to measure.

    Attributes
    ----------
    label
        Shown beside the progress bar.
    run
        Called with the session and the seconds the task may take.
    weight
        Its share of the time, relative to the other tasks.
    """

    label: str
    run: Callable[[Session, float], None]
    weight: float = 1.0


@dataclass
class Session:
    """What the tasks of a run share.

    Attributes
    ----------
    device
        ``cpu`` or ``cuda``.
    record
        Where the tasks put what they find.
    contenders
        The contenders that can run on this machine, by name.
    skipped, failed
        Tasks that the budget did not reach, and those that raised, with the reason.
    """

    device: str
    threads: int
    record: Record
    contenders: dict[str, Contender]
    seed: int = 0
    caches: Sequence[str] = ("hot",)
    skipped: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    interrupted: bool = False

    def __post_init__(self) -> None:
        self.order = random.Random(self.seed)
        self._may_compile_s = 0.0
        self._compilations: dict[str, list[float]] = {}
        self._passed_over: dict[str, int] = {}

    def affordable(self, seconds: float) -> dict[str, Contender]:
        """The contenders of a measurement of so many seconds.

        Those that compile for each shape take part as often as a share of the time allows.
        """
        self._may_compile_s += COMPILING_SHARE * seconds
        chosen = dict(self.contenders)
        for name, contender in self.contenders.items():
            seen = self._compilations.get(name, [])
            if contender.compiles and seen and sum(seen) / len(seen) > self._may_compile_s:
                del chosen[name]
                self._passed_over[name] = self._passed_over.get(name, 0) + 1
        return chosen

    def prepared(self, outcome: Outcome) -> float:
        """Account for the compiling that a measurement began with; returns the seconds of it."""
        spent = 0.0
        for name, seconds in outcome.seconds.items():
            if self.contenders[name].compiles:
                self._compilations.setdefault(name, []).append(seconds)
                spent += seconds
        self._may_compile_s -= spent
        return spent

    def _tell_who_was_passed_over(self) -> None:
        for name, times in self._passed_over.items():
            there = len(self._compilations[name])
            reason = (
                f"takes part in {there} of {there + times} measurements, since it compiles for each shape: "
                f"{COMPILING_SHARE:.0%} of the time goes into that"
            )
            self.record.missing.append({"contender": name, "reason": reason})

    def run(
        self, tasks: Sequence[Task], budget_s: float, save: Callable[[], None] | None = None
    ) -> None:
        """Run tasks in turn; each gets its share of the time that is left.

        A task that takes less leaves the rest to those behind it. Tasks whose turn comes after
        the budget is spent are skipped and listed; one that raises is listed too, and the run goes
        on unless several do so in a row. An interrupt ends the run and keeps the record.
        `save` is called from time to time.
        """
        start = saved = time.monotonic()
        deadline = time.monotonic() + budget_s
        weight = weight_left = sum(task.weight for task in tasks)
        in_a_row = 0
        with Progress(len(tasks), own_clock=True) as bar:
            try:
                for task in tasks:
                    left = deadline - time.monotonic()
                    if left <= 0 or in_a_row >= FAILURES_IN_A_ROW:
                        self.skipped.append(task.label)
                        continue
                    done = weight - weight_left
                    likely = (time.monotonic() - start) * weight_left / done if done else left
                    bar.show(task.label, f"{min(left, likely):.0f} s left")
                    failures = len(self.failed)
                    try:
                        task.run(self, left * task.weight / weight_left)
                    except Exception as error:  # one that fails must not cost the others' results
                        self.failed.append(f"{task.label}: {first_line(error)}")
                    in_a_row = in_a_row + 1 if len(self.failed) > failures else 0
                    weight_left -= task.weight
                    bar.advance()
                    if save and time.monotonic() - saved > SAVE_EVERY_S:
                        save()
                        saved = time.monotonic()
            except KeyboardInterrupt:
                self.interrupted = True
        self._tell_who_was_passed_over()


class Progress:
    """A progress bar with the time left; plain lines where tqdm is not installed."""

    def __init__(self, total: int, unit: str = "task", own_clock: bool = False) -> None:
        """`own_clock` leaves the time left to the notes of `show`."""
        self.total = total
        self.done = 0
        try:
            from tqdm import tqdm
        except ImportError:
            self.bar = None
        else:
            clock = "{elapsed}" if own_clock else "{elapsed}<{remaining}"
            shape = "{desc} |{bar}| {n_fmt}/{total_fmt} [" + clock + "{postfix}]"
            self.bar = tqdm(
                total=total, dynamic_ncols=True, unit=unit, leave=False, bar_format=shape
            )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def show(self, label: str, note: str) -> None:
        """Say what is under way."""
        if self.bar is not None:
            self.bar.set_description_str(label, refresh=False)
            self.bar.set_postfix_str(note)
        elif self.done * 20 // self.total != (self.done - 1) * 20 // self.total:
            print(f"[{self.done + 1}/{self.total}] {label}, {note}", file=sys.stderr, flush=True)

    def advance(self) -> None:
        self.done += 1
        if self.bar is not None:
            self.bar.update()
