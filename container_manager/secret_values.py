"""The values behind a job's secret references: resolved where the job is launched, and kept out of every text."""

import json
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future

from django.db import connections
from django.utils.module_loading import import_string

from .conf import get_settings
from .exceptions import SecretUnavailable
from .types import Observation, is_clean

#: characters; a shorter line of a secret that has several is no secret.
_SECRET_LENGTH = 6


def resolve(references: Mapping[str, str]) -> dict[str, str]:
    """Variable -> value. Slow, as its resolver may ask a server: to be called in a thread of a host's.

    Raises `SecretUnavailable`, without the value, also if there is none within DOCKER_TIMEOUT_SECONDS.
    """
    seconds, answer = get_settings().DOCKER_TIMEOUT_SECONDS, Future[dict[str, str]]()
    # Daemon: what hangs can't be interrupted, and must keep neither the host's thread nor the process.
    threading.Thread(target=_answer, args=(answer, references), name="secrets", daemon=True).start()
    try:
        return answer.result(seconds)
    except TimeoutError:
        raise SecretUnavailable(f"secret_environment: the resolver did not answer within {seconds:g} s") from None


def _answer(answer: "Future[dict[str, str]]", references: Mapping[str, str]) -> None:
    try:
        answer.set_result(_resolved(references))
    except BaseException as e:  # noqa: BLE001 (it is raised where it is waited for)
        answer.set_exception(e)


def _resolved(references: Mapping[str, str]) -> dict[str, str]:
    try:
        resolver: Callable[[str], str] = import_string(get_settings().SECRET_RESOLVER or "")
    except ImportError as e:
        raise SecretUnavailable(f"the setting SECRET_RESOLVER can't be imported: {e}") from e
    except Exception as e:  # noqa: BLE001 (as below)
        raise SecretUnavailable(f"the setting SECRET_RESOLVER can't be imported: {type(e).__name__}") from None
    try:
        return {name: _value(name, reference, resolver) for name, reference in references.items()}
    finally:
        # A resolver may read the database; the thread's own connection would stay open.
        connections.close_all()


def _value(name: str, reference: str, resolver: Callable[[str], str]) -> str:
    try:
        value = str(resolver(reference))
    except Exception as e:  # noqa: BLE001 (foreign code may raise anything, and its message may hold the secret)
        raise SecretUnavailable(f"secret_environment: {name}: the resolver raised {type(e).__name__}") from None
    if not is_clean(value):
        raise SecretUnavailable(f"secret_environment: {name}: its value has a NUL or is no valid Unicode")
    return value


def given(references: Mapping[str, str], seen: Observation) -> dict[str, str]:
    """Variable -> value, as the container got it: its resolver may have another one by now, or be away."""
    return {name: seen.environment[name] for name in references if name in seen.environment}


def masked(text: str, values: Mapping[str, str]) -> str:
    """The text without the values, as they are and as Go and JSON quote them, and without their longer lines."""
    forms = {
        form
        for value in values.values()
        for form in (
            value,
            json.dumps(value)[1:-1],
            json.dumps(value, ensure_ascii=False)[1:-1],
            # A key of many lines is written as lines.
            *(line for line in value.splitlines() if len(line) >= _SECRET_LENGTH),
        )
        if form
    }
    # The longest first: one may be the beginning of another.
    for form in sorted(forms, key=len, reverse=True):
        text = text.replace(form, "***")
    return text
