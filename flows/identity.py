"""The identity of this installation in Prefect: does a deployment or a flow run belong to it?"""

from . import _django  # noqa: F401, I001 (sets Django up before anything else is imported)

from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowFilter, FlowFilterName
from prefect.client.schemas.responses import DeploymentResponse
from prefect.context import FlowRunContext
from prefect.exceptions import ObjectNotFound

from container_manager.conf import get_settings
from container_manager.containers import INSTANCE_LABEL
from container_manager.models import Installation

from .api import PAGE, FlowRunError, is_of_one

NAME_LABEL = "container-manager.name"
#: A tag of every deployment, with the installation's name in front.
TAG = "container-manager"
FLOW_NAMES = ("process-queue", "process-jobs", "run-container-job", "purge")
#: The entrypoints of our flows.
_ENTRYPOINTS = tuple(f"{__package__}.{name}:{name}" for name in (name.replace("-", "_") for name in FLOW_NAMES))


class OtherInstallation(FlowRunError):
    """The deployment or the flow run belongs to another installation."""


def labels() -> dict[str, str]:
    """The labels of our deployments. Prefect copies them to each flow run. A caller can also set them on a run."""
    name = get_settings().NAME
    return {INSTANCE_LABEL: Installation.load().instance_id} | ({NAME_LABEL: name} if name else {})


def inline_tag() -> str:
    """The tag of our flow runs without a deployment. `purge` finds them by it: Prefect can't filter by labels."""
    return f"{TAG}.{Installation.load().instance_id}"


def owner(labels: Mapping[str, Any]) -> str:
    """The installation's id in these labels; empty if there is none."""
    return str(labels.get(INSTANCE_LABEL) or "")


def is_ours(labels: Mapping[str, Any]) -> bool:
    return owner(labels) == Installation.load().instance_id


def is_foreign(labels: Mapping[str, Any]) -> bool:
    """Whether they name another installation. Labels that name none may be ours."""
    return bool(owner(labels)) and not is_ours(labels)


def describe(labels: Mapping[str, Any]) -> str:
    """`1a2b3c4d`, or `1a2b3c4d (staging)`."""
    name = labels.get(NAME_LABEL)
    return f"{owner(labels)} ({name})" if name else owner(labels)


def why_not_ours() -> str:
    """Why this process must not execute the current flow run, in a sentence; empty if it may. One query.

    A run without our label may run: it was created before its deployment had one, or has no deployment.
    """
    context = FlowRunContext.get()
    theirs = context.flow_run.labels if context and context.flow_run else {}
    if owner(theirs) in ("", Installation.load().instance_id):
        return ""
    return (
        f"this flow run is meant for installation {describe(theirs)}, and the database here is that of installation "
        f"{describe(labels())}: give the process that runs it the other's DATABASE_URL, or each its own work pool"
    )


def our_deployments(client: SyncPrefectClient) -> Iterator[DeploymentResponse]:
    """The deployments that this installation has registered, under any name, and those made by `prefect deploy`."""
    recorded = Installation.load().registration.deployments
    for deployment in _deployments_of_our_flows(client, recorded):
        theirs = deployment.labels or {}
        if is_ours(theirs) or (not owner(theirs) and (str(deployment.id) in recorded or _is_as_ours(deployment))):
            yield deployment


def our_deployment_ids(client: SyncPrefectClient) -> list[UUID]:
    """Includes deployments that were deleted or that the server can't show: their runs are still ours."""
    recorded = Installation.load().registration.deployments
    foreign = {
        deployment.id
        for deployment in _deployments_of_our_flows(client, recorded)
        if is_foreign(deployment.labels or {})
    }
    ours = {deployment.id for deployment in our_deployments(client)} | {UUID(pk) for pk in recorded}
    return sorted(ours - foreign)


def _is_as_ours(deployment: DeploymentResponse) -> bool:
    """An unlabelled deployment as in `prefect.yaml`. A user's flow may share a name and a tag with one of ours."""
    return get_settings().named(TAG) in deployment.tags and deployment.entrypoint in _ENTRYPOINTS


def _deployments_of_our_flows(client: SyncPrefectClient, recorded: Iterable[str]) -> list[DeploymentResponse]:
    flows = FlowFilter(name=FlowFilterName(any_=list(FLOW_NAMES)))
    found: list[DeploymentResponse] = []
    try:
        while page := client.read_deployments(flow_filter=flows, limit=PAGE, offset=len(found)):
            found += page
    except httpx.HTTPStatusError as e:
        if not is_of_one(e):
            raise
        # The server can't show one of them. Read the recorded ones, one by one.
        return [deployment for pk in recorded if (deployment := _read(client, UUID(pk)))]
    return found


def _read(client: SyncPrefectClient, deployment_id: UUID) -> DeploymentResponse | None:
    try:
        return client.read_deployment(deployment_id)
    except ObjectNotFound:
        return None
    except httpx.HTTPStatusError as e:
        if not is_of_one(e):
            raise
        return None
