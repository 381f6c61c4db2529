"""Every condition that a caller may want to tell apart. The class's docstring is its default message."""


class ContainerManagerError(Exception):
    """Container Manager could not do what was asked."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or type(self).__doc__)


class InvalidTransition(ContainerManagerError):
    """The job is in a status from which this move is not allowed."""


class LeaseExpired(ContainerManagerError):
    """The claim's lease is nearly over: its owner must not cause any further side effect."""


class DatabaseBusy(ContainerManagerError):
    """The database kept a lock for longer than we wait."""


class QueueIsNewer(ContainerManagerError):
    """A newer version of this app works on the queue: upgrade this process, whose rules are not safe beside it."""


class ShuttingDown(ContainerManagerError):
    """This process was asked to stop and starts nothing new."""


class SecretUnavailable(ContainerManagerError):
    """A secret's reference could not be resolved."""


class EngineError(ContainerManagerError):
    """A Docker Engine did not do what was asked."""


class HostUnavailable(EngineError):
    """The Engine can't be reached. Nothing was sent to it."""


class HostMisconfigured(EngineError):
    """What answers at the address can't be used: permission, certificate, or no Docker Engine at all."""


class EngineReplaced(HostMisconfigured):
    """Another Engine answers at this address."""


class OutcomeUnknown(EngineError):
    """The answer was lost: what was asked may have happened, or may still happen."""


class ImageMissing(EngineError):
    """The Engine does not have the image."""


class NetworkMissing(EngineError):
    """The Engine does not have the network."""


class NameTaken(EngineError):
    """A container of this name exists."""


class ContainerGone(EngineError):
    """The Engine has no such container."""


class ContainerNotRunning(EngineError):
    """The container does not run, so that it can't be signalled."""


class ContainerRunning(EngineError):
    """The container runs, so that it can't be removed."""


class RequestRefused(EngineError):
    """The Engine refused the request as wrong: repeating it does not help."""


class EngineFailed(EngineError):
    """The Engine reported an error that may pass."""


class LogsUnavailable(EngineError):
    """The container's log driver keeps no logs that can be read."""


class ManifestInvalid(ContainerManagerError):
    """The manifest of jobs can't be used; nothing of it was queued."""
