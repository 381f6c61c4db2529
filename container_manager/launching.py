"""From a claim to running containers: create, record, start, record."""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from django.core.exceptions import ValidationError
from django.db.models.functions import Now
from django.db.utils import Error as DatabaseError

from . import secret_values
from .attempts import (
    AttemptRecord,
    cancel_if_asked,
    discard_unstarted,
    end_attempt,
    hand_back,
    is_cancel_requested,
    retry_or_fail,
)
from .conf import get_settings
from .containers import ATTEMPT_LABEL, INSTANCE_LABEL, JOB_LABEL, NOT_EXECUTABLE, TOKEN_LABEL, container_name
from .exceptions import (
    ContainerManagerError,
    EngineError,
    HostMisconfigured,
    HostUnavailable,
    ImageMissing,
    LeaseExpired,
    NameTaken,
    OutcomeUnknown,
    RequestRefused,
    ShuttingDown,
)
from .hosts import HostConnection
from .leases import Lease
from .models import ContainerJob, Reason, Status
from .policy import describe
from .pulling import Pulls
from .retry import Verdict, verdict_on
from .steps import Call, Procedure, Steps
from .transitions import from_now, move
from .types import BatchResult, JobError, JobSpec, Observation

logger = logging.getLogger(__name__)

_HOST_FAULTS = (HostUnavailable, HostMisconfigured, OutcomeUnknown)


def launches(
    jobs: list[ContainerJob],
    lease: Lease,
    connections: Mapping[int, HostConnection],
    pulls: Pulls,
    instance_id: str,
    is_stopping: Callable[[], bool],
) -> Iterator[Procedure[BatchResult]]:
    """Procedures that launch claimed jobs, each on the host whose slot it holds. A job's error is in the result."""
    for job in jobs:
        assert job.slot_host_id is not None  # noqa: S101 (the database's constraint, for the type checker)
        connection = connections[job.slot_host_id]
        yield _Launch(job, connection, lease, pulls, instance_id, is_stopping).steps(), connection


@dataclass
class _Launch:
    job: ContainerJob
    connection: HostConnection
    lease: Lease
    pulls: Pulls
    instance_id: str
    is_stopping: Callable[[], bool]
    #: Variable -> value; no message may hold one.
    secrets: Mapping[str, str] = field(default_factory=dict)

    def steps(self) -> Steps[BatchResult]:
        """What became of the job. A database that fails leaves the row to recovery, and the others alone."""
        try:
            return (yield from self._steps())
        except DatabaseError as e:
            return self._report(None, f"the database failed: {e}")

    def _steps(self) -> Steps[BatchResult]:
        job = self.job
        try:
            spec = job.validated_spec()
        except ValidationError as e:
            return self._fail(f"not allowed: {describe(e)}")
        if job.pull_error:
            record = AttemptRecord(Reason.LAUNCH, job.pull_error)
            return self._report(retry_or_fail(job, self.connection.host, record), job.pull_error)
        if spec.pull_policy == "always" and job.pulled_host_id != self.connection.host.pk:
            return self._hold()
        try:
            container_id = yield from self._create(spec)
        except NameTaken as e:
            own_id = yield from self._own_container()
            if own_id is None:
                return self._report(None, str(e))
            container_id = own_id
        except ContainerManagerError as e:
            return self._after_create(e)
        if not move(job, Status.STARTING, container_id=container_id, deadline_at=from_now(job.timeout_seconds)):
            return (yield from self._withdraw(container_id))
        try:
            yield self.lease.guard(partial(self.connection.engine.start, container_id))
        except ContainerManagerError as e:
            return (yield from self._after_start(e, container_id))
        return self._record_start()

    def _create(self, spec: JobSpec) -> Steps[str]:
        if spec.secret_environment:
            self.secrets = yield self._unless_stopping(partial(secret_values.resolve, spec.secret_environment))
        create = partial(
            self.connection.engine.create,
            container_name(self.instance_id, self.job.pk, self.job.attempt),
            _bounded(spec),
            environment=self._environment(spec),
            labels=self._labels(spec),
            hardening=self.connection.host.hardening,
        )
        container_id: str = yield self._unless_stopping(self.lease.guard(create))
        return container_id

    def _labels(self, spec: JobSpec) -> dict[str, str]:
        return spec.labels | {
            INSTANCE_LABEL: self.instance_id,
            JOB_LABEL: str(self.job.pk),
            ATTEMPT_LABEL: str(self.job.attempt),
            TOKEN_LABEL: self.job.claim_token,
        }

    def _environment(self, spec: JobSpec) -> dict[str, str]:
        own = {"CM_JOB_ID": str(self.job.pk), "CM_ATTEMPT": str(self.job.attempt)}
        return {**spec.environment, **self.secrets, **own}

    def _unless_stopping(self, call: Call) -> Call:
        def checked() -> Any:
            if self.is_stopping():
                raise ShuttingDown
            return call()

        return checked

    def _own_container(self) -> Steps[str | None]:
        """The container that has the name, if this very claim created it and nobody started it."""
        name = container_name(self.instance_id, self.job.pk, self.job.attempt)
        try:
            seen: Observation = yield lambda: self.connection.engine.inspect(name)
        except EngineError:
            return None
        return seen.container_id if seen.token == self.job.claim_token and not seen.has_run else None

    def _after_create(self, error: ContainerManagerError) -> BatchResult:
        job, host = self.job, self.connection.host
        if isinstance(error, ImageMissing):
            if job.pull_policy == "never":
                return self._fail(f"host {host.name} does not have the image {job.image}, and pull_policy is never")
            return self._hold()
        match verdict_on(error):
            case Verdict.HAND_BACK:
                return self._report(hand_back(job, host, self._masked(str(error)), is_counted=False))
            case Verdict.RETRY:
                return self._retry(error)
            case Verdict.FAIL:
                return self._fail(f"host {host.name} refused it: {error}; queue a corrected job")
            case Verdict.LEAVE | Verdict.DROP:
                return self._report(None, str(error))

    def _after_start(self, error: ContainerManagerError, container_id: str) -> Steps[BatchResult]:
        job, host, engine = self.job, self.connection.host, self.connection.engine
        if isinstance(error, (*_HOST_FAULTS, LeaseExpired)):
            # From here on the container may run: recovery finds out.
            return self._report(None, str(error))
        try:
            seen: Observation = yield partial(engine.inspect, container_id)
        except EngineError:
            return self._report(None, str(error))
        if seen.has_run:
            return self._record_start()
        if isinstance(error, RequestRefused) or seen.exit_code in NOT_EXECUTABLE:
            report = self._fail(seen.error or str(error), seen)
            if report.failed_ids:
                yield from self._remove(container_id)
            return report
        if not move(job, Status.RECOVERING):
            return self._report(None, str(error))
        try:
            ran = yield from discard_unstarted(engine, container_id, self.lease.guard)
        except (EngineError, LeaseExpired) as e:
            return self._report(None, str(e))
        if ran is not None:
            return self._record_start()
        record = AttemptRecord(Reason.LAUNCH, self._masked(seen.error or str(error)), seen)
        return self._report(retry_or_fail(job, host, record), record.error)

    def _withdraw(self, container_id: str) -> Steps[BatchResult]:
        """The row would not take the container. If only because the job is cancelled, end it so."""
        if not is_cancel_requested(self.job):
            return self._report(None)
        try:
            yield from discard_unstarted(self.connection.engine, container_id, self.lease.guard)
        except (EngineError, LeaseExpired):
            return self._report(None)
        return self._report(cancel_if_asked(self.job, self.connection.host))

    def _remove(self, container_id: str) -> Steps[None]:
        try:
            yield partial(self.connection.engine.remove, container_id)
        except EngineError as e:
            # A later pass collects it.
            logger.info("%s: %s", self._name(), e, extra=self._extra())

    def _record_start(self) -> BatchResult:
        job = self.job
        timeout = from_now(job.timeout_seconds)
        if not move(job, Status.RUNNING, launched_at=Now(), deadline_at=timeout, launch_tries=0, last_error=""):
            return self._report(None)
        logger.info("%s: launched", self._name(), extra=self._extra())
        return BatchResult(launched=1, job_ids=(job.pk,))

    def _hold(self) -> BatchResult:
        return self._report(self.pulls.hold(self.job, self.connection))

    def _retry(self, error: ContainerManagerError) -> BatchResult:
        record = AttemptRecord(Reason.LAUNCH, self._masked(str(error)))
        return self._report(retry_or_fail(self.job, self.connection.host, record), record.error)

    def _fail(self, why: str, seen: Observation | None = None) -> BatchResult:
        record = AttemptRecord(Reason.LAUNCH, self._masked(why), seen)
        has_ended = end_attempt(self.job, Status.FAILED, self.connection.host, record)
        return self._report(Status.FAILED if has_ended else None, record.error)

    def _report(self, to: Status | None, error: str = "") -> BatchResult:
        """What became of a job that does not run: None means that its row was left as it is."""
        job = self.job
        errors = (JobError(job_id=job.pk, error=self._masked(error)),) if error else ()
        if errors:
            logger.warning("%s: %s", self._name(), errors[0].error, extra=self._extra())
        return BatchResult(
            errors=errors,
            failed_ids=(job.pk,) if to == Status.FAILED else (),
            handed_back=int(not error and to in (Status.QUEUED, Status.SCHEDULED)),
        )

    def _masked(self, text: str) -> str:
        return secret_values.masked(text, self.secrets)

    def _name(self) -> str:
        return self.job.on(self.connection.host)

    def _extra(self) -> dict[str, Any]:
        return self.job.log_extra(self.connection.host)


def _bounded(spec: JobSpec) -> JobSpec:
    """A job that names no limit gets the greatest that is allowed."""
    settings = get_settings()
    return spec.model_copy(
        update={
            "memory_limit_mib": spec.memory_limit_mib or settings.MAX_MEMORY_MIB,
            "cpu_limit": spec.cpu_limit or settings.MAX_CPUS,
        }
    )
