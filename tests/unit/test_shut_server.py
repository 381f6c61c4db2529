"""The environment of a Prefect server that we start, as Prefect itself reads it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flows.shut_server import ShutServer, new_password

SERVER = ShutServer(4201, "name:a-secret")
READ = """
import json
from prefect.settings import get_current_settings
s = get_current_settings()
api, secret = s.server.api, lambda value: value.get_secret_value() if value is not None else None
print(json.dumps({
    "password": secret(api.auth_string), "csrf": api.csrf_protection_enabled, "origins": api.cors_allowed_origins,
    "host": api.host, "analytics": s.server.analytics_enabled, "pages ask": s.server.ui.api_url,
    "url": s.api.url, "own password": secret(s.api.auth_string), "key": secret(s.api.key),
    "headers": s.client.custom_headers, "has csrf": s.client.csrf_support_enabled,
}))
"""
CLIENT = {
    "url": "http://127.0.0.1:4201/api", "own password": "name:a-secret", "key": "", "headers": {}, "has csrf": True,
}  # fmt: skip
SHUT = CLIENT | {
    "password": "name:a-secret", "csrf": True, "origins": "http://127.0.0.1:4201,http://localhost:4201",
    "host": "127.0.0.1", "analytics": False, "pages ask": "http://127.0.0.1:4201/api",
}  # fmt: skip
#: What a person may have set, for another server or to have one open.
INHERITED = {
    "nothing": {},
    "the same names": {
        "PREFECT_SERVER_API_AUTH_STRING": "mine", "PREFECT_SERVER_API_CSRF_PROTECTION_ENABLED": "false",
        "PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS": "*", "PREFECT_SERVER_API_HOST": "0.0.0.0",
        "PREFECT_SERVER_UI_API_URL": "http://mine/api", "PREFECT_API_URL": "http://mine/api",
        "PREFECT_API_AUTH_STRING": "mine", "PREFECT_API_KEY": "mine", "PREFECT_CLIENT_CUSTOM_HEADERS": '{"X": "mine"}',
        "PREFECT_CLIENT_CSRF_SUPPORT_ENABLED": "false", "PREFECT_SERVER_ANALYTICS_ENABLED": "true",
    },
    "in small letters": {
        "prefect_server_api_auth_string": "mine", "prefect_server_api_csrf_protection_enabled": "false",
        "prefect_server_api_cors_allowed_origins": "*", "prefect_api_auth_string": "mine", "prefect_api_key": "mine",
    },
    "older names": {
        "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "false", "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": "*",
        "PREFECT_UI_API_URL": "http://mine/api",
    },
    "as JSON": {
        "PREFECT_SERVER": '{"api": {"auth_string": "mine", "csrf_protection_enabled": false, "host": "0.0.0.0"}}',
        "PREFECT_SERVER_API": '{"auth_string": "mine", "csrf_protection_enabled": false, "cors_allowed_origins": "*"}',
        "PREFECT_API": '{"url": "http://mine/api", "auth_string": "mine", "key": "mine"}',
        "PREFECT_CLIENT": '{"custom_headers": {"X": "mine"}, "csrf_support_enabled": false}',
        "PREFECT_SERVER_UI": '{"api_url": "http://mine/api"}',
    },
}  # fmt: skip
IN_FILE = "PREFECT_API_AUTH_STRING=mine\nPREFECT_API_URL=http://mine/api\nPREFECT_SERVER_API_AUTH_STRING=mine\n"
#: What Prefect would take before single variables.
GROUPS_IN_FILE = """
PREFECT_SERVER='{"api": {"auth_string": "weak", "cors_allowed_origins": "*", "csrf_protection_enabled": false}}'
PREFECT_SERVER_API='{"auth_string": "weak", "cors_allowed_origins": "*", "host": "0.0.0.0"}'
PREFECT_SERVER_UI='{"api_url": "http://mine/api"}'
PREFECT_API='{"url": "http://mine/api", "auth_string": "mine", "key": "mine"}'
PREFECT_CLIENT='{"csrf_support_enabled": false}'
"""
in_both_files = pytest.mark.parametrize("written", [IN_FILE, GROUPS_IN_FILE], ids=["single", "groups"])


def read(environment: dict[str, str], folder: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", READ], env=environment, cwd=folder, capture_output=True, text=True, check=True
    )
    settings: dict[str, Any] = json.loads(done.stdout)
    return settings


def inherited(changes: dict[str, str], home: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith("PREFECT_")}
    return kept | {"PREFECT_HOME": str(home)} | changes


@in_both_files
@pytest.mark.parametrize("changes", INHERITED.values(), ids=INHERITED)
def test_the_server_is_shut_whatever_is_set(tmp_path: Path, changes: dict[str, str], written: str) -> None:
    (tmp_path / ".env").write_text(written)

    assert read(SERVER.environment(inherited(changes, tmp_path)), tmp_path) == SHUT


@in_both_files
@pytest.mark.parametrize("changes", INHERITED.values(), ids=INHERITED)
def test_who_asks_it_has_its_password_and_no_other(tmp_path: Path, changes: dict[str, str], written: str) -> None:
    (tmp_path / ".env").write_text(written)
    found = read(SERVER.client_environment(inherited(changes, tmp_path)), tmp_path)

    assert {name: found[name] for name in CLIENT} == CLIENT


@pytest.mark.parametrize(
    ("set_so", "expected"),
    [
        ({}, "127.0.0.1"),
        ({"NO_PROXY": "a.example,b.example"}, "a.example,b.example,127.0.0.1"),
        ({"no_proxy": "a.example"}, "a.example,127.0.0.1"),
        ({"no_proxy": "a.example", "NO_PROXY": "b.example"}, "a.example,127.0.0.1"),
        ({"NO_PROXY": "127.0.0.1"}, "127.0.0.1"),
    ],
)
def test_it_is_asked_without_a_proxy(set_so: dict[str, str], expected: str) -> None:
    made = SERVER.client_environment(set_so)

    assert (made["NO_PROXY"], made["no_proxy"]) == (expected, expected)


def test_what_else_is_set_stays() -> None:
    kept = {"PATH": "/bin", "PREFECT_HOME": "/home", "PREFECT_SERVER_DATABASE_CONNECTION_URL": "sqlite+aiosqlite:///x"}

    assert kept.items() <= SERVER.environment(kept).items()


def test_passwords_are_made_anew_and_are_not_shown() -> None:
    passwords = {new_password("name") for _ in range(50)}

    assert len(passwords) == 50
    assert "a-secret" not in repr(SERVER)
