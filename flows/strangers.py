"""Finds out whether the Prefect API lets strangers in, who send no password, key or token."""

from . import _django  # noqa: F401, I001 (sets Django up before anything else is imported)

from collections.abc import Mapping
from typing import Literal
from urllib.request import getproxies, proxy_bypass

import httpx
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_CUSTOM_HEADERS
from pydantic import AliasPath, BaseModel, ConfigDict, Field

from .asking import NotAsked, OddAnswer, first_answer

#: Names, in lower case, of custom headers that are always credentials.
_CREDENTIALS = {"authorization", "proxy-authorization", "cookie"}
_REFUSALS = (401, 403)
#: Harmless, quick, and a POST, as a request that starts a run is: some gateways let anyone read.
_QUESTION: Literal["/flow_runs/count"] = "/flow_runs/count"
_NO_URL = "PREFECT_API_URL is not an address like http://127.0.0.1:4200/api"


class _ServerSettings(BaseModel):
    model_config = ConfigDict(frozen=True)

    host: str = Field(validation_alias=AliasPath("server", "api", "host"))


def api_url() -> httpx.URL:
    """The configured API's URL as httpx reads it, without user, password and query."""
    try:
        url = httpx.URL(str(PREFECT_API_URL.value()))
    except httpx.InvalidURL:
        raise NotAsked(_NO_URL) from None
    if url.scheme not in ("http", "https") or not url.host or not 0 < port_of(url) < 65536:
        raise NotAsked(_NO_URL)
    return url.copy_with(userinfo=b"", query=None, fragment=None)


def port_of(url: httpx.URL) -> int:
    return url.port if url.port is not None else {"http": 80, "https": 443}.get(url.scheme, 0)


def is_proxied(url: httpx.URL) -> bool:
    """Whether requests go through a proxy. A loopback address is then the proxy's, not ours."""
    proxies = getproxies()
    return bool(proxies.get(url.scheme) or proxies.get("all")) and not proxy_bypass(url.host)


def is_open(url: httpx.URL) -> bool:
    """Whether the API accepts a stranger's request. Raises `NotAsked`. Sends one or two requests, rarely more.

    Prefect's own client asks, with its CA and proxy, without credentials. A custom header may be a credential, so the
    custom headers are sent only if the answer without them is unclear.
    """
    try:
        return _lets_in(url, {})
    except OddAnswer:
        headers = {
            name: value
            for name, value in PREFECT_CLIENT_CUSTOM_HEADERS.value().items()
            if name.lower() not in _CREDENTIALS
        }
        if not headers:
            raise
    if _lets_in(url, headers):
        raise OddAnswer(
            "it lets in anyone who sends the headers in PREFECT_CLIENT_CUSTOM_HEADERS, which may not be secret, and "
            "its answer without them is unclear: set PREFECT_SERVER_API_AUTH_STRING for its server, or make the "
            "gateway in front of it answer HTTP 401"
        )
    return False


def listens_on(url: httpx.URL) -> str:
    """The host that the server's settings tell it to listen on; empty if they can't be read.

    `prefect server start --host` is not among these settings.
    """
    try:
        answer = first_answer(url, "GET", "/admin/settings", {})
        return _ServerSettings.model_validate_json(answer.content).host if answer.is_success else ""
    except (NotAsked, ValueError):
        return ""


def _lets_in(url: httpx.URL, headers: Mapping[str, str]) -> bool:
    answer = first_answer(url, "POST", _QUESTION, headers)
    if _is_about_csrf(answer):
        # Anyone can get a token.
        answer = first_answer(url, "POST", _QUESTION, headers, has_csrf_token=True)
        if _is_about_csrf(answer):
            raise OddAnswer("its CSRF protection refuses the token that it gave")
    if answer.status_code in _REFUSALS or _leads_to_login(answer):
        return False
    if not answer.is_success:
        raise OddAnswer(f"it answers HTTP {answer.status_code}: does PREFECT_API_URL name the API of a Prefect server?")
    if not answer.content.strip().isdigit():
        raise OddAnswer(
            "what answers there is not a Prefect API: does PREFECT_API_URL end with `/api`? "
            "A login page in front of it must redirect or answer HTTP 401"
        )
    return True


def _is_about_csrf(answer: httpx.Response) -> bool:
    """Only the message shows this. Prefect's own client also looks at it."""
    return answer.status_code == httpx.codes.FORBIDDEN and b"csrf" in answer.content.lower()


def _leads_to_login(answer: httpx.Response) -> bool:
    """Whether it redirects strangers to another page. Raises `OddAnswer` if the API has only moved."""
    if not answer.has_redirect_location:
        return False
    try:
        target = answer.request.url.join(answer.headers["Location"])
    except httpx.InvalidURL:
        raise OddAnswer("it redirects to an invalid address") from None
    if not target.path.rstrip("/").endswith((_QUESTION, "/csrf-token")):
        return True
    raise OddAnswer(f"it has moved to {target.scheme}://{target.netloc.decode()}: set PREFECT_API_URL to its address")
