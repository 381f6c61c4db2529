"""The run that this is called in: which one it is, and what the API says of it."""

from . import _django  # noqa: F401, I001 (sets Django up before anything else is imported)

import logging
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import State
from prefect.context import FlowRunContext, TaskRunContext
from prefect.exceptions import Pause
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from prefect.states import Scheduled

from .api import PROBE_SECONDS, FlowRunError, connected, translated
from .cancelled_runs import ask

logger = logging.getLogger("container_manager.flows")

#: The name of the state of a run whose process was told to end; whoever serves its deployment next goes on with it.
RESCHEDULED = "Rescheduled"

_T = TypeVar("_T")


class OwnRun(NamedTuple):
    """The flow run, and the task run in it; without a flow run there is no other."""

    flow_run_id: UUID | None = None
    task_run_id: UUID | None = None
    name: str = ""
    #: It is run again: by hand, by its own retries, or because it was rescheduled.
    is_rerun: bool = False
    #: It came from the API. Its process runs nothing else, and another process can take over.
    is_deployed: bool = False

    @classmethod
    def current(cls) -> "OwnRun":
        flow_context, task_context = FlowRunContext.get(), TaskRunContext.get()
        flow_run = flow_context.flow_run if flow_context else None
        if task_context is not None:
            task_run = task_context.task_run
            return cls(flow_run.id if flow_run else task_run.flow_run_id, task_run.id, task_run.name)
        if flow_run is None:
            return cls()
        return cls(
            flow_run.id,
            None,
            flow_run.name,
            is_rerun=flow_run.run_count > 1,
            # Ignore the parent, which any client can set. A flow that another flow calls has no deployment.
            is_deployed=flow_run.deployment_id is not None,
        )

    def is_cancelled(self) -> bool:
        """Or a run that it is a step of is; False, too, if the API can't say: then a pass finds out."""
        if self.flow_run_id is None:
            return False
        try:
            return bool(ask([str(self.flow_run_id)]))
        except FlowRunError as e:
            logger.warning("whether this run was cancelled is not known: %s", e)
            return False

    def was_rescheduled(self) -> bool:
        """It is run again because its last process was told to end, and not because anybody wants it again."""

        def last_scheduled(client: SyncPrefectClient) -> str:
            states = client.read_flow_run_states(self._id)
            scheduled = [state for state in states if state.is_scheduled()]
            return max(scheduled, key=lambda state: state.timestamp).name or "" if scheduled else ""

        return self.is_rerun and self._asked(last_scheduled, "") == RESCHEDULED

    def reschedule(self, why: str) -> None:
        """Raise Prefect's signal that ends this process, for another to go on; return if that can't be."""

        def propose(client: SyncPrefectClient) -> "State[Any] | None":
            return client.set_flow_run_state(self._id, Scheduled(name=RESCHEDULED, message=why)).state

        state = self._asked(propose, None) if self.is_deployed else None
        if state is not None and state.is_scheduled():
            raise Pause(state=state)

    @property
    def _id(self) -> UUID:
        assert self.flow_run_id is not None  # noqa: S101 (only a flow run is run again or deployed)
        return self.flow_run_id

    def _asked(self, question: Callable[[SyncPrefectClient], _T], otherwise: _T) -> _T:
        try:
            with translated(), temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 1}), connected(PROBE_SECONDS) as client:
                return question(client)
        except FlowRunError as e:
            logger.warning("the Prefect API could not be asked: %s", e)
            return otherwise
