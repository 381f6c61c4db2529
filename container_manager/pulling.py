"""Pulls: never inside a claim. The job waits in `scheduled`, is held there while its image comes, then told."""

import logging
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from django.db.models.functions import Now

from .attempts import hand_back
from .conf import get_settings
from .exceptions import EngineError, HostMisconfigured, HostUnavailable
from .hosts import HostConnection
from .models import ContainerJob, Status
from .transitions import from_now

logger = logging.getLogger(__name__)

#: seconds; a job is held this far ahead, so that it is free again soon after its puller died, …
HOLD_SECONDS = 30
#: … and for as long as the pull takes while this process lives.
RENEW_SECONDS = 10
#: seconds; between two looks at whether a pull has ended.
LOOK_SECONDS = 0.2


@dataclass
class _Pull:
    """One pull of one image by one host's Engine, and the jobs (id -> token) that wait for it."""

    host_id: int
    #: For people.
    what: str
    waiting: dict[int, str] = field(default_factory=dict)
    renew_at: float = field(default_factory=lambda: time.monotonic() + RENEW_SECONDS)
    error: EngineError | None = None
    has_ended: bool = False

    def run(self, connection: HostConnection, image: str, seconds: float) -> None:
        try:
            connection.engine.pull(image, seconds)
        except EngineError as e:
            self.error = e
        finally:
            self.has_ended = True


class Pulls:
    """The pulls of this process: one at a time per host and image. Truthy while any is under way."""

    def __init__(self) -> None:
        self._pulls: dict[tuple[int, str], _Pull] = {}

    def __bool__(self) -> bool:
        return bool(self._pulls)

    def hold(self, job: ContainerJob, connection: HostConnection) -> Status | None:
        """Let a claimed job wait for its image. What became of its row, as `hand_back` says it."""
        host = connection.host
        why = f"waiting for host {host.name} to pull {job.image}"
        # A job whose image was pulled and is missing again (or was dealt to another host) counts its tries.
        charged = job.retry_count
        to = hand_back(job, host, why, is_counted=job.pulled_host_id is not None, hold_seconds=HOLD_SECONDS)
        if to == Status.SCHEDULED and job.retry_count == charged:
            self._start(job, connection)
        return to

    def settle(self) -> bool:
        """Hold those that wait a little longer; tell those whose pull has ended. To be called every few seconds.

        True: some job was told.
        """
        has_told = False
        for key, pull in list(self._pulls.items()):
            if pull.has_ended:
                del self._pulls[key]
                self._tell(pull)
                has_told = True
            elif time.monotonic() >= pull.renew_at:
                pull.renew_at = time.monotonic() + RENEW_SECONDS
                _write(pull.waiting, scheduled_for=from_now(HOLD_SECONDS))
        return has_told

    def _start(self, job: ContainerJob, connection: HostConnection) -> None:
        key = (connection.host.pk, job.image)
        pull = self._pulls.get(key)
        if pull is None:
            pull = self._pulls[key] = _Pull(connection.host.pk, f"image {job.image} on host {connection.host.name}")
            logger.info("%s: pulling %s", job.on(connection.host), job.image, extra=job.log_extra(connection.host))
            # Daemon: a pull can't be interrupted, and must not keep the process from ending.
            threading.Thread(
                target=pull.run,
                args=(connection, job.image, get_settings().PULL_SECONDS),
                name=f"pull-{connection.host.name}",
                daemon=True,
            ).start()
        pull.waiting[job.pk] = job.claim_token

    def _tell(self, pull: _Pull) -> None:
        if isinstance(pull.error, HostUnavailable | HostMisconfigured):
            # The host is at fault; the job is free for another.
            _write(pull.waiting, scheduled_for=Now())
            return
        pull_error = f"{pull.error} ({pull.what})" if pull.error else ""
        _write(pull.waiting, scheduled_for=Now(), pulled_host=pull.host_id, pull_error=pull_error)


def _write(waiting: dict[int, str], **fields: Any) -> None:
    """Compare-and-set of each job that is still held: neither cancelled, nor sent on its way by a person."""
    for job_id, token in waiting.items():
        ContainerJob.objects.filter(pk=job_id, status=Status.SCHEDULED, claim_token=token).update(**fields)
