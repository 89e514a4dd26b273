"""The one exception that means "the user can fix this"."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in what the user gave us; `main.py` prints it as one line and exits with 2.

    The message names the value, what was expected and how to fix it.
    """


def suggestion(name: str, known: Iterable[str]) -> str:
    """Returns `did you mean 'x'? known: ...` for an unknown `name`."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(known)}"
