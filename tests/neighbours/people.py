"""What people do with two installations while both are at work. The first round of each is made in any case."""

import json
import signal
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from itertools import count, cycle
from typing import Any
from uuid import UUID

from django.utils.timezone import now
from prefect.states import Cancelling

from container_manager.containers import INSTANCE_LABEL
from container_manager.models import ENDED, ContainerJob, Status
from container_manager.queue import queue_manager
from tests.fuzz import workload

from .place import OLD, Home, Person, Place, pause, waited

#: Jobs that have not ended; above every limit, so that limits bind.
BACKLOG = 9
#: seconds; for a process that starts, a flow run that ends, on a machine that has other things to do.
PATIENCE = 180.0
#: The limits of `container-job` that are set by turns.
LOW, HIGH = 1, 4
#: How many errands are run in any case.
ERRANDS = 3


def everybody(place: Place) -> list[Person]:
    each = [person(place, home) for home in place.homes for person in (queueing, asking)]
    return [*each, *(person(place) for person in (misdirecting, running_errands, restarting, limiting, pausing))]


def queueing(place: Place, home: Home) -> Person:
    """Keep jobs waiting, of all kinds; cancel some, and let some be due later."""
    for number in count():
        if place.is_over and number:
            return
        with home.site.opened():
            if ContainerJob.objects.exclude(status__in=ENDED).count() < BACKLOG:
                jobs = workload.build(12, place.draw, of=f"{home}-{number}-")
                later = queue_manager.queue_job(jobs.pop(), now() + timedelta(seconds=2))
                jobs = [later, *queue_manager.queue_jobs(jobs)]
                home.queued |= {job.pk for job in jobs}
                home.cancellation.add(jobs)
            home.cancellation.go_on()
        yield from pause(0.5)


def asking(place: Place, home: Home) -> Person:
    """Ask for containers by flow runs, one after the other; cancel some."""
    deployment_id = place.deployment_id(home, "run-container-job", "on-demand")
    for number, kind in enumerate(("ends", "cancelled", "fails", "sleeps", "ends", "late") * 100):
        if place.is_over and number > 1:
            return
        spec = workload.KINDS[kind].spec(f"{kind}.{home}-asked-{number}")
        run_id = place.api.create_flow_run_from_deployment(deployment_id, parameters={"spec": spec}).id
        if kind == "cancelled":
            yield from waited(lambda run_id=run_id: _is_running(home, run_id), PATIENCE)
            place.api.set_flow_run_state(run_id, Cancelling())
        yield from waited(lambda run_id=run_id: _has_ended(place, run_id), PATIENCE)
        home.counts["asked"] += 1


def misdirecting(place: Place) -> Person:
    """Ask for flow runs at the wrong deployment, as a command with another's database does."""
    for number, home in enumerate(cycle(place.homes)):
        if place.is_over and number > 1:
            return
        deployment_id = place.deployment_id(home, "run-container-job", "on-demand")
        spec = workload.KINDS["ends"].spec(f"ends.{home}-misdirected-{number}")
        run = place.api.create_flow_run_from_deployment(
            deployment_id,
            parameters={"spec": spec},
            labels={INSTANCE_LABEL: place.other(home).site.instance_id},
            name="misdirected",
        )
        home.misdirected.add(run.id)
        yield from pause(6)


def running_errands(place: Place) -> Person:
    """What is done in a shell, one thing after the other."""
    for number, errand in enumerate(errand for round_ in count() for errand in _errands(place, round_)):
        if place.is_over and number >= ERRANDS:
            return
        yield from errand


def _errands(place: Place, number: int) -> Iterator[Person]:
    first, second = place.homes
    yield _deploy_run(place, first, number)
    yield _intrude(place)
    yield _command(place, second, "inline", "--queue-mode", "--once")
    yield _command(place, first, "deployment", "--job-id", str(_some_job(first, number)))
    yield _command_of_third(place)
    yield _command(place, first, "inline", "--queue-mode", "--once")
    yield _deploy_run(place, second, number)
    yield _command(place, second, "deployment", "--queue-mode", "--once")
    yield _command(place, second, "inline", "--job-id", str(_some_job(second, number)))


def _deploy_run(place: Place, home: Home, number: int) -> Person:
    """By Prefect's CLI."""
    spec = workload.KINDS["ends"].spec(f"ends.{home}-cli-{number}")
    cli = home.site.start(
        *(sys.executable, "-m", "prefect", "deployment", "run"),
        *(f"run-container-job/{home.site.named('on-demand')}", "--params", json.dumps({"spec": spec})),
    )
    yield from waited(lambda: cli.code is not None, PATIENCE)
    if cli.code != 0:
        place.violations.append(f"{home}: `prefect deployment run` failed: {cli.last_words}")
    home.counts["asked"] += 1


def _command(place: Place, home: Home, via: str, *arguments: str) -> Person:
    command = home.site.command(*arguments, "--via", via)
    yield from waited(lambda: command.code is not None, PATIENCE)
    # A restart may come between, and a busy server; but these are its own deployments.
    if "installation" in command.last_words:
        place.violations.append(f"refusal: {arguments} via {via} of {home}: {command.last_words}")
    home.counts["commands"] += command.code == 0


def _command_of_third(place: Place) -> Person:
    """Against the deployments of another installation, which it must refuse."""
    with place.third.opened():
        ContainerJob.objects.all().delete()
        job = queue_manager.queue_job(ContainerJob.objects.create_job(image=workload.IMAGE, name="never"))
    command = place.third.command("--job-id", str(job.pk), "--via", "deployment")
    yield from waited(lambda: command.code is not None, PATIENCE)
    if command.code != 1 or "belongs to installation" not in command.last_words:
        place.violations.append(f"refusal: the command of the third ended with {command.code}: {command.last_words}")


def _intrude(place: Place) -> Person:
    """Start a third installation without a name, which must be refused before it has touched anything."""
    third = place.third.serve()
    yield from waited(lambda: third.code is not None, PATIENCE)
    if third.code != 1 or "CONTAINER_MANAGER['NAME']" not in third.last_words:
        place.violations.append(f"refusal: the third installation ended with {third.code}: {third.last_words}")
        third.kill()
    place.landscape.look("the third installation was started")


def restarting(place: Place) -> Person:
    """Restart what serves, by turns; once each it is killed."""
    for number, home in enumerate(cycle(place.homes)):
        if place.is_over and number > 1:
            return
        yield from restart(place, home, signal.SIGKILL if number in (1, 2) else signal.SIGTERM)
        yield from pause(place.draw.uniform(2, 6))


def restart(place: Place, home: Home, number: signal.Signals) -> Person:
    yield from stop(place, home, number)
    home.site.serve()
    yield from waited(lambda: home.site.is_serving, PATIENCE)
    if not home.site.is_serving:
        place.violations.append(f"{home} does not serve again")
    place.landscape.look(f"a restart of {home}, by {number.name}")
    home.counts["restarts"] += 1


def stop(place: Place, home: Home, number: signal.Signals) -> Person:
    service = home.site.service
    assert service is not None
    if service.code is not None:
        place.violations.append(f"{home}: what serves ended with {service.code}: {service.last_words}")
    service.process.send_signal(number)
    yield from waited(lambda: service.code is not None, PATIENCE)
    if number == signal.SIGTERM and service.code != 0:
        place.violations.append(f"{home}: SIGTERM ended what serves with {service.code}: {service.last_words}")


def limiting(place: Place) -> Person:
    """Set the limit of one low and that of the other high, by turns."""
    seconds = max(13.0, (place.load_until - time.monotonic()) / 6)
    for number in count():
        if place.is_over and number > 1:
            return
        low, high = place.homes if number % 2 == 0 else reversed(place.homes)
        for home, limit in ((low, LOW), (high, HIGH)):
            if home.limits[-1][1] != limit:
                set_limit(place, home, limit)
        _queue_stubborn(high, number)
        yield from waited(lambda high=high: _alive(high) > LOW, PATIENCE)
        yield from pause(seconds)


def set_limit(place: Place, home: Home, limit: int) -> None:
    with place.landscape.changed("the last look"):
        place.api.upsert_global_concurrency_limit_by_name("tag:" + home.site.named("container-job"), limit)
    home.limits.append((time.time(), limit))
    home.counts["limits set"] += 1


def pausing(place: Place) -> Person:
    """Pause the passes of one for a while, by turns: the other's go on."""
    for number, home in enumerate(cycle(reversed(place.homes))):
        if place.is_over and number:
            return
        yield from pause(3)
        other = place.other(home)
        switch(place, home, active=False)
        ended = _ended(other)
        yield from waited(lambda other=other, ended=ended: _ended(other) > ended, PATIENCE)
        if _ended(other) == ended:
            place.violations.append(f"{other} did nothing while the passes of {home} were paused")
        switch(place, home, active=True)
        yield from pause(4)


def switch(place: Place, home: Home, *, active: bool, flow: str = "process-queue", name: str = "scheduled") -> None:
    """A deployment's own schedule, as the switch in the UI does."""
    deployment = place.api.read_deployment(place.deployment_id(home, flow, name))
    with place.landscape.changed("the last look"):
        for schedule in deployment.schedules:
            place.api.update_deployment_schedule(deployment.id, schedule.id, active=active)
    home.counts["pauses"] += not active


def schedule_report(place: Place, home: Home) -> None:
    """Of a person's own, with its own parameters."""
    spec = workload.KINDS["ends"].spec(f"ends.{home}-report")
    # One in the first half minute, and then one each minute.
    first = (now() + timedelta(seconds=15)).isoformat()
    interval = {"interval": 60, "anchor_date": first, "timezone": "Europe/Berlin"}
    schedule = {"schedule": interval, "parameters": {"spec": spec}}
    path: Any = "/deployments/{id}/schedules"
    deployment_id = place.deployment_id(home, "run-container-job", "on-demand")
    with place.landscape.changed("the last look"):
        place.api.request("POST", path, path_params={"id": deployment_id}, json=[schedule | {"slug": "report"}])


def _some_job(home: Home, number: int) -> int:
    """That is safe to be processed again and again: one that has completed is left as it is."""
    with home.site.opened():
        (job,) = queue_manager.queue_jobs(
            [ContainerJob.objects.build(**workload.KINDS["ends"].spec(f"ends.{home}-command-{number}"))]
        )
    home.queued.add(job.pk)
    return int(job.pk)


def _queue_stubborn(home: Home, number: int) -> None:
    """Some that take long to end, so that several are alive at once if they may."""
    deaf = workload.KINDS["deaf"]
    with home.site.opened():
        jobs = [
            ContainerJob.objects.build(priority=100, **deaf.spec(f"deaf.{home}-stubborn-{number}-{position}"))
            for position in range(3)
        ]
        home.queued |= {job.pk for job in queue_manager.queue_jobs(jobs)}


def _alive(home: Home) -> int:
    with home.site.opened():
        return int(ContainerJob.objects.alive().count())


def _ended(home: Home) -> int:
    with home.site.opened():
        return int(ContainerJob.objects.filter(status__in=ENDED).exclude(name__startswith=OLD).count())


def _is_running(home: Home, run_id: UUID) -> bool:
    with home.site.opened():
        return bool(ContainerJob.objects.filter(flow_run_id=str(run_id), status=Status.RUNNING).exists())


def _has_ended(place: Place, run_id: UUID) -> bool:
    state = place.api.read_flow_run(run_id).state
    return state is not None and state.is_final()
