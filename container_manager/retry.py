"""What becomes of a job after an error, and how long a retry waits."""

import random
from dataclasses import dataclass
from enum import Enum, auto

from .exceptions import (
    ContainerGone,
    ContainerManagerError,
    EngineError,
    HostMisconfigured,
    HostUnavailable,
    LeaseExpired,
    NameTaken,
    OutcomeUnknown,
    RequestRefused,
    SecretUnavailable,
    ShuttingDown,
)


class Verdict(Enum):
    #: change nothing; recovery finds out what happened once the lease is over.
    LEAVE = auto()
    #: back to the queue, no retry consumed.
    HAND_BACK = auto()
    #: a charged try with backoff.
    RETRY = auto()
    #: failed at once: repeating does not help.
    FAIL = auto()
    #: the job belongs to another by now.
    DROP = auto()


#: The first class that fits decides. Measured on a real Engine.
_VERDICTS: tuple[tuple[type[ContainerManagerError], Verdict], ...] = (
    (OutcomeUnknown, Verdict.LEAVE),
    (LeaseExpired, Verdict.LEAVE),
    (HostUnavailable, Verdict.HAND_BACK),
    (HostMisconfigured, Verdict.HAND_BACK),
    (ShuttingDown, Verdict.HAND_BACK),
    (NameTaken, Verdict.DROP),
    (ContainerGone, Verdict.DROP),
    (RequestRefused, Verdict.FAIL),
    (SecretUnavailable, Verdict.RETRY),
    (EngineError, Verdict.RETRY),
    (ContainerManagerError, Verdict.LEAVE),
)


def verdict_on(error: ContainerManagerError) -> Verdict:
    return next(verdict for kind, verdict in _VERDICTS if isinstance(error, kind))


@dataclass(frozen=True)
class RetryPolicy:
    """Exponential backoff with ±25 % jitter, so that jobs that failed together don't come back together."""

    base_seconds: float
    max_seconds: float

    def delay_seconds(self, retry_count: int) -> float:
        """Wait before the try after `retry_count` (≥ 0) retries."""
        # The exponent is bounded because a float overflows at 2 ** 1024.
        delay = min(self.base_seconds * 2.0 ** min(retry_count, 60), self.max_seconds)
        return delay * random.uniform(0.75, 1.25)  # noqa: S311 (no secret depends on it)
