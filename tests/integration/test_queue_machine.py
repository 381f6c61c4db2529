"""Whatever befalls a queue, in whatever order: its promises hold after each step, and it comes to an end."""

from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import pytest
from django.utils.timezone import now
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from container_manager.exceptions import EngineFailed, RequestRefused
from container_manager.models import ALIVE, ENDED, ContainerJob, DockerHost, Status
from container_manager.queue import QueueManager
from container_manager.types import ContainerSpec
from tests.conftest import empty_tables
from tests.fake_engine import FakeContainer, FakeEngine, Fleet, raising
from tests.simulation import STEPS, Fault, History, Kind, Worker, let_time_pass

HOSTS = {"left": 3, "right": 1}
MAX_CONCURRENT = 3
MOST_JOBS = 6
WORKERS = 3
WAITING = (Status.PENDING, Status.QUEUED, Status.SCHEDULED)
HERE = ("created", "running", "exited")

#: Which of those that there are.
picks = st.integers(0, 11)
jobs = st.fixed_dictionaries(
    {
        "max_retries": st.integers(0, 2),
        "retry_exit_codes": st.sampled_from([[], [7]]),
        "rerun_on_lost": st.booleans(),
        "priority": st.sampled_from([50, 80]),
        "timeout_seconds": st.sampled_from([100_000, 60]),
    }
)


class Work(NamedTuple):
    """What a worker does, some time later; and what befalls it meanwhile."""

    worker: int
    task: Literal["pass", "batch", "look after"]
    #: seconds: none; longer than a lease, a grace and a retry's wait; than any wait at all.
    wait: Literal[0, 100, 1000]
    fault: Fault | None


kinds = st.sampled_from(["stalls", *get_args(Kind)])
faults = (
    st.none()
    | st.builds(Fault, kind=kinds, after=st.integers(0, 15))
    | st.builds(Fault, kind=kinds, after=st.integers(0, 1), at=st.sampled_from(STEPS))
)
works = st.builds(
    Work,
    worker=picks,
    task=st.sampled_from(["pass", "pass", "batch", "look after"]),
    wait=st.sampled_from([0, 0, 100, 1000]),
    fault=faults,
)


def any_job(*statuses: Status) -> Callable[["QueueMachine"], bool]:
    return lambda machine: any(row.status in statuses for row in machine.history.rows.values())


def any_container(*states: str) -> Callable[["QueueMachine"], bool]:
    return lambda machine: any(container.state in states for _, container in machine.history.ours())


CALLS_THAT_FAIL: dict[str, Callable[[FakeEngine], None]] = {
    "create is refused": lambda engine: engine.before("create", raising(RequestRefused("create: no"))),
    "create fails": lambda engine: engine.before("create", raising(EngineFailed("create: a hiccup"))),
    "no program": lambda engine: engine.break_start(127, RequestRefused("start: no such file")),
    "start fails": lambda engine: engine.break_start(128, EngineFailed("start: a port is taken")),
    "the Engine is down": lambda engine: engine.down(),
}


class QueueMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        empty_tables()
        self.fleet = Fleet(timeout=0.01)
        self.engines = [self.fleet.add_host(name, max_concurrent_jobs=most) for name, most in HOSTS.items()]
        self.history = History(self.fleet, MAX_CONCURRENT)
        self.foreign = [(engine, self.add_foreign(engine)) for engine in self.engines]
        self.person = QueueManager(self.fleet)
        self.workers = [Worker(self.fleet) for _ in range(WORKERS)]

    @initialize(each=st.lists(jobs, min_size=1, max_size=3))
    def begin(self, each: list[dict[str, Any]]) -> None:
        for fields in each:
            self.queue_one(fields)

    @precondition(lambda self: sum(row.status not in ENDED for row in self.history.rows.values()) < MOST_JOBS)
    @rule(fields=jobs, pinned=st.none() | st.sampled_from(list(HOSTS)), wait=st.sampled_from([None, 50]), then=works)
    def queue(self, fields: dict[str, Any], pinned: str | None, wait: int | None, then: Work) -> None:
        self.queue_one(fields, pinned, wait)
        self.work(then)

    @precondition(any_job(*Status))
    @rule(pick=picks, then=works)
    def person_decides(self, pick: int, then: Work) -> None:
        """To cancel what has not ended, and to queue again what has, or what was taken back before."""
        job = self.job(pick, *Status)
        if job.status in ENDED:
            self.person.retry_job(job)
            self.history.begins_anew(job)
        elif job.status == Status.PENDING:
            self.person.queue_job(job)
        elif job.status in ALIVE or pick % 2:
            self.person.cancel_job(job)
            self.history.is_cancelled(job)
        else:
            self.person.dequeue_job(job)
        self.work(then)

    @precondition(lambda self: any(worker.is_stalled for worker in self.workers))
    @rule(pick=picks, has_died=st.booleans(), then=works)
    def worker_wakes(self, pick: int, has_died: bool, then: Work) -> None:
        stalled = [worker for worker in self.workers if worker.is_stalled]
        worker = stalled[pick % len(stalled)]
        self.history.note_silent_hosts()
        (worker.kill if has_died else worker.resume)()
        self.promises_hold()
        self.work(then)

    @precondition(any_container("running"))
    @rule(pick=picks, code=st.sampled_from([0, 7]), then=works)
    def container_ends(self, pick: int, code: int, then: Work) -> None:
        engine, container = self.container(pick, "running")
        engine.end(container.id, code)
        self.work(then)

    @precondition(any_job(Status.QUEUED, Status.SCHEDULED))
    @rule(pick=picks, how=st.sampled_from(list(CALLS_THAT_FAIL)), then=works)
    def next_call_fails(self, pick: int, how: str, then: Work) -> None:
        CALLS_THAT_FAIL[how](self.engines[pick % 2])
        self.work(then)

    @precondition(any_container(*HERE))
    @rule(
        pick=picks,
        what=st.sampled_from(["taken", "disk goes", "host is given up", "engine restarts", "power fails"]),
        then=works,
    )
    def container_is_gone(self, pick: int, what: str, then: Work) -> None:
        engine, container = self.container(pick, *HERE)
        match what:
            case "taken":
                engine.vanish(container.id)
                self.history.taken.add(container.name)
            case "disk goes":
                self.history.lose_disk(engine)
            case "host is given up":
                host = DockerHost.objects.get(name=list(HOSTS)[self.engines.index(engine)])
                self.history.give_up(host)
                self.person.declare_host_lost(host)
            case "engine restarts":
                engine.restart()
            case "power fails":
                engine.crash()
        self.work(then)

    @precondition(lambda self: not self.history.are_hosts_sound())
    @rule(then=works)
    def hosts_are_mended(self, then: Work) -> None:
        self.mend_hosts()
        self.work(then)

    @rule(then=works)
    def time_passes(self, then: Work) -> None:
        self.work(then)

    # What always holds, and what does in the end.

    @invariant()
    def promises_hold(self) -> None:
        self.history.check()
        self.fleet.check()
        for engine, foreign in self.foreign:
            assert engine.containers[foreign.id] is foreign
            assert foreign.state == "created"

    def teardown(self) -> None:
        try:
            self.mend_hosts()
            for worker in self.workers:
                if worker.is_stalled:
                    worker.resume()
                    self.promises_hold()
            for _ in range(20):
                if self.is_over():
                    return
                while any_container("running")(self):
                    engine, container = self.container(0, "running")
                    engine.end(container.id, 0)
                self.work(Work(0, "pass", 1000, None))
                self.promises_hold()
            left = [(row.pk, row.status, row.last_error) for row in self.history.rows.values()]
            pytest.fail(f"not over: {left}, {[(c.name, c.state) for _, c in self.history.ours()]}")
        finally:
            for worker in self.workers:
                worker.close()

    def is_over(self) -> bool:
        has_ended = all(row.status in (*ENDED, Status.PENDING) for row in self.history.rows.values())
        return has_ended and not self.history.ours()

    # How the rules find what they are about.

    def queue_one(self, fields: dict[str, Any], pinned: str | None = None, wait: int | None = None) -> None:
        host = DockerHost.objects.get(name=pinned) if pinned else None
        job = ContainerJob.objects.build(image="busybox", command=["run"], pinned_host=host, **fields)
        self.person.queue_job(job, schedule_for=now() + timedelta(seconds=wait) if wait else None)

    def work(self, work: Work) -> None:
        if work.wait:
            let_time_pass(work.wait)
            for engine in self.engines:
                engine.clock.advance(work.wait)
        awake = [worker for worker in self.workers if not worker.is_stalled]
        if awake:
            awake[work.worker % len(awake)].do(partial(self.do, work), work.fault)

    def do(self, work: Work, manager: QueueManager) -> None:
        """In the worker's thread."""
        self.history.note_silent_hosts()
        alive = ContainerJob.objects.alive().order_by("-pk").first()
        if work.task == "batch":
            manager.launch_next_batch(MAX_CONCURRENT)
        elif work.task == "look after" and alive:
            manager.look_after(alive)
        else:
            manager.process_queue_continuous(MAX_CONCURRENT, 1, work_seconds=0)

    def mend_hosts(self) -> None:
        for engine in self.engines:
            engine.thaw()
            engine.up()
        self.history.bring_disks_back()
        DockerHost.objects.update(is_active=True)

    def job(self, pick: int, *statuses: Status) -> ContainerJob:
        found = [pk for pk, row in self.history.rows.items() if row.status in statuses]
        return ContainerJob.objects.get(pk=found[pick % len(found)])

    def container(self, pick: int, *states: str) -> tuple[FakeEngine, FakeContainer]:
        found = [there for there in self.history.ours() if there[1].state in states]
        return found[pick % len(found)]

    def add_foreign(self, engine: FakeEngine) -> FakeContainer:
        """Of another installation, for a job that this one may have, too."""
        instance_id = f"{self.history.instance_id}x"
        labels = {"container-manager.instance": instance_id, "container-manager.job": "1"}
        spec = ContainerSpec(image="busybox", command=["run"])
        return engine.containers[engine.create(f"cm-{instance_id}-1-1", spec, {}, labels)]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_a_queue_keeps_its_promises_whatever_befalls_it(database: str, settings: Any) -> None:
    # What is waited for ends when a rule says so, not when the machine is slow.
    settings.CONTAINER_MANAGER = {"RETRY_BASE_SECONDS": 50, "RETRY_MAX_SECONDS": 60, "STOP_GRACE_SECONDS": 50}

    run_state_machine_as_test(QueueMachine)
