"""Where the command's flow runs run: by a deployment, or in this process. The only module that imports flows."""

import os
import time
import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from container_manager import shutdown
from container_manager.conf import get_settings
from container_manager.exceptions import ShuttingDown
from container_manager.models import Installation
from container_manager.types import FlowRunReport, LoopStats, ProcessReport, ReportT

from .processing import NotConfigured, Options, RunFailed
from .queue_report import Console, binding_limit, one_line

Via = Literal["auto", "deployment", "inline"]
Which = Literal["queue", "jobs"]

#: seconds; for how long `auto` runs inline after a deployment's worker did not pick a flow run up.
AVOID_SECONDS = 300


class Choice(NamedTuple):
    """Why a flow runs inline, if it does; else where the runs of its deployment can be watched."""

    why_inline: str
    where: str = ""
    #: With the API, where that is the reason.
    problem: str = ""


class PrefectFlowRuns:
    """Flow runs, where `--via` says. Called off the main thread; the first one imports Prefect: one second."""

    def __init__(self, via: Via, console: Console, options: Options) -> None:
        self._via, self._console, self._options = via, console, options
        self.current = ""
        #: Where it says how it runs; None: nowhere.
        self.tell: Callable[[str], None] | None = console.say
        self._told = ("", "")
        self._avoid_until = 0.0
        self._is_used = False

    def process_queue(self, parameters: dict[str, Any]) -> FlowRunReport[LoopStats]:
        return self._run("queue", parameters, LoopStats)

    def process_jobs(self, parameters: dict[str, Any]) -> FlowRunReport[ProcessReport]:
        return self._run("jobs", parameters, ProcessReport)

    def close(self) -> None:
        if self._is_used:
            from flows import inline

            inline.server.stop()

    def _run(self, which: Which, parameters: dict[str, Any], report_type: type[ReportT]) -> FlowRunReport[ReportT]:
        self._begin()
        from flows import api, inline, triggering

        name = get_settings().deployment(which)
        why_inline = ""
        try:
            why_inline, where, problem = self._choose(name)
            if not why_inline:
                try:
                    return self._by_deployment(name, where, parameters, report_type)
                except triggering.NotPickedUp as e:
                    if self._via == "deployment":
                        raise
                    self._console.complain(f"Warning: {one_line(e)}. It runs inline instead.")
                    self._avoid_until = time.monotonic() + AVOID_SECONDS
                    why_inline = "no worker picked up the last flow run"
            with inline.recorded(problem) as record:
                is_new = record.problem not in ("", why_inline)
                self._announce(
                    f"inline ({why_inline})", f"{record.where} ({record.problem})" if is_new else record.where
                )
                return inline.run(_flow(which), parameters, report_type)
        except api.ApiNotConfigured as e:
            raise NotConfigured(one_line(e)) from e
        except triggering.FlowRunFailed as e:
            raise RunFailed(str(e), "inline" if why_inline else "deployment", e.flow_run_id) from e

    def _begin(self) -> None:
        if not self._is_used:
            try:
                _import_flows()
            except ImportError as e:
                message = f"Prefect can't be imported: {one_line(e)}; install the project's requirements"
                raise NotConfigured(message) from e
        if shutdown.is_stopping():
            raise ShuttingDown
        # Check the version here: the process that executes the flow run may be newer and would not notice.
        Installation.load()
        if not self._is_used:
            from flows import inline

            inline.quiet_console(is_verbose=self._options.verbose, with_failures=self._options.with_tracebacks)
        self._is_used = True

    def _choose(self, name: str) -> Choice:
        from flows import api, identity, triggering

        if self._via == "inline":
            return Choice("--via inline")
        if time.monotonic() < self._avoid_until:
            return Choice("no worker picked up the last flow run")
        try:
            if self._via == "auto":
                triggering.check_deployment(name)
            return Choice("", api.check_api())
        except identity.OtherInstallation:
            # Run nothing, on the deployment or inline, until a person has corrected the configuration.
            raise
        except api.FlowRunError as e:
            if self._via == "deployment":
                raise
            return Choice(one_line(e), problem=str(e) if isinstance(e, api.ApiUnusable) else "")

    def _by_deployment(
        self, name: str, where: str, parameters: dict[str, Any], report_type: type[ReportT]
    ) -> FlowRunReport[ReportT]:
        from flows import triggering

        self._announce(f"deployment {name}", where)
        try:
            return triggering.run_deployment(
                name,
                parameters,
                report_type,
                pickup_seconds=get_settings().PICKUP_SECONDS,
                on_created=self._note_current,
            )
        finally:
            self.current = ""

    def _note_current(self, description: str) -> None:
        self.current = description

    def _announce(self, way: str, where: str) -> None:
        """Say how it runs, when that has changed."""
        from flows import limits

        limits.refresh()
        if self.tell is None or self._told == (way, where):
            return
        self._told = (way, where)
        for line in (f"Runs: {way}", f"Limit: {binding_limit(self._options.max_concurrent)}", f"Prefect: {where}"):
            self.tell(line)


def _import_flows() -> None:
    if os.path.expanduser("~") == "~":
        # In a container, say, with a user that has no entry. Prefect is not even imported without a home.
        os.environ["HOME"] = "/"
    with warnings.catch_warnings():
        # It is done without.
        warnings.filterwarnings("ignore", "Failed to create the Prefect home directory")
        from flows import inline  # noqa: F401


def _flow(which: Which) -> Any:
    if which == "queue":
        from flows.process_queue import process_queue

        return process_queue
    from flows.process_jobs import process_jobs

    return process_jobs
