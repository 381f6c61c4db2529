"""What people see of a Prefect server's deployments, schedules and limits, and who has changed it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prefect.client.orchestration import SyncPrefectClient

#: The API returns no more at once.
PAGE = 200
_FIELDS = ("id", "flow_id", "paused", "parameters", "tags", "description", "labels", "entrypoint", "work_pool_name")
_SCHEDULE_FIELDS = ("id", "schedule", "active", "parameters")


class Landscape:
    """All of it, of both installations and of the stranger. Only people may change it: see `changed`."""

    def __init__(self, client: SyncPrefectClient) -> None:
        self._client = client
        self._known = self._read()
        #: A sentence for each change that no person has made.
        self.surprises: list[str] = []
        self.looks = 0

    def look(self, after: str) -> None:
        """Compare it with what it was; `after` what."""
        now = self._read()
        self.looks += 1
        for what in sorted(now.keys() | self._known.keys()):
            was, is_now = self._known.get(what, "nothing"), now.get(what, "nothing")
            if was != is_now:
                self.surprises.append(f"{what} became {is_now} from {was}, after {after}")
        self._known = now

    @contextmanager
    def changed(self, after: str) -> Iterator[None]:
        """Within, a person changes something."""
        self.look(after)
        yield
        self._known = self._read()

    def _read(self) -> dict[str, Any]:
        """By `flow/deployment field`, `flow/deployment schedule slug` and the names of limits."""
        found: dict[str, Any] = {}
        flows = {flow["id"]: flow["name"] for flow in self._ask("/flows/filter")}
        for deployment in self._ask("/deployments/filter"):
            name = f"{flows[deployment['flow_id']]}/{deployment['name']}"
            found |= {f"{name} {field}": deployment[field] for field in _FIELDS}
            for schedule in deployment["schedules"]:
                what = f"{name} schedule {schedule['slug']}"
                found[what] = {field: schedule[field] for field in _SCHEDULE_FIELDS}
        for limit in self._ask("/v2/concurrency_limits/filter"):
            found[limit["name"]] = (limit["id"], limit["limit"], limit["active"])
        return found

    def _ask(self, path: Any) -> list[dict[str, Any]]:
        answer: list[dict[str, Any]] = self._client.request("POST", path, json={"limit": PAGE}).json()
        return answer
