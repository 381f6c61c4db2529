"""Records of the values written to a Prefect server. They tell our own values from those that people have set."""

from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict


class _Record(BaseModel):
    # A newer version may have written more fields.
    model_config = ConfigDict(frozen=True, extra="ignore")


class ScheduleRecord(_Record):
    """An interval schedule; `anchor` as ISO 8601."""

    interval_seconds: float
    anchor: str
    timezone: str = "UTC"


class DeploymentRecord(_Record):
    """The values of one deployment. `name` is `flow/deployment`."""

    name: str
    description: str = ""
    parameters: dict[str, Any] = {}
    tags: tuple[str, ...] = ()
    #: We paused it because another deployment has replaced it.
    is_paused: bool = False
    replaced_at: datetime | None = None
    #: The ids of the schedules that it had when it was replaced.
    left_schedules: tuple[str, ...] = ()
    schedule: ScheduleRecord | None = None


class Registration(_Record):
    """Keyed by the ids on the server, which are different on each server."""

    deployments: dict[str, DeploymentRecord] = {}
    #: The limits of tags, by the id of the limit.
    limits: dict[str, int] = {}
