"""Prefect reads `.env` in the working directory: a password there is for the API that is named there, for no other."""

import os
from pathlib import Path

from dotenv import dotenv_values
from prefect.context import refresh_global_settings_context
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL

_URL, _PASSWORD = "PREFECT_API_URL", "PREFECT_API_AUTH_STRING"


def keep_password_from_others() -> None:
    """Where the environment or a profile names another API than `.env`, ask it without the password of `.env`.

    Prefect takes each setting from where it finds it first, and would send that password anywhere. One that is set in
    the environment is meant for whatever API is set there.
    """
    file = Path(".env")
    # Prefect reads no other, and to read a pipe might take for ever.
    written = {name.upper(): value for name, value in dotenv_values(file).items()} if file.is_file() else {}
    url, password = written.get(_URL), written.get(_PASSWORD)
    if not url or not password or _PASSWORD in map(str.upper, os.environ):
        return
    if PREFECT_API_AUTH_STRING.value() == password and _without_slash(PREFECT_API_URL.value()) != _without_slash(url):
        # So that processes of ours go without it, too.
        os.environ[_PASSWORD] = ""
        refresh_global_settings_context()


def _without_slash(url: str | None) -> str:
    return str(url or "").rstrip("/")
