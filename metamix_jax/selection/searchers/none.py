"""No bits: full-precision training, for a teacher or for weights to start from."""

from ml_collections import ConfigDict

from metamix_jax.errors import require
from metamix_jax.selection.searcher import Searcher


def check(config: ConfigDict) -> None:
    """Raises UserError unless there is something to train."""
    epochs = config.full_precision.epochs
    require(epochs > 0, "full_precision.epochs", epochs, "more than 0 for searcher none")


SEARCHER = Searcher(
    name="none",
    summary="no bits: full-precision training only",
    phases=(),
    choose=None,
    check=check,
    compared=False,
)
