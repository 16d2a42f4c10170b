"""`gradwatch demo`: a training that explodes when it is only watched, and does not with auto-clip."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradwatch.commands.values import a_number

if TYPE_CHECKING:
    import argparse

    from rich.console import Console

NAME = "demo"
HELP = "train a regression that explodes, first watched only, then with auto-clip"
EXAMPLES = """\
  gradwatch demo
  gradwatch demo --epochs 20 --seed 3"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to ``parser``."""
    parser.add_argument("--epochs", type=a_number(1, 10**6), default=100, help="epochs of each training (default: 100)")
    parser.add_argument(
        "--seed", type=a_number(0, 2**63 - 1), default=0, help="seed of weights and batches (default: 0)"
    )


def run(options: argparse.Namespace, console: Console) -> int:
    """Run the demo and print its results; return the exit code."""
    from gradwatch.commands.demo_training import run as demo

    console.print(demo(epochs=options.epochs, seed=options.seed))
    return 0
