"""One run: two installations are set up beside each other, people are at work on both, and what they did is judged."""

import random
import signal
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import docker
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType

from container_manager.models import ENDED, ContainerJob
from tests.acceptance.conftest import environment, new_database
from tests.conftest import TAG_SLOTS, PrefectServer, wait_until
from tests.fuzz.cancelling import Cancellation
from tests.fuzz.verdict import lines
from tests.fuzz.watching import Events, containers, remove_leftovers

from . import people, purges
from .installation import Neighbour, ended
from .landscape import Landscape
from .place import Home, Person, Place, pause
from .runs import Runs
from .stranger import Stranger
from .verdict import Records, cells, judge, left_behind

_TICK_SECONDS = 0.3
#: seconds; between two looks at all flow runs.
_LOOK_SECONDS = 10.0
#: seconds; for all that was begun to end, once nothing more is.
_SETTLE_SECONDS = 90.0
_ALIVE = (StateType.PENDING, StateType.RUNNING, StateType.CANCELLING)


@dataclass(frozen=True)
class Plan:
    seed: int
    seconds: float
    #: Of a PostgreSQL server on which databases may be made.
    postgres: str
    #: Where processes write.
    folder: Path


def run(plan: Plan) -> list[str]:
    """The violations; the table is printed."""
    with ExitStack() as stack:
        place = stack.enter_context(_place(plan))
        watched = [stack.enter_context(_watched(place, site)) for site in (*_sites(place), place.third)]
        _set_up(place)
        began = time.monotonic()
        place.load_until = began + plan.seconds
        _play(place, [*people.everybody(place), purges.purging(place)])
        _play(place, [_coming_to_rest(place)])
        seconds = time.monotonic() - began
        _wait_for_events(watched)
        first, second = (Records.read(home, events) for home, events in zip(place.homes, watched, strict=False))
        violations = judge(place, (first, second), watched[-1])
        for records in (first, second):
            there = containers(place.engine, records.home.site.instance_id)
            violations += left_behind(records.home, records.jobs, there)
        for records in (first, second):
            line = cells(place, records, violations, plan.seed, seconds)
            print(*lines(line, is_first=records is first), sep="\n", flush=True)
    print(f"{place.landscape.looks} looks at deployments, schedules and limits; the stranger has "
          f"{len(place.stranger.run_ids)} flow runs", flush=True)  # fmt: skip
    return violations


@contextmanager
def _place(plan: Plan) -> Iterator[Place]:
    with ExitStack() as stack:
        databases = {
            name: stack.enter_context(new_database(plan.postgres, f"neighbours_{name}"))
            for name in ("prefect", "plain", "staging", "third")
        }
        server = PrefectServer(plan.folder, _server_environment(databases["prefect"]))
        stack.callback(server.stop)
        server.start()
        plain, staging, third = stack.enter_context(_installed(plan, databases, server))
        stack.enter_context(server.used())
        api = stack.enter_context(get_client(sync_client=True))
        draw = random.Random(plan.seed)
        runs = Runs(api, databases["prefect"])
        stranger = Stranger(api, runs)
        _serve(plain, staging)
        homes = Home(plain, Cancellation(draw)), Home(staging, Cancellation(draw))
        engine = docker.from_env(timeout=60)
        stack.callback(engine.close)
        yield Place(homes, third, api, engine, runs, stranger, Landscape(api), draw, load_until=0)


@contextmanager
def _installed(plan: Plan, databases: Mapping[str, str], server: PrefectServer) -> Iterator[list[Neighbour]]:
    """Two that can share a server, and a third that can't, for want of a name."""
    folder = plan.folder / "sites"
    folder.mkdir()
    env = environment(
        **server.client,
        PREFECT_HOME=str(plan.folder),
        PREFECT_FLOWS='{"heartbeat_frequency": null}',
    )
    settings: dict[str, dict[str, str]] = {"plain": {}, "staging": {"NAME": "staging"}, "third": {}}
    sites = [Neighbour(title, databases[title], env, folder, **given) for title, given in settings.items()]
    with ended(folder, *sites):
        yield sites


def _serve(*sites: Neighbour) -> None:
    for site in sites:
        site.serve()
    for site in sites:
        wait_until(lambda site=site: site.is_serving, people.PATIENCE)


def _server_environment(database: str) -> dict[str, str]:
    return environment(
        **TAG_SLOTS,
        PREFECT_SERVER_DATABASE_CONNECTION_URL=database.replace("postgres:", "postgresql+asyncpg:", 1),
        # A schedule of ten seconds needs no thousand of runs made ahead, and one that was resumed goes on soon.
        PREFECT_SERVER_SERVICES_SCHEDULER_MAX_RUNS="10",
        PREFECT_SERVER_SERVICES_SCHEDULER_MIN_SCHEDULED_TIME="PT60S",
        PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS="5",
    )


@contextmanager
def _watched(place: Place, site: Neighbour) -> Iterator[Events]:
    events = Events(place.engine, site.instance_id)
    try:
        yield events
    finally:
        events.close()
        # Nothing that is started by then is left to start more.
        site.end()
        remove_leftovers(place.engine, site.instance_id)


def _sites(place: Place) -> list[Neighbour]:
    return [home.site for home in place.homes]


def _set_up(place: Place) -> None:
    """What people have changed by hand, and nobody may set back."""
    for home in place.homes:
        people.set_limit(place, home, people.HIGH)
        # One that happens to be due would purge what only a purge by hand is to.
        people.switch(place, home, active=False, flow="purge", name="daily")
        people.schedule_report(place, home)
        with place.landscape.changed("the start"):
            deployment_id = place.deployment_id(home, "process-queue", "scheduled")
            changed = {"description": f"The passes of {home}.", "tags": ["chosen-by-hand"]}
            place.api.request("PATCH", "/deployments/{id}", path_params={"id": deployment_id}, json=changed)


def _play(place: Place, persons: Iterable[Person]) -> None:
    """All of them by turns, until all are done."""
    alive = list(persons)
    look_at = time.monotonic()
    while alive:
        alive = [person for person in alive if next(person, alive) is not alive]
        if time.monotonic() >= look_at:
            place.runs.look()
            look_at = time.monotonic() + _LOOK_SECONDS
        time.sleep(_TICK_SECONDS)


def _coming_to_rest(place: Place) -> Person:
    """Let all that was begun end, purge once more, and end what serves."""
    for home in place.homes:
        people.switch(place, home, active=False, flow="run-container-job", name="on-demand")
    until = time.monotonic() + _SETTLE_SECONDS
    while not _is_settled(place) and time.monotonic() < until:
        for home in place.homes:
            with home.site.opened():
                home.cancellation.go_on()
        yield from pause(1)
    for home in place.homes:
        yield from purges.purge(place, home, must_finish=True)
    for home in place.homes:
        yield from people.stop(place, home, signal.SIGTERM)


def _is_settled(place: Place) -> bool:
    """No job and no flow run has still to end, but for the passes, which come and go."""
    for home in place.homes:
        with home.site.opened():
            if ContainerJob.objects.exclude(status__in=ENDED).exists():
                return False
    place.runs.look()
    passes = {place.deployment_id(home, "process-queue", "scheduled") for home in place.homes}
    ours = place.runs.present - place.stranger.run_ids
    return not any(
        run.state_type in _ALIVE and run.deployment_id not in passes
        for run in (place.runs.known[run_id] for run_id in ours)
    )


def _wait_for_events(watched: list[Events]) -> None:
    """The streams lag what they tell of."""
    until = time.monotonic() + 5
    while time.monotonic() < until and any(events.ends < events.starts.total() for events in watched):
        time.sleep(_TICK_SECONDS)
