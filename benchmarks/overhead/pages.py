"""Write the measured costs to docs/performance.md."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.pages import ROOT, between_marks, markdown

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

# goals for each workload, as ratios
GOALS = {
    "own to clip": dict(zip("abcdef", (0.8, 0.65, 0.75, 0.75, 0.9, 0.65), strict=True)),
    "to plain": dict(zip("abcdef", (1.12, 1.05, 1.02, 1.02, 1.02, 1.04), strict=True)),
    "to clip": dict(zip("abcdef", (0.95, 0.98, 1.0, 1.0, 1.0, 0.97), strict=True)),
    "budget": dict(zip("abcdef", (1.05, 1.02, 1.01, 1.01, 1.01, 1.01), strict=True)),
}
_TITLES = {
    "a": "20-25-1 MLP",
    "b": "50-layer MLP",
    "c": "small ResNet",
    "d": "LSTM",
    "e": "GPT, 6 layers",
    "f": "GPT, 24 layers, batch 1",
}


def write_overhead(found: dict[str, dict[str, Any]], title: str) -> None:
    """Write the tables of one run, whose results are given by workload and variant."""
    letters = list(found)

    def row(name: str, values: Iterable[str]) -> list[str]:
        return [name, *values]

    def line(label: str, variant: str, quantity: str, goal: str | None = None) -> list[str]:
        cells = []
        for letter in letters:
            value = found[letter].get(variant, {}).get(quantity)
            digits = ".2f" if quantity == "own to clip" else ".3f"
            cell = "" if value is None else f"{value:{digits}}"
            cells.append(f"{cell} ({GOALS[goal][letter]:g})" if goal and cell else cell)
        return row(label, cells)

    head = ["", *(f"({letter}) {_TITLES[letter]}" for letter in letters)]
    core = [
        line("own time / `clip_grad_norm_`'s own time", "armed", "own to clip", "own to clip"),
        line("step / plain step", "armed", "to plain", "to plain"),
        line("step / step with `clip_grad_norm_`", "armed", "to clip", "to clip"),
        line("budget of 1 %: step / plain step", "budget 1 %", "to plain", "budget"),
    ]
    core = [cells for cells in core if any(cells[1:])]
    plain = row("plain step, ms", (f"{found[letter]['plain']:.3g}" for letter in letters))
    clip = row("`clip_grad_norm_`: step / plain step", (f"{found[letter]['clip']:.3f}" for letter in letters))
    names = list(
        dict.fromkeys(name for here in found.values() for name, value in here.items() if isinstance(value, dict))
    )
    rows = [plain, clip, *core]
    for name in names:
        if name in ("armed", "parts", "device"):
            continue
        if name == "user clips too":
            rows.append(line("watching while the user clips: step / step with clip", name, "to clip"))
        elif name != "budget 1 %":
            rows.append(line(f"{name}: step / plain step", name, "to plain"))
    rows.extend(
        row(f"armed, us: {part}", (f"{found[letter]['parts'][part]:.0f}" for letter in letters))
        for part in ("hooks", "measuring", "rules", "reports")
    )
    text = f"{title}. Goals in brackets.\n\n" + markdown(head, rows)
    if "a" in found:
        text += (
            f"\n\nOn (a), memory grows by {found['a']['blocks']:.2f} blocks of Python per step, and by "
            f"{found['a']['growth']:.1f} KB of the process per 1,000 steps."
        )
    between_marks(ROOT / "docs" / "performance.md", "overhead", text)


def write_scaling(tables: Mapping[str, tuple[Sequence[str], Sequence[Sequence[str]]]]) -> None:
    """Write the tables of one run with ``--scaling``, given as columns and rows by title."""
    text = "\n\n".join(markdown([title, *columns], rows) for title, (columns, rows) in tables.items())
    between_marks(ROOT / "docs" / "performance.md", "scaling", text)
