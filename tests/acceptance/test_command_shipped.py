"""What is shipped beside the command: units for systemd and a Compose file, read by the tools that will run them."""

import configparser
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

import pytest
import yaml
from django.core.handlers.wsgi import WSGIHandler
from dotenv import dotenv_values

from container_manager.management.commands.process_container_jobs import Command
from flows.shut_server import ShutServer
from tests.conftest import ROOT, missing

FOLDER = ROOT / "deployments"
UNITS = sorted((FOLDER / "systemd").glob("*.service"))
PROCESSOR, SERVED = "django-queue-processor", "container-manager-deployments"
INSTALLED = "/opt/container-manager"
SECRETS = {
    "POSTGRES_PASSWORD": "letters",
    "DJANGO_SECRET_KEY": "key",
    "PREFECT_AUTH_STRING": "me:word",
    "DOCKER_GID": "999",
}


def have(request: pytest.FixtureRequest, program: str, package: str) -> None:
    """The program, by apt if need be and we may."""
    if not shutil.which(program) and os.geteuid() == 0 and shutil.which("apt-get"):
        install = ["apt-get", "install", "-y", "-q", "--no-install-recommends", package]
        subprocess.run(
            install, env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"}, capture_output=True, check=False
        )
    if not shutil.which(program):
        missing(request.config, f"{program} (apt-get install {package})")


def unit(name: str, section: str = "Service") -> configparser.SectionProxy:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(FOLDER / "systemd" / f"{name}.service")
    return parser[section]


def parsed(arguments: list[str]) -> dict[str, Any]:
    """As the command itself reads them; wrong ones end the test."""
    assert arguments[:3] == ["python", "manage.py", "process_container_jobs"]
    return vars(Command().create_parser(*arguments[1:3]).parse_args(arguments[3:]))


def test_both_units_are_there() -> None:
    assert [path.stem for path in UNITS] == [SERVED, PROCESSOR]


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_systemd_finds_nothing_wrong_with_a_unit(request: pytest.FixtureRequest, path: Path, tmp_path: Path) -> None:
    have(request, "systemd-analyze", "systemd")
    # Where the program is on this machine: it looks.
    text = path.read_text().replace(f"{INSTALLED}/.venv/bin/python", sys.executable)
    (tmp_path / path.name).write_text(text)
    verified = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(tmp_path / path.name)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    # Of 100, which is no hardening at all.
    secure = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=40", str(tmp_path / path.name)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert (verified.returncode, verified.stdout, verified.stderr) == (0, "", "")
    assert secure.returncode == 0, secure.stdout


@pytest.mark.parametrize("name", [PROCESSOR, SERVED])
def test_a_unit_stops_gracefully_and_starts_again(name: str) -> None:
    service = unit(name)
    expected = {
        "Type": "exec", "KillMode": "mixed", "KillSignal": "SIGTERM", "TimeoutStopSec": "60", "Restart": "always",
        "RestartSec": "10", "NoNewPrivileges": "yes", "ProtectSystem": "strict",
    }  # fmt: skip

    assert {key: service[key] for key in expected} == expected
    assert service["ExecStart"].startswith(f"{service['WorkingDirectory']}/.venv/bin/python ")


@pytest.mark.parametrize("name", [PROCESSOR, SERVED])
def test_a_unit_stops_before_what_it_needs(name: str) -> None:
    needs = {"docker.service", "postgresql.service", "prefect-server.service"}

    assert needs <= set(unit(name, "Unit")["After"].split())


def test_the_processors_unit_runs_the_command_which_ends_before_systemd_kills_it() -> None:
    service = unit(PROCESSOR)
    options = parsed(["python", *shlex.split(service["ExecStart"])[1:]])

    assert service["ExecReload"] == "/bin/kill -USR1 $MAINPID"
    assert options["queue_mode"]
    assert not options["once"]
    assert options["shutdown_timeout"] < int(service["TimeoutStopSec"])


def test_the_other_unit_serves_the_deployments() -> None:
    assert unit(SERVED)["ExecStart"].endswith(" -m deployments")


@pytest.fixture(scope="module")
def compose(request: pytest.FixtureRequest) -> list[str]:
    """Whichever Compose is there; Debian's if none is."""
    with suppress(OSError):
        if not subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode:
            return ["docker", "compose"]
    have(request, "docker-compose", "docker-compose")
    return ["docker-compose"]


def config(compose: list[str], folder: Path, **variables: str) -> "subprocess.CompletedProcess[str]":
    """What it makes of the file."""
    return subprocess.run(
        [*compose, "-f", str(FOLDER / "compose.yaml"), "--profile", "queue-processor", "config"],
        env={"PATH": os.environ["PATH"], "HOME": str(folder)} | variables,
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_compose_takes_the_file(compose: list[str], tmp_path: Path) -> None:
    done = config(compose, tmp_path, **SECRETS)

    assert (done.returncode, done.stderr) == (0, "")
    assert set(yaml.safe_load(done.stdout)["services"]) == {
        "database", "prefect-database", "prefect", "migrate", "site", "deployments", "queue-processor",
    }  # fmt: skip


@pytest.mark.parametrize("name", SECRETS)
def test_compose_refuses_to_start_without_a_secret(compose: list[str], tmp_path: Path, name: str) -> None:
    done = config(compose, tmp_path, **{key: value for key, value in SECRETS.items() if key != name})

    assert done.returncode != 0
    assert "set it in .env" in done.stderr


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    services: dict[str, Any] = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]
    return services


def test_every_service_has_60_seconds_to_stop_and_starts_again(services: dict[str, Any]) -> None:
    for name, service in services.items():
        assert service["stop_grace_period"] == "60s"
        assert service["restart"] == ("no" if name == "migrate" else "unless-stopped")


def test_the_queue_processor_is_under_a_profile_and_ends_before_it_is_killed(services: dict[str, Any]) -> None:
    options = parsed(services["queue-processor"]["command"])

    assert services["queue-processor"]["profiles"] == ["queue-processor"]
    assert [name for name, service in services.items() if "profiles" in service] == ["queue-processor"]
    assert options["queue_mode"]
    assert options["shutdown_timeout"] < 60


def test_only_the_deployments_have_the_docker_socket_and_nothing_is_published_but_on_loopback(
    services: dict[str, Any],
) -> None:
    with_socket = [name for name, service in services.items() if "docker.sock" in json.dumps(service.get("volumes"))]
    ports = [port for service in services.values() for port in service.get("ports", [])]

    assert with_socket == ["deployments"]
    assert len(ports) == 2
    assert all(port.startswith("127.0.0.1:") for port in ports)


@pytest.mark.parametrize("own", ["", '{"DENIED_NETWORKS": []}', '{"DENIED_NETWORKS": ["mine"], "PIDS_LIMIT": 64}'])
def test_what_jobs_are_kept_from_is_in_no_network_that_a_job_may_join(
    compose: list[str], tmp_path: Path, own: str
) -> None:
    variables = SECRETS | ({"CONTAINER_MANAGER": own} if own else {})
    made = yaml.safe_load(config(compose, tmp_path, **variables).stdout)
    # A service that names none is in the project's own network, which is not among these.
    in_networks = {
        made["networks"][key]["name"]
        for service in made["services"].values()
        for key in service.get("networks", ["default"])
    }

    assert [name for name, service in made["services"].items() if "network_mode" in service] == []
    for name in ("site", "deployments", "queue-processor"):
        given = {key: value for key, value in made["services"][name]["environment"].items() if value is not None}
        denied = denied_networks(tmp_path, given)
        assert in_networks <= denied
        assert denied - in_networks == set(json.loads(own or "{}").get("DENIED_NETWORKS", []))


@pytest.mark.parametrize("own", ['"mine"', "null", '{"mine": 1}', "[1]"])
def test_a_list_of_denied_networks_that_can_not_be_read_stops_the_service(tmp_path: Path, own: str) -> None:
    given = {"CONTAINER_MANAGER": f'{{"DENIED_NETWORKS": {own}}}', "CONTAINER_MANAGER_DENIED_NETWORKS": "internal"}

    with pytest.raises(subprocess.CalledProcessError) as stopped:
        denied_networks(tmp_path, given)

    assert "CONTAINER_MANAGER: DENIED_NETWORKS" in stopped.value.stderr


def denied_networks(folder: Path, given: dict[str, str]) -> set[str]:
    """As a service reads its environment."""
    script = "from container_manager.conf import get_settings; print(*get_settings().DENIED_NETWORKS)"
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "DJANGO_SETTINGS_MODULE": "container_manager.settings",
    }
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT, env=environment | given, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return set(done.stdout.split())


@pytest.mark.parametrize("hosts", ["", "jobs.example", "jobs.example,.example.org"])
def test_the_sites_health_is_seen_under_whatever_name_people_see_it(
    compose: list[str], tmp_path: Path, settings: Any, hosts: str
) -> None:
    site = yaml.safe_load(config(compose, tmp_path, **SECRETS, DJANGO_ALLOWED_HOSTS=hosts).stdout)["services"]["site"]
    settings.ALLOWED_HOSTS = site["environment"]["DJANGO_ALLOWED_HOSTS"].split(",")

    # `get_wsgi_application` would set up logging anew, and take the handler off that shows lines in Prefect.
    with serving(WSGIHandler()) as port:
        healthy = check_health(site, "8000", port)
        settings.ALLOWED_HOSTS = ["another.example"]
        refused = check_health(site, "8000", port)

    assert (healthy, refused) == (0, 1)


@contextmanager
def serving(application: Any) -> Iterator[int]:
    """Its port."""
    with make_server("127.0.0.1", 0, application, handler_class=QuietHandler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


class QuietHandler(WSGIRequestHandler):
    def log_message(self, *args: Any) -> None:
        """Say nothing."""


def check_health(service: dict[str, Any], port: str, elsewhere: int) -> int:
    """The exit code of its check, which asks at another port."""
    kind, program, *arguments = service["healthcheck"]["test"]
    assert (kind, program) == ("CMD", "python")
    command = [argument.replace(f":{port}/", f":{elsewhere}/") for argument in arguments]
    return subprocess.run([sys.executable, *command], capture_output=True, check=False).returncode


@pytest.mark.parametrize(("age", "is_healthy"), [(0, True), (59, True), (130, False), (None, False)])
def test_the_deployments_are_healthy_while_they_touch_their_file(
    services: dict[str, Any], tmp_path: Path, age: int | None, is_healthy: bool
) -> None:
    (option,) = [part for part in services["deployments"]["command"] if part.startswith("--alive-file=")]
    kind, script = services["deployments"]["healthcheck"]["test"]
    file = tmp_path / "alive"
    if age is not None:
        file.touch()
        os.utime(file, (time.time() - age,) * 2)

    script = script.replace(option.removeprefix("--alive-file="), str(file))
    checked = subprocess.run(["sh", "-c", script], capture_output=True, check=False)

    assert (kind, str(file) in script) == ("CMD-SHELL", True)
    assert (checked.returncode == 0) is is_healthy


def test_the_prefect_server_has_a_database_of_its_own(services: dict[str, Any]) -> None:
    assert "@prefect-database:" in services["prefect"]["environment"]["PREFECT_SERVER_DATABASE_CONNECTION_URL"]
    assert "@database:" in services["site"]["environment"]["DATABASE_URL"]


def test_the_prefect_server_is_shut_and_those_that_ask_it_know_its_password(compose: list[str], tmp_path: Path) -> None:
    made = yaml.safe_load(config(compose, tmp_path, **SECRETS).stdout)["services"]
    prefect = made["prefect"]["environment"]
    asking = ["site", "deployments", "queue-processor"]
    ours = ShutServer(4200, "me:word").environment({})
    shut = {name: ours[name] for name in ours if name.startswith("PREFECT_SERVER_API_") and not name.endswith("_HOST")}

    # The same as of those that we start ourselves; what listens on every address here is a container's.
    assert {name: prefect[name] for name in shut} == shut
    assert {made[name]["environment"]["PREFECT_API_AUTH_STRING"] for name in asking} == {"me:word"}
    assert [name for name in made if "word" in json.dumps(made[name])] == sorted(["prefect", "migrate", *asking])


def test_the_recipe_makes_all_secrets_in_a_file_that_nobody_else_may_read(tmp_path: Path) -> None:
    text = (FOLDER / "README.md").read_text()
    (recipe,) = re.findall(r"^\(umask 077 .*?^END$", text, re.MULTILINE | re.DOTALL)
    script = recipe.replace("/var/run/docker.sock", "/")
    subprocess.run(["sh", "-euc", script], cwd=tmp_path, check=True, umask=0o022)
    made = dotenv_values(tmp_path / ".env")

    assert made.keys() == SECRETS.keys()
    assert all(made.values())
    assert (tmp_path / ".env").stat().st_mode & 0o777 == 0o600


def test_what_the_image_copies_is_there() -> None:
    lines = (FOLDER / "Dockerfile").read_text().splitlines()
    sources = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]

    assert sources
    assert all((ROOT / source).exists() for source in sources)
