"""Keeps the address and the password of our Prefect server in the checkout's `.env`, which Prefect's commands read.

Lines that a person has written stay, byte for byte. A comment marks the address that is ours.
"""

import os
import re
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from dotenv import dotenv_values
from dotenv.parser import Binding, parse_stream

from container_manager.private_files import tighten
from flows.shut_server import ShutServer, new_password

from .errors import CannotStart

URL, PASSWORD = "PREFECT_API_URL", "PREFECT_API_AUTH_STRING"
#: Both as JSON.
_GROUP = "PREFECT_API"
#: The beginning of the comment that marks our address; the address follows it.
_MARK = "# `make serve` runs a Prefect server, and keeps its address and its password here: "
#: An assignment: everything up to the end of the name; a value without spaces, or none; the rest of the line.
_ASSIGNMENT = re.compile(r"(\s*(?:export[^\S\r\n]+)?[^\s=#]+)[^\S\r\n]*(?:=[^\S\r\n]*[^\s#]*)?(.*)", re.DOTALL)


@dataclass(frozen=True)
class EnvFile:
    path: Path
    text: str

    @classmethod
    def read(cls, path: Path) -> "EnvFile":
        """An empty one if there is no file. Follows a link. Raises `CannotStart` if the file can't be read."""
        target = Path(os.path.realpath(path))
        try:
            return cls(target, target.read_bytes().decode())
        except FileNotFoundError:
            return cls(target, "")
        except (OSError, UnicodeDecodeError) as e:
            raise CannotStart(f"{path} can't be read: {e}; move it away, or set PREFECT_API_URL") from e

    def api_of_somebody(self) -> str:
        """The API that a person has set there; empty if there is none, or if it is ours."""
        if _GROUP in self._values():
            # Prefect would take it before our lines, and send our password there.
            raise CannotStart(f"{self.path}: write {URL} and {PASSWORD} there instead of {_GROUP}")
        url = self._value(URL)
        return "" if url in self._ours() else url

    def own_server(self, port: int) -> tuple[ShutServer, bool]:
        """Write our server's address and password to the file. Returns the server, and whether its password is new.

        A password that is already there is kept, whoever wrote it. Raises `CannotStart` if the file can't be written.
        """
        known = self._value(PASSWORD)
        server = ShutServer(port, known or new_password("make-serve"))
        new = self._with_mark(server.api)._with(URL, server.api)._with(PASSWORD, server.password)
        if new._values() != self._values() | {URL: server.api, PASSWORD: server.password}:
            raise CannotStart(f"{self.path}: correct {URL} and {PASSWORD} there, or remove them")
        if new.text == self.text:
            tighten(self.path)
        else:
            new._write()
        return server, not known

    def _value(self, name: str) -> str:
        return (self._values().get(name) or "").strip()

    def _values(self) -> dict[str, str | None]:
        """As Prefect reads them: names in any case, and the last of several values."""
        return {name.upper(): value for name, value in dotenv_values(stream=StringIO(self.text)).items()}

    def _ours(self) -> list[str]:
        lines = (line.strip() for line in self.text.splitlines())
        return [line.removeprefix(_MARK) for line in lines if line.startswith(_MARK)]

    def _with_mark(self, url: str) -> "EnvFile":
        if url in self._ours():
            return self
        for known in self._ours():
            return EnvFile(self.path, self.text.replace(_MARK + known, _MARK + url))
        return self._with_line(_MARK + url)

    def _with(self, name: str, value: str) -> "EnvFile":
        if self._value(name) == value:
            return self
        bindings = list(parse_stream(StringIO(self.text, newline="")))
        places = [number for number, binding in enumerate(bindings) if (binding.key or "").upper() == name]
        if not places:
            return self._with_line(f"{name}={value}")
        lines = [binding.original.string for binding in bindings]
        lines[places[-1]] = _assigned(bindings[places[-1]], value)
        return EnvFile(self.path, "".join(lines))

    def _with_line(self, line: str) -> "EnvFile":
        end = "\r\n" if "\r\n" in self.text else "\n"
        before = self.text if not self.text or self.text.endswith(("\n", "\r")) else self.text + end
        return EnvFile(self.path, f"{before}{line}{end}")

    def _write(self) -> None:
        """Replace the file in one step. Other users can never read the new one, even if they could read the old one."""
        try:
            # Made with mode 0600.
            handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=f"{self.path.name}.")
            new = Path(name)
            try:
                with open(handle, "wb") as file:
                    file.write(self.text.encode())
                    file.flush()
                    os.fsync(file.fileno())
                    self._keep_owner(file.fileno())
                new.replace(self.path)
            finally:
                new.unlink(missing_ok=True)
        except OSError as e:
            raise CannotStart(
                f"{self.path}, where the Prefect server's password is kept, can't be written: {e}; make it and "
                "its folder writable for you, or set PREFECT_API_URL to use a server that runs"
            ) from e

    def _keep_owner(self, handle: int) -> None:
        with suppress(FileNotFoundError, PermissionError):
            known = self.path.stat()
            os.fchown(handle, known.st_uid, known.st_gid)


def _assigned(binding: Binding, value: str) -> str:
    """The same line with this value; the rest of it stays."""
    match = _ASSIGNMENT.fullmatch(binding.original.string)
    if match is None:
        return f"{binding.original.string}={value}"
    name, rest = match.groups()
    return f"{name}={value}{' ' if rest.startswith('#') else ''}{rest}"
