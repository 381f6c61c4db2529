"""A file of jobs, in YAML or JSON: `{"jobs": [{"image": …, "command": […]}, …]}`."""

import json
import sys
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import pydantic
import yaml
from django.core.exceptions import ValidationError
from django.db import transaction

from .exceptions import ManifestInvalid
from .models import ContainerJob, DockerHost, Installation
from .policy import describe
from .queue import queue_manager
from .types import Frozen, JobSpec, RunSpec, describe_problems

#: Ten years: beyond that it is a mistake, and soon no date.
MAX_SCHEDULE_SECONDS = 10 * 366 * 24 * 3600


class Expectation(Frozen):
    """How a job is expected to end, for whoever checks."""

    status: Literal["completed", "failed", "cancelled"]
    reason: str
    exit_code: int | None = None


class ManifestEntry(RunSpec):
    """A job, with the fields of `RunSpec`; when it may run at the earliest, and how it should end."""

    schedule_in_seconds: float | None = pydantic.Field(default=None, ge=0, le=MAX_SCHEDULE_SECONDS, allow_inf_nan=False)
    expect: Expectation | None = None


class Manifest(Frozen):
    jobs: tuple[ManifestEntry, ...]

    @pydantic.field_validator("jobs")
    @classmethod
    def _is_not_empty(cls, value: tuple[ManifestEntry, ...]) -> tuple[ManifestEntry, ...]:
        if not value:
            raise ValueError("there must be at least 1 job")
        return value


def parse(text: str) -> Manifest:
    """The manifest in the text; `ManifestInvalid` names each entry (from 0), field and fix."""
    content = _content(text)
    if not isinstance(content, dict):
        raise ManifestInvalid('it must be a mapping with the key "jobs": {"jobs": [{"image": …}, …]}')
    try:
        return Manifest.model_validate(content)
    except pydantic.ValidationError as e:
        raise ManifestInvalid("; ".join(describe_problems(e, Manifest))) from e


def load(path: Path | None) -> Manifest:
    """As `parse`, from a file; None: from stdin."""
    try:
        text = sys.stdin.read() if path is None else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ManifestInvalid(f"{path or 'stdin'}: {e}") from e
    return parse(text)


def _content(text: str) -> Any:
    try:
        # Every JSON text is YAML, too, but that parser is slow.
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        json_error = e
    try:
        return yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError) as e:
        is_json = text.lstrip().startswith(("{", "["))
        raise ManifestInvalid(f"neither JSON nor YAML: {json_error if is_json else e}") from e


@transaction.atomic
def queue(manifest: Manifest, *, created_by: str = "") -> list[ContainerJob]:
    """Queue all jobs in the file's order, or, with `ManifestInvalid`, none."""
    hosts = {host.name: host for host in DockerHost.objects.all()}
    now = Installation.now()
    return [_queue_entry(number, entry, hosts, created_by, now) for number, entry in enumerate(manifest.jobs)]


def _queue_entry(
    number: int, entry: ManifestEntry, hosts: dict[str, DockerHost], created_by: str, now: datetime
) -> ContainerJob:
    if entry.host and entry.host not in hosts:
        raise ManifestInvalid(
            f"jobs.{number}.host: {entry.host}: no such host; there are: {', '.join(hosts) or 'none'}"
        )
    fields: dict[str, Any] = {name: getattr(entry, name) for name in JobSpec.model_fields}
    try:
        job = ContainerJob.objects.build(pinned_host=hosts.get(entry.host), created_by=created_by, **fields)
    except ValidationError as e:
        raise ManifestInvalid(f"jobs.{number}: {describe(e)}") from e
    wait = entry.schedule_in_seconds
    return queue_manager.queue_job(job, schedule_for=None if wait is None else now + timedelta(seconds=wait))
