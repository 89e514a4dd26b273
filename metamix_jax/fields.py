"""Fields of the configuration: a row each."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Check(NamedTuple):
    """What a field may hold: in words that follow "expected", and as a test."""

    expected: str
    holds: Callable[[Any], bool]


class Field(NamedTuple):
    """A field by its dotted path; `may_change`: in a run that is resumed."""

    path: str
    default: Any
    meaning: str
    check: Check | None = None
    may_change: bool = False
