"""The bounded record of what a container wrote."""

import codecs


class BoundedLog:
    """The first and last bytes of a stream of any length, in memory that does not grow with it."""

    def __init__(self, head_bytes: int, tail_bytes: int) -> None:
        self._head_bytes = head_bytes
        self._tail_bytes = tail_bytes
        self._head = bytearray()
        self._tail = bytearray()
        self._fed = 0
        self._cut_because = ""

    def feed(self, chunk: bytes) -> None:
        self._fed += len(chunk)
        room = self._head_bytes - len(self._head)
        if room > 0:
            self._head += chunk[:room]
            chunk = chunk[room:]
        self._tail += chunk
        # Twice the size before it is cut: a small chunk must not move the whole tail.
        if len(self._tail) > 2 * self._tail_bytes:
            del self._tail[: len(self._tail) - self._tail_bytes]

    def cut_short(self, why: str) -> None:
        """Note that the stream went on, but was not read."""
        self._cut_because = why

    def end(self) -> str:
        """The last bytes alone, as text, from the beginning of a line if there is one in them."""
        tail = bytes(self._tail[-self._tail_bytes :]) if self._tail_bytes else b""
        text = _decode(_from_character(tail), is_cut=True).replace("\0", "\N{REPLACEMENT CHARACTER}")
        return (text.partition("\n")[2] or text) if self._fed > len(tail) else text

    def text(self, *, whole_lines: bool = False) -> str:
        """UTF-8 with what is no text replaced by U+FFFD, NUL too: PostgreSQL's text can't hold it.

        With `whole_lines` what is dropped ends, and begins, with a line, where there are any.
        """
        head = bytes(self._head)
        tail = bytes(self._tail[-self._tail_bytes :]) if self._tail_bytes else b""
        is_cut = bool(self._cut_because)
        if whole_lines and self._fed > len(head) + len(tail):
            head, tail = head[: head.rfind(b"\n") + 1] or head, tail[tail.find(b"\n") + 1 :]
        dropped = self._fed - len(head) - len(tail)
        if dropped:
            parts = [
                _decode(head, is_cut=True),
                f"\n[{dropped} bytes dropped]\n",
                _decode(_from_character(tail), is_cut=is_cut),
            ]
        else:
            parts = [_decode(head + tail, is_cut=is_cut)]
        if self._cut_because:
            parts.append(f"\n[{self._cut_because}]\n")
        return "".join(parts).replace("\0", "\N{REPLACEMENT CHARACTER}")


def _decode(data: bytes, *, is_cut: bool) -> str:
    # A decoder that may expect more leaves the character that the cut went through out.
    return codecs.getincrementaldecoder("utf-8")("replace").decode(data, final=not is_cut)


def _from_character(data: bytes) -> bytes:
    """Drop the rest of a character whose beginning was cut off (at most 3 continuation bytes)."""
    start = 0
    while start < min(3, len(data)) and data[start] & 0xC0 == 0x80:
        start += 1
    return data[start:]
