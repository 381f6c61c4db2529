"""What the standalone site makes is for its owner alone, whatever the umask."""

import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from container_manager.private_files import DatabaseIsPrivate, NewDatabaseIsPrivate, make_folder, tighten
from tests.conftest import ROOT


@pytest.fixture(params=[0o022, 0o000], ids=["umask 022", "umask 000"], autouse=True)
def umask(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.umask(request.param)
    yield
    os.umask(before)


def modes(path: Path) -> dict[str, str]:
    return {entry.name: oct(entry.stat().st_mode & 0o777) for entry in path.parent.glob(f"{path.name}*")}


def fill(path: Path, factory: type[sqlite3.Connection]) -> dict[str, str]:
    """The modes of the database and what is beside it, in the midst of its use."""
    with closing(sqlite3.connect(path, factory=factory)) as database:
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("CREATE TABLE IF NOT EXISTS t (x)")
        database.commit()
        return modes(path)


@pytest.mark.parametrize("factory", [NewDatabaseIsPrivate, DatabaseIsPrivate])
def test_a_new_database_is_private_and_so_is_what_sqlite_keeps_beside_it(
    tmp_path: Path, factory: type[sqlite3.Connection]
) -> None:
    assert fill(tmp_path / "db", factory) == {"db": "0o600", "db-wal": "0o600", "db-shm": "0o600"}


@pytest.mark.parametrize(("factory", "mode"), [(NewDatabaseIsPrivate, "0o644"), (DatabaseIsPrivate, "0o600")])
def test_one_that_is_there_is_changed_only_in_the_place_that_is_ours(
    tmp_path: Path, factory: type[sqlite3.Connection], mode: str
) -> None:
    path = tmp_path / "db"
    with closing(sqlite3.connect(path)) as other:
        other.execute("PRAGMA journal_mode=WAL")
        other.execute("CREATE TABLE other (x)")
        other.commit()
        for entry in tmp_path.iterdir():
            entry.chmod(0o644)
        found = fill(path, factory)

    assert found == {"db": mode, "db-wal": mode, "db-shm": mode}


def test_a_database_in_memory_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (":memory:", "file:shared?mode=memory&cache=shared", ""):
        with closing(sqlite3.connect(name, factory=DatabaseIsPrivate, uri=True)) as database:
            database.execute("CREATE TABLE t (x)")

    assert list(tmp_path.iterdir()) == []


def test_a_database_that_cannot_be_made_is_told_by_sqlite(tmp_path: Path) -> None:
    with pytest.raises(sqlite3.OperationalError, match="unable to open database file"):
        sqlite3.connect(tmp_path / "none" / "db", factory=DatabaseIsPrivate)


@pytest.mark.parametrize("there", [False, True], ids=["new", "there already"])
def test_the_site_uses_it(tmp_path: Path, there: bool) -> None:
    path = tmp_path / "mine.sqlite3"
    if there:
        path.touch(mode=0o640)
        path.chmod(0o640)
    env = os.environ | {"DATABASE_URL": f"sqlite:///{path}", "DJANGO_SETTINGS_MODULE": "container_manager.settings"}
    subprocess.run([sys.executable, str(ROOT / "manage.py"), "migrate", "-v0"], env=env, cwd=tmp_path, check=True)

    # A file that the person has chosen and shared stays shared.
    assert modes(path)["mine.sqlite3"] == ("0o640" if there else "0o600")


def test_a_folder_is_made_private_or_becomes_so(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir(mode=0o777)
    (tmp_path / "old").chmod(0o755)
    make_folder(tmp_path / "old")
    make_folder(tmp_path / "new")

    assert modes(tmp_path / "old") | modes(tmp_path / "new") == {"old": "0o700", "new": "0o700"}


def test_what_is_not_there_or_private_already_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "read only").touch()
    (tmp_path / "read only").chmod(0o400)
    tighten(tmp_path / "read only")
    tighten(tmp_path / "none")

    assert modes(tmp_path / "read only") == {"read only": "0o400"}
