"""The table of what became of the demonstration's jobs."""

from container_manager.manifest import ManifestEntry
from container_manager.models import ContainerJob

HEADINGS = ("job", "status", "reason", "exit code", "wait", "run", "first line of output")
#: characters of a job's output.
_WIDTH = 44


class Line:
    """One job beside what the manifest expected of it."""

    def __init__(self, job: ContainerJob, entry: ManifestEntry) -> None:
        self._job = job
        self._entry = entry
        self._attempt = job.attempts.last()

    @property
    def cells(self) -> tuple[str, ...]:
        job, attempt = self._job, self._attempt
        wait = (job.launched_at - job.queued_at).total_seconds() if job.launched_at and job.queued_at else None
        output = attempt.stdout or attempt.stderr or attempt.error if attempt else job.last_error
        first_line = output.splitlines()[0] if output else ""
        return (
            job.label,
            job.status,
            job.reason,
            "" if job.exit_code is None else str(job.exit_code),
            _seconds(wait),
            _seconds(attempt.run_seconds if attempt else None),
            first_line if len(first_line) <= _WIDTH else first_line[: _WIDTH - 1] + "…",
        )

    @property
    def surprise(self) -> str:
        """A sentence if the job did not end as expected."""
        job, expected = self._job, self._entry.expect
        if expected is None:
            return ""
        found = [job.status, job.reason]
        wanted = [expected.status, expected.reason]
        if expected.exit_code is not None:
            found.append(f"exit code {job.exit_code}")
            wanted.append(f"exit code {expected.exit_code}")
        return "" if found == wanted else f"{job.label}: {', '.join(found)}; expected: {', '.join(wanted)}"


def render(lines: list[Line]) -> str:
    rows = [HEADINGS, *(line.cells for line in lines)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    rows.insert(1, tuple("-" * width for width in widths))
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _seconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{max(0.0, seconds):.1f} s"
