"""Files of jobs: what is wrong is named by entry and field, and all or nothing is queued."""

import io
import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.utils.timezone import now

from container_manager import manifest
from container_manager.exceptions import ManifestInvalid
from container_manager.models import ContainerJob, DockerHost, Status
from tests.conftest import ROOT

YAML = """
jobs:
  - {name: first, image: busybox, command: [sh, -c, "echo 1"], environment: {A: "1"}}
  - {name: second, image: busybox, command: echo 'a b', priority: 80}
"""
JSON = json.dumps(
    {
        "jobs": [
            {"name": "first", "image": "busybox", "command": ["sh", "-c", "echo 1"], "environment": {"A": "1"}},
            {"name": "second", "image": "busybox", "command": ["echo", "a b"], "priority": 80},
        ]
    }
)
Run = Callable[..., str]


@pytest.fixture
def run(database: str, capsys: pytest.CaptureFixture[str]) -> Run:
    """`manage.py queue_container_jobs …`; what it printed."""

    def call(*arguments: str) -> str:
        call_command("queue_container_jobs", *arguments)
        out, err = capsys.readouterr()
        assert err == ""
        return out

    return call


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "jobs.yaml"
    path.write_text(YAML, encoding="utf-8")
    return path


def parsed(*jobs: dict[str, Any]) -> manifest.Manifest:
    return manifest.parse(json.dumps({"jobs": [{"image": "busybox"} | job for job in jobs]}))


@pytest.mark.parametrize(
    "text", [YAML, JSON, "\n\t " + JSON, "\ufeff" + JSON, "{jobs: [{image: busybox}, {image: busybox, name: second}]}"]
)
def test_yaml_and_json_say_the_same(text: str) -> None:
    jobs = manifest.parse(text).jobs

    assert (len(jobs), jobs[1].name) == (2, "second")
    assert jobs[1].command in (("echo", "a b"), ())


@pytest.mark.parametrize("text", ["", "jobs: [", '{"jobs": [}', "jobs: !!python/object:os.system {}", "[" * 100_000])
def test_what_is_no_manifest_is_refused_in_words(text: str) -> None:
    with pytest.raises(ManifestInvalid) as refused:
        manifest.parse(text)

    assert len(str(refused.value)) > 10


def test_a_list_is_refused_with_a_hint_of_what_it_should_be() -> None:
    with pytest.raises(ManifestInvalid, match="jobs"):
        manifest.parse("- image: busybox")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{}", "^jobs: "),
        ("jobs: []", "^jobs: .*at least 1"),
        ("jobs: [{}]", r"^jobs\.0\.image: Field required$"),
        ("jobs: [{image: busybox}, {image: BusyBox}]", r"^jobs\.1\.image: must be an image reference"),
        ("jobs: [{image: busybox, priority: 101}]", r"^jobs\.0\.priority: .*100$"),
        ("jobs: [{image: busybox, command: [echo, 1]}]", r"^jobs\.0\.command\.1: must be text$"),
        ("jobs: [{image: busybox, comand: x}]", r"^jobs\.0\.comand: "),
        ("jobs: [{image: busybox, privileged: true}]", r"^jobs\.0\.privileged: denied: a container never"),
        ("jobs: [{image: busybox, environment: {CM_X: a}}]", r"^jobs\.0\.environment: CM_X: .*ours$"),
        ("jobs: [{image: busybox, schedule_in_seconds: -1}]", r"^jobs\.0\.schedule_in_seconds: "),
        ("jobs: [{image: busybox, schedule_in_seconds: .nan}]", r"^jobs\.0\.schedule_in_seconds: "),
        ("jobs: [{image: busybox, schedule_in_seconds: 1.0e+15}]", r"^jobs\.0\.schedule_in_seconds: "),
        ("jobs: [{image: busybox, expect: {status: running, reason: x}}]", r"^jobs\.0\.expect\.status: "),
        ("jobs: [{image: X}, {image: Y}]", r"^jobs\.0\.image: .*; jobs\.1\.image: "),
    ],
)
def test_an_error_names_the_entry_and_the_field(text: str, problem: str) -> None:
    with pytest.raises(ManifestInvalid, match=problem):
        manifest.parse(text)


def test_a_value_that_may_be_a_secret_is_not_repeated() -> None:
    with pytest.raises(ManifestInvalid) as refused:
        parsed({"environment": {"PASSWORD": ["hunter2"]}})

    assert ("PASSWORD" in str(refused.value), "hunter2" in str(refused.value)) == (True, False)


def test_an_expectation_is_kept_for_whoever_checks() -> None:
    [job] = parsed({"expect": {"status": "failed", "reason": "exit_code", "exit_code": 3}}).jobs

    assert job.expect == manifest.Expectation(status="failed", reason="exit_code", exit_code=3)


def test_jobs_are_queued_in_the_files_order_with_all_that_they_say(database: str) -> None:
    host = DockerHost.objects.create(name="there")
    content = parsed(
        {"name": "a", "host": "there", "memory_limit_mib": 64, "mounts": [{"type": "tmpfs", "target": "/t"}]},
        {"name": "b", "schedule_in_seconds": 3600, "retry_exit_codes": [3]},
    )

    first, second = manifest.queue(content, created_by="somebody")

    assert [job.name for job in ContainerJob.objects.order_by("pk")] == ["a", "b"]
    assert (first.status, first.pinned_host, first.memory_limit_mib, first.created_by) == (
        Status.QUEUED, host, 64, "somebody",
    )  # fmt: skip
    assert (second.status, second.retry_exit_codes, second.pinned_host) == (Status.SCHEDULED, [3], None)
    assert abs(second.scheduled_for - now() - timedelta(hours=1)) < timedelta(minutes=1)


@pytest.mark.parametrize(("names", "listed"), [(["a", "b"], "a, b"), ([], "none")])
def test_an_unknown_host_is_named_with_those_there_are(database: str, names: list[str], listed: str) -> None:
    for name in names:
        DockerHost.objects.create(name=name)

    with pytest.raises(ManifestInvalid) as refused:
        manifest.queue(parsed({}, {"host": "c"}))

    assert str(refused.value) == f"jobs.1.host: c: no such host; there are: {listed}"
    assert not ContainerJob.objects.exists()


@pytest.mark.parametrize(
    ("setting", "job", "field"),
    [
        ({"ALLOWED_IMAGES": ["registry.example/*"]}, {}, "image"),
        ({"MAX_CPUS": 1}, {"cpu_limit": 2}, "cpu_limit"),
        ({"MAX_MEMORY_MIB": 64}, {"memory_limit_mib": 65}, "memory_limit_mib"),
        ({}, {"mounts": [{"type": "bind", "source": "/srv", "target": "/srv"}]}, "mounts"),
        ({}, {"secret_environment": {"A": "vault:a"}}, "secret_environment"),
    ],
)
def test_what_is_not_allowed_here_is_named_and_nothing_is_queued(
    database: str, settings: Any, setting: dict[str, Any], job: dict[str, Any], field: str
) -> None:
    settings.CONTAINER_MANAGER = settings.CONTAINER_MANAGER | setting

    with pytest.raises(ManifestInvalid, match=rf"^jobs\.1: {field}: .*{next(iter(setting), '')}"):
        manifest.queue(parsed({"image": "registry.example/tool"}, job))

    assert not ContainerJob.objects.exists()


def test_the_command_queues_a_file(run: Run, file: Path) -> None:
    out = run(str(file))

    jobs = ContainerJob.objects.order_by("pk")
    assert out.splitlines() == [f"Queued job {job.pk}: {job.name}" for job in jobs]
    assert [(job.name, job.status, job.command) for job in jobs] == [
        ("first", Status.QUEUED, ["sh", "-c", "echo 1"]),
        ("second", Status.QUEUED, ["echo", "a b"]),
    ]


def test_the_command_prints_the_ids_as_json(run: Run, file: Path) -> None:
    out = run(str(file), "--json")

    assert json.loads(out) == {"job_ids": list(ContainerJob.objects.order_by("pk").values_list("pk", flat=True))}
    assert (out.count("\n"), ContainerJob.objects.count()) == (1, 2)


@pytest.mark.parametrize("text", [YAML, JSON])
def test_the_command_reads_stdin(run: Run, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))

    assert len(run("-").splitlines()) == ContainerJob.objects.count() == 2


def test_bytes_on_stdin_that_are_no_text_are_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"jobs: \xff"), encoding="utf-8"))

    with pytest.raises(CommandError):
        run("-")


@pytest.mark.parametrize("content", [None, b"jobs: \xff", b"", b"jobs: [{image: BusyBox}]"])
def test_a_file_that_is_missing_or_wrong_is_one_line(run: Run, tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "jobs.yaml"
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(CommandError) as refused:
        run(str(path))

    assert (len(str(refused.value).splitlines()), refused.value.returncode) == (1, 1)
    assert not ContainerJob.objects.exists()


def test_a_folder_is_refused(run: Run, tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="directory"):
        run(str(tmp_path))


def test_the_demonstrations_jobs_can_be_queued(run: Run) -> None:
    content = manifest.load(ROOT / "deployments" / "demo" / "jobs.yaml")

    run(str(ROOT / "deployments" / "demo" / "jobs.yaml"))

    assert len({job.name for job in content.jobs}) == ContainerJob.objects.count() == len(content.jobs)
    assert all(job.expect for job in content.jobs)
    assert ContainerJob.objects.scheduled().count() == 1
