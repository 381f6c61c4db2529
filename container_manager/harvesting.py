"""To harvest: what an ended container left is read, written down, and only then removed."""

import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from django.db.models.functions import Now

from . import secret_values
from .attempts import GONE, AttemptRecord, cancel_if_asked, charge, end_attempt, end_lost
from .conf import get_settings
from .engine import Stream
from .exceptions import ContainerGone, EngineError, HostMisconfigured, HostUnavailable
from .hosts import HostConnection
from .interruptions import Interruption, interruption, is_suspect
from .logs import BoundedLog
from .models import ContainerJob, DockerHost, Reason, Status
from .observing import HostView, ObservedJob, View
from .steps import Procedure, Steps, drive
from .transitions import amend
from .types import Daemon, EndedJob, Observation

logger = logging.getLogger(__name__)

#: Running jobs of one host whose containers vanish at once: rather its data root was changed than each removed.
HELD_TOGETHER = 3
#: What a container shows that was killed, by whomever.
_KILLED = 137
_RESTARTED = "; its Engine was restarted before anyone looked, which may be why"
_HINTS = {126: ": its command is not executable", 127: ": its command was not found"}
_KNOWN_STATES = ("running", "exited", "dead", "removing")

#: A view stands for a job of that host that is held.
_Outcome = EndedJob | HostView | None
_Gone = TypeVar("_Gone")


def harvest(view: View, is_stopping: Callable[[], bool] = lambda: False) -> tuple[list[EndedJob], list[str]]:
    """Harvest what has ended: the jobs whose attempts ended, and what a person should look at."""
    anomalies: list[str] = []
    procedures: list[tuple[Steps[_Outcome], HostConnection]] = []
    for job, host in view.jobs():
        if job.row.status != Status.RUNNING:
            continue
        container = host.containers.get(job.row.container_id or "")
        if container is None or container.has_ended or container.id in view.named_ids:
            steps = _harvest(job.row, host.connection, partial(_judge_missing, job, host))
            procedures.append((steps, host.connection))
        elif job.row.missing_at is not None:
            amend(job.row, missing_at=None)
        elif container.state not in _KNOWN_STATES:
            anomalies.append(f"job {job.row.pk}: its container is {container.state}; left as it is")
    outcomes = list(drive(procedures, is_stopping))
    ended = [outcome for outcome in outcomes if isinstance(outcome, EndedJob)]
    held = Counter(outcome.connection.host.name for outcome in outcomes if isinstance(outcome, HostView))
    seconds = get_settings().HOST_GRACE_SECONDS
    for name, count in held.items():
        anomalies.append(f"host {name}: the containers of {count} jobs vanished at once; held for {seconds:g} s")
    return ended, anomalies


def harvest_ended(
    container_ids: Collection[str], connections: Mapping[int, HostConnection]
) -> dict[str, Procedure[EndedJob | None]]:
    """By container: procedures that harvest the running jobs among these. One that is gone is left to a round."""
    running = ContainerJob.objects.filter(status=Status.RUNNING, slot_host__in=list(connections))
    procedures: dict[str, Procedure[EndedJob | None]] = {}
    for job in running.filter(container_id__in=list(container_ids)):
        connection = connections[job.slot_host_id or 0]
        procedures[job.container_id or ""] = (_harvest(job, connection, lambda: None), connection)
    return procedures


def _harvest(
    job: ContainerJob, connection: HostConnection, if_gone: Callable[[], _Gone]
) -> Steps[EndedJob | _Gone | None]:
    engine, container_id = connection.engine, job.container_id or ""
    try:
        seen: Observation = yield partial(engine.inspect, container_id)
        if not seen.has_ended:
            if job.missing_at is not None:
                amend(job, missing_at=None)
            return None
        secrets = secret_values.given(job.secret_environment, seen)
        stdout = yield from _read(connection, container_id, "stdout", secrets)
        stderr = yield from _read(connection, container_id, "stderr", secrets)
        if seen.exit_code == _KILLED and not seen.oom_killed:
            # The Engine may learn that memory was the reason a moment after the exit itself.
            with suppress(ContainerGone):
                seen = yield partial(engine.inspect, container_id)
        daemon: Daemon | None = (yield engine.daemon) if is_suspect(job, seen) else None
    except ContainerGone:
        return if_gone()
    except EngineError as e:
        logger.warning("%s: not harvested yet: %s", job.on(connection.host), e, extra=job.log_extra(connection.host))
        return None

    cut_off = interruption(seen, daemon, connection.host) if daemon else Interruption.NONE
    status, record = _end(job, connection.host, _Remains(seen, cut_off, stdout, stderr))
    if status is None:
        # Another pass has harvested it, or a person has moved the row.
        return None
    if status != Status.FAILED or not get_settings().KEEP_FAILED_CONTAINERS_SECONDS:
        try:
            yield partial(engine.remove, container_id)
        except EngineError as e:
            # Its record is saved; a later pass collects it.
            logger.info("%s: %s", job.on(connection.host), e, extra=job.log_extra(connection.host))
    return _ended(job, connection.host, status, record)


def _read(connection: HostConnection, container_id: str, stream: Stream, secrets: Mapping[str, str]) -> Steps[str]:
    """Logs are best effort: an exit code is never given up for them. The job's secrets are stars in them."""
    settings = get_settings()
    log = BoundedLog(settings.LOG_HEAD_BYTES, settings.LOG_TAIL_BYTES)
    try:
        yield partial(connection.engine.read_log, container_id, stream, log, settings.LOG_SECONDS)
    except (HostUnavailable, HostMisconfigured):
        raise
    except EngineError as e:
        # Also that it is gone by now: it was seen ended.
        log.cut_short(f"unavailable: {e}")
    # A cut may go through a secret, half of which would be left.
    return secret_values.masked(log.text(whole_lines=bool(secrets)), secrets)


@dataclass(frozen=True)
class _Remains:
    """What an ended container left."""

    seen: Observation
    cut_off: Interruption
    stdout: str
    stderr: str


def _reason(job: ContainerJob, remains: _Remains) -> Reason:
    if job.stop_requested_at is not None:
        return Reason(job.stop_reason)
    if remains.seen.exit_code and remains.seen.oom_killed:
        return Reason.OOM
    return Reason.HOST_INTERRUPTED if remains.cut_off is Interruption.CERTAIN else Reason.EXIT_CODE


def _sentence(job: ContainerJob, remains: _Remains, reason: Reason) -> str:
    code = remains.seen.exit_code or 0
    match reason:
        case Reason.TIMEOUT:
            return f"stopped after its timeout of {job.timeout_seconds} s"
        case Reason.CANCELLED:
            return "cancelled while it ran"
        case Reason.OOM:
            limit = f" of {job.memory_limit_mib} MiB" if job.memory_limit_mib else ""
            return f"killed: it needed more memory than its limit{limit}"
        case Reason.HOST_INTERRUPTED:
            return f"its Engine went down while it ran (exit code {code})"
        case _:
            hint = _RESTARTED if remains.cut_off is Interruption.POSSIBLE else _HINTS.get(code, "")
            return f"exited with code {code}{hint}" if code else ""


def _end(job: ContainerJob, host: DockerHost, remains: _Remains) -> tuple[Status | None, AttemptRecord]:
    """Write the record. None: the row belongs to another by now."""
    reason = _reason(job, remains)
    sentence = _sentence(job, remains, reason)
    record = AttemptRecord(reason, sentence, remains.seen, remains.stdout, remains.stderr)
    # Another pass may have noted, since the row was read, that it stops the job: then that is why it ended.
    if_null = "" if job.stop_requested_at else "stop_requested_at"
    status = _end_as(job, host, record, remains.cut_off, if_null=if_null)
    if status is None and if_null:
        noted = ContainerJob.objects.filter(pk=job.pk, stop_requested_at__isnull=False)
        stop = noted.values_list("stop_requested_at", "stop_reason").first()
        if stop:
            job.stop_requested_at, job.stop_reason = stop
            return _end(job, host, remains)
    return status or cancel_if_asked(job, host, record), record


def _end_as(
    job: ContainerJob, host: DockerHost, record: AttemptRecord, cut_off: Interruption, **fields: Any
) -> Status | None:
    exit_code = record.observation.exit_code if record.observation else None
    if record.reason == Reason.CANCELLED:
        to = Status.CANCELLED
    elif exit_code == 0 and record.reason == Reason.EXIT_CODE:
        to = Status.COMPLETED
    elif _is_retried(job, exit_code, record.reason, cut_off):
        return charge(job, host, record, **fields)
    else:
        to = Status.FAILED
    return to if end_attempt(job, to, host, record, **fields) else None


def _is_retried(job: ContainerJob, exit_code: int | None, reason: Reason, cut_off: Interruption) -> bool:
    if reason == Reason.HOST_INTERRUPTED:
        # It may have done its work: only a job that says so is run again.
        return job.rerun_on_lost
    if reason == Reason.EXIT_CODE and cut_off is Interruption.POSSIBLE and job.rerun_on_lost:
        return True
    return reason in (Reason.EXIT_CODE, Reason.OOM) and exit_code in job.retry_exit_codes


def _judge_missing(observed: ObservedJob, view: HostView) -> _Outcome:
    """Its container is gone, confirmed by a look at its id. One is lost; many at once a mounted disk may bring back."""
    job = observed.row
    if view.vanished >= HELD_TOGETHER and not observed.is_given_up:
        if job.missing_at is None:
            amend(job, missing_at=Now())
        return view
    status = end_lost(job, view.connection.host, GONE)
    if status is None:
        return None
    reason = Reason.CANCELLED if status == Status.CANCELLED else Reason.LOST
    return _ended(job, view.connection.host, status, AttemptRecord(reason, GONE))


def _ended(job: ContainerJob, host: DockerHost, status: Status, record: AttemptRecord) -> EndedJob:
    # The row has the last word: a retry that was cancelled has no longer the record's reason.
    reason = job.reason or record.reason
    why = job.last_error or reason
    logger.info("%s: %s (%s)", job.on(host), status, why, extra=job.log_extra(host))
    return EndedJob(
        job_id=job.pk,
        attempt=job.attempt,
        status=status,
        reason=reason,
        exit_code=record.observation.exit_code if record.observation else None,
        error=job.last_error,
    )
