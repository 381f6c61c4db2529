"""One flow run, done by the flow that this process knows for it.

Prefect's own engine asks the API which code to load: whoever can write there could have any code run here. Nothing of
what runs is taken from the API here but the parameters, which the flow itself checks.
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
    """Do the flow run by the flow at `module:name`, and leave it to the flow to say how it ended.

    Ends the process where Prefect's engine does: the run was paused, aborted, or has failed to report its end.
    """
    flow: Flow[..., Any] = resolve_name(entrypoint)
    # A path: of a block, as a server may name one, Prefect would make whatever class it names.
    storage: Any = Path(PREFECT_LOCAL_STORAGE_PATH.value())
    with handle_engine_signals(flow_run_id):
        flow_run = load_flow_run(flow_run_id)
        run_flow(
            # A server can name a place where results are written, which is no part of ours.
            flow.with_options(persist_result=False, result_storage=storage),
            flow_run=flow_run,
            # A result would be read from where the state says it is, and unpickled.
            return_type="state",
        )
