from __future__ import annotations

import os
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from zps.launch.output import LONGEST_LINE, Lines, Pump, prefix


@given(st.lists(st.binary(max_size=20)))
def test_lines_do_not_depend_on_how_the_bytes_were_cut(chunks: list[bytes]) -> None:
    whole, cut = Lines(b"> "), Lines(b"> ")
    expected = whole.feed(b"".join(chunks)) + whole.close()
    assert b"".join(map(cut.feed, chunks)) + cut.close() == expected


def test_only_whole_lines_leave_until_the_end() -> None:
    lines = Lines(b"[0] ")
    assert lines.feed(b"a\nb") == b"[0] a\n"
    assert lines.feed(b"c\n\nd") == b"[0] bc\n[0] \n"
    assert lines.close() == b"[0] d\n"
    assert lines.close() == b""


def test_of_a_progress_bar_the_last_state_is_kept() -> None:
    assert Lines(b"").feed(b"10%\r50%\r100%\n") == b"100%\n"
    assert Lines(b"").feed(b"windows\r\n") == b"windows\n"


def test_a_line_without_end_is_cut() -> None:
    lines = Lines(b"")
    assert lines.feed(b"x" * (LONGEST_LINE + 1)) == b"x" * (LONGEST_LINE + 1) + b"\n"
    assert lines.close() == b""


def test_the_prefix_is_coloured_only_where_colour_is_wanted() -> None:
    assert prefix(3, colour=False) == b"[3] "
    assert prefix(3, colour=True).startswith(b"\x1b[")
    assert b"[3]" in prefix(3, colour=True)


def test_a_pipe_that_is_held_open_does_not_hold_up_the_end(tmp_path: Path) -> None:
    read, write = os.pipe()
    try:
        with (tmp_path / "out").open("wb") as sink:
            pump = Pump()
            pump.add(0, os.fdopen(read, "rb"), sink.fileno(), b"")
            pump.start()
            assert pump.drain(1, 60)
            assert not pump.drain(0, 0.01)
    finally:
        os.close(write)
    assert pump.drain(None, 60)


def test_a_full_output_is_waited_for() -> None:
    source, feed = os.pipe()
    drain, sink = os.pipe()
    os.set_blocking(sink, False)
    pump = Pump()
    pump.add(0, os.fdopen(source, "rb"), sink, b"")
    pump.start()
    line = b"x" * 999 + b"\n"
    for _ in range(30):
        os.write(feed, line)
    os.close(feed)
    received = b""
    while len(received) < 30 * len(line):
        received += os.read(drain, 100)
    assert received == line * 30
    assert pump.drain(None, 60)
    os.close(sink)
    os.close(drain)
