"""A file of jobs, in YAML or JSON: `{"jobs": [{"image": …, "command": […]}, …]}`."""

import json
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import pydantic
import yaml
from django.core.exceptions import ValidationError
from django.db import transaction
from django.utils import timezone

from .conf import describe_problems
from .exceptions import ManifestInvalid
from .models import ContainerJob, DockerHost
from .policy import describe
from .queue import queue_manager
from .types import Frozen, JobSpec, Text


class Expectation(Frozen):
    """How a job is expected to end, for whoever checks."""

    status: Literal["completed", "failed", "cancelled"]
    reason: str
    exit_code: int | None = None


class ManifestEntry(JobSpec):
    """A job, with the fields of `JobSpec`; where it must run, when at the earliest, and how it should end."""

    host: Text = ""
    schedule_in_seconds: float | None = pydantic.Field(default=None, ge=0, allow_inf_nan=False)
    expect: Expectation | None = None


class Manifest(Frozen):
    jobs: tuple[ManifestEntry, ...] = pydantic.Field(min_length=1)


def parse(text: str) -> Manifest:
    """The manifest in the text; `ManifestInvalid` names each entry (from 0), field and fix."""
    try:
        # Every JSON text is YAML, too, but a JSON parser's messages are better for it.
        content = json.loads(text) if text.lstrip().startswith(("{", "[")) else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as e:
        raise ManifestInvalid(f"neither JSON nor YAML: {e}") from e
    try:
        return Manifest.model_validate(content)
    except pydantic.ValidationError as e:
        raise ManifestInvalid("; ".join(describe_problems(e))) from e


def load(path: Path) -> Manifest:
    """As `parse`, from a file."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ManifestInvalid(f"{path}: {e}") from e
    return parse(text)


@transaction.atomic
def queue(manifest: Manifest, *, created_by: str = "") -> list[ContainerJob]:
    """Queue all jobs in the file's order, or, with `ManifestInvalid`, none."""
    hosts = {host.name: host for host in DockerHost.objects.all()}
    return [_queue_entry(number, entry, hosts, created_by) for number, entry in enumerate(manifest.jobs)]


def _queue_entry(number: int, entry: ManifestEntry, hosts: dict[str, DockerHost], created_by: str) -> ContainerJob:
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
    return queue_manager.queue_job(job, schedule_for=None if wait is None else timezone.now() + timedelta(seconds=wait))
