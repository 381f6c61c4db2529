"""The pages beside the admin's own: the queue at a glance, and what a job writes while it runs."""

from collections.abc import Iterable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from django.contrib import admin
from django.core.exceptions import PermissionDenied
from django.db import IntegrityError
from django.db.models.functions import Right
from django.http import Http404, HttpRequest
from django.template.response import TemplateResponse
from django.urls import URLPattern, path
from django.utils.http import urlencode

from .conf import get_settings
from .models import ALIVE, LEASED, ContainerJob, ContainerJobQuerySet, DockerHost, JobAttempt, Status, WatchedLog
from .outlook import Outlook, clock, seen
from .queue import queue_manager
from .types import HOST_TAG_PREFIX, JOB_TAG, QueueMetrics
from .watching import END_BYTES, want

if TYPE_CHECKING:
    _JobAdmin = admin.ModelAdmin[ContainerJob]
else:
    _JobAdmin = object

#: Rows of the dashboard's tables.
MOST_RUNNING, MOST_ENDED = 50, 20
#: seconds; after which the dashboard asks for itself again.
_DASHBOARD_SECONDS = 5
#: seconds; after which the page of a log does, while its attempt lives.
_LOG_SECONDS = 2


class Figure(NamedTuple):
    what: str
    value: int | str
    #: The filter of the list of jobs that shows these.
    query: str = ""


class HostLine(NamedTuple):
    host: DockerHost
    alive: int
    tag_limit: int | None
    #: What keeps it from taking a job.
    closed: str


class LogEnd(NamedTuple):
    """The ends of both streams, and a sentence that says of when they are, or why there is nothing."""

    words: str
    attempt: int = 0
    #: Name and text.
    streams: tuple[tuple[str, str], ...] = ()


class JobPages(_JobAdmin):
    """Views of a job's `ModelAdmin`, for whoever may see jobs. No page asks a host, and none has a script."""

    def get_urls(self) -> list[URLPattern]:
        view = self.admin_site.admin_view
        return [
            path("dashboard/", view(self.dashboard), name="container_manager_dashboard"),
            path("<int:job_id>/log/", view(self.live_log), name="container_manager_live_log"),
            *super().get_urls(),
        ]

    def dashboard(self, request: HttpRequest) -> TemplateResponse:
        """The same number of queries, each on an index, however many jobs there are."""
        self.check_may_view(request)
        metrics, outlook = queue_manager.get_worker_metrics(), queue_manager.outlook()
        may_see_hosts = request.user.has_perm("container_manager.view_dockerhost")
        return self._page(
            request,
            "dashboard.html",
            _DASHBOARD_SECONDS,
            title="Dashboard",
            outlook=outlook,
            figures=_figures(metrics, outlook),
            limit=outlook.capacity.next_limit,
            tag_limits=_tag_limits(outlook),
            may_see_hosts=may_see_hosts,
            hosts=_host_lines(metrics, outlook) if may_see_hosts else [],
            running=_running(),
            most_running=MOST_RUNNING,
            ended=_ended(),
        )

    def live_log(self, request: HttpRequest, job_id: int) -> TemplateResponse:
        """The end of what the living attempt has written, brought by the passes; of the last one that has ended, else.

        To look at it is what lets the passes read it.
        """
        self.check_may_view(request)
        job = ContainerJob.objects.filter(pk=job_id).first()
        if job is None:
            raise Http404
        is_alive, outlook = job.status in ALIVE, queue_manager.outlook()
        log = _watched(job, outlook) if is_alive else _stored(job, outlook)
        seconds = _LOG_SECONDS if is_alive else None
        return self._page(request, "log.html", seconds, title=f"Log of job {job.pk}", job=job, log=log)

    def check_may_view(self, request: HttpRequest) -> None:
        """Raises `PermissionDenied`."""
        if not self.has_view_permission(request):
            raise PermissionDenied

    def _page(self, request: HttpRequest, name: str, seconds: int | None, **context: Any) -> TemplateResponse:
        """`seconds`: after which it asks for itself again; by a header, which needs no script."""
        return TemplateResponse(
            request,
            f"admin/container_manager/{name}",
            {**self.admin_site.each_context(request), "opts": self.opts, "seconds": seconds, **context},
            headers={} if seconds is None else {"Refresh": str(seconds)},
        )


def _watched(job: ContainerJob, outlook: Outlook) -> LogEnd:
    if job.status != Status.RUNNING:
        return LogEnd(f"It does not run yet: {outlook.why(job)}.", job.attempt)
    try:
        want(job.pk)
    except IntegrityError as e:
        # Deleted at this very moment.
        raise Http404 from e
    log = WatchedLog.objects.filter(job=job, attempt=job.attempt).first()
    if log is None or log.read_at is None:
        host = outlook.hosts.get(job.slot_host_id or 0)
        away = f"; host {host.name} is away{seen(host)}" if host and host.last_error else ""
        return LogEnd(f"Nothing yet: the next pass brings it; {outlook.passes}{away}.", job.attempt)
    if log.error:
        return LogEnd(f"The Engine did not give it at {clock(log.read_at)}: {log.error}", job.attempt)
    words = f"Read at {clock(log.read_at)}, and again by each pass; {outlook.passes}."
    return LogEnd(words, job.attempt, (("stdout", log.stdout), ("stderr", log.stderr)))


def _stored(job: ContainerJob, outlook: Outlook) -> LogEnd:
    attempts = JobAttempt.objects.filter(job=job).order_by("-number")
    ends = attempts.annotate(stdout_end=Right("stdout", END_BYTES), stderr_end=Right("stderr", END_BYTES))
    last = ends.values_list("number", "ended_at", "stdout_end", "stderr_end").first()
    if last is None:
        return LogEnd(f"It has not run: {outlook.why(job) or job.last_error or job.status}.")
    number, ended_at, stdout, stderr = last
    again = f" Of the job: {why}." if (why := outlook.why(job)) else ""
    return LogEnd(f"Ended at {clock(ended_at)}.{again}", number, (("stdout", stdout), ("stderr", stderr)))


def _figures(metrics: QueueMetrics, outlook: Outlook) -> list[Figure]:
    wait = metrics.oldest_wait_seconds
    later = urlencode({"status__exact": Status.SCHEDULED, "scheduled_for__gt": outlook.now.isoformat()})
    return [
        # Queued, and scheduled ones that are due: no filter shows both.
        Figure("ready now", metrics.ready_now),
        Figure("oldest wait", "-" if wait is None else str(timedelta(seconds=round(wait)))),
        Figure("scheduled", metrics.scheduled_future, later),
        Figure("launching", metrics.launching, f"status__in={','.join(LEASED)}"),
        Figure("running", metrics.running, "status__exact=running"),
        Figure("failed", metrics.failed, "status__exact=failed"),
        Figure("launch failed", metrics.launch_failed, "status__exact=failed&reason__exact=launch"),
    ]


def _tag_limits(outlook: Outlook) -> list[tuple[str, int]]:
    total = [] if outlook.limits.total is None else [(JOB_TAG, outlook.limits.total)]
    hosts = [(HOST_TAG_PREFIX + name, most) for name, most in sorted(outlook.limits.hosts.items())]
    return [(get_settings().named(tag), most) for tag, most in [*total, *hosts]]


def _host_lines(metrics: QueueMetrics, outlook: Outlook) -> list[HostLine]:
    alive = {load.name: load.alive for load in metrics.hosts}
    return [
        HostLine(
            host=host,
            alive=alive.get(host.name, 0),
            tag_limit=outlook.limits.hosts.get(host.name),
            closed=outlook.capacity.shut.get(host.pk, ""),
        )
        for host in sorted(outlook.hosts.values(), key=lambda host: host.name)
    ]


def _running() -> Iterable[ContainerJob]:
    jobs: ContainerJobQuerySet = ContainerJob.objects.running().order_by("-pk").select_related("slot_host")
    return jobs.only("name", "image", "launched_at", "slot_host__name")[:MOST_RUNNING]


def _ended() -> Iterable[JobAttempt]:
    attempts = JobAttempt.objects.order_by("-pk").select_related("job")
    fields = ("number", "host_name", "ended_at", "exit_code", "reason", "error", "job__name", "job__status")
    return attempts.only(*fields)[:MOST_ENDED]
