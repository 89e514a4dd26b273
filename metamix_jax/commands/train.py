"""--mode=train: the whole pipeline."""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from metamix_jax.commands.cost import warn_unless_exportable
from metamix_jax.training.given import Given
from metamix_jax.training.loop import train_and_evaluate


def run(config: ConfigDict, workdir: Path, given: Given | None = None) -> dict[str, Any]:
    """Runs all phases; returns the RESULT line's content."""
    warn_unless_exportable(config, given)
    return train_and_evaluate(config, workdir, given=given)
