"""The settings of a Prefect server that we start: on loopback, with a password, and closed to other sites' pages.

Anyone who can write to an API can run jobs, and code on its workers. By default `prefect server start` has no password
and answers pages of any origin.
"""

import json
import secrets
from base64 import b64encode
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

HOST = "127.0.0.1"
#: Other names for the same settings, or JSON with them. Prefect would prefer them to those that are set here.
_OTHER_NAMES = frozenset(
    {
        "PREFECT_API",
        "PREFECT_CLIENT",
        "PREFECT_SERVER",
        "PREFECT_SERVER_API",
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS",
        "PREFECT_SERVER_CSRF_PROTECTION_ENABLED",
        "PREFECT_SERVER_UI",
        "PREFECT_UI_API_URL",
    }
)


def new_password(name: str) -> str:
    """`name:password`, Prefect's auth string. The password has only characters that never need quotes."""
    return f"{name}:{secrets.token_urlsafe(32)}"


@dataclass(frozen=True)
class ShutServer:
    port: int
    #: `name:password`. The server's pages ask for all of it.
    password: str = field(repr=False)

    @property
    def pages(self) -> str:
        return f"http://{HOST}:{self.port}"

    @property
    def api(self) -> str:
        return f"{self.pages}/api"

    @property
    def authorization(self) -> str:
        """The `Authorization` header of a request to it."""
        return f"Basic {b64encode(self.password.encode()).decode()}"

    def environment(self, inherited: Mapping[str, str]) -> dict[str, str]:
        """The environment of the server's process."""
        # Its pages send requests to `api`, even if they were opened as `localhost`.
        origins = [self.pages, f"http://localhost:{self.port}"]
        api = {
            "auth_string": self.password,
            "cors_allowed_origins": ",".join(origins),
            "csrf_protection_enabled": True,
            "host": HOST,
        }
        return _replaced(
            inherited,
            self._client_values(inherited)
            | {
                # As groups too: Prefect would take groups in `.env` before single variables.
                "PREFECT_SERVER": json.dumps({"api": api, "ui": {"api_url": self.api}, "analytics_enabled": False}),
                "PREFECT_SERVER_API": json.dumps(api),
                "PREFECT_SERVER_UI": json.dumps({"api_url": self.api}),
                "PREFECT_SERVER_API_AUTH_STRING": self.password,
                "PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS": ",".join(origins),
                "PREFECT_SERVER_API_CSRF_PROTECTION_ENABLED": "true",
                "PREFECT_SERVER_API_HOST": HOST,
                "PREFECT_SERVER_UI_API_URL": self.api,
                "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
                "DO_NOT_TRACK": "1",
            },
        )

    def client_environment(self, inherited: Mapping[str, str]) -> dict[str, str]:
        """The environment of a process that uses this server, without credentials for another API in `inherited`."""
        return _replaced(inherited, self._client_values(inherited))

    def _client_values(self, inherited: Mapping[str, str]) -> dict[str, str]:
        return {
            "PREFECT_API": json.dumps({"url": self.api, "auth_string": self.password, "key": ""}),
            "PREFECT_CLIENT": json.dumps({"csrf_support_enabled": True}),
            "PREFECT_API_URL": self.api,
            "PREFECT_API_AUTH_STRING": self.password,
            "PREFECT_API_KEY": "",
            "PREFECT_CLIENT_CUSTOM_HEADERS": "{}",
            "PREFECT_CLIENT_CSRF_SUPPORT_ENABLED": "true",
        } | without_proxy(inherited)


def without_proxy(inherited: Mapping[str, str]) -> dict[str, str]:
    """The variables that keep requests to our server, and so its password, from a proxy."""
    # Programs that read both prefer the lower-case one.
    hosts = (inherited.get("no_proxy") or inherited.get("NO_PROXY") or "").split(",")
    value = ",".join(dict.fromkeys([*filter(None, hosts), HOST]))
    return {"NO_PROXY": value, "no_proxy": value}


def _replaced(inherited: Mapping[str, str], values: Mapping[str, str]) -> dict[str, str]:
    """Also replaces variables in lower case, which Prefect reads as well."""
    gone: Iterable[str] = _OTHER_NAMES | values.keys()
    return {name: value for name, value in inherited.items() if name.upper() not in gone} | dict(values)
