"""Checks of what a configuration says of the search; they need no data and no devices."""

import functools
from typing import Any

from ml_collections import ConfigDict

from metamix_jax.errors import require
from metamix_jax.selection.cost_models import BUDGET_UNITS
from metamix_jax.selection.searchers import SEARCHERS


def check_budget(config: ConfigDict) -> None:
    """Raises UserError where the budget is in an unknown unit, or one that no choice changes."""
    unit, weight_bits = config.budget.unit, tuple(config.quant.weight_bits)
    require(unit in BUDGET_UNITS, "budget.unit", unit, f"one of {', '.join(BUDGET_UNITS)}")
    require(
        len(weight_bits) > 1 or not BUDGET_UNITS[unit].needs_weight_bits,
        "quant.weight_bits", weight_bits, f"two or more with budget.unit={unit!r}",
    )  # fmt: skip


def check_searcher(config: ConfigDict) -> None:
    """Raises UserError where searcher, budget and the rest of the configuration do not agree."""
    check_budget(config)
    name = config.search.searcher
    require(name in SEARCHERS, "search.searcher", name, f"one of {', '.join(SEARCHERS)}")
    searcher = SEARCHERS[name]
    for other in SEARCHERS.values():
        for path in other.exclusive if other is not searcher else ():
            value = _value(config, path)
            require(not value, path, value, f"nothing with searcher {name}")
    if searcher.choose is not None:
        epochs = config.weight_training.epochs
        require(
            epochs > 0, "weight_training.epochs", epochs,
            "more than 0, or nothing would quantize the weights",
        )  # fmt: skip
    searcher.check(config)


def _value(config: ConfigDict, path: str) -> Any:
    return functools.reduce(lambda section, key: section[key], path.split("."), config)
