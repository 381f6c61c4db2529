"""What a container writes, in the log of the run that waits for it."""

from . import _django  # noqa: F401, I001 (sets Django up before anything else is imported)

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import httpx
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, PREFECT_LOGGING_TO_API_ENABLED, temporary_settings

from container_manager.following import LogLine

from .api import PROBE_SECONDS, detail_of
from .own_run import OwnRun

logger = logging.getLogger("container_manager.output")

#: stderr is where programs complain; many say there how far they are, too.
_LEVELS = {"stdout": logging.INFO, "stderr": logging.WARNING}
#: characters in one call; the API takes four million bytes.
_CALL_LENGTH = 500_000


class RunLog:
    """`following.Tell`: sends the lines itself, since Prefect's own handler sends after seconds, and what an API
    that is away does not take would be lost."""

    def __init__(self, run: OwnRun, job_id: int) -> None:
        self._run = run
        self._name = f"job-{job_id}"
        #: Lines of the present call that have arrived.
        self._sent = 0
        #: Kept while it works: to make one takes longer than a call.
        self._client = ExitStack()
        self._create_logs: Callable[[list[dict[str, Any]]], None] | None = None

    def __call__(self, lines: Sequence[LogLine]) -> bool:
        if not self._run.flow_run_id or not PREFECT_LOGGING_TO_API_ENABLED.value():
            _show(lines)
            return True
        try:
            with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):
                while self._sent < len(lines):
                    part = _first(lines[self._sent :])
                    self._send([self._record(line) for line in part])
                    self._sent += len(part)
                    _show(part)
        except httpx.HTTPError as e:
            self.close()
            if not isinstance(e, httpx.HTTPStatusError) or e.response.is_server_error:
                return False
            logger.warning("the API refuses what %s writes: %s", self._name, detail_of(e.response))
        self._sent = 0
        return True

    def close(self) -> None:
        self._create_logs = None
        self._client.close()

    def _send(self, records: list[dict[str, Any]]) -> None:
        if self._create_logs is None:
            client = get_client(httpx_settings={"timeout": PROBE_SECONDS}, sync_client=True)
            self._create_logs = self._client.enter_context(client).create_logs
        self._create_logs(records)

    def _record(self, line: LogLine) -> dict[str, Any]:
        run = self._run
        return {
            "name": self._name,
            "level": _LEVELS[line.stream],
            "message": line.text,
            "timestamp": line.at.isoformat(),
            "flow_run_id": str(run.flow_run_id),
            "task_run_id": str(run.task_run_id) if run.task_run_id else None,
        }


def _first(lines: Sequence[LogLine]) -> Sequence[LogLine]:
    """As many as go into one call."""
    length = 0
    for number, line in enumerate(lines):
        length += len(line.text) + 200
        if length > _CALL_LENGTH and number:
            return lines[:number]
    return lines


def _show(lines: Sequence[LogLine]) -> None:
    """On the console of whoever runs the flow there."""
    for line in lines:
        logger.log(_LEVELS[line.stream], "%s", line.text, extra={"send_to_api": False})
