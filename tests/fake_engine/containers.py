"""What one machine of the stand-in holds: containers, the programs in them, and its own clock."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from container_manager.types import ContainerSpec, Network


@dataclass(frozen=True)
class Program:
    """What a command does. `code` None: it runs until it is told to end."""

    code: int | None = None
    stdout: bytes = b""
    stderr: bytes = b""
    oom_killed: bool = False
    is_deaf: bool = False


#: The commands that the contract's cases use; every other one runs until the test says how it ends.
PROGRAMS: dict[tuple[str, ...], Program] = {
    (): Program(0),
    ("true",): Program(0),
    ("false",): Program(1),
    ("sh", "-c", "exit 42"): Program(42),
    ("sh", "-c", "echo out; echo err >&2"): Program(0, b"out\n", b"err\n"),
    ("sh", "-c", "echo up; exec sleep 60"): Program(None, b"up\n"),
    ("sh", "-c", "trap '' TERM; echo up; while true; do sleep 1; done"): Program(None, b"up\n", is_deaf=True),
    ("no-such-program",): Program(127, stderr=b"[FATAL tini (7)] exec no-such-program failed: No such file\n"),
    ("/etc",): Program(126, stderr=b"[FATAL tini (7)] exec /etc failed: Permission denied\n"),
    ("sh", "-c", "sleep 0.5; tail /dev/zero"): Program(137, oom_killed=True),
}


class Clock:
    """The Engine's own: far from ours, so that nobody compares the two by accident.

    It moves when it is told to, and between two looks, so that one thing is after another.
    """

    def __init__(self) -> None:
        self._now = datetime(2031, 5, 1, tzinfo=UTC)

    def now(self) -> datetime:
        self.advance(1e-6)
        return self._now

    def advance(self, seconds: float) -> None:
        self._now += timedelta(seconds=seconds)


@dataclass
class FakeContainer:
    id: str
    name: str
    spec: ContainerSpec
    environment: dict[str, str]
    labels: dict[str, str]
    program: Program
    networks: tuple[Network, ...] = ()
    state: str = "created"
    exit_code: int = 0
    oom_killed: bool = False
    error: str = ""
    started_at: datetime | None = None
    finished_at: datetime | None = None
    has_endpoint: bool = False
    stdout: bytes = b""
    stderr: bytes = b""
