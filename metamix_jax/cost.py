"""MACs, BOPs and budgets.

Convention, the one that reproduces the figures of MetaMix and of the methods it compares with:
BOPs of a layer = MACs * activation bits * weight bits, over convolutions and dense layers; biases,
batch norm, additions, pooling and activation functions are free; the first and last layer count at
their own fixed widths.
"""

import csv
import dataclasses
import io
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from metamix_jax.errors import UserError
from metamix_jax.layers import FULL_BITS, LayerCost, Precision

LayerCosts = Mapping[str, LayerCost]  # layer path -> facts, in network order
GIGA = 1e9


def layer_costs(model: nn.Module, image_shape: tuple[int, int, int]) -> dict[str, LayerCost]:
    """Returns the facts that every quantized layer of `model` records, without computing anything.

    Args:
      model: a network of `metamix_jax.models`.
      image_shape: (height, width, channels).
    """
    recorded = []

    def init() -> None:
        keys = {"params": jax.random.key(0), "quant": jax.random.key(0)}
        # Taken here and not from eval_shape's result, which would come back in sorted order.
        recorded.append(model.init(keys, jnp.zeros((1, *image_shape)))["costs"])

    jax.eval_shape(init)
    return {path.removesuffix("/cost"): cost for path, cost in _flat(recorded[0]).items()}


def bops(costs: LayerCosts, act_bits: Mapping[str, int]) -> int:
    """Returns the bit operations of one image, Eq. 6, with `act_bits` per layer path."""
    return sum(cost.macs * act_bits[path] * cost.weight_bits for path, cost in costs.items())


def gbops_at(costs: LayerCosts, act_bits: Mapping[str, int], precision: Precision) -> float:
    """Returns the GBOPs of a forward pass; what it does not quantize counts as 32 bits."""
    acts_full, weights_full = precision.activations == "full", precision.weights == "full"
    return (
        sum(
            cost.macs
            * (FULL_BITS if acts_full else act_bits[path])
            * (FULL_BITS if weights_full else cost.weight_bits)
            for path, cost in costs.items()
        )
        / GIGA
    )


def uniform_bits(costs: LayerCosts, bits: int) -> dict[str, int]:
    """Returns the policy with `bits` in every searched layer, fixed layers at their own."""
    return {path: bits if cost.searched else cost.act_bits[0] for path, cost in costs.items()}


def uniform_4_4(costs: LayerCosts) -> int:
    """Returns the BOPs with 4-bit activations and weights in all searched layers."""
    return sum(
        cost.macs * (16 if cost.searched else cost.act_bits[0] * cost.weight_bits)
        for cost in costs.values()
    )


def average_act_bits(costs: LayerCosts, act_bits: Mapping[str, int]) -> float:
    """Returns the mean bits of the searched layers, weighted by their input activations."""
    weights = {path: cost.act_elements for path, cost in costs.items() if cost.searched}
    return sum(act_bits[path] * weights[path] for path in weights) / sum(weights.values())


def totals(costs: LayerCosts) -> dict[str, Any]:
    """Returns MACs, GBOPs of the uniform networks and the reachable range of GBOPs."""
    candidates = sorted({8, 4}.union(*(cost.act_bits for cost in costs.values())), reverse=True)
    extreme = {
        pick: bops(costs, {path: pick(cost.act_bits) for path, cost in costs.items()}) / GIGA
        for pick in (min, max)
    }
    return {
        "macs": sum(cost.macs for cost in costs.values()),
        "gbops_uniform": {str(b): bops(costs, uniform_bits(costs, b)) / GIGA for b in candidates},
        "gbops_min": extreme[min],
        "gbops_max": extreme[max],
    }


def rows(costs: LayerCosts, reference_bits: int = 4) -> list[dict[str, Any]]:
    """Returns one table row a layer; MBOPs are those of the uniform `reference_bits` network."""
    bits = uniform_bits(costs, reference_bits)
    return [
        {
            "layer": path,
            "macs": cost.macs,
            "act_bits": bits[path],
            "weight_bits": cost.weight_bits,
            "candidates": cost.act_bits,
            "mbops": cost.macs * bits[path] * cost.weight_bits / 1e6,
        }
        for path, cost in costs.items()
    ]


def to_csv(table: list[dict[str, Any]]) -> str:
    """Returns `rows` as CSV; candidates are separated by spaces."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=table[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "candidates": " ".join(map(str, row["candidates"]))} for row in table)
    return text.getvalue()


@dataclasses.dataclass(frozen=True)
class Budget:
    """A limit on a cost that is linear in the bits of the searched layers.

    The unit is GBOPs or, for budgets in average activation bits, bits.
    """

    branch_costs: Mapping[str, tuple[float, ...]]  # searched layer -> cost of each candidate
    fixed_cost: float  # of the layers that are not searched
    limit: float
    reference: float  # cost of the uniform 4/4 network
    unit: str  # "GBOPs" or "average bits"

    def cost(self, act_bits: Mapping[str, int], costs: LayerCosts) -> float:
        """Returns the cost of a policy in this budget's unit."""
        chosen = (
            table[costs[path].act_bits.index(act_bits[path])]
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
            path: tuple(cost.act_elements * bits / total for bits in cost.act_bits)
            for path, cost in searched.items()
        }
        budget = Budget(branch_costs, 0.0, value, reference=4.0, unit="average bits")
    else:
        branch_costs = {
            path: tuple(cost.macs * bits * cost.weight_bits / GIGA for bits in cost.act_bits)
            for path, cost in searched.items()
        }
        ends = [cost for cost in costs.values() if not cost.searched]
        fixed = sum(cost.macs * cost.act_bits[0] * cost.weight_bits for cost in ends) / GIGA
        limit = value * reference if unit == "fraction" else value
        budget = Budget(branch_costs, fixed, limit, reference, unit="GBOPs")
    _require_feasible(budget, config_budget)
    return budget


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
      logits: searched layer -> [candidates].
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


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    return flatten_dict(tree, sep="/", is_leaf=lambda _, x: isinstance(x, LayerCost))
