"""Many procedures at once: calls in threads, everything else in the thread that drives them."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from container_manager.steps import Call, Steps, drive

#: seconds; only a test that fails waits so long.
PATIENCE = 10


class Pool(ThreadPoolExecutor):
    """Threads as a host has them."""

    width = 4


@pytest.fixture
def pool() -> Iterator[Pool]:
    with Pool(4) as executor:
        yield executor


def returning(value: str, *calls: Call) -> Steps[str]:
    for call in calls:  # noqa: UP028 (a tuple's iterator can't be sent a value)
        yield call
    return value


def raising(error: Exception, *calls: Call) -> Steps[str]:
    yield from returning("", *calls)
    raise error


def call_that_raises() -> None:
    raise OSError("no answer")


def drained(procedures: list[tuple[Steps[str], Pool]]) -> tuple[list[str], Exception | None]:
    """The results, and what was raised after the last of them."""
    results: list[str] = []
    try:
        for result in drive(procedures):
            results.append(result)
    except (KeyError, OSError, RuntimeError) as e:
        return results, e
    return results, None


def test_nothing_to_do_ends_at_once() -> None:
    assert list(drive([])) == []


def test_a_procedure_without_calls_has_its_result(pool: Pool) -> None:
    assert list(drive([(returning("done"), pool)])) == ["done"]


def test_results_come_as_the_procedures_end(pool: Pool) -> None:
    may_end = threading.Event()
    slow = returning("slow", lambda: may_end.wait(PATIENCE))

    results = drive([(slow, pool), (returning("quick", lambda: None), pool)])

    assert next(results) == "quick"
    may_end.set()
    assert list(results) == ["slow"]


def test_procedures_are_in_flight_together(pool: Pool) -> None:
    both = threading.Barrier(2, timeout=PATIENCE)

    results = list(drive((returning(name, both.wait), pool) for name in "ab"))

    assert sorted(results) == ["a", "b"]


def test_a_call_s_value_comes_back_to_the_yield(pool: Pool) -> None:
    def adding() -> Steps[int]:
        first = yield lambda: 1
        second = yield lambda: first + 1
        return first + second

    assert list(drive([(adding(), pool)])) == [3]


def test_a_call_s_exception_comes_back_to_the_yield(pool: Pool) -> None:
    def catching() -> Steps[str]:
        try:
            yield call_that_raises
        except OSError as e:
            message = str(e)
        return (yield lambda: f"caught: {message}")

    assert list(drive([(catching(), pool)])) == ["caught: no answer"]


@pytest.mark.parametrize(
    "broken",
    [raising(KeyError("defect")), raising(KeyError("defect"), lambda: None), returning("", call_that_raises)],
    ids=["before its first call", "after a call", "by a call whose exception nobody catches"],
)
def test_an_exception_that_escapes_is_raised_once_all_others_have_ended(pool: Pool, broken: Steps[str]) -> None:
    others = [(returning("a", lambda: None, lambda: None), pool), (returning("b"), pool)]

    results, error = drained([(broken, pool), *others])

    assert sorted(results) == ["a", "b"]
    assert isinstance(error, KeyError | OSError)


def test_calls_run_in_threads_and_bodies_in_the_one_that_drives(pool: Pool) -> None:
    here = threading.get_ident()

    def noting() -> Steps[tuple[list[int], int]]:
        bodies = [threading.get_ident()]
        of_call = yield threading.get_ident
        bodies.append(threading.get_ident())
        try:
            yield call_that_raises
        except OSError:
            bodies.append(threading.get_ident())
        return bodies, of_call

    [(bodies, of_call)] = drive([(noting(), pool)])

    assert bodies == [here] * 3
    assert of_call != here


def test_each_procedure_s_calls_run_in_its_own_pool() -> None:
    def name_of_thread() -> Steps[str]:
        return (yield lambda: threading.current_thread().name)

    with Pool(1, "one") as one, Pool(1, "two") as two:
        names = sorted(drive([(name_of_thread(), one), (name_of_thread(), two)]))

    assert [name.partition("_")[0] for name in names] == ["one", "two"]


def test_a_pool_that_was_shut_down_does_not_abandon_the_others(pool: Pool) -> None:
    closed = Pool(1)
    closed.shutdown()

    results, error = drained([(returning("a", lambda: None), closed), (returning("b", lambda: None), pool)])

    assert results == ["b"]
    assert isinstance(error, RuntimeError)


def test_no_more_are_under_way_than_the_threads_are_wide(pool: Pool) -> None:
    under_way, most = [0], [0]

    def counted() -> Steps[None]:
        under_way[0] += 1
        most[0] = max(most[0], under_way[0])
        yield lambda: None
        under_way[0] -= 1

    assert len(list(drive([(counted(), pool) for _ in range(20)]))) == 20
    assert most == [Pool.width]


def test_those_that_wait_for_slow_threads_hold_up_no_others(pool: Pool) -> None:
    may_end = threading.Event()

    with Pool(4) as slow:
        stuck = [(returning("slow", lambda: may_end.wait(PATIENCE)), slow) for _ in range(10)]
        results = drive([*stuck, (returning("quick", lambda: None), pool)])
        first = next(results)
        may_end.set()
        rest = list(results)

    assert (first, rest) == ("quick", ["slow"] * 10)


def test_after_a_stop_nothing_is_begun_and_what_was_begun_ends(pool: Pool) -> None:
    stopped = threading.Event()
    procedures = [(returning(str(number), stopped.set), pool) for number in range(20)]

    results = list(drive(procedures, stopped.is_set))

    assert 1 <= len(results) <= Pool.width + 1
