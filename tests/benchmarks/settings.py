"""The standalone site on the database that is measured; PostgreSQL gets a database of its own name."""

from container_manager.settings import *  # noqa: F403

# Connections that last, as those of one pass do: ten thousand passes would measure how fast others are made.
DATABASES["default"]["CONN_MAX_AGE"] = None  # noqa: F405
