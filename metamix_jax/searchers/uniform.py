"""No search: the same bit-width everywhere. The control for every searcher."""

from collections.abc import Mapping

import jax
from ml_collections import ConfigDict

from metamix_jax import cost
from metamix_jax.budget import Budget
from metamix_jax.cost import LayerCosts
from metamix_jax.precision import Bits

PHASES = ("act_training", "weight_training")


def choose(
    logits: Mapping[str, jax.Array], costs: LayerCosts, budget: Budget, config: ConfigDict
) -> dict[str, Bits]:
    """Returns config.search.uniform_bits wherever bits are searched, fixed ones as they are."""
    del logits, budget
    return cost.uniform_bits(costs, config.search.uniform_bits)
