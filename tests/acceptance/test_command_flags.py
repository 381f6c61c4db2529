"""The flags of `process_container_jobs` and its help; each test a sentence of its contract."""

import ast
import logging
import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import docker
import pytest
from django.core.management import call_command
from django.db import connection, transaction
from prefect.client.orchestration import SyncPrefectClient

from container_manager.conf import Settings
from container_manager.management.commands.process_container_jobs import Command
from container_manager.models import ContainerJob, DockerHost, Installation, Status
from container_manager.queue import queue_manager
from container_manager.types import Limits
from tests.conftest import ROOT

from .conftest import MANAGE, Site, environment, objects, unanswered

Run = Callable[..., "subprocess.CompletedProcess[str]"]
ONCE = ("--queue-mode", "--once", "--via=inline")

#: Type, default and help. Two flags of queue mode have no default, so that legacy mode sees whether they are given:
#: the help names the one that holds, and the start line shows it.
FLAGS = {
    "--queue-mode": (None, False, "Run in queue processing mode (launches queued jobs continuously)"),
    "--max-concurrent": (int, None, "Maximum concurrent jobs when in queue mode (default: 5)"),
    "--poll-interval": (int, None, "Polling interval in seconds for queue mode (default: 10)"),
    "--once": (None, False, "Process queue once and exit (don't run continuously)"),
    "--timeout": (int, 30, "Timeout in seconds for job acquisition (default: 30)"),
    "--job-id": (int, None, "Process specific job by ID (legacy mode)"),
    "--status": (None, None, "Process jobs with specific status (legacy mode; default: running)"),
    "--dry-run": (None, False, "Show what would be processed without actually doing it"),
    "--verbose": (None, False, "Verbose output"),
    "--via": (
        None, "auto",
        "Where flow runs run: in a deployment's worker, in this process, or wherever it can (default: auto)",
    ),
    "--json": (None, False, "One JSON object per flow run on stdout, prose on stderr"),
    "--fail-on-error": (None, False, "Exit with 3 if a job errored (legacy mode)"),
    "--shutdown-timeout": (
        int, 30, "Seconds that a graceful shutdown waits for the flow run in progress (default: 30)",
    ),
}  # fmt: skip
CHOICES = {"--status": ["pending", "running", "failed"], "--via": ["auto", "deployment", "inline"]}

EXAMPLES = r"""
Examples:

  Queue Mode (new):
    manage.py process_container_jobs --queue-mode
    manage.py process_container_jobs --queue-mode --once
    manage.py process_container_jobs --queue-mode \
        --max-concurrent=10 --poll-interval=5
    manage.py process_container_jobs --queue-mode --dry-run

  Legacy Mode (existing):
    manage.py process_container_jobs
    manage.py process_container_jobs --job-id=123
    manage.py process_container_jobs --status=pending
    manage.py process_container_jobs --dry-run

  Operational:
    kill -USR1 <pid>    # one line with the status of the queue
    kill -TERM <pid>    # graceful shutdown; containers keep running

  Prefect: a scheduled deployment does the same, without this process.
    python -m deployments    # serves the deployments
    prefect deployment run 'process-queue/scheduled'

Exit codes: 0 done; 1 wrong usage or configuration, or the flow run failed;
2 unknown options; 3 with --once a job failed to launch, with --fail-on-error
a job errored. A job's own exit code is never an error here.
"""


@pytest.mark.parametrize("flag", FLAGS)
def test_a_flag_has_this_type_default_and_help(flag: str) -> None:
    parser = Command().create_parser("manage.py", "process_container_jobs")
    action = next(action for action in parser._actions if flag in action.option_strings)

    assert (action.type, action.default, action.help) == FLAGS[flag]
    assert action.choices == CHOICES.get(flag)


def test_there_is_no_other_flag() -> None:
    parser = Command().create_parser("manage.py", "process_container_jobs")
    djangos = {"--help", "--version", "--verbosity", "--settings", "--pythonpath", "--traceback", "--no-color"}

    given = {action.option_strings[-1] for action in parser._actions}
    assert given - djangos - {"--force-color", "--skip-checks"} == set(FLAGS)


def test_the_help_reads_well_at_80_columns(site: Site) -> None:
    text = subprocess.run(
        [*MANAGE, "help", "process_container_jobs"],
        env=site.env | {"COLUMNS": "80"}, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip

    assert max(len(line) for line in text.splitlines()) <= 80
    assert text.endswith(EXAMPLES)
    assert "\nProcess container jobs - either existing jobs or queue mode\n" in text


def test_it_talks_to_no_engine_and_holds_no_queue_logic() -> None:
    """What its modules import; the flows it imports lazily do all that."""
    allowed = {
        "checks", "conf", "exceptions", "services", "shutdown", "types", "queue", "capacity", "models", "management",
        "manifest",
    }  # fmt: skip
    paths = Path(ROOT / "container_manager" / "management").rglob("*.py")
    trees = [ast.parse(path.read_text()) for path in paths]
    froms = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names = {node.module or node.names[0].name for node in froms if not node.level}

    ours = {name.split(".")[1] for name in names if name.startswith("container_manager.")}
    assert ours <= allowed
    assert not {name for name in names if name.split(".")[0] in ("docker", "prefect")}


@contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.setblocking(False)
        yield listener


@pytest.mark.parametrize("flags", [("--queue-mode", "--dry-run"), ("--status=pending", "--dry-run")])
def test_a_dry_run_contacts_no_engine_and_no_api(site: Site, no_prefect: Run, flags: tuple[str, ...]) -> None:
    path = Path(site.folder / "engine.sock")
    DockerHost.objects.update(base_url=f"unix://{path}")
    site.queue("true")
    with listening(path) as listener, unanswered() as url:
        site.env["PREFECT_API_URL"] = url
        done = no_prefect(*flags)
        with pytest.raises(BlockingIOError):
            listener.accept()

    assert (done.returncode, done.stderr) == (0, "")
    assert " 1 job(s)" in done.stdout


def test_a_dry_run_counts_what_runs_and_what_failed_to_launch_on_postgresql_too(postgres_site: Site) -> None:
    jobs = [postgres_site.queue("true") for _ in range(4)]
    ContainerJob.objects.filter(pk=jobs[0].pk).update(status=Status.RUNNING, slot_host=DockerHost.objects.get())
    ContainerJob.objects.filter(pk=jobs[1].pk).update(status=Status.FAILED, reason="launch")
    ContainerJob.objects.filter(pk=jobs[2].pk).update(status=Status.FAILED, reason="exit_code")
    before = list(ContainerJob.objects.order_by("pk").values())
    lines = postgres_site.run("--queue-mode", "--dry-run", "--max-concurrent=1").stdout.splitlines()

    assert lines[2:6] == [
        "  Ready to launch now: 1",
        "  Scheduled for future: 0",
        "  Currently running: 1",
        "  Launch failed: 1",
    ]
    assert lines[-1] == "No jobs would be launched now: limit reached: max_concurrent, 1 of 1"
    assert list(ContainerJob.objects.order_by("pk").values()) == before


@pytest.mark.parametrize("flags", [("--traceback",), ()])
def test_a_traceback_comes_only_with_traceback(tmp_path: Path, flags: tuple[str, ...]) -> None:
    env = environment(DATABASE_URL="postgres://nobody@127.0.0.1:1/none")
    done = Site(env, tmp_path).run("--queue-mode", "--once", *flags)

    assert done.returncode == 1
    assert ("Traceback (most recent call last)" in done.stderr) is bool(flags)


@pytest.mark.parametrize("flags", [("--traceback",), ()])
def test_a_flow_run_that_fails_here_is_one_line_without_traceback(site_with_api: Site, flags: tuple[str, ...]) -> None:
    site_with_api.queue("true")
    with connection.cursor() as cursor:
        cursor.execute(
            "CREATE TRIGGER trouble BEFORE UPDATE ON container_manager_containerjob "
            "BEGIN SELECT RAISE(ABORT, 'disk trouble'); END"
        )
    done = site_with_api.run(*ONCE, *flags)

    lines = done.stderr.splitlines()
    assert done.returncode == 1
    if flags:
        assert "Encountered exception during execution" in done.stderr
        assert lines.count("Traceback (most recent call last):") > 1
    else:
        assert len(lines) == 1
        assert lines[0].startswith("CommandError: Command failed: flow run ")
        assert lines[0].endswith(" ended as Failed: Flow run encountered an exception: IntegrityError: disk trouble")


def test_other_failures_have_one_prefix(site: Site) -> None:
    once = site.run("--queue-mode", "--once", "--via=deployment")
    continuous = site.run("--queue-mode", "--via=deployment")

    why = "no Prefect API is configured: set PREFECT_API_URL, or run `prefect config set PREFECT_API_URL=…`\n"
    assert (once.returncode, once.stderr) == (1, f"CommandError: Command failed: {why}")
    assert (continuous.returncode, continuous.stderr) == (1, f"CommandError: Queue processing failed: {why}")


def test_max_concurrent_is_how_many_are_alive_at_once_and_the_tag_may_set_it_lower(
    any_site: Site, api: SyncPrefectClient
) -> None:
    for _ in range(3):
        any_site.queue("sleep", "60")
    api.upsert_global_concurrency_limit_by_name("tag:container-job", 1)
    try:
        by_tag = any_site.run(*ONCE, "--max-concurrent=2", "--json")
    finally:
        api.delete_global_concurrency_limit_by_name("tag:container-job")
    by_flag = any_site.run(*ONCE, "--max-concurrent=2")

    (run,) = objects(by_tag.stdout)
    assert "Limit: tag container-job, 1" in by_tag.stderr.splitlines()
    assert (run["launched"], run["limit"]) == (1, "limit reached: tag container-job, 1 of 1")
    assert "Processed queue: launched 1 jobs" in by_flag.stdout.splitlines()
    assert "Limit: max_concurrent, 2" in by_flag.stdout.splitlines()
    assert ContainerJob.objects.running().count() == 2


@contextmanager
def locked(client: docker.DockerClient) -> Iterator[None]:
    """Another holds the queue's lock, for as long as the context lasts."""
    # Else the pass would write what it knows of the host and of the limits, and wait for the same lock.
    DockerHost.objects.update(engine_id=client.info()["ID"], last_seen_at="2100-01-01T00:00Z")
    queue_manager.keep_limits(Limits())
    with transaction.atomic():
        Installation.objects.select_for_update(no_key=True).get()
        yield


def test_timeout_bounds_how_long_locks_are_waited_for(any_site: Site, engine: docker.DockerClient) -> None:
    job = any_site.queue("true")
    with locked(engine):
        impatient = any_site.run(*ONCE, "--timeout=1")
    with locked(engine):
        patient = any_site.start(*ONCE, "--timeout=30")
        patient.wait_for("Prefect: ")
        time.sleep(4)

    assert impatient.returncode == 0
    assert "Processed queue: launched 0 jobs" in impatient.stdout.splitlines()
    waited = re.fullmatch(r"the queue's lock was not free within ([\d.]+) s", impatient.stdout.splitlines()[-1])
    assert waited is not None
    assert float(waited[1]) <= 1
    assert patient.end() == 0
    assert "Processed queue: launched 1 jobs" in patient.lines
    job.refresh_from_db()
    assert job.status == Status.RUNNING


CHATTY = """
import logging

def resolve(reference):
    logging.getLogger("container_manager.chatty").debug("asked for %s", reference)
    return "value"
"""


@pytest.mark.parametrize("flags", [("--verbose",), ()])
def test_verbose_is_debug_for_our_logger_and_a_line_per_job(site_with_api: Site, flags: tuple[str, ...]) -> None:
    (site_with_api.folder / "chatty.py").write_text(CHATTY)
    settings = '{"SECRET_RESOLVER": "chatty.resolve"}'
    job = site_with_api.queue("true")
    ContainerJob.objects.filter(pk=job.pk).update(secret_environment={"TOKEN": "vault"})
    done = site_with_api.run(*ONCE, *flags, PYTHONPATH=str(site_with_api.folder), CONTAINER_MANAGER=settings)

    is_verbose = bool(flags)
    assert done.returncode == 0
    assert (f"  - Job {job.pk}: launched" in done.stdout.splitlines()) is is_verbose
    assert ("DEBUG container_manager.chatty: asked for vault" in done.stderr) is is_verbose


@pytest.mark.usefixtures("site")
def test_handle_returns_none(capsys: pytest.CaptureFixture[str]) -> None:
    level = logging.getLogger("container_manager").level
    returned: Any = call_command("process_container_jobs", queue_mode=True, dry_run=True)

    assert returned is None
    assert logging.getLogger("container_manager").level == level


def test_the_defaults_of_the_settings_that_it_uses() -> None:
    settings = Settings()

    assert settings.PICKUP_SECONDS == 15
    assert (settings.DEPLOYMENTS.queue, settings.DEPLOYMENTS.jobs) == (
        "process-queue/scheduled",
        "process-jobs/on-demand",
    )
