"""What this installation allows. Checked when a job or host is saved, and again right before it is used."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from ipaddress import ip_address
from pathlib import PurePosixPath
from socket import inet_aton
from typing import Any
from urllib.parse import urlsplit

import pydantic
from django.core.exceptions import NON_FIELD_ERRORS, ValidationError

from . import images, networks
from .conf import Settings, get_settings
from .types import EngineAddress, JobSpec, problems_of


def validate_job(fields: Mapping[str, Any]) -> JobSpec:
    """The spec that the fields make; `django.core.exceptions.ValidationError` by field if they are not allowed."""
    try:
        spec = JobSpec.model_validate(dict(fields))
    except pydantic.ValidationError as e:
        raise ValidationError(_by_field(e)) from e
    problems = _problems(spec, get_settings())
    if problems:
        raise ValidationError(problems)
    return spec


def validate_address(address: EngineAddress) -> None:
    """Raises Django's `ValidationError` by field unless an Engine may be spoken to at this address."""
    allowed = get_settings().ALLOWED_HOST_SCHEMES
    try:
        url = urlsplit(address.base_url)
        port = url.port
    except ValueError as e:
        raise ValidationError({"base_url": f"an address over the network is `tcp://host:port`: {e}"}) from e
    if url.scheme not in allowed:
        raise ValidationError(
            {"base_url": f"{url.scheme or address.base_url}: only {', '.join(allowed)} (setting ALLOWED_HOST_SCHEMES)"}
        )
    if url.scheme == "unix":
        if not url.path.startswith("/") or url.netloc:
            raise ValidationError({"base_url": "a socket's address is `unix:///path/of/docker.sock`"})
        return
    if not url.hostname or url.path.strip("/") or url.query or port == 0:
        raise ValidationError({"base_url": f"an address over the network is `{url.scheme}://host:port`"})
    if _is_link_local(url.hostname):
        raise ValidationError({"base_url": "link-local addresses (cloud metadata) are refused"})
    if url.scheme == "tcp":
        missing = [f"tls_{part}_path" for part in ("ca", "cert", "key") if not getattr(address, f"tls_{part}_path")]
        if missing:
            why = "an Engine over tcp needs a client certificate: without one, anybody is root there"
            raise ValidationError(dict.fromkeys(missing, why))


def describe(error: ValidationError) -> str:
    """One line that names each field and what is wrong with it."""
    if not hasattr(error, "error_dict"):
        return " ".join(error.messages)
    return "; ".join(
        " ".join(messages) if field == NON_FIELD_ERRORS else f"{field}: {' '.join(messages)}"
        for field, messages in error.message_dict.items()
    )


def _by_field(error: pydantic.ValidationError) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for problem in problems_of(error, JobSpec):
        field, *inside = problem.where or (NON_FIELD_ERRORS,)
        where = "".join(f"{part}: " for part in inside)
        found.setdefault(str(field), []).append(where + problem.what)
    return found


def _problems(spec: JobSpec, settings: Settings) -> dict[str, str | list[str]]:
    found: dict[str, str | list[str]] = {}
    if settings.ALLOWED_IMAGES and not any(
        images.is_allowed(spec.image, pattern) for pattern in settings.ALLOWED_IMAGES
    ):
        found["image"] = f"{spec.image} is not among the setting ALLOWED_IMAGES"
    if denied := [name for name in networks.wanted(spec.networks) if name in settings.DENIED_NETWORKS]:
        found["networks"] = _why_denied(denied[0], is_named=bool(spec.networks))
    mounts = []
    for number, mount in enumerate(spec.mounts):
        if mount.type == "bind" and not _is_below(mount.source, settings.ALLOWED_BIND_PREFIXES):
            mounts.append(f"{number}: {mount.source} is not below any path of the setting ALLOWED_BIND_PREFIXES")
        if mount.type == "volume" and not any(fnmatchcase(mount.source, name) for name in settings.ALLOWED_VOLUMES):
            mounts.append(f"{number}: volume {mount.source} is not among the setting ALLOWED_VOLUMES")
    if mounts:
        found["mounts"] = mounts
    if settings.MAX_MEMORY_MIB and spec.memory_limit_mib and spec.memory_limit_mib > settings.MAX_MEMORY_MIB:
        found["memory_limit_mib"] = f"at most {settings.MAX_MEMORY_MIB} (setting MAX_MEMORY_MIB)"
    if settings.MAX_CPUS and spec.cpu_limit and spec.cpu_limit > settings.MAX_CPUS:
        found["cpu_limit"] = f"at most {settings.MAX_CPUS:g} (setting MAX_CPUS)"
    if spec.secret_environment and not settings.SECRET_RESOLVER:
        found["secret_environment"] = "needs the setting SECRET_RESOLVER, which turns references into values"  # noqa: S105
    return found


def _why_denied(network: str, *, is_named: bool) -> str:
    if is_named:
        return f"{network} is among the setting DENIED_NETWORKS: name another"
    return (
        f"without any, the job would join {network}, which is among the setting DENIED_NETWORKS: name another, or none"
    )


def _is_below(source: str, prefixes: tuple[str, ...]) -> bool:
    path = PurePosixPath(source)
    return any(path == PurePosixPath(prefix) or PurePosixPath(prefix) in path.parents for prefix in prefixes)


def _is_link_local(hostname: str) -> bool:
    """As the resolver would read it, which takes 2852039166 for an address, too."""
    try:
        address = ip_address(hostname)
    except ValueError:
        try:
            address = ip_address(inet_aton(hostname))
        except OSError:
            return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_link_local
