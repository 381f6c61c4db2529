"""`python -m deployments limits`: the limits of the tags, created where they are missing, and their use."""

from flows import _django  # noqa: F401, I001 (sets Django up before anything else is imported)

from prefect.client.orchestration import SyncPrefectClient

from container_manager.conf import get_settings
from container_manager.queue import queue_manager
from container_manager.types import HOST_TAG_PREFIX, JOB_TAG
from flows.limits import LAUNCH_TAG, free_leaked, launch_tag, read_rows, settle


def see_to_limits(client: SyncPrefectClient, *, reset: bool = False) -> list[str]:
    """Create missing limits, follow the hosts' slots, and free leaked slots. Returns a sentence for each change."""
    named = get_settings().named
    done = [f"set the limit of tag {named(tag)} to {limit}" for tag, limit in settle(client, reset=reset).items()]
    row = read_rows(client).get(LAUNCH_TAG)
    if row is not None and (freed := free_leaked(client, row)):
        done.append(f"freed {freed} slots of tag {launch_tag()}: their task runs have ended")
    return done


def table(client: SyncPrefectClient) -> list[str]:
    """A line per tag: its limit, and how much of it is in use."""
    rows = read_rows(client)
    hosts = queue_manager.get_worker_metrics().hosts
    launching = rows[LAUNCH_TAG].active_slots if LAUNCH_TAG in rows else "not counted"
    lines = [
        (JOB_TAG, sum(host.alive for host in hosts), "containers alive"),
        *(
            (HOST_TAG_PREFIX + host.name, host.alive, f"alive; the host allows {host.max_concurrent_jobs}")
            for host in hosts
        ),
        (LAUNCH_TAG, launching, "launch tasks in flight"),
    ]
    cells = [
        (
            f"tag {get_settings().named(tag)}",
            f"limit {rows[tag].limit}" if tag in rows else "no limit",
            f"in use {use} ({what})",
        )
        for tag, use, what in lines
    ]
    widths = [max(len(row[column]) for row in cells) for column in range(2)]
    return [f"{tag:<{widths[0]}}  {limit:<{widths[1]}}  {use}" for tag, limit, use in cells]
