"""--mode=search: the pipeline up to the policy."""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from metamix_jax.commands.cost import warn_unless_exportable
from metamix_jax.errors import UserError
from metamix_jax.selection.searchers import SEARCHERS
from metamix_jax.training.given import Given
from metamix_jax.training.loop import train_and_evaluate


def run(config: ConfigDict, workdir: Path, given: Given | None = None) -> dict[str, Any]:
    """Runs all phases before the policy and writes it; returns the RESULT line's content."""
    name = config.search.searcher
    if name in SEARCHERS and SEARCHERS[name].choose is None:
        raise UserError(f"config.search.searcher={name!r}: expected a searcher with --mode=search")
    warn_unless_exportable(config, given)
    return train_and_evaluate(config, workdir, stop_after_search=True, given=given)
