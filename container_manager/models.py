"""The rows. A row is the record: what Docker and Prefect say is compared with it, never the other way round."""

import secrets
from collections.abc import Mapping
from datetime import datetime
from typing import Any, ClassVar, Self

from django.core.exceptions import ValidationError
from django.db import models, transaction
from django.db.models import Exists, F, OuterRef, Q
from django.db.models.functions import Now

from .conf import get_settings
from .exceptions import QueueIsNewer
from .policy import validate_address, validate_job
from .types import (
    PRIORITY_HIGH,
    PRIORITY_LOW,
    PRIORITY_NORMAL,
    DeploymentRecord,
    EngineAddress,
    Hardening,
    JobSpec,
    Limits,
    Registration,
)

#: Raised, by a migration too, when this version must not work on a queue beside an older one.
PROTOCOL = 1


class Status(models.TextChoices):
    PENDING = "pending"
    SCHEDULED = "scheduled"
    QUEUED = "queued"
    LAUNCHING = "launching"
    STARTING = "starting"
    RECOVERING = "recovering"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


#: A job in one of these holds a slot of a host.
ALIVE = (Status.LAUNCHING, Status.STARTING, Status.RECOVERING, Status.RUNNING)
#: A job in one of these belongs to one process until the lease is over.
LEASED = (Status.LAUNCHING, Status.STARTING, Status.RECOVERING)
#: A job in one of these has no container that is known to run, and may get one.
WAITING = (Status.PENDING, Status.SCHEDULED, Status.QUEUED, *LEASED)
ENDED = (Status.COMPLETED, Status.FAILED, Status.CANCELLED)


class Reason(models.TextChoices):
    """Why an attempt ended as it did."""

    EXIT_CODE = "exit_code"
    OOM = "oom", "out of memory"
    TIMEOUT = "timeout"
    LAUNCH = "launch"
    LOST = "lost"
    HOST_INTERRUPTED = "host_interrupted"
    CANCELLED = "cancelled"


class PullPolicy(models.TextChoices):
    MISSING = "missing"
    ALWAYS = "always"
    NEVER = "never"


def _instance_id() -> str:
    return secrets.token_hex(4)


class Installation(models.Model):
    """The one row that stands for this queue. Its lock is the claim's lock."""

    #: In the name and labels of every container, so that two installations can share an Engine.
    instance_id = models.CharField(max_length=16, default=_instance_id, editable=False)
    protocol = models.PositiveIntegerField(default=PROTOCOL, editable=False)
    work_token = models.CharField(max_length=32, blank=True, editable=False)
    work_until = models.DateTimeField(null=True, blank=True, editable=False)
    #: The limits of the Prefect tags as last read; `types.Limits` as JSON.
    limits = models.JSONField(default=dict, editable=False)
    #: The values last written to Prefect servers; `types.Registration` as JSON. The column has a default because
    #: processes of the previous version insert rows without it.
    registered = models.JSONField(default=dict, db_default={}, editable=False)

    class Meta:
        constraints = [models.CheckConstraint(condition=Q(pk=1), name="cm_installation_single")]

    def __str__(self) -> str:
        return self.instance_id

    @classmethod
    def load(cls) -> "Installation":
        """Raises `QueueIsNewer` if the queue was worked on by a version whose rules this one does not know."""
        installation, _ = cls.objects.get_or_create(pk=1)
        return installation._checked()

    @classmethod
    def locked(cls) -> "Installation":
        """As `load`, and the claim's lock until the transaction ends."""
        rows = cls.objects.select_for_update(no_key=True)
        installation = rows.filter(pk=1).first() or rows.get(pk=cls.load().pk)
        return installation._checked()

    @classmethod
    def now(cls) -> datetime:
        """The moment by the database's clock, the only one that all processes share."""
        moment: datetime = cls.objects.annotate(now=Now()).values_list("now", flat=True).get(pk=cls.load().pk)
        return moment

    def _checked(self) -> "Installation":
        if self.protocol > PROTOCOL:
            raise QueueIsNewer
        return self

    @property
    def tag_limits(self) -> Limits:
        return Limits.model_validate(self.limits)

    @property
    def registration(self) -> Registration:
        return Registration.model_validate(self.registered)

    @classmethod
    def keep_registration(
        cls, *, deployments: Mapping[str, DeploymentRecord] | None = None, limits: Mapping[str, int] | None = None
    ) -> None:
        """Add to the record of what was written to Prefect servers."""
        with transaction.atomic():
            installation = cls.locked()
            known = installation.registration
            installation.registered = Registration(
                deployments={**known.deployments, **(deployments or {})}, limits={**known.limits, **(limits or {})}
            ).model_dump(mode="json")
            installation.save(update_fields=["registered"])


class DockerHostQuerySet(models.QuerySet["DockerHost"]):
    def active(self) -> Self:
        return self.filter(is_active=True)

    def in_use(self) -> Self:
        """Hosts that a pass has work with: those it may launch on, and drained ones that still run jobs."""
        alive = ContainerJob.objects.filter(slot_host=OuterRef("pk"))
        return self.filter(Q(is_active=True) | Exists(alive)).order_by("pk")


class DockerHost(models.Model):
    """One Docker Engine."""

    name = models.SlugField(max_length=64, unique=True)
    base_url = models.CharField(max_length=255, default="unix:///var/run/docker.sock")
    tls_ca_path = models.CharField(max_length=255, blank=True)
    tls_cert_path = models.CharField(max_length=255, blank=True)
    tls_key_path = models.CharField(max_length=255, blank=True)
    is_active = models.BooleanField(default=True, help_text="Off: nothing is launched; running jobs are harvested.")
    max_concurrent_jobs = models.PositiveIntegerField(default=10)
    cap_drop_all = models.BooleanField(default=False, help_text="Drop all capabilities of every container.")
    engine_id = models.CharField(
        max_length=255,
        blank=True,
        help_text="Set at first contact. An action of the list of hosts accepts another Engine at this address.",
    )
    last_seen_at = models.DateTimeField(null=True, blank=True, editable=False)
    #: When a pass last found that it had gone down: tells a job that ended with its Engine from one that was killed.
    last_down_at = models.DateTimeField(null=True, blank=True, editable=False)
    last_error = models.TextField(blank=True, editable=False)

    objects = DockerHostQuerySet.as_manager()

    class Meta:
        verbose_name = "Docker host"
        ordering = ["name"]

    def __str__(self) -> str:
        return self.name

    def clean(self) -> None:
        validate_address(self.address)

    @property
    def address(self) -> EngineAddress:
        return EngineAddress(
            base_url=self.base_url,
            tls_ca_path=self.tls_ca_path,
            tls_cert_path=self.tls_cert_path,
            tls_key_path=self.tls_key_path,
        )

    @property
    def hardening(self) -> Hardening:
        settings = get_settings()
        return Hardening(
            pids_limit=settings.PIDS_LIMIT,
            cap_drop_all=self.cap_drop_all or settings.CAP_DROP_ALL,
            log_driver=settings.LOG_DRIVER,
            # The disk of the Engine's machine is bounded by the driver; what is kept in the database, by us.
            log_options={"max-size": "10m", "max-file": "3"} if settings.LOG_DRIVER in ("local", "json-file") else {},
            denied_networks=settings.DENIED_NETWORKS,
        )


def protect_unfinished(collector: Any, field: Any, rows: Any, using: str) -> None:
    """`on_delete` of a host: its history stays, a job that still needs it forbids the deletion."""
    if rows.exclude(status__in=ENDED).exists():
        raise models.ProtectedError("Jobs that have not ended are pinned to this host: cancel or move them first", rows)
    models.SET_NULL(collector, field, rows, using)


class ContainerJobQuerySet(models.QuerySet["ContainerJob"]):
    def has_any(self, order: str) -> bool:
        """`exists`, by the index in this order: PostgreSQL would rather walk a table in which it expects many."""
        return self.order_by(order).values_list("pk").first() is not None

    def in_claim_order(self) -> Self:
        return self.order_by("-priority", "queued_at", "pk")

    def queued(self) -> Self:
        return self.filter(status=Status.QUEUED)

    def scheduled(self) -> Self:
        return self.filter(status=Status.SCHEDULED)

    def due(self) -> Self:
        return self.scheduled().filter(scheduled_for__lte=Now())

    def alive(self) -> Self:
        return self.filter(slot_host__isnull=False)

    def running(self) -> Self:
        return self.filter(status=Status.RUNNING)

    def failed(self) -> Self:
        return self.filter(status=Status.FAILED)

    def awaited(self) -> Self:
        """Not ended, and a flow run waits for them."""
        return self.filter(flow_run_id__isnull=False, finished_at__isnull=True)

    def lease_over(self) -> Self:
        return self.filter(claimed_until__lt=Now())


class ContainerJobManager(models.Manager.from_queryset(ContainerJobQuerySet)):  # type: ignore[misc]
    def build(self, *, pinned_host: DockerHost | None = None, created_by: str = "", **fields: Any) -> "ContainerJob":
        """A checked job that is not saved yet, for `queue_manager.queue_jobs`. Errors as `create_job`."""
        if pinned_host is not None and not isinstance(pinned_host, DockerHost):
            example = "such as DockerHost.objects.get(name=…)"
            raise ValidationError({"pinned_host": f"must be a DockerHost, {example}, not {type(pinned_host).__name__}"})
        spec = validate_job(fields)
        return ContainerJob(pinned_host=pinned_host, created_by=created_by, **spec.model_dump(mode="json"))

    def create_job(
        self, *, pinned_host: DockerHost | None = None, created_by: str = "", **fields: Any
    ) -> "ContainerJob":
        """Save a job with the fields of `JobSpec`. It does not run before `queue_manager.queue_job` queues it.

        Raises Django's `ValidationError`, by field, unless everything in it is well-formed and allowed.
        """
        job = self.build(pinned_host=pinned_host, created_by=created_by, **fields)
        job.save(force_insert=True)
        return job


_LISTS = ("command", "entrypoint", "mounts", "networks", "retry_exit_codes")
_OBJECTS = ("environment", "secret_environment", "labels")


class ContainerJob(models.Model):
    """One container to run. Its status changes through `transitions.move` alone."""

    PRIORITY_HIGH: ClassVar[int] = PRIORITY_HIGH
    PRIORITY_NORMAL: ClassVar[int] = PRIORITY_NORMAL
    PRIORITY_LOW: ClassVar[int] = PRIORITY_LOW

    # What runs; the fields of `types.JobSpec`.
    name = models.CharField(max_length=64, blank=True)
    image = models.CharField(max_length=255)
    command = models.JSONField(default=list, blank=True, help_text='List of arguments: ["sh", "-c", "…"]')
    entrypoint = models.JSONField(default=list, blank=True, help_text="Takes the place of the image's own.")
    environment = models.JSONField(default=dict, blank=True, help_text='{"REGION": "eu"}')
    secret_environment = models.JSONField(default=dict, blank=True, help_text="Variable → reference, never a value.")
    working_dir = models.CharField(max_length=255, blank=True)
    user = models.CharField(max_length=64, blank=True)
    memory_limit_mib = models.PositiveIntegerField("memory limit (MiB)", null=True, blank=True)
    cpu_limit = models.FloatField("CPU limit", null=True, blank=True)
    mounts = models.JSONField(
        default=list, blank=True, help_text='[{"type": "volume", "source": "cm-data", "target": "/data"}]'
    )
    networks = models.JSONField(default=list, blank=True, help_text='["backend"]; ["none"] for no network at all.')
    labels = models.JSONField(default=dict, blank=True, help_text='{"team": "data"}')
    pull_policy = models.CharField(max_length=10, choices=PullPolicy, default=PullPolicy.MISSING)
    priority = models.PositiveSmallIntegerField(default=PRIORITY_NORMAL, help_text="0 to 100; the greatest first.")
    timeout_seconds = models.PositiveIntegerField("timeout (seconds)", default=3600)
    max_retries = models.PositiveIntegerField(default=3)
    retry_exit_codes = models.JSONField(default=list, blank=True, help_text="[75]: exit codes that are run again.")
    rerun_on_lost = models.BooleanField(
        default=False, help_text="Run it again when its container vanished or died with its Engine."
    )

    # Where it may run (people write it) and whose slot it holds (the claim writes it).
    pinned_host = models.ForeignKey(
        DockerHost, null=True, blank=True, on_delete=protect_unfinished, related_name="pinned_jobs", db_index=False
    )
    slot_host = models.ForeignKey(
        DockerHost,
        null=True,
        blank=True,
        on_delete=models.PROTECT,
        related_name="alive_jobs",
        db_index=False,
        editable=False,
    )

    status = models.CharField(max_length=10, choices=Status, default=Status.PENDING, editable=False)
    reason = models.CharField(max_length=16, choices=Reason, blank=True, editable=False)
    queued_at = models.DateTimeField(null=True, blank=True, editable=False)
    scheduled_for = models.DateTimeField(null=True, blank=True, editable=False)
    launched_at = models.DateTimeField(null=True, blank=True, editable=False)
    finished_at = models.DateTimeField(null=True, blank=True, editable=False)
    deadline_at = models.DateTimeField(null=True, blank=True, editable=False)
    #: Counts claims; in the container's name, labels and every compare-and-set.
    attempt = models.PositiveIntegerField(default=0, editable=False)
    #: Charged tries after the first, ≤ max_retries.
    retry_count = models.PositiveIntegerField(default=0, editable=False)
    #: Claims in a row that were handed back uncharged.
    launch_tries = models.PositiveIntegerField(default=0, editable=False)
    exit_code = models.IntegerField(null=True, blank=True, editable=False)
    oom_killed = models.BooleanField(default=False, editable=False)
    last_error = models.TextField(blank=True, editable=False)
    cancel_requested_at = models.DateTimeField(null=True, blank=True, editable=False)
    stop_requested_at = models.DateTimeField(null=True, blank=True, editable=False)
    stop_reason = models.CharField(max_length=16, choices=Reason, blank=True, editable=False)
    claim_token = models.CharField(max_length=32, blank=True, editable=False)
    claimed_by = models.CharField(max_length=255, blank=True, editable=False)
    claimed_until = models.DateTimeField(null=True, blank=True, editable=False)
    container_id = models.CharField(max_length=64, null=True, blank=True, editable=False)  # noqa: DJ001 (unique where set)
    #: Since when its container is gone together with others, so that it is held and not yet `lost`.
    missing_at = models.DateTimeField(null=True, blank=True, editable=False)
    #: Which host's pull this try has waited for, and how that ended.
    pulled_host = models.ForeignKey(
        DockerHost, null=True, blank=True, on_delete=models.SET_NULL, related_name="+", db_index=False, editable=False
    )
    pull_error = models.TextField(blank=True, editable=False)
    #: The Prefect flow run that waits for this job; cancelled together with it.
    flow_run_id = models.CharField(max_length=36, null=True, blank=True, editable=False)  # noqa: DJ001 (indexed where set)
    created_by = models.CharField(max_length=150, blank=True, editable=False)
    created_at = models.DateTimeField(db_default=Now(), editable=False)
    updated_at = models.DateTimeField(db_default=Now(), editable=False)

    objects: ClassVar[ContainerJobManager] = ContainerJobManager()

    class Meta:
        ordering = ["-pk"]
        permissions = [
            ("launch_containerjob", "Can queue, launch and retry container jobs"),
            ("cancel_containerjob", "Can cancel container jobs"),
        ]
        indexes = [
            models.Index(
                F("priority").desc(),
                F("queued_at"),
                F("id"),
                name="cm_job_claim_any",
                condition=Q(status=Status.QUEUED, pinned_host__isnull=True),
            ),
            models.Index(
                F("pinned_host"),
                F("priority").desc(),
                F("queued_at"),
                F("id"),
                name="cm_job_claim_pinned",
                condition=Q(status=Status.QUEUED, pinned_host__isnull=False),
            ),
            models.Index("scheduled_for", "id", name="cm_job_promote", condition=Q(status=Status.SCHEDULED)),
            # Whether any is queued, how many, and since when: a claim's own indexes are of no use for these.
            models.Index("queued_at", name="cm_job_queued", condition=Q(status=Status.QUEUED)),
            # The pages' order within a status.
            models.Index("status", "id", name="cm_job_status"),
            models.Index("slot_host", name="cm_job_slots", condition=Q(slot_host__isnull=False)),
            models.Index("claimed_until", name="cm_job_leases", condition=Q(claimed_until__isnull=False)),
            models.Index("reason", name="cm_job_failed", condition=Q(status=Status.FAILED)),
            models.Index(
                "flow_run_id",
                name="cm_job_awaited",
                condition=Q(flow_run_id__isnull=False, finished_at__isnull=True),
            ),
        ]
        constraints = [
            models.UniqueConstraint("container_id", name="cm_job_container", condition=Q(container_id__isnull=False)),
            models.CheckConstraint(
                condition=Q(status__in=ALIVE, slot_host__isnull=False)
                | (~Q(status__in=ALIVE) & Q(slot_host__isnull=True)),
                name="cm_job_slot_while_alive",
            ),
            models.CheckConstraint(condition=Q(status__in=Status.values), name="cm_job_status"),
        ]

    def __str__(self) -> str:
        return f"Job {self.pk} ({self.name or self.image})"

    def clean(self) -> None:
        for name in _LISTS + _OBJECTS:
            # What a form's empty field means.
            if getattr(self, name) is None:
                setattr(self, name, [] if name in _LISTS else {})
        self.validated_spec()

    def validated_spec(self) -> JobSpec:
        """What the row asks for, checked against what is allowed now; Django's `ValidationError` by field."""
        return validate_job({field: getattr(self, field) for field in JobSpec.model_fields})

    @property
    def label(self) -> str:
        return self.name or f"job-{self.pk}"

    def on(self, host: "DockerHost | None") -> str:
        """How a log line begins."""
        return f"job {self.pk} on host {host.name}" if host else f"job {self.pk}"

    def log_extra(self, host: "DockerHost | None") -> dict[str, Any]:
        return {"job": self.pk, "attempt": self.attempt, "host": host.name if host else ""}


class WatchedLog(models.Model):
    """That a page shows what a running job writes, and the end of it as a pass last read it."""

    job = models.OneToOneField(ContainerJob, on_delete=models.CASCADE, primary_key=True, related_name="watched_log")
    #: Each look at the page moves it on; what nobody wants any more is removed by a pass.
    wanted_until = models.DateTimeField()
    read_at = models.DateTimeField(null=True)
    #: The attempt that wrote it.
    attempt = models.PositiveIntegerField(default=0)
    stdout = models.TextField(blank=True)
    stderr = models.TextField(blank=True)
    #: Why it could not be read.
    error = models.TextField(blank=True)

    def __str__(self) -> str:
        return f"Log of job {self.job_id} as it runs"


class JobAttempt(models.Model):
    """One try at running a job, written once, in the transaction that ends it."""

    job = models.ForeignKey(ContainerJob, on_delete=models.CASCADE, related_name="attempts", db_index=False)
    number = models.PositiveIntegerField()
    host = models.ForeignKey(DockerHost, null=True, on_delete=models.SET_NULL, related_name="+")
    host_name = models.CharField(max_length=64)
    container_id = models.CharField(max_length=64, blank=True)
    image_digest = models.CharField(max_length=255, blank=True)
    flow_run_id = models.CharField(max_length=36, blank=True)
    #: By the Engine's clock; for display, never compared with ours.
    started_at = models.DateTimeField(null=True)
    finished_at = models.DateTimeField(null=True)
    ended_at = models.DateTimeField(db_default=Now())
    exit_code = models.IntegerField(null=True)
    oom_killed = models.BooleanField(default=False)
    reason = models.CharField(max_length=16, choices=Reason)
    error = models.TextField(blank=True)
    stdout = models.TextField(blank=True)
    stderr = models.TextField(blank=True)

    class Meta:
        ordering = ["job", "number"]
        constraints = [models.UniqueConstraint(fields=["job", "number"], name="cm_attempt_number")]

    def __str__(self) -> str:
        return f"Attempt {self.number} of job {self.job_id}"

    @property
    def run_seconds(self) -> float | None:
        """How long the container ran; never negative, though an Engine's times may be."""
        if self.started_at is None or self.finished_at is None:
            return None
        return max(0.0, (self.finished_at - self.started_at).total_seconds())
