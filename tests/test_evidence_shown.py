"""One sentence for all layers of a rule, in all reports, and from rules of the user's own."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pytest
import torch

import gradwatch
from gradwatch.__main__ import main
from gradwatch.history.history import History
from gradwatch.offline.replay import replay
from gradwatch.records import Alarm, Provenance, Row
from gradwatch.rules.no_traction import stuck_at
from gradwatch.runlog import RunLog
from gradwatch.runlog.plain import from_json, to_json
from gradwatch.verdict.evidence import forecast, said
from tests.test_rule_trainings import one_bad_batch, rate_too_high
from tests.trainings import data, mlp, train

if TYPE_CHECKING:
    from pathlib import Path

    from gradwatch.records import Floats


def alarm(layer: str, step: int, value: float) -> Alarm:
    """Return an alarm with a sentence."""
    words = f"{layer} was {value} at step {step}"
    return Alarm("GW301", "surge", "growth", "exploding", layer, step, value, 10.0, words=words)


def test_the_suspect_speaks_for_the_layers_of_a_rule() -> None:
    """If it was among the first; otherwise the largest of these does. The count is singular for one."""
    signs = [alarm("a", 3, 20.0), alarm("b", 3, 90.0), alarm("c", 4, 99.0)]
    assert said(signs[:1], "a") == "a was 20.0 at step 3 (GW301)"
    assert said(signs, "a") == "a was 20.0 at step 3; the same rule fired for 2 more layers by step 4 (GW301)"
    assert said(signs[:2], "c") == "b was 90.0 at step 3; the same rule fired for 1 more layer (GW301)"
    assert said(signs, "c").startswith("b was 90.0 at step 3")


def test_the_suspects_own_numbers_stand_in_the_evidence_of_a_real_explosion() -> None:
    """The headline and the evidence speak of the same layer."""
    (incident,) = one_bad_batch(True).incidents
    sign = next(sign for sign in incident.signs if sign.code == "GW301" and sign.layer == incident.suspect)
    assert any(line.startswith(sign.words) for line in incident.evidence)


def test_a_surge_beside_a_step_without_a_gradient_is_one_of_a_single_step() -> None:
    """As of a network whose optimizer makes every other step."""
    numbers = {"norm": 500.0, "before": float("nan"), "step before": 8.0, "usual": 2.0, "spread": 1.0}
    alarm = Alarm("GW301", "surge", "growth", "exploding", "a", 9, 25.0, 10.0, numbers=numbers)
    assert gradwatch.rules.GradientSurge().sentence(alarm) == (
        "the gradient norm of a was 500 at step 9, 250 times its usual 2 (limit 100 for a single step)"
    )


def test_a_loss_that_exploded_at_once_began_at_its_first_value() -> None:
    """And not at the median of the first sixteen."""
    history = History(["a"])
    for step, loss in enumerate([1.5, *[1e4] * 20, *[1.45] * 60]):
        history.push(Row(step, loss, np.ones(1), 1.0, provenance=Provenance(loss="written")))
    assert stuck_at(history) == {"loss": 1.45, "began": 1.5, "at once": 1.0}


def test_a_loss_that_runs_away_after_a_jump_is_not_measured_by_its_beginning() -> None:
    """The sentence names the loss of the jump as such: the beginning was far lower."""
    history, rule = History(["a"]), gradwatch.rules.LossRunaway()

    def sentence(loss: float, step: int) -> str:
        history.push(Row(step, loss, np.ones(1), 1.0, provenance=Provenance(loss="written")))
        return rule.sentence(
            Alarm("GW104", "", "subtle", "diverging", None, step, 9.0, 2.5, numbers=rule.numbers(history, 0))
        )

    assert "times the largest loss of its beginning (10; limit 2.5)" in [sentence(10.0, n) for n in range(20)][-1]
    sentence(3000.0, 20)
    history.follow_task()
    said = [sentence(1e5, 21 + n) for n in range(8)][-1]
    assert "33.3 times the largest loss to which it had jumped before (3,000; limit 2.5)" in said


def test_a_young_run_has_no_hundred_steps() -> None:
    """The smallest weights are those of the steps that there are."""
    said = {}
    for steps in (40, 140):
        history, rule = History(["a"]), gradwatch.rules.WeightsRunAway()
        for step in range(steps):
            weight = np.array([1.0 if step < steps - 1 else 9.0])
            history.push(Row(step, 1.0, np.ones(1), 1.0, weight, provenance=Provenance(loss="written")))
        numbers = {**rule.numbers(history, 0), "floor": 0.0}
        said[steps] = rule.sentence(Alarm("GW304", "", "growth", "exploding", "a", step, 9.0, 4.0, numbers=numbers))
    assert "9 times its smallest in 40 measured steps, 1 (limit" in said[40]
    assert "9 times its smallest in 100 measured steps, 1 (limit" in said[140]


def test_growth_says_when_it_was_measured() -> None:
    """And counts steps in words."""
    (line,) = forecast(np.array([2.0**n for n in range(8)]), 12)
    assert line.startswith(
        "at step 12, gradients double every 1 step: at this pace they exceed float16 in about 9 steps"
    )
    assert line.endswith("and float32 in about 121 steps")
    (line,) = forecast(np.array([10.0**n for n in range(8)]), 12)
    assert line.startswith(
        "at step 12, gradients become 10 times as large with each step: at this pace they exceed float32"
    )


def test_a_jump_of_one_step_has_no_pace() -> None:
    """One odd batch, or a swing that is over, says nothing of the steps to come."""
    assert forecast(np.array([1.0, 1.2, 0.9, 1.1, 1.0, 0.8, 1.1, 3e6]), 12) == []
    assert forecast(np.array([1.0, 1.0, 20.0, 400.0, 8000.0, 900.0, 100.0, 60.0]), 12) == []
    assert forecast(np.array([1.0, 1.0, 60.0, 60.0, 61.0, 60.0, 4000.0, 4001.0]), 12) == []
    assert forecast(np.array([1.0, 1.0, 1.0, 60.0, 60.0, 61.0, 60.0, 4000.0]), 12) == []
    assert forecast(np.array([1.0, 1.0, 1.0, 1.0, 1.0, 20.0, 400.0, 8000.0]), 12)


def test_one_sentence_is_shown_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Summary, log lines, run log, report, its page and JSON, replay."""
    x, y = data()
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def spoil(step: int) -> None:
        x.mul_(100 if step == 49 else 1)
        x.div_(100 if step == 52 else 1)

    with gradwatch.attach(model, log=tmp_path / "run", report="log", strict=True) as monitor:
        train(model, optimizer, 70, each=spoil, x_y=(x, y))
    lines = capsys.readouterr().err
    (incident,) = monitor.incidents
    sign = incident.signs[0]
    line = f"{sign.words} (GW102)"
    assert line in lines
    assert line in incident.evidence
    assert line in str(monitor.summary())
    assert main(["report", str(tmp_path / "run"), "--html", str(tmp_path / "page.html")]) == 0
    assert sign.words in " ".join(capsys.readouterr().out.split())
    assert line in (tmp_path / "page.html").read_text()
    main(["report", str(tmp_path / "run"), "--json"])
    told = json.loads(capsys.readouterr().out)["incidents"][0]
    assert line in told["evidence"]
    assert told["signs"][0]["numbers"]["loss"] == sign.numbers["loss"]
    assert told["signs"][0]["value"] == sign.value
    with RunLog(tmp_path / "run") as log:
        assert log.alarms[0] == sign
        again = replay(log.history(), log.rows(), log.rules()[0])
    assert again.alarms[0].words == sign.words


def test_alarms_of_an_earlier_version_fall_back_to_what_is_true() -> None:
    """Their records have neither words nor numbers; an infinite value and a limit of zero are left unsaid."""
    now = to_json(Alarm("GW301", "gradient norm surges", "growth", "exploding", "a", 5, 31.0, 10.0))
    record = json.loads(now)
    del record["words"], record["numbers"]
    found = from_json(Alarm, json.dumps(record))
    assert str(found) == "gradient norm surges in a at step 5: measured 31, above its limit of 10 (GW301)"
    stalled = from_json(
        Alarm, json.dumps({**record, "code": "GW101", "name": "no traction", "value": "inf", "layer": None})
    )
    assert str(stalled) == "no traction at step 5 (GW101)"
    nan = from_json(
        Alarm, json.dumps({**record, "code": "GW103", "name": "loss not finite", "value": 1.0, "limit": 0.0})
    )
    assert str(nan) == "loss not finite in a at step 5 (GW103)"


def test_an_alarm_that_ended_says_so() -> None:
    """It is not above its limit any more."""
    ended = next(a for a in one_bad_batch(True).alarms if a.state == "resolved")
    assert str(ended).endswith(f"over at step {ended.step} ({ended.code})")
    assert ended.words == ""


# Rules of the user's own.


class LossAbove(gradwatch.Rule):
    """The loss is above a level that it should never see again."""

    code: ClassVar[str] = "MY001"
    name: ClassVar[str] = "loss above level"
    sign: ClassVar[Any] = "subtle"
    kind: ClassVar[Any] = "diverging"
    per_layer: ClassVar[bool] = False
    limit: float = 0.1

    def measure(self, history: History) -> Floats:
        """Return the loss."""
        return np.array([history.row.loss])


class Speaking(LossAbove):
    """The same with a sentence."""

    def numbers(self, history: History, column: int) -> dict[str, float]:
        """Return the norm, as a scalar of numpy."""
        return {"norm": history.global_norm(last=1)[0]}

    def sentence(self, alarm: Alarm) -> str:
        """Return it."""
        return f"loss {alarm.value:.1f} at norm {alarm.numbers['norm']:.1f}"


class Failing(LossAbove):
    """The same with a sentence that cannot be made."""

    def sentence(self, alarm: Alarm) -> str:
        """Divide by zero."""
        return str(1 / 0)


class Mute(LossAbove):
    """The same with a sentence that is none."""

    def sentence(self, alarm: Alarm) -> Any:
        """Return nothing."""


def signs_of(rule: gradwatch.Rule, **settings: Any) -> tuple[Alarm, gradwatch.Monitor]:
    """Return the alarm of a rule in a short training, and its monitor."""
    model = mlp()
    with gradwatch.attach(model, rules=[rule], report=None, **settings) as monitor:
        train(model, torch.optim.SGD(model.parameters(), lr=0.01), 5)
    return monitor.incidents[0].signs[0], monitor


def test_a_rule_without_a_sentence_says_its_name_value_and_limit() -> None:
    """As it did before there were sentences."""
    sign, monitor = signs_of(LossAbove())
    loss = monitor.history.loss()[0]
    assert str(sign) == f"loss above level at step 0: measured {loss:.3g}, above its limit of 0.1 (MY001)"


def test_a_rule_of_the_users_own_may_speak() -> None:
    """With numbers of its own."""
    sign, monitor = signs_of(Speaking())
    assert sign.words == f"loss {monitor.history.loss()[0]:.1f} at norm {monitor.history.global_norm()[0]:.1f}"


@pytest.mark.parametrize("rule", [Failing(), Mute()])
def test_a_sentence_that_fails_costs_only_the_sentence(rule: gradwatch.Rule) -> None:
    """The rule still fires, by name, value and limit; the failure is noted once."""
    sign, monitor = signs_of(rule)
    assert "measured" in str(sign)
    (note,) = monitor.notes
    assert note.startswith("the sentence of rule MY001 loss above level failed and is switched off")
    with pytest.raises((ZeroDivisionError, TypeError)):
        signs_of(rule, strict=True)


def test_every_sentence_of_a_stormy_run_is_whole() -> None:
    """No name is missing, whatever came together."""
    for incident in rate_too_high(True).incidents:
        for line in incident.evidence:
            assert "None" not in line
            assert not re.search(r"\binf\b|\bnan\b|e\+\d", line)
