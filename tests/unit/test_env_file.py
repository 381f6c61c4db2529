"""`.env` of the checkout, where `make serve` keeps its Prefect server's address and password."""

import os
import re
from pathlib import Path

import pytest
from dotenv import dotenv_values

from deployments.first_look.env_file import EnvFile
from deployments.first_look.errors import CannotStart

URL, PASSWORD = "PREFECT_API_URL", "PREFECT_API_AUTH_STRING"
API = "http://127.0.0.1:4200/api"
ELSEWHERE = "https://prefect.example/api"


def mode_of(path: Path) -> int:
    return path.stat().st_mode & 0o777


def start(path: Path, port: int = 4200) -> str:
    """The password, as a start of `make serve` settles it."""
    return EnvFile.read(path).own_server(port)[0].password


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / ".env"


@pytest.fixture(params=[0o022, 0o000], ids=["umask 022", "umask 000"])
def umask(request: pytest.FixtureRequest) -> object:
    before = os.umask(request.param)
    yield
    os.umask(before)


@pytest.mark.usefixtures("umask")
def test_the_first_start_makes_a_password_and_the_file_for_its_owner_alone(path: Path) -> None:
    server, is_new = EnvFile.read(path).own_server(4200)

    assert dotenv_values(path) == {URL: API, PASSWORD: server.password}
    assert (is_new, mode_of(path)) == (True, 0o600)
    assert re.fullmatch(r"make-serve:[\w-]{40,}", server.password)
    assert [entry.name for entry in path.parent.iterdir()] == [".env"]


def test_a_later_start_takes_the_same_password_and_changes_nothing(path: Path) -> None:
    password = start(path)
    before = path.read_bytes()

    again, is_new = EnvFile.read(path).own_server(4200)

    assert (again.password, is_new, path.read_bytes()) == (password, False, before)


def test_another_port_is_another_address_with_the_same_password(path: Path) -> None:
    path.write_bytes(b"FIRST=1\n")
    password = start(path)
    before = path.read_bytes()

    again = start(path, 4300)

    assert again == password
    assert path.read_bytes() == before.replace(b":4200/", b":4300/")
    assert EnvFile.read(path).api_of_somebody() == ""


KEPT = {
    "nothing": b"",
    "lines and comments": b"# mine\n\nFIRST=1\n  SECOND = 'two'  # why\n",
    "no newline at the end": b"FIRST=1",
    "carriage returns": b"FIRST=1\r\n# mine\r\n",
    "export": b"export FIRST=1\nexport SECOND='a b'\n",
    "quotes": b"FIRST=\"a # b\"\nSECOND='c\\nd'\n",
    "several lines": b'FIRST="one\nPREFECT_API_URL=http://in.a.value/api\nthree"\nSECOND=2\n',
    "commented out": b"#PREFECT_API_URL=http://old.example/api\n# PREFECT_API_AUTH_STRING=old:secret\n",
    "other names that begin so": b"PREFECT_API_URL_OLD=http://old.example/api\nMY_PREFECT_API_URL=x\n",
    "no value": b"FIRST\nSECOND=\n",
    "not quite right": b"FIRST='never ended\nSECOND=2\n",
    "other letters": "# für später\nFIRST=\u00fc\n".encode(),
    "a mark of the order of bytes": b"\xef\xbb\xbfFIRST=1\n",
    "tabs and blanks at the end": b"FIRST=1\n\t \n\n",
}


@pytest.mark.parametrize("text", KEPT.values(), ids=KEPT)
def test_what_a_person_has_written_stays_byte_for_byte(path: Path, text: bytes) -> None:
    path.write_bytes(text)
    before = dotenv_values(path)
    password = start(path)

    written = path.read_bytes()
    assert written.startswith(text)
    assert dotenv_values(path) == before | {URL: API, PASSWORD: password}
    assert start(path) == password
    assert path.read_bytes() == written
    ends = {b"\r\n" if line.endswith(b"\r\n") else b"\n" for line in written.splitlines(keepends=True)}
    assert len(ends) == 1


EMPTY = {
    "empty": (b"PREFECT_API_URL=\nFIRST=1\n", b"PREFECT_API_URL=http://127.0.0.1:4200/api\nFIRST=1\n"),
    "in quotes": (b'PREFECT_API_URL=""\nFIRST=1\n', b"PREFECT_API_URL=http://127.0.0.1:4200/api\nFIRST=1\n"),
    "with a comment": (b"PREFECT_API_URL= # none yet\n", b"PREFECT_API_URL=http://127.0.0.1:4200/api # none yet\n"),
    "without a sign": (b"PREFECT_API_URL\nFIRST=1\n", b"PREFECT_API_URL=http://127.0.0.1:4200/api\nFIRST=1\n"),
    "exported": (b"export PREFECT_API_URL=\r\n", b"export PREFECT_API_URL=http://127.0.0.1:4200/api\r\n"),
    "in small letters": (b"prefect_api_url=\n", b"prefect_api_url=http://127.0.0.1:4200/api\n"),
    "after blank lines": (b"A=1\n\n PREFECT_API_URL=\n", b"A=1\n\n PREFECT_API_URL=http://127.0.0.1:4200/api\n"),
    "twice": (
        b"PREFECT_API_URL=\nPREFECT_API_URL=\n",
        b"PREFECT_API_URL=\nPREFECT_API_URL=http://127.0.0.1:4200/api\n",
    ),
}


@pytest.mark.parametrize(("text", "expected"), EMPTY.values(), ids=EMPTY)
def test_a_name_without_a_value_gets_one_where_it_stands(path: Path, text: bytes, expected: bytes) -> None:
    path.write_bytes(text)

    start(path)

    assert path.read_bytes().startswith(expected)


@pytest.mark.parametrize("ends", [b"\n", b"\r\n"])
def test_a_line_of_ours_that_somebody_has_moved_or_exported_is_still_ours(path: Path, ends: bytes) -> None:
    password = start(path)
    lines = path.read_bytes().splitlines()
    path.write_bytes(ends.join([b"export " + lines[2], b"FIRST=1", lines[1] + b"  # note", b"", lines[0]]) + ends)

    again = start(path, 4300)

    assert again == password
    moved = [b"export " + lines[2], b"FIRST=1", lines[1] + b"  # note", b"", lines[0]]
    assert path.read_bytes() == (ends.join(moved) + ends).replace(b":4200/", b":4300/")


THEIRS = {
    "an address": f"{URL}={ELSEWHERE}\n",
    "in quotes": f'{URL}="{ELSEWHERE}"\n',
    "exported": f"export {URL}={ELSEWHERE}\n",
    "in small letters": f"prefect_api_url={ELSEWHERE}\n",
    "put together": f"HOST=prefect.example\n{URL}=https://${{HOST}}/api\n",
    "the last of two": f"{URL}={API}\n{URL}={ELSEWHERE}\n",
}


@pytest.mark.parametrize("text", THEIRS.values(), ids=THEIRS)
def test_a_server_that_a_person_has_named_is_theirs(path: Path, text: str) -> None:
    path.write_text(text)

    assert EnvFile.read(path).api_of_somebody() == ELSEWHERE


def test_so_is_one_that_looks_like_ours_and_one_in_the_place_of_ours(path: Path) -> None:
    path.write_text(f"{URL}={API}\n")
    looks = EnvFile.read(path).api_of_somebody()
    path.unlink()
    start(path)
    path.write_text(path.read_text().replace(f"{URL}={API}", f"{URL}={ELSEWHERE}"))

    assert (looks, EnvFile.read(path).api_of_somebody()) == (API, ELSEWHERE)


def test_the_last_of_two_is_ours_if_we_wrote_it(path: Path) -> None:
    start(path)
    path.write_text(f"{URL}={ELSEWHERE}\n{path.read_text()}")

    assert EnvFile.read(path).api_of_somebody() == ""


def test_a_password_that_a_person_has_chosen_becomes_the_servers(path: Path) -> None:
    path.write_text(f"{PASSWORD}='me:a # word'\n")

    assert start(path) == "me:a # word"
    assert start(path, 4300) == "me:a # word"
    assert path.read_text().startswith(f"{PASSWORD}='me:a # word'\n")


@pytest.mark.parametrize("mode", [0o644, 0o666, 0o640, 0o604])
def test_a_file_that_others_may_read_is_shut_whether_it_changes_or_not(path: Path, mode: int) -> None:
    path.write_text("FIRST=1\n")
    path.chmod(mode)
    start(path)
    changed = mode_of(path)
    path.chmod(mode)
    start(path)

    assert (changed, mode_of(path)) == (0o600, 0o600)


def test_others_who_have_opened_it_before_never_see_the_password(path: Path) -> None:
    path.write_text("FIRST=1\n")
    path.chmod(0o644)
    with path.open() as opened:
        password = start(path)

        assert password not in opened.read()


def test_where_a_link_leads_the_file_is_changed_and_the_link_stays(path: Path) -> None:
    kept = path.parent / "kept.env"
    kept.write_text("FIRST=1\n")
    path.symlink_to(kept.name)

    password = start(path)

    assert (path.is_symlink(), kept.is_symlink(), mode_of(kept)) == (True, False, 0o600)
    assert dotenv_values(kept) == {"FIRST": "1", URL: API, PASSWORD: password}


def test_a_file_that_cannot_be_read_or_written_is_told_in_a_line(path: Path) -> None:
    path.mkdir()
    with pytest.raises(CannotStart, match=r"\.env can't be read: .*move it away, or set PREFECT_API_URL"):
        EnvFile.read(path)
    path.rmdir()
    path.symlink_to("nowhere/at.all")
    with pytest.raises(CannotStart, match=r"can't be written: .*set PREFECT_API_URL"):
        start(path)
    path.unlink()
    path.write_bytes(b"FIRST=\xff\n")
    with pytest.raises(CannotStart, match=r"can't be read"):
        EnvFile.read(path)


def test_a_value_that_cannot_be_replaced_is_left_to_the_person(path: Path) -> None:
    path.write_text(f'{URL}="  "\n')

    with pytest.raises(CannotStart, match=f"correct {URL} and {PASSWORD} there"):
        start(path)
    assert path.read_text() == f'{URL}="  "\n'


def test_a_start_that_is_killed_midway_leaves_what_was_there(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_text("FIRST=1\n")

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        start(path)

    assert [entry.read_text() for entry in path.parent.iterdir()] == ["FIRST=1\n"]
