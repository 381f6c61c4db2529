"""The flow runs of a Prefect server, as two witnesses have them: its API, and the tables of its database."""

import re
from collections.abc import Iterable
from uuid import UUID

import psycopg
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.sorting import FlowRunSort

from .landscape import PAGE

#: Longer than every retention.
_AGED_DAYS = 20
_TAKEN_BY = re.compile(r"taken by .*, process (\d+)")


class Runs:
    """All that were ever seen."""

    def __init__(self, client: SyncPrefectClient, database: str) -> None:
        self._client, self._database = client, database
        #: As they were last seen.
        self.known: dict[UUID, FlowRun] = {}
        self.present: set[UUID] = set()
        #: Those that a purge must remove.
        self.aged: set[UUID] = set()

    def look(self) -> None:
        found: dict[UUID, FlowRun] = {}
        while page := self._client.read_flow_runs(limit=PAGE, offset=len(found), sort=FlowRunSort.ID_DESC):
            found |= {run.id: run for run in page}
            if len(page) < PAGE:
                break
        self.known |= found
        self.present = set(found)

    def age(self, run_ids: Iterable[UUID]) -> None:
        """Let them be weeks old, which no call of the API can."""
        ids = list(run_ids)
        with psycopg.connect(self._database, autocommit=True) as connection:
            connection.execute(
                "UPDATE flow_run SET start_time = start_time - make_interval(days => %(days)s), "
                "end_time = end_time - make_interval(days => %(days)s) WHERE id = ANY(%(ids)s)",
                {"days": _AGED_DAYS, "ids": ids},
            )
        self.aged |= set(ids)

    def takers(self) -> dict[UUID, set[int]]:
        """The processes that have taken each run, by what they wrote into its states."""
        found: dict[UUID, set[int]] = {}
        with psycopg.connect(self._database) as connection:
            for run_id, message in connection.execute("SELECT flow_run_id, message FROM flow_run_state"):
                if taken := _TAKEN_BY.match(message or ""):
                    found.setdefault(run_id, set()).add(int(taken[1]))
        return found

    def count(self, table: str, run_ids: Iterable[UUID]) -> int:
        """How many logs or artifacts there are of these runs."""
        with psycopg.connect(self._database) as connection:
            question = psycopg.sql.SQL("SELECT count(*) FROM {} WHERE flow_run_id = ANY(%s)")
            row = connection.execute(question.format(psycopg.sql.Identifier(table)), [list(run_ids)]).fetchone()
        return int(row[0]) if row else 0

    def vanished(self) -> list[FlowRun]:
        """Those that had ended, were young, and are no more."""
        return [
            run
            for run_id, run in self.known.items()
            if run_id not in self.present | self.aged and run.state and run.state.is_final()
        ]
