"""The one module that speaks to Docker Engines. It knows no Django and no job, and decides nothing."""

import json
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Literal, Protocol

import docker
import docker.errors
import docker.tls
import requests
import urllib3
from docker.types import LogConfig, Mount

from .exceptions import (
    ContainerGone,
    ContainerNotRunning,
    ContainerRunning,
    EngineError,
    EngineFailed,
    HostMisconfigured,
    HostUnavailable,
    ImageMissing,
    LogsUnavailable,
    NameTaken,
    NetworkMissing,
    OutcomeUnknown,
    RequestRefused,
)
from .logs import BoundedLog
from .types import ContainerSpec, ContainerSummary, EngineAddress, Hardening, Observation

INSTANCE_LABEL = "container-manager.instance"
JOB_LABEL = "container-manager.job"
ATTEMPT_LABEL = "container-manager.attempt"
TOKEN_LABEL = "container-manager.token"  # noqa: S105

#: Exit codes that a container has that was never started because its program can't be: 126 is a directory or
#: has no x bit, 127 does not exist.
NOT_EXECUTABLE = (126, 127)

Stream = Literal["stdout", "stderr"]


def container_name(instance_id: str, job_id: int, attempt: int) -> str:
    return f"cm-{instance_id}-{job_id}-{attempt}"


class EndWatch(Protocol):
    """The ids of containers as they die. Iterating blocks; `close`, from another thread, ends it."""

    def __iter__(self) -> Iterator[str]: ...

    def close(self) -> None: ...


class Engine(Protocol):
    """What the queue needs of a container engine. Every method raises `EngineError`s and nothing else."""

    def identify(self) -> str: ...

    def create(
        self,
        name: str,
        spec: ContainerSpec,
        *,
        environment: Mapping[str, str],
        labels: Mapping[str, str],
        hardening: Hardening,
    ) -> str: ...

    def start(self, container_id: str) -> None: ...

    def list(self, instance_id: str) -> list[ContainerSummary]: ...

    def inspect(self, container: str) -> Observation: ...

    def read_log(self, container_id: str, stream: Stream, log: BoundedLog, seconds: float) -> None: ...

    def signal(self, container_id: str, name: Literal["SIGTERM", "SIGKILL"]) -> None: ...

    def remove(self, container_id: str) -> None: ...

    def has_image(self, image: str) -> bool: ...

    def pull(self, image: str, seconds: float) -> None: ...

    def watch_ends(self, instance_id: str) -> EndWatch: ...


class DockerEngine:
    """A Docker Engine over its API, at low level. May be used by several threads, not across a fork."""

    def __init__(self, address: EngineAddress, timeout: float) -> None:
        """`timeout`: seconds that each call may wait for its answer."""
        self._address = address
        self._timeout = timeout
        self._connected: docker.APIClient | None = None
        self._lock = threading.Lock()

    def identify(self) -> str:
        """The Engine's own id, which another Engine at the same address does not have."""
        with _translated("identify"):
            return str(self._client().info()["ID"])

    def create(
        self,
        name: str,
        spec: ContainerSpec,
        *,
        environment: Mapping[str, str],
        labels: Mapping[str, str],
        hardening: Hardening,
    ) -> str:
        """Create, not start; the id. `environment` is all of it, secrets resolved.

        Only what is named here reaches the Engine: an allow-list, whatever a spec may grow.
        """
        client = self._client()
        first_network, *networks = spec.networks or (None,)
        limits: dict[str, Any] = {}
        if spec.memory_limit_mib:
            memory = spec.memory_limit_mib * 1024 * 1024
            limits |= {"mem_limit": memory, "memswap_limit": memory}
        if spec.cpu_limit:
            limits["nano_cpus"] = int(spec.cpu_limit * 1_000_000_000)
        if hardening.cap_drop_all:
            limits["cap_drop"] = ["ALL"]
        if first_network:
            limits["network_mode"] = first_network
        with _translated("create"):
            host_config = client.create_host_config(
                init=True,
                security_opt=["no-new-privileges"],
                pids_limit=hardening.pids_limit,
                log_config=LogConfig(type=hardening.log_driver, config=hardening.log_options),
                mounts=[
                    Mount(mount.target, mount.source or None, type=mount.type, read_only=mount.read_only)
                    for mount in spec.mounts
                ],
                **limits,
            )
            created = client.create_container(
                spec.image,
                command=list(spec.command) or None,
                entrypoint=list(spec.entrypoint) or None,
                environment=dict(environment),
                working_dir=spec.working_dir or None,
                user=spec.user or None,
                labels=dict(labels),
                name=name,
                host_config=host_config,
            )
        container_id = str(created["Id"])
        for network in networks:
            with _translated("connect"):
                client.connect_container_to_network(container_id, network)
        return container_id

    def start(self, container_id: str) -> None:
        """Start by full id. Not idempotent: a container that has ended would run again."""
        with _translated("start"):
            self._client().start(container_id)

    def list(self, instance_id: str) -> list[ContainerSummary]:
        """All containers of the installation, in one call."""
        with _translated("list"):
            rows = self._client().containers(all=True, filters={"label": f"{INSTANCE_LABEL}={instance_id}"})
        return [_summary(row) for row in rows]

    def inspect(self, container: str) -> Observation:
        """By id or exact name."""
        with _translated("inspect"):
            return _observation(self._client().inspect_container(container))

    def read_log(self, container_id: str, stream: Stream, log: BoundedLog, seconds: float) -> None:
        """Feed what was written to one stream, for at most `seconds`; an ended container's only."""
        until = time.monotonic() + seconds
        with _translated("logs"):
            chunks = self._client().logs(
                container_id, stdout=stream == "stdout", stderr=stream == "stderr", stream=True, follow=False
            )
            for chunk in chunks:
                log.feed(chunk)
                if time.monotonic() >= until:
                    log.cut_short(f"not read further: it took more than {seconds:g} s")
                    chunks.close()
                    return

    def signal(self, container_id: str, name: Literal["SIGTERM", "SIGKILL"]) -> None:
        with _translated("signal"):
            self._client().kill(container_id, name)

    def remove(self, container_id: str) -> None:
        """Remove it with its anonymous volumes, unless it runs. Gone or on its way out is done, too."""
        try:
            with _translated("remove"):
                self._client().remove_container(container_id, v=True)
        except ContainerGone:
            return
        except ContainerRunning:
            # The same status says that another is removing it; only a look tells.
            if self._is_going(container_id):
                return
            raise

    def has_image(self, image: str) -> bool:
        try:
            with _translated("image"):
                self._client().inspect_image(image)  # type: ignore[no-untyped-call]
        except ImageMissing:
            return False
        return True

    def pull(self, image: str, seconds: float) -> None:
        """Pull, with the credentials of this process's Docker configuration, within `seconds`."""
        until = time.monotonic() + seconds
        # Own client: a layer that is unpacked is silent for longer than any other call may be.
        with _translated("connect"):
            client = self._new_client(seconds)
        try:
            with _translated("pull"):
                for line in client.pull(image, stream=True, decode=True):
                    if "error" in line:
                        raise EngineFailed(f"pull of {image}: {line['error']}")
                    if time.monotonic() >= until:
                        raise EngineFailed(f"pull of {image} took more than {seconds:g} s")
        finally:
            client.close()

    def watch_ends(self, instance_id: str) -> EndWatch:
        """Blocks until the Engine answers; what dies from then on is told."""
        filters = {"event": "die", "type": "container", "label": f"{INSTANCE_LABEL}={instance_id}"}
        with _translated("events"):
            return _DockerEndWatch(self._client().events(filters=filters, decode=True))

    def _client(self) -> docker.APIClient:
        with self._lock:
            if self._connected is None:
                # The version is asked for, since newer Engines refuse the oldest ones.
                with _translated("identify"):
                    self._connected = self._new_client(self._timeout)
            return self._connected

    def _new_client(self, timeout: float) -> docker.APIClient:
        address = self._address
        tls: docker.tls.TLSConfig | Literal[False] = False
        if address.tls_cert_path:
            tls = docker.tls.TLSConfig(
                client_cert=(address.tls_cert_path, address.tls_key_path), ca_cert=address.tls_ca_path, verify=True
            )
        return docker.APIClient(base_url=address.base_url, version="auto", timeout=timeout, tls=tls)  # type: ignore[arg-type]

    def _is_going(self, container_id: str) -> bool:
        try:
            return self.inspect(container_id).state == "removing"
        except ContainerGone:
            return True


class _DockerEndWatch:
    def __init__(self, events: Any) -> None:
        self._events = events

    def __iter__(self) -> Iterator[str]:
        with _translated("events"):
            for event in self._events:
                yield event["Actor"]["ID"]

    def close(self) -> None:
        try:
            self._events.close()
        except (docker.errors.DockerException, OSError, AttributeError):
            # A stream over ssh can't be closed; one that the Engine has ended is closed already.
            return


def _summary(row: dict[str, Any]) -> ContainerSummary:
    labels = row.get("Labels") or {}
    names = row.get("Names") or [""]
    return ContainerSummary(
        id=row["Id"],
        name=names[0].removeprefix("/"),
        state=row.get("State", ""),
        job_id=_number(labels.get(JOB_LABEL)),
        attempt=_number(labels.get(ATTEMPT_LABEL)),
        token=labels.get(TOKEN_LABEL, ""),
    )


def _observation(row: dict[str, Any]) -> Observation:
    state = row["State"]
    labels = row["Config"].get("Labels") or {}
    return Observation(
        container_id=row["Id"],
        state=state["Status"],
        exit_code=state.get("ExitCode"),
        oom_killed=bool(state.get("OOMKilled")),
        error=state.get("Error") or "",
        started_at=_time(state.get("StartedAt")),
        finished_at=_time(state.get("FinishedAt")),
        image_digest=row.get("Image") or "",
        job_id=_number(labels.get(JOB_LABEL)),
        attempt=_number(labels.get(ATTEMPT_LABEL)),
        token=labels.get(TOKEN_LABEL, ""),
    )


def _number(label: str | None) -> int | None:
    return int(label) if label and re.fullmatch("[0-9]{1,18}", label) else None


def _time(text: str | None) -> datetime | None:
    """Docker's zero date means never."""
    if not text or text.startswith("0001-"):
        return None
    moment = datetime.fromisoformat(text)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


Step = Literal[
    "identify", "create", "connect", "start", "list", "inspect", "logs", "signal", "remove", "image", "pull", "events"
]

#: After these a lost answer leaves open what happened. A pull that happens later harms nobody.
_SIDE_EFFECTS = ("create", "connect", "start", "signal", "remove")

#: Source: RELIABILITY.md §2.1, measured. The text of an error is never looked at: it changes between versions.
_BY_STEP: dict[tuple[Step, int], type[EngineError]] = {
    ("create", 404): ImageMissing,
    ("create", 409): NameTaken,
    ("connect", 404): NetworkMissing,
    ("signal", 409): ContainerNotRunning,
    ("remove", 409): ContainerRunning,
    ("image", 404): ImageMissing,
    ("pull", 404): ImageMissing,
    ("logs", 409): ContainerGone,
    ("logs", 500): LogsUnavailable,
    ("logs", 501): LogsUnavailable,
}
_BY_STATUS: dict[int, type[EngineError]] = {400: RequestRefused, 404: ContainerGone}
#: What a proxy, or an Engine on its way up or down, answers.
_GATEWAY = (502, 503, 504)

_TRANSPORT = (
    docker.errors.DockerException,
    requests.exceptions.RequestException,
    urllib3.exceptions.HTTPError,
    OSError,
    json.JSONDecodeError,
)


@contextmanager
def _translated(step: Step) -> Iterator[None]:
    """Turn what docker-py raises into our own, by class and status. Nothing foreign leaves this module."""
    try:
        yield
    except docker.errors.APIError as e:
        raise _by_answer(step, e) from e
    except _TRANSPORT as e:
        raise _by_transport(step, e) from e
    except (TypeError, ValueError) as e:
        # docker-py checks arguments itself, before anything is sent.
        raise RequestRefused(f"{step}: {e}") from e


def _by_answer(step: Step, error: docker.errors.APIError) -> EngineError:
    status = error.status_code or 0
    message = f"{step}: {str(error.explanation or error).strip()}"
    if status in _GATEWAY:
        return OutcomeUnknown(message) if step in _SIDE_EFFECTS else HostUnavailable(message)
    kind = _BY_STEP.get((step, status)) or _BY_STATUS.get(status, EngineFailed)
    return kind(message)


def _by_transport(step: Step, error: BaseException) -> EngineError:
    chain = list(_causes(error))
    innermost = chain[-1]
    message = f"{step}: {innermost}"
    if _is_any(chain, PermissionError, ssl.SSLError, requests.exceptions.SSLError):
        return HostMisconfigured(message)
    if _is_any(chain, FileNotFoundError, ConnectionRefusedError, requests.exceptions.ConnectTimeout):
        return HostUnavailable(message)
    if _is_any(chain, json.JSONDecodeError, requests.exceptions.JSONDecodeError):
        return HostMisconfigured(f"{step}: what answers is no Docker Engine: {innermost}")
    if isinstance(error, docker.errors.DockerException) and len(chain) == 1:
        # Said by docker-py itself: an address or a certificate that it can't use.
        return HostMisconfigured(message)
    return OutcomeUnknown(message) if step in _SIDE_EFFECTS else HostUnavailable(message)


def _causes(error: BaseException) -> Iterable[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def _is_any(chain: list[BaseException], *kinds: type[BaseException]) -> bool:
    return any(isinstance(link, kinds) for link in chain)


#: How an engine for an address is made; tests hand in their own.
MakeEngine = Callable[[EngineAddress, float], Engine]
