"""Three-way merge of a deployment's values: what the server has, what we want, what we wrote last."""

from collections.abc import Sequence
from typing import Any, TypeVar

from container_manager.types import DeploymentRecord, ScheduleRecord

_T = TypeVar("_T")
_MISSING = object()


def merged(
    server: DeploymentRecord, desired: DeploymentRecord, written: Sequence[DeploymentRecord]
) -> tuple[DeploymentRecord, DeploymentRecord]:
    """The values that the server should have, and the values to record as written by us.

    `written`: the last recorded values, or all that an earlier version may have written if there is no record. Never
    empty. If a value on the server equals one of these, we may change it. Any other value was set by a person and
    stays. Each parameter and each tag is merged separately.
    """
    description, our_description = _value(
        server.description, desired.description, [record.description for record in written]
    )
    is_paused, our_pause = _value(server.is_paused, desired.is_paused, [record.is_paused for record in written])
    schedule, our_schedule = _schedule(server.schedule, desired.schedule, [record.schedule for record in written])
    parameters, our_parameters = _parameters(
        server.parameters, desired.parameters, [record.parameters for record in written]
    )
    return (
        DeploymentRecord(
            name=desired.name,
            description=description,
            parameters=parameters,
            tags=_tags(server.tags, desired.tags, written[0].tags),
            is_paused=is_paused,
            schedule=schedule,
        ),
        DeploymentRecord(
            name=desired.name,
            description=our_description,
            parameters=our_parameters,
            tags=desired.tags,
            is_paused=our_pause,
            schedule=our_schedule,
        ),
    )


def _value(server: _T, desired: _T, written: Sequence[_T]) -> tuple[_T, _T]:
    if server == desired or server in written:
        return desired, desired
    return server, written[0]


def _schedule(
    server: ScheduleRecord | None, desired: ScheduleRecord | None, written: Sequence[ScheduleRecord | None]
) -> tuple[ScheduleRecord | None, ScheduleRecord | None]:
    """A schedule of ours that is gone was removed by a person, and stays removed."""
    if server is None and any(written):
        return None, next(schedule for schedule in written if schedule)
    return _value(server, desired, written)


def _parameters(
    server: dict[str, Any], desired: dict[str, Any], written: Sequence[dict[str, Any]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    result, ours = dict(server), dict[str, Any]()
    for key in {**written[0], **desired}:
        was = [values.get(key, _MISSING) for values in written]
        value, record = _value(server.get(key, _MISSING), desired.get(key, _MISSING), was)
        for values, new in ((result, value), (ours, record)):
            values.pop(key, None)
            if new is not _MISSING:
                values[key] = new
    return result, ours


def _tags(server: Sequence[str], desired: Sequence[str], written: Sequence[str]) -> tuple[str, ...]:
    kept = [tag for tag in server if tag in desired or tag not in written]
    new = [tag for tag in desired if tag not in server and tag not in written]
    return (*kept, *new)
