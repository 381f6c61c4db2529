"""The hosts that this process can reach. Connections, threads and the breaker live here, in memory."""

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

from django.core.exceptions import ValidationError
from django.db import transaction
from django.db.models import Case, F, Q, Value, When
from django.db.models.functions import Now

from .conf import get_settings
from .engine import Engine, MakeEngine
from .exceptions import EngineError, EngineReplaced, HostMisconfigured, HostUnavailable, OutcomeUnknown
from .locks import refuse_in_transaction
from .models import DockerHost
from .policy import describe, validate_address
from .transitions import from_now
from .types import EngineAddress

logger = logging.getLogger(__name__)

#: seconds; all hosts are asked at once, so that any number of dead ones costs a round this much at most.
PROBE_SECONDS = 5
#: seconds; a host that answered this long ago is not asked again before a launch.
_FRESH_SECONDS = 2
#: seconds; how old `last_seen_at` may get before it is written again.
_SEEN_SECONDS = 5


@dataclass(eq=False)
class HostConnection:
    """One host as this process knows it: its Engine, the few threads that may talk to it, and the breaker."""

    host: DockerHost
    engine: Engine
    executor: ThreadPoolExecutor
    address: EngineAddress
    #: Set by the first call that does not get through; the host is left alone until the next round asks again.
    has_failed: bool = False
    #: What the row says of its health is not what is to be seen now.
    is_stale: bool = False
    _probe: "Future[str] | None" = field(default=None, repr=False)
    _probed_at: float = 0.0

    @property
    def width(self) -> int:
        return 2 * get_settings().LAUNCH_THREADS

    def submit(self, call: Callable[[], Any]) -> "Future[Any]":
        """Run a call to the Engine in one of the host's threads, unless one has failed since it was last reached."""
        return self.executor.submit(self._unless_failed, call)

    def _unless_failed(self, call: Callable[[], Any]) -> Any:
        if self.has_failed:
            # A call that hangs takes its whole timeout: one is enough.
            raise HostUnavailable(f"host {self.host.name} has just failed; it is left alone until the next round")
        try:
            return call()
        except (HostUnavailable, HostMisconfigured, OutcomeUnknown):
            self.has_failed = True
            raise

    def close(self) -> None:
        self.executor.shutdown(wait=False)

    def probe(self) -> "Future[str]":
        """The answer to `identify` that is under way; a host that hangs is not asked a second time meanwhile."""
        if self._probe is None:
            self._probe = Future()
            self._probed_at = time.monotonic()
            # A thread of its own: those of the pool may all hang in calls to this very host.
            threading.Thread(target=self._identify, args=(self._probe,), daemon=True).start()
        return self._probe

    def _identify(self, answer: "Future[str]") -> None:
        try:
            engine_id = self.engine.identify()
        except EngineError as e:
            answer.set_exception(e)
        except Exception as e:  # noqa: BLE001 (whatever a transport raises: an answer that never comes closes the host for good)
            answer.set_exception(HostMisconfigured(f"{type(e).__name__}: {e}"))
        else:
            answer.set_result(engine_id)

    @property
    def is_overdue(self) -> bool:
        """A probe of an earlier round has not been answered."""
        return self._probe is not None and time.monotonic() - self._probed_at > PROBE_SECONDS

    def take_answer(self) -> "Future[str]":
        answer = self.probe()
        self._probe = None
        return answer


class Hosts:
    """Keeps a connection per host for the life of the process."""

    def __init__(self, make_engine: MakeEngine) -> None:
        self._make_engine = make_engine
        self._connections: dict[int, HostConnection] = {}
        self._reached: dict[int, HostConnection] = {}
        self._reached_at = 0.0
        self._pid = os.getpid()

    def reached(self) -> dict[int, HostConnection]:
        """The hosts that answered just now; asks again if that is some seconds ago."""
        refuse_in_transaction()
        if self._pid == os.getpid() and time.monotonic() - self._reached_at < _FRESH_SECONDS:
            return usable(self._reached)
        return self.reach()[0]

    @property
    def reached_ids(self) -> set[int] | None:
        """The hosts that answered this process last; None: it has not asked yet."""
        return set(self._reached) if self._reached_at else None

    def reach(self, *, also_drained: bool = False) -> tuple[dict[int, HostConnection], list[str]]:
        """The hosts in use that answer with the id they are known by, and a sentence per host that does not.

        `also_drained`: those, too, that are in use no more.
        """
        refuse_in_transaction()
        if self._pid != os.getpid():
            # Sockets and threads of the parent are no use after a fork.
            self._connections, self._pid = {}, os.getpid()
        asked: list[HostConnection] = []
        problems: list[str] = []
        is_fresh = Q(last_seen_at__gt=from_now(-_SEEN_SECONDS))
        hosts = DockerHost.objects.order_by("pk") if also_drained else DockerHost.objects.in_use()
        for host in hosts.annotate(is_stale=Case(When(is_fresh, then=Value(False)), default=Value(True))):
            try:
                connection = self._connect(host)
                connection.is_stale = host.is_stale or bool(host.last_error)  # type: ignore[attr-defined] # annotated
                asked.append(connection)
            except HostMisconfigured as e:
                problems.append(_note_down(host, e))
        wait(
            [connection.probe() for connection in asked if not connection.is_overdue],
            timeout=PROBE_SECONDS,
        )
        reached: dict[int, HostConnection] = {}
        for connection in asked:
            try:
                _confirm(connection)
            except EngineError as e:
                connection.has_failed = True
                problems.append(_note_down(connection.host, e))
            else:
                connection.has_failed = False
                reached[connection.host.pk] = connection
        _note_seen([pk for pk, connection in reached.items() if connection.is_stale])
        self._reached, self._reached_at = reached, time.monotonic()
        self._drop_all_but({connection.host.pk for connection in asked})
        return reached, problems

    def engine_of(self, host: DockerHost) -> Engine | None:
        """An engine of the caller's own, for streams that last; None: the host's address is not allowed here."""
        try:
            _check_address(host)
        except HostMisconfigured:
            return None
        return self._new_engine(host)

    def _new_engine(self, host: DockerHost) -> Engine:
        return self._make_engine(host.address, get_settings().DOCKER_TIMEOUT_SECONDS)

    def _connect(self, host: DockerHost) -> HostConnection:
        _check_address(host)
        known = self._connections.get(host.pk)
        if known is None or known.address != host.address:
            if known is not None:
                known.close()
            known = HostConnection(
                host=host,
                engine=self._new_engine(host),
                executor=ThreadPoolExecutor(get_settings().LAUNCH_THREADS, thread_name_prefix=f"host-{host.name}"),
                address=host.address,
            )
            self._connections[host.pk] = known
        known.host = host
        return known

    def _drop_all_but(self, host_ids: set[int]) -> None:
        for pk in self._connections.keys() - host_ids:
            self._connections.pop(pk).close()


def usable(connections: Mapping[int, HostConnection]) -> dict[int, HostConnection]:
    """Those of which no call has failed since they were reached."""
    return {pk: connection for pk, connection in connections.items() if not connection.has_failed}


def _check_address(host: DockerHost) -> None:
    try:
        validate_address(host.address)
    except ValidationError as e:
        raise HostMisconfigured(describe(e)) from e


def _confirm(connection: HostConnection) -> None:
    host = connection.host
    if not connection.probe().done():
        raise EngineError(f"no answer within {PROBE_SECONDS} s")
    engine_id = connection.take_answer().result()
    if not host.engine_id:
        DockerHost.objects.filter(pk=host.pk, engine_id="").update(engine_id=engine_id)
        # Another machine, whose Engine is another one, may have been the first.
        host.engine_id = DockerHost.objects.filter(pk=host.pk).values_list("engine_id", flat=True).first() or ""
    if host.engine_id != engine_id:
        raise EngineReplaced(
            f"another Engine answers at this address ({engine_id}, not {host.engine_id}); if that is meant, choose "
            "'Accept the Engine that answers now' among the actions of Docker hosts"
        )


def _note_seen(host_ids: list[int]) -> None:
    # Nothing while what it would write is fresh: many passes look at the same hosts, and on SQLite even a
    # statement that changes nothing waits for the one lock.
    if host_ids:
        _write(host_ids, last_seen_at=Now(), last_error="")


def _note_down(host: DockerHost, error: EngineError) -> str:
    if host.last_error != str(error):
        logger.warning("host %s: %s", host.name, error, extra={"host": host.name})
    fields: dict[str, Any] = {"last_error": str(error)}
    if not isinstance(error, HostMisconfigured):
        # What can't be used from here may well run its jobs: another machine has another Engine at this path.
        has_gone_down = Q(last_down_at=None) | Q(last_seen_at__gt=F("last_down_at"))
        fields["last_down_at"] = Case(When(has_gone_down, then=Now()), default=F("last_down_at"))
    _write([host.pk], **fields)
    return f"host {host.name}: {error}"


def _write(host_ids: list[int], **fields: Any) -> None:
    """Leaves out rows that somebody is editing: no pass waits for a person, and the next one writes again."""
    with transaction.atomic():
        rows = DockerHost.objects.select_for_update(no_key=True, skip_locked=True).filter(pk__in=host_ids)
        free = list(rows.values_list("pk", flat=True))
        DockerHost.objects.filter(pk__in=free).update(**fields)
