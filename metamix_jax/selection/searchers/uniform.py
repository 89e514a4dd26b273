"""No search: the same bit-width everywhere. The control for every searcher."""

from metamix_jax.networks.precision import Bits
from metamix_jax.selection import cost
from metamix_jax.selection.context import SearchContext
from metamix_jax.selection.phases import FINE_TUNING

PHASES = FINE_TUNING


def choose(context: SearchContext) -> dict[str, Bits]:
    """Returns config.search.uniform_bits wherever bits are searched, fixed ones as they are."""
    return cost.uniform_bits(context.costs, context.config.search.uniform_bits)
