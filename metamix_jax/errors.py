"""The exceptions that `main.py` prints as one line; any other one is a bug and shows its trace."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in what the user gave us; exit code 2.

    The message names the value, what was expected and how to fix it.
    """


class RunError(RuntimeError):
    """A run that cannot go on, though nothing was wrong when it started; exit code 1.

    The message says what happened, what is kept and what to change.
    """


class LostProcessError(RunError):
    """Another process of the run is gone; what is left cannot even end together."""


class InterruptedRunError(RuntimeError):
    """A run that was asked to stop and has saved; exit code 75, "try again" (sysexits.h)."""


def require(condition: bool, path: str, value: object, expected: str) -> None:
    """Raises UserError for the configuration's field at `path` unless `condition` holds."""
    if not condition:
        raise UserError(f"config.{path}={value!r}: expected {expected}")


def suggestion(name: str, known: Iterable[str]) -> str:
    """Returns `did you mean 'x'? known: ...` for an unknown `name`."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(known)}"
