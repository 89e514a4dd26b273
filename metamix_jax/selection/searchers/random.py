"""A random policy that spends the budget: the baseline that a search has to beat."""

import math

import numpy as np

from metamix_jax.errors import UserError
from metamix_jax.networks.precision import Bits
from metamix_jax.selection import knapsack
from metamix_jax.selection.budget import TOLERANCE, Budget, within
from metamix_jax.selection.context import SearchContext
from metamix_jax.selection.cost import bits_at
from metamix_jax.selection.phases import FINE_TUNING
from metamix_jax.selection.searcher import Searcher

WITHIN = 0.01  # allowed cost below the most expensive policy's, relative to it
DRAWS, ROUNDS = 10_000, 100


def choose(context: SearchContext) -> dict[str, Bits]:
    """Returns a policy drawn uniformly from those that spend the budget to within 1 %.

    With layers of equal size, only a few total costs are possible, perhaps none that close to the
    budget, so the 1 % is relative to the most expensive policy within it. Draws depend on
    config.seed alone.

    Raises:
      UserError: no such policy was found.
    """
    rng = np.random.default_rng(context.config.seed)
    return bits_at(context.costs, draw(context.budget, rng))


def draw(budget: Budget, rng: np.random.Generator) -> dict[str, int]:
    """Returns searched layer -> branch, such that the cost is just within the budget.

    Layers are drawn independently with probabilities proportional to exp(-tilt * cost), where the
    tilt makes the mean cost equal to the budget, until a policy costs the right amount. A policy's
    probability then depends on its cost alone, so policies of about the same cost are equally
    likely, and policies near a tight budget are found too.
    """
    model = budget.cost_model
    tables = [np.asarray(table) for table in model.branch_costs.values()]
    further = [
        (each, [np.asarray(each.cost_model.branch_costs[path]) for path in model.branch_costs])
        for each in budget.further
    ]
    dearest = knapsack.dearest(budget)
    low, high = dearest * (1 - WITHIN), budget.limit * (1 + TOLERANCE)
    most = dearest if further else high  # further limits may keep it far below its own
    tilt = _tilt(tables, (low + most) / 2 - model.fixed_cost)
    for _ in range(ROUNDS):
        picks = np.stack([rng.choice(len(t), size=DRAWS, p=_shares(t, tilt)) for t in tables])
        costs = model.fixed_cost + sum(t[k] for t, k in zip(tables, picks, strict=True))
        admitted = (costs >= low) & (costs <= high)
        for each, rows in further:
            total = sum(row[k] for row, k in zip(rows, picks, strict=True))
            admitted &= within(each.cost_model.fixed_cost + total, each.limit)
        inside = np.flatnonzero(admitted)
        if inside.size:
            first = picks[:, inside[0]].tolist()
            return dict(zip(model.branch_costs, first, strict=True))
    raise UserError(
        f"config.search.searcher='random': none of {DRAWS * ROUNDS:,} random policies costs "
        f"{low:.6g} to {budget}; try another config.budget.value"
    )


def _shares(costs: np.ndarray, tilt: float) -> np.ndarray:
    weights = np.exp(-tilt * (costs - costs.mean()))
    return weights / weights.sum()


def _tilt(tables: list[np.ndarray], target: float) -> float:
    """Returns the tilt at which the mean total cost is `target`, by bisection."""
    scale = 1 / max(np.ptp(table) for table in tables)

    def mean(tilt: float) -> float:
        return math.fsum(_shares(table, tilt) @ table for table in tables)

    low, high = -30 * scale, 30 * scale  # the mean falls with the tilt
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if mean(middle) > target else (low, middle)
    return (low + high) / 2


SEARCHER = Searcher(
    name="random",
    summary="drawn uniformly from the policies within 1 % below the budget",
    phases=FINE_TUNING,
    choose=choose,
)
