"""What a job may ask for: refused when it is saved and again before it is launched."""

from typing import Any

import pydantic
import pytest
from django.core.exceptions import NON_FIELD_ERRORS, ValidationError

from container_manager.models import ContainerJob
from container_manager.types import ContainerSpec, RunSpec

KIB = 1024
DIGEST = "sha256:" + "0123456789abcdef" * 4
EMOJI, NUL, SURROGATE = "\N{PARTY POPPER}", "\0", "\ud800"


def refusal(**fields: Any) -> dict[str, list[str]]:
    """What is wrong, by field. No database is at hand, so that nothing can have been saved."""
    with pytest.raises(ValidationError) as caught:
        ContainerJob.objects.create_job(**{"image": "busybox"} | fields)
    return caught.value.message_dict


def mount(**fields: Any) -> dict[str, Any]:
    return {"mounts": [{"target": "/in"} | fields]}


#: The fields of a job, the one that is wrong, a part of what is said.
REFUSED = [
    *(({"image": image}, "image", "must be an image reference") for image in [
        "", "Busybox", "busy box", " busybox", "busybox\n", "--privileged", "a" * 256, "busybox:", "busybox@sha256:12",
        "https://registry.example/tool", "/busybox", "busybox/", "a//b", "b\u00fcsybox", "${IMAGE}", "../busybox",
    ]),
    ({"image": "busybox" + NUL}, "image", "NUL"),
    ({"image": None}, "image", 'must be text, such as "busybox"'),
    ({"command": 'echo "one'}, "command", "No closing quotation"),
    ({"command": ["echo", NUL]}, "command", "NUL"),
    ({"command": ["echo", SURROGATE]}, "command", ""),
    ({"command": ["echo", 1]}, "command", "1: must be text"),
    ({"command": {"echo": "1"}}, "command", "must be a list, such as [\"sh\", "),
    ({"command": ["x" * (128 * KIB)]}, "command", "must not be longer than 131072 bytes"),
    ({"command": ["\u00e9"] * (50 * KIB)}, "command", "must not be longer than 131072 bytes"),
    ({"entrypoint": "'"}, "entrypoint", "No closing quotation"),
    ({"entrypoint": ["x" * (128 * KIB)]}, "entrypoint", "must not be longer than 131072 bytes"),
    *(({kind: {name: "x"}}, kind, "is no name of a variable") for name in [
        "", "1A", "A-B", "A B", "A=B", "A\n", "\u00c4", "A" + NUL,
    ] for kind in ["environment", "secret_environment"]),
    ({"environment": {"CM_JOB_ID": "1"}}, "environment", "CM_JOB_ID: names that begin with CM_ are ours"),
    ({"secret_environment": {"CM_X": "1"}}, "secret_environment", "CM_X: names that begin with CM_ are ours"),
    ({"environment": {"A": NUL}}, "environment", "A: must not contain a NUL"),
    ({"environment": {"A": SURROGATE}}, "environment", "A: "),
    ({"environment": {"A": 1}}, "environment", "A: must be text"),
    ({"environment": ["A=1"]}, "environment", 'such as {"REGION": "eu"}'),
    ({"environment": {"A": "x" * (1024 * KIB)}}, "environment", "must not be larger than 1048576 bytes"),
    ({"environment": {"A": "1"}, "secret_environment": {"A": "r"}}, NON_FIELD_ERRORS, "A is in both `environment`"),
    ({"secret_environment": {"A": "r"}}, "secret_environment", "needs the setting SECRET_RESOLVER"),
    ({"working_dir": "work"}, "working_dir", "must be an absolute path"),
    ({"working_dir": "/srv/../etc"}, "working_dir", "without `..`"),
    ({"working_dir": "/" + "w" * 255}, "working_dir", "255"),
    ({"user": "u" * 65}, "user", "64"),
    ({"user": "root" + NUL}, "user", "NUL"),
    *(({"memory_limit_mib": value}, "memory_limit_mib", "") for value in [5, 0, -1, "12x", 6.5, 2**31]),
    *(({"cpu_limit": value}, "cpu_limit", "") for value in [0, -1, float("nan"), float("inf"), "two", 1e-10, 1e300]),
    *((mount(type="bind", source=source), "mounts", "is not below any path of the setting ALLOWED_BIND_PREFIXES")
      for source in ["/", "/data", "/var/run/docker.sock", "//data"]),
    (mount(type="bind", source="data"), "mounts", "must be an absolute path"),
    (mount(type="bind", source="/data/../etc"), "mounts", "without `..`"),
    (mount(type="bind"), "mounts", "must be an absolute path"),
    (mount(type="tmpfs", source="x"), "mounts", "a tmpfs mount has no source"),
    (mount(type="npipe", source="x"), "mounts", "'volume', 'bind' or 'tmpfs'"),
    *((mount(source=source), "mounts", "is the volume's name") for source in ["", "/etc", "a/b", "..", "a:b"]),
    (mount(source="v", target="in"), "mounts", "must be an absolute path"),
    (mount(source="v", propagation="shared"), "mounts", "propagation: there is no such field"),
    ({"mounts": ["/etc:/etc"]}, "mounts", "0: must be an object"),
    *(({"networks": [name]}, "networks", "must be the name of a network") for name in [
        "host", "container:x", "ns:/proc/1/ns/net", "", "a b", "-a", "a ", " a", "a\n", "a\u200b", "service:a",
    ]),
    ({"networks": ["none", "other"]}, "networks", "`none` can't be combined"),
    ({"networks": "bridge"}, "networks", 'must be a list, such as ["backend"]'),
    ({"labels": {"container-manager.job": "1"}}, "labels", "names that begin with container-manager. are ours"),
    ({"labels": {"": "1"}}, "labels", "is no name of a label"),
    ({"labels": {"a=b": "1"}}, "labels", "is no name of a label"),
    ({"labels": {"a": NUL}}, "labels", "NUL"),
    ({"pull_policy": "sometimes"}, "pull_policy", "'missing', 'always' or 'never'"),
    *(({"name": name}, "name", "must be of letters") for name in [
        "a\nb", "a\n", "\n", EMOJI, "n" * 65, "a b", "<b>", "a/b",
    ]),
    *(({"priority": value}, "priority", "") for value in [-1, 101, "high", None]),
    *(({"timeout_seconds": value}, "timeout_seconds", "") for value in [0, -1, 10**9, None]),
    *(({"max_retries": value}, "max_retries", "") for value in [-1, 10**6]),
    *(({"retry_exit_codes": [value]}, "retry_exit_codes", "0: ") for value in [0, 256, -1, "x"]),
    ({"restart": "always"}, "restart", "there is no such field"),
    ({"status": "running"}, "status", "there is no such field"),
    ({"container_id": "c"}, "container_id", "there is no such field"),
    ({"memory_limit_mb": 5}, "memory_limit_mb", "there is no such field; did you mean `memory_limit_mib`?"),
    ({"memory_limit_mib": "512m"}, "memory_limit_mib", "must be a whole number, such as 512"),
    ({"timeout_seconds": "1h"}, "timeout_seconds", "must be a whole number, such as 3600"),
    ({"cpu_limit": "two"}, "cpu_limit", "must be a number, such as 1.5"),
    ({"retry_exit_codes": 75}, "retry_exit_codes", "must be a list, such as [75]"),
    ({"rerun_on_lost": "perhaps"}, "rerun_on_lost", "must be true or false"),
    ({"pinned_host": "local"}, "pinned_host", "must be a DockerHost, such as DockerHost.objects.get(name=…), not str"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "field", "message"), REFUSED, ids=lambda value: repr(value)[:40])
def test_a_wrong_field_is_named_with_what_is_wrong(fields: dict[str, Any], field: str, message: str) -> None:
    problems = refusal(**fields)

    assert list(problems) == [field]
    assert message in " ".join(problems[field])


def test_pydantics_own_text_repeats_no_value() -> None:
    with pytest.raises(pydantic.ValidationError) as refused:
        RunSpec(image="busybox", memory_limit_mib="s3cret")

    assert "memory_limit_mib" in str(refused.value)
    assert "s3cret" not in str(refused.value)


def test_each_wrong_mount_is_named_by_its_number() -> None:
    ours, theirs, etc = ({"source": source, "target": "/a", "type": kind} for kind, source in (
        ("volume", "cm-ours"), ("volume", "theirs"), ("bind", "/etc"),
    ))  # fmt: skip

    assert refusal(mounts=[ours, theirs, etc]) == {
        "mounts": [
            "1: volume theirs is not among the setting ALLOWED_VOLUMES",
            "2: /etc is not below any path of the setting ALLOWED_BIND_PREFIXES",
        ]
    }


#: What gives a job the host, or takes the record of its run away.
DANGEROUS = {
    "privileged", "network_mode", "pid_mode", "ipc_mode", "uts_mode", "userns_mode", "cap_add", "devices",
    "security_opt", "cgroup_parent", "runtime", "volumes_from", "sysctls", "binds", "volumes", "auto_remove",
    "restart_policy", "tty",
}  # fmt: skip


@pytest.mark.parametrize("option", sorted(ContainerSpec.denied.keys() | DANGEROUS))
def test_a_denied_option_is_refused_with_what_to_do_instead(option: str) -> None:
    problems = refusal(**{option: None})

    assert problems == {option: [f"denied: {ContainerSpec.denied[option]}"]}


def test_every_wrong_field_is_named_at_once() -> None:
    problems = refusal(image="", priority=101, environment={"A=B": ""})

    assert set(problems) == {"image", "priority", "environment"}


def test_a_refusal_does_not_repeat_the_values() -> None:
    problems = refusal(environment={"PASSWORD": "hunter2" + NUL}, memory_limit_mib="hunter2")

    assert "hunter2" not in str(problems)


@pytest.mark.parametrize(
    ("source", "is_allowed"),
    [
        ("/data", True),
        ("/data/", True),
        ("/data/in/x", True),
        ("/srv/jobs/1", True),
        ("/data2", False),
        ("/data2/x", False),
        ("/srv", False),
        ("/srv/jobs2", False),
        ("/var/run/docker.sock", False),
        ("/", False),
    ],
)
def test_binds_are_allowed_by_whole_parts_of_the_path(settings: Any, source: str, is_allowed: bool) -> None:
    settings.CONTAINER_MANAGER = {"ALLOWED_BIND_PREFIXES": ("/data", "/srv/jobs/")}
    job = ContainerJob(image="busybox", **mount(type="bind", source=source))

    assert is_valid(job) == is_allowed


def is_valid(job: ContainerJob) -> bool:
    try:
        job.validated_spec()
    except ValidationError:
        return False
    return True


@pytest.mark.parametrize(
    ("pattern", "image", "is_allowed"),
    [
        ("busybox", "busybox", True),
        ("busybox", "busybox:1.36", True),
        ("busybox", f"busybox@{DIGEST}", True),
        ("busybox", "docker.io/library/busybox", True),
        ("busybox", "docker.io/busybox", True),
        ("docker.io/library/busybox", "busybox", True),
        ("busybox", "busybox2", False),
        ("busybox", "team/busybox", False),
        ("busybox", "registry.example/busybox", False),
        ("busybox", "registry.example/library/busybox", False),
        ("team/*", "docker.io/team/tool", True),
        ("team/*", "localhost/team/tool", False),
        ("team/*", "team:5000/tool", False),
        ("docker.io/*", "INTRANET/tool", False),
        ("registry.example/*", "registry.example/team/tool:2", True),
        ("registry.example/*", "registry.example.evil/team/tool", False),
        ("registry.example/*", "registry-example/team/tool", False),
        ("registry.example/*", "evil.io/registry.example/tool", False),
        ("registry.example/*", "registry.example:5000/tool", False),
        ("registry.example:5000/*", "registry.example:5000/tool:2", True),
        ("registry.example:5000/*", "registry.example:50000/tool", False),
        ("registry.example/tool", "registry.example/tool2", False),
        ("busybox:latest", "busybox", True),
        ("busybox:1.36", "busybox:1.36", True),
        ("busybox:1.36", "busybox:1.360", False),
        ("busybox:1.36", "busybox", False),
        ("busybox:1.*", "busybox:1.36", True),
        ("busybox:1.*", "busybox:2.1", False),
        ("busybox:1.*", f"busybox:1.36@{DIGEST}", False),
        (f"busybox@{DIGEST}", f"busybox@{DIGEST}", True),
        (f"busybox@{DIGEST}", "busybox:latest", False),
        (f"busybox@{DIGEST}", f"busybox@{DIGEST[:-1]}0", False),
        ("docker.io/library/*", DIGEST, False),
    ],
)
def test_images_are_allowed_by_registry_repository_and_version(
    settings: Any, pattern: str, image: str, is_allowed: bool
) -> None:
    settings.CONTAINER_MANAGER = {"ALLOWED_IMAGES": (pattern,)}

    assert is_valid(ContainerJob(image=image)) == is_allowed


@pytest.mark.parametrize(
    ("denied", "networks", "message"),
    [
        (["internal"], ["internal"], "internal is among the setting DENIED_NETWORKS: name another"),
        (["internal"], ["front", "internal"], "internal is among the setting DENIED_NETWORKS: name another"),
        (["a", "internal"], ["internal", "internal"], "internal is among the setting DENIED_NETWORKS: name another"),
        (["f" * 64], ["f" * 64], f"{'f' * 64} is among the setting DENIED_NETWORKS: name another"),
        (["bridge"], ["default"], "bridge is among the setting DENIED_NETWORKS: name another"),
        (["bridge"], [], "without any, the job would join bridge, which is among the setting DENIED_NETWORKS: name"),
        (["bridge"], ["none"], None),
        (["internal"], [], None),
        (["internal"], ["Internal"], None),
        (["internal"], ["internal2"], None),
        (["internal"], ["intern"], None),
        ([], ["internal"], None),
    ],
)
def test_a_network_that_is_denied_is_refused_by_its_field(
    settings: Any, denied: list[str], networks: list[str], message: str | None
) -> None:
    settings.CONTAINER_MANAGER = {"DENIED_NETWORKS": denied}

    if message is None:
        assert is_valid(ContainerJob(image="busybox", networks=networks))
        return
    problems = refusal(networks=networks)
    assert list(problems) == ["networks"]
    assert problems["networks"][0].startswith(message)


@pytest.mark.parametrize(
    ("field", "most", "message"),
    [("memory_limit_mib", 64, "at most 64 (setting MAX_MEMORY_MIB)"), ("cpu_limit", 1.5, "at most 1.5 (setting MAX_")],
)
def test_no_job_gets_more_than_the_settings_allow(settings: Any, field: str, most: float, message: str) -> None:
    settings.CONTAINER_MANAGER = {"MAX_MEMORY_MIB": 64, "MAX_CPUS": 1.5}

    problems = refusal(**{field: most + 1})

    assert message in problems[field][0]
    assert is_valid(ContainerJob(image="busybox", **{field: most}))


def test_a_secret_is_a_reference_where_there_is_a_resolver(settings: Any, database: str) -> None:
    settings.CONTAINER_MANAGER = {"SECRET_RESOLVER": "os.getenv"}

    job = ContainerJob.objects.create_job(image="busybox", secret_environment={"TOKEN": "vault:a/b"})

    assert ContainerJob.objects.get(pk=job.pk).secret_environment == {"TOKEN": "vault:a/b"}


STORED = [
    ("image", f"registry.example:5000/a/b__c:v1.2_3@{DIGEST}"),
    ("command", ["printf", EMOJI, "a\nb", "", "|", "$HOME", "\u202e"]),
    ("entrypoint", ["sh", "-c", "exit 3"]),
    ("environment", {"A": "line\nline\r\n", "_b1": "", "C": "a=b", "D": f"\u00fc{EMOJI}"}),
    ("working_dir", "/w\u00f6rk dir"),
    ("user", "1000:1000"),
    ("memory_limit_mib", 6),
    ("cpu_limit", 0.5),
    ("mounts", [{"type": "tmpfs", "source": "", "target": "/tmp", "read_only": False}]),
    ("mounts", [{"type": "volume", "source": "cm-vol_1.x", "target": "/in", "read_only": True}]),
    ("networks", ["none"]),
    ("networks", ["front", "back"]),
    ("labels", {"org.example/team-a": "\u00fc=1\n"}),
    ("pull_policy", "never"),
    ("name", "n" * 64),
    ("name", "J\u00f6b-1.a_b"),
    ("priority", 0),
    ("priority", 100),
    ("max_retries", 0),
    ("retry_exit_codes", [1, 255]),
    ("rerun_on_lost", True),
]


@pytest.mark.parametrize(("field", "value"), STORED, ids=lambda value: repr(value)[:40])
def test_what_is_allowed_is_stored_as_it_was_given(database: str, field: str, value: Any) -> None:
    job = ContainerJob.objects.create_job(**{"image": "busybox"} | {field: value})

    row = ContainerJob.objects.get(pk=job.pk)
    assert getattr(row, field) == value
    assert row.validated_spec().model_dump(mode="json")[field] == value


@pytest.mark.parametrize(
    ("command", "stored"),
    [("echo 'a  b' c", ["echo", "a  b", "c"]), ('echo "a" ; rm x', ["echo", "a", ";", "rm", "x"]), ("", [])],
)
def test_a_command_in_one_string_is_split_without_a_shell(database: str, command: str, stored: list[str]) -> None:
    job = ContainerJob.objects.create_job(image="busybox", command=command)

    assert ContainerJob.objects.get(pk=job.pk).command == stored


TAMPERED = [
    ("image", "--privileged"),
    ("command", [1, 2]),
    ("environment", {"A=B": "x"}),
    ("mounts", [{"type": "bind", "source": "/", "target": "/host"}]),
    ("mounts", [{"source": "v", "target": "/in", "driver_config": {"device": "/dev/sda"}}]),
    ("networks", ["host"]),
    ("labels", {"container-manager.token": "x"}),
    ("secret_environment", {"A": "ref"}),
    ("priority", 1000),
]


@pytest.mark.parametrize(("field", "value"), TAMPERED, ids=lambda value: repr(value)[:40])
def test_what_was_refused_when_saved_is_refused_again_before_launch(database: str, field: str, value: Any) -> None:
    job = ContainerJob.objects.create_job(image="busybox")
    ContainerJob.objects.filter(pk=job.pk).update(**{field: value})
    job.refresh_from_db()

    with pytest.raises(ValidationError) as caught:
        job.validated_spec()

    assert list(caught.value.message_dict) == [field]
