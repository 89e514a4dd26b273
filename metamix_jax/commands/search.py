"""--mode=search: the pipeline until the policy is written."""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from metamix_jax.errors import UserError
from metamix_jax.training.loop import train_and_evaluate


def run(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Runs the phases before the policy; returns the RESULT line's content."""
    if config.search.searcher == "none":
        raise UserError("config.search.searcher='none': expected a searcher with --mode=search")
    return train_and_evaluate(config, workdir, stop_after_search=True)
