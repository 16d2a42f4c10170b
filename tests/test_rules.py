"""Every rule's form and its own cases; adding a rule adds these tests."""

from __future__ import annotations

import importlib
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from pydantic import ValidationError

import gradwatch
from gradwatch import rules
from gradwatch.history.statistics import ignore_fp_warnings
from gradwatch.rules import RULES, Rule, rule_by_code
from gradwatch.rules.opponent_won import OpponentWon
from gradwatch.verdict.alarms import Alarms

if TYPE_CHECKING:
    from gradwatch.rules.notation import Case

HEADINGS = ["What it means", "Formula", "Why it is bad", "What to do", "When it is harmless", "Source"]
CASES = [pytest.param(rule, case, id=f"{rule.code} {case.name}") for rule in RULES for case in rule.cases]


def played(rule: type[Rule], case: Case) -> tuple[Alarms, int | None]:
    """Play a case through the real history and state machine; return the state, and the step at which the rule fired first."""
    history, rows = case.rows()
    alarms, fired = Alarms((rule(),), history.layers), None
    for row in rows:
        with ignore_fp_warnings():
            history.push(row)
            changes = alarms.update(history, row.step)
            history.learn()
        if fired is None and any(change.state == "firing" for change in changes):
            fired = row.step
    return alarms, fired


@pytest.mark.parametrize(("rule", "case"), CASES)
def test_a_case_fires_at_its_step_or_not_at_all(rule: type[Rule], case: Case) -> None:
    """Through the real history and state machine."""
    _, fired = played(rule, case)
    assert fired == case.fires


def test_a_gradient_of_exactly_zero_does_not_resolve_that_an_opponent_has_won() -> None:
    """It is another rule's, which takes longer to see it: "vanishing resolved" was said while every gradient was zero."""
    (case,) = (one for one in OpponentWon.cases if one.name == "then exactly zero")
    alarms, _ = played(OpponentWon, case)
    assert alarms.firing.all()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.code)
class TestForm:
    """What every rule must have."""

    def test_it_has_a_case_that_fires_and_one_that_stays_quiet(self, rule: type[Rule]) -> None:
        """A rule without both could be anything."""
        fires = [case.fires is not None for case in rule.cases]
        assert any(fires)
        assert not all(fires)

    def test_its_page_stands_under_the_fixed_headings(self, rule: type[Rule]) -> None:
        """All of them, in this order, each with text."""
        page = rule.documentation()
        assert re.findall(r"^## (.+)$", page, re.MULTILINE) == HEADINGS
        assert all(part.strip() for part in re.split(r"^## .+$", page, flags=re.MULTILINE))
        assert page.startswith(f"# {rule.code} {rule.name}")

    def test_its_page_names_the_default_limit(self, rule: type[Rule]) -> None:
        """The figure in the text is the figure in the code."""
        limit = rule().limit
        assert (
            f"({limit:g})" in rule.documentation()
            or f"({limit:.1f})" in rule.documentation()
            or (f"({limit:.0e})".replace("e+0", "e") in rule.documentation())
        )

    def test_its_code_says_its_family(self, rule: type[Rule]) -> None:
        """GW1 subtle, GW2 confirming, GW3 growth and numeric, GW4 silent, GW5 clip."""
        family = {"1": {"subtle"}, "2": {"confirming"}, "3": {"growth", "numeric"}, "4": {"silent"}, "5": {"clip"}}
        assert re.fullmatch(r"GW\d{3}", rule.code)
        assert rule.sign in family[rule.code[2]]

    def test_thresholds_are_frozen_and_validated(self, rule: type[Rule]) -> None:
        """NaN and unknown names are refused, with the value and what is known."""
        with pytest.raises(gradwatch.UsageError, match="limit=nan"):
            rule(limit=math.nan)
        with pytest.raises(gradwatch.UsageError, match=r"has no setting 'limt'\. Did you mean 'limit'"):
            rule(limt=1.0)  # type: ignore[call-arg]
        with pytest.raises(ValidationError):
            rule().limit = 3.0  # type: ignore[misc]


def test_every_file_of_the_folder_is_exported() -> None:
    """A new rule is one file and one line; the line cannot be forgotten."""
    files = {path.stem for path in Path(rules.__file__).parent.glob("*.py")} - {"__init__", "base", "notation"}
    defined = {rule.__module__.rpartition(".")[2] for rule in RULES}
    assert files == defined
    for name in files:
        module = importlib.import_module(f"gradwatch.rules.{name}")
        assert all(value.__name__ in rules.__all__ for value in vars(module).values() if value in RULES)


def test_codes_and_names_are_unique() -> None:
    """No two rules share either."""
    assert len({rule.code for rule in RULES}) == len({rule.name for rule in RULES}) == len(RULES)


def test_a_rule_is_found_by_its_code_in_any_case() -> None:
    """And by the name of its class."""
    assert rule_by_code("gw203") is rule_by_code("GradientsAboveOne") is rules.GradientsAboveOne


@pytest.mark.parametrize(
    ("code", "hint"),
    [
        ("GW2O3", "Did you mean 'GW203' (gradients above 1.0 in each layer)?"),
        ("GW5", "Did you mean 'GW501' (clip bites on most steps) or 'GW502' (clip never bites)?"),
        ("gw107", "Did you mean " + ", ".join(f"'{rule.code}' ({rule.name})" for rule in RULES[:5]) + " or 'GW106' ("),
        ("GW9", f"`gradwatch rules` lists the {len(RULES)} there are."),
        ("GW", f"`gradwatch rules` lists the {len(RULES)} there are."),
        ("301", "Did you mean 'GW301' (gradient norm surges)?"),
        ("surge", "Did you mean 'GW301' (gradient norm surges)?"),
        ("verdikt", "Did you mean 'verdict'?"),
        ("nothing like it", f"`gradwatch rules` lists the {len(RULES)} there are."),
    ],
)
def test_an_unknown_code_gets_those_that_may_be_meant_or_how_to_list_all(code: str, hint: str) -> None:
    """No code of another group: GW9 is none of GW502's."""
    with pytest.raises(gradwatch.UsageError) as caught:
        rule_by_code(code)
    assert str(caught.value).startswith(f"There is no rule {code!r}. {hint}")
