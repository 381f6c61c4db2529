"""The site as the tests run it: SQLite in a folder of this run and, where there is one, PostgreSQL beside it."""

import os
import tempfile
from pathlib import Path

from container_manager.settings import *  # noqa: F403
from container_manager.settings import database_from_url

#: Made here, and removed by name when the run is over; nothing else is ever removed.
SCRATCH = Path(tempfile.mkdtemp(prefix="container-manager-tests-"))

SECRET_KEY = "tests"
DATABASES = {"default": database_from_url(f"sqlite:///{SCRATCH / 'site.sqlite3'}")}
# In a file, so that threads and processes share it.
DATABASES["default"]["TEST"] = {"NAME": str(SCRATCH / "test.sqlite3")}
if url := os.environ.get("TEST_POSTGRES_URL"):
    DATABASES["postgres"] = database_from_url(url) | {"TEST": {"NAME": f"test_container_manager_{os.getpid()}"}}

PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
CONTAINER_MANAGER = {"RETRY_BASE_SECONDS": 0.2, "STOP_GRACE_SECONDS": 1}
