"""What is found of the cause of an incident: a layer that was changed alone, a broken buffer, the operation behind NaN."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradwatch.records import EXPLOSION

if TYPE_CHECKING:
    from collections.abc import Callable

    from gradwatch.history.history import History
    from gradwatch.records import Kind, Origin
    from gradwatch.verdict.harm import Harm
    from gradwatch.verdict.story import Story
    from gradwatch.verdict.suspects import Suspects


class Causes:
    """Gives stories what was found of their causes.

    Args:
        history: the history of the run, which is only read.
        harm: knows which rules look at buffers.
        suspects: knows which layers have left their band.
        broken: returns which weights and buffers are not finite, in words.

    Attributes:
        origin: the operation behind the row that is about to be judged; None: it was not found.
        unknown: why it was not found; "" if that was told, or not looked for.
    """

    def __init__(self, history: History, harm: Harm, suspects: Suspects, broken: Callable[[], str]) -> None:
        self._history = history
        self._harm = harm
        self._suspects = suspects
        self._broken = broken
        self.origin: Origin | None = None
        self.unknown = ""

    def take(self, story: Story, kind: Kind) -> str | None:
        """Give the story what was found since the last time; return the layer that something has moved, if any."""
        moved, finding = (None, None) if story.weighed else self._suspects.moved()
        story.moved = story.moved or moved
        story.weighed |= self._history.row.weight_norm is not None  # on a device some steps after the opening
        story.findings += [finding] if finding else []
        if self._harm.has("buffer", story.firing.values()) and not story.named:
            story.named, named = True, self._broken().replace(" holds ", " held ")  # it may be mended later
            story.findings += [f"at step {self._history.row.step}, {named}"] if named else []
        if self.origin is not None and kind in EXPLOSION:
            if not _is_consequence(story, self.origin):
                story.origin = story.origin or self.origin
                story.findings = [one for one in story.findings if one != story.unknown]  # of an earlier step
            self.origin = None
        if self.unknown and kind in EXPLOSION and story.origin is None:
            story.findings += [] if story.unknown else [self.unknown]  # later steps have the same reason, as a rule
            story.unknown, self.unknown = story.unknown or self.unknown, ""
        return moved


def _is_consequence(story: Story, origin: Origin) -> bool:
    """Return whether a weight was found that an earlier step of the story has damaged, which is no origin of it."""
    if origin.subject != "weight" or story.incident is None or (story.incident.clip and story.incident.clip.skipped):
        return False
    return any(sign.kind == "nonfinite" and sign.step < origin.step for sign in story.incident.signs)
