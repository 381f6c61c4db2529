"""How long another's lock is waited for, and what a database says that is busy."""

from collections.abc import Iterator
from contextlib import contextmanager

from django.db import OperationalError, connection, transaction

from .conf import get_settings
from .exceptions import ContainerManagerError, DatabaseBusy

#: PostgreSQL's lock_not_available.
_LOCK_NOT_AVAILABLE = "55P03"
#: SQLite's SQLITE_BUSY and SQLITE_LOCKED; the low byte of what it says is the primary code.
_SQLITE_BUSY = (5, 6)


def refuse_in_transaction() -> None:
    """A transaction that spans a call to an Engine would hold its locks for as long as that takes."""
    if connection.in_atomic_block:
        raise ContainerManagerError("Engines are not spoken to within a transaction: call this outside of any")


@contextmanager
def transaction_within(lock_seconds: float) -> Iterator[None]:
    """A transaction in which no lock is waited for longer: then it raises `DatabaseBusy`."""
    with _raising_busy(lock_seconds):
        if connection.vendor == "postgresql":
            with transaction.atomic():
                _set_for_transaction(lock_timeout=lock_seconds, **_if_stalled())
                yield
            return
        # On SQLite the lock is the one that BEGIN takes.
        with _sqlite_patience(lock_seconds), transaction.atomic():
            yield


@contextmanager
def bounded_transaction() -> Iterator[None]:
    """A transaction that its process loses if it stalls within: what it has locked, another pass waits for.

    On SQLite only the end of the process ends its transaction.
    """
    with transaction.atomic():
        if connection.vendor == "postgresql":
            _set_for_transaction(**_if_stalled())
        yield


@contextmanager
def statements_within(lock_seconds: float) -> Iterator[None]:
    """The same for statements of their own, where SQLite's one lock is what they wait for."""
    with _raising_busy(lock_seconds), _sqlite_patience(lock_seconds):
        yield


def _if_stalled() -> dict[str, float]:
    return {"idle_in_transaction_session_timeout": get_settings().LEASE_SECONDS}


def _set_for_transaction(**seconds: float) -> None:
    with connection.cursor() as cursor:
        cursor.execute(
            f"SELECT {', '.join(['set_config(%s, %s, true)'] * len(seconds))}",
            [part for name, value in seconds.items() for part in (name, f"{value * 1000:.0f}ms")],
        )


@contextmanager
def _raising_busy(seconds: float) -> Iterator[None]:
    try:
        yield
    except OperationalError as e:
        cause = e.__cause__
        is_busy = (
            getattr(cause, "sqlstate", None) == _LOCK_NOT_AVAILABLE
            or getattr(cause, "sqlite_errorcode", 0) & 0xFF in _SQLITE_BUSY
        )
        if not is_busy:
            raise
        raise DatabaseBusy(f"the queue's lock was not free within {round(seconds, 2):g} s") from e


@contextmanager
def _sqlite_patience(seconds: float) -> Iterator[None]:
    if connection.vendor != "sqlite" or connection.in_atomic_block:
        yield
        return
    usual = connection.settings_dict["OPTIONS"].get("timeout", 5)
    _set_busy_timeout(seconds)
    try:
        yield
    finally:
        _set_busy_timeout(usual)


def _set_busy_timeout(seconds: float) -> None:
    with connection.cursor() as cursor:
        cursor.execute(f"PRAGMA busy_timeout = {seconds * 1000:.0f}")
