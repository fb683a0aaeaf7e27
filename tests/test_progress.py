"""The progress line: plain output by the clock, live output on a terminal, silence on other processes."""

import io
import subprocess
import sys

import pytest

from fmda.progress import Line, duration, track


class Clock:
    """A clock that moves when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """A stream that calls itself a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (754, "12:34"), (3723, "1:02:03"), (-1, "0:00")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_track_yields_the_items_and_prints_every_ten_seconds():
    stream, clock = io.StringIO(), Clock()
    seen = []
    for item in track(range(6), "rank", stream=stream, clock=clock):
        seen.append(item)
        clock.now += 4.0
    assert seen == [0, 1, 2, 3, 4, 5]
    assert stream.getvalue().splitlines() == [
        "rank: 3/6 images, 0.2 images/s, ETA 0:12",
        "rank: 6/6 images, 0.2 images/s, in 0:24",
    ]


def test_track_of_unknown_length_has_no_eta():
    stream, clock = io.StringIO(), Clock()
    for _ in track(iter("ab"), "read", unit="files", stream=stream, clock=clock):
        clock.now += 1.0
    assert stream.getvalue() == "read: 2 files, 1.0 files/s\n"


def test_the_rate_leaves_out_the_first_item_which_compiles():
    stream, clock = io.StringIO(), Clock()
    for number in track(range(10), "rank", stream=stream, clock=clock):
        clock.now += 60.0 if number == 0 else 1.0
    assert stream.getvalue().splitlines() == [
        "rank: 1/10 images",
        "rank: 10/10 images, 1.0 images/s, in 1:09",
    ]


def test_track_closes_the_line_when_the_loop_breaks():
    stream, clock = io.StringIO(), Clock()
    items = track(range(5), "rank", stream=stream, clock=clock)
    next(items)
    clock.now += 1.0
    next(items)
    items.close()
    assert stream.getvalue() == "rank: 1/5 images\n"


def test_line_prints_the_last_text_once_and_notes_at_once():
    stream, clock = io.StringIO(), Clock()
    with Line(stream=stream, clock=clock) as line:
        line.update("one")
        line.note("a note")
        clock.now = 11.0
        line.update("two")
        line.update("three")
        clock.now = 12.0
        line.update("two")
    assert stream.getvalue().splitlines() == ["a note", "two"]


def test_terminal_redraws_in_place_and_keeps_notes():
    stream, clock = Terminal(), Clock()
    with Line(stream=stream, clock=clock) as line:
        line.update("step 1")
        line.note("a note")
        clock.now = 1.0
        line.update("step 2")
    text = stream.getvalue()
    assert "\x1b[2K" in text
    assert text.index("step 1") < text.index("a note") < text.index("step 2")


def test_inner_line_replaces_the_outer_until_it_closes():
    stream, clock = Terminal(), Clock()
    with Line(stream=stream, clock=clock) as outer:
        outer.update("outer 1")
        with Line(stream=stream, clock=clock) as inner:
            inner.update("inner")
            clock.now = 1.0
            outer.update("hidden")
        clock.now = 2.0
        outer.update("outer 2")
    text = stream.getvalue()
    assert text.index("outer 1") < text.index("inner") < text.index("outer 2")
    assert "hidden" not in text


def test_other_processes_are_silent(monkeypatch):
    monkeypatch.setenv("FMDA_PROCESS", "1")
    stream, clock = io.StringIO(), Clock()
    with Line(stream=stream, clock=clock) as line:
        clock.now = 20.0
        line.update("text")
        line.note("note")
    assert stream.getvalue() == ""


def test_progress_needs_no_jax_and_leaves_stdout_alone():
    code = "import sys; from fmda.progress import track; list(track([1], 'x')); print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
    assert done.stderr.startswith("x: 1/1 images")
