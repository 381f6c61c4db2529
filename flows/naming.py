"""Names of flow runs, for people who look for one among many."""

from datetime import UTC, datetime
from typing import Any

from prefect.runtime import flow_run

from .form_values import plain

_GROUPS = {"pending": "jobs that wait", "running": "jobs alive", "failed": "jobs that failed"}


def pass_name() -> str:
    """`pass 2024-05-17 14:03:11`: when it began, in UTC."""
    return f"pass {_now()}"


def jobs_name() -> str:
    """`job 12, 2024-05-17 14:03:11`, `jobs that failed, …`: by the parameters of `process-jobs`."""
    parameters: dict[str, Any] = flow_run.parameters or {}
    if parameters.get("job_id") is not None:
        return f"job {parameters['job_id']}, {_now()}"
    return f"{_GROUPS[parameters.get('status') or 'running']}, {_now()}"


def job_run_name() -> str:
    """`nightly-report, 2024-05-17 14:03:11`: of `run-container-job`, by its job's name or image."""
    spec = plain((flow_run.parameters or {}).get("spec"))
    # Whatever it is: what is wrong with it is told when the run has begun.
    fields = spec if isinstance(spec, dict) else getattr(spec, "__dict__", {})
    return f"{fields.get('name') or fields.get('image') or 'container'}, {_now()}"


def _now() -> str:
    return f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S}"
