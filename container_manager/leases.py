"""Leases: how long a process may act on what it took, by a clock that nobody sets."""

import os
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from django.db.models import Q
from django.db.models.functions import Now

from .exceptions import LeaseExpired
from .models import Installation
from .transitions import from_now

#: Share of a lease after which its holder causes no more side effects; the rest is for the last of them.
_SAFE_SHARE = 0.8
#: seconds; renewed at each third.
WORK_LEASE_SECONDS = 15

_T = TypeVar("_T")


def holder() -> str:
    """Who holds a claim, for people."""
    return f"{socket.gethostname()}:{os.getpid()}"


@dataclass(frozen=True)
class Lease:
    """The monotonic side of a claim: the row's `claimed_until` is for the others."""

    token: str
    safe_until: float

    @classmethod
    def begin(cls, seconds: float) -> "Lease":
        """Call before the row is written, so that this side ends first."""
        return cls(token=secrets.token_hex(16), safe_until=time.monotonic() + seconds * _SAFE_SHARE)

    def check(self) -> None:
        if time.monotonic() >= self.safe_until:
            raise LeaseExpired

    def guard(self, call: Callable[[], _T]) -> Callable[[], _T]:
        """`call`, with the lease checked right before it, in the thread that makes it."""

        def guarded() -> _T:
            self.check()
            return call()

        return guarded


class WorkLease:
    """Held by the pass that stays to keep the slots full; the others do one round and end."""

    def __init__(self) -> None:
        self._token = secrets.token_hex(16)
        self._renew_at = 0.0
        self._is_free = Q(work_until__isnull=True) | Q(work_until__lt=Now()) | Q(work_token=self._token)

    def is_free(self) -> bool:
        """Whether it can be taken, or is ours. Reads only: on SQLite a write that comes to nothing waits, too."""
        return bool(Installation.objects.filter(self._is_free, pk=Installation.load().pk).exists())

    def acquire(self) -> bool:
        """Take or renew it. False: another holds it. Cheap to call often: it writes once in five seconds."""
        if time.monotonic() < self._renew_at:
            return True
        now = time.monotonic()
        taken = Installation.objects.filter(self._is_free, pk=Installation.load().pk).update(
            work_token=self._token, work_until=from_now(WORK_LEASE_SECONDS)
        )
        self._renew_at = now + WORK_LEASE_SECONDS / 3 if taken else 0.0
        return bool(taken)

    def release(self) -> None:
        self._renew_at = 0.0
        Installation.objects.filter(work_token=self._token).update(work_token="", work_until=None)
