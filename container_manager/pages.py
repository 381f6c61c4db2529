"""The pages beside the admin's own: the queue at a glance."""

from collections.abc import Iterable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from django.contrib import admin
from django.core.exceptions import PermissionDenied
from django.http import HttpRequest
from django.template.response import TemplateResponse
from django.urls import URLPattern, path

from .models import LEASED, ContainerJob, ContainerJobQuerySet, DockerHost, JobAttempt
from .outlook import Outlook
from .queue import queue_manager
from .types import HOST_TAG_PREFIX, JOB_TAG, QueueMetrics

if TYPE_CHECKING:
    _JobAdmin = admin.ModelAdmin[ContainerJob]
else:
    _JobAdmin = object

#: Rows of the dashboard's tables.
MOST_RUNNING, MOST_ENDED = 50, 20
#: seconds; after which the dashboard asks for itself again.
_DASHBOARD_SECONDS = 5


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


class JobPages(_JobAdmin):
    """Views of a job's `ModelAdmin`, for whoever may see jobs. No page asks a host, and none has a script."""

    def get_urls(self) -> list[URLPattern]:
        view = self.admin_site.admin_view
        return [
            path("dashboard/", view(self.dashboard), name="container_manager_dashboard"),
            *super().get_urls(),
        ]

    def dashboard(self, request: HttpRequest) -> TemplateResponse:
        """The same number of queries, each on an index, however many jobs there are."""
        metrics, outlook = queue_manager.get_worker_metrics(), queue_manager.outlook()
        return self._page(
            request,
            "dashboard.html",
            _DASHBOARD_SECONDS,
            title="Dashboard",
            outlook=outlook,
            figures=_figures(metrics),
            limit=outlook.capacity.next_limit,
            tag_limits=_tag_limits(outlook),
            hosts=_host_lines(metrics, outlook),
            running=_running(),
            most_running=MOST_RUNNING,
            ended=_ended(),
        )

    def _page(self, request: HttpRequest, name: str, seconds: int | None, **context: Any) -> TemplateResponse:
        """`seconds`: after which it asks for itself again; by a header, which needs no script."""
        if not self.has_view_permission(request):
            raise PermissionDenied
        return TemplateResponse(
            request,
            f"admin/container_manager/{name}",
            {**self.admin_site.each_context(request), "opts": self.opts, "seconds": seconds, **context},
            headers={} if seconds is None else {"Refresh": str(seconds)},
        )


def _figures(metrics: QueueMetrics) -> list[Figure]:
    wait = metrics.oldest_wait_seconds
    return [
        Figure("ready now", metrics.ready_now, "status__exact=queued"),
        Figure("oldest wait", "-" if wait is None else str(timedelta(seconds=round(wait)))),
        Figure("scheduled", metrics.scheduled_future, "status__exact=scheduled"),
        Figure("launching", metrics.launching, f"status__in={','.join(LEASED)}"),
        Figure("running", metrics.running, "status__exact=running"),
        Figure("failed", metrics.failed, "status__exact=failed"),
        Figure("launch failed", metrics.launch_failed, "status__exact=failed&reason__exact=launch"),
    ]


def _tag_limits(outlook: Outlook) -> list[tuple[str, int]]:
    total = [] if outlook.limits.total is None else [(JOB_TAG, outlook.limits.total)]
    return [*total, *((f"{HOST_TAG_PREFIX}{name}", most) for name, most in sorted(outlook.limits.hosts.items()))]


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
