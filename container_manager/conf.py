"""The setting `CONTAINER_MANAGER = {...}` of a Django project, checked and frozen."""

import re
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from django.conf import settings as django_settings
from django.core.exceptions import ImproperlyConfigured
from django.core.signals import setting_changed
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from .types import describe_problems

#: What would give a job the host, whatever else is allowed: these, what lies in them and what they lie in.
_PATHS_OF_THE_HOST = tuple(
    PurePosixPath(path)
    for path in (
        "/bin", "/boot", "/dev", "/etc", "/lib", "/lib32", "/lib64", "/proc", "/root", "/run", "/sbin", "/sys", "/usr",
        "/var/lib/containerd", "/var/lib/docker", "/var/run", "/var/spool",
    )
)  # fmt: skip


def _bind_prefix(value: str) -> str:
    # `//` is not normalised by PurePosixPath, since POSIX leaves its meaning open.
    path = PurePosixPath("/" + value.lstrip("/"))
    if not value.startswith("/") or ".." in path.parts or "\0" in value:
        raise ValueError(f"{value!r} must be an absolute path without `..`")
    if any(path == risk or path in risk.parents or risk in path.parents for risk in _PATHS_OF_THE_HOST):
        raise ValueError(f"{value!r} would hand the Engine's machine to a job")
    return str(path)


def _name(value: str) -> str:
    # The name becomes part of an artifact key, where Prefect allows only these characters.
    if value and not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?", value):
        raise ValueError(f"{value!r} must be at most 32 lower-case letters, digits and dashes, such as `staging`")
    return value


def _network(value: str) -> str:
    if not value or value != value.strip():
        raise ValueError("must be the name or the id of a network, without spaces around it")
    return value


Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Deployments(BaseModel):
    """The Prefect deployments (`flow/deployment`) that the command triggers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    queue: str = Field(default="process-queue/scheduled", pattern="^[^/]+/[^/]+$")
    jobs: str = Field(default="process-jobs/on-demand", pattern="^[^/]+/[^/]+$")


class Settings(BaseModel):
    """Every key of `CONTAINER_MANAGER`; the unit is in the name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    #: str, "". The installation's name, for a Prefect server that several installations share. Its deployments, tags
    #: and limits there are then called `<name>.…`.
    NAME: Annotated[str, AfterValidator(_name)] = ""
    #: The deployments that the command triggers: `{"queue": "flow/name", "jobs": "flow/name"}`. By default those that
    #: this installation registers.
    DEPLOYMENTS: Deployments = Deployments()
    #: int, 10. Interval of the deployment's schedule.
    POLL_INTERVAL_SECONDS: int = Field(default=10, ge=1)
    #: float, 8. How long a scheduled pass stays to keep the slots full; less than the interval.
    WORK_SECONDS: float = Field(default=8, ge=0, allow_inf_nan=False)
    #: int, 100. How many containers the deployments may have alive at once, over all hosts. For fewer there are the
    #: limits of the Prefect tags and of the hosts.
    MAX_CONCURRENT: int = Field(default=100, ge=1)
    #: float, 15. How long the command waits for a worker to pick a flow run up.
    PICKUP_SECONDS: Seconds = 15
    #: int, 5. Flow runs of `run-container-job` at once in one `python -m deployments`, a process of some 110 MB each.
    #: Others wait; passes have processes of their own.
    JOB_RUNS: int = Field(default=5, ge=1)
    #: float, 90. How long a claim is its launcher's, and how long a process that stalls keeps a transaction; at least
    #: three times DOCKER_TIMEOUT_SECONDS.
    LEASE_SECONDS: Seconds = 90
    #: float, 20. Bound of one call to an Engine. An unknown log driver takes it 15 s to refuse.
    DOCKER_TIMEOUT_SECONDS: Seconds = 20
    #: int, 4. Docker calls in flight per host and process.
    LAUNCH_THREADS: int = Field(default=4, ge=1, le=64)
    #: float, 600. Bound of one pull.
    PULL_SECONDS: Seconds = 600
    #: int, 1 MiB each. How much of each of stdout and stderr is kept, from its start and its end. The Engine itself
    #: keeps the last 20 to 30 MB of a container's output: what was before that is neither read nor counted.
    LOG_HEAD_BYTES: int = Field(default=1024 * 1024, ge=0)
    LOG_TAIL_BYTES: int = Field(default=1024 * 1024, ge=0)
    #: float, 30. Bound of reading one container's logs.
    LOG_SECONDS: Seconds = 30
    #: str, "local". The Engine's log driver; `json-file` corrupts characters at its 16 KiB cuts.
    LOG_DRIVER: str = "local"
    #: float, 10. Between TERM and KILL.
    STOP_GRACE_SECONDS: float = Field(default=10, ge=0, allow_inf_nan=False)
    #: float, 300. How long a host may be silent before its jobs no longer count for the others' limit, and
    #: how long several jobs that vanish together are held before they are `lost`.
    HOST_GRACE_SECONDS: Seconds = 300
    #: float, 10 and 900. Wait before the first retry, doubled by each, up to the greatest.
    RETRY_BASE_SECONDS: Seconds = 10
    RETRY_MAX_SECONDS: Seconds = 900
    #: tuple of str, (). Paths of the Engine's machine below which jobs may bind-mount.
    ALLOWED_BIND_PREFIXES: tuple[Annotated[str, AfterValidator(_bind_prefix)], ...] = ()
    #: tuple of str, ("cm-*",). Patterns of the names of the Engine's volumes that jobs may mount.
    ALLOWED_VOLUMES: tuple[str, ...] = ("cm-*",)
    #: tuple of str, (). Networks that no job may join, however the job refers to them. Each entry is a name, or an id
    #: of which 12 characters are enough. A name denies every network of that name. An entry has no effect on Engines
    #: without such a network. If `bridge` is denied, every job must name its networks.
    DENIED_NETWORKS: tuple[Annotated[str, AfterValidator(_network)], ...] = ()
    #: tuple of str, () = all. Images that jobs may use: repository patterns such as `registry.example/team/*`.
    ALLOWED_IMAGES: tuple[str, ...] = ()
    #: tuple of str, (unix, tcp). Schemes of hosts' addresses; `ssh` can be added.
    ALLOWED_HOST_SCHEMES: tuple[str, ...] = ("unix", "tcp")
    #: int and float, None = no bound. The most that a job may ask for; with a bound set it is the default, too.
    MAX_MEMORY_MIB: int | None = Field(default=None, ge=6)
    MAX_CPUS: float | None = Field(default=None, gt=0)
    #: int, 512. Processes in one container.
    PIDS_LIMIT: int = Field(default=512, ge=1)
    #: bool, False. Drop all capabilities of every container; a host can ask for it alone.
    CAP_DROP_ALL: bool = False
    #: dotted path of `resolve(reference: str) -> str`, None. Turns a secret's reference into its value.
    SECRET_RESOLVER: str | None = None
    #: str, "". The site's address, such as `https://jobs.example`, for links to a job's page.
    SITE_URL: str = ""
    #: str, "". The address of Prefect's pages, such as `http://127.0.0.1:4200/v2`, for links to the run of a job.
    PREFECT_UI_URL: str = ""
    #: int, 14 and 90. Retention of logs and of ended jobs; 0: until the next purge.
    KEEP_LOGS_DAYS: int = Field(default=14, ge=0)
    KEEP_JOBS_DAYS: int = Field(default=90, ge=0)
    #: float, 0 = removed at once. How long the container of a failed job is kept for a look.
    KEEP_FAILED_CONTAINERS_SECONDS: float = Field(default=0, ge=0, allow_inf_nan=False)
    #: int, 1 and 14. Retention of our flow runs at the Prefect server: of passes that had nothing to do, and of all.
    KEEP_IDLE_RUNS_DAYS: int = Field(default=1, ge=0)
    KEEP_RUNS_DAYS: int = Field(default=14, ge=0)

    def named(self, what: str) -> str:
        """The name of `what` on the Prefect server: `<name>.<what>`, or `<what>` if the installation has no name."""
        return f"{self.NAME}.{what}" if self.NAME else what

    def deployment(self, which: Literal["queue", "jobs"]) -> str:
        """The deployment that the command triggers for the queue or for single jobs, as `flow/name`."""
        full_name: str = getattr(self.DEPLOYMENTS, which)
        if which in self.DEPLOYMENTS.model_fields_set:
            return full_name
        flow, _, name = full_name.partition("/")
        return f"{flow}/{self.named(name)}"


def get_settings() -> Settings:
    """The project's settings; `ImproperlyConfigured` names each wrong key."""
    return _load()


@lru_cache(maxsize=1)
def _load() -> Settings:
    raw = getattr(django_settings, "CONTAINER_MANAGER", {})
    if not isinstance(raw, dict):
        raise ImproperlyConfigured(f"CONTAINER_MANAGER must be a dict, not {type(raw).__name__}")
    try:
        return Settings.model_validate(raw)
    except ValidationError as e:
        raise ImproperlyConfigured(
            "; ".join(f"CONTAINER_MANAGER: {problem}" for problem in describe_problems(e, Settings))
        ) from e


def _forget(*, setting: str, **kwargs: Any) -> None:
    if setting == "CONTAINER_MANAGER":
        _load.cache_clear()


setting_changed.connect(_forget, dispatch_uid="container_manager.conf")
