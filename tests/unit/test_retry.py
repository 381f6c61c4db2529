"""What becomes of a job after an error, and how long a retry waits."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from container_manager import exceptions
from container_manager.exceptions import EngineError
from container_manager.retry import RetryPolicy, Verdict, verdict_on

#: Written out again; a class that is added must be added here.
VERDICTS = {
    "OutcomeUnknown": Verdict.LEAVE,
    "LeaseExpired": Verdict.LEAVE,
    "HostUnavailable": Verdict.HAND_BACK,
    "HostMisconfigured": Verdict.HAND_BACK,
    "EngineReplaced": Verdict.HAND_BACK,
    "ShuttingDown": Verdict.HAND_BACK,
    "NameTaken": Verdict.DROP,
    "ContainerGone": Verdict.DROP,
    "RequestRefused": Verdict.FAIL,
    "SecretUnavailable": Verdict.RETRY,
    "ImageMissing": Verdict.RETRY,
    "NetworkMissing": Verdict.RETRY,
    "ContainerNotRunning": Verdict.RETRY,
    "ContainerRunning": Verdict.RETRY,
    "EngineFailed": Verdict.RETRY,
    "LogsUnavailable": Verdict.RETRY,
    "EngineError": Verdict.RETRY,
}


@pytest.mark.parametrize(("name", "verdict"), VERDICTS.items())
def test_every_error_has_its_verdict(name: str, verdict: Verdict) -> None:
    error = getattr(exceptions, name)("why")

    assert verdict_on(error) is verdict


def test_no_engine_error_is_without_a_verdict_of_its_own() -> None:
    kinds = {kind.__name__ for kind in vars(exceptions).values() if isinstance(kind, type)}

    engine_errors = {name for name in kinds if issubclass(getattr(exceptions, name), EngineError)}
    assert engine_errors <= VERDICTS.keys()


@pytest.mark.parametrize("name", ["InvalidTransition", "DatabaseBusy", "ContainerManagerError"])
def test_an_error_that_no_launch_raises_has_a_verdict_too(name: str) -> None:
    error = getattr(exceptions, name)("why")

    assert verdict_on(error) in Verdict


@given(retry_count=st.integers(0, 10**9), base=st.floats(0.01, 100), most=st.floats(0.01, 10_000))
def test_a_retry_waits_twice_as_long_as_the_last_up_to_the_greatest(retry_count: int, base: float, most: float) -> None:
    usual = most if retry_count > 60 else min(base * 2**retry_count, most)

    delay = RetryPolicy(base, most).delay_seconds(retry_count)

    assert 0.75 * usual <= delay <= 1.25 * usual


@pytest.mark.parametrize(("retry_count", "usual"), [(0, 10), (1, 20), (2, 40), (6, 640), (7, 900), (10**6, 900)])
def test_waits_double_from_ten_seconds_to_fifteen_minutes(retry_count: int, usual: float) -> None:
    policy = RetryPolicy(base_seconds=10, max_seconds=900)

    delays = [policy.delay_seconds(retry_count) for _ in range(200)]

    assert min(delays) >= 0.75 * usual
    assert max(delays) <= 1.25 * usual


def test_jobs_that_failed_together_do_not_come_back_together() -> None:
    policy = RetryPolicy(base_seconds=10, max_seconds=900)

    delays = {policy.delay_seconds(0) for _ in range(50)}

    assert len(delays) > 40
    assert max(delays) - min(delays) > 1
