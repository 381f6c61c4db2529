"""Files for their owner alone, whatever the umask: they hold what jobs print, their environment, and passwords."""

import os
import sqlite3
from contextlib import suppress
from pathlib import Path
from typing import Any

FILE_MODE, FOLDER_MODE = 0o600, 0o700
#: What SQLite keeps beside a database; it makes them with the mode that the database has then.
_BESIDE = ("", "-wal", "-shm", "-journal")


def tighten(path: Path) -> None:
    """Take from a file or folder what others may do with it. Not there, or not ours to change: it stays as it is."""
    with suppress(FileNotFoundError, PermissionError):
        mode = path.stat().st_mode
        if mode & 0o077:
            path.chmod(mode & 0o700)


def make_folder(path: Path) -> None:
    """With mode 0700, also where it is there already; its parents are not ours."""
    path.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
    tighten(path)


class NewDatabaseIsPrivate(sqlite3.Connection):
    """Makes a database that is not there yet with mode 0600; one that is there has the mode that somebody gave it."""

    def __init__(self, database: Any, *args: Any, **kwargs: Any) -> None:
        if _is_file(database):
            self.prepare(Path(os.fsdecode(database)))
        super().__init__(database, *args, **kwargs)

    def prepare(self, path: Path) -> None:
        # Before SQLite does it. What keeps us from it keeps SQLite, too, which has words for it.
        with suppress(OSError):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, FILE_MODE))


class DatabaseIsPrivate(NewDatabaseIsPrivate):
    """One that is there already gets the mode, too: for a place that nobody chose."""

    def prepare(self, path: Path) -> None:
        super().prepare(path)
        for suffix in _BESIDE:
            tighten(path.with_name(path.name + suffix))


def _is_file(database: Any) -> bool:
    return not os.fsdecode(database).startswith((":memory:", "file:")) and bool(os.fsdecode(database))
