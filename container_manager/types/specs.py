"""What travels down: what runs, how, where, and with what limits."""

import re
import shlex
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from .. import images
from .values import Frozen, Text

PRIORITY_HIGH, PRIORITY_NORMAL, PRIORITY_LOW = 80, 50, 20

#: bytes; the kernel's own limit on one argument of a program is this, too.
MAX_COMMAND_BYTES = 128 * 1024
#: bytes of names and values together; the kernel allows 2 MiB for arguments and environment.
MAX_ENVIRONMENT_BYTES = 1024 * 1024
#: MiB; an Engine refuses less.
MIN_MEMORY_MIB = 6
#: 16 TiB and as many CPUs as no machine has: what is asked for must stay a number that an Engine can read.
MAX_MEMORY_MIB, MAX_CPUS = 16 * 1024 * 1024, 8192

#: Create options that people try and that a job can't have, each with what to do instead.
_DENIED = {
    "privileged": "a container never gets the host's privileges",
    "cap_add": "a container never gets more capabilities than the Engine's default",
    "devices": "a container gets no device of the host",
    "security_opt": "it is set to no-new-privileges",
    "network_mode": "name the Engine's networks in `networks`",
    "pid_mode": "host namespaces are never shared",
    "ipc_mode": "host namespaces are never shared",
    "uts_mode": "host namespaces are never shared",
    "userns_mode": "host namespaces are never shared",
    "cgroup_parent": "use `memory_limit_mib` and `cpu_limit`",
    "cgroupns": "host namespaces are never shared",
    "runtime": "the Engine's default runtime is used",
    "sysctls": "a container changes no kernel parameter",
    "volumes_from": "name the volumes in `mounts`",
    "binds": "name them in `mounts`; paths of the host need the setting ALLOWED_BIND_PREFIXES",
    "volumes": "name them in `mounts`",
    "ports": "a job publishes no ports; containers that share one of `networks` reach each other",
    "tty": "it would merge stdout and stderr",
    "auto_remove": "the container is the record of the run and is removed once that is saved",
    "restart_policy": "use `max_retries` and `retry_exit_codes`",
    "pids_limit": "use the setting PIDS_LIMIT",
    "log_config": "use the settings LOG_DRIVER, LOG_HEAD_BYTES and LOG_TAIL_BYTES",
    "mem_limit": "use `memory_limit_mib`",
    "nano_cpus": "use `cpu_limit`",
    "hostname": "it is the container's id",
}

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
_NETWORK = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*", re.ASCII)
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_./-]*", re.ASCII)

RESERVED_VARIABLE_PREFIX = "CM_"
RESERVED_LABEL_PREFIX = "container-manager."


def _absolute(value: str) -> str:
    if not value.startswith("/") or ".." in value.split("/"):
        raise ValueError("must be an absolute path without `..`")
    return value


def _split(value: Any) -> Any:
    """Take a str as a shell would read it; there is no shell, so operators such as `|` are plain arguments."""
    if not isinstance(value, str):
        return value
    try:
        return shlex.split(value)
    except ValueError as e:
        raise ValueError(f"can't be split into arguments: {e}; give a list") from e


def _name(value: str) -> str:
    if not re.fullmatch(r"[\w.-]{0,64}", value):
        raise ValueError("must be of letters, digits and _.- alone, at most 64")
    return value


AbsolutePath = Annotated[Text, AfterValidator(_absolute)]
Arguments = Annotated[tuple[Text, ...], BeforeValidator(_split)]


class MountSpec(Frozen):
    """A mount of a container. `source` is a volume's name or, for a bind, a path on the Engine's machine."""

    type: Literal["volume", "bind", "tmpfs"] = Field(
        default="volume", description="`volume`, `tmpfs`, or `bind` below the setting ALLOWED_BIND_PREFIXES."
    )
    source: Text = Field(
        default="",
        description="The volume's name, or the path on the Engine's machine; empty for tmpfs.",
        examples=["cm-data"],
    )
    target: AbsolutePath = Field(description="Where it is in the container.", examples=["/data"])
    read_only: bool = False

    @model_validator(mode="after")
    def _has_source(self) -> "MountSpec":
        if self.type == "tmpfs" and self.source:
            raise ValueError("a tmpfs mount has no source")
        if self.type == "bind":
            _absolute(self.source)
        if self.type == "volume" and not _NETWORK.fullmatch(self.source):
            raise ValueError("the source of a volume mount is the volume's name: letters, digits and _.-")
        return self


def _number_fields(schema: dict[str, Any]) -> None:
    """Prefect draws a form by these numbers; the order of a schema's keys gets lost in its database."""
    for position, field in enumerate(schema["properties"].values()):
        field["position"] = position


class ContainerSpec(Frozen):
    """What runs: an image, its arguments and its limits. Everything that is not named here is denied."""

    model_config = ConfigDict(json_schema_extra=_number_fields)
    denied: ClassVar[dict[str, str]] = _DENIED

    image: Text = Field(
        description="What runs, such as `busybox` or `registry.example/team/report:1.4`. It needs nothing inside.",
        examples=["busybox", "registry.example/team/report:1.4"],
    )
    command: Arguments = Field(
        default=(),
        description="The arguments, an entry each. No shell reads them; for one: `sh`, `-c`, `echo hello; sleep 5`.",
        examples=[["sh", "-c", "echo hello; sleep 5"]],
    )
    entrypoint: Arguments = Field(
        default=(), description="Takes the place of the image's own.", examples=[["/usr/bin/env"]]
    )
    environment: dict[str, Text] = Field(
        default={},
        description='`{"REGION": "eu"}`. No secrets: everybody who sees the job sees them.',
        examples=[{"REGION": "eu"}],
    )
    secret_environment: dict[str, Text] = Field(
        default={},
        description='`{"TOKEN": "vault:team/token"}`: references, never values. The setting SECRET_RESOLVER turns them '
        "into values where the container is launched.",
        examples=[{"TOKEN": "vault:team/token"}],
    )
    working_dir: Text = Field(
        default="",
        title="Working directory",
        max_length=255,
        description="An absolute path; empty: the image's own.",
        examples=["/work"],
    )
    user: Text = Field(
        default="", max_length=64, description="A name or id; empty: the image's own.", examples=["1000"]
    )
    memory_limit_mib: int | None = Field(
        default=None,
        title="Memory limit (MiB)",
        ge=MIN_MEMORY_MIB,
        le=MAX_MEMORY_MIB,
        description="With more it is killed. None: the setting MAX_MEMORY_MIB, if there is one.",
        examples=[512],
    )
    cpu_limit: float | None = Field(
        default=None,
        title="CPU limit",
        ge=0.01,
        le=MAX_CPUS,
        allow_inf_nan=False,
        description="How many CPUs, such as 1.5. None: the setting MAX_CPUS, if there is one.",
        examples=[1.5],
    )
    mounts: tuple[MountSpec, ...] = Field(
        default=(),
        description="Volumes of the Engine, memory (tmpfs), and paths of its machine if the settings allow them.",
    )
    networks: tuple[Text, ...] = Field(
        default=(), description="Networks of the Engine; `none` alone: no network at all.", examples=[["backend"]]
    )
    labels: dict[str, Text] = Field(
        default={}, description='Of the container: `{"team": "data"}`.', examples=[{"team": "data"}]
    )
    pull_policy: Literal["missing", "always", "never"] = Field(
        default="missing", description="When the image is pulled."
    )

    @field_validator("image")
    @classmethod
    def _is_reference(cls, value: str) -> str:
        if not images.is_reference(value):
            raise ValueError("must be an image reference such as `busybox`, `registry.example/team/tool:1.2`")
        return value

    @field_validator("command", "entrypoint")
    @classmethod
    def _has_bounded_size(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if sum(len(part.encode()) + 1 for part in value) > MAX_COMMAND_BYTES:
            raise ValueError(f"must not be longer than {MAX_COMMAND_BYTES} bytes")
        return value

    @field_validator("environment", "secret_environment")
    @classmethod
    def _is_environment(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if not _VARIABLE.fullmatch(name):
                raise ValueError(f"{name!r} is no name of a variable: letters, digits and _, no digit first")
            if name.startswith(RESERVED_VARIABLE_PREFIX):
                raise ValueError(f"{name}: names that begin with {RESERVED_VARIABLE_PREFIX} are ours")
        if sum(len(name) + len(text.encode()) + 2 for name, text in value.items()) > MAX_ENVIRONMENT_BYTES:
            raise ValueError(f"must not be larger than {MAX_ENVIRONMENT_BYTES} bytes")
        return value

    @field_validator("working_dir")
    @classmethod
    def _is_path(cls, value: str) -> str:
        return _absolute(value) if value else value

    @field_validator("networks")
    @classmethod
    def _is_isolated(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name == "host" or not _NETWORK.fullmatch(name):
                raise ValueError(f"{name!r} must be the name of a network of the Engine; the host's own is denied")
        if "none" in value and len(value) > 1:
            raise ValueError("`none` can't be combined with other networks")
        return value

    @field_validator("labels")
    @classmethod
    def _are_labels(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if not _LABEL.fullmatch(name):
                raise ValueError(f"{name!r} is no name of a label: letters, digits and _./-")
            if name.startswith(RESERVED_LABEL_PREFIX):
                raise ValueError(f"{name}: names that begin with {RESERVED_LABEL_PREFIX} are ours")
        return value

    @model_validator(mode="after")
    def _has_no_double_variable(self) -> "ContainerSpec":
        for name in self.environment.keys() & self.secret_environment.keys():
            raise ValueError(f"{name} is in both `environment` and `secret_environment`")
        return self


class JobSpec(ContainerSpec):
    """A container and how it is run: when others wait, for how long, and how often again."""

    name: Annotated[str, AfterValidator(_name)] = Field(
        default="",
        description="What people know the job by: letters, digits and _.-",
        examples=["nightly-report"],
    )
    priority: int = Field(
        default=PRIORITY_NORMAL, ge=0, le=100, description="0 to 100; of the jobs that wait the greatest is first."
    )
    timeout_seconds: int = Field(
        default=3600,
        title="Timeout (seconds)",
        ge=1,
        le=366 * 24 * 3600,
        description="From the container's start; the wait in the queue is not counted.",
    )
    max_retries: int = Field(
        default=3,
        ge=0,
        le=1000,
        description="Tries after the first: of a launch that failed, and by `retry_exit_codes`.",
    )
    retry_exit_codes: tuple[Annotated[int, Field(ge=1, le=255)], ...] = Field(
        default=(), description="Exit codes that are run again; any other ends the job.", examples=[[75]]
    )
    rerun_on_lost: bool = Field(
        default=False,
        description="Run it again when its container vanished or died with its Engine. It may then have done its work "
        "twice.",
    )


class RunSpec(JobSpec):
    """A job, and where it must run."""

    host: Text = Field(
        default="", description="Name of the Docker host that it must run on; empty: any.", examples=["local"]
    )


class EngineAddress(Frozen):
    """Where a Docker Engine answers: `unix://…`, `tcp://…` with paths of TLS files, or `ssh://…`."""

    base_url: str
    tls_ca_path: str = ""
    tls_cert_path: str = ""
    tls_key_path: str = ""


class Hardening(Frozen):
    """What every container of a host gets, whatever its job asks for."""

    pids_limit: int
    cap_drop_all: bool
    log_driver: str
    log_options: dict[str, str]
    #: Names and ids of networks that no container may join.
    denied_networks: tuple[str, ...] = ()
