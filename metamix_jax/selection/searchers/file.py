"""The policy of another run, another resolution or a hand-written one; costs are this network's."""

from pathlib import Path

from metamix_jax.errors import UserError
from metamix_jax.networks.precision import Bits
from metamix_jax.selection.budget import Budget
from metamix_jax.selection.context import SearchContext
from metamix_jax.selection.cost import LayerCosts
from metamix_jax.selection.policy import read_policy

PHASES = ("act_training", "weight_training")


def choose(context: SearchContext) -> dict[str, Bits]:
    """Returns the bits in config.search.policy; see `read_bits`."""
    return read_bits(context.config.search.policy, context.costs, context.budget)


def read_bits(path: str, costs: LayerCosts, budget: Budget) -> dict[str, Bits]:
    """Reads a policy and checks that it fits the network and its budget.

    Raises:
      UserError: unreadable, of other layers or widths, or above the budget.
    """
    bits = read_policy(Path(path), costs).bits
    if not budget.admits(bits):
        raise UserError(
            f"config.search.policy={path!r} costs {budget.cost(bits):.6g} {budget.cost_model.unit} "
            f"in this network, above the budget of {budget.limit:.6g}; raise config.budget.value"
        )
    return bits
