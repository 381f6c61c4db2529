"""The identity of this installation in Prefect: does a deployment or a flow run belong to it?"""

from . import _django  # noqa: F401, I001 (sets Django up before anything else is imported)

from collections.abc import Iterator, Mapping
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowFilter, FlowFilterName
from prefect.client.schemas.responses import DeploymentResponse
from prefect.context import FlowRunContext

from container_manager.conf import get_settings
from container_manager.containers import INSTANCE_LABEL
from container_manager.models import Installation

from .api import PAGE, FlowRunError

NAME_LABEL = "container-manager.name"
#: A tag of every deployment, with the installation's name in front.
TAG = "container-manager"
FLOW_NAMES = ("process-queue", "process-jobs", "run-container-job", "purge")


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
    ours, recorded = Installation.load().instance_id, Installation.load().registration.deployments
    tag = get_settings().named(TAG)
    for deployment in _deployments_of_our_flows(client):
        theirs = owner(deployment.labels or {})
        if theirs == ours or (not theirs and (str(deployment.id) in recorded or tag in deployment.tags)):
            yield deployment


def our_deployment_ids(client: SyncPrefectClient) -> list[UUID]:
    return [deployment.id for deployment in our_deployments(client)]


def _deployments_of_our_flows(client: SyncPrefectClient) -> Iterator[DeploymentResponse]:
    flows = FlowFilter(name=FlowFilterName(any_=list(FLOW_NAMES)))
    offset = 0
    while page := client.read_deployments(flow_filter=flows, limit=PAGE, offset=offset):
        yield from page
        offset += len(page)
