"""What `.ci/engine` asks of a Docker Engine. The docker command may be missing; docker-py is in `.venv`."""

import argparse
import io
import json
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import docker
from docker.errors import DockerException

IMAGE = "busybox:latest"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class ProbeError(Exception):
    """Its text is the one line for stderr."""


def client(timeout: int) -> docker.DockerClient:
    return docker.from_env(timeout=timeout)


def version(_: argparse.Namespace) -> None:
    engine = client(5)
    engine.ping()
    sys.stdout.write(f"{engine.version()['Version']}\n")


def run(_: argparse.Namespace) -> None:
    """A daemon can answer and still run nothing, or have lost the bridge that containers get by default."""
    engine = client(30)
    for network in ("none", "bridge"):
        container = engine.containers.create(IMAGE, ["true"], network_mode=network)
        try:
            container.start()
            status = container.wait()["StatusCode"]
        finally:
            container.remove(force=True)
        if status != 0:
            raise ProbeError(f"`true` in a container with network {network} exited {status}")


def has_image(arguments: argparse.Namespace) -> None:
    client(5).images.get(arguments.name)


def pull(arguments: argparse.Namespace) -> None:
    # The time between two signs of life, not of the whole download. No registry in reach: the usual end.
    client(15).images.pull(arguments.name)


def owned_by_root(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = "root"
    return member


def read_tar(source: Path) -> bytes:
    if source.is_file():
        return source.read_bytes()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.add(source, arcname=".", filter=owned_by_root)
    return buffer.getvalue()


def import_image(arguments: argparse.Namespace) -> None:
    repository, _, tag = arguments.name.partition(":")
    answer = client(60).api.import_image_from_data(
        read_tar(arguments.source), repository, tag or "latest", changes=[f"ENV PATH={PATH}", 'CMD ["sh"]']
    )
    # One JSON document per line; a failure comes as one too, after the status 200.
    for line in answer.splitlines():
        if error := json.loads(line).get("error"):
            raise ProbeError(error)


def explain(error: BaseException) -> str:
    """The operating system's own words where there are some: requests wraps them in four layers of others."""
    text = str(error)
    cause = error.__cause__ or error.__context__
    while cause:
        if isinstance(cause, OSError) and cause.strerror:
            text = cause.strerror
        cause = cause.__cause__ or cause.__context__
    return " ".join(text.split())


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)

    def add(name: str, action: Callable[[argparse.Namespace], None], about: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=about)
        command.set_defaults(action=action)
        return command

    add("version", version, "does it answer?")
    add("run", run, f"does it run containers of {IMAGE}?")
    add("has-image", has_image, "is the image there?").add_argument("name")
    add("pull", pull, "pull the image").add_argument("name")
    command = add("import", import_image, "make an image of a folder or a tar archive")
    command.add_argument("name")
    command.add_argument("source", type=Path)
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    try:
        arguments.action(arguments)
    except (ProbeError, DockerException, OSError) as error:  # an OSError is what requests raises, too
        sys.stderr.write(f"{explain(error)}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
