"""A pass in a process whose clock is wrong. DATABASE_URL says for which queue, its argument by how many seconds.

All times that it writes into rows beforehand are the database's. It prints what became of them.
"""

import datetime
import json
import os
import sys
import time


class _AnyDatetime(type):
    """What was made before, or in C, is a datetime, too."""

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, _usual)


_usual = datetime.datetime


def set_clock(seconds: float) -> None:
    """Let this process believe that it is so much later."""

    class Skewed(_usual, metaclass=_AnyDatetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
            return _usual.now(tz) + datetime.timedelta(seconds=seconds)

        @classmethod
        def utcnow(cls) -> datetime.datetime:
            return cls.now(datetime.UTC).replace(tzinfo=None)

    usual_time = time.time
    time.time = lambda: usual_time() + seconds
    time.time_ns = lambda: round(time.time() * 1e9)
    datetime.datetime = Skewed  # type: ignore[misc]


def main() -> dict[str, object]:
    from django.db.models.functions import Now
    from django.utils import timezone

    from container_manager import manifest
    from container_manager.exceptions import EngineFailed
    from container_manager.leases import WorkLease
    from container_manager.models import ContainerJob, Installation
    from container_manager.queue import QueueManager
    from container_manager.transitions import from_now
    from tests.fake_engine import Fleet, launched, one_round, queued, raising, row

    fleet = Fleet()
    host = fleet.add_host(max_concurrent_jobs=100)
    manager = QueueManager(fleet)

    def with_times(job: ContainerJob, **fields: object) -> ContainerJob:
        ContainerJob.objects.filter(pk=job.pk).update(**fields)
        return job

    jobs = {
        "in time": with_times(launched(manager), deadline_at=from_now(600)),
        "past its deadline": with_times(launched(manager), deadline_at=from_now(-1)),
        "stopped just now": with_times(
            launched(manager), stop_requested_at=Now(), stop_reason="timeout", deadline_at=from_now(-1)
        ),
        "launching": queued(manager),
    }
    manager.claim(100, only=[jobs["launching"].pk])
    jobs |= {
        "lease is over": queued(manager),
        "due": with_times(queued(manager), status="scheduled", queued_at=None, scheduled_for=from_now(-1)),
        "later": with_times(queued(manager), status="scheduled", queued_at=None, scheduled_for=from_now(600)),
        "retried": with_times(queued(manager), priority=100),
        "in a minute": manifest.queue(manifest.parse('{"jobs": [{"image": "busybox", "schedule_in_seconds": 60}]}'))[0],
    }
    manager.claim(100, only=[jobs["lease is over"].pk])
    with_times(jobs["lease is over"], claimed_until=from_now(-1))
    Installation.objects.update(work_token="another", work_until=from_now(600))
    host.before("create", raising(EngineFailed("create: no space left")))

    one_round(manager)

    now = Installation.now()
    waits = {name: row(jobs[name]).scheduled_for - now for name in ("retried", "in a minute")}
    deadline = row(jobs["due"]).deadline_at - now
    return {
        "skew": round((timezone.now() - now).total_seconds() / 3600),
        "statuses": {name: row(job).status for name, job in jobs.items()},
        "stopped": [name for name, job in jobs.items() if row(job).stop_requested_at],
        "signals": [subject.split()[0] for subject in host.subjects("signal")],
        "waits": {name: round(wait.total_seconds() / 60, 1) for name, wait in waits.items()},
        "deadline": round(deadline.total_seconds() / 60),
        "work lease": WorkLease().acquire(),
    }


if __name__ == "__main__":
    set_clock(float(sys.argv[1]))
    os.environ["DJANGO_SETTINGS_MODULE"] = "container_manager.settings"
    import django

    django.setup()
    print(json.dumps(main()))  # noqa: T201
