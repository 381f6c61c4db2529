"""Asks the Prefect API with Prefect's own client, but without credentials."""

from . import _django  # noqa: F401, I001 (sets Django up before anything else is imported)

import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import copy_context
from typing import Literal, TypeVar

import httpx
from prefect.client.orchestration import SyncPrefectClient
from prefect.context import SettingsContext, get_settings_context

from container_manager.exceptions import ContainerManagerError

#: seconds; in all. A busy server needs a few, and without an answer the run fails.
ANSWER_SECONDS = 10
#: Servers without CSRF protection, and older ones, give no token. Prefect's client then goes on without one.
_TOKEN_ANSWERS = (200, 404, 422)

_T = TypeVar("_T")


class NotAsked(ContainerManagerError):
    """The Prefect API could not be asked."""


class OddAnswer(NotAsked):
    """It could be reached, but did not answer as a Prefect API does."""


class _Answered(Exception):
    """Stops the client at the first answer. Otherwise it may wait and ask again, for hours if the server says so."""

    def __init__(self, response: httpx.Response) -> None:
        super().__init__(response.status_code)
        self.response = response


def first_answer(
    url: httpx.URL,
    method: Literal["GET", "POST"],
    path: Literal["/flow_runs/count", "/admin/settings"],
    headers: Mapping[str, str],
    *,
    has_csrf_token: bool = False,
) -> httpx.Response:
    """The first answer, whatever it is. Follows no redirect and retries nothing. Raises `NotAsked` without an answer.

    Uses the CA and the proxy from Prefect's settings and the environment. Sends only these custom `headers`. `url`
    must have no user and no password: httpx would send them.
    """

    def keep(response: httpx.Response) -> None:
        response.read()
        if not response.request.url.path.endswith("/csrf-token") or response.status_code not in _TOKEN_ANSWERS:
            raise _Answered(response)

    def ask() -> httpx.Response:
        with _client_settings(custom_headers=dict(headers), csrf_support_enabled=has_csrf_token, max_retries=0):
            with _unfit_settings():
                client = SyncPrefectClient(
                    str(url),
                    httpx_settings={
                        "timeout": ANSWER_SECONDS, "follow_redirects": False, "event_hooks": {"response": [keep]},
                    },
                )  # fmt: skip
            try:
                with _translated(), client:
                    return client.request(method, path, json={} if method == "POST" else None)
            except _Answered as e:
                return e.response

    return _within(ANSWER_SECONDS, ask)


@contextmanager
def _client_settings(**changes: object) -> Iterator[None]:
    """Replaces client settings. Prefect's own `temporary_settings` could only add to the custom headers."""
    context = get_settings_context()
    client = context.settings.client.model_copy(update=changes)
    with SettingsContext(profile=context.profile, settings=context.settings.model_copy(update={"client": client})):
        yield


def _within(seconds: float, ask: Callable[[], _T]) -> _T:
    """Runs in a thread, since httpx's timeouts limit neither a DNS lookup nor an answer that trickles in."""
    answer: Future[_T] = Future()

    def run() -> None:
        try:
            answer.set_result(ask())
        except NotAsked as e:
            answer.set_exception(e)

    threading.Thread(target=copy_context().run, args=(run,), name="ask-prefect", daemon=True).start()
    try:
        return answer.result(seconds)
    except TimeoutError:
        raise NotAsked(_silence()) from None


def _silence() -> str:
    return f"it did not answer within {ANSWER_SECONDS} s"


@contextmanager
def _unfit_settings() -> Iterator[None]:
    """Reports unusable settings without the original message, which may repeat a secret value."""
    try:
        yield
    except (OSError, ImportError, TypeError, ValueError, httpx.InvalidURL) as e:
        raise NotAsked(
            f"Prefect's client can't be created with these settings ({type(e).__name__}): check "
            "PREFECT_API_SSL_CERT_FILE, PREFECT_CLIENT_CUSTOM_HEADERS and the proxy in HTTPS_PROXY or ALL_PROXY"
        ) from None


@contextmanager
def _translated() -> Iterator[None]:
    """Translates httpx's errors by their types. Their messages are left out: they may contain a header's value."""
    try:
        yield
    except httpx.TimeoutException:
        raise NotAsked(_silence()) from None
    except httpx.ProxyError:
        raise NotAsked(
            "the proxy that HTTP_PROXY, HTTPS_PROXY or ALL_PROXY names refuses to connect to it: list its host in "
            "NO_PROXY, or allow it in the proxy"
        ) from None
    except httpx.ConnectError as e:
        raise NotAsked(_why_unreachable(e)) from None
    except httpx.LocalProtocolError:
        raise NotAsked("a header in PREFECT_CLIENT_CUSTOM_HEADERS can't be sent") from None
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as e:
        raise OddAnswer(f"its answer can't be read as HTTP ({type(e).__name__}): is it a Prefect server?") from None


def _why_unreachable(error: BaseException) -> str:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return (
                f"its certificate is not trusted ({cause.verify_message}): "
                "set PREFECT_API_SSL_CERT_FILE to the file of its CA"
            )
        if isinstance(cause, ssl.SSLError):
            return f"the TLS handshake failed ({cause.reason}): should PREFECT_API_URL begin with http://?"
        if isinstance(cause, OSError) and cause.strerror:
            return f"it can't be reached ({cause.strerror}): is the server running, and PREFECT_API_URL right?"
        cause = cause.__cause__ or cause.__context__
    return "it can't be reached: is the server running, and PREFECT_API_URL right?"
