"""The address and the password of our Prefect server, in the checkout's `.env`: every Prefect command reads it there.

What a person has written stays, byte for byte. A comment says which address is ours.
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
#: Ends with the address, and stays beside it.
_MARK = "# `make serve` runs a Prefect server, and keeps its address and its password here: "
#: A name that is set, and the value as we write it or none, with what may stand around them.
_ASSIGNMENT = re.compile(r"(\s*(?:export[^\S\r\n]+)?[^\s=#]+)[^\S\r\n]*(?:=[^\S\r\n]*[^\s#]*)?(.*)", re.DOTALL)


@dataclass(frozen=True)
class EnvFile:
    path: Path
    text: str

    @classmethod
    def read(cls, path: Path) -> "EnvFile":
        """Empty if it is not there; of a link, the file that it leads to. `CannotStart` if it can't be read."""
        target = Path(os.path.realpath(path))
        try:
            return cls(target, target.read_bytes().decode())
        except FileNotFoundError:
            return cls(target, "")
        except (OSError, UnicodeDecodeError) as e:
            raise CannotStart(f"{path} can't be read: {e}; move it away, or set PREFECT_API_URL") from e

    def api_of_somebody(self) -> str:
        """The API that a person has named there; empty if nobody has, or if it is ours."""
        url = self._value(URL)
        return "" if url in self._ours() else url

    def own_server(self, port: int) -> tuple[ShutServer, bool]:
        """Ours, on this port, as the file says from now on; whether its password was made just now.

        A password that is there, whoever wrote it, is taken. `CannotStart` if the file can't be written.
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
        """As Prefect reads them: whether in capitals or not, and the last one if there are two."""
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
        """At once or not at all; nobody else may read it at any time, also if it was open to others before."""
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
                f"{self.path}, where the Prefect server's password is kept, can't be written: {e}; make it a file of "
                "yours, or set PREFECT_API_URL to use a server that runs"
            ) from e

    def _keep_owner(self, handle: int) -> None:
        with suppress(FileNotFoundError, PermissionError):
            known = self.path.stat()
            os.fchown(handle, known.st_uid, known.st_gid)


def _assigned(binding: Binding, value: str) -> str:
    """The same line with this value; what stands around it stays."""
    match = _ASSIGNMENT.fullmatch(binding.original.string)
    if match is None:
        return f"{binding.original.string}={value}"
    name, rest = match.groups()
    return f"{name}={value}{' ' if rest.startswith('#') else ''}{rest}"
