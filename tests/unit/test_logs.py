"""The bounded record of what a container wrote: any bytes in, text that a database can hold out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from container_manager.logs import BoundedLog

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
SIZES = st.integers(0, 12)


def log_of(*chunks: bytes, head: int = 8, tail: int = 8) -> BoundedLog:
    log = BoundedLog(head, tail)
    for chunk in chunks:
        log.feed(chunk)
    return log


@given(chunks=st.lists(st.binary(max_size=20), max_size=20), head=SIZES, tail=SIZES)
def test_how_the_bytes_were_chunked_does_not_matter(chunks: list[bytes], head: int, tail: int) -> None:
    text = log_of(*chunks, head=head, tail=tail).text()

    assert text == log_of(b"".join(chunks), head=head, tail=tail).text()


@given(chunks=st.lists(st.binary(max_size=200), max_size=20), head=SIZES, tail=SIZES)
def test_the_text_is_no_longer_than_head_tail_and_marker(chunks: list[bytes], head: int, tail: int) -> None:
    text = log_of(*chunks, head=head, tail=tail).text()

    assert len(text) <= head + tail + len("\n[4000 bytes dropped]\n")


@given(data=st.binary(max_size=200), head=SIZES, tail=SIZES)
def test_the_text_is_one_that_postgresql_can_hold(data: bytes, head: int, tail: int) -> None:
    text = log_of(data, head=head, tail=tail).text()

    assert "\0" not in text
    assert text.encode().decode() == text


@given(written=st.text(max_size=60).map(lambda text: text.replace("\0", "")), head=SIZES, tail=SIZES)
def test_a_cut_leaves_no_half_characters(written: str, head: int, tail: int) -> None:
    text = log_of(written.encode(), head=head, tail=tail).text()

    first, marker, last = text.partition("\n[")
    assert text.count(REPLACEMENT) <= written.count(REPLACEMENT)
    assert text == written or (marker and written.startswith(first) and written.endswith(last.partition("]\n")[2]))


@given(data=st.binary(max_size=24))
def test_what_fits_is_kept_whole(data: bytes) -> None:
    text = log_of(data, head=12, tail=12).text()

    assert text == data.decode(errors="replace").replace("\0", REPLACEMENT)


@pytest.mark.parametrize(
    ("data", "head", "tail", "text"),
    [
        (b"", 4, 4, ""),
        (b"12345678", 4, 4, "12345678"),
        (b"123456789", 4, 4, "1234\n[1 bytes dropped]\n6789"),
        (b"123456789", 0, 4, "\n[5 bytes dropped]\n6789"),
        (b"123456789", 4, 0, "1234\n[5 bytes dropped]\n"),
        (b"123456789", 0, 0, "\n[9 bytes dropped]\n"),
        ("éééé".encode(), 3, 3, "é\n[2 bytes dropped]\né"),
        ("€€€€".encode(), 4, 4, "€\n[4 bytes dropped]\n€"),
        ("\N{PARTY POPPER}".encode() * 4, 5, 7, "\N{PARTY POPPER}\n[4 bytes dropped]\n\N{PARTY POPPER}"),
        ("aé".encode(), 2, 8, "aé"),
        (b"a\0b", 8, 8, f"a{REPLACEMENT}b"),
        (b"a\xffb", 8, 8, f"a{REPLACEMENT}b"),
        (b"a\xed\xa0\x80b", 8, 8, f"a{REPLACEMENT * 3}b"),
        (b"\xc3", 8, 8, REPLACEMENT),
        (b"\x1b[31mred\r\n", 16, 8, "\x1b[31mred\r\n"),
    ],
    ids=repr,
)
def test_what_is_dropped_is_counted(data: bytes, head: int, tail: int, text: str) -> None:
    assert log_of(data, head=head, tail=tail).text() == text


def test_memory_stays_bounded_over_many_small_chunks() -> None:
    log = BoundedLog(100, 100)

    for _ in range(10_000):
        log.feed(b"0123456789")

    assert log.text() == "0123456789" * 10 + "\n[99800 bytes dropped]\n" + "0123456789" * 10
    assert max(len(value) for value in vars(log).values() if isinstance(value, bytearray)) <= 200


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"begun", "begun\n[too slow]\n"),
        (b"", "\n[too slow]\n"),
        (b"12345678--12345678", "12345678\n[2 bytes dropped]\n12345678\n[too slow]\n"),
        ("é".encode()[:1], "\n[too slow]\n"),
        (b"12345678--123456" + "€".encode()[:2], "12345678\n[2 bytes dropped]\n123456\n[too slow]\n"),
    ],
)
def test_a_log_that_was_not_read_to_its_end_says_why(data: bytes, text: str) -> None:
    log = log_of(data)

    log.cut_short("too slow")

    assert log.text() == text


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"one\nlonger\nthree\nfour\n", "one\n\n[13 bytes dropped]\nfour\n"),
        (b"without an end of a line", "without \n[8 bytes dropped]\nf a line"),
        (b"one\ntwo\n", "one\ntwo\n"),
    ],
    ids=["lines", "no line", "not cut"],
)
def test_where_it_must_be_no_line_is_cut_in_two(data: bytes, text: str) -> None:
    assert log_of(data).text(whole_lines=True) == text
