"""The pages: what is queued, what ran, and the verbs of the queue as actions."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from django.contrib import admin, messages
from django.core.exceptions import ValidationError
from django.db.models import QuerySet
from django.http import HttpRequest
from django.utils.translation import ngettext

from .exceptions import ContainerManagerError
from .models import ContainerJob, DockerHost, JobAttempt, Status
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

_STATE_FIELDS = tuple(
    field.name
    for field in ContainerJob._meta.fields
    if not field.editable and field.name not in ("id", "claim_token", "cancel_requested_at")
)


class JobAttemptInline(_AttemptInline):
    model = JobAttempt
    extra = 0
    can_delete = False
    fields = ("number", "host_name", "reason", "exit_code", "started_at", "finished_at", "error", "stdout", "stderr")
    readonly_fields = fields

    def has_add_permission(self, request: HttpRequest, obj: object = None) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: object = None) -> bool:
        return False


@admin.register(ContainerJob)
class ContainerJobAdmin(_JobAdmin):
    list_display = (
        "id", "label", "image", "status", "reason", "exit_code", "priority", "queued_at", "launched_at", "finished_at",
    )  # fmt: skip
    list_display_links = ("id", "label")
    list_filter = ("status", "reason", "slot_host")
    search_fields = ("=id", "name", "image")
    list_per_page = 50
    show_full_result_count = False
    readonly_fields = _STATE_FIELDS
    fieldsets = (
        ("What runs", {"fields": (*JobSpec.model_fields, "pinned_host")}),
        ("State", {"fields": _STATE_FIELDS}),
    )
    inlines = (JobAttemptInline,)
    actions = ("queue_jobs", "cancel_jobs", "retry_jobs")

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

    def save_model(self, request: HttpRequest, obj: ContainerJob, form: Any, change: bool) -> None:
        if not change:
            obj.created_by = request.user.get_username()
        super().save_model(request, obj, form, change)

    def delete_queryset(self, request: HttpRequest, queryset: QuerySet[ContainerJob]) -> None:
        super().delete_queryset(request, queryset.filter(slot_host__isnull=True))

    @admin.action(description="Queue selected pending jobs", permissions=["launch"])
    def queue_jobs(self, request: HttpRequest, queryset: QuerySet[ContainerJob]) -> None:
        self._for_each(request, queryset, "queued", queue_manager.queue_job)

    @admin.action(description="Cancel selected jobs", permissions=["cancel"])
    def cancel_jobs(self, request: HttpRequest, queryset: QuerySet[ContainerJob]) -> None:
        self._for_each(request, queryset, "cancelled", queue_manager.cancel_job)

    @admin.action(description="Run selected ended jobs anew", permissions=["launch"])
    def retry_jobs(self, request: HttpRequest, queryset: QuerySet[ContainerJob]) -> None:
        self._for_each(request, queryset, "queued again", queue_manager.retry_job)

    def _for_each(
        self, request: HttpRequest, queryset: QuerySet[ContainerJob], done: str, verb: Callable[[ContainerJob], object]
    ) -> None:
        """One by one, since each may be refused for a reason of its own."""
        if queryset.count() > MAX_SELECTED:
            self.message_user(request, f"Select at most {MAX_SELECTED} jobs.", messages.ERROR)
            return
        count = 0
        for job in queryset.order_by("pk"):
            try:
                verb(job)
            except ValidationError as e:
                self.message_user(request, f"Job {job.pk}: {describe(e)}", messages.ERROR)
            except ContainerManagerError as e:
                self.message_user(request, f"Job {job.pk}: {e}", messages.ERROR)
            else:
                self.log_change(request, job, done)
                count += 1
        if count:
            self.message_user(request, ngettext("%d job %s.", "%d jobs %s.", count) % (count, done), messages.SUCCESS)


@admin.register(DockerHost)
class DockerHostAdmin(_HostAdmin):
    list_display = ("name", "base_url", "is_active", "max_concurrent_jobs", "last_seen_at", "last_error")
    list_filter = ("is_active",)
    search_fields = ("name", "base_url")
    readonly_fields = ("last_seen_at", "last_down_at", "last_error")
