"""Budgets: what a policy may cost, and the differentiable cost that the search is held to."""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from metamix_jax.errors import UserError
from metamix_jax.networks.precision import LayerCost
from metamix_jax.selection.cost import GIGA, LayerCosts, Policy, branch_gbops, uniform_4_4


@dataclasses.dataclass(frozen=True)
class Budget:
    """A limit on a cost that is a sum over the searched layers.

    The unit is GBOPs, or bits for budgets in average activation bits, or MiB of weights.
    """

    branch_costs: Mapping[str, tuple[float, ...]]  # searched layer -> cost of each branch
    fixed_cost: float  # of the layers that are not searched
    limit: float
    reference: float  # cost of the uniform 4/4 network
    unit: str  # "GBOPs", "average bits" or "MiB"

    def cost(self, bits: Policy, costs: LayerCosts) -> float:
        """Returns the cost of a policy in this budget's unit."""
        chosen = (
            table[costs[path].candidates.index(bits[path])]
            for path, table in self.branch_costs.items()
        )
        return self.fixed_cost + sum(chosen)


def make_budget(costs: LayerCosts, config_budget: ConfigDict) -> Budget:
    """Returns the budget that `config_budget` (value, unit) asks for.

    Raises:
      UserError: no policy can meet it, or every policy does by far (above the reachable maximum).
    """
    value, unit = config_budget.value, config_budget.unit
    searched = {path: cost for path, cost in costs.items() if cost.searched}
    reference = uniform_4_4(costs) / GIGA
    if unit == "average_act_bits":
        total = sum(cost.act_elements for cost in searched.values())
        branch_costs = {
            path: tuple(cost.act_elements * bits.act / total for bits in cost.candidates)
            for path, cost in searched.items()
        }
        budget = Budget(branch_costs, 0.0, value, reference=4.0, unit="average bits")
    elif unit == "mebibytes":
        branch_costs = {
            path: tuple(_mebibytes(cost, bits.weight) for bits in cost.candidates)
            for path, cost in searched.items()
        }
        ends = [cost for cost in costs.values() if not cost.searched]
        fixed = sum(_mebibytes(cost, cost.weight_bits[0]) for cost in ends)
        reference = fixed + sum(_mebibytes(cost, 4) for cost in searched.values())
        budget = Budget(branch_costs, fixed, value, reference, unit="MiB")
    else:
        branch_costs = {path: branch_gbops(cost) for path, cost in searched.items()}
        ends = [cost for cost in costs.values() if not cost.searched]
        fixed = sum(cost.macs * math.prod(cost.candidates[0]) for cost in ends) / GIGA
        limit = value * reference if unit == "fraction" else value
        budget = Budget(branch_costs, fixed, limit, reference, unit="GBOPs")
    _require_feasible(budget, config_budget)
    return budget


def _mebibytes(cost: LayerCost, weight_bits: int) -> float:
    return cost.weight_elements * weight_bits / 8 / 2**20


def _require_feasible(budget: Budget, config_budget: ConfigDict) -> None:
    least, most = (
        budget.fixed_cost + sum(pick(table) for table in budget.branch_costs.values())
        for pick in (min, max)
    )
    slack = 1e-9 * most  # a budget given as the rounded figure of a table is meant
    if least - slack <= budget.limit <= most + slack:
        return
    nearest = least if budget.limit < least else most
    in_config_unit = nearest / budget.reference if config_budget.unit == "fraction" else nearest
    raise UserError(
        f"config.budget.value={config_budget.value} ({config_budget.unit}) is "
        f"{budget.limit:.6g} {budget.unit}, but this network reaches {least:.6g} to {most:.6g} "
        f"{budget.unit} with its candidate bit-widths; nearest feasible value: "
        f"{in_config_unit:.12g}"
    )


def chosen_cost(budget: Budget, logits: Mapping[str, jax.Array], form: str = "argmax") -> jax.Array:
    """Returns the differentiable cost of a search state, in the budget's unit.

    Args:
      budget: what is counted.
      logits: searched layer -> [branches].
      form: "argmax": the most likely branch's cost with the softmax's Jacobian backward (Eq. 4 and
        5); "expected": the softmax-weighted mean cost.
    """
    total = jnp.float32(budget.fixed_cost)
    for path, table in budget.branch_costs.items():
        share = jax.nn.softmax(logits[path])
        if form == "argmax":
            share = hard_selection(share)
        total += jnp.dot(share, jnp.asarray(table, jnp.float32))
    return total


def hard_selection(share: jax.Array) -> jax.Array:
    """Returns the one-hot of the greatest share, exactly; the gradient is `share`'s (Eq. 5)."""
    one_hot = jax.nn.one_hot(jnp.argmax(share), share.shape[-1], dtype=share.dtype)
    # Written so that nothing is rounded: share - share is exactly 0.
    return jax.lax.stop_gradient(one_hot) + (share - jax.lax.stop_gradient(share))
