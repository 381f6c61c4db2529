"""The values behind a job's secret references: resolved where the job is launched, and kept out of every text."""

import json
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property

from django.db import connections
from django.utils.module_loading import import_string

from .conf import get_settings
from .exceptions import SecretUnavailable
from .types import is_clean

logger = logging.getLogger(__name__)

#: characters; a shorter line of a secret that has several is no secret.
_SECRET_LENGTH = 6
#: What a stream becomes that could not be masked.
_WITHHELD = "[withheld: the job has secrets, and what they are can't be found out here]"


def resolve(references: Mapping[str, str]) -> dict[str, str]:
    """Variable -> value. Slow, as its resolver may ask a server: to be called in a thread of a host's.

    Raises `SecretUnavailable`, without the value.
    """
    try:
        resolver: Callable[[str], str] = import_string(get_settings().SECRET_RESOLVER or "")
    except ImportError as e:
        raise SecretUnavailable(f"the setting SECRET_RESOLVER can't be imported: {e}") from e
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


def masked(text: str, values: Mapping[str, str]) -> str:
    """The text without the values, as they are and as Go and JSON quote them."""
    forms = {
        form
        for value in values.values()
        for form in (value, json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1])
        if form
    }
    # The longest first: one may be the beginning of another.
    for form in sorted(forms, key=len, reverse=True):
        text = text.replace(form, "***")
    return text


class Masking:
    """Puts stars for a job's secrets into what it writes."""

    def __init__(self, references: dict[str, str]) -> None:
        self._references = references

    def mask(self, text: str) -> str:
        if not text or not self.is_needed:
            return text
        return masked(text, self._values) if self._values is not None else _WITHHELD

    @property
    def is_needed(self) -> bool:
        return bool(self._references)

    @property
    def is_possible(self) -> bool:
        return not self.is_needed or self._values is not None

    @cached_property
    def _values(self) -> dict[str, str] | None:
        # In a thread: what resolves them may use the database, and its thread's connections are closed after it.
        with ThreadPoolExecutor(1) as executor:
            try:
                values = executor.submit(resolve, self._references).result()
            except SecretUnavailable as e:
                logger.warning("what the job writes is not shown, nor stored: %s", e)
                return None
        # A key of many lines is written as lines.
        lines = {line for value in values.values() for line in value.splitlines() if len(line) >= _SECRET_LENGTH}
        return values | {line: line for line in lines}
