"""A run from the first task to the last: the time budget, the progress bar, and Ctrl-C."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .contenders import Contender
from .results import Record

SAVE_EVERY_S = 20


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
    """

    device: str
    threads: int
    record: Record
    contenders: dict[str, Contender]
    seed: int = 0
    caches: Sequence[str] = ("hot",)
    skipped: list[str] = field(default_factory=list)
    interrupted: bool = False

    def __post_init__(self) -> None:
        self.order = random.Random(self.seed)

    def run(
        self, tasks: Sequence[Task], budget_s: float, save: Callable[[], None] | None = None
    ) -> None:
        """Run tasks in turn; each gets its share of the time that is left.

        A task that takes less leaves the rest to those behind it. Tasks whose turn comes after
        the budget is spent are skipped and listed; an interrupt ends the run and keeps the record.
        `save` is called from time to time.
        """
        start = saved = time.monotonic()
        deadline = time.monotonic() + budget_s
        weight = weight_left = sum(task.weight for task in tasks)
        with Progress(len(tasks), own_clock=True) as bar:
            try:
                for task in tasks:
                    left = deadline - time.monotonic()
                    if left <= 0:
                        self.skipped.append(task.label)
                        continue
                    done = weight - weight_left
                    likely = (time.monotonic() - start) * weight_left / done if done else left
                    bar.show(task.label, f"{min(left, likely):.0f} s left")
                    task.run(self, left * task.weight / weight_left)
                    weight_left -= task.weight
                    bar.advance()
                    if save and time.monotonic() - saved > SAVE_EVERY_S:
                        save()
                        start = saved = time.monotonic()
            except KeyboardInterrupt:
                self.interrupted = True


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
