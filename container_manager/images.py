"""Image references: their grammar, what they mean, and which of them a pattern allows."""

import re
from fnmatch import fnmatchcase
from typing import NamedTuple

_DOMAIN_PART = r"(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])"
_PATH_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
#: After github.com/distribution/reference.
_REFERENCE = re.compile(
    rf"(?:{_DOMAIN_PART}(?:\.{_DOMAIN_PART})*(?::[0-9]+)?/)?{_PATH_PART}(?:/{_PATH_PART})*"
    r"(?::[\w][\w.-]{0,127})?(?:@[A-Za-z][A-Za-z0-9]*(?:[-_+.][A-Za-z][A-Za-z0-9]*)*:[0-9a-fA-F]{32,})?",
    re.ASCII,
)
_IMAGE_ID = re.compile(r"(?:sha256:)?[0-9a-f]{64}")
_MAX_LENGTH = 255
_DEFAULT_REGISTRY = "docker.io"


class Image(NamedTuple):
    """A reference in full: `docker.io/library/busybox`, `latest`, ``. With a digest the tag means nothing."""

    repository: str
    tag: str
    digest: str


def is_reference(text: str) -> bool:
    """Whether it names an image; the id of one that happens to be on an Engine is no name."""
    return len(text) <= _MAX_LENGTH and bool(_REFERENCE.fullmatch(text)) and not _IMAGE_ID.fullmatch(text)


def qualified(reference: str) -> str:
    """The reference in full. An Engine would also look a short one up among the beginnings of its images' ids."""
    image = _parse(reference)
    return f"{image.repository}@{image.digest}" if image.digest else f"{image.repository}:{image.tag or 'latest'}"


def is_allowed(reference: str, pattern: str) -> bool:
    """Repositories are compared whole, registry included; a tag or a digest in the pattern is demanded, too."""
    image, wanted = _parse(reference), _parse(pattern)
    if not fnmatchcase(image.repository, wanted.repository):
        return False
    if wanted.digest:
        return fnmatchcase(image.digest, wanted.digest)
    # The Engine goes by the digest, so that a tag beside one says nothing of the content.
    return not wanted.tag or (not image.digest and fnmatchcase(image.tag or "latest", wanted.tag))


def _parse(reference: str) -> Image:
    name, _, digest = reference.partition("@")
    head, slash, last = name.rpartition("/")
    last, _, tag = last.partition(":")
    return Image(_repository(head + slash + last), tag, digest)


def _repository(name: str) -> str:
    first, slash, rest = name.partition("/")
    if not slash:
        return f"{_DEFAULT_REGISTRY}/library/{name}"
    is_registry = first == "localhost" or "." in first or ":" in first or first != first.lower()
    if not is_registry:
        return f"{_DEFAULT_REGISTRY}/{name}"
    if first in (_DEFAULT_REGISTRY, "index.docker.io"):
        return f"{_DEFAULT_REGISTRY}/{rest if '/' in rest else f'library/{rest}'}"
    return name
