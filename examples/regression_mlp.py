"""Train a regression on unscaled targets that explodes within about eight steps: watched, with auto-clip, always clipped.

Run it with ``python examples/regression_mlp.py``. With ``--log runs/regression --epochs 5000`` it trains once, long enough to
watch it with ``gradwatch watch runs/regression`` from another terminal. The training itself
(`gradwatch.commands.demo_training.train`) is an ordinary loop without any call of gradwatch; the only call is `attach`.
"""

from __future__ import annotations

import argparse
import statistics

import torch

import gradwatch
from gradwatch.commands.demo_training import EPOCHS, PUBLISHED, Result, network, train

POLICIES: dict[str, gradwatch.AutoClip | str | None] = {
    "watched only": None,
    'auto-clip, clip="norm"': "norm",
    'auto-clip, clip="value"': "value",
    "always, norm 1.0": gradwatch.AutoClip(gradwatch.ClipNorm(1.0), when="always"),
    "always, value 5.0": gradwatch.AutoClip(gradwatch.ClipValue(5.0), when="always"),
}


def unwatched(seed: int, epochs: int = EPOCHS) -> Result:
    """Train without gradwatch."""
    torch.manual_seed(seed)
    return train(network(), epochs, seed)


def watched(
    seed: int, clip: gradwatch.AutoClip | str | None, epochs: int = EPOCHS, report: str | None = None
) -> tuple[Result, gradwatch.Monitor]:
    """Train with gradwatch attached."""
    torch.manual_seed(seed)
    model = network()
    with gradwatch.attach(model, clip=clip, report=report) as monitor:
        result = train(model, epochs, seed)
    return result, monitor


def logged(folder: str, epochs: int) -> None:
    """Train once with auto-clip and a run log."""
    torch.manual_seed(0)
    model = network()
    with gradwatch.attach(model, clip="norm", log=folder):
        train(model, epochs, seed=0)


def main() -> None:
    """Print the median errors of five seeds, and the published errors of single runs."""
    parser = argparse.ArgumentParser(
        description="A regression that explodes: watched only, with auto-clip, and always clipped."
    )
    parser.add_argument("--log", metavar="DIR", help="train once with auto-clip and keep the run in this folder")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help=f"epochs of that training (default: {EPOCHS})")
    options = parser.parse_args()
    if options.log is not None:
        logged(options.log, options.epochs)
        return
    print(f"{'5 seeds, median':32}{'train':>10}{'test':>10}   runs that end finite")
    for name, clip in POLICIES.items():
        results = [watched(seed, clip)[0] for seed in range(5)]
        finite = [result for result in results if result.train_error < float("inf")]
        train_error = statistics.median(result.train_error for result in results) if finite else float("nan")
        test_error = statistics.median(result.test_error for result in results) if finite else float("nan")
        print(f"{name:32}{train_error:10.3g}{test_error:10.3g}   {len(finite)} of 5")
    for name, (train_error, test_error) in PUBLISHED.items():
        print(f"{name:32}{train_error:10.3g}{test_error:10.3g}   one published run")


if __name__ == "__main__":
    main()
