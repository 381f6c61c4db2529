"""`make demo`, as a new user runs it."""

import os
import subprocess
from pathlib import Path

import docker

from tests.conftest import ROOT

EXPECTED = {
    "word-count": "completed  exit_code  0",
    "checksum": "completed  exit_code  0",
    "both-streams": "completed  exit_code  0",
    "exits-with-3": "failed     exit_code  3",
    "in-five-seconds": "completed  exit_code  0",
    "no-such-image": "failed     launch",
    "past-its-timeout": "failed     timeout    143",
    "high-priority": "completed  exit_code  0",
}


def make_demo(home: Path) -> subprocess.CompletedProcess[str]:
    # Not the outer make's flags: they would reach the inner one.
    kept = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    environment = kept | {"DATABASE_URL": f"sqlite:///{home / 'site.sqlite3'}", "PREFECT_HOME": str(home / "prefect")}
    environment.pop("DJANGO_SETTINGS_MODULE", None)
    return subprocess.run(["make", "demo"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_make_demo_shows_eight_jobs_that_end_as_expected_and_does_so_twice(
    engine: docker.DockerClient, tmp_path: Path
) -> None:
    runs = [make_demo(tmp_path) for _ in range(2)]

    for run in runs:
        assert run.returncode == 0, run.stdout + run.stderr
        lines = {line.split()[0]: " ".join(line.split()[1:]) for line in run.stdout.splitlines() if line.split()}
        for name, outcome in EXPECTED.items():
            assert lines[name].startswith(" ".join(outcome.split()))
        assert "and the one of high priority, queued last, started first." in run.stdout
        assert "-m deployments" in run.stdout
