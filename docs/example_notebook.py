"""Execute `examples/notebook.ipynb` and keep its outputs.

Run it with ``python docs/example_notebook.py`` after a change of the card or of what it tells.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from tests.kernel import executed  # noqa: E402  the test of the notebook executes it in the same way

FILE = ROOT / "examples" / "notebook.ipynb"

if __name__ == "__main__":
    nbformat.write(executed(FILE), FILE)
