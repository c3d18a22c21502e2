"""Requirements on ratios that decide the exit code, such as ``forward<=1.5:floor``."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from .report import ratios_of_ours
from .results import CONTENDERS, Record
from .stats import geometric_mean

PATTERN = re.compile(r"(worst:)?([a-z_]+)<=(\d+(?:\.\d+)?):([a-z_]+)")


@dataclass(frozen=True)
class Requirement:
    """Our time over a contender's must be at most `ratio`: on geometric mean, or in every case.

    A single case falls short where its whole interval lies above `ratio`.
    """

    op: str
    ratio: float
    contender: str
    every_case: bool = False

    @classmethod
    def parse(cls, text: str) -> Requirement:
        """Read ``[worst:]OP<=RATIO:CONTENDER``.

        Raises
        ------
        ValueError
            Where the text has another form or names an unknown contender.
        """
        found = PATTERN.fullmatch(text.replace(" ", ""))
        if found is None or found[4] not in CONTENDERS:
            raise ValueError(f"expected [worst:]OP<=RATIO:CONTENDER, got {text!r}")
        return cls(found[2], float(found[3]), found[4], bool(found[1]))

    def __str__(self) -> str:
        return f"{'worst:' * self.every_case}{self.op}<={self.ratio:g}:{self.contender}"

    def failure(self, record: Record) -> str | None:
        """What falls short, or None. Nothing measured is a failure: it decides nothing."""
        measured = ratios_of_ours(record, self.op, self.contender)
        if not measured:
            return f"{self} cannot be decided: no such measurement"
        if not self.every_case:
            mean = geometric_mean([ratio for _, ratio in measured])
            return None if mean.value <= self.ratio else f"{self} not met: {mean}"
        # Among hundreds of cases noise alone lifts some ratio over any bound: an interval decides.
        short = [(name, ratio) for name, ratio in measured if ratio.low > self.ratio]
        if not short:
            return None
        name, worst = max(short, key=lambda item: item[1].value)
        return f"{self} not met in {len(short)} of {len(measured)} cases, worst {worst} in {name}"


def unmet(record: Record, requirements: Iterable[Requirement]) -> list[str]:
    """The failures among requirements."""
    found = (requirement.failure(record) for requirement in requirements)
    return [failure for failure in found if failure]
