"""Our containers: how they are named and labelled, and how what an Engine says of one is read."""

import re
from datetime import UTC, datetime
from typing import Any

from .engine_errors import storable
from .types import ContainerSummary, Daemon, Network, Observation

INSTANCE_LABEL = "container-manager.instance"
JOB_LABEL = "container-manager.job"
ATTEMPT_LABEL = "container-manager.attempt"
TOKEN_LABEL = "container-manager.token"  # noqa: S105

#: Exit codes that a container has that was never started because its program can't be: 126 is a directory or
#: has no x bit, 127 does not exist.
NOT_EXECUTABLE = (126, 127)


_is_number = re.compile("[0-9]{1,18}").fullmatch


def container_name(instance_id: str, job_id: int, attempt: int) -> str:
    return f"cm-{instance_id}-{job_id}-{attempt}"


def summary(row: dict[str, Any]) -> ContainerSummary:
    """From a row of the Engine's list."""
    labels = row.get("Labels") or {}
    names = row.get("Names") or [""]
    return ContainerSummary(
        id=row["Id"],
        name=names[0].removeprefix("/"),
        state=row.get("State", ""),
        job_id=_number(labels.get(JOB_LABEL)),
        attempt=_number(labels.get(ATTEMPT_LABEL)),
    )


def observation(row: dict[str, Any]) -> Observation:
    """From what the Engine says of one container."""
    state = row["State"]
    labels = row["Config"].get("Labels") or {}
    networks = (row.get("NetworkSettings") or {}).get("Networks") or {}
    return Observation(
        container_id=row["Id"],
        state=state["Status"],
        exit_code=state.get("ExitCode"),
        oom_killed=bool(state.get("OOMKilled")),
        error=storable(state.get("Error") or ""),
        started_at=_time(state.get("StartedAt")),
        finished_at=_time(state.get("FinishedAt")),
        image_digest=row.get("Image") or "",
        token=labels.get(TOKEN_LABEL, ""),
        has_endpoint=any(endpoint and endpoint.get("EndpointID") for endpoint in networks.values()),
        environment=dict(variable.split("=", 1) for variable in row["Config"].get("Env") or [] if "=" in variable),
    )


def network(row: dict[str, Any]) -> Network:
    """From a row of the Engine's list of networks."""
    return Network(id=row["Id"], name=row["Name"], driver=row.get("Driver") or "")


def daemon(info: dict[str, Any], networks: list[dict[str, Any]]) -> Daemon:
    """From what the Engine says of itself. Each daemon that finds no container running makes its bridge anew."""
    bridges = [network for network in networks if network.get("Name") == "bridge"]
    return Daemon(
        now=_time(info.get("SystemTime")),
        started_at=_time(bridges[0].get("Created")) if bridges else None,
        spares_containers=bool(info.get("LiveRestoreEnabled")),
    )


def _number(label: str | None) -> int | None:
    return int(label) if label and _is_number(label) else None


def _time(text: str | None) -> datetime | None:
    """Docker's zero date means never."""
    if not text or text.startswith("0001-"):
        return None
    moment = datetime.fromisoformat(text)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
