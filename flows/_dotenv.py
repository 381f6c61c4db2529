"""Prefect reads `.env` in the working directory. A password there is meant only for the API that is named there."""

import os
from pathlib import Path

from dotenv import dotenv_values
from prefect.context import refresh_global_settings_context
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL

_URL, _PASSWORD = "PREFECT_API_URL", "PREFECT_API_AUTH_STRING"


def keep_password_from_others() -> None:
    """If the environment or a profile names another API than `.env`, use it without the password of `.env`.

    Prefect looks up each setting separately, so it would send that password to any API. A password in the environment
    is kept: it is meant for the API that is used.
    """
    file = Path(".env")
    # Prefect reads only a regular file. Reading a pipe could block for ever.
    written = {name.upper(): value for name, value in dotenv_values(file).items()} if file.is_file() else {}
    url, password = written.get(_URL), written.get(_PASSWORD)
    if not url or not password or _PASSWORD in map(str.upper, os.environ):
        return
    if PREFECT_API_AUTH_STRING.value() == password and _without_slash(PREFECT_API_URL.value()) != _without_slash(url):
        # Child processes inherit this.
        os.environ[_PASSWORD] = ""
        refresh_global_settings_context()


def _without_slash(url: str | None) -> str:
    return str(url or "").rstrip("/")
