"""Where an Engine may be spoken to: the address of a host is refused before anything is sent to it."""

from contextlib import nullcontext
from typing import Any

import pytest
from django.core.exceptions import ValidationError

from container_manager.models import DockerHost
from container_manager.policy import validate_address

TLS = {"tls_ca_path": "/tls/ca.pem", "tls_cert_path": "/tls/cert.pem", "tls_key_path": "/tls/key.pem"}
METADATA = "link-local addresses (cloud metadata) are refused"


def refusal(**fields: Any) -> dict[str, list[str]]:
    host = DockerHost(**{"name": "remote"} | fields)
    with pytest.raises(ValidationError) as caught:
        host.full_clean()
    return caught.value.message_dict


@pytest.mark.parametrize("base_url", ["unix:///var/run/docker.sock", "tcp://engine.example:2376", "tcp://[::1]:2376"])
def test_a_socket_and_a_host_with_certificates_are_accepted(database: str, base_url: str) -> None:
    host = DockerHost(name="good", base_url=base_url, **TLS)

    host.full_clean()

    assert host.address.base_url == base_url


@pytest.mark.parametrize(
    ("base_url", "message"),
    [
        ("ssh://root@engine.example", "ssh: only unix, tcp (setting ALLOWED_HOST_SCHEMES)"),
        ("http://engine.example:2375", "http: only unix, tcp"),
        ("https://engine.example:2376", "https: only unix, tcp"),
        ("http+unix:///var/run/docker.sock", "http+unix: only unix, tcp"),
        ("npipe:////./pipe/docker_engine", "npipe: only unix, tcp"),
        ("file:///etc/passwd", "file: only unix, tcp"),
        ("engine.example:2376", "only unix, tcp"),
        ("/var/run/docker.sock", "/var/run/docker.sock: only unix, tcp"),
        ("unix://docker.sock", "a socket's address is"),
        ("unix://run/docker.sock", "a socket's address is"),
        ("unix:docker.sock", "a socket's address is"),
        ("unix://", "a socket's address is"),
        ("tcp://", "an address over the network is `tcp://host:port`"),
        ("tcp://:2376", "an address over the network is `tcp://host:port`"),
        ("tcp://engine.example:2376/path", "an address over the network is"),
        ("tcp://engine.example:2376?x=1", "an address over the network is"),
        ("tcp://engine.example:99999", "an address over the network is"),
        ("tcp://engine.example:port", "an address over the network is"),
        ("tcp://[engine.example:2376", "an address over the network is"),
        ("tcp://169.254.169.254:2376", METADATA),
        ("tcp://[fe80::1]:2376", METADATA),
        ("tcp://[::ffff:169.254.169.254]:2376", METADATA),
        ("tcp://2852039166:2376", METADATA),
        ("tcp://0xa9fea9fe:2376", METADATA),
        ("tcp://169.254.43518:2376", METADATA),
    ],
)
def test_a_wrong_address_is_named_with_what_is_wrong(database: str, base_url: str, message: str) -> None:
    problems = refusal(base_url=base_url, **TLS)

    assert list(problems) == ["base_url"]
    assert message in problems["base_url"][0]


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ([], ["tls_ca_path", "tls_cert_path", "tls_key_path"]),
        (["tls_ca_path"], ["tls_cert_path", "tls_key_path"]),
        (["tls_cert_path", "tls_key_path"], ["tls_ca_path"]),
    ],
)
def test_tcp_without_certificates_names_the_fields_that_are_empty(
    database: str, given: list[str], missing: list[str]
) -> None:
    problems = refusal(base_url="tcp://engine.example:2376", **{field: TLS[field] for field in given})

    assert sorted(problems) == missing
    assert all("needs a client certificate" in message for [message] in problems.values())


def test_ssh_is_accepted_once_the_setting_names_it(database: str, settings: Any) -> None:
    settings.CONTAINER_MANAGER = {"ALLOWED_HOST_SCHEMES": ("unix", "ssh")}

    DockerHost(name="remote", base_url="ssh://root@engine.example").full_clean()

    assert list(refusal(base_url="tcp://engine.example:2376", **TLS)) == ["base_url"]


def test_a_host_that_was_changed_behind_our_back_is_refused_when_it_is_used(database: str) -> None:
    host = DockerHost.objects.create(name="local")
    DockerHost.objects.update(base_url="http://169.254.169.254")
    host.refresh_from_db()

    with pytest.raises(ValidationError, match="http: only unix, tcp"):
        validate_address(host.address)


@pytest.mark.parametrize(
    ("slots", "is_allowed"), [(-1, False), (None, False), ("many", False), (0, True), (10**6, True)]
)
def test_a_host_has_a_number_of_slots_and_no_negative_one(slots: Any, is_allowed: bool) -> None:
    host = DockerHost(name="a", max_concurrent_jobs=slots)

    with nullcontext() if is_allowed else pytest.raises(ValidationError, match="max_concurrent_jobs"):
        host.clean_fields()
