"""Logs one line when the served flow runs can't do their work, and one when they can again."""

import logging
import time
from pathlib import Path
from typing import Any

from django.db import close_old_connections, connection
from django.db.utils import Error as DatabaseError
from prefect.client.schemas.objects import State
from prefect.client.schemas.responses import FlowRunResponse

from container_manager.conf import get_settings
from container_manager.exceptions import QueueIsNewer
from container_manager.models import Installation

from .definitions import Definition
from .registering import CannotServe

logger = logging.getLogger("container_manager.deployments")


class Health:
    """The health of one serving process.

    `alive_file` is touched whenever the API and the database have answered. If it is older than a minute, the service
    is not working.
    """

    def __init__(self, alive_file: Path | None = None) -> None:
        self._alive_file = alive_file
        self._instance_id = Installation.load().instance_id
        self._check_at = 0.0
        self._database_problem = ""
        self._failed_with: dict[str, str] = {}

    def check_database(self) -> None:
        """Once per interval. Raises `CannotServe` for another installation's database or a newer version's queue."""
        if time.monotonic() < self._check_at:
            return
        self._check_at = time.monotonic() + get_settings().POLL_INTERVAL_SECONDS
        close_old_connections()
        try:
            instance_id = Installation.load().instance_id
        except QueueIsNewer as e:
            raise CannotServe(str(e)) from e
        except DatabaseError as e:
            self.note(e)
            return
        finally:
            # The service needs no connection in between.
            connection.close()
        if instance_id != self._instance_id:
            raise CannotServe(
                f"the database is that of installation {instance_id} now, no longer {self._instance_id}: start again"
            )
        if self._database_problem:
            logger.warning("the database is back")
        self._database_problem = ""

    def note(self, error: DatabaseError) -> None:
        problem = " ".join(str(error).split())
        if not self._database_problem:
            logger.warning("the database can't be used, and no flow run can do its work meanwhile: %s", problem)
        self._database_problem = problem

    def note_look(self) -> None:
        """The API has answered. Touches the file if the database answers as well."""
        if self._alive_file is not None and not self._database_problem:
            self._alive_file.touch()

    def note_end(self, definition: Definition, run: FlowRunResponse, state: "State[Any]") -> None:
        """Report a failed flow run, unless the one before failed in the same way; and the first success after it."""
        name = definition.full_name
        if not state.is_failed() and not state.is_crashed():
            if self._failed_with.pop(name, None) is not None:
                logger.warning("%s works again", name)
            return
        problem = f"{state.name}: {(state.message or 'without a message').splitlines()[0]}"
        if self._failed_with.get(name) != problem:
            logger.warning("%s can't do its work: flow run %s ended %s", name, run.id, problem)
        self._failed_with[name] = problem
