"""One short run; `make neighbours` makes a long one."""

import os
import subprocess
import sys

import docker
import pytest

from tests.conftest import ROOT, missing


@pytest.mark.timeout(600)
def test_two_installations_on_one_server_engine_and_database_server_do_not_touch_each_other(
    request: pytest.FixtureRequest, engine: docker.DockerClient
) -> None:
    if "TEST_POSTGRES_URL" not in os.environ:
        missing(request.config, "PostgreSQL (TEST_POSTGRES_URL)")

    run = subprocess.run(
        [sys.executable, "-m", "tests.neighbours", "--seconds", "25"],
        cwd=ROOT, capture_output=True, text=True, timeout=580,
    )  # fmt: skip

    assert run.returncode == 0, run.stdout + run.stderr
