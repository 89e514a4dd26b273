"""The policy of another run, another resolution or a hand-written one; costs are this network's."""

from pathlib import Path

from metamix_jax.errors import UserError
from metamix_jax.networks.precision import Bits
from metamix_jax.selection.budget import Budget
from metamix_jax.selection.context import SearchContext
from metamix_jax.selection.cost import LayerCosts
from metamix_jax.selection.phases import FINE_TUNING
from metamix_jax.selection.policy import layer_bits, read_policy

PHASES = FINE_TUNING


def choose(context: SearchContext) -> dict[str, Bits]:
    """Returns the bits in config.search.policy; see `read_bits`."""
    return read_bits(context.config.search.policy, context.costs, context.budget)


def read_bits(path: str, costs: LayerCosts, budget: Budget) -> dict[str, Bits]:
    """Reads a policy and checks that it fits the network and its budget.

    Raises:
      UserError: unreadable, of other layers or widths, or above the budget.
    """
    bits = layer_bits(read_policy(Path(path), costs))
    spent = budget.cost(bits, costs)
    if spent > budget.limit * (1 + 1e-9):
        raise UserError(
            f"config.search.policy={path!r} costs {spent:.6g} {budget.unit} in this network, above "
            f"the budget of {budget.limit:.6g}; raise config.budget.value"
        )
    return bits
