"""Configuration fields: one row each, with the checks of their values."""

import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple


class Check(NamedTuple):
    """Valid values of a field: in words that follow "expected", and as a predicate."""

    expected: str
    holds: Callable[[Any], bool]


class Field(NamedTuple):
    """A field of the configuration.

    path: sections and name, such as "data.image_size".
    default: also determines the type.
    meaning: for docs/CONFIG.md.
    check: valid values; None: any value of the type.
    may_change: whether a resumed run may change it, because it does not affect the results.
    """

    path: str
    default: Any
    meaning: str
    check: Check | None = None
    may_change: bool = False


def more_than(low: float, *, at_most: float = math.inf) -> Check:
    """Returns the check that a number is above `low`, finite and at most `at_most`."""
    limit = f", at most {at_most}" if at_most < math.inf else ""
    return Check(
        f"more than {low}{limit}", lambda value: is_finite(value) and low < value <= at_most
    )


def at_least(low: float, *, at_most: float = math.inf) -> Check:
    """Returns the check that a number is at least `low`, finite and at most `at_most`."""
    limit = f", at most {at_most}" if at_most < math.inf else ""
    return Check(
        f"{low} or more{limit}", lambda value: is_finite(value) and low <= value <= at_most
    )


def between(low: float, high: float) -> Check:
    """Returns the check that a number is from `low` to `high`, both included."""
    return Check(f"{low} to {high}", lambda value: is_finite(value) and low <= value <= high)


def below(low: float, high: float) -> Check:
    """Returns the check that a number is from `low`, included, to `high`, excluded."""
    return Check(
        f"{low} or more and less than {high}",
        lambda value: is_finite(value) and low <= value < high,
    )


def one_of(*choices: str) -> Check:
    """Returns the check that a text is one of `choices`."""
    return Check(f"one of {', '.join(choices)}", lambda value: value in choices)


def bit_widths(low: int, high: int) -> Check:
    """Returns the check for one or more different bit-widths from `low` to `high`."""

    def holds(widths: Sequence[int]) -> bool:
        each = all(isinstance(width, int) and low <= width <= high for width in widths)
        return each and 0 < len(widths) == len(set(widths))

    return Check(f"one or more different bit-widths from {low} to {high}, such as (8, 4, 2)", holds)


def whole_numbers(low: int, high: int) -> Check:
    """Returns the check for any number of whole numbers from `low` to `high`."""
    return Check(
        f"whole numbers from {low} to {high}",
        lambda values: all(isinstance(value, int) and low <= value <= high for value in values),
    )


def _is_rule(text: Any) -> bool:
    if not isinstance(text, str) or "=" not in text:
        return False
    pattern, _, replacement = text.partition("=")
    try:
        re.sub(pattern, replacement, "")
    except (re.error, IndexError):
        return False
    return True


def rules() -> Check:
    """Returns the check for any number of rules PATTERN=REPLACEMENT."""
    return Check(
        "rules PATTERN=REPLACEMENT, the pattern a regular expression",
        lambda values: all(map(_is_rule, values)),
    )


def is_finite(value: Any) -> bool:
    """Returns whether a value is a finite number as a float."""
    # An integer of 400 digits would be infinite as a float.
    return isinstance(value, float | int) and abs(value) <= sys.float_info.max


def document(fields: Sequence[Field], sections: Mapping[str, str]) -> str:
    """Returns Markdown with one table of fields per section.

    Args:
      fields: rows; those of a section need not be adjacent.
      sections: section -> the text above its table; "" is the section without a name.
    """
    tables: dict[str, list[Field]] = {}
    for field in fields:
        tables.setdefault(field.path.rpartition(".")[0], []).append(field)
    return "\n\n".join(_section(name, sections.get(name, ""), tables[name]) for name in tables)


def _section(name: str, meaning: str, fields: Sequence[Field]) -> str:
    head = [f"## {name or 'The run'}", "", *([meaning, ""] if meaning else [])]
    columns = ["field", "default", "meaning", "allowed", "may change"]
    rows = [columns, ["---"] * len(columns), *map(_row, fields)]
    return "\n".join([*head, *("| " + " | ".join(row) + " |" for row in rows)])


def _row(field: Field) -> list[str]:
    return [
        f"`{field.path}`",
        f"`{field.default!r}`",
        field.meaning,
        field.check.expected if field.check else _any_value(field.default),
        "yes" if field.may_change else "",
    ]


def _any_value(default: Any) -> str:
    """Returns in words the valid values of a field without a check."""
    words = {bool: "True or False", int: "a whole number", str: "text", tuple: "a tuple"}
    return words[type(default)]
