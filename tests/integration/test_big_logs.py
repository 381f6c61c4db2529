"""What jobs print, on a real Engine: as much as they like, in whatever bytes, with any log driver."""

import json
import os
import re
import subprocess
import sys
from typing import Any

import docker
import pytest
from django.conf import settings as django_settings

from container_manager.models import ContainerJob, DockerHost, JobAttempt, Status
from container_manager.queue import QueueManager
from tests.conftest import ROOT, database_url, wait_until
from tests.fake_engine import one_round, queued, row

MIB = 1024 * 1024
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
MARKER = re.compile(r"\n\[(\d+) bytes dropped\]\n")
#: What an Engine keeps is the same, whichever database is told of it; PostgreSQL is the one that refuses bytes.
on_postgres = pytest.mark.parametrize("database", ["postgres"], indirect=True)


def shell(script: str) -> list[str]:
    return ["sh", "-c", script]


def run_out(manager: QueueManager, engine: docker.DockerClient, script: str) -> ContainerJob:
    """A job whose container has ended, and is not harvested."""
    job = queued(manager, command=shell(script))
    assert manager.launch_next_batch(1000).job_ids == (job.pk,)
    container_id = row(job).container_id
    wait_until(lambda: engine.containers.get(container_id).status == "exited", 60)
    return job


def harvested(manager: QueueManager, engine: docker.DockerClient, script: str) -> JobAttempt:
    job = run_out(manager, engine, script)
    wait_until(lambda: one_round(manager) and row(job).status == Status.COMPLETED, 60)
    return job.attempts.get()


@on_postgres
def test_200_megabytes_of_output_cost_a_harvester_less_than_50_of_memory(
    docker_host: DockerHost, manager: QueueManager, engine: docker.DockerClient
) -> None:
    run_out(manager, engine, "echo small")
    big = run_out(manager, engine, "yes $(printf %04000d 7) | head -c 200000000; echo; echo end; echo err >&2")
    environment = os.environ | {
        "DATABASE_URL": database_url(),
        "CONTAINER_MANAGER": json.dumps(django_settings.CONTAINER_MANAGER),
    }

    grown = subprocess.run(
        [sys.executable, "-m", "tests.integration.harvester", str(big.pk)],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, timeout=60, check=True,
    )  # fmt: skip

    attempt = big.attempts.get()
    assert int(grown.stdout) < 50 * MIB
    assert (attempt.exit_code, attempt.stderr) == (0, "err\n")
    [marker] = MARKER.finditer(attempt.stdout)
    assert len(attempt.stdout) == 2 * MIB + len(marker.group())
    assert attempt.stdout.endswith("\nend\n")


@on_postgres
def test_one_line_of_20_megabytes_is_cut_between_characters_and_says_how_much_was_dropped(
    docker_host: DockerHost, manager: QueueManager, engine: docker.DockerClient
) -> None:
    # Less than the Engine itself keeps, so that all of it is read.
    written = 18_000_000
    attempt = harvested(manager, engine, f"printf x; yes é | tr -d '\\n' | head -c {written}")

    head, dropped, tail = MARKER.split(attempt.stdout)
    # The cut goes through a character, at the end of the head: what is left of it is dropped, and not counted.
    assert (set(head[1:]), set(tail), head[0]) == ({"é"}, {"é"}, "x")
    kept = len(head.encode()) + len(tail.encode())
    assert 0 <= 2 * MIB - kept <= 2
    assert int(dropped) == written + 1 - 2 * MIB


def test_bytes_that_are_no_text_are_replaced_each_stream_for_itself(
    docker_host: DockerHost, manager: QueueManager, engine: docker.DockerClient
) -> None:
    lone_surrogate = r"\355\240\200"
    script = rf"printf 'a\000b\377c{lone_surrogate}d\303'; printf '\251\000\303\251' >&2"

    attempt = harvested(manager, engine, script)

    assert attempt.stdout == f"a{REPLACEMENT}b{REPLACEMENT}c{REPLACEMENT * 3}d{REPLACEMENT}"
    assert attempt.stderr == f"{REPLACEMENT * 2}é"


@on_postgres
def test_a_character_is_whole_whatever_piece_the_engine_kept_it_in(
    docker_host: DockerHost, manager: QueueManager, engine: docker.DockerClient
) -> None:
    # The Engine keeps a line in pieces of 16 KiB, and an odd byte before them cuts each through a character.
    attempt = harvested(manager, engine, "printf x; yes é | tr -d '\\n' | head -c 100000")

    assert attempt.stdout == "x" + "é" * 50_000


@on_postgres
def test_no_more_is_kept_of_each_stream_than_the_settings_say(
    docker_host: DockerHost, manager: QueueManager, engine: docker.DockerClient, settings: Any
) -> None:
    settings.CONTAINER_MANAGER = settings.CONTAINER_MANAGER | {"LOG_HEAD_BYTES": 4, "LOG_TAIL_BYTES": 6}

    attempt = harvested(manager, engine, "printf 0123456789abcdef; printf 0123456789 >&2")

    assert attempt.stdout == "0123\n[6 bytes dropped]\nabcdef"
    assert attempt.stderr == "0123456789"


@on_postgres
def test_logs_that_take_too_long_to_read_are_cut_short_and_the_job_is_harvested(
    docker_host: DockerHost, manager: QueueManager, engine: docker.DockerClient, settings: Any
) -> None:
    settings.CONTAINER_MANAGER = settings.CONTAINER_MANAGER | {"LOG_SECONDS": 1e-6}

    attempt = harvested(manager, engine, "yes | head -c 1000000")

    assert attempt.exit_code == 0
    assert attempt.stdout.startswith("y\n")
    assert attempt.stdout.endswith("[not read further: it took more than 1e-06 s]\n")


@on_postgres
def test_a_driver_that_keeps_no_logs_costs_the_logs_and_not_the_result(
    docker_host: DockerHost, manager: QueueManager, engine: docker.DockerClient, settings: Any
) -> None:
    settings.CONTAINER_MANAGER = settings.CONTAINER_MANAGER | {"LOG_DRIVER": "none"}

    attempt = harvested(manager, engine, "echo out")

    assert (attempt.exit_code, attempt.reason) == (0, "exit_code")
    assert attempt.stdout.startswith("\n[unavailable: logs: ")
    assert attempt.stdout.count("unavailable") == attempt.stderr.count("unavailable") == 1
