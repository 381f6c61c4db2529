"""The table of moves and the one mover, on both databases."""

from datetime import UTC, datetime
from itertools import product
from typing import Any

import pytest
from django.db import IntegrityError, transaction

from container_manager.exceptions import InvalidTransition
from container_manager.models import ContainerJob, DockerHost
from container_manager.transitions import amend, locked, move, move_many

ALIVE = {"launching", "starting", "recovering", "running"}
ENDED = {"completed", "failed", "cancelled"}
#: The table of moves, written out again so that a slip in the product's does not pass.
TABLE = {
    "pending": {"queued", "scheduled", "cancelled"},
    "scheduled": {"queued", "pending", "cancelled"},
    "queued": {"launching", "scheduled", "pending", "cancelled"},
    "launching": {"starting", "queued", "scheduled", "failed", "cancelled"},
    "starting": {"running", "recovering", "failed"},
    "recovering": {"queued", "scheduled", "running", "failed", "cancelled"},
    "running": {"completed", "failed", "cancelled", "scheduled"},
    "completed": {"queued", "scheduled"},
    "failed": {"queued", "scheduled"},
    "cancelled": {"queued", "scheduled"},
}
EDGES = sorted((source, to) for source, targets in TABLE.items() for to in targets)
NON_EDGES = sorted(set(product(TABLE, TABLE)) - set(EDGES))
MINDS_CANCELLATION = [
    (source, to) for source, to in EDGES if to in {"starting", "queued", "scheduled"} and source not in ENDED
]
FORGETS_THE_TRY = [(source, to) for source, to in EDGES if to in {"queued", "scheduled", "pending"}]

LONG_AGO = datetime(2020, 1, 2, 3, 4, 5, tzinfo=UTC)
CLAIM = {"claim_token": "token", "claimed_by": "someone:1", "claimed_until": LONG_AGO}
ONE_TRY = {
    "container_id": "c" * 64,
    "launched_at": LONG_AGO,
    "finished_at": LONG_AGO,
    "deadline_at": LONG_AGO,
    "exit_code": 3,
    "oom_killed": True,
    "reason": "exit_code",
    "stop_requested_at": LONG_AGO,
    "stop_reason": "timeout",
    "missing_at": LONG_AGO,
}
NO_TRY = dict.fromkeys(ONE_TRY) | {"oom_killed": False, "reason": "", "stop_reason": ""}
ALL_TRIES = {
    "cancel_requested_at": LONG_AGO,
    "last_error": "it broke",
    "retry_count": 2,
    "launch_tries": 4,
    "pull_error": "no registry",
}
NO_TRIES = dict.fromkeys(ALL_TRIES) | {"last_error": "", "retry_count": 0, "launch_tries": 0, "pull_error": ""}


@pytest.fixture
def host(database: str) -> DockerHost:
    return DockerHost.objects.create(name="local")


def job_in(status: str, host: DockerHost | None, **fields: Any) -> ContainerJob:
    slot = host if status in ALIVE else None
    return ContainerJob.objects.create(**{"image": "busybox", "status": status, "slot_host": slot} | fields)


def extras(to: str, host: DockerHost) -> dict[str, Any]:
    return {"slot_host": host} if to == "launching" else {}


def values(job: ContainerJob, names: dict[str, Any]) -> dict[str, Any]:
    return ContainerJob.objects.values(*names).get(pk=job.pk)


def in_row(job: ContainerJob, name: str) -> Any:
    return values(job, {name: None})[name]


@pytest.mark.parametrize(("source", "to"), EDGES)
def test_a_job_moves_along_every_edge_of_the_table(host: DockerHost, source: str, to: str) -> None:
    job = job_in(source, host)

    has_moved = move(job, to, **extras(to, host))

    assert (has_moved, job.status, in_row(job, "status")) == (True, to, to)


@pytest.mark.parametrize(("source", "to"), NON_EDGES)
def test_a_move_that_the_table_lacks_is_refused_before_the_database_is_asked(source: str, to: str) -> None:
    job = ContainerJob(pk=1, image="busybox", status=source)

    with pytest.raises(InvalidTransition, match=f"a job that is {source} can't become {to}, only "):
        move(job, to)


def test_a_move_of_many_that_the_table_lacks_is_refused_before_the_database_is_asked() -> None:
    with pytest.raises(InvalidTransition, match="a job that is completed can't become running"):
        move_many([1], "completed", "running")


@pytest.mark.parametrize("changed", [{"status": "pending"}, {"attempt": 2}, {"claim_token": "other"}], ids=str)
@pytest.mark.parametrize("verb", ["move", "amend"])
def test_who_has_an_old_row_in_hand_loses(host: DockerHost, changed: dict[str, Any], verb: str) -> None:
    job = job_in("queued", host, attempt=1, claim_token="mine")
    ContainerJob.objects.update(**changed)
    before = ContainerJob.objects.values().get()

    has_won = move(job, "cancelled") if verb == "move" else amend(job, last_error="late")

    assert not has_won
    assert ContainerJob.objects.values().get() == before
    assert (job.status, job.last_error) == ("queued", "")


@pytest.mark.parametrize(("source", "to"), MINDS_CANCELLATION)
def test_a_cancelled_job_does_not_come_back(host: DockerHost, source: str, to: str) -> None:
    job = job_in(source, host, cancel_requested_at=LONG_AGO)

    has_moved = move(job, to)

    assert (has_moved, in_row(job, "status")) == (False, source)


@pytest.mark.parametrize(("source", "to"), MINDS_CANCELLATION)
def test_of_many_jobs_the_cancelled_ones_do_not_come_back(host: DockerHost, source: str, to: str) -> None:
    asked = job_in(source, host, cancel_requested_at=LONG_AGO)
    other = job_in(source, host)

    count = move_many([asked.pk, other.pk], source, to)

    assert (count, in_row(asked, "status"), in_row(other, "status")) == (1, source, to)


@pytest.mark.parametrize("source", ["starting", "recovering"])
def test_a_cancelled_job_whose_container_runs_is_recorded_as_running(host: DockerHost, source: str) -> None:
    job = job_in(source, host, cancel_requested_at=LONG_AGO)

    has_moved = move(job, "running")

    assert (has_moved, in_row(job, "status"), in_row(job, "cancel_requested_at")) == (True, "running", LONG_AGO)


@pytest.mark.parametrize(("source", "to"), [(source, to) for source, to in EDGES if to not in ALIVE])
def test_a_job_that_is_not_alive_holds_no_slot_and_no_claim(host: DockerHost, source: str, to: str) -> None:
    job = job_in(source, host, **CLAIM)

    move(job, to)

    nothing = {"slot_host": None, "claim_token": "", "claimed_by": "", "claimed_until": None}
    assert values(job, nothing) == nothing


@pytest.mark.parametrize("source", ["starting", "recovering"])
def test_a_running_job_keeps_slot_token_and_container_without_a_lease(host: DockerHost, source: str) -> None:
    job = job_in(source, host, **CLAIM, container_id="c1")

    move(job, "running")

    expected = {"slot_host": host.pk, "claim_token": "token", "claimed_until": None, "container_id": "c1"}
    assert values(job, expected) == expected


@pytest.mark.parametrize(("source", "to"), [("launching", "starting"), ("starting", "recovering")])
def test_a_move_within_the_claim_keeps_it(host: DockerHost, source: str, to: str) -> None:
    job = job_in(source, host, **CLAIM)

    move(job, to)

    assert values(job, CLAIM) == CLAIM


@pytest.mark.parametrize(("source", "to"), FORGETS_THE_TRY)
def test_a_job_that_waits_again_forgets_its_last_try(host: DockerHost, source: str, to: str) -> None:
    job = job_in(source, host, **ONE_TRY)

    move(job, to)

    assert values(job, NO_TRY) == NO_TRY


@pytest.mark.parametrize(("source", "to"), [edge for edge in FORGETS_THE_TRY if edge[0] in ENDED])
def test_an_explicit_retry_begins_anew(host: DockerHost, source: str, to: str) -> None:
    job = job_in(source, host, **ALL_TRIES, attempt=3)

    move(job, to)

    assert values(job, NO_TRIES) == NO_TRIES
    assert in_row(job, "attempt") == 3


@pytest.mark.parametrize("source", ["queued", "scheduled"])
def test_a_job_that_is_taken_back_forgets_what_its_image_left(host: DockerHost, source: str) -> None:
    job = job_in(source, host, **ALL_TRIES | {"cancel_requested_at": None})

    move(job, "pending")

    kept = {name: ALL_TRIES[name] for name in ("retry_count", "launch_tries")}
    forgotten = {name: NO_TRIES[name] for name in ("last_error", "pull_error")}
    assert values(job, kept | forgotten) == kept | forgotten


@pytest.mark.parametrize(
    ("source", "to"), [edge for edge in FORGETS_THE_TRY if edge[0] not in ENDED and edge[1] != "pending"]
)
def test_a_retry_by_the_queue_keeps_its_counts(host: DockerHost, source: str, to: str) -> None:
    kept = ALL_TRIES | {"cancel_requested_at": None}
    job = job_in(source, host, **kept)

    move(job, to)

    assert values(job, kept) == kept


@pytest.mark.parametrize("source", ["launching", "recovering"])
def test_a_job_that_is_handed_back_keeps_its_place(host: DockerHost, source: str) -> None:
    job = job_in(source, host, queued_at=LONG_AGO)

    move(job, "queued")

    assert in_row(job, "queued_at") == LONG_AGO


@pytest.mark.parametrize("source", ["pending", "completed", "failed", "cancelled"])
def test_a_job_that_is_queued_anew_goes_to_the_end(host: DockerHost, source: str) -> None:
    job = job_in(source, host, queued_at=LONG_AGO)

    move(job, "queued")

    assert job.queued_at == in_row(job, "queued_at") > LONG_AGO


def test_a_job_that_is_due_queues_from_the_time_it_was_scheduled_for(host: DockerHost) -> None:
    job = job_in("scheduled", host, scheduled_for=LONG_AGO)

    move(job, "queued")

    assert (in_row(job, "queued_at"), in_row(job, "scheduled_for")) == (LONG_AGO, None)
    assert (job.queued_at, job.scheduled_for) == (LONG_AGO, None)


@pytest.mark.parametrize(("source", "to"), [edge for edge in EDGES if edge[1] in ENDED])
def test_a_job_that_ends_says_when_and_keeps_its_container(host: DockerHost, source: str, to: str) -> None:
    job = job_in(source, host, container_id="c1", scheduled_for=LONG_AGO)

    move(job, to, exit_code=7)

    assert job.finished_at == in_row(job, "finished_at") > LONG_AGO
    expected = {"container_id": "c1", "exit_code": 7, "scheduled_for": None}
    assert values(job, expected) == expected


def test_a_field_that_has_a_value_by_now_is_not_set_again(host: DockerHost) -> None:
    job = job_in("running", host)
    ContainerJob.objects.update(stop_requested_at=LONG_AGO)

    has_won = amend(job, if_null="stop_requested_at", stop_reason="timeout")

    assert (has_won, in_row(job, "stop_reason")) == (False, "")


def test_rows_are_locked_ascending_and_only_in_the_status_asked_for(host: DockerHost) -> None:
    first, other, last = (job_in(status, host) for status in ("queued", "pending", "queued"))

    with transaction.atomic():
        ids = locked([last.pk, other.pk, first.pk], "queued")

    assert ids == [first.pk, last.pk]


@pytest.mark.parametrize("status", sorted(ALIVE))
def test_the_database_refuses_an_alive_job_without_a_slot(host: DockerHost, status: str) -> None:
    with pytest.raises(IntegrityError, match="cm_job_slot_while_alive"):
        job_in(status, None)


@pytest.mark.parametrize("status", sorted(set(TABLE) - ALIVE))
def test_the_database_refuses_a_slot_for_a_job_that_is_not_alive(host: DockerHost, status: str) -> None:
    with pytest.raises(IntegrityError, match="cm_job_slot_while_alive"):
        job_in(status, host, slot_host=host)


def test_the_database_refuses_a_status_that_is_not_in_the_table(host: DockerHost) -> None:
    with pytest.raises(IntegrityError, match="cm_job_status"):
        job_in("odd", host)


def test_the_database_refuses_one_container_for_two_jobs(host: DockerHost) -> None:
    job_in("running", host, container_id="c1")

    with pytest.raises(IntegrityError, match=r"cm_job_container|container_id"):
        job_in("running", host, container_id="c1")


def test_any_number_of_jobs_have_no_container(host: DockerHost) -> None:
    for _ in range(2):
        job_in("running", host)

    assert ContainerJob.objects.filter(container_id=None).count() == 2
