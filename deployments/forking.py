"""Processes of flow runs, forked from one that has imported what they need: that takes longer than a pass.

The template is made with the first of them, anew if it dies, and ends with us.
"""

import multiprocessing
import os
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from uuid import UUID

from prefect import engine

_context = multiprocessing.get_context("forkserver")
# It imports all flows, and connects to nothing.
_context.set_forkserver_preload([f"{__package__}.definitions"])


def start(flow_run_id: UUID, environment: dict[str, str]) -> BaseProcess:
    """A process that runs it as Prefect's own would; the code is that of when the template was made."""
    process = _context.Process(target=_run, args=(str(flow_run_id), environment), daemon=True)
    with _environ(environment):
        process.start()
    return process


def _run(flow_run_id: str, environment: dict[str, str]) -> None:
    # Ctrl-C reaches what serves alone, who then asks it to end.
    os.setsid()
    os.environ.update(environment)
    sys.argv = [engine.__file__, flow_run_id]
    runpy.run_path(engine.__file__, run_name="__main__")


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
