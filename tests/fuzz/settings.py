"""The standalone site with a short lease, so that a stall outlives it within seconds."""

from container_manager.settings import *  # noqa: F403

CONTAINER_MANAGER = {"LEASE_SECONDS": 2, "STOP_GRACE_SECONDS": 1, "RETRY_BASE_SECONDS": 0.2}
