"""`process_container_jobs --queue-mode`: words, exit codes, what is written; each test a sentence of its contract."""

import json
import subprocess
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.utils import timezone

from container_manager.models import ContainerJob, DockerHost, Installation, JobAttempt, Status
from container_manager.queue import queue_manager
from container_manager.types import Limits
from tests.conftest import PrefectServer

from .conftest import Site, environment, objects

Run = Callable[..., "subprocess.CompletedProcess[str]"]
ONCE = ("--queue-mode", "--once", "--via=inline")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"queue_mode": True, "job_id": 1}, "Cannot use --queue-mode with --job-id or --status"),
        ({"queue_mode": True, "status": "failed"}, "Cannot use --queue-mode with --job-id or --status"),
        ({"queue_mode": True, "max_concurrent": 0}, "--max-concurrent must be at least 1"),
        ({"queue_mode": True, "poll_interval": 0}, "--poll-interval must be at least 1"),
        ({"poll_interval": -1}, "--poll-interval must be at least 1"),
        ({"queue_mode": True, "timeout": 0}, "--timeout must be at least 1"),
        ({"queue_mode": True, "shutdown_timeout": -1}, "--shutdown-timeout must be at least 0"),
        ({"max_concurrent": 0}, "--max-concurrent must be at least 1"),
        ({"timeout": 0}, "--timeout must be at least 1"),
        ({"shutdown_timeout": -1}, "--shutdown-timeout must be at least 0"),
        ({"job_id": 1, "dry_run": True, "poll_interval": 0}, "--poll-interval must be at least 1"),
    ],
)
def test_a_wrong_flag_is_refused_before_anything_happens(options: dict[str, Any], message: str) -> None:
    with pytest.raises(CommandError, match=f"^{message}$") as refusal:
        call_command("process_container_jobs", **options)

    assert refusal.value.returncode == 1


def test_a_refusal_is_one_line_on_stderr_and_exit_code_1(no_prefect: Run) -> None:
    done = no_prefect("--queue-mode", "--job-id=1")

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "CommandError: Cannot use --queue-mode with --job-id or --status\n"


def test_argparse_has_an_exit_code_of_its_own(no_prefect: Run) -> None:
    assert no_prefect("--status=odd").returncode == 2


def test_a_database_that_is_not_migrated_is_one_line_that_says_what_to_run(tmp_path: Path, no_prefect: Run) -> None:
    env = environment(DATABASE_URL=f"sqlite:///{tmp_path / 'empty.sqlite3'}")
    done = Site(env, tmp_path).run("--queue-mode", "--once")

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "CommandError: The database is not migrated: run `manage.py migrate`\n"


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("DATABASE_URL", "postgres://nobody@127.0.0.1:1/none", "The database can't be used"),
        ("CONTAINER_MANAGER", '{"POLL_INTERVAL_SECONDS": 0}', "CONTAINER_MANAGER: POLL_INTERVAL_SECONDS"),
        # These keep Django from finding the command.
        ("DATABASE_URL", "mysql://somewhere/site", "DATABASE_URL: mysql: use postgres:// or sqlite:///"),
        ("CONTAINER_MANAGER", "no JSON", "CONTAINER_MANAGER in the environment must be a JSON object"),
        ("DJANGO_SETTINGS_MODULE", "site.settings", "No module named 'site.settings'"),
    ],
)
def test_wrong_settings_are_one_line_that_says_what_to_run(site: Site, name: str, value: str, words: str) -> None:
    done = site.run("--queue-mode", "--once", **{name: value})
    traced = site.run("--queue-mode", "--once", "--traceback", **{name: value})

    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith(f"CommandError: {words}")
    assert "run `manage.py" in done.stderr
    assert traced.returncode == 1
    assert "Traceback (most recent call last)" in traced.stderr


def test_the_help_names_each_flag_and_keeps_the_line_breaks_of_its_examples(no_prefect: Run, site: Site) -> None:
    site.env["COLUMNS"] = "80"
    text = no_prefect("--help").stdout

    assert "Process container jobs - either existing jobs or queue mode" in text
    words = " ".join(text.split())
    for flag in (
        "--queue-mode Run in queue processing mode (launches queued jobs continuously)",
        "Maximum concurrent jobs when in queue mode (default: 5)",
        "Polling interval in seconds for queue mode (default: 10)",
        "Process queue once and exit (don't run continuously)",
        "Timeout in seconds for job acquisition (default: 30)",
        "Process specific job by ID (legacy mode)",
        "Show what would be processed without actually doing it",
        "--verbose Verbose output",
        "(default: auto)",
    ):
        assert flag in words
    for line in (
        "  Queue Mode (new):",
        "    manage.py process_container_jobs --queue-mode --dry-run",
        "  Legacy Mode (existing):",
        "    manage.py process_container_jobs --job-id=123",
        "  Operational:",
        "    prefect deployment run 'process-queue/scheduled'",
        "    python -m deployments",
    ):
        assert f"\n{line}" in text


def test_once_launches_what_is_ready_and_says_so(site: Site) -> None:
    jobs = [site.queue("true"), site.queue("true")]
    done = site.run(*ONCE, "--max-concurrent=3", "--poll-interval=7")

    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "Starting queue processor (max_concurrent=3, poll_interval=7s, once=True)"
    assert lines[1:4] == [
        "Runs: inline (--via inline)",
        "Limit: max_concurrent, 3",
        "Prefect: a temporary server that ends with this command (no Prefect API is configured: set PREFECT_API_URL, "
        "or run `prefect config set PREFECT_API_URL=…`)",
    ]
    assert lines[4:] == ["Processed queue: launched 2 jobs"]
    assert {job.status for job in ContainerJob.objects.filter(pk__in=[job.pk for job in jobs])} == {Status.RUNNING}


def test_once_on_postgresql(postgres_site: Site, prefect_server: PrefectServer) -> None:
    job = postgres_site.queue("true")
    done = postgres_site.run(*ONCE, **prefect_server.client)

    job.refresh_from_db()
    assert (done.returncode, job.status) == (0, Status.RUNNING)


def test_a_job_that_failed_to_launch_is_named_and_makes_exit_code_3(site_with_api: Site) -> None:
    bad = site_with_api.queue(image="container-manager.invalid/none", pull_policy="never", max_retries=0)
    good = site_with_api.queue("true")
    done = site_with_api.run(*ONCE)

    assert done.returncode == 3
    bad.refresh_from_db()
    assert (bad.status, bad.reason) == (Status.FAILED, "launch")
    lines = done.stdout.splitlines()
    assert "Processed queue: launched 1 jobs" in lines
    assert "Encountered 1 errors:" in lines
    assert f"  - Job {bad.pk}: {bad.last_error}" in lines
    good.refresh_from_db()
    assert good.status == Status.RUNNING


def test_a_jobs_own_exit_code_is_no_error_of_the_command_and_json_has_an_object_per_flow_run(
    site_with_api: Site,
) -> None:
    job = site_with_api.queue("sh", "-c", "exit 7")
    done = site_with_api.run(*ONCE, "--json")

    assert done.returncode == 0
    (run,) = objects(done.stdout)
    assert run.keys() == {"mode", "via", "flow_run_id", "launched", "job_ids", "errors", "limit", "exit_code"}
    assert run | {"flow_run_id": ""} == {
        "mode": "queue", "via": "inline", "flow_run_id": "", "launched": 1, "job_ids": [job.pk], "errors": [],
        "limit": "", "exit_code": 0,
    }  # fmt: skip
    assert len(run["flow_run_id"]) == 36
    assert "Processed queue: launched 1 jobs" in done.stderr


def dump() -> list[Any]:
    models = (ContainerJob, JobAttempt, DockerHost, Installation)
    return [list(model.objects.order_by("pk").values()) for model in models]


def test_a_dry_run_shows_the_queue_in_the_order_of_the_claim_and_writes_nothing(site: Site, no_prefect: Run) -> None:
    low = site.queue("true", name="low", priority=20)
    high = site.queue("true", name="high", priority=80)
    due = ContainerJob.objects.create_job(image="busybox", name="due", priority=80)
    queue_manager.queue_job(due, schedule_for=timezone.now() - timedelta(hours=1))
    later = ContainerJob.objects.create_job(image="busybox", name="later")
    queue_manager.queue_job(later, schedule_for=timezone.now() + timedelta(hours=1))
    before = dump()
    done = no_prefect("--queue-mode", "--dry-run", "--max-concurrent=2")

    assert (done.returncode, done.stderr) == (0, "")
    high.refresh_from_db()
    due.refresh_from_db()
    assert done.stdout.splitlines() == [
        "Starting queue processor (max_concurrent=2, poll_interval=10s, once=False)",
        "Queue Status (dry run):",
        "  Ready to launch now: 3",
        "  Scheduled for future: 1",
        "  Currently running: 0",
        "  Launch failed: 0",
        "",
        "Next 2 job(s) that would be launched:",
        f"  - Job {due.pk}: due (priority=80, queued={due.scheduled_for:%H:%M:%S})",
        f"  - Job {high.pk}: high (priority=80, queued={high.queued_at:%H:%M:%S})",
    ]
    assert dump() == before
    low.refresh_from_db()
    assert low.status == Status.QUEUED


def test_a_dry_run_of_a_new_database_writes_nothing(site: Site, no_prefect: Run) -> None:
    done = no_prefect("--queue-mode", "--dry-run")

    lines = done.stdout.splitlines()
    # The defaults that the help names.
    assert lines[0] == "Starting queue processor (max_concurrent=5, poll_interval=10s, once=False)"
    assert lines[-1] == "No jobs ready for launch"
    assert not Installation.objects.exists()


def limit_tag() -> None:
    queue_manager.keep_limits(Limits(total=0))


def drain() -> None:
    DockerHost.objects.update(is_active=False)


def fill() -> None:
    DockerHost.objects.update(max_concurrent_jobs=0)


def lose() -> None:
    DockerHost.objects.update(last_error="connection refused")


@pytest.mark.parametrize(
    ("happens", "reason"),
    [
        (limit_tag, "limit reached: tag container-job, 0 of 0"),
        (drain, "host local is not active"),
        (fill, "limit reached: max_concurrent_jobs of host local, 0 of 0"),
        (lose, "host local is not reachable"),
    ],
)
def test_a_dry_run_says_why_nothing_would_be_launched(
    site: Site, no_prefect: Run, happens: Callable[[], None], reason: str
) -> None:
    site.queue("true")
    happens()

    assert no_prefect("--queue-mode", "--dry-run").stdout.splitlines()[-1] == f"No jobs would be launched now: {reason}"


def test_a_dry_run_looks_past_jobs_that_are_pinned_to_a_full_host(site: Site, no_prefect: Run) -> None:
    full = DockerHost.objects.create(name="full", max_concurrent_jobs=0)
    ContainerJob.objects.filter(pk=site.queue("true", priority=90).pk).update(pinned_host=full)
    only_pinned = no_prefect("--queue-mode", "--dry-run").stdout.splitlines()[-1]
    free = site.queue("true", name="free")
    both = no_prefect("--queue-mode", "--dry-run").stdout.splitlines()[-2:]

    reason = "limit reached: max_concurrent_jobs of host full, 0 of 0"
    assert only_pinned == f"No jobs would be launched now: {reason}"
    assert both[0] == "Next 1 job(s) that would be launched:"
    assert both[1].startswith(f"  - Job {free.pk}: free (priority=50, ")


def test_a_dry_run_in_json_has_the_metrics_and_what_is_next(site: Site, no_prefect: Run) -> None:
    job = site.queue("true", name="one")
    done = no_prefect("--queue-mode", "--dry-run", "--json")

    report = json.loads(done.stdout)
    assert (report["mode"], report["ready_now"], report["running"]) == ("dry-run", 1, 0)
    assert [(one["job_id"], one["name"]) for one in report["next"]] == [(job.pk, "one")]
    assert "Queue Status (dry run):" in done.stderr
