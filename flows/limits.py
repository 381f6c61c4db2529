"""The limits of Prefect's tags: people set them, this module reads them, the claim keeps to them."""

from . import _django  # noqa: F401, I001 (sets Django up before anything else is imported)

import logging
from collections.abc import Container, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime, timedelta
from uuid import UUID

import httpx
from prefect.client.base import ServerType
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitUpdate
from prefect.client.schemas.responses import GlobalConcurrencyLimitResponse
from prefect.context import FlowRunContext
from prefect.exceptions import ObjectNotFound

from container_manager.conf import get_settings
from container_manager.models import DockerHost, Installation
from container_manager.queue import queue_manager
from container_manager.types import HOST_TAG_PREFIX, JOB_TAG, Frozen, Limits

from .api import PAGE, is_away, noted

#: Prefect's own limit on launch tasks in flight.
LAUNCH_TAG = "container-launch"
#: How many may be in flight until a person sets the limit. With one, a task could wait seconds for the slot.
LAUNCH_TASKS = 2
#: The beginning of a launch task's key, on any server.
_LAUNCH_TASK = "launch_next_batch"

logger = logging.getLogger("container_manager.flows")

#: seconds; of one call.
_REQUEST_SECONDS = 10
#: seconds; a launch task claims for five and ends what it began. One that is older was killed where nobody saw it.
LAUNCH_SECONDS = 15

_is_temporary: ContextVar[bool] = ContextVar("container_manager_temporary_server", default=False)


class LaunchSlots(Frozen):
    """Prefect's limit on launch tasks and how many of them are taken; None: no limit."""

    limit: int | None = None
    taken: int = 0

    @property
    def is_full(self) -> bool:
        return self.limit is not None and self.taken >= self.limit

    def __str__(self) -> str:
        return f"limit reached: tag {launch_tag()}, {self.taken} of {self.limit}"


def launch_tag() -> str:
    """The tag of this installation's launch tasks."""
    return get_settings().named(LAUNCH_TAG)


@contextmanager
def on_temporary_server() -> Iterator[None]:
    """Within, the server is one of this process: nobody sets limits there, so the last ones read hold."""
    token = _is_temporary.set(True)
    try:
        yield
    finally:
        _is_temporary.reset(token)


def read() -> tuple[Limits | None, LaunchSlots] | None:
    """The limits as they are now, in one call; None if the server can't say. No limits, if nobody can set them."""
    if is_away():
        return None
    try:
        with get_client(sync_client=True, httpx_settings={"timeout": _REQUEST_SECONDS}) as client:
            rows = read_rows(client)
            slots = _launch_slots(client, rows.get(LAUNCH_TAG))
            is_temporary = _is_temporary.get() or client.server_type is ServerType.EPHEMERAL
    except httpx.HTTPError as e:
        logger.log(noted(e), "the limits of Prefect's tags can't be read, the last ones hold: %s", e)
        return None
    limits = Limits(
        total=rows[JOB_TAG].limit if JOB_TAG in rows else None,
        hosts={
            name.removeprefix(HOST_TAG_PREFIX): row.limit
            for name, row in rows.items()
            if name.startswith(HOST_TAG_PREFIX)
        },
    )
    return None if is_temporary else limits, slots


def refresh() -> LaunchSlots | None:
    """Read the limits and keep them for the claim; the slots for launch tasks, None if the server can't say."""
    found = read()
    if found is None:
        return None
    now, slots = found
    if now is not None:
        queue_manager.keep_limits(now)
    return slots


def read_rows(client: SyncPrefectClient) -> dict[str, GlobalConcurrencyLimitResponse]:
    """The active limits of this installation's tags, by tag without the installation's name."""
    return {row.name.removeprefix(_prefix()): row for row in _our_limits(client) if row.active}


def settle(client: SyncPrefectClient, *, create: bool = True, reset: bool = False) -> dict[str, int]:
    """Create the limits that every installation has, and update those that no one has set by hand.

    `container-job` is the number of slots of all active hosts. A limit that a person has set stays, unless `reset`.
    Returns the limits that were written, by tag.
    """
    slots = sum(DockerHost.objects.active().values_list("max_concurrent_jobs", flat=True))
    wanted = {JOB_TAG: max(1, slots), LAUNCH_TAG: LAUNCH_TASKS}
    known = Installation.load().registration.limits
    present = _rows_of(client, wanted)
    ours = {
        tag: limit
        for tag, limit in wanted.items()
        if ((row := present.get(tag)) is None and create)
        or (row is not None and (reset or row.limit in _written(known.get(str(row.id)), tag, limit)))
    }
    written = {tag: limit for tag, limit in ours.items() if reset or tag not in present or present[tag].limit != limit}
    for tag, limit in written.items():
        client.upsert_global_concurrency_limit_by_name(_prefix() + tag, limit)
    if written:
        present = _rows_of(client, wanted)
    record = {str(present[tag].id): limit for tag, limit in ours.items() if tag in present}
    if not record.items() <= known.items():
        Installation.keep_registration(limits=record)
    return written


def _written(recorded: int | None, tag: str, limit: int) -> tuple[int, ...]:
    """What we may have written. Without a record: what an earlier version wrote, above all beside the first host."""
    if recorded is not None:
        return (recorded,)
    first_host: int = DockerHost._meta.get_field("max_concurrent_jobs").default
    return (limit, first_host) if tag == JOB_TAG else (limit,)


def follow_hosts() -> None:
    """Call `settle` once a pass on a work pool, where no service does it. Best effort."""
    context = FlowRunContext.get()
    if context is None or context.flow_run is None or context.flow_run.work_queue_id is None or is_away():
        return
    try:
        with get_client(sync_client=True, httpx_settings={"timeout": _REQUEST_SECONDS}) as client:
            settle(client, create=False)
    except httpx.HTTPError as e:
        logger.log(noted(e), "the limits could not be compared with the hosts' slots: %s", e)


def _rows_of(client: SyncPrefectClient, tags: Container[str]) -> dict[str, GlobalConcurrencyLimitResponse]:
    """Includes limits that a person has switched off."""
    rows = {row.name.removeprefix(_prefix()): row for row in _our_limits(client)}
    return {tag: row for tag, row in rows.items() if tag in tags}


def _prefix() -> str:
    """Prefect keeps a tag's limit as a global limit, whose name begins with this."""
    return "tag:" + get_settings().named("")


def _our_limits(client: SyncPrefectClient) -> Iterator[GlobalConcurrencyLimitResponse]:
    offset = 0
    while True:
        page = client.read_global_concurrency_limits(limit=PAGE, offset=offset)
        yield from (row for row in page if row.name.startswith(_prefix()))
        if len(page) < PAGE:
            return
        offset += PAGE


def _launch_slots(client: SyncPrefectClient, row: GlobalConcurrencyLimitResponse | None) -> LaunchSlots:
    if row is None:
        return LaunchSlots()
    slots = LaunchSlots(limit=row.limit, taken=row.active_slots)
    if not slots.is_full or not slots.taken:
        return slots
    freed = free_leaked(client, row)
    if freed:
        logger.warning("tag %s: freed %d slots of task runs that have ended", launch_tag(), freed)
    return LaunchSlots(limit=row.limit, taken=slots.taken - freed)


def free_leaked(client: SyncPrefectClient, row: GlobalConcurrencyLimitResponse) -> int:
    """Free the slots of this tag that no task run holds any more; how many.

    A task run that is killed keeps its slot for a minute; one whose server is restarted may keep it for good.
    """
    tag = row.name.removeprefix("tag:")
    try:
        holders = client.read_concurrency_limit_by_tag(tag).active_slots
    except ObjectNotFound:
        # Somebody has just removed it.
        return 0
    ended = [task_run_id for task_run_id in holders if not _is_in_flight(client, task_run_id)]
    for task_run_id in ended:
        client.decrement_v1_concurrency_slots([tag], task_run_id, 0)
    lost = max(0, row.active_slots - len(holders))
    if lost:
        held = GlobalConcurrencyLimitUpdate(active_slots=len(holders) - len(ended))
        client.update_global_concurrency_limit(row.name, held)
    return len(ended) + lost


def _is_in_flight(client: SyncPrefectClient, task_run_id: UUID) -> bool:
    try:
        task_run = client.read_task_run(task_run_id)
    except ObjectNotFound:
        # Its record comes later than its slot; or never, if it was killed in between.
        return _is_young(_made_at(task_run_id))
    if not task_run.task_key.startswith(_LAUNCH_TASK):
        # Another task with the same tag. Its slot is not ours to free.
        return True
    if task_run.state is not None and task_run.state.is_final():
        return False
    if not _is_young(task_run.start_time or task_run.created):
        return False
    return task_run.flow_run_id is None or not _has_ended(client, task_run.flow_run_id)


def _is_young(since: datetime | None) -> bool:
    return since is None or datetime.now(UTC) - since < timedelta(seconds=LAUNCH_SECONDS)


def _made_at(task_run_id: UUID) -> datetime | None:
    """The time in an id of version 7: its first 48 bits, in milliseconds."""
    return datetime.fromtimestamp((task_run_id.int >> 80) / 1000, UTC) if task_run_id.version == 7 else None


def _has_ended(client: SyncPrefectClient, flow_run_id: UUID) -> bool:
    """Whoever runs a flow run says at once when its process was killed; for its tasks nobody does."""
    try:
        state = client.read_flow_run(flow_run_id).state
    except ObjectNotFound:
        return True
    return state is not None and state.is_final()
