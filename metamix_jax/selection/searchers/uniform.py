"""No search: the same bit-width everywhere, the control for every searcher."""

from typing import Any

from ml_collections import ConfigDict

from metamix_jax.errors import UserError, require
from metamix_jax.fields import Field
from metamix_jax.networks.precision import Bits
from metamix_jax.selection.budget import Budget
from metamix_jax.selection.context import SearchContext
from metamix_jax.selection.cost import LayerCosts, uniform_bits
from metamix_jax.selection.phases import FINE_TUNING
from metamix_jax.selection.searcher import Searcher


def choose(context: SearchContext) -> dict[str, Bits]:
    """Returns config.search.uniform_bits wherever bits are searched; fixed bits stay."""
    return uniform_bits(context.costs, context.config.search.uniform_bits)


def check(config: ConfigDict) -> None:
    """Raises UserError unless the width is among the candidates, if there are several."""
    width = config.search.uniform_bits
    for name in ("act_bits", "weight_bits"):
        bits = tuple(config.quant[name])
        require(
            len(bits) == 1 or width in bits,
            "search.uniform_bits", width, f"one of quant.{name} {bits}",
        )  # fmt: skip


def check_network(config: ConfigDict, costs: LayerCosts, budget: Budget) -> None:
    """Raises UserError if the network at that width is above the budget."""
    width = config.search.uniform_bits
    bits = uniform_bits(costs, width)
    if excess := budget.excess(bits):
        raise UserError(
            f"config.search.uniform_bits={width}: {excess}; raise that budget or use fewer bits"
        )


def fit(config: ConfigDict, costs: LayerCosts, budget: Budget) -> dict[str, Any]:
    """Returns the widest activation candidate whose uniform network is within the budget."""
    for width in sorted(config.quant.act_bits, reverse=True):
        if budget.admits(uniform_bits(costs, width)):
            return {"search.uniform_bits": width}
    raise UserError(
        f"config.compare.budgets: no uniform network is within {budget}; raise the budget or add "
        "narrower bit-widths to config.quant.act_bits"
    )


SEARCHER = Searcher(
    name="uniform",
    summary="the same width everywhere, `config.search.uniform_bits`",
    phases=FINE_TUNING,
    choose=choose,
    fields=(Field("search.uniform_bits", 4, "The width of searcher `uniform`."),),
    check=check,
    check_network=check_network,
    fit=fit,
)
