"""Whether a container ended by itself or with its Engine. None is asked: what the daemon left behind is read.

Measured on Engine 20.10; the sources of later ones do the same:

- A daemon that sees a container's end takes its network endpoint back. One that starts and finds that a container
  has ended meanwhile, or ends it because it spares none, does not: the endpoint is left in what `inspect` shows.
- A daemon that is told to stop ends its containers in order (137, 143, or what they make of TERM). Afterwards nothing
  tells such an end from one that came a moment before it; only a pass that found the Engine down right then does.
"""

from datetime import timedelta
from enum import Enum, auto

from .conf import get_settings
from .models import ContainerJob, DockerHost
from .transitions import from_now
from .types import Daemon, Observation

#: What a container shows whose end came from outside: killed, told to stop, or seen by nobody. Each may be a
#: program's own, too.
_UNSEEN = 255
_FROM_OUTSIDE = (137, 143, _UNSEEN)
#: seconds; a stopping daemon gives its containers 15, and a pass needs its interval to find it down.
_NEARBY_SECONDS = 60


class Interruption(Enum):
    #: It ended by itself, or nothing says otherwise.
    NONE = auto()
    #: Its Engine was restarted before anyone looked: it may have been stopped, or have ended before.
    POSSIBLE = auto()
    #: It ended with its Engine.
    CERTAIN = auto()


def is_suspect(job: ContainerJob, seen: Observation) -> bool:
    """Whether its Engine may have ended it, so that the daemon is worth a look."""
    return job.stop_requested_at is None and not seen.oom_killed and seen.exit_code in _FROM_OUTSIDE


def interruption(seen: Observation, daemon: Daemon, host: DockerHost) -> Interruption:
    """For a suspect that has ended."""
    if seen.has_endpoint:
        # A daemon that spares its containers sends no signal: 137 and 143 were then the program's own.
        is_by_engine = seen.exit_code == _UNSEEN or not daemon.spares_containers
        return Interruption.CERTAIN if is_by_engine else Interruption.NONE
    if daemon.spares_containers or not _is_younger(daemon, seen):
        return Interruption.NONE
    return Interruption.CERTAIN if _was_found_down(host, seen, daemon) else Interruption.POSSIBLE


def _is_younger(daemon: Daemon, seen: Observation) -> bool:
    return daemon.started_at is not None and seen.started_at is not None and seen.started_at < daemon.started_at


def _was_found_down(host: DockerHost, seen: Observation, daemon: Daemon) -> bool:
    """Whether a pass found the host down when the container ended. The Engine's clock gives an age, never a time."""
    if daemon.now is None or seen.finished_at is None:
        return False
    age = (daemon.now - seen.finished_at) / timedelta(seconds=1)
    nearby = _NEARBY_SECONDS + get_settings().POLL_INTERVAL_SECONDS
    went_down = (from_now(-age - nearby), from_now(-age + nearby))
    return DockerHost.objects.filter(pk=host.pk, last_down_at__range=went_down).exists()
