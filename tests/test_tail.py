"""The model of the program's last rows against an emulated terminal, and the picture's foot below any output."""

from __future__ import annotations

from typing import Any

import pyte
from hypothesis import given, settings
from hypothesis import strategies as st

from gradwatch.reports.foot import Foot
from gradwatch.reports.tail import Tail, finished, is_plain

WIDTH, HEIGHT = 20, 12
WORDS = st.sampled_from(
    ["a", "hello", "words of a line", "x" * 25, "é", "50%|██", "\x1b[31mred\x1b[0m", "\x1b[1m", "\x1b[m", " "]
)
MOVES = st.sampled_from(
    ["\n", "\n", "\n", "\r", "\b", "\b\b\b", "\t", "\x1b[K", "\x1b[2K", "\r\n", "\x1b[3C", "\x1b[2D"]
)
OUTPUT = st.lists(st.one_of(WORDS, MOVES), max_size=30)
# as tqdm draws a bar below another, and comes back
NESTED = st.lists(st.one_of(WORDS, st.sampled_from(["\n", "\r"]), st.just("\n\rinner bar\x1b[A")), max_size=20)


class Glass:
    """A terminal of one's own: what is written is emulated. ``ONLCR`` as a terminal's driver has it."""

    encoding = "utf-8"

    def __init__(self) -> None:
        self.screen = pyte.HistoryScreen(WIDTH, HEIGHT, history=1000)
        self._stream = pyte.Stream(self.screen)

    def write(self, text: str) -> int:
        """See `io.TextIOBase`."""
        self._stream.feed(text.replace("\n", "\r\n"))
        return len(text)

    def flush(self) -> None:
        """See `io.TextIOBase`."""

    def isatty(self) -> bool:
        """See `io.TextIOBase`."""
        return True

    def lines(self) -> list[str]:
        """Everything, what scrolled away included, without the blank rows at the end."""
        rows = [*self.screen.history.top, *(self.screen.buffer[y] for y in range(HEIGHT))]
        lines = ["".join(row[x].data for x in range(WIDTH)).rstrip() for row in rows]
        while lines and not lines[-1]:
            lines.pop()
        return lines


@given(OUTPUT)
@settings(max_examples=300, deadline=None)
def test_the_cursor_is_where_a_terminal_has_it(output: list[str]) -> None:
    """Column, and what stands on its row, after any output."""
    glass, tail = Glass(), Tail()
    for text in output:
        glass.write(text)
        tail.feed(text, WIDTH)
        assert not tail.another
        assert tail.column == glass.screen.cursor.x
        assert tail.blank == (not glass.screen.display[glass.screen.cursor.y].strip())
    row = glass.screen.display[glass.screen.cursor.y]
    glass.write(tail.place())
    assert glass.screen.cursor.x == tail.column
    assert glass.screen.display[glass.screen.cursor.y].rstrip() == row.rstrip()


def test_a_wide_character_takes_two_columns() -> None:
    """Half of it is never written."""
    glass, tail = Glass(), Tail()
    for text in ("日本", "\b"):
        glass.write(text)
        tail.feed(text, WIDTH)
        glass.write(tail.place())
        assert glass.screen.cursor.x == tail.column
        assert glass.lines() == ["日本"]


def shown(output: list[str], picture: list[str] | None) -> list[str]:
    """Return what stands on a terminal after this output, with pictures in between or without."""
    glass: Any = Glass()
    foot = Foot(glass, lambda: (WIDTH, HEIGHT))
    if picture is not None:
        foot.share()
    for number, text in enumerate(output):
        glass.write(text)
        if picture is not None and number % 3 == 0:
            foot.draw(picture[: number % (len(picture) + 1)])
    foot.end()
    found: list[str] = glass.lines()
    return found


@given(st.one_of(OUTPUT, NESTED))
@settings(max_examples=300, deadline=None)
def test_the_terminal_shows_in_the_end_what_it_would_without_a_picture(output: list[str]) -> None:
    """Lines, bars that return, colours, partial lines, bars below bars: in order and whole, and nothing of the picture."""
    assert shown(output, ["first of the picture", "second", "", "fourth of the pictur"]) == shown(output, None)


@given(st.one_of(OUTPUT, NESTED))
@settings(max_examples=100, deadline=None)
def test_the_picture_stands_whole_below_the_output(output: list[str]) -> None:
    """At any time, and nothing of an older one."""
    picture = ["one", "two", "three"]
    glass: Any = Glass()
    foot = Foot(glass, lambda: (WIDTH, HEIGHT))
    foot.share()
    foot.draw(picture)
    for text in output:
        glass.write(text)
    lines = glass.lines()
    assert lines[-3:] == picture
    assert sum(line in picture for line in lines) == 3
    foot.end()
    assert vars(glass).keys() == {"screen", "_stream"}


def test_another_programs_drawing_is_told_from_output() -> None:
    """A hidden cursor, the other screen, a scrolling region, absolute places, a way up to what was there before."""
    for text in ("\x1b[?25l", "\x1b[?1049h", "\x1b[2;9r", "\x1b[5;3H", "\x1b7", "\x1b[2A"):
        tail = Tail()
        tail.feed(f"a\n{text}b", WIDTH)
        assert tail.another
    for text in ("\x1b[A", "\x1b[?25h", "\x1b[H\x1b[2J", "\x1b]0;title\x07", "\x1b[38;5;196m", "\a"):
        tail = Tail()
        tail.feed(f"a\n{text}b", WIDTH)
        assert not tail.another


def test_an_escape_sequence_in_two_writes_is_taken_as_one() -> None:
    """Its beginning waits for its end."""
    assert finished("red: \x1b[3") == ("red: ", "\x1b[3")
    assert finished("red: \x1b[31m") == ("red: \x1b[31m", "")
    assert is_plain("\x1b[31ma line\x1b[0m\n")
    assert not is_plain("\rbar")
    assert shown(["a\x1b[3", "1mb\x1b", "[0mc\n"], ["picture"]) == ["abc"]
