"""The protocol holds whatever stops or stalls between any two of its steps; and each of its guards is needed."""

from functools import cache

import pytest

from tests.unit.protocol_model import ALIVE, LEASED, MOVES, Found, Model, State, Steps, TooManyStates, Worker, search

MOST_STATES = 300_000

#: Each is searched to its end.
MODELS = {
    "two launchers and a recoverer": Model(recoverers=1),
    "a cancellation": Model(cancels=1, recoverers=1, max_tries=0),
    "a cancellation between two attempts": Model(cancels=1),
    "a removal by hand": Model(removals=1),
    "a host that is down": Model(outages=1),
    "errors and a retry": Model(max_tries=0, max_retries=1, has_errors=True, cancels=1),
    "a lost job that runs again": Model(max_tries=0, max_retries=1, removals=1, cancels=1, reruns_lost=True),
    "a retry by hand": Model(max_tries=0, cancels=1, requeues=1),
}


@cache
def searched(name: str) -> Found:
    return search(MODELS[name], MOST_STATES)


@pytest.mark.parametrize("name", MODELS)
def test_nothing_that_never_may_happen_does_and_every_job_can_end(name: str) -> None:
    found = searched(name)

    assert (found.violation, found.way) == ("", ())
    assert found.states > 1000


def test_the_models_make_every_move_that_the_table_has_for_an_alive_job() -> None:
    """A move that is new in the table is new to the proof."""
    made = set().union(*(searched(name).moves for name in MODELS))

    for status in ALIVE:
        assert {to for source, to in made if source == status} - {status} == MOVES[status]


def test_a_search_that_is_too_large_proves_nothing() -> None:
    with pytest.raises(TooManyStates):
        search(Model(), 1000)


class NoTokens(Model):
    """A move looks at the status alone."""

    def _estranged(self, workers: tuple[Worker, ...]) -> tuple[Worker, ...]:
        return workers


class StartsWhatItFinds(Model):
    """A recoverer starts the container that another created."""

    def _noting(self, s: State, i: int, w: Worker) -> Steps:
        yield False, "starts it itself", s.at(i, "asking_to_run")


class RemovesWithoutALook(Model):
    """It has looked before its note, and does not again right before the removal."""

    def _removing(self, s: State, i: int, w: Worker) -> Steps:
        yield False, "removes it", self._removed(s, w.attempt).at(i, w.note)


class RemovesBeforeItNotes(Model):
    def _noting(self, s: State, i: int, w: Worker) -> Steps:
        yield False, "goes on", s.at(i, "discarding", "noting_late")

    def _noting_late(self, s: State, i: int, w: Worker) -> Steps:
        moved = self._moved(s, i, "recovering")
        yield False, "notes that it removed it", moved.at(i, "handing_back") if moved else s.idle(i)


class RemovesBeforeItRecords(Model):
    def _harvesting(self, s: State, i: int, w: Worker) -> Steps:
        yield False, "removes it", self._removed(s, w.attempt).idle(i)


class CollectsWhatNoRowNames(Model):
    """Whatever its attempt."""

    def _is_of_now(self, s: State, attempt: int) -> bool:
        return s.row.box == attempt


class LosesWhatIsNotListed(Model):
    """The list comes before the rows, and no look at the container follows."""

    def _idle(self, s: State, i: int) -> Steps:
        yield from super()._idle(s, i)
        if not any(box.state == "running" for box in s.boxes):
            yield False, f"{i}: lists nothing", s.with_worker(i, Worker("missing", s.row.attempt, "running", True))

    def _missing(self, s: State, i: int, w: Worker) -> Steps:
        yield False, "loses it", s.at(i, "losing")


class LeavesLeftovers(Model):
    def _judging(self, s: State, i: int, w: Worker) -> Steps:
        yield False, "leaves it", s.idle(i)


class KeepsClaims(Model):
    """Nobody takes over."""

    def _idle(self, s: State, i: int) -> Steps:
        if s.row.status not in LEASED:
            yield from super()._idle(s, i)


class Naive(Model):
    """A claim that is stale is queued again, and containers have random names."""

    def _naming(self, s: State, i: int, w: Worker) -> Steps:
        yield False, "goes on", s.at(i, "asking_to_run")

    def _asking_to_run(self, s: State, i: int, w: Worker) -> Steps:
        yield False, "starts", (self._started(s, w.attempt) or s).at(i, "saving")

    def _saving(self, s: State, i: int, w: Worker) -> Steps:
        row = s.row._replace(status="running", box=w.attempt, has_lease=False)
        yield False, "saves the row", s._replace(row=row).idle(i)

    def _estranged(self, workers: tuple[Worker, ...]) -> tuple[Worker, ...]:
        return workers


LACKING: dict[type[Model], str] = {
    NoTokens: "it is lost, though nobody removed it",
    StartsWhatItFinds: "an attempt is started twice",
    RemovesWithoutALook: "a result is removed before it is recorded",
    RemovesBeforeItNotes: "it is lost, though nobody removed it",
    RemovesBeforeItRecords: "a result is removed before it is recorded",
    CollectsWhatNoRowNames: "a result is removed before it is recorded",
    LosesWhatIsNotListed: "it is lost, though nobody removed it",
    LeavesLeftovers: "stuck",
    KeepsClaims: "stuck",
    Naive: "a run is forgotten",
}


@pytest.mark.parametrize("kind", LACKING, ids=lambda kind: kind.__name__)
def test_a_protocol_that_lacks_one_of_its_guards_is_found_out(kind: type[Model]) -> None:
    found = search(kind(), MOST_STATES)

    assert (found.violation, bool(found.way)) == (LACKING[kind], True)
