"""The standalone site on the database that is measured; PostgreSQL gets a database of its own name."""

from container_manager.settings import *  # noqa: F403
