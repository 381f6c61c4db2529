"""One row of the table: what was measured, against what, how often, and whether it is enough."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from django.db import connection


def repeats(usual: int) -> int:
    """How often a figure is measured that takes long: once on SQLite, where none is judged."""
    return 1 if connection.vendor == "sqlite" else usual


@dataclass(frozen=True)
class Figure:
    """`ours` and `reference` are samples in `unit`. The ratio is ours to the reference."""

    name: str
    database: str
    unit: str
    ours: Sequence[float]
    reference: Sequence[float] = ()
    #: What the reference is, in words.
    against: str = ""
    goal: str = ""
    #: None: printed, not judged; as all are on SQLite.
    is_reached: bool | None = None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        if not self.reference:
            return None
        if len(self.ours) == len(self.reference):
            # Measured in turns: what slowed the machine for a while slowed both of a pair.
            return statistics.median(mine / other for mine, other in zip(self.ours, self.reference, strict=True))
        return statistics.median(self.ours) / statistics.median(self.reference)

    def judged(self, is_reached: bool) -> "Figure":
        return replace(self, is_reached=is_reached)

    @property
    def verdict(self) -> str:
        if self.is_reached is None or self.database == "sqlite":
            return ""
        return "yes" if self.is_reached else "NO"

    @property
    def spread(self) -> str:
        """The least and the greatest of our samples."""
        return f"{_short(min(self.ours))}–{_short(max(self.ours))}" if len(self.ours) > 1 else ""

    @property
    def cells(self) -> tuple[str, ...]:
        return (
            self.name,
            self.database,
            f"{_short(statistics.median(self.ours))} {self.unit}",
            self.against + (f": {_short(statistics.median(self.reference))}" if self.reference else ""),
            "" if self.ratio is None else f"{self.ratio:.2f}",
            self.goal,
            self.verdict,
            f"{len(self.ours)}×",
            self.spread,
        )


HEADINGS = ("what", "on", "ours", "reference", "ratio", "goal", "reached", "runs", "spread")


@dataclass
class Table:
    figures: list[Figure] = field(default_factory=list)

    def render(self) -> str:
        """As Markdown, so that it can go into the README as it is."""
        rows = [HEADINGS, *(figure.cells for figure in self.figures)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
        lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in rows]
        lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
        notes = [f"- {figure.name}: {figure.note}" for figure in self.figures if figure.note]
        return "\n".join([*lines, "", *notes] if notes else lines)


def _short(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
