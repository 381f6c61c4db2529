"""What is set wrong is said at the start, by key."""

from collections.abc import Iterator
from typing import Any

import pytest
from django.core.checks import CheckMessage
from django.core.exceptions import ImproperlyConfigured
from django.db import connection

from container_manager.checks import check_database, check_logging, check_settings
from container_manager.conf import get_settings
from container_manager.settings import database_from_url

PREFIX = "CONTAINER_MANAGER: "


def test_without_the_setting_every_key_has_its_default(settings: Any) -> None:
    del settings.CONTAINER_MANAGER

    ours = get_settings()

    assert (ours.POLL_INTERVAL_SECONDS, ours.WORK_SECONDS, ours.LEASE_SECONDS) == (10, 8, 90)
    assert (ours.ALLOWED_HOST_SCHEMES, ours.ALLOWED_BIND_PREFIXES, ours.ALLOWED_IMAGES) == (("unix", "tcp"), (), ())


def test_a_changed_setting_is_read_again(settings: Any) -> None:
    settings.CONTAINER_MANAGER = {"POLL_INTERVAL_SECONDS": 11}
    assert get_settings().POLL_INTERVAL_SECONDS == 11

    settings.CONTAINER_MANAGER = {"POLL_INTERVAL_SECONDS": 12}

    assert get_settings().POLL_INTERVAL_SECONDS == 12


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (["POLL_INTERVAL_SECONDS"], "CONTAINER_MANAGER must be a dict, not list"),
        (None, "CONTAINER_MANAGER must be a dict, not NoneType"),
        (
            {"POLL_INTERVAL": 10},
            PREFIX + "POLL_INTERVAL: there is no such field; did you mean `POLL_INTERVAL_SECONDS`?",
        ),
        (
            {"poll_interval_seconds": 10},
            PREFIX + "poll_interval_seconds: there is no such field; did you mean `POLL_INTERVAL_SECONDS`?",
        ),
        ({"POLL_INTERVAL_SECONDS": "soon"}, PREFIX + "POLL_INTERVAL_SECONDS: must be a whole number, such as 10"),
        ({"POLL_INTERVAL_SECONDS": 0}, PREFIX + "POLL_INTERVAL_SECONDS: "),
        ({"WORK_SECONDS": -1}, PREFIX + "WORK_SECONDS: "),
        ({"LEASE_SECONDS": float("inf")}, PREFIX + "LEASE_SECONDS: "),
        ({"STOP_GRACE_SECONDS": float("inf")}, PREFIX + "STOP_GRACE_SECONDS: "),
        ({"KEEP_FAILED_CONTAINERS_SECONDS": float("inf")}, PREFIX + "KEEP_FAILED_CONTAINERS_SECONDS: "),
        ({"DOCKER_TIMEOUT_SECONDS": None}, PREFIX + "DOCKER_TIMEOUT_SECONDS: "),
        ({"LAUNCH_THREADS": 65}, PREFIX + "LAUNCH_THREADS: "),
        ({"LOG_HEAD_BYTES": -1}, PREFIX + "LOG_HEAD_BYTES: "),
        ({"MAX_MEMORY_MIB": 5}, PREFIX + "MAX_MEMORY_MIB: "),
        ({"MAX_CPUS": 0}, PREFIX + "MAX_CPUS: "),
        ({"ALLOWED_IMAGES": "busybox"}, PREFIX + "ALLOWED_IMAGES: must be a list"),
        ({"ALLOWED_BIND_PREFIXES": "/data"}, PREFIX + "ALLOWED_BIND_PREFIXES: "),
        ({"DENIED_NETWORKS": "internal"}, PREFIX + "DENIED_NETWORKS: must be a list"),
        ({"DENIED_NETWORKS": None}, PREFIX + "DENIED_NETWORKS: "),
        *(
            (
                {"DENIED_NETWORKS": ["internal", name]},
                PREFIX + "DENIED_NETWORKS.1: must be the name or the id of a network",
            )
            for name in ("", " ", "internal ", "\tinternal", "internal\n")
        ),
        ({"DEPLOYMENTS": {"queue": "no-slash"}}, PREFIX + "DEPLOYMENTS.queue: must be of the right form, such as "),
        ({"DEPLOYMENTS": {"other": "a/b"}}, PREFIX + "DEPLOYMENTS.other: "),
    ],
)
def test_a_wrong_setting_names_its_key(settings: Any, value: Any, message: str) -> None:
    settings.CONTAINER_MANAGER = value

    with pytest.raises(ImproperlyConfigured) as caught:
        get_settings()

    assert str(caught.value).startswith(message)


def test_every_wrong_key_is_named_and_no_value_is(settings: Any) -> None:
    settings.CONTAINER_MANAGER = {"SECRET": "hunter2", "PIDS_LIMIT": "hunter2", "KEEP_LOGS_DAYS": -1}

    with pytest.raises(ImproperlyConfigured) as caught:
        get_settings()

    message = str(caught.value)
    assert all(key in message for key in ("SECRET: ", "PIDS_LIMIT: ", "KEEP_LOGS_DAYS: "))
    assert "hunter2" not in message


@pytest.mark.parametrize(
    "prefix",
    [
        "/", "//", "/.", "/./", "/etc", "/etc/", "//etc", "/./etc", "/etc/.", "/etc/ssl", "/proc", "/proc/1", "/sys/fs",
        "/dev/shm", "/boot", "/root", "/root/.ssh", "/usr", "/usr/.", "/usr/bin", "/bin", "/lib", "/sbin", "/var",
        "/var/run", "/var//run", "/var/run/docker.sock", "/run", "/run/docker.sock", "/run/user/1000", "/var/lib",
        "/var/lib/docker", "/var/lib/docker/volumes", "/var/lib/containerd",
    ],
)  # fmt: skip
def test_a_prefix_that_holds_the_host_or_its_socket_is_refused(settings: Any, prefix: str) -> None:
    settings.CONTAINER_MANAGER = {"ALLOWED_BIND_PREFIXES": (prefix,)}

    with pytest.raises(ImproperlyConfigured, match=r"ALLOWED_BIND_PREFIXES\.0: .* would hand the Engine's machine"):
        get_settings()


@pytest.mark.parametrize("prefix", ["data", "", "../data", "/data/../etc", "/srv/.."])
def test_a_prefix_is_an_absolute_path(settings: Any, prefix: str) -> None:
    settings.CONTAINER_MANAGER = {"ALLOWED_BIND_PREFIXES": ("/data", prefix)}

    with pytest.raises(ImproperlyConfigured, match=r"ALLOWED_BIND_PREFIXES\.1: .* must be an absolute path"):
        get_settings()


def test_prefixes_are_kept_without_a_slash_at_the_end(settings: Any) -> None:
    settings.CONTAINER_MANAGER = {"ALLOWED_BIND_PREFIXES": ["/data/", "/srv/jobs", "/home/jobs//"]}

    assert get_settings().ALLOWED_BIND_PREFIXES == ("/data", "/srv/jobs", "/home/jobs")


def told(messages: list[CheckMessage]) -> list[tuple[str, str]]:
    return [(str(message.id).removeprefix("container_manager."), str(message.msg)) for message in messages]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({}, []),
        ({"SECRET_RESOLVER": "os.getenv"}, []),
        ({"PIDS_LIMIT": 0}, [("E001", PREFIX + "PIDS_LIMIT: ")]),
        ({"SECRET_RESOLVER": "os"}, [("E002", PREFIX + "SECRET_RESOLVER: os doesn't look like a module path")]),
        ({"SECRET_RESOLVER": "no_such.resolve"}, [("E002", PREFIX + "SECRET_RESOLVER: No module named 'no_such'")]),
        ({"SECRET_RESOLVER": "os.no_such"}, [("E002", PREFIX + 'SECRET_RESOLVER: Module "os" does not define')]),
        ({"SECRET_RESOLVER": "os.sep"}, [("E002", PREFIX + "SECRET_RESOLVER: ")]),
        ({"LEASE_SECONDS": 59.9}, [("W002", PREFIX + "LEASE_SECONDS is less than three times DOCKER_TIMEOUT")]),
        ({"LEASE_SECONDS": 60}, []),
        ({"WORK_SECONDS": 10}, [("W003", PREFIX + "WORK_SECONDS is not less than POLL_INTERVAL_SECONDS")]),
        ({"WORK_SECONDS": 9.9}, []),
        ({"WORK_SECONDS": 10, "LEASE_SECONDS": 1}, [("W002", PREFIX + "LEASE"), ("W003", PREFIX + "WORK")]),
    ],
)
def test_the_system_check_says_what_is_set_wrong(
    settings: Any, value: dict[str, Any], expected: list[tuple[str, str]]
) -> None:
    settings.CONTAINER_MANAGER = value

    messages = told(check_settings(None))

    assert [name for name, _ in messages] == [name for name, _ in expected]
    assert all(message.startswith(start) for (_, message), (_, start) in zip(messages, expected, strict=True))


@pytest.fixture
def default(settings: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The settings of the default database, for this test to change; nothing connects with them."""
    changed = dict(settings.DATABASES["default"])
    monkeypatch.setitem(settings.DATABASES, "default", changed)
    return changed


@pytest.mark.parametrize("options", [{}, {"transaction_mode": "DEFERRED"}, {"timeout": 20}])
def test_sqlite_without_immediate_transactions_is_warned_of(default: dict[str, Any], options: dict[str, Any]) -> None:
    default["OPTIONS"] = options

    messages = told(check_database(None))

    assert [name for name, _ in messages] == ["W001"]
    assert "SQLite without IMMEDIATE transactions" in messages[0][1]


def test_another_database_than_these_two_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "vendor", "mysql")

    messages = told(check_database(None))

    assert messages == [("E003", "The queue can't be on mysql: it needs PostgreSQL or SQLite, as DATABASES['default']")]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"version": 1}, ["W004"]),
        ({"version": 1, "disable_existing_loggers": True}, ["W004"]),
        ({"version": 1, "disable_existing_loggers": False}, []),
        ({}, []),
    ],
)
def test_logging_that_silences_prefect_is_warned_of(settings: Any, config: dict[str, Any], expected: list[str]) -> None:
    settings.LOGGING = config

    assert [name for name, _ in told(check_logging(None))] == expected


@pytest.mark.parametrize("url", ["sqlite:////tmp/x.sqlite3", "postgres://localhost/x"])
def test_a_database_by_its_url_is_not_warned_of(default: dict[str, Any], url: str) -> None:
    default.clear()
    default.update(database_from_url(url))

    assert check_database(None) == []


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("postgres://me:p%40s%2Fs%3A%23%25@db.example:5433/my%20queue",
         {"USER": "me", "PASSWORD": "p@s/s:#%", "HOST": "db.example", "PORT": "5433", "NAME": "my queue"}),
        ("postgresql://us%40er@[::1]:5432/x", {"USER": "us@er", "PASSWORD": "", "HOST": "::1", "PORT": "5432"}),
        ("postgres:///x", {"USER": "", "PASSWORD": "", "HOST": "", "PORT": "", "NAME": "x"}),
        ("postgres://%2Fvar%2Frun%2Fpostgresql/x", {"HOST": "/var/run/postgresql", "NAME": "x"}),
        ("postgres://db.example/x?sslmode=require", {"NAME": "x", "OPTIONS": {"sslmode": "require"}}),
    ],
)  # fmt: skip
def test_a_postgresql_is_named_by_its_url(url: str, expected: dict[str, Any]) -> None:
    database = database_from_url(url)

    assert {key: database.get(key) for key in expected} == expected
    assert database["ENGINE"] == "django.db.backends.postgresql"


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("sqlite:////var/lib/app/site%20one.sqlite3", "/var/lib/app/site one.sqlite3"),
        ("sqlite:///site.sqlite3", "site.sqlite3"),
    ],
)
def test_a_sqlite_is_named_by_its_path_and_takes_its_lock_at_once(url: str, name: str) -> None:
    database = database_from_url(url)

    assert (database["NAME"], database["OPTIONS"]["transaction_mode"]) == (name, "IMMEDIATE")


@pytest.mark.parametrize("url", ["mysql://me@localhost/x", "db.sqlite3", "", "postgres+async://x/y"])
def test_another_database_is_refused(url: str) -> None:
    with pytest.raises(ImproperlyConfigured, match="use postgres:// or sqlite:///"):
        database_from_url(url)


def test_a_port_that_is_no_number_is_refused_by_name() -> None:
    with pytest.raises(ImproperlyConfigured, match="DATABASE_URL"):
        database_from_url("postgres://localhost:port/x")
