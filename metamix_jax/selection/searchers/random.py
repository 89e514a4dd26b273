"""A random policy that spends the budget: what a search has to beat."""

import math

import numpy as np

from metamix_jax.errors import UserError
from metamix_jax.networks.precision import Bits
from metamix_jax.selection import knapsack
from metamix_jax.selection.budget import TOLERANCE, Budget
from metamix_jax.selection.context import SearchContext
from metamix_jax.selection.cost import bits_at
from metamix_jax.selection.phases import FINE_TUNING
from metamix_jax.selection.searcher import Searcher

WITHIN = 0.01  # of the dearest policy's cost, below it
DRAWS, ROUNDS = 10_000, 100


def choose(context: SearchContext) -> dict[str, Bits]:
    """Returns a policy drawn evenly from those that spend the budget, to within 1 %.

    Layers of equal size make costs of few different sums, none of which may lie that close to the
    budget; the 1 % is therefore of the dearest policy inside it. Draws depend on config.seed alone.

    Raises:
      UserError: none was found.
    """
    rng = np.random.default_rng(context.config.seed)
    return bits_at(context.costs, draw(context.budget, rng))


def draw(budget: Budget, rng: np.random.Generator) -> dict[str, int]:
    """Returns searched layer -> branch, such that the cost is just inside the budget.

    Layers are drawn independently with probabilities proportional to exp(-tilt * cost), the tilt
    such that the mean cost is the budget, until a policy falls inside. A policy's probability then
    depends on its cost alone, so that among those of about one cost none is preferred, and a
    policy near a tight budget is found too.
    """
    model = budget.cost_model
    tables = [np.asarray(table) for table in model.branch_costs.values()]
    low, high = knapsack.dearest(budget) * (1 - WITHIN), budget.limit * (1 + TOLERANCE)
    tilt = _tilt(tables, (low + high) / 2 - model.fixed_cost)
    for _ in range(ROUNDS):
        picks = np.stack([rng.choice(len(t), size=DRAWS, p=_shares(t, tilt)) for t in tables])
        costs = model.fixed_cost + sum(t[k] for t, k in zip(tables, picks, strict=True))
        inside = np.flatnonzero((costs >= low) & (costs <= high))
        if inside.size:
            first = picks[:, inside[0]].tolist()
            return dict(zip(model.branch_costs, first, strict=True))
    raise UserError(
        f"config.search.searcher='random': none of {DRAWS * ROUNDS:,} random policies costs "
        f"{low:.6g} to {budget}; take another config.budget.value"
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
    summary="uniformly drawn, within 1 % below the budget",
    phases=FINE_TUNING,
    choose=choose,
)
