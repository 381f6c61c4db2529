"""The limits of Prefect's tags: people set them, this module reads them, the claim keeps to them."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import httpx
from prefect.client.base import ServerType
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitUpdate
from prefect.client.schemas.responses import GlobalConcurrencyLimitResponse
from prefect.exceptions import ObjectNotFound

from container_manager.queue import queue_manager
from container_manager.types import HOST_TAG_PREFIX, JOB_TAG, Frozen, Limits

#: Prefect's own limit on launch tasks in flight.
LAUNCH_TAG = "container-launch"

logger = logging.getLogger("container_manager.flows")

#: A tag's limit is kept by Prefect as a global limit of this name.
_PREFIX = "tag:"
_PAGE = 200

_is_temporary: ContextVar[bool] = ContextVar("container_manager_temporary_server", default=False)


class LaunchSlots(Frozen):
    """Prefect's limit on launch tasks and how many of them are taken; None: no limit."""

    limit: int | None = None
    taken: int = 0

    @property
    def is_full(self) -> bool:
        return self.limit is not None and self.taken >= self.limit

    def __str__(self) -> str:
        return f"limit reached: tag {LAUNCH_TAG}, {self.taken} of {self.limit}"


@contextmanager
def on_temporary_server() -> Iterator[None]:
    """Within, the server is one of this process: nobody sets limits there, so the last ones read hold."""
    token = _is_temporary.set(True)
    try:
        yield
    finally:
        _is_temporary.reset(token)


def read() -> tuple[Limits | None, LaunchSlots]:
    """The limits as they are now, in one call. None, and no limit on launches, if the server can't say."""
    try:
        with get_client(sync_client=True) as client:
            rows = {row.name.removeprefix(_PREFIX): row for row in _tag_limits(client) if row.active}
            slots = _launch_slots(client, rows.get(LAUNCH_TAG))
            is_temporary = _is_temporary.get() or client.server_type is ServerType.EPHEMERAL
    except httpx.HTTPError as e:
        logger.warning("the limits of Prefect's tags can't be read, the last ones hold: %s", e)
        return None, LaunchSlots()
    limits = Limits(
        total=rows[JOB_TAG].limit if JOB_TAG in rows else None,
        hosts={
            name.removeprefix(HOST_TAG_PREFIX): row.limit
            for name, row in rows.items()
            if name.startswith(HOST_TAG_PREFIX)
        },
    )
    return None if is_temporary else limits, slots


def refresh() -> LaunchSlots:
    """Read the limits and keep them for the claim; the slots for launch tasks."""
    now, slots = read()
    if now is not None:
        queue_manager.keep_limits(now)
    return slots


def create_missing(wanted: dict[str, int], *, reset: bool = False) -> dict[str, int]:
    """Create the limits of these tags that do not exist; with `reset`, set the others, too. What was written."""
    with get_client(sync_client=True) as client:
        present = {row.name.removeprefix(_PREFIX) for row in _tag_limits(client)}
        written = {tag: limit for tag, limit in wanted.items() if reset or tag not in present}
        for tag, limit in written.items():
            client.upsert_global_concurrency_limit_by_name(_PREFIX + tag, limit)
    return written


def _tag_limits(client: SyncPrefectClient) -> Iterator[GlobalConcurrencyLimitResponse]:
    offset = 0
    while True:
        page = client.read_global_concurrency_limits(limit=_PAGE, offset=offset)
        yield from (row for row in page if row.name.startswith(_PREFIX))
        if len(page) < _PAGE:
            return
        offset += _PAGE


def _launch_slots(client: SyncPrefectClient, row: GlobalConcurrencyLimitResponse | None) -> LaunchSlots:
    if row is None:
        return LaunchSlots()
    slots = LaunchSlots(limit=row.limit, taken=row.active_slots)
    if not slots.is_full or not slots.taken:
        return slots
    # A task run that was killed, or whose server was restarted, may hold a slot for good.
    try:
        holders = client.read_concurrency_limit_by_tag(LAUNCH_TAG).active_slots
    except ObjectNotFound:
        # Somebody has just removed it.
        return LaunchSlots()
    held = sum(_is_in_flight(client, task_run_id) for task_run_id in holders)
    if held < slots.taken:
        logger.warning("tag %s: freed %d slots of task runs that have ended", LAUNCH_TAG, slots.taken - held)
        client.update_global_concurrency_limit(row.name, GlobalConcurrencyLimitUpdate(active_slots=held))
    return LaunchSlots(limit=row.limit, taken=held)


def _is_in_flight(client: SyncPrefectClient, task_run_id: object) -> bool:
    try:
        task_run = client.read_task_run(task_run_id)  # type: ignore[arg-type]
    except ObjectNotFound:
        # Its record may come later than its slot.
        return True
    return task_run.state is None or not task_run.state.is_final()
