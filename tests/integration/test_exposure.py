"""Real Prefect servers, open and closed, and what may stand before one: whose runs may name an image and a command."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any
from uuid import UUID

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.settings import (
    PREFECT_API_AUTH_STRING,
    PREFECT_API_SSL_CERT_FILE,
    PREFECT_API_URL,
    PREFECT_CLIENT_CUSTOM_HEADERS,
    temporary_settings,
)
from prefect.types.entrypoint import EntrypointType

from container_manager.conf import Settings
from container_manager.models import ContainerJob
from flows.exposure import why_open
from flows.run_container_job import container_job, run_container_job
from tests.conftest import ROOT, TAG_SLOTS, PrefectServer, database_url
from tests.integration.cable import Cable
from tests.integration.gateway import Guard, gateway, make_certificate

AUTH = "somebody:hunter2"


def server(home: Path, **env: str) -> Iterator[PrefectServer]:
    """Reached by others than this machine, too."""
    prefect_server = PrefectServer(home, os.environ | TAG_SLOTS | env, is_open=True, host="0.0.0.0")
    try:
        prefect_server.start()
        yield prefect_server
    finally:
        prefect_server.stop()


@pytest.fixture(scope="module")
def open_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectServer]:
    """With protection against CSRF, which asks nobody who it is."""
    yield from server(
        tmp_path_factory.mktemp("open"),
        PREFECT_SERVER_CSRF_PROTECTION_ENABLED="true",
        PREFECT_SERVER_API_HOST="0.0.0.0",
    )


@pytest.fixture(scope="module")
def closed_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectServer]:
    yield from server(
        tmp_path_factory.mktemp("closed"),
        PREFECT_SERVER_CSRF_PROTECTION_ENABLED="true",
        PREFECT_SERVER_API_AUTH_STRING=AUTH,
    )


def why(url: str, settings: Mapping[Any, Any] = MappingProxyType({})) -> str:
    """As who has the password sees it."""
    with temporary_settings({PREFECT_API_URL: url, PREFECT_API_AUTH_STRING: AUTH, **settings}):
        told = why_open(Settings())
    assert "hunter2" not in told
    return told


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_a_server_that_others_reach_is_open_unless_it_has_a_password(
    open_server: PrefectServer, closed_server: PrefectServer, host: str
) -> None:
    told = why(f"http://{host}:{open_server.port}/api")

    assert f"the Prefect API at http://{host}:{open_server.port}/api takes flow runs from anybody" in told
    assert ("since it listens on 0.0.0.0 too" in told) is (host != "0.0.0.0")
    assert why(f"http://{host}:{closed_server.port}/api") == ""


def test_a_server_on_loopback_alone_is_fine(prefect_server: PrefectServer) -> None:
    assert why(prefect_server.url) == ""


def test_a_tunnel_on_loopback_does_not_hide_what_the_server_says_of_itself(
    open_server: PrefectServer, closed_server: PrefectServer, prefect_server: PrefectServer
) -> None:
    own = prefect_server.port
    told = {}
    for port in (open_server.port, closed_server.port, own):
        cable = Cable(port)
        told[port] = why(f"http://127.0.0.1:{cable.port}/api")
        cable.cut()

    assert "takes flow runs from anybody, since it listens on 0.0.0.0 too" in told[open_server.port]
    assert (told[closed_server.port], told[own]) == ("", "")


def test_an_api_with_a_ca_of_its_own_is_asked_with_it(
    open_server: PrefectServer, closed_server: PrefectServer, tmp_path: Path
) -> None:
    certificate, ca = tmp_path / "gateway.pem", {PREFECT_API_SSL_CERT_FILE: str(tmp_path / "gateway.pem")}
    make_certificate(certificate)
    with (
        gateway(open_server.port, certificate=certificate) as to_open,
        gateway(closed_server.port, certificate=certificate) as to_closed,
    ):
        is_open, is_closed = why(to_open, ca), why(to_closed, ca)
        untrusted = why(to_closed)

    assert "takes flow runs from anybody" in is_open
    assert is_closed == ""
    assert f"the Prefect API at {to_closed} could not be asked" in untrusted
    assert "PREFECT_API_SSL_CERT_FILE" in untrusted


def needs_header(status: int) -> Guard:
    return lambda headers: None if headers.get("x-tenant") == "team" else (status, {})


def login(headers: dict[str, str]) -> tuple[int, dict[str, str]] | None:
    return None if "authorization" in headers else (302, {"Location": "https://login.example/authorize?rd=/api"})


@pytest.mark.parametrize(
    ("guard", "of_open", "of_closed"),
    [
        (lambda headers: None, "takes flow runs from anybody", ""),
        (needs_header(404), "could not be asked", ""),
        (needs_header(403), "", ""),
        (login, "", ""),
        (lambda headers: (503, {}), "could not be asked", "could not be asked"),
    ],
    ids=["it lets all through", "a header names the tenant", "a header is the password", "a login", "nothing behind"],
)
def test_a_gateway_is_asked_as_it_wants_to_be_asked(
    open_server: PrefectServer, closed_server: PrefectServer, guard: Guard, of_open: str, of_closed: str
) -> None:
    headers = {PREFECT_CLIENT_CUSTOM_HEADERS: {"X-Tenant": "team"}}
    with gateway(open_server.port, guard) as to_open, gateway(closed_server.port, guard) as to_closed:
        told = why(to_open, headers), why(to_closed, headers)

    for sentence, expected in zip(told, (of_open, of_closed), strict=True):
        assert expected in sentence
        assert bool(sentence) is bool(expected)


@pytest.mark.parametrize("has_parent", [False, True])
@pytest.mark.parametrize("database", ["postgres"], indirect=True)
def test_a_run_that_an_open_api_hands_over_is_refused_whatever_its_parent_is(
    database: str, open_server: PrefectServer, tmp_path: Path, has_parent: bool
) -> None:
    with temporary_settings({PREFECT_API_URL: open_server.url}):
        run_id = create_run(has_parent=has_parent)
        environment = os.environ | {
            "PREFECT_API_URL": open_server.url,
            "PREFECT_HOME": str(tmp_path),
            "DATABASE_URL": database_url(),
            "DJANGO_SETTINGS_MODULE": "container_manager.settings",
        }
        subprocess.run([sys.executable, "-m", "prefect.engine", str(run_id)], cwd=ROOT, env=environment, timeout=100)
        run = read_run(run_id)

    assert run.state is not None
    assert run.state.is_failed()
    assert "takes flow runs from anybody, since it listens on 0.0.0.0 too" in (run.state.message or "")
    assert (run.parent_task_run_id is not None, ContainerJob.objects.count()) == (has_parent, 0)


def create_run(*, has_parent: bool) -> UUID:
    deployment = run_container_job.to_deployment(name="test", entrypoint_type=EntrypointType.MODULE_PATH)
    with get_client(sync_client=True) as client:
        parent = client.create_task_run(container_job, None, "parent").id if has_parent else None
        return client.create_flow_run_from_deployment(
            deployment.apply(), parameters={"spec": {"image": "busybox"}}, parent_task_run_id=parent
        ).id


def read_run(run_id: UUID) -> FlowRun:
    with get_client(sync_client=True) as client:
        return client.read_flow_run(run_id)
