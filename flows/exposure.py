"""Whether the Prefect API is open to anybody: then nobody may hand it a job's image and command."""

from . import _django  # noqa: F401, I001 (sets Django up before anything else is imported)

from ipaddress import ip_address
from urllib.parse import urlsplit

import httpx
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_KEY, PREFECT_API_URL

from container_manager.conf import Settings

from .api import PROBE_SECONDS


def why_open(settings: Settings) -> str:
    """Why `run-container-job` is not to be run for this API, in a sentence; empty if it may be."""
    url = str(PREFECT_API_URL.value() or "")
    if settings.ALLOWED_IMAGES or not url or _is_loopback(urlsplit(url).hostname or "") or _asks_who_it_is(url):
        return ""
    return (
        f"the Prefect API at {url} takes flow runs from anybody: give it an authentication "
        "(PREFECT_SERVER_API_AUTH_STRING), or set ALLOWED_IMAGES"
    )


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _asks_who_it_is(url: str) -> bool:
    """That we have something to say who we are does not mean that it is asked for."""
    if not PREFECT_API_AUTH_STRING.value() and not PREFECT_API_KEY.value():
        return False
    try:
        answer = httpx.post(f"{url}/flow_runs/count", json={}, timeout=PROBE_SECONDS)
    except httpx.HTTPError:
        return False
    return answer.status_code in (401, 403)
