"""The configured Prefect API: whether it answers, and what is wrong if it does not."""

from . import _django  # noqa: F401, I001 (sets Django up before anything else is imported)

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.exceptions import ObjectNotFound
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_CLIENT_MAX_RETRIES,
    PREFECT_UI_URL,
    get_current_settings,
    temporary_settings,
)

from container_manager.exceptions import ContainerManagerError

#: seconds; an API that has not answered by then counts as away.
PROBE_SECONDS = 3
#: The API returns no more at once.
PAGE = 200
#: Of one call in the midst of a pass: six seconds. A server on SQLite that is busy needs one.
_RETRIES = 2
#: Statuses that concern every request: refused authentication, too many requests, an API that is away.
_OF_ALL = (401, 403, 407, 429, 502, 503, 504)
#: seconds; of an API that has been found to be away in the midst of a pass.
_ABSENCE_SECONDS = 30


@dataclass
class _Absence:
    until: float = 0


_absence: ContextVar[_Absence | None] = ContextVar("container_manager_absence", default=None)


class FlowRunError(ContainerManagerError):
    """The flow run could not be run."""


class ApiUnusable(FlowRunError):
    """No flow run can be recorded at the configured API."""


class ApiNotConfigured(ApiUnusable):
    """no Prefect API is configured: set PREFECT_API_URL, or run `prefect config set PREFECT_API_URL=…`"""


class ApiRefused(ApiUnusable):
    """The Prefect API can't be reached."""


class ApiSilent(ApiUnusable):
    """The Prefect API does not answer."""


class ApiFailed(FlowRunError):
    """The Prefect API answers with an error."""


class AccessDenied(ApiUnusable):
    """The Prefect API refuses the authentication."""


def check_api() -> str:
    """Where the runs can be watched, if the configured API answers us in time; else a `FlowRunError` says why not."""
    probe(lambda client: client.hello())
    return str(PREFECT_UI_URL.value() or PREFECT_API_URL.value()).removesuffix("/api")


@contextmanager
def connected(seconds: float) -> Iterator[SyncPrefectClient]:
    if not PREFECT_API_URL.value():
        raise ApiNotConfigured
    with get_client(httpx_settings={"timeout": seconds}, sync_client=True) as client:
        yield client


def probe(ask: Callable[[SyncPrefectClient], Any]) -> None:
    """Ask within the time in any case: neither a name that can't be resolved nor a dead route holds us up."""
    answers: list[FlowRunError | None] = []

    def run() -> None:
        try:
            with (
                translated(PROBE_SECONDS),
                temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}),
                connected(PROBE_SECONDS) as client,
            ):
                ask(client)
        except FlowRunError as e:
            answers.append(e)
        else:
            answers.append(None)

    thread = threading.Thread(target=copy_context().run, args=(run,), name="probe-prefect", daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    if thread.is_alive():
        raise ApiSilent(_silence(PROBE_SECONDS))
    answer = answers[0] if answers else FlowRunError("the Prefect API could not be asked: see above")
    if answer is not None:
        raise answer


@contextmanager
def without_patience() -> Iterator[None]:
    """Within, a call to an API that has gone away fails after seconds, and is spared for a while once one has: the
    queue goes on without it.

    What a flow run has to say at its end is not within, and may be tried for minutes.
    """
    retries = min(_RETRIES, PREFECT_CLIENT_MAX_RETRIES.value())
    token = _absence.set(_Absence())
    try:
        with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: retries}):
            yield
    finally:
        _absence.reset(token)


def is_away() -> bool:
    """Whether a call `without_patience` has just found the API away: what can be spared is not asked again."""
    absence = _absence.get()
    return absence is not None and time.monotonic() < absence.until


@contextmanager
def translated(seconds: float | None = None) -> Iterator[None]:
    """Foreign errors as ours, by their types and status codes; `seconds`: how long an answer is waited for."""
    try:
        yield
    except httpx.TimeoutException as e:
        raise ApiSilent(_silence(seconds)) from e
    except httpx.HTTPStatusError as e:
        status = e.response.status_code
        if status in (401, 403):
            raise AccessDenied(
                f"the Prefect API at {PREFECT_API_URL.value()} refuses the authentication (HTTP {status}): set "
                "PREFECT_API_AUTH_STRING or PREFECT_API_KEY"
            ) from e
        raise ApiFailed(
            f"the Prefect API at {PREFECT_API_URL.value()} answers HTTP {status}: {detail_of(e.response)}"
        ) from e
    except ObjectNotFound as e:
        raise ApiFailed(f"the Prefect server no longer has what was asked for: {e}") from e
    except (httpx.HTTPError, httpx.InvalidURL) as e:
        raise ApiRefused(
            f"the Prefect API at {PREFECT_API_URL.value()} can't be reached ({str(e) or type(e).__name__}): "
            "is `prefect server start` running?"
        ) from e
    except ValueError as e:
        raise ApiFailed(
            f"what answers at {PREFECT_API_URL.value()} speaks another language than this Prefect "
            f"({type(e).__name__}): is it a Prefect server of the same version?"
        ) from e


def noted(error: Exception) -> int:
    """The level for a line on what could not be asked or said. An API that is away is told of by whoever began the
    flow run; here it is noted, for `is_away`.
    """
    if not isinstance(error, httpx.TransportError) and not isinstance(error.__cause__, httpx.TransportError):
        return logging.WARNING
    if (absence := _absence.get()) is not None:
        absence.until = time.monotonic() + _ABSENCE_SECONDS
    return logging.INFO


def is_of_one(error: httpx.HTTPStatusError) -> bool:
    """Whether the error concerns only this request, and the API still answers others.

    For example, the API answers 500 for every list with a flow run that it can't write as JSON.
    """
    return error.response.status_code not in _OF_ALL


def _silence(seconds: float | None) -> str:
    how_long = "in time" if seconds is None else f"within {seconds:g} s"
    return f"the Prefect API at {PREFECT_API_URL.value()} does not answer {how_long}"


def server_time(response: httpx.Response) -> datetime:
    """By the server's clock, to the second; by ours if the answer has no date."""
    with suppress(KeyError, ValueError):
        return parsedate_to_datetime(response.headers["date"])
    return datetime.now(UTC)


def child_environment() -> dict[str, str]:
    """Of a process that is to speak to the same API: ours, with the settings that a Prefect profile adds."""
    return {**os.environ, **get_current_settings().to_environment_variables(exclude_unset=True)}


def detail_of(response: httpx.Response) -> str:
    try:
        body = response.json()
    except ValueError:
        return response.reason_phrase
    detail = body.get("detail", body) if isinstance(body, dict) else body
    return " ".join(str(detail).split())[:500]
