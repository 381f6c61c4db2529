"""What an Engine tells for as long as one listens; another thread ends it."""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Protocol

import docker
import docker.errors

from .engine_errors import parsing, translated


class EndWatch(Protocol):
    """The ids of containers as they die. Iterating blocks; `close`, from another thread, ends it."""

    def __iter__(self) -> Iterator[str]: ...

    def close(self) -> None: ...


class LogFollow(Protocol):
    """What a container writes to one stream, from its start, as it writes it. As with `EndWatch`, `close` ends it.

    Ends with the container; also if the Engine ends.
    """

    def __iter__(self) -> Iterator[bytes]: ...

    def close(self) -> None: ...


class _DockerStream:
    """A stream that another thread may close."""

    def __init__(self, client: docker.APIClient, stream: Any) -> None:
        self._client = client
        self._stream = stream

    def close(self) -> None:
        # A stream over ssh can't be closed; one that the Engine has ended is closed already.
        with suppress(docker.errors.DockerException, OSError, AttributeError):
            self._stream.close()
            self._stream._response.close()
        self._client.close()


class DockerEndWatch(_DockerStream):
    def __init__(self, client: docker.APIClient, events: Any) -> None:
        # docker-py looks at the status of every answer but this one.
        events._response.raise_for_status()
        super().__init__(client, events)

    def __iter__(self) -> Iterator[str]:
        with translated("events"):
            for event in self._stream._stream:
                with parsing("events"):
                    container_id = str(event["Actor"]["ID"])
                yield container_id


class DockerLogFollow(_DockerStream):
    def __iter__(self) -> Iterator[bytes]:
        with translated("logs"):
            yield from self._stream._stream
