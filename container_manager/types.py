"""The values that travel between the layers: frozen, checked, and free of Django and Docker."""

import re
import shlex
from datetime import datetime
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from . import images

#: Prefect tags. The concurrency limit of a tag is the cap of what it names.
JOB_TAG = "container-job"
HOST_TAG_PREFIX = "docker-host:"

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
DENIED_OPTIONS = {
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


def is_clean(text: str) -> bool:
    """Whether an Engine and a database can take it: no NUL, no lone surrogate."""
    return "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


def _clean_text(value: str) -> str:
    if not is_clean(value):
        raise ValueError("must not contain a NUL character, and be valid Unicode without lone surrogates")
    return value


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


Text = Annotated[str, AfterValidator(_clean_text)]
AbsolutePath = Annotated[Text, AfterValidator(_absolute)]
Arguments = Annotated[tuple[Text, ...], BeforeValidator(_split)]


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class MountSpec(Frozen):
    """A mount of a container. `source` is a volume's name or, for a bind, a path on the Engine's machine."""

    type: Literal["volume", "bind", "tmpfs"] = "volume"
    source: Text = ""
    target: AbsolutePath
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


class ContainerSpec(Frozen):
    """What runs: an image, its arguments and its limits. Everything that is not named here is denied."""

    image: Text
    command: Arguments = ()
    entrypoint: Arguments = ()
    environment: dict[str, Text] = {}
    #: variable -> reference; the setting SECRET_RESOLVER turns it into a value in the process that launches.
    secret_environment: dict[str, Text] = {}
    working_dir: Text = Field(default="", max_length=255)
    user: Text = Field(default="", max_length=64)
    memory_limit_mib: int | None = Field(default=None, ge=MIN_MEMORY_MIB, le=MAX_MEMORY_MIB)
    cpu_limit: float | None = Field(default=None, ge=0.01, le=MAX_CPUS, allow_inf_nan=False)
    mounts: tuple[MountSpec, ...] = ()
    networks: tuple[Text, ...] = ()
    labels: dict[str, Text] = {}
    pull_policy: Literal["missing", "always", "never"] = "missing"

    @model_validator(mode="before")
    @classmethod
    def _deny(cls, values: Any) -> Any:
        if isinstance(values, dict):
            for name in values.keys() & DENIED_OPTIONS.keys():
                raise ValueError(f"`{name}` is denied: {DENIED_OPTIONS[name]}")
        return values

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

    name: str = Field(default="", pattern=r"^[\w.-]{0,64}$")
    priority: int = Field(default=PRIORITY_NORMAL, ge=0, le=100)
    #: from the container's start; the wait in the queue is not counted.
    timeout_seconds: int = Field(default=3600, ge=1, le=366 * 24 * 3600)
    #: charged tries after the first.
    max_retries: int = Field(default=3, ge=0, le=1000)
    retry_exit_codes: tuple[Annotated[int, Field(ge=1, le=255)], ...] = ()
    #: run again when the container vanished or died with its Engine; it may then have done its work twice.
    rerun_on_lost: bool = False


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


class ContainerSummary(Frozen):
    """One line of an Engine's list. It lags: an ended container may be shown as running for 0.3 s."""

    id: str
    name: str
    #: Docker's word: created, running, paused, restarting, removing, exited, dead.
    state: str
    job_id: int | None
    attempt: int | None

    @property
    def has_ended(self) -> bool:
        return self.state in ("exited", "dead")


class Observation(Frozen):
    """What an Engine says of one container. Times are by the Engine's clock."""

    container_id: str
    state: str
    exit_code: int | None = None
    oom_killed: bool = False
    error: str = ""
    started_at: datetime | None = None
    finished_at: datetime | None = None
    image_digest: str = ""
    #: of the claim that created it.
    token: str = ""

    @property
    def has_ended(self) -> bool:
        return self.state in ("exited", "dead")

    @property
    def has_run(self) -> bool:
        return self.started_at is not None


class Limits(Frozen):
    """The limits of the Prefect tags. A tag without a limit is absent and bounds nothing."""

    total: int | None = None
    hosts: dict[str, int] = {}


class JobError(Frozen):
    job_id: int
    error: str


class BatchResult(Frozen):
    """What one call of `launch_next_batch` did."""

    launched: int = 0
    job_ids: tuple[int, ...] = ()
    errors: tuple[JobError, ...] = ()
    #: of jobs that ended `failed` with reason `launch`.
    failed_ids: tuple[int, ...] = ()
    #: jobs that went back to the queue uncharged, for a pull or a host that did not answer.
    handed_back: int = 0
    #: why no more was launched, in words; empty if nothing more was ready.
    limit: str = ""
    #: the limit on launch tasks was reached, so that nothing was tried.
    throttled: bool = False

    def __add__(self, other: "BatchResult") -> "BatchResult":
        return BatchResult(
            launched=self.launched + other.launched,
            job_ids=self.job_ids + other.job_ids,
            errors=self.errors + other.errors,
            failed_ids=self.failed_ids + other.failed_ids,
            handed_back=self.handed_back + other.handed_back,
            limit=other.limit,
            throttled=other.throttled,
        )


class EndedJob(Frozen):
    """A job whose attempt ended: `status` is what the row says now, so `scheduled` means a retry."""

    job_id: int
    attempt: int
    status: str
    reason: str
    exit_code: int | None
    error: str = ""


class RoundReport(Frozen):
    batch: BatchResult = BatchResult()
    ended: tuple[EndedJob, ...] = ()
    #: jobs that were sent TERM or KILL.
    stopped_ids: tuple[int, ...] = ()
    recovered_ids: tuple[int, ...] = ()
    #: what a person should look at, a sentence each.
    anomalies: tuple[str, ...] = ()


_T = TypeVar("_T")


def _last(values: tuple[_T, ...], count: int) -> tuple[_T, ...]:
    return values[-count:]


#: What a loop that runs for days remembers; the counts go on.
KEPT_ERRORS, KEPT_IDS = 20, 1000


class LoopStats(Frozen):
    """The sum of many rounds. Sums are complete; of ids and errors only the last are kept."""

    iterations: int = 0
    jobs_launched: int = 0
    jobs_ended: int = 0
    jobs_stopped: int = 0
    jobs_recovered: int = 0
    jobs_handed_back: int = 0
    error_count: int = 0
    errors: tuple[JobError, ...] = ()
    job_ids: tuple[int, ...] = ()
    failed_ids: tuple[int, ...] = ()
    ended: tuple[EndedJob, ...] = ()
    anomalies: tuple[str, ...] = ()
    limit: str = ""
    throttled: bool = False

    @property
    def is_idle(self) -> bool:
        return not (
            self.jobs_launched
            or self.jobs_ended
            or self.jobs_stopped
            or self.jobs_recovered
            or self.jobs_handed_back
            or self.error_count
        )

    def plus(self, report: RoundReport) -> "LoopStats":
        batch = report.batch
        anomalies = tuple(dict.fromkeys(self.anomalies + report.anomalies))
        return LoopStats(
            iterations=self.iterations + 1,
            jobs_launched=self.jobs_launched + batch.launched,
            jobs_ended=self.jobs_ended + len(report.ended),
            jobs_stopped=self.jobs_stopped + len(report.stopped_ids),
            jobs_recovered=self.jobs_recovered + len(report.recovered_ids),
            jobs_handed_back=self.jobs_handed_back + batch.handed_back,
            error_count=self.error_count + len(batch.errors),
            errors=_last(self.errors + batch.errors, KEPT_ERRORS),
            job_ids=_last(self.job_ids + batch.job_ids, KEPT_IDS),
            failed_ids=_last(self.failed_ids + batch.failed_ids, KEPT_IDS),
            ended=_last(self.ended + report.ended, KEPT_IDS),
            anomalies=_last(anomalies, KEPT_ERRORS),
            limit=batch.limit,
            throttled=batch.throttled,
        )


class ProcessResult(Frozen):
    """What `process_job` did. `success`: the work on the job was done, whatever the job's own exit code."""

    success: bool
    error: str = ""
    message: str = ""


class HostLoad(Frozen):
    name: str
    alive: int
    max_concurrent_jobs: int
    is_active: bool


class QueueMetrics(Frozen):
    ready_now: int
    scheduled_future: int
    launching: int
    running: int
    failed: int
    launch_failed: int
    oldest_wait_seconds: float | None
    hosts: tuple[HostLoad, ...]


class ProcessedJob(Frozen):
    """What legacy mode did with one job; `status` is the one that it was found in."""

    job_id: int
    status: str
    success: bool
    error: str = ""
    message: str = ""
    #: an exception, such as the database's, cut the work on the job short.
    was_raised: bool = False


class ProcessReport(Frozen):
    """What one `process-jobs` flow run did, in the order of the jobs' ids."""

    jobs: tuple[ProcessedJob, ...] = ()

    @property
    def processed(self) -> int:
        return sum(job.success for job in self.jobs)

    @property
    def errors(self) -> tuple[JobError, ...]:
        return tuple(JobError(job_id=job.job_id, error=job.error) for job in self.jobs if not job.success)


ReportT = TypeVar("ReportT", LoopStats, ProcessReport)


class FlowRunReport(Frozen, Generic[ReportT]):
    """A flow run that has completed, wherever it ran."""

    via: Literal["deployment", "inline"]
    flow_run_id: str
    state_name: str
    state_type: str
    report: ReportT
