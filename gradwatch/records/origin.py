"""`Origin`: the operation that made the first non-finite number, as plain data that reports show and run logs keep.

This module does not import torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Literal

from gradwatch.text.printable import printable
from gradwatch.text.wording import counted, number

Direction = Literal["forward", "backward", "update"]
Subject = Literal["operation", "written", "weight", "buffer", "input", "argument", "optimizer"]
Part = Literal["model", "loss code", "optimizer", "unknown"]
Way = Literal["replay", "graph", "watched step", "source", "statements", "optimizer state"]

_ROWS = 8  # rows of the batch that are written out


@dataclass(frozen=True, slots=True)
class Operand:
    """One tensor that an operation got.

    Attributes:
        name: name in the operation's schema, or the user's own name of it.
        shape, dtype: those of the tensor.
        smallest, largest: range of its finite elements; NaN if there are none.
        elements: number of elements.
        zeros, nans, infs: how many of them are zero, NaN and infinite.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    smallest: float = math.nan
    largest: float = math.nan
    elements: int = 0
    zeros: int = 0
    nans: int = 0
    infs: int = 0

    def __str__(self) -> str:
        size = ", ".join(map(str, self.shape)) + ("," if len(self.shape) == 1 else "")
        parts = [f"{self.name} ({size}) {self.dtype}"]
        if not math.isnan(self.smallest):
            parts.append(f"min {number(self.smallest + 0.0)}, max {number(self.largest + 0.0)}")
        counts = ((self.zeros, "zero"), (self.nans, "NaN"), (self.infs, "infinity"))
        parts += [counted(count, noun) for count, noun in counts if count]
        return ", ".join(parts)


@dataclass(frozen=True, slots=True, repr=False)
class Origin:
    """Where the first non-finite number of a step came from. What is not known is empty or None.

    Attributes:
        subject: what it is: an operation that made a non-finite number of finite ones, a value that was written on purpose,
            a weight, a buffer or an input that held one already, an argument of the operation that was made without a graph,
            or the optimizer's arithmetic.
        op: the operation, as ATen names it; for other subjects the one that met the value first.
        node: node of autograd; empty if it is not known, as in a forward that was repeated without a graph.
        direction: forward, backward or update.
        part: whether it ran inside the model's forward, in the code of the loss, or in the optimizer.
        module: path of the module in the model; empty for the model itself, None if it ran in no module.
        file, line: line of the user's program that called it; empty and 0 if that is not known.
        calls_model: whether that line is the one that called the model, because no line of the user's is further inside.
        name: name of the weight, buffer or input, or class of the optimizer.
        inputs: tensors that the operation got.
        output: what it returned.
        rows: rows (dimension 0) of the batch that are not finite there; empty if that is not known or if all of them are.
        batch: number of rows of the batch.
        cause: what happened, in words.
        advice: what to do, in sentences.
        faithful: whether the repeated forward gave the same output as the original; None if nothing was repeated.
        found_by: way in which it was found.
        lag: number of steps by which the weights were newer than those of the step.
        step: optimizer step.
        rank: process in which it was found; None if that is this one, or the only one.
        seconds: time that the investigation took.
    """

    subject: Subject
    op: str
    direction: Direction
    part: Part
    node: str = ""
    module: str | None = None
    file: str = ""
    line: int = 0
    calls_model: bool = False
    name: str = ""
    inputs: tuple[Operand, ...] = ()
    output: Operand | None = None
    rows: tuple[int, ...] = ()
    batch: int = 0
    cause: str = ""
    advice: tuple[str, ...] = ()
    faithful: bool | None = None
    found_by: Way = "replay"
    lag: int = 0
    step: int = -1
    rank: int | None = None
    seconds: float = math.nan

    def __repr__(self) -> str:
        return f"<Origin {self}>"

    def __str__(self) -> str:
        return printable(("" if self.rank is None else f"on rank {self.rank}, ") + self._headline())

    def at(self, step: int, seconds: float) -> Origin:
        """Return the record with its step and with the time that the investigation took."""
        return replace(self, step=step, seconds=seconds)

    def repeated(self, *, faithful: bool | None) -> Origin:
        """Return the record with whether the repeated forward gave the same output."""
        return replace(self, faithful=faithful)

    def later(self, lag: int) -> Origin:
        """Return the record with the number of steps by which the weights were newer."""
        return replace(self, lag=lag)

    def of_rank(self, rank: int) -> Origin:
        """Return the record as other processes show it."""
        return replace(self, rank=rank)

    def _headline(self) -> str:
        if self.subject in ("weight", "buffer"):
            return f"{self.subject} {self.name} was not finite before the forward{self._met}"
        if self.subject == "input":
            rows = f" ({self._rows_told})" if self._rows_told else ""
            return f"batch `{self.name}` held {self.cause}{rows}{self._met}"
        if self.subject == "argument":
            return f"`{self.op}`{self.place} got {self.cause} in its `{self.name}`{f' ({self._rows_told})' if self.rows else ''}"
        if self.subject == "optimizer":
            return f"the optimizer's arithmetic: {self.cause}"
        if self.subject == "written":
            return f"`{self.op}`{self.place} wrote a value that is not finite, and it reached the result"
        return f"`{self.op}`{self.place} {self.cause}"

    @property
    def came_with_the_batch(self) -> bool:
        """Whether the model or the loss was given the value, so that no update has made it."""
        return self.subject in ("input", "argument")

    @property
    def _met(self) -> str:
        return f"; `{self.op}`{self.place} got it" if self.op and not self.op.startswith("(") else ""

    @property
    def place(self) -> str:
        """Where it ran, in words, such as " at model.py:42 in encoder.2 (forward)"."""
        told = ""
        if self.file:
            told += f" {'below the call' if self.calls_model else ''}{' ' * self.calls_model}at {_short(self.file)}:{self.line}"
        if self.module:
            told += f" in {self.module}"
        elif self.part == "loss code":
            told += " in the loss code" if self.found_by in ("source", "statements") else " outside of the model"
        elif self.part == "model":
            told += " in the model"
        return f"{told} ({self.direction})"

    @property
    def _rows_told(self) -> str:
        if not self.rows:
            return ""
        first = ", ".join(map(str, self.rows[:_ROWS]))
        more = f" and {len(self.rows) - _ROWS} more" if len(self.rows) > _ROWS else ""
        return f"row{'s' * (len(self.rows) > 1)} {first}{more}"

    @property
    def details(self) -> tuple[str, ...]:
        """The inputs and rows, and how it was found, as printable lines."""
        lines = []
        told = [str(one) for one in self.inputs]
        if told or (self.rows and self.subject != "input"):
            if self.rows and self.subject != "input":
                told.append(f"{self._rows_told} of the batch")
            lines.append(" · ".join(told))
        lines.append(self.provenance)
        return tuple(printable(line) for line in lines)

    @property
    def provenance(self) -> str:
        """How it was found and what that cost, in words."""
        ways = {
            "replay": "found by repeating the model's forward"
            + (" and backward" if self.direction == "backward" else ""),
            "graph": "found in the graph of the loss",
            "watched step": "found by watching each operation of the step",
            "source": "found by computing the loss again from its source",
            "statements": "found by running the statements of the loss again",
            "optimizer state": "found in the state of the optimizer",
        }
        told = ways[self.found_by]
        if self.lag:
            told += f" with the weights of {counted(self.lag, 'step')} later"
        if self.faithful is False:
            told += ", whose result differed from the original"
        return told + (f", in {number(1e3 * self.seconds)} ms" if self.seconds == self.seconds else "")


def _short(path: str) -> str:
    return PurePath(path).name or path
