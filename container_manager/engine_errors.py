"""What docker-py raises, turned into our own exceptions by step, class and status. Texts are never looked at."""

import json
import socket
import ssl
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import docker.errors
import requests
import urllib3.exceptions

from .exceptions import (
    ContainerGone,
    ContainerManagerError,
    ContainerNotRunning,
    ContainerRunning,
    EngineError,
    EngineFailed,
    HostMisconfigured,
    HostUnavailable,
    ImageMissing,
    LogsUnavailable,
    NameTaken,
    NetworkMissing,
    OutcomeUnknown,
    RequestRefused,
)

Step = Literal[
    "version", "identify", "daemon", "networks", "create", "connect", "start", "list", "inspect", "logs", "signal",
    "remove", "pull", "events",
]  # fmt: skip

#: After these a lost answer leaves open what happened. A pull that happens later harms nobody.
_SIDE_EFFECTS = ("create", "connect", "start", "signal", "remove")

#: What a proxy, or an Engine on its way up or down, answers.
_GATEWAY = (502, 503, 504)
#: Measured on real Engines, 20.10 and newer.
_BY_STEP: dict[tuple[Step, int], type[EngineError]] = {
    # A proxy in front of the socket may forbid listing networks. Everything else still works on that host.
    **{("networks", status): EngineFailed for status in (401, 403, 404, 407)},
    ("create", 404): ImageMissing,
    ("create", 409): NameTaken,
    ("connect", 404): NetworkMissing,
    ("signal", 409): ContainerNotRunning,
    ("remove", 409): ContainerRunning,
    ("pull", 404): ImageMissing,
    # Engines hand a registry's own status on: the image is refused, not the Engine's host at fault.
    **{("pull", status): EngineFailed for status in (401, 403, 407, *_GATEWAY)},
    ("logs", 409): ContainerGone,
    ("logs", 500): LogsUnavailable,
    ("logs", 501): LogsUnavailable,
}
_BY_STATUS: dict[int, type[EngineError]] = {
    400: RequestRefused,
    # A proxy before the socket says these.
    401: HostMisconfigured,
    403: HostMisconfigured,
    407: HostMisconfigured,
    404: ContainerGone,
}

_TRANSPORT = (requests.exceptions.RequestException, urllib3.exceptions.HTTPError, OSError, struct.error)
#: Before anything was sent.
_NOT_CONNECTED = (
    FileNotFoundError,
    ConnectionRefusedError,
    socket.gaierror,
    requests.exceptions.ConnectTimeout,
    urllib3.exceptions.NewConnectionError,
    urllib3.exceptions.ConnectTimeoutError,
)
#: A connection that was there, and on which nothing came for longer than the call may take.
_SILENT = (TimeoutError, requests.exceptions.ReadTimeout, urllib3.exceptions.ReadTimeoutError)
_NOT_ALLOWED = (PermissionError, ssl.SSLError, requests.exceptions.SSLError)
_NOT_JSON = (json.JSONDecodeError, requests.exceptions.JSONDecodeError)
_ODD_CONTENT = (LookupError, TypeError, AttributeError, ValueError)

#: characters; what an Engine says may be a page of HTML, or repeat what it was sent.
_MESSAGE_LENGTH = 2000


@contextmanager
def translated(step: Step) -> Iterator[None]:
    """Let nothing foreign out: what is raised within becomes an `EngineError`."""
    try:
        yield
    except (docker.errors.DockerException, *_TRANSPORT, *_ODD_CONTENT) as e:
        raise _ours(step, e) from e


@contextmanager
def parsing(step: Step) -> Iterator[None]:
    """For what is done with an answer: what lacks the fields of one was not sent by a Docker Engine."""
    try:
        yield
    except _ODD_CONTENT as e:
        raise HostMisconfigured(f"{step}: what answers is no Docker Engine: {type(e).__name__}") from e


def storable(text: str) -> str:
    """Foreign text as the database can hold it, and as a person can read it."""
    text = text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode(errors="replace").decode().strip()
    return text if len(text) <= _MESSAGE_LENGTH else f"{text[:_MESSAGE_LENGTH]}…"


def _ours(step: Step, error: Exception) -> EngineError:
    chain = list(_causes(error))
    message = storable(f"{step}: {_explanation(error, chain[-1])}")
    answer = next((link.response for link in chain if isinstance(link, requests.exceptions.HTTPError)), None)
    if answer is not None:
        return _by_status(step, answer.status_code, message)
    if _is_any(chain, _NOT_ALLOWED):
        return HostMisconfigured(message)
    if _is_any(chain, _NOT_CONNECTED):
        return HostUnavailable(message)
    if _is_any(chain, _NOT_JSON):
        return HostMisconfigured(storable(f"{step}: what answers is no Docker Engine: {chain[-1]}"))
    if step == "pull" and _is_any(chain, _SILENT):
        # It took too long; the Engine itself answers others.
        return EngineFailed(message)
    if _is_any(chain, _TRANSPORT):
        return OutcomeUnknown(message) if step in _SIDE_EFFECTS else HostUnavailable(message)
    if step in ("version", "identify"):
        # docker-py can't use the address, a certificate, or what answers.
        return HostMisconfigured(message)
    # docker-py checks arguments itself, before anything is sent.
    return RequestRefused(message)


def _by_status(step: Step, status: int, message: str) -> EngineError:
    if of_this_step := _BY_STEP.get((step, status)):
        return of_this_step(message)
    kind = _BY_STATUS.get(status, EngineFailed)
    if step == "version":
        # Nothing was asked for yet; whatever is wrong there may pass.
        return HostMisconfigured(message) if kind is HostMisconfigured else HostUnavailable(message)
    if status in _GATEWAY:
        return OutcomeUnknown(message) if step in _SIDE_EFFECTS else HostUnavailable(message)
    return kind(message)


def _explanation(error: Exception, innermost: BaseException) -> str:
    explanation = getattr(error, "explanation", None)
    return str(explanation or innermost)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """From the outermost on; what led to one of our own exceptions is another story."""
    current: BaseException | None = error
    while current is not None and not isinstance(current, ContainerManagerError):
        yield current
        current = current.__cause__ or current.__context__


def _is_any(chain: list[BaseException], kinds: tuple[type[BaseException], ...]) -> bool:
    return any(isinstance(link, kinds) for link in chain)
