"""What the command finds where people start it: cron, a daemon, a container, a pipe; each test one such place."""

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from django.db import connection

from container_manager.models import ContainerJob, Status
from tests.conftest import wait_until

from .conftest import MANAGE, Site

COMMAND = [*MANAGE, "process_container_jobs"]
ONCE = ("--queue-mode", "--once", "--via=inline")
#: Nothing can be made or written there, not even by root.
NOWHERE = "/proc/none"
LOST = "failed: the output can't be written: [Errno {}]"


def test_crons_empty_environment_without_a_usable_home_or_folder(site: Site) -> None:
    job = site.queue("true")
    env = {"DATABASE_URL": site.env["DATABASE_URL"], "HOME": NOWHERE, "TMPDIR": str(site.folder)}
    done = subprocess.run(
        [*COMMAND, "--queue-mode", "--once"],
        env=env, cwd="/proc", stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "Processed queue: launched 1 jobs"
    job.refresh_from_db()
    assert job.status == Status.RUNNING
    # The database of its temporary Prefect server was made and removed again.
    assert [path.name for path in site.folder.iterdir() if path.name.startswith("container-manager-")] == []


NO_ENTRY = """
import pwd

def getpwuid(uid):
    raise KeyError(uid)

pwd.getpwuid = getpwuid
"""


def test_a_user_that_the_system_does_not_know(site_with_api: Site) -> None:
    """As in a container that is run with some number for a user."""
    (site_with_api.folder / "sitecustomize.py").write_text(NO_ENTRY)
    site_with_api.env.pop("HOME", None)
    done = site_with_api.run(*ONCE, PYTHONPATH=str(site_with_api.folder))

    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("closed", "flags"),
    [(">&-", ("--queue-mode", "--dry-run")), ("2>&-", ("--queue-mode", "--dry-run")), ("<&- >&- 2>&-", ONCE)],
)
def test_streams_that_are_closed_keep_it_from_nothing(site_with_api: Site, closed: str, flags: tuple[str, ...]) -> None:
    job = site_with_api.queue("true")
    shell = ["sh", "-c", f'exec "$@" {closed}', "sh"]
    done = subprocess.run(
        [*shell, *COMMAND, *flags], env=site_with_api.env, cwd=site_with_api.folder, capture_output=True, check=False
    )

    assert (done.returncode, done.stderr) == (0, b"")
    job.refresh_from_db()
    assert job.status == (Status.RUNNING if flags == ONCE else Status.QUEUED)


def test_a_terminal_of_few_letters(site: Site, no_prefect: Callable[..., "subprocess.CompletedProcess[str]"]) -> None:
    site.queue("true", name="größe")
    site.env["PYTHONIOENCODING"] = "ascii"
    done = no_prefect("--queue-mode", "--dry-run")

    assert done.returncode == 0
    assert r": gr\xf6\xdfe (priority=50, " in done.stdout.splitlines()[-1]


def test_foreign_text_stays_on_its_line_and_tells_a_terminal_nothing(site_with_api: Site) -> None:
    job = site_with_api.queue("true")
    with connection.cursor() as cursor:
        cursor.execute(
            "CREATE TRIGGER trouble BEFORE UPDATE ON container_manager_containerjob "
            "BEGIN SELECT RAISE(ABORT, 'red:\x1b[31m\nbroken'); END"
        )
    done = site_with_api.run(f"--job-id={job.pk}")

    assert f"Error processing job {job.pk}: red:\\x1b[31m\\nbroken" in done.stdout.splitlines()


def test_without_prefect_one_line_says_what_to_install(site: Site) -> None:
    (site.folder / "prefect.py").write_text("raise ImportError('no Prefect here')\n")
    done = site.run(*ONCE, PYTHONPATH=str(site.folder))

    assert done.returncode == 1
    assert done.stderr == (
        "CommandError: Command failed: Prefect can't be imported: no Prefect here; install the project's requirements\n"
    )


def written_to(target: str, site: Site, *flags: str) -> "subprocess.CompletedProcess[str]":
    """A file, or a pipe that nobody reads."""
    if target == "pipe":
        unread, end = os.pipe()
        os.close(unread)
    else:
        end = os.open(target, os.O_WRONLY)
    try:
        return subprocess.run(
            [*COMMAND, *flags],
            env=site.env, cwd=site.folder, stdout=end, stderr=subprocess.PIPE, text=True, timeout=60, check=False,
        )  # fmt: skip
    finally:
        os.close(end)


@pytest.mark.parametrize(("target", "number"), [("/dev/full", 28), ("pipe", 32)])
def test_what_can_t_be_written_ends_no_work_and_is_told_at_the_end(
    site_with_api: Site, target: str, number: int
) -> None:
    job = site_with_api.queue("true")
    done = written_to(target, site_with_api, *ONCE)

    assert done.returncode == 1
    assert done.stderr.startswith(f"CommandError: Command {LOST.format(number)}")
    assert done.stderr.count("\n") == 1
    job.refresh_from_db()
    assert job.status == Status.RUNNING


def test_when_nobody_reads_it_any_more_the_continuous_mode_ends(site_with_api: Site) -> None:
    done = written_to("pipe", site_with_api, "--queue-mode", "--via=inline", "--poll-interval=600")

    assert done.returncode == 1
    assert done.stderr.startswith(f"CommandError: Queue processing {LOST.format(32)}")


def test_a_full_disk_does_not_end_the_continuous_mode(site_with_api: Site) -> None:
    with Path("/dev/full").open("w") as full:
        process = subprocess.Popen(
            [*COMMAND, "--queue-mode", "--via=inline", "--poll-interval=1"],
            env=site_with_api.env, cwd=site_with_api.folder, stdout=full, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    job = site_with_api.queue("true")
    wait_until(lambda: ContainerJob.objects.exclude(status=Status.QUEUED).filter(pk=job.pk).exists())
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=20)

    assert process.returncode == 1
    assert errors.startswith(f"CommandError: Queue processing {LOST.format(28)}")
    assert errors.count("\n") == 1
