"""Checks whether the Prefect API is open to strangers. If it is, `run-container-job` is refused."""

from . import _django  # noqa: F401, I001 (sets Django up before anything else is imported)

import httpx
from prefect.settings import PREFECT_API_URL

from container_manager.conf import Settings

from .asking import NotAsked
from .listening import beyond_loopback, is_loopback
from .strangers import api_url, is_open, is_proxied, listens_on, port_of


def why_open(settings: Settings) -> str:
    """Why `run-container-job` must not run for this API, in a sentence; empty if it may.

    Usually asks the API one or two questions, which takes some hundredths of a second, or seconds if it does not
    answer. The result is valid only now: ask again for each run.
    """
    if not PREFECT_API_URL.value() or _is_bounded(settings):
        return ""
    try:
        url = api_url()
    except NotAsked as e:
        return _could_not_ask("the Prefect API", str(e), settings)
    through_proxy = is_proxied(url)
    name = f"the Prefect API at {_shown(url)}{', reached through a proxy,' if through_proxy else ''}"
    is_local = is_loopback(url.host) and not through_proxy
    addresses = _beyond_loopback(url) if is_local else []
    if is_local and not addresses:
        return ""
    try:
        if not is_open(url):
            return ""
    except NotAsked as e:
        return _could_not_ask(name, str(e), settings)
    since = f", since it listens on {', '.join(addresses)} too" if addresses else ""
    return f"{name} takes flow runs from anybody{since}: {_fix(settings, is_local=is_local)}"


def _is_bounded(settings: Settings) -> bool:
    """Whether `ALLOWED_IMAGES` is enough. With secrets it is not: a job of an allowed image can print any of them."""
    return bool(settings.ALLOWED_IMAGES) and not settings.SECRET_RESOLVER


def _beyond_loopback(url: httpx.URL) -> list[str]:
    """The other addresses of a server that is reached on loopback, from this machine's sockets or its own settings.

    Behind a tunnel or a published port its sockets are elsewhere, so only its settings can tell.
    """
    if addresses := beyond_loopback(port_of(url)):
        return addresses
    host = listens_on(url)
    return [host] if host and not is_loopback(host) else []


def _fix(settings: Settings, *, is_local: bool) -> str:
    start = "start its server with `--host 127.0.0.1` or " if is_local else "start its server "
    fix = f"{start}with PREFECT_SERVER_API_AUTH_STRING, so that it asks for a password"
    if not settings.SECRET_RESOLVER:
        return f"{fix}; or set ALLOWED_IMAGES here"
    return f"{fix}. ALLOWED_IMAGES is not enough beside a SECRET_RESOLVER: a job can name any secret, and print it"


def _could_not_ask(name: str, why: str, settings: Settings) -> str:
    images = "" if settings.SECRET_RESOLVER else "; with ALLOWED_IMAGES set it need not be asked"
    return f"{name} could not be asked whether it lets strangers start flow runs: {why}{images}"


def _shown(url: httpx.URL) -> str:
    """The URL without its path if that may be part of a password: a slash in a password begins the path."""
    return f"{url.scheme}://{url.netloc.decode()}" if "@" in url.path else str(url)
