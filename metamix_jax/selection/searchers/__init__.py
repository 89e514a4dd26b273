"""Searchers by name; every file of this folder defines one, as `SEARCHER`."""

import importlib
import pkgutil

from metamix_jax.selection.searcher import Searcher


def _find() -> dict[str, Searcher]:
    modules = [
        importlib.import_module(f"{__name__}.{module.name}")
        for module in pkgutil.iter_modules(__path__)
    ]
    return {module.SEARCHER.name: module.SEARCHER for module in modules}


SEARCHERS = _find()


def table() -> str:
    """Returns the Markdown table of all searchers, as in docs/USAGE.md."""
    rows = [
        f"| `{searcher.name}` | {searcher.summary} | {'yes' if searcher.trains else 'no'} |"
        for searcher in SEARCHERS.values()
    ]
    head = ["| name | how it chooses | trains while searching |", "|---|---|---|"]
    return "\n".join([*head, *rows])
