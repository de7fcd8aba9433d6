"""Server-sent events by the WHATWG's rules, however the bytes are cut."""

import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm.utils.sse import Event, SSEDecoder


def decode(*pieces: bytes, max_event_bytes: int = 1 << 23) -> list[Event]:
    decoder = SSEDecoder(max_event_bytes=max_event_bytes)
    return [event for piece in pieces for event in decoder.feed(piece)]


@pytest.mark.parametrize(
    ("text", "events"),
    [
        # The examples of the standard.
        (b"data: YHOO\ndata: +2\ndata: 10\n\n", [Event(b"YHOO\n+2\n10")]),
        (
            b": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\ndata:  third event\n\n",
            [Event(b"first event", id="1"), Event(b"second event"), Event(b" third event")],
        ),
        (b"data\n\ndata\ndata\n\ndata:", [Event(b""), Event(b"\n")]),
        (b"data:test\n\ndata: test\n\n", [Event(b"test"), Event(b"test")]),
        # The two shapes of the vendors.
        (b"data: {}\n\ndata: [DONE]\n\n", [Event(b"{}"), Event(b"[DONE]")]),
        (b"event: ping\ndata: {}\n\n", [Event(b"{}", "ping")]),
        # Names, and what is no event.
        (b"data: {}\nevent: ping\n\n", [Event(b"{}", "ping")]),
        (b"event: ping\ndata: a\ndata: b\n\n", [Event(b"a\nb", "ping")]),
        (b"event: ping\ndata:a\n\n", [Event(b"a", "ping")]),
        (b"event: ping\n\n", []),
        (b"event: ping\n\ndata: x\n\n", [Event(b"x")]),
        (b"event\ndata: x\n\n", [Event(b"x")]),
        (b"event: \ndata: x\n\n", [Event(b"x")]),
        (b"event: a\nevent: b\ndata: x\n\n", [Event(b"x", "b")]),
        (b"event: \xff\ndata: x\n\n", [Event(b"x", "\ufffd")]),
        (b"event: \xffa\nid: 1\ndata: x\n\n", [Event(b"x", "\ufffda", "1")]),
        (b"\n\n\n\n", []),
        (b": only\n: comments\n\n", []),
        (b"data : x\nDATA: y\n data: z\n\n", []),
        (b"unknown: x\ndata: y\nmore\n\n", [Event(b"y")]),
        (b":data: x\n\n", []),
        # An event that the end left unfinished is none.
        (b"data: x", []),
        (b"data: x\n", []),
        # Ids stay until another comes; one with NUL is ignored.
        (
            b"id: 1\n\ndata: a\n\nid: 2\ndata: b\n\ndata: c\n\n",
            [Event(b"a", id="1"), Event(b"b", id="2"), Event(b"c", id="2")],
        ),
        (b"id: 1\ndata: a\n\nid: \x002\ndata: b\n\n", [Event(b"a", id="1"), Event(b"b", id="1")]),
        # Line ends: CR, LF and CRLF, mixed.
        (b"data: a\r\n\r\ndata: b\r\rdata: c\n\n", [Event(b"a"), Event(b"b"), Event(b"c")]),
        (b"data: a\rdata: b\r\n\ndata: c\n\r", [Event(b"a\nb"), Event(b"c")]),
        (b"data: a\r\n\rdata: b\n\r\n", [Event(b"a"), Event(b"b")]),
        # What only looks like a line end is text.
        ("data: a\u2028b\u0085c\x0bd\x0ce\n\n".encode(), [Event("a\u2028b\u0085c\x0bd\x0ce".encode())]),
        # The byte-order mark, once.
        (b"\xef\xbb\xbfdata: a\n\n", [Event(b"a")]),
        (b"\xef\xbb\xbf\xef\xbb\xbfdata: a\n\ndata: b\n\n", [Event(b"b")]),
        (b"data: a\n\n\xef\xbb\xbfdata: b\n\n", [Event(b"a")]),
        (b"\xef\xbb\xbf\n\ndata: a\n\n", [Event(b"a")]),
        (b"\n\xef\xbb\xbfdata: a\n\n", []),
        (b"\xef\xbbdata: a\n\n", []),
        (b"", []),
    ],
)
def test_text_means_these_events(text: bytes, events: list[Event]) -> None:
    assert decode(text) == events
    assert decode(*(text[i : i + 1] for i in range(len(text)))) == events
    for i in range(len(text)):
        assert decode(text[:i], b"", text[i:]) == events


@pytest.mark.parametrize(
    ("lines", "retry"),
    [(b"retry: 10\n\n", 10), (b"retry: 10s\n\n", None), (b"retry\n\n", None), (b"retry: -1\n\n", None)],
)
def test_a_reconnection_time_is_digits(lines: bytes, retry: int | None) -> None:
    decoder = SSEDecoder()
    decoder.feed(lines)
    assert decoder.retry == retry


def test_a_reconnection_time_of_a_million_digits_is_no_trouble() -> None:
    decoder = SSEDecoder()
    decoder.feed(b"retry: " + b"9" * 1_000_000 + b"\n\n")
    assert decoder.retry == 10**18 - 1


LINES = st.lists(
    st.sampled_from(
        [
            b"data: a",
            b"data:b",
            b"data",
            b"event: e",
            b"id: 1",
            b"id",
            b": c",
            b"retry: 5",
            b"x: y",
            b"",
            b"",
            b"\xef\xbb\xbf",
        ]
    )
    | st.binary(max_size=6),
    max_size=12,
)
ENDS = st.sampled_from([b"\n", b"\r", b"\r\n", b"\n\n", b"\r\n\r\n", b"\r\r", b""])


def plainly(text: bytes) -> list[Event]:
    """The standard's own words, line by line and without haste."""
    events: list[Event] = []
    data: list[bytes] = []
    name, last_id = "", ""
    lines = text.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    for line in lines[:-1]:
        if not line:
            if data:
                events.append(Event(b"\n".join(data), name or "message", last_id))
            data, name = [], ""
            continue
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"data":
            data.append(value)
        elif field == b"event":
            name = value.decode("utf-8", "replace")
        elif field == b"id" and b"\0" not in value:
            last_id = value.decode("utf-8", "replace")
    return events


@given(LINES, st.lists(ENDS, min_size=12, max_size=12), st.lists(st.integers(0, 120), max_size=6))
def test_any_split_of_any_text_gives_the_events_of_the_standard(
    lines: list[bytes], ends: list[bytes], cuts: list[int]
) -> None:
    text = b"".join(line + end for line, end in zip(lines, ends, strict=False))
    places = [0, *sorted(cuts), len(text)]
    pieces = [text[a:b] for a, b in pairwise(places)]
    assert b"".join(pieces)[: len(text)] == text
    assert decode(*pieces) == decode(text) == plainly(text)


@given(LINES, st.lists(ENDS, min_size=12, max_size=12), st.integers(0, 40), st.integers(0, 120))
def test_any_split_meets_the_bound_at_the_same_event(
    lines: list[bytes], ends: list[bytes], bound: int, cut: int
) -> None:
    text = b"".join(line + end for line, end in zip(lines, ends, strict=False))
    whole = SSEDecoder(max_event_bytes=bound)
    events = whole.feed(text)
    for pieces in ([text[:cut], text[cut:]], [text[i : i + 1] for i in range(len(text))]):
        other = SSEDecoder(max_event_bytes=bound)
        assert [event for piece in pieces for event in other.feed(piece)] == events
        assert other.overflow == whole.overflow


def test_events_before_one_that_is_too_large_arrive() -> None:
    decoder = SSEDecoder(max_event_bytes=20)
    assert decoder.feed(b"data: a\n\ndata: " + b"x" * 30 + b"\n\ndata: b\n\n") == [Event(b"a")]
    assert decoder.overflow
    assert decoder.feed(b"data: c\n\n") == []
    assert repr(decoder) == "<SSEDecoder: 0 bytes pending, overflow>"


def test_an_event_may_have_eight_mebibytes() -> None:
    event = b"data: " + b"x" * (8 * 1024 * 1024 - 6)
    assert len(SSEDecoder().feed(event + b"\n\n")) == 1
    assert SSEDecoder().feed(event + b"x\n\n") == []


def test_an_event_as_large_as_the_bound_is_not_too_large() -> None:
    decoder = SSEDecoder(max_event_bytes=10)
    assert decoder.feed(b"data: xxxx\n") == []
    assert decoder.feed(b"\n") == [Event(b"xxxx")]
    assert not decoder.overflow


def test_an_unfinished_event_is_pending() -> None:
    decoder = SSEDecoder()
    decoder.feed(b"data: a\n\ndata: b")
    assert decoder.pending == b"data: b"
    assert repr(decoder) == "<SSEDecoder: 7 bytes pending>"


@pytest.mark.parametrize("start", [b"\n\n", b"\xef\xbb\xbf", b"data: a\n\n", b"\r\n\r\n"])
def test_what_has_been_read_for_good_is_not_pending(start: bytes) -> None:
    decoder = SSEDecoder()
    decoder.feed(start)
    assert decoder.pending == b""


def test_a_large_event_fed_byte_by_byte_costs_no_more_than_its_length() -> None:
    """Ten times the bytes cost ten times the time, not a hundred times."""

    def cost(size: int) -> float:
        decoder, piece = SSEDecoder(), b"x"
        decoder.feed(b"data: ")
        begin = time.process_time()
        for _ in range(size):
            decoder.feed(piece)
        decoder.feed(b"\n\n")
        return time.process_time() - begin

    cost(1000)
    assert cost(400_000) < 30 * cost(40_000)


@given(LINES, st.lists(ENDS, min_size=12, max_size=12), st.integers(4, 60), st.lists(st.integers(0, 120), max_size=6))
def test_payloads_are_the_data_of_the_events(
    lines: list[bytes], ends: list[bytes], bound: int, cuts: list[int]
) -> None:
    """The cheap reading and the full one agree, however the bytes were cut."""
    text = b"".join(line + end for line, end in zip(lines, ends, strict=False))
    full, cheap = SSEDecoder(max_event_bytes=bound), SSEDecoder(max_event_bytes=bound)
    for start, end in pairwise([0, *sorted(cuts), len(text)]):
        piece = text[start:end]
        assert cheap.payloads(piece) == [event.data for event in full.feed(piece)]
        assert (cheap.pending, cheap.overflow) == (full.pending, full.overflow)


@given(
    st.lists(st.sampled_from([b"data: {}\n\n", b"data: a b\n\n", b"data: \n\n", b"\n", b": c\n\n", b"data: x\r\n\r\n"]))
)
def test_payloads_of_whole_events_are_their_data(pieces: list[bytes]) -> None:
    """The shape that most reads have goes a way of its own."""
    full, cheap = SSEDecoder(), SSEDecoder()
    for piece in pieces:
        assert cheap.payloads(piece) == [event.data for event in full.feed(piece)]
    assert cheap.payloads(b"".join(pieces)) == [event.data for event in full.feed(b"".join(pieces))]


@pytest.mark.parametrize(
    ("text", "payloads"),
    [
        (b"data: {}\n\ndata: ab\n\ndata: [DONE]\n\n", [b"{}", b"ab", b"[DONE]"]),
        (b"event: ab\ndata: {}\n\nevent: c\ndata: d\n\n", [b"{}", b"d"]),
        (b"event: ab\nid: 1\n\nevent: c\ndata:d\n\n", [b"d"]),
        (b"event:a\ndata: b\n\nevents: c\ndata: d\n\n", [b"b", b"d"]),
        (b"data: a\ndata: b\n\ndata: c\n\n", [b"a\nb", b"c"]),
        (b"data: a\n\n\ndata: b\n\n\n\ndata: c\n\n", [b"a", b"b", b"c"]),
        (b"event: a\ndata: b\ndata: c\n\ndata: d\n\n", [b"b\nc", b"d"]),
        (b"data: a\r\n\r\ndata: b\r\ndata: c\n\ndata: d\n\n", [b"a", b"b\nc", b"d"]),
        (b"data: a\r\r\ndata: b\n\n", [b"a", b"b"]),
        (b"data: a\n\nxdata: b\n\ndata: cdata: d\n\n", [b"a", b"cdata: d"]),
        (b"data: a\n\n\xef\xbb\xbfdata: b\n\n", [b"a"]),
        (b"\xef\xbb\xbfdata: a\n\ndata: b\n\ndata: c", [b"a", b"b"]),
    ],
)
def test_payloads_are_the_same_wherever_the_stream_is_cut(text: bytes, payloads: list[bytes]) -> None:
    """There is a short way for the usual reads, and it must lead to the same place."""
    for i in range(len(text) + 1):
        for j in range(i, len(text) + 1):
            cheap, full = SSEDecoder(), SSEDecoder()
            found = []
            for piece in (text[:i], text[i:j], text[j:]):
                found += cheap.payloads(piece)
                full.feed(piece)
                assert cheap.pending == full.pending
            assert found == payloads


def test_payloads_end_with_the_event_that_is_too_large() -> None:
    decoder = SSEDecoder(max_event_bytes=10)
    assert decoder.payloads(b"data: a\n\n") == [b"a"]
    assert decoder.payloads(b"data: " + b"x" * 5) == []
    assert decoder.overflow
    assert decoder.payloads(b"data: b\n\n") == []


def test_an_event_can_be_compared_and_kept_in_a_set() -> None:
    assert {Event(b"a"), Event(b"a"), Event(b"b")} == {Event(b"a"), Event(b"b")}


def test_a_missing_blank_line_and_a_line_too_many_do_not_make_up_for_each_other() -> None:
    """Found by the fuzzer: counted by newlines alone, the first two events were not one."""
    body = b"event: a\ndata: 1\n?\nevent: b\ndata: 2\n\nevent: c\ndata: 3\n\n"
    decoder = SSEDecoder()
    assert decoder.payloads(body) == [b"1\n2", b"3"] == [event.data for event in SSEDecoder().feed(body)]
