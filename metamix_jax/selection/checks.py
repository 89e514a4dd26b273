"""Checks that a configuration suits its searcher; needs no data and no devices."""

import functools
from typing import Any

from ml_collections import ConfigDict

from metamix_jax.errors import require
from metamix_jax.selection.searchers import SEARCHERS


def check_searcher(config: ConfigDict) -> None:
    """Raises UserError if a valid configuration does not suit its searcher."""
    name = config.search.searcher
    searcher = SEARCHERS[name]
    for other in SEARCHERS.values():
        for path in other.exclusive if other is not searcher else ():
            value = _value(config, path)
            require(not value, path, value, f"none with searcher {name}")
    if searcher.choose is not None:
        epochs = config.weight_training.epochs
        require(
            epochs > 0, "weight_training.epochs", epochs,
            "more than 0, because only this phase quantizes the weights",
        )  # fmt: skip
    searcher.check(config)


def _value(config: ConfigDict, path: str) -> Any:
    return functools.reduce(lambda section, key: section[key], path.split("."), config)
