"""What running jobs write, for the pages that show it: read by passes, while somebody looks."""

import logging
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass, field

from django.db.models import F
from django.db.models.functions import Now
from django.db.utils import Error as DatabaseError

from . import secret_values
from .engine import Engine, Stream
from .exceptions import EngineError
from .following import STREAMS
from .hosts import HostConnection
from .logs import BoundedLog
from .models import ContainerJob, WatchedLog
from .transitions import from_now

logger = logging.getLogger(__name__)

#: seconds; for how long one look at a page asks for a log.
WANTED_SECONDS = 30
#: bytes and lines of each stream, its end.
END_BYTES, END_LINES = 32 * 1024, 500
#: seconds; of one stream, in a thread that nothing waits for.
_READ_SECONDS = 2.0
#: seconds; how long a round waits for what it has begun to read. What comes later is written by the next one.
_ROUND_SECONDS = 0.5
#: Logs that are read in one round; those that were read longest ago first.
_MOST = 20
#: seconds; after which one is given up: it may have been begun before a fork.
_LOST_SECONDS = 60.0


def want(job_id: int) -> None:
    """Let the passes read the log of a job, as long as it runs, for the next half minute. One statement."""
    WatchedLog.objects.bulk_create(
        [WatchedLog(job_id=job_id, wanted_until=from_now(WANTED_SECONDS))],
        update_conflicts=True,
        unique_fields=["job"],
        update_fields=["wanted_until"],
    )


@dataclass(frozen=True)
class _Read:
    """The end of both streams of one attempt, on its way."""

    attempt: int
    ends: "Future[dict[Stream, str]]" = field(default_factory=Future)
    began: float = field(default_factory=time.monotonic)

    def run(self, engine: Engine, container_id: str, references: Mapping[str, str]) -> None:
        try:
            self.ends.set_result(_ends(engine, container_id, references))
        except Exception as e:  # noqa: BLE001 (told on the page, whatever it is: nobody waits for this thread)
            self.ends.set_exception(e)

    @property
    def is_lost(self) -> bool:
        return time.monotonic() - self.began > _LOST_SECONDS


class LogWatches:
    """The logs that this process reads for pages. To be used in one thread at a time."""

    def __init__(self) -> None:
        #: By job.
        self._reads: dict[int, _Read] = {}

    def serve(self, connections: Mapping[int, HostConnection]) -> None:
        """Read what is wanted of the running jobs of these hosts. One query if nothing is.

        Waits half a second at most, whatever the Engines do. What fails there, or in the database, is not raised.
        """
        try:
            wanted = _wanted()
            if wanted:
                wait([read.ends for read in self._begin(wanted, connections)], timeout=_ROUND_SECONDS)
            self._write()
        except DatabaseError as e:
            # What the round did is told in any case; the next one meets the error again.
            logger.info("no log was written for a page: %s", e)

    def _begin(self, wanted: list[int], connections: Mapping[int, HostConnection]) -> list[_Read]:
        """One that has hung since an earlier round is not begun again."""
        begun: list[_Read] = []
        running = ContainerJob.objects.running().filter(pk__in=wanted, slot_host__in=list(connections))
        jobs = {job.pk: job for job in running.only("attempt", "container_id", "slot_host_id", "secret_environment")}
        for job_id in [job_id for job_id in wanted if job_id in jobs and job_id not in self._reads][:_MOST]:
            job = jobs[job_id]
            read = self._reads[job_id] = _Read(job.attempt)
            begun.append(read)
            what = (connections[job.slot_host_id or 0].engine, job.container_id or "", job.secret_environment)
            # A thread of its own: those of the host are for what must not wait.
            thread = threading.Thread(target=read.run, args=what, daemon=True)
            try:
                thread.start()
            except RuntimeError as e:
                # No more threads are allowed here. Told on the page, as what fails in one is.
                read.ends.set_exception(e)
        return begun

    def _write(self) -> None:
        for job_id, read in list(self._reads.items()):
            if not read.ends.done():
                if read.is_lost:
                    self._reads.pop(job_id, None)
                continue
            self._reads.pop(job_id, None)
            error = read.ends.exception()
            told: dict[Stream, str] = {} if error else read.ends.result()
            why = str(error) if isinstance(error, EngineError) else type(error).__name__ if error else ""
            WatchedLog.objects.filter(job_id=job_id).update(
                attempt=read.attempt,
                read_at=Now(),
                error=why,
                stdout=told.get("stdout", ""),
                stderr=told.get("stderr", ""),
            )


def _wanted() -> list[int]:
    """The jobs whose logs are wanted, the one that was read longest ago first. The other rows are removed."""
    rows = WatchedLog.objects.order_by(F("read_at").asc(nulls_first=True)).annotate(at=Now())
    looked_at = list(rows.values_list("job_id", "wanted_until", "at"))
    unwanted = [job_id for job_id, wanted_until, at in looked_at if wanted_until < at]
    if unwanted:
        WatchedLog.objects.filter(pk__in=unwanted, wanted_until__lt=Now()).delete()
    return [job_id for job_id, wanted_until, at in looked_at if wanted_until >= at]


def _ends(engine: Engine, container_id: str, references: Mapping[str, str]) -> dict[Stream, str]:
    secrets = secret_values.given(references, engine.inspect(container_id)) if references else {}
    return {stream: secret_values.masked(_end(engine, container_id, stream), secrets) for stream in STREAMS}


def _end(engine: Engine, container_id: str, stream: Stream) -> str:
    log = BoundedLog(0, END_BYTES)
    engine.read_end(container_id, stream, log, END_LINES, _READ_SECONDS)
    return log.end()
