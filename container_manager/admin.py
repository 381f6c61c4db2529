"""The pages: what is queued, what ran and what it wrote, and the verbs of the queue as actions."""

from collections.abc import Callable
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any

from django.contrib import admin, messages
from django.contrib.admin.widgets import AdminTextareaWidget
from django.core.exceptions import ValidationError
from django.db import models, transaction
from django.db.models import QuerySet
from django.db.models.functions import Length, Right
from django.http import Http404, HttpRequest, HttpResponse
from django.urls import URLPattern, path, reverse
from django.utils import timezone
from django.utils.html import format_html
from django.utils.safestring import SafeString
from django.utils.translation import ngettext

from .conf import get_settings
from .exceptions import ContainerManagerError
from .models import WAITING, ContainerJob, DockerHost, JobAttempt, Status
from .outlook import Outlook
from .pages import JobPages
from .policy import describe
from .queue import queue_manager
from .types import JobSpec

if TYPE_CHECKING:
    _JobAdmin = admin.ModelAdmin[ContainerJob]
    _HostAdmin = admin.ModelAdmin[DockerHost]
    _AttemptInline = admin.StackedInline[JobAttempt, ContainerJob]
else:
    # Django's own classes take no parameters.
    _JobAdmin, _HostAdmin, _AttemptInline = admin.ModelAdmin, admin.ModelAdmin, admin.StackedInline

#: Big enough for a page's selection; what is larger belongs into a script.
MAX_SELECTED = 1000
#: characters of a stream that a job's page shows, its end; the whole can be downloaded.
_SHOWN = 4000
#: characters of a reason in the list.
_SHOWN_REASON = 150

_BASICS = ("name", "image", "command", "environment", "priority", "timeout_seconds", "pinned_host")
_LIMITS = ("memory_limit_mib", "cpu_limit", "max_retries", "retry_exit_codes", "rerun_on_lost")
_ADVANCED = tuple(field for field in JobSpec.model_fields if field not in _BASICS + _LIMITS)
_STATE = (
    "status", "waits_for", "reason", "exit_code", "oom_killed", "last_error", "slot_host", "queued_at", "scheduled_for",
    "launched_at", "finished_at", "retry_count", "cancel_requested_at", "flow_run", "created_by", "created_at",
)  # fmt: skip
_INTERNALS = (
    "attempt", "launch_tries", "container_id", "deadline_at", "stop_requested_at", "stop_reason", "claimed_by",
    "claimed_until", "missing_at", "pulled_host", "pull_error", "updated_at",
)  # fmt: skip


class JobAttemptInline(_AttemptInline):
    model = JobAttempt
    extra = 0
    can_delete = False
    ordering = ("-number",)
    fields = ("host_name", "reason", "exit_code", "run_time", "error", "stdout_end", "stderr_end")
    readonly_fields = fields

    def get_queryset(self, request: HttpRequest) -> QuerySet[JobAttempt]:
        # A page of many attempts would be hundreds of megabytes.
        rows = super().get_queryset(request).defer("stdout", "stderr")
        ends = {f"{stream}_shown": Right(stream, _SHOWN) for stream in ("stdout", "stderr")}
        return rows.annotate(**ends, stdout_length=Length("stdout"), stderr_length=Length("stderr"))

    def has_add_permission(self, request: HttpRequest, obj: object = None) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: object = None) -> bool:
        return False

    @admin.display(description="ran for")
    def run_time(self, attempt: JobAttempt) -> str:
        return "-" if attempt.run_seconds is None else f"{attempt.run_seconds:.1f} s"

    @admin.display(description="stdout")
    def stdout_end(self, attempt: JobAttempt) -> SafeString | str:
        return self._end(attempt, "stdout")

    @admin.display(description="stderr")
    def stderr_end(self, attempt: JobAttempt) -> SafeString | str:
        return self._end(attempt, "stderr")

    def _end(self, attempt: JobAttempt, stream: str) -> SafeString | str:
        text, length = getattr(attempt, f"{stream}_shown"), getattr(attempt, f"{stream}_length")
        if not text:
            days = get_settings().KEEP_LOGS_DAYS
            is_old = attempt.ended_at < timezone.now() - timedelta(days=days)
            return f"nothing, or purged: logs are kept for {days} days (KEEP_LOGS_DAYS)" if is_old else "-"
        url = reverse("admin:container_manager_log", args=(attempt.job_id, attempt.number, stream))
        cut = "" if length <= _SHOWN else f"the last {_SHOWN} of {length} characters; "
        return format_html('<pre style="white-space: pre-wrap">{}</pre>{}<a href="{}">download</a>', text, cut, url)


@admin.register(ContainerJob)
class ContainerJobAdmin(JobPages, _JobAdmin):
    list_display = ("id", "label", "image", "status", "why", "exit_code", "priority", "slot_host", "last_change")
    list_display_links = ("id", "label")
    list_filter = ("status", "reason", "pinned_host")
    list_select_related = ("slot_host",)
    search_fields = ("=id", "name", "image")
    list_per_page = 50
    show_full_result_count = False
    readonly_fields = _STATE + _INTERNALS
    formfield_overrides = {models.JSONField: {"widget": AdminTextareaWidget(attrs={"rows": 2})}}
    inlines = (JobAttemptInline,)
    actions = ("queue_jobs", "dequeue_jobs", "cancel_jobs", "retry_jobs")

    class Media:
        css = {"all": ["container_manager/pages.css"]}

    def get_fieldsets(self, request: HttpRequest, obj: ContainerJob | None = None) -> Any:
        spec = [
            ("What runs", {"fields": _BASICS}),
            ("Limits and retries", {"fields": _LIMITS}),
            ("More", {"fields": _ADVANCED, "classes": ["collapse"]}),
        ]
        if obj is None:
            return spec
        internals = ("Internals", {"fields": _INTERNALS, "classes": ["collapse"]})
        return [("State", {"fields": _STATE}), *spec, internals]

    def get_urls(self) -> list[URLPattern]:
        view = self.admin_site.admin_view(self.download_log)
        return [
            path("<int:job_id>/attempts/<int:number>/<str:stream>.txt", view, name="container_manager_log"),
            *super().get_urls(),
        ]

    def has_change_permission(self, request: HttpRequest, obj: ContainerJob | None = None) -> bool:
        # What a job that was queued runs is settled; its row is shown, not edited.
        is_settled = obj is not None and obj.status != Status.PENDING
        return not is_settled and super().has_change_permission(request, obj)

    def has_delete_permission(self, request: HttpRequest, obj: ContainerJob | None = None) -> bool:
        is_alive = obj is not None and obj.slot_host_id is not None
        return not is_alive and super().has_delete_permission(request, obj)

    def has_launch_permission(self, request: HttpRequest) -> bool:
        return request.user.has_perm("container_manager.launch_containerjob")

    def has_cancel_permission(self, request: HttpRequest) -> bool:
        return request.user.has_perm("container_manager.cancel_containerjob")

    def get_list_display(self, request: HttpRequest) -> Any:
        # One look at the queue for all rows of a page, and none for a page on which nothing waits.
        look_ahead = cache(queue_manager.outlook)

        @admin.display(description="reason")
        def why(job: ContainerJob) -> str:
            return self.why(job, look_ahead)

        return [why if name == "why" else name for name in self.list_display]

    @admin.display(description="reason")
    def why(self, job: ContainerJob, look_ahead: Callable[[], Outlook] = queue_manager.outlook) -> str:
        """What a success needs no word for is left out; what waits says for what."""
        if job.status == Status.COMPLETED:
            return ""
        why = look_ahead().why(job) if job.status in WAITING else job.last_error or job.get_reason_display()
        return why[:_SHOWN_REASON]

    @admin.display(description="waits for")
    def waits_for(self, job: ContainerJob) -> str:
        return queue_manager.why_waiting(job) or "-"

    @admin.display(description="since", ordering="updated_at")
    def last_change(self, job: ContainerJob) -> Any:
        return job.finished_at or job.launched_at or job.queued_at or job.updated_at

    @admin.display(description="flow run")
    def flow_run(self, job: ContainerJob) -> SafeString | str:
        pages = get_settings().PREFECT_UI_URL.rstrip("/")
        if not job.flow_run_id or not pages:
            return job.flow_run_id or "-"
        return format_html('<a href="{}/runs/flow-run/{}">{}</a>', pages, job.flow_run_id, job.flow_run_id)

    def save_model(self, request: HttpRequest, obj: ContainerJob, form: Any, change: bool) -> None:
        if not change:
            obj.created_by = request.user.get_username()[:150]
            super().save_model(request, obj, form, change)
            return
        # Only what the form shows, and only while nobody has queued it meanwhile.
        fields = {name: getattr(obj, name) for name in (*JobSpec.model_fields, "pinned_host")}
        if not ContainerJob.objects.filter(pk=obj.pk, status=Status.PENDING).update(**fields):
            why = f"Job {obj.pk} was queued meanwhile: it was not changed."
            self.message_user(request, why, messages.ERROR, fail_silently=True)

    def delete_queryset(self, request: HttpRequest, queryset: QuerySet[ContainerJob]) -> None:
        # Locked, so that none is claimed before it is gone.
        with transaction.atomic():
            rows = queryset.filter(slot_host__isnull=True).order_by("pk").select_for_update()
            job_ids = list(rows.values_list("pk", flat=True))
            super().delete_queryset(request, ContainerJob.objects.filter(pk__in=job_ids))

    def delete_model(self, request: HttpRequest, obj: ContainerJob) -> None:
        self.delete_queryset(request, ContainerJob.objects.filter(pk=obj.pk))

    def download_log(self, request: HttpRequest, job_id: int, number: int, stream: str) -> HttpResponse:
        """A whole stream as a file: what a container wrote is never shown as a page."""
        self.check_may_view(request)
        if stream not in ("stdout", "stderr"):
            raise Http404
        text = JobAttempt.objects.filter(job_id=job_id, number=number).values_list(stream, flat=True).first()
        if text is None:
            raise Http404
        return HttpResponse(
            text,
            content_type="text/plain; charset=utf-8",
            headers={
                "Content-Disposition": f'attachment; filename="job-{job_id}-{number}-{stream}.txt"',
                "X-Content-Type-Options": "nosniff",
            },
        )

    @admin.action(description="Queue selected pending jobs", permissions=["launch"])
    def queue_jobs(self, request: HttpRequest, queryset: QuerySet[ContainerJob]) -> None:
        self._for_each(request, queryset, queue_manager.queue_job, lambda job: "queued")

    @admin.action(description="Take selected jobs that wait back, to be changed", permissions=["launch"])
    def dequeue_jobs(self, request: HttpRequest, queryset: QuerySet[ContainerJob]) -> None:
        self._for_each(request, queryset, queue_manager.dequeue_job, lambda job: "taken back")

    @admin.action(description="Cancel selected jobs", permissions=["cancel"])
    def cancel_jobs(self, request: HttpRequest, queryset: QuerySet[ContainerJob]) -> None:
        self._for_each(
            request,
            queryset,
            queue_manager.cancel_job,
            lambda job: "cancelled" if job.status == Status.CANCELLED else "told to stop, by the next pass",
        )

    @admin.action(description="Run selected ended jobs anew", permissions=["launch"])
    def retry_jobs(self, request: HttpRequest, queryset: QuerySet[ContainerJob]) -> None:
        self._for_each(request, queryset, queue_manager.retry_job, lambda job: "queued again")

    def _for_each(
        self,
        request: HttpRequest,
        queryset: QuerySet[ContainerJob],
        verb: Callable[[ContainerJob], object],
        outcome_of: Callable[[ContainerJob], str],
    ) -> None:
        """One by one, since each may be refused for a reason of its own."""
        if queryset.count() > MAX_SELECTED:
            self.message_user(request, f"Select at most {MAX_SELECTED} jobs.", messages.ERROR)
            return
        counts: dict[str, int] = {}
        for job in queryset.order_by("pk"):
            try:
                verb(job)
            except ValidationError as e:
                self.message_user(request, f"Job {job.pk}: {describe(e)}", messages.ERROR)
            except ContainerManagerError as e:
                self.message_user(request, f"Job {job.pk}: {e}", messages.ERROR)
            else:
                outcome = outcome_of(job)
                self.log_change(request, job, outcome)
                counts[outcome] = counts.get(outcome, 0) + 1
        for outcome, count in counts.items():
            self.message_user(
                request, ngettext("%d job %s.", "%d jobs %s.", count) % (count, outcome), messages.SUCCESS
            )


@admin.register(DockerHost)
class DockerHostAdmin(_HostAdmin):
    list_display = ("name", "base_url", "is_active", "max_concurrent_jobs", "last_seen_at", "last_error")
    list_filter = ("is_active",)
    search_fields = ("name", "base_url")
    readonly_fields = ("engine_id", "last_seen_at", "last_down_at", "last_error")
    actions = ("accept_engines", "declare_lost")

    @admin.action(description="Accept the Engine that answers now", permissions=["change"])
    def accept_engines(self, request: HttpRequest, queryset: QuerySet[DockerHost]) -> None:
        """The next pass stores the id of the Engine that it finds."""
        for host in queryset:
            DockerHost.objects.filter(pk=host.pk).update(engine_id="", last_error="")
            self.log_change(request, host, "accepted another Engine")
            self.message_user(request, f"Host {host}: the Engine that the next pass finds is accepted.")

    @admin.action(description="Declare lost: drain, and end its jobs", permissions=["change"])
    def declare_lost(self, request: HttpRequest, queryset: QuerySet[DockerHost]) -> None:
        for host in queryset:
            ended = queue_manager.declare_host_lost(host)
            self.log_change(request, host, f"declared lost, with {len(ended)} jobs")
            self.message_user(request, f"Host {host}: drained; {len(ended)} jobs ended, or run again where they may.")
