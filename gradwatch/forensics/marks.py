"""Marks: which operation a non-finite tensor comes from. Only tensors that are not finite are remembered, by their memory."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch.multiprocessing.reductions import StorageWeakRef

from gradwatch.forensics.frames import Place
from gradwatch.forensics.names import storage_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from gradwatch.records import Operand, Subject


@dataclass(eq=False)
class Mark:
    """One place at which something that is not finite came up.

    Attributes:
        order: index of the operation among those that were watched.
        subject: what it is, as in `gradwatch.records.origin.Origin`.
        op: the operation that made it or, for a tensor from elsewhere, that met it first.
        raw: name of the operation that ran, which in a backward is another one than ``op``.
        mute: whether it holds only infinities that were written on purpose, such as those of a mask.
        node: node of autograd; empty in a forward.
        backward, update: whether it ran in a backward, and in the step of an optimizer.
        place: where the operation ran, or in a backward where its forward ran.
        name: name of a tensor from elsewhere.
        earlier: whether that has a graph, so that an operation that was not watched has made it.
        inputs, output: numbers of the tensors.
        scalars: the other arguments.
        rows: indices of the first dimension at which the output is not finite, if its length is that of the batch.
    """

    order: int
    subject: Subject
    op: str
    raw: str = ""
    mute: bool = False
    node: str = ""
    backward: bool = False
    update: bool = False
    place: Place = field(default_factory=Place)
    name: str = ""
    earlier: bool = False
    inputs: tuple[Operand, ...] = ()
    output: Operand | None = None
    scalars: dict[str, Any] = field(default_factory=dict)
    rows: tuple[int, ...] = ()
    rows_known: bool = False

    def heard(self) -> Mark:
        """Return the mark of infinities that are not those of a mask in what comes of them here."""
        return replace(self, mute=False)

    @property
    def key(self) -> tuple[Any, ...]:
        """What a user would call the same origin."""
        return (self.subject, self.op, self.backward, self.place.file, self.place.line, self.place.module, self.name)


class Marked:
    """The marks of the tensors that are not finite."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Any, tuple[Mark, ...]]] = {}

    def of(self, tensor: Tensor) -> tuple[Mark, ...]:
        """Return the marks of the memory of a tensor; empty if it was not made while operations were watched."""
        found = self._known.get(storage_of(tensor))
        return () if found is None else found[1]

    def put(self, tensor: Tensor, marks: Iterable[Mark]) -> None:
        """Set the marks of the memory of a tensor. A weak reference keeps its number from being given to another one."""
        reference = StorageWeakRef(tensor.untyped_storage())
        self._known[storage_of(tensor)] = reference, ordered(marks)
        if len(self._known) % 1024 == 0:
            self._known = {key: kept for key, kept in self._known.items() if not kept[0].expired()}


def ordered(marks: Iterable[Mark]) -> tuple[Mark, ...]:
    """Return marks without repetitions, in the order in which their operations ran."""
    return tuple(sorted(dict.fromkeys(marks), key=lambda mark: mark.order))
