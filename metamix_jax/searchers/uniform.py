"""No search: the same bit-width everywhere. The control for every searcher."""

from collections.abc import Mapping

import jax
from ml_collections import ConfigDict

from metamix_jax import cost
from metamix_jax.cost import Budget, LayerCosts

PHASES = ("act_training", "weight_training")


def choose(
    logits: Mapping[str, jax.Array], costs: LayerCosts, budget: Budget, config: ConfigDict
) -> dict[str, int]:
    """Returns layer path -> config.search.uniform_bits, fixed layers at their own bits."""
    del logits, budget
    return cost.uniform_bits(costs, config.search.uniform_bits)
