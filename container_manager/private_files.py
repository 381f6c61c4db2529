"""Files that only their owner can read, whatever the umask: they hold passwords, and jobs' output and environment."""

import os
import sqlite3
from contextlib import suppress
from pathlib import Path
from typing import Any

FILE_MODE, FOLDER_MODE = 0o600, 0o700
#: The database and the files that SQLite creates next to it, with the database's mode at that time.
_BESIDE = ("", "-wal", "-shm", "-journal")


def tighten(path: Path) -> None:
    """Remove other users' access to a file or folder. Does nothing if it does not exist or is not ours."""
    with suppress(FileNotFoundError, PermissionError):
        mode = path.stat().st_mode
        if mode & 0o077:
            path.chmod(mode & 0o700)


def make_folder(path: Path) -> None:
    """Create the folder, or tighten an existing one, to mode 0700. Its parents keep their modes."""
    path.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
    tighten(path)


class NewDatabaseIsPrivate(sqlite3.Connection):
    """Creates a new database with mode 0600. An existing database keeps its mode."""

    def __init__(self, database: Any, *args: Any, **kwargs: Any) -> None:
        if _is_file(database):
            self.prepare(Path(os.fsdecode(database)))
        super().__init__(database, *args, **kwargs)

    def prepare(self, path: Path) -> None:
        # Create it before SQLite does. If that fails, SQLite fails as well and says why.
        with suppress(OSError):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, FILE_MODE))


class DatabaseIsPrivate(NewDatabaseIsPrivate):
    """Tightens an existing database as well. For the default path, which no one has chosen."""

    def prepare(self, path: Path) -> None:
        super().prepare(path)
        for suffix in _BESIDE:
            tighten(path.with_name(path.name + suffix))


def _is_file(database: Any) -> bool:
    return not os.fsdecode(database).startswith((":memory:", "file:")) and bool(os.fsdecode(database))
