"""The one module that speaks to Docker Engines. It knows no Django and no job, and decides nothing."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import docker
import docker.errors
import docker.tls
from docker.types import LogConfig, Mount

from . import networks
from .containers import INSTANCE_LABEL, daemon, network, observation, summary
from .engine_errors import parsing, storable, translated
from .exceptions import ContainerGone, ContainerRunning, EngineError, EngineFailed, HostUnavailable
from .images import qualified
from .logs import BoundedLog
from .streams import DockerEndWatch, DockerLogFollow, EndWatch, LogFollow
from .types import ContainerSpec, ContainerSummary, Daemon, EngineAddress, Hardening, Network, Observation

Stream = Literal["stdout", "stderr"]


class Engine(Protocol):
    """What the queue needs of a container engine. Every method raises `EngineError`s and nothing else."""

    def identify(self) -> str: ...

    def daemon(self) -> Daemon: ...

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

    def read_end(self, container_id: str, stream: Stream, log: BoundedLog, lines: int, seconds: float) -> None: ...

    def follow_log(self, container_id: str, stream: Stream) -> LogFollow: ...

    def signal(self, container_id: str, name: Literal["SIGTERM", "SIGKILL"]) -> None: ...

    def remove(self, container_id: str) -> None: ...

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
        with translated("identify"):
            answer = self._client().info()
        with parsing("identify"):
            return str(answer["ID"])

    def daemon(self) -> Daemon:
        with translated("daemon"):
            info = self._client().info()
        try:
            with translated("daemon"):
                bridges = self._client().networks(names=["bridge"])
        except HostUnavailable:
            raise
        except EngineError:
            # A proxy before the socket may forbid it.
            bridges = []
        with parsing("daemon"):
            return daemon(info, bridges)

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

        Only what is named here reaches the Engine: an allow-list, whatever a spec may grow. Raises `RequestRefused` and
        creates nothing if a network is denied.
        """
        client = self._client()
        first, *others = networks.joined(spec.networks, hardening.denied_networks, self._networks)
        limits: dict[str, Any] = {}
        if spec.memory_limit_mib:
            memory = spec.memory_limit_mib * 1024 * 1024
            limits |= {"mem_limit": memory, "memswap_limit": memory}
        if spec.cpu_limit:
            limits["nano_cpus"] = int(spec.cpu_limit * 1_000_000_000)
        if hardening.cap_drop_all:
            limits["cap_drop"] = ["ALL"]
        if spec.networks and spec.networks[0] != networks.DEFAULT:
            limits["network_mode"] = networks.handle(first)
        endpoints = {networks.handle(first): networks.endpoint(first)} if networks.endpoint(first) else {}
        with translated("create"):
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
                qualified(spec.image),
                command=list(spec.command) or None,
                entrypoint=list(spec.entrypoint) or None,
                environment=dict(environment),
                working_dir=spec.working_dir or None,
                user=spec.user or None,
                labels=dict(labels),
                name=name,
                host_config=host_config,
                networking_config={"EndpointsConfig": endpoints} if endpoints else None,
            )
        with parsing("create"):
            container_id = str(created["Id"])
        for other in others:
            self._connect(container_id, other)
        return container_id

    def start(self, container_id: str) -> None:
        """Start by full id. Not idempotent: a container that has ended would run again."""
        with translated("start"):
            self._client().start(container_id)

    def list(self, instance_id: str) -> list[ContainerSummary]:
        """All containers of the installation, in one call."""
        with translated("list"):
            rows = self._client().containers(all=True, filters={"label": f"{INSTANCE_LABEL}={instance_id}"})
        with parsing("list"):
            if not isinstance(rows, list):
                raise TypeError
            return [summary(row) for row in rows]

    def inspect(self, container: str) -> Observation:
        """By id or exact name."""
        with translated("inspect"):
            row = self._client().inspect_container(container)
        with parsing("inspect"):
            return observation(row)

    def read_log(self, container_id: str, stream: Stream, log: BoundedLog, seconds: float) -> None:
        """Feed what was written to one stream, for at most `seconds`; an ended container's only."""
        self._feed(self._client(), container_id, stream, log, seconds)

    def read_end(self, container_id: str, stream: Stream, log: BoundedLog, lines: int, seconds: float) -> None:
        """Feed the last lines of one stream, also of a container that runs; no answer takes longer than `seconds`."""
        # Own client: any other call is waited for for longer.
        client = self._new_client(_BoundedClient, seconds)
        try:
            self._feed(client, container_id, stream, log, seconds, lines)
        finally:
            client.close()

    def follow_log(self, container_id: str, stream: Stream) -> LogFollow:
        """Blocks until the Engine answers, never for what the container has yet to write."""
        client = self._new_client(docker.APIClient, self._timeout)
        try:
            with translated("logs"):
                chunks = client.logs(
                    container_id, stdout=stream == "stdout", stderr=stream == "stderr", stream=True, follow=True
                )
        except EngineError:
            client.close()
            raise
        return DockerLogFollow(client, chunks)

    def signal(self, container_id: str, name: Literal["SIGTERM", "SIGKILL"]) -> None:
        with translated("signal"):
            self._client().kill(container_id, name)

    def remove(self, container_id: str) -> None:
        """Remove it with its anonymous volumes, unless it runs. Gone or on its way out is done, too."""
        try:
            with translated("remove"):
                self._client().remove_container(container_id, v=True)
        except ContainerGone:
            return
        except ContainerRunning:
            # The same status says that another is removing it; only a look tells.
            if self._is_going(container_id):
                return
            raise

    def pull(self, image: str, seconds: float) -> None:
        """Pull, with the credentials of this process's Docker configuration, within `seconds`."""
        until = time.monotonic() + seconds
        # Own client: a layer that is unpacked is silent for longer than any other call may be.
        client = self._new_client(_BoundedClient, seconds)
        try:
            with translated("pull"):
                for line in client.pull(qualified(image), stream=True, decode=True):
                    if "error" in line:
                        raise EngineFailed(storable(f"pull of {image}: {line['error']}"))
                    if time.monotonic() >= until:
                        raise EngineFailed(f"pull of {image} took more than {seconds:g} s")
        finally:
            client.close()

    def watch_ends(self, instance_id: str) -> EndWatch:
        """Blocks until the Engine answers; what dies from then on is told."""
        filters = {"event": "die", "type": "container", "label": f"{INSTANCE_LABEL}={instance_id}"}
        client = self._new_client(docker.APIClient, self._timeout)
        with translated("events"):
            return DockerEndWatch(client, client.events(filters=filters, decode=True))

    def _feed(
        self,
        client: docker.APIClient,
        container_id: str,
        stream: Stream,
        log: BoundedLog,
        seconds: float,
        lines: int | Literal["all"] = "all",
    ) -> None:
        until = time.monotonic() + seconds
        with translated("logs"):
            chunks = client.logs(
                container_id,
                stdout=stream == "stdout",
                stderr=stream == "stderr",
                stream=True,
                follow=False,
                tail=lines,
            )
            # The stream inside: what wraps it takes a connection that breaks for the end of the log.
            for chunk in chunks._stream:  # type: ignore[attr-defined]
                log.feed(chunk)
                if time.monotonic() >= until:
                    log.cut_short(f"not read further: it took more than {seconds:g} s")
                    chunks._response.close()  # type: ignore[attr-defined]
                    return

    def _networks(self) -> Sequence[Network]:
        with translated("networks"):
            rows = self._client().networks()
        with parsing("networks"):
            if not isinstance(rows, list):
                raise TypeError
            return [network(row) for row in rows]

    def _connect(self, container_id: str, other: Network) -> None:
        client = self._client()
        data = {"Container": container_id, "EndpointConfig": networks.endpoint(other)}
        with translated("connect"):
            # A raw request: docker-py can't put the network's id into the endpoint.
            url = client._url("/networks/{0}/connect", networks.handle(other))  # type: ignore[attr-defined]
            client._raise_for_status(client._post_json(url, data))  # type: ignore[attr-defined]

    def _client(self) -> docker.APIClient:
        with self._lock:
            if self._connected is None:
                self._connected = self._new_client(_BoundedClient, self._timeout)
            return self._connected

    def _new_client(self, kind: type[docker.APIClient], timeout: float) -> docker.APIClient:
        address = self._address
        with translated("version"):
            tls: docker.tls.TLSConfig | Literal[False] = False
            if address.tls_cert_path:
                tls = docker.tls.TLSConfig(
                    client_cert=(address.tls_cert_path, address.tls_key_path), ca_cert=address.tls_ca_path, verify=True
                )
            # The version is asked for, since newer Engines refuse the oldest ones.
            return kind(base_url=address.base_url, version="auto", timeout=timeout, tls=tls)  # type: ignore[arg-type]

    def _is_going(self, container_id: str) -> bool:
        try:
            return self.inspect(container_id).state == "removing"
        except ContainerGone:
            return True


class _BoundedClient(docker.APIClient):
    """Waits no longer than its timeout, for streams, too, where docker-py waits for ever."""

    def _set_request_timeout(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        if kwargs.get("timeout") is None:
            kwargs["timeout"] = self.timeout
        return kwargs

    def _disable_socket_timeout(self, socket: Any) -> None:
        """Keep it."""


#: How an engine for an address is made; tests hand in their own.
MakeEngine = Callable[[EngineAddress, float], Engine]
