"""Exceptions that the command line prints as one line; others are bugs, with a traceback."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in the user's input; exit code 2.

    The message names the value, what was expected and how to fix it.
    """


class RunError(RuntimeError):
    """A run that cannot continue although its input was valid; exit code 1.

    The message says what happened, what is kept and what to change.
    """


class LostProcessError(RunError):
    """Another process of the run was lost; the others cannot shut down normally."""


class InterruptedRunError(RuntimeError):
    """A run that was asked to stop and was saved; exit code 75, "try again" (sysexits.h)."""


def require(condition: bool, path: str, value: object, expected: str) -> None:
    """Raises UserError about the configuration field at `path` unless `condition` holds."""
    if not condition:
        raise UserError(f"config.{path}={value!r}: expected {expected}")


def suggestion(name: str, known: Iterable[str]) -> str:
    """Returns `did you mean 'x'? known: ...` for an unknown `name`."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(known)}"
