"""Cost models: the cost of each candidate width of each layer, in the model's own unit.

To add one, write a function from a network's layers to a `CostModel` and add a row to BUDGET_UNITS.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from metamix_jax.networks.lifetimes import Moment
from metamix_jax.networks.precision import Bits, LayerCost
from metamix_jax.selection.cost import GIGA, LayerBits, LayerCosts, uniform_4_4

BOPS, AVERAGE_ACT_BITS, WEIGHTS, LATENCY = "bops", "average_act_bits", "weights", "latency"
ACTIVATIONS = "activations"


class Latencies(NamedTuple):
    """Measured milliseconds an image (selection/latency.py).

    layers: layer path -> its widths -> milliseconds.
    rest: of everything else.
    """

    layers: Mapping[str, Mapping[Bits, float]]
    rest: float


@dataclasses.dataclass(frozen=True)
class CostModel:
    """The cost of a network, a sum over its layers.

    name: identifies the model.
    unit: shown after a number.
    candidates: searched layer -> its candidate widths.
    branch_costs: searched layer -> its cost at each candidate.
    fixed_cost: total cost of the layers that are not searched.
    reference: cost with 4-bit activations and weights in all searched layers.
    worth_spending: whether the more of a budget is spent, the more bits there are.
    """

    name: str
    unit: str
    candidates: Mapping[str, tuple[Bits, ...]]
    branch_costs: Mapping[str, tuple[float, ...]]
    fixed_cost: float
    reference: float
    worth_spending: bool = True

    def cost(self, bits: LayerBits) -> float:
        """Returns the cost of the network at `bits`; raises ValueError for unknown widths.

        Layers that are not searched may be missing from `bits`.
        """
        return self.fixed_cost + sum(
            table[self.candidates[path].index(bits[path])]
            for path, table in self.branch_costs.items()
        )

    def cost_of(self, choice: Mapping[str, int]) -> float:
        """Returns the cost of the network, given the branch of every searched layer."""
        return self.fixed_cost + sum(
            self.branch_costs[path][index] for path, index in choice.items()
        )

    @property
    def least(self) -> float:
        """The cost of the network with the cheapest candidates."""
        return self.fixed_cost + sum(map(min, self.branch_costs.values()))

    @property
    def most(self) -> float:
        """The cost of the network with the most expensive candidates."""
        return self.fixed_cost + sum(map(max, self.branch_costs.values()))


def bops_model(costs: LayerCosts) -> CostModel:
    """Returns the cost model of bit operations per image, Eq. 6."""
    operations = sum(cost.macs * math.prod(cost.candidates[0]) for cost in _fixed(costs))
    return _model(
        BOPS,
        "GBOPs",
        costs,
        lambda cost, bits: cost.macs * math.prod(bits) / GIGA,
        fixed_cost=operations / GIGA,
        reference=uniform_4_4(costs) / GIGA,
    )


def average_act_bits_model(costs: LayerCosts) -> CostModel:
    """Returns the cost model of mean activation bits, weighted by the layers' input sizes."""
    total = sum(cost.act_elements for cost in costs.values() if cost.searched)
    return _model(
        AVERAGE_ACT_BITS,
        "average bits",
        costs,
        lambda cost, bits: cost.act_elements * bits.act / total,
        fixed_cost=0.0,
        reference=4.0,
    )


def weights_model(costs: LayerCosts) -> CostModel:
    """Returns the cost model of the total size of all kernels at their weight bits."""
    fixed_cost = sum(_mebibytes(cost, cost.candidates[0]) for cost in _fixed(costs))
    searched = (cost for cost in costs.values() if cost.searched)
    return _model(
        WEIGHTS,
        "MiB",
        costs,
        _mebibytes,
        fixed_cost=fixed_cost,
        reference=fixed_cost + sum(_mebibytes(cost, Bits(4, 4)) for cost in searched),
    )


def latency_model(costs: LayerCosts, latencies: Latencies) -> CostModel:
    """Returns the cost model of the milliseconds that one image takes, as measured."""
    times = latencies.layers
    candidates = {path: cost.candidates for path, cost in costs.items() if cost.searched}
    branch_costs = {
        path: tuple(times[path][bits] for bits in row) for path, row in candidates.items()
    }
    unsearched = [path for path, cost in costs.items() if not cost.searched]
    fixed = latencies.rest + sum(times[path][costs[path].candidates[0]] for path in unsearched)
    # 4 bits need not have been measured.
    reference = fixed + sum(map(max, branch_costs.values()))
    return CostModel(
        LATENCY, "ms", candidates, branch_costs, fixed, reference, worth_spending=False
    )


def activation_models(costs: LayerCosts, moments: Sequence[Moment]) -> tuple[CostModel, ...]:
    """Returns the cost models of the activations that are kept while each layer runs.

    The greatest of them is the peak. A moment at which every policy keeps less than at another is
    left out.
    """
    needs = []  # the elements of each searched layer, and bits that do not depend on the policy
    for moment in moments:
        fixed = 8 * moment.rest
        elements = {path: 0 for path, cost in costs.items() if cost.searched}
        for path, count in moment.own.items():
            if costs[path].searched:
                elements[path] += count
            else:
                fixed += count * costs[path].act_bits[0]
        needs.append((*elements.values(), fixed))
    most = [
        need for need in dict.fromkeys(needs)
        if not any(other != need and _at_least(other, need) for other in needs)
    ]  # fmt: skip
    return tuple(_activations(costs, counts, fixed) for *counts, fixed in most)


def peak_range(models: Sequence[CostModel]) -> tuple[float, float]:
    """Returns the least and the greatest peak of `activation_models`; 0 without any."""
    return tuple(
        max((getattr(model, end) for model in models), default=0.0) for end in ("least", "most")
    )


def _at_least(one: Sequence[int], other: Sequence[int]) -> bool:
    return all(a >= b for a, b in zip(one, other, strict=True))


def _activations(costs: LayerCosts, counts: Sequence[int], fixed: int) -> CostModel:
    searched = {path: cost for path, cost in costs.items() if cost.searched}
    elements = dict(zip(searched, counts, strict=True))
    mebibyte = 8 * 2**20  # in bits
    table = {
        path: tuple(elements[path] * bits.act / mebibyte for bits in cost.candidates)
        for path, cost in searched.items()
    }
    candidates = {path: cost.candidates for path, cost in searched.items()}
    reference = (fixed + 4 * sum(counts)) / mebibyte
    return CostModel(
        ACTIVATIONS, "MiB of activations", candidates, table, fixed / mebibyte, reference
    )


class BudgetUnit(NamedTuple):
    """A unit of config.budget.value."""

    make_model: Callable[..., CostModel]
    meaning: str  # follows the value in a sentence
    of_reference: bool = False  # whether the value is a fraction of the model's reference
    needs_weight_bits: bool = False  # whether the cost depends on weight bits alone
    needs_latencies: bool = False  # whether make_model takes them, after the layers

    def model(self, costs: LayerCosts, latencies: Latencies | None = None) -> CostModel:
        """Returns the cost model of a network."""
        return self.make_model(costs, latencies) if self.needs_latencies else self.make_model(costs)


# By config.budget.unit.
BUDGET_UNITS = {
    "fraction": BudgetUnit(bops_model, "of the BOPs of the uniform 4/4 network", of_reference=True),
    "gbops": BudgetUnit(bops_model, "GBOPs"),
    "average_act_bits": BudgetUnit(average_act_bits_model, "activation bits on average"),
    "mebibytes": BudgetUnit(weights_model, "MiB of weights", needs_weight_bits=True),
    "milliseconds": BudgetUnit(latency_model, "ms an image", needs_latencies=True),
}

# A limit of config.budget.limits alone: not one sum over the layers, but the greatest of several.
PEAK = "activation_mebibytes"
PEAK_MEANING = "MiB of activations at the peak"


def reachable(
    costs: LayerCosts, latencies: Latencies | None = None, moments: Sequence[Moment] = ()
) -> dict[str, tuple[float, float]]:
    """Returns config.budget.unit -> the least and greatest value that a policy can cost."""
    found = {}
    for name, unit in BUDGET_UNITS.items():
        if unit.needs_latencies and latencies is None:
            continue
        model = unit.model(costs, latencies)
        scale = model.reference if unit.of_reference else 1.0
        if model.least < model.most:  # otherwise nothing that is searched changes it
            found[name] = (model.least / scale, model.most / scale)
    least, most = peak_range(activation_models(costs, moments))
    if least < most:
        found[PEAK] = least, most
    return found


def _model(
    name: str,
    unit: str,
    costs: LayerCosts,
    cost_at: Callable[[LayerCost, Bits], float],
    *,
    fixed_cost: float,
    reference: float,
) -> CostModel:
    """Returns the model in which a searched layer at `bits` costs cost_at(layer, bits)."""
    candidates = {path: cost.candidates for path, cost in costs.items() if cost.searched}
    branch_costs = {
        path: tuple(cost_at(costs[path], bits) for bits in row) for path, row in candidates.items()
    }
    return CostModel(name, unit, candidates, branch_costs, fixed_cost, reference)


def _fixed(costs: LayerCosts) -> list[LayerCost]:
    return [cost for cost in costs.values() if not cost.searched]


def _mebibytes(cost: LayerCost, bits: Bits) -> float:
    return cost.weight_elements * bits.weight / 8 / 2**20
