"""Searchers by name; a file of this folder that defines `SEARCHER` is one."""

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
    """Returns the table of all searchers as the documentation has it, in Markdown."""
    rows = [
        f"| `{searcher.name}` | {searcher.summary} | {'yes' if searcher.trains else 'no'} |"
        for searcher in SEARCHERS.values()
    ]
    head = ["| name | how it chooses | trains while it searches |", "|---|---|---|"]
    return "\n".join([*head, *rows])
