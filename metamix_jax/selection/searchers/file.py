"""A policy from a file: of another run, of another resolution, or written by hand."""

from ml_collections import ConfigDict

from metamix_jax.errors import UserError, require
from metamix_jax.fields import Field
from metamix_jax.networks.precision import Bits
from metamix_jax.selection.budget import Budget
from metamix_jax.selection.context import SearchContext
from metamix_jax.selection.cost import LayerCosts
from metamix_jax.selection.phases import FINE_TUNING
from metamix_jax.selection.policy import read_policy
from metamix_jax.selection.searcher import Searcher
from metamix_jax.workdir import bucket


def choose(context: SearchContext) -> dict[str, Bits]:
    """Returns the bits from config.search.policy; see `read_bits`."""
    return read_bits(context.config.search.policy, context.costs, context.budget)


def check(config: ConfigDict) -> None:
    """Raises UserError unless config.search.policy is set."""
    path = config.search.policy
    require(bool(path), "search.policy", path, "a policy.json with searcher file")


def check_network(config: ConfigDict, costs: LayerCosts, budget: Budget) -> None:
    """Raises UserError if the policy cannot be used; see `read_bits`."""
    read_bits(config.search.policy, costs, budget)


def read_bits(path: str, costs: LayerCosts, budget: Budget) -> dict[str, Bits]:
    """Reads a policy and checks it against the network and the budget.

    Raises:
      UserError: unreadable, for other layers or widths, or above the budget.
    """
    bits = read_policy(bucket.path_of(path), costs).bits
    if excess := budget.excess(bits):
        raise UserError(
            f"config.search.policy={path!r} costs {excess}, in this network; raise that budget"
        )
    return bits


SEARCHER = Searcher(
    name="file",
    summary="reads `config.search.policy`, a policy.json for the same architecture: of another "
    "budget, another resolution, or your own",
    phases=FINE_TUNING,
    choose=choose,
    fields=(
        Field(
            "search.policy",
            "",
            "Searcher `file`: a `policy.json` of the same network, at any resolution.",
        ),
    ),
    exclusive=("search.policy",),
    check=check,
    check_network=check_network,
    compared=False,
)
