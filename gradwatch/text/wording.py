"""Numbers and counts as they stand in sentences."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def number(value: float, digits: int = 3) -> str:
    """Return a number with ``digits`` significant digits, and without an exponent between 0.001 and a million.

    >>> number(0.25), number(12345.6), number(3e-7), number(1.5e9), number(float("nan")), number(26.4, 1), number(99.7, 2)
    ('0.25', '12,346', '3e-7', '1.5e9', 'NaN', '30', '100')
    """
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "infinity" if value > 0 else "minus infinity"
    if 100 <= abs(value) < 1e6:
        whole = len(str(int(abs(value))))
        return f"{value:,.{max(0, digits - whole)}f}"
    if value == 0 or 9.9995e-4 <= abs(value) < 100:
        text = f"{value:.{digits}g}"
        return text if "e" not in text else f"{float(text):.0f}"  # such as 3e+01
    mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(exponent)}"


def apart(value: float, limit: float) -> tuple[str, str]:
    """Return two different numbers with as many digits as it takes to see which is larger.

    >>> apart(20.04, 10), apart(1.0004, 1)
    (('20', '10'), ('1.0004', '1'))
    """
    for digits in range(3, 18):
        if number(value, digits) != number(limit, digits):
            return number(value, digits), number(limit, digits)
    return number(value), number(limit)


def counted(count: float, noun: str) -> str:
    """Return a count with its noun, in the plural unless the count is one.

    >>> counted(1, "more layer"), counted(1200, "step"), counted(2, "infinity"), counted(3, "NaN")
    ('1 more layer', '1,200 steps', '2 infinities', '3 NaN')
    """
    if count != 1 and noun != "NaN":
        noun = noun[:-1] + "ies" if noun.endswith("ity") else f"{noun}s"
    return f"{count:,.0f} {noun}"


def median_in_words(value: float, of: int) -> str:
    """Return the median of so many losses, which may stand beside another number that is also called the loss.

    >>> median_in_words(2.094, 16), median_in_words(math.inf, 16), median_in_words(2.094, 1)
    ('2.09 (median of 16 losses)', 'not finite (median of 16 losses)', '2.09')
    """
    now = number(value) if math.isfinite(value) else "not finite"
    return f"{now} (median of {of} losses)" if of > 1 else now


def in_a_row(words: Sequence[str]) -> str:
    """Return alternatives as they stand in a sentence.

    >>> in_a_row(["a"]), in_a_row(["a", "b"]), in_a_row(["a", "b", "c"])
    ('a', 'a or b', 'a, b or c')
    """
    return " or ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def ordinal(count: int) -> str:
    """Return the ordinal of a count.

    >>> ordinal(1), ordinal(2), ordinal(9), ordinal(12), ordinal(23)
    ('1st', '2nd', '9th', '12th', '23rd')
    """
    last = count % 100
    return f"{count:,}" + ("th" if 10 < last < 20 else {1: "st", 2: "nd", 3: "rd"}.get(last % 10, "th"))


def about_every(period: int | None, steps: int, times: int) -> str:
    """Return the period of something that came ``times`` times in so many steps; "lately" unless it is that of all of them.

    >>> about_every(50, 400, 8), about_every(50, 400, 5), about_every(None, 400, 5)
    (', about every 50 steps', ', lately about every 50 steps', '')
    """
    if period is None:
        return ""
    lately = "lately " if abs(steps - times * period) > max(times, steps / 100) else ""
    return f", {lately}about every {period} steps"


def last_steps(count: float, first: float, last: float) -> str:
    """Return the last ``count`` measured steps as a phrase, which says so if others from ``first`` to ``last`` were not measured.

    >>> last_steps(100, 0, 99), last_steps(100, 0, 990)
    ('last 100 steps', 'last 100 measured steps')
    """
    return f"last {counted(count, 'step' if last - first == count - 1 else 'measured step')}"


def percent(share: float) -> str:
    """Return a share in per cent, with a digit after the point below ten; 100 only for a whole.

    >>> percent(0.85), percent(0.042), percent(0.999)
    ('85 %', '4.2 %', '99 %')
    """
    if 0 < share < 0.1:
        return f"{100 * share:.2g} %"
    return f"{100 if share >= 1 else min(round(100 * share), 99)} %"
