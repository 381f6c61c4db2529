"""From Prefect's pages to the site's."""

from . import _django  # noqa: F401, I001 (sets Django up before anything else is imported)

from django.urls import NoReverseMatch, reverse

from container_manager.conf import get_settings


def job_url(job_id: int) -> str:
    """The job's page; empty unless the setting SITE_URL says where the site is, and it has the admin."""
    site = get_settings().SITE_URL.rstrip("/")
    try:
        return site and site + reverse("admin:container_manager_containerjob_change", args=[job_id])
    except NoReverseMatch:
        return ""


def job_links(job_ids: list[int]) -> str:
    """Markdown; empty if there is no page to link to."""
    return ", ".join(f"[job {job_id}]({url})" for job_id in job_ids if (url := job_url(job_id)))
