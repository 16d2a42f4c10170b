"""A real kernel of a notebook, driven as a notebook drives it, cell by cell."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nbformat
from nbclient import NotebookClient

from tests.terminal import EXPLODING

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = str(Path(__file__).parent.parent)


class Kernel(NotebookClient):
    """A notebook whose cells are added and run one after the other.

    Attributes:
        messages: cell and type of each message in which the kernel published an output.
    """

    messages: list[tuple[int, str]]

    def __init__(self) -> None:
        super().__init__(nbformat.v4.new_notebook(), timeout=120, resources={"metadata": {"path": ROOT}})
        self.messages = []

    def process_message(self, message: Any, cell: Any, index: int) -> Any:
        """Note each output, and do with it what a notebook does."""
        if message["msg_type"] in ("stream", "display_data", "update_display_data", "execute_result", "error"):
            self.messages.append((index, message["msg_type"]))
        return super().process_message(message, cell, index)

    def run(self, code: str) -> int:
        """Run a new cell; return its index."""
        self.nb.cells.append(nbformat.v4.new_code_cell(code))
        self.again(len(self.nb.cells) - 1)
        return len(self.nb.cells) - 1

    def again(self, index: int) -> None:
        """Run a cell again, as a person does who presses its button twice."""
        self.execute_cell(self.nb.cells[index], index)

    def outputs(self, index: int) -> list[str]:
        """Return what stands below a cell: the HTML of each output, or its text."""
        found = []
        for output in self.nb.cells[index].outputs:
            data = output.get("data", {})
            found.append(data.get("text/html") or data.get("text/plain") or output.get("text") or str(output))
        return found

    def told(self, expression: str) -> Any:
        """Return the value of an expression in the kernel."""
        index = self.run(f"print(repr({expression}))")
        return eval(self.outputs(index)[0], {"nan": float("nan")})  # noqa: S307  what the kernel of this test has printed


def executed(file: Path) -> Any:
    """Return a notebook with the outputs of this machine, and nothing of the machine beside them."""
    book = nbformat.read(file, as_version=4)
    NotebookClient(book, timeout=300, record_timing=False, resources={"metadata": {"path": ROOT}}).execute()
    book.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return book


@contextmanager
def kernel() -> Iterator[Kernel]:
    """Start a kernel in which gradwatch is imported and `EXPLODING` was run."""
    started = Kernel()
    with started.setup_kernel():
        started.run(EXPLODING)
        yield started
