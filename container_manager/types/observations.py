"""What travels up from an Engine."""

from datetime import datetime
from typing import NamedTuple

from pydantic import Field

from .values import Frozen


class ContainerSummary(NamedTuple):
    """One line of an Engine's list, of thousands. It lags: an ended container may be shown as running for 0.3 s."""

    id: str
    name: str
    #: Docker's word: created, running, paused, restarting, removing, exited, dead.
    state: str
    job_id: int | None
    attempt: int | None

    @property
    def has_ended(self) -> bool:
        return self.state in ("exited", "dead")


class Observation(Frozen):
    """What an Engine says of one container. Times are by the Engine's clock."""

    container_id: str
    state: str
    exit_code: int | None = None
    oom_killed: bool = False
    error: str = ""
    started_at: datetime | None = None
    finished_at: datetime | None = None
    image_digest: str = ""
    #: of the claim that created it.
    token: str = ""
    #: It holds a network endpoint: while it runs, and after its end if no daemon was there to take it back.
    has_endpoint: bool = False
    #: What it was given, secrets too: kept out of whatever is shown or written of it.
    environment: dict[str, str] = Field(default_factory=dict, repr=False, exclude=True)

    @property
    def has_ended(self) -> bool:
        return self.state in ("exited", "dead")

    @property
    def has_run(self) -> bool:
        # Of one whose start a daemon's death cut off, the next daemon may know that it runs, and not since when.
        return self.started_at is not None or self.state in ("running", "paused", "restarting", "exited")


class Network(Frozen):
    """A network of an Engine. Several networks can have the same name; the id is unique."""

    #: Empty if the Engine was not asked for it.
    id: str = ""
    name: str
    driver: str = ""

    @property
    def is_of_host(self) -> bool:
        return "host" in (self.name, self.driver)


class Daemon(Frozen):
    """The daemon that answers for an Engine. Times are by the Engine's clock."""

    now: datetime | None
    #: When it started; None: it can't be told.
    started_at: datetime | None
    #: Containers run on while it is away (Docker's live restore). Else none outlives it.
    spares_containers: bool
