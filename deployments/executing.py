"""Executes a flow run with the flow that this process has registered for it.

Prefect's own engine asks the API which code to load, so anyone who can write to the API could run code here. This one
takes only the parameters from the API, and the flow validates them.
"""

from pathlib import Path
from pkgutil import resolve_name
from typing import Any
from uuid import UUID

from prefect.engine import handle_engine_signals
from prefect.flow_engine import load_flow_run, run_flow
from prefect.flows import Flow
from prefect.settings import PREFECT_LOCAL_STORAGE_PATH


def execute(flow_run_id: UUID, entrypoint: str) -> None:
    """Execute the flow run with the flow at `entrypoint` (`module:name`). The result is in the run's state.

    Raises `SystemExit` where Prefect's engine does: if the run was paused, aborted, or could not report its end.
    """
    flow: Flow[..., Any] = resolve_name(entrypoint)
    # The server can configure a storage block of any class for results. Use a local path instead.
    storage: Any = Path(PREFECT_LOCAL_STORAGE_PATH.value())
    with handle_engine_signals(flow_run_id):
        flow_run = load_flow_run(flow_run_id)
        run_flow(
            flow.with_options(persist_result=False, result_storage=storage),
            flow_run=flow_run,
            # With "result", a result that the API names would be loaded and unpickled.
            return_type="state",
        )
