"""Losses that are summed over sequences of very unequal lengths."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.faults.loops import fit, to_zero
from benchmarks.faults.program import HeldOut, Program, rare
from benchmarks.faults.rare.held_out import correct, unseen

if TYPE_CHECKING:
    from benchmarks.faults.program import Run

_entropy = functional.cross_entropy


def _utterance(length: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """So many letters, each held for two or three frames with noise ``(1, 8, frames)``, and the letters."""
    shapes = 1.5 * torch.randn(5, 8, generator=unseen())
    letters = torch.randint(1, 5, (length,), generator=generator).cumsum(0) % 5  # none twice in a row
    held = letters.repeat_interleave(torch.randint(2, 4, (length,), generator=generator))
    return (shapes[held] + 0.5 * torch.randn(len(held), 8, generator=generator)).T.unsqueeze(0), letters + 1


def _spoken_lengths(run: Run) -> None:
    """CTC, one utterance a step and its loss summed: most have two letters, one in ten has twenty."""
    model = nn.Sequential(nn.Conv1d(8, 24, 3, padding=1), nn.ReLU(), nn.Conv1d(24, 6, 3, padding=1))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    criterion = nn.CTCLoss(reduction="sum")

    def loss(frames: Tensor, letters: Tensor) -> tuple[Tensor, Tensor]:
        said = model(frames).permute(2, 0, 1).log_softmax(2)
        return criterion(said, letters.unsqueeze(0), [len(said)], [len(letters)]), said

    generator = unseen()
    long = [_utterance(20, generator) for _ in range(60)]

    def judge() -> HeldOut:
        wrong, right = 0.0, 0
        with torch.no_grad():
            for frames, letters in long:
                each, said = loss(frames, letters)
                heard = said[:, 0].argmax(1).unique_consecutive()
                wrong += each.item() / len(long)
                right += _edits(heard[heard > 0].tolist(), letters.tolist())
        return HeldOut(wrong, 1 - right / (20 * len(long)))

    run.judged_by(judge)
    fit(
        run,
        model,
        optimizer,
        lambda: loss(*_utterance(20 if torch.rand(()) < 0.1 else 2))[0],
        schedule=to_zero(optimizer, run),
    )


def _edits(heard: list[int], said: list[int]) -> int:
    """Levenshtein's distance."""
    row = list(range(len(said) + 1))
    for place, letter in enumerate(heard, 1):
        before, row[0] = row[0], place
        for at, own in enumerate(said, 1):
            before, row[at] = row[at], min(row[at] + 1, row[at - 1] + 1, before + (letter != own))
    return row[-1]


def _rare_words(run: Run) -> None:
    """The next word, its loss summed over sentences of 2 to 64 words; words are as rare as in a language."""
    chance = 1 / (1.0 + torch.arange(40))
    follows = torch.randperm(40, generator=unseen())
    model = nn.Sequential(nn.Embedding(40, 24), nn.Linear(24, 40))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    def sentence(length: int) -> tuple[Tensor, Tensor]:
        """Half of the places follow from the word before, the others are drawn."""
        x = torch.multinomial(chance, length, replacement=True)
        return x, torch.where(torch.rand(length) < 0.8, follows[x], torch.multinomial(chance, length, replacement=True))

    last = torch.arange(20, 40)

    def judge() -> HeldOut:
        with torch.no_grad():
            return correct(model(last), follows[last])

    run.judged_by(judge)

    def objective() -> Tensor:
        x, y = sentence(int(2 ** (1 + 5 * torch.rand(())).item()))
        return _entropy(model(x), y, reduction="sum")

    fit(run, model, optimizer, objective, schedule=to_zero(optimizer, run))


PROGRAMS: tuple[Program, ...] = (
    rare(
        "short and long utterances",
        _spoken_lengths,
        "The summed loss of a long utterance is ten times that of a short one.",
        "letters of long utterances heard right",
    ),
    rare(
        "rare words in sentences of any length",
        _rare_words,
        "The summed loss goes with the length, from 2 to 64, and a rare word has a gradient of its own.",
        "accuracy after rare words",
    ),
)
