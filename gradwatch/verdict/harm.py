"""Whether the run suffers from what the signs of an incident show: whether the loss does, or a value is far beyond its limit."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from gradwatch.history.losses import EARLY
from gradwatch.history.recurrence import ONE_STEP, is_of_the_batch
from gradwatch.history.statistics import median_and_mad

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from gradwatch.history.history import History
    from gradwatch.records import Alarm, Role
    from gradwatch.rules import Rule
    from gradwatch.verdict.settings import VerdictSettings
    from gradwatch.verdict.story import Story

_BACK = 0.25  # share of a jump that may be left of it where the loss comes back
_NO_PLATEAU = 100.0  # growth of a norm in one step beyond which it is not that of a plateau's end
_BORNE = 8.0  # multiple of the loss that the decrease which an update predicts may have, as in GW305
_HIGHER = 1.5  # multiple of the first loss up to which a loss is no higher than where the run began


class Harm:
    """What the signs of a story and the loss say of the harm to the run.

    Args:
        history: the history of the run, which is only read.
        rules: the rules that fire the signs.
        settings: the limits of the verdict.
    """

    def __init__(self, history: History, rules: Sequence[Rule], settings: VerdictSettings) -> None:
        self._history = history
        self._settings = settings
        self._role = {rule.code: rule.role for rule in rules}

    def has(self, role: Role, signs: Iterable[Alarm]) -> bool:
        """Return whether a rule with this role has fired one of the signs."""
        return any(self._role[sign.code] == role for sign in signs)

    def look_for(self, story: Story, *, due: bool = False) -> bool:
        """Return True if the firing signs show harm: the loss suffers, or a sign of growth is far beyond its limit.

        Growth alone may be the start of learning. A loss that jumped farther than the last update can explain is caused by the
        batch, and so is a surge in the same step, unless the update about to be made is too long. So is a jump that is ``due``:
        the next one of a routine of the program.
        """
        signs, now = story.firing.values(), self._history.row.step
        too_long = self.has("update", signs) or self.has("overshoot", signs)
        if not too_long and (due or is_of_the_batch(self._history)):
            story.odd_steps.add(now)
        # the program changes its targets or data: what follows settles again, unless it breaks
        if story.recurrence.routine or self._starts_over(story):
            return any(sign.kind == "nonfinite" or sign.sign == "numeric" for sign in signs) or self.has(
                "damage", signs
            )
        told = [sign for sign in signs if sign.step not in story.odd_steps]
        return (
            any(
                sign.sign == "numeric"
                or (sign.sign == "subtle" and sign.kind != "spike" and self._role[sign.code] != "level")
                for sign in signs
            )
            or any(sign.kind == "nonfinite" for sign in signs)
            or (self._suffers(story, told) and not self.at_the_edge(signs))
            or self.has("backward", signs)
            # early on only the coming update can be judged, and only before it is made; a single layer does not
            # amplify gradients
            or (
                self._history.losses < EARLY
                and self._history.row.family != "other"
                and np.count_nonzero(self._history.matrices & self._history.arriving) > 1
                and self.has("update", signs)
            )
            or any(
                self._role[sign.code] == "overshoot"
                and (self._history.losses < EARLY or self._history.row.step - sign.step >= EARLY)
                for sign in signs
            )
        )

    def level_lasts(self, story: Story) -> bool:
        """Return True if the loss is still high and no longer decreases; called 12, 24, 48 ... steps after the opening.

        The loss is high if it is more than twice its usual ceiling. It decreases, as after a change of the task, if it has come
        back half of the way at the first check (two thirds at later ones), measured in logarithms, or if it is a fifth lower
        than at the check before.
        """
        level, _ = self._history.loss_level(story.look_at - 2)
        before, story.level = story.level, level
        if not level > max(story.ceiling, 2 * story.ceiling):  # for a negative loss, the ceiling itself
            return False
        first = self._settings.lasting_steps
        if story.look_at == first:
            after = self._history.task_loss(last=first)
            before, _ = median_and_mad(after[: first // 2])
            level, _ = median_and_mad(after[first // 2 :])
        way, peak = 1 / 2 if story.look_at == first else 1 / 3, story.peak
        if story.look_at > 2 * first:  # that of an odd batch says nothing of the losses that followed
            peak = min(peak, float(np.fmax.reduce(self._history.task_loss(last=story.look_at)[1:], initial=-math.inf)))
        back = story.ceiling * (peak / story.ceiling) ** way if 0 < story.ceiling < peak else -math.inf
        return not (level < back or before - level > abs(before) / 5)

    def falls(self, story: Story) -> bool:
        """Return True if the loss, after it jumped, stays near its peak or falls and gradients settle.

        The task may then have changed.
        """
        history, confirmed = self._history, self.has("damage", story.firing.values())
        if not story.jumped or story.lasting or confirmed or history.row.loss > story.peak + abs(story.peak) / 4:
            return False
        if self._starts_over(story):
            return True
        assert story.incident is not None
        settled = history.row.step - story.incident.opened_step >= self._settings.lasting_steps
        return not (settled and bool((history.surge() > self._settings.settled).any()))

    def at_the_edge(self, signs: Iterable[Alarm]) -> bool:
        """Return True if norms and loss have swung up over several steps, and each update is one from which they come back.

        Where zero is the lowest loss, ``||g||^2 <= 2 h L`` with the largest curvature ``h``. Training settles where ``lr h`` is 2
        (Cohen et al. 2021), and up to 4 it is thrown to flatter places, where the loss that has risen falls again (Lewkowycz
        et al. 2020), unless the rate rises. Only ``lr ||g||^2 > 8 L`` proves that it is beyond. A surge of a single step is no
        swing, nor a jump of the loss alone where ``lr ||g||^2 < L``, since no update has made it.
        """
        history = self._history
        growth = [sign for sign in signs if sign.sign == "growth"]
        if history.warming_up or any(self._role[sign.code] != "surge" for sign in growth):
            return False
        decrease, loss = history.predicted_decrease, history.row.loss
        known = bool(np.isfinite(decrease).any())
        if not (known and (0.0 if growth else loss) <= np.nansum(decrease) <= _BORNE * loss):
            return False
        columns = [history.layers.index(sign.layer) for sign in growth if sign.layer is not None] or slice(None)
        before, now = history.grad_norm(last=2)[:, columns]
        return not (now > ONE_STEP * before).any()

    def _starts_over(self, story: Story) -> bool:
        """Return True while a loss that no update has raised is no higher than where the run began.

        The program has changed the targets, which are learned anew as at first: what is usual was measured on the old ones.
        """
        highest = _HIGHER * self._history.first_loss
        return story.of_the_batch and story.jumped and story.peak <= highest and self._history.row.loss <= highest

    def _suffers(self, story: Story, told: Sequence[Alarm]) -> bool:
        """Return True if the loss jumps or rises in this step, or norms surge so far that it need not be seen to."""
        now = self._history.row.step
        return (
            any(sign.kind == "spike" and sign.step == now for sign in told)
            or (now not in story.odd_steps and self._history.loss_is_rising() and not self._comes_back(story))
            or (self._far_beyond(told) and not self._is_held())
        )

    def _comes_back(self, story: Story) -> bool:
        """Return whether the loss, after a jump that no update has made, is well below the losses that followed it."""
        if story.incident is None or not story.of_the_batch:
            return False
        since = self._history.row.step - story.incident.opened_step
        followed = self._history.task_loss(last=since)[:-1]
        highest = float(np.fmax.reduce(followed)) if len(followed) else story.peak
        return self._history.row.loss <= story.ceiling + _BACK * (highest - story.ceiling)

    def _is_held(self) -> bool:
        """Return whether the user's clip, which acts on each step that needs it, has bounded the step of the last row."""
        return self._history.clipped_by_user and self._history.row.applied < 1

    def _far_beyond(self, signs: Iterable[Alarm]) -> bool:
        """Return True if a surge is far beyond its limit, and either most layers do not surge so far or the loss is high.

        At the end of a plateau, most layers surge together while the loss is at its level or falls.
        """
        times = self._settings.far * (
            1 if self._history.task_rows >= 2 * EARLY else 2
        )  # a typical norm from a few rows is unreliable
        far = [sign for sign in signs if self._role[sign.code] == "surge" and sign.value > times * sign.limit]
        if not far:
            return False
        if self.has("update", [sign for sign in signs if sign.step == self._history.row.step]):
            return True  # no plateau ends with an update larger than the weights
        columns = [self._history.layers.index(sign.layer) for sign in far if sign.layer is not None]
        before, now = self._history.grad_norm(last=2)[:, columns]
        if (now > _NO_PLATEAU * before).any():
            return True  # nor in a single step
        middle, scatter = self._history.loss_level()
        judged = int(np.count_nonzero(np.isfinite(self._history.surge())))
        return 2 * len(far) <= judged or not self._history.row.loss <= middle + scatter
