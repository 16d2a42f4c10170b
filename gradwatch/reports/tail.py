"""The last rows of a terminal, emulated from what a program writes."""

from __future__ import annotations

import re

from rich.cells import cell_len

_PIECES = re.compile(
    r"\x1b\[(?P<parameters>[\d;:<=>?]*)[ -/]*(?P<final>[@-~])"  # a control sequence
    r"|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)"  # a title or a link
    r"|\x1b[^\[\]]"
    r"|[\r\n\b\t]"
    r"|[^\x00-\x1f\x7f]+"
)
_UNFINISHED = re.compile(r"\x1b(\[[\d;:<=>?]*[ -/]*|\][^\x07\x1b]*\x1b?)?\Z")
_PLAIN = re.compile(r"(?:[^\x00-\x1f\x7f]|\x1b\[[\d;:]*m|[\n\t])*\Z")
_MOST = 24  # rows to keep above the cursor, for bars that move up again
_LONG = 20_000  # most characters to process of one text
# sequences of programs that draw: absolute positions, scrolling regions, inserted and deleted lines, saved positions
_OTHERS = frozenset("rSTLMdsu")

_Cell = tuple[str, str]  # colours and character; an empty character is the right half of a wide one


def finished(text: str) -> tuple[str, str]:
    """Split ``text`` into its finished part and an escape sequence at its end that is not finished yet."""
    match = _UNFINISHED.search(text)
    return (text[: match.start()], match[0]) if match else (text, "")


def is_plain(text: str) -> bool:
    """Return True for text without control sequences, except newlines, tabs and colours."""
    return _PLAIN.match(text) is not None


class Tail:
    """Emulates a terminal to the extent needed to know where the cursor is and what the rows around it contain.

    Attributes:
        column: column of the cursor, at most the width of the terminal.
        moved: whether the last text moved the cursor to another row.
        another: whether the output shows that another program draws on this terminal.
    """

    def __init__(self) -> None:
        self.column = 0
        self.moved = False
        self.another = False
        self._rows: list[list[_Cell]] = [[]]
        self._row = 0
        self._colours = ""

    def feed(self, text: str, width: int) -> None:
        """Process text that was written to a terminal of this width."""
        self.moved = False
        if len(text) > _LONG:  # only the end of a long text stays visible
            text = "\n" * _MOST + text[-_LONG:]
        for piece in _PIECES.finditer(text):
            if piece["final"]:
                self._control(piece[0], piece["parameters"], piece["final"], width)
            elif piece[0][0] == "\x1b":
                self.another |= piece[0][1] in "78DMEc"
            else:
                self._write(piece[0], width)

    @property
    def blank(self) -> bool:
        """True if the row of the cursor is blank."""
        return not any(character.strip() for _, character in self._rows[self._row])

    def at_end(self, width: int) -> bool:
        """Return True if there is nothing to the right of the cursor, and the cursor is not past the last column."""
        return len(self._rows[self._row]) <= self.column < width

    @property
    def below(self) -> int:
        """The number of rows from the cursor down to the last row that is not blank."""
        filled = [place for place, row in enumerate(self._rows) if any(c.strip() for _, c in row)]
        return max(0, filled[-1] - self._row) if filled else 0

    def rows(self) -> list[str]:
        """Return the row of the cursor and the rows below it, with their colours."""
        return [_text(row) for row in self._rows[self._row : self._row + 1 + self.below]]

    def place(self) -> str:
        """Return text that moves the cursor from any column of its row to its column, without changing the row."""
        row = self._rows[self._row]
        text = "\r" + _text(row)
        if self.column < len(row):
            halved = row[self.column][1] == ""
            text += "\r" + _text(row[: self.column]) + "\b" * halved
        elif self.column > len(row):
            text += " " * (self.column - len(row))
        return text + self._colours

    def _write(self, piece: str, width: int) -> None:
        if piece == "\n":
            self._down()
        elif piece == "\r":
            self.column = 0
        elif piece == "\b":
            self.column = max(0, min(self.column, width - 1) - 1)
        elif piece == "\t":
            self.column = min(width - 1, (self.column // 8 + 1) * 8)
        else:
            self._put(piece, width)

    def _put(self, text: str, width: int) -> None:
        for character in text:
            size = 1 if character.isascii() else cell_len(character)
            row = self._rows[self._row]
            if size == 0 and self.column and self.column <= len(row):  # a combining character
                colours, before = row[self.column - 1]
                row[self.column - 1] = colours, before + character
                continue
            if self.column + size > width:
                self._down()
                row = self._rows[self._row]
            row += [("", " ")] * (self.column - len(row))
            row[self.column : self.column + size] = [(self._colours, character), *[(self._colours, "")] * (size - 1)]
            self.column += size

    def _down(self, rows: int = 1) -> None:
        self.column, self.moved = 0, True
        self._row += rows
        self._rows += [[] for _ in range(self._row + 1 - len(self._rows))]
        gone = max(0, self._row - _MOST)
        del self._rows[:gone]
        self._row -= gone

    def _up(self, rows: int) -> None:
        self.moved = True
        self.another |= rows > self._row  # beyond the rows that are known
        self._row = max(0, self._row - rows)

    def _control(self, piece: str, parameters: str, final: str, width: int) -> None:
        first = parameters.partition(";")[0]
        count = max(1, int(first)) if first.isdecimal() else 1
        column = min(self.column, width - 1)
        if final == "m":
            self._colours = "" if parameters in ("", "0") else (self._colours + piece)[-100:]
        elif final in "AF":
            self._up(count)
            self.column = 0 if final == "F" else column
        elif final in "BE":
            self._down(count)
            self.column = 0 if final == "E" else column
        elif final in "CDG":
            place = {"C": column + count, "D": column - count, "G": count - 1}[final]
            self.column = max(0, min(width - 1, place))
        elif final in "KJ":
            self._erase(final, first)
        elif final in "Hf":  # a program that clears the screen starts again at home
            self.another |= parameters not in ("", "1;1")
            self._rows, self._row, self.column, self.moved = [[]], 0, 0, True
        elif final in "lh":  # a hidden cursor or the alternate screen
            self.another |= (final, parameters) in (("l", "?25"), ("h", "?1049"), ("h", "?1047"), ("h", "?47"))
        else:
            self.another |= final in _OTHERS

    def _erase(self, what: str, how: str) -> None:
        row = self._rows[self._row]
        if how in ("1", "2", "3"):
            row[: self.column if how == "1" else len(row)] = [("", " ")] * min(self.column, len(row))
        else:
            del row[self.column :]
        if what == "J":
            self.moved = True
            del self._rows[self._row + 1 :]


def _text(row: list[_Cell]) -> str:
    """Return a row as text with control sequences for its colours."""
    text, before = "", ""
    for colours, character in row:
        if colours != before:
            text += ("\x1b[0m" if before else "") + colours
            before = colours
        text += character
    return text + ("\x1b[0m" if before else "")
