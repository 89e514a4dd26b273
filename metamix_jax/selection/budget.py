"""Budgets: limits on a policy's cost, and the differentiable cost for the search."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from metamix_jax.errors import UserError
from metamix_jax.selection.cost import LayerBits, LayerCosts
from metamix_jax.selection.cost_models import BUDGET_UNITS, CostModel, Latencies

TOLERANCE = 1e-9  # relative to the limit, for sums that are equal up to rounding


def within(cost: Any, limit: float) -> Any:
    """Returns whether a cost, or each of an array of costs, is at most `limit`."""
    return cost <= limit * (1 + TOLERANCE)


@dataclasses.dataclass(frozen=True)
class Budget:
    """A limit on the cost of a network.

    further: limits on other costs, which have to be kept as well.
    """

    cost_model: CostModel
    limit: float
    further: tuple["Budget", ...] = ()

    def cost(self, bits: LayerBits) -> float:
        """Returns the cost of the network at `bits`, in the model's unit."""
        return self.cost_model.cost(bits)

    def admits(self, bits: LayerBits) -> bool:
        """Returns whether the network at `bits` is within the budget, and all further ones."""
        return not self.excess(bits)

    def excess(self, bits: LayerBits) -> str:
        """Returns which limit the network at `bits` is above, in words; "" if there is none."""
        for each in (self, *self.further):
            if not within(spent := each.cost(bits), each.limit):
                return f"{spent:.6g} {each.cost_model.unit}, above the budget of {each.limit:.6g}"
        return ""

    @property
    def room(self) -> float:
        """The limit on the total cost of the searched layers."""
        return self.limit - self.cost_model.fixed_cost

    @property
    def further_rooms(self) -> list["Room"]:
        """The same of the further limits, each with its costs."""
        return [(each.cost_model.branch_costs, each.room) for each in self.further]

    def __str__(self) -> str:
        return f"{self.limit:.6g} {self.cost_model.unit}"


# Searched layer -> the cost of each candidate, and the limit on the total.
Room = tuple[Mapping[str, Sequence[float]], float]


def make_budget(
    costs: LayerCosts,
    value: float,
    unit: str,
    latencies: Latencies | None = None,
    source: str = "config.budget.value",
) -> Budget:
    """Returns the budget of `value` in `unit`, one of BUDGET_UNITS.

    A value above the cost of the widest candidates is lowered to it: every policy fits.

    Args:
      costs: the network's layers.
      value: in the unit.
      unit: its name.
      latencies: measured, for units that need them.
      source: the name of the field, for the error.

    Raises:
      UserError: no policy can meet it.
    """
    kind = BUDGET_UNITS[unit]
    model = kind.model(costs, latencies)
    scale = model.reference if kind.of_reference else 1.0
    budget = Budget(model, value * scale)
    slack = TOLERANCE * model.most  # for budgets copied, rounded, from a table
    if budget.limit > model.most + slack:
        return Budget(model, model.most)
    if budget.limit >= model.least - slack:
        return budget
    raise UserError(
        f"{source}={value} ({unit}) is {budget}, but this network reaches "
        f"{model.least:.6g} to {model.most:.6g} {model.unit} with its candidate bit-widths; "
        f"nearest feasible value: {model.least / scale:.12g}"
    )


def chosen_cost(
    model: CostModel, logits: Mapping[str, jax.Array], form: str = "argmax"
) -> jax.Array:
    """Returns the differentiable cost during the search, in the model's unit.

    Args:
      model: the cost model.
      logits: searched layer -> [branches].
      form: "argmax": the most probable branch's cost, with the softmax's Jacobian in the backward
        pass (Eq. 4 and 5); "expected": the softmax-weighted mean cost.
    """
    total = jnp.float32(model.fixed_cost)
    for path, table in model.branch_costs.items():
        share = jax.nn.softmax(logits[path])
        if form == "argmax":
            share = hard_selection(share)
        total += jnp.dot(share, jnp.asarray(table, jnp.float32))
    return total


def hard_selection(share: jax.Array) -> jax.Array:
    """Returns the exact one-hot of the greatest share, with the gradient of `share` (Eq. 5)."""
    one_hot = jax.nn.one_hot(jnp.argmax(share), share.shape[-1], dtype=share.dtype)
    # In this form nothing is rounded: share - share is exactly 0.
    return jax.lax.stop_gradient(one_hot) + (share - jax.lax.stop_gradient(share))
