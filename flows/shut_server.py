"""A Prefect server that we start: on loopback, for those who know its password, and for no page but its own.

Whoever can write to an API can have code run by those who serve its deployments. `prefect server start` answers
anybody, and pages of any origin.
"""

import secrets
from base64 import b64encode
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

HOST = "127.0.0.1"
#: The same settings under other names, or as JSON: Prefect would take them before the ones that are set here.
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
    """`name:password`, which is what Prefect calls an auth string. Letters, digits, `-` and `_`: quoted nowhere."""
    return f"{name}:{secrets.token_urlsafe(32)}"


@dataclass(frozen=True)
class ShutServer:
    port: int
    #: `name:password`; its pages ask for the whole of it.
    password: str = field(repr=False)

    @property
    def pages(self) -> str:
        return f"http://{HOST}:{self.port}"

    @property
    def api(self) -> str:
        return f"{self.pages}/api"

    @property
    def authorization(self) -> str:
        """The header that a request to it has."""
        return f"Basic {b64encode(self.password.encode()).decode()}"

    def environment(self, inherited: Mapping[str, str]) -> dict[str, str]:
        """Of the server's process."""
        # Its pages ask `api`, also where they were opened by the other name.
        origins = [self.pages, f"http://localhost:{self.port}"]
        return _replaced(
            self.client_environment(inherited),
            {
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
        """Of a process that asks this server: without what `inherited` says of another API, passwords above all."""
        return _replaced(
            inherited,
            {
                "PREFECT_API_URL": self.api,
                "PREFECT_API_AUTH_STRING": self.password,
                "PREFECT_API_KEY": "",
                "PREFECT_CLIENT_CUSTOM_HEADERS": "{}",
                "PREFECT_CLIENT_CSRF_SUPPORT_ENABLED": "true",
            }
            | without_proxy(inherited),
        )


def without_proxy(inherited: Mapping[str, str]) -> dict[str, str]:
    """The variables that keep requests to a server of ours, and its password with them, from a proxy."""
    # Of the two, those who read them take the second before the first.
    hosts = (inherited.get("no_proxy") or inherited.get("NO_PROXY") or "").split(",")
    value = ",".join(dict.fromkeys([*filter(None, hosts), HOST]))
    return {"NO_PROXY": value, "no_proxy": value}


def _replaced(inherited: Mapping[str, str], values: Mapping[str, str]) -> dict[str, str]:
    """Prefect reads the names of variables in capitals and in small letters."""
    gone: Iterable[str] = _OTHER_NAMES | values.keys()
    return {name: value for name, value in inherited.items() if name.upper() not in gone} | dict(values)
