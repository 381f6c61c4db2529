"""Processes of flow runs, forked from one that has imported what they need: that takes longer than a pass."""

import atexit
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from uuid import UUID

logger = logging.getLogger("container_manager.deployments")

#: The exit code of a process that could not be made, or whose template died before it.
_UNKNOWN = 255

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([f"{__package__}.template"])


def prepare(environment: dict[str, str]) -> None:
    """Begin to make the template, which keeps this environment for all that are forked from it."""
    with _environ(environment):
        forkserver.ensure_running()


class FlowRunProcess:
    """One flow run's. It outlives the template, and is then known by its process id alone."""

    def __init__(self, flow_run_id: UUID, entrypoint: str, environment: dict[str, str]) -> None:
        """`entrypoint`: of the flow, as `module:name`. `environment`: for the template, if it must be started first.

        If the process can't be started, it counts as ended.
        """
        # As a daemon it is told to end, and waited for, should we end without having stopped it.
        self._process: BaseProcess = _context.Process(target=_run, args=(flow_run_id, entrypoint), daemon=True)
        try:
            with _environ(environment):
                self._process.start()
        except (OSError, EOFError) as e:
            # The template died, or there is no room. The next one gets a new template.
            logger.warning("flow run %s got no process, and is tried again once: %r", flow_run_id, e)

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative: the signal that ended it."""
        pid = self._process.pid
        code = self._process.exitcode if pid is not None else _UNKNOWN
        return None if code == _UNKNOWN and pid is not None and _exists(pid) else code

    def terminate(self) -> None:
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        """And wait for its end."""
        self._send(signal.SIGKILL)
        if self._process.pid is not None:
            self._process.join()

    def _send(self, number: signal.Signals) -> None:
        if self.exit_code is None and self._process.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(self._process.pid, number)


def _run(flow_run_id: UUID, entrypoint: str) -> None:
    from .executing import execute

    try:
        execute(flow_run_id, entrypoint)
    finally:
        # A forked process ends without these, which others rely on: what they collected is sent there.
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@contextmanager
def _environ(environment: dict[str, str]) -> Iterator[None]:
    """The template inherits it, and Prefect reads its settings as it is imported."""
    usual = dict(os.environ)
    os.environ.update(environment)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(usual)
