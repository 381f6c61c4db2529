"""Queue the jobs of a file."""

import json
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from container_manager import manifest
from container_manager.exceptions import ManifestInvalid


class Command(BaseCommand):
    help = "Queue the container jobs of a YAML or JSON file: all of them or, if one is wrong, none"

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("file", metavar="FILE", help="the manifest; - reads it from stdin")
        parser.add_argument("--json", action="store_true", help="print the jobs' ids as one JSON object")

    def handle(self, *, file: str, json: bool, **options: Any) -> None:
        try:
            content = manifest.load(None if file == "-" else Path(file))
            jobs = manifest.queue(content, created_by="queue_container_jobs")
        except ManifestInvalid as e:
            raise CommandError(str(e)) from e
        if json:
            self.stdout.write(_as_json([job.pk for job in jobs]))
            return
        for job in jobs:
            self.stdout.write(f"Queued job {job.pk}: {job.label}")


def _as_json(job_ids: list[int]) -> str:
    return json.dumps({"job_ids": job_ids})
