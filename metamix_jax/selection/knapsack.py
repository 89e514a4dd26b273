"""Multiple-choice knapsack: the exact best choice per layer within a budget."""

from collections.abc import Mapping, Sequence

import numpy as np

from metamix_jax.networks.precision import Bits
from metamix_jax.selection import cost as cost_lib
from metamix_jax.selection.budget import TOLERANCE, Budget, Room, within
from metamix_jax.selection.cost import LayerCosts
from metamix_jax.selection.cost_models import BOPS, bops_model

GRID = 100_000  # `spend` rounds costs to this fraction of the limit
FURTHER_GAP = 1e-3  # of `spend` with several limits
RESOLUTION = 1e-4  # smaller spreads, relative to the greatest, are beyond the solver's accuracy


def best_policy(
    values: Mapping[str, Sequence[float]], costs: LayerCosts, budget: Budget
) -> dict[str, Bits]:
    """Returns the widths of all layers with the greatest total value within the budget.

    Args:
      values: searched layer -> value of each branch.
      costs: the network's layers.
      budget: the limit.
    """
    rows = budget.cost_model.branch_costs, budget.room, budget.further_rooms
    return cost_lib.bits_at(costs, maximise(values, *rows))


def dearest(budget: Budget) -> float:
    """Returns the greatest cost of a policy within the budget; see `spend`."""
    table = budget.cost_model.branch_costs
    choice = spend(table, table, budget.room, further=budget.further_rooms)
    return budget.cost_model.cost_of(choice)


def most_gbops(costs: LayerCosts, budget: Budget) -> float:
    """Returns the budget in GBOPs; for other cost models, the most GBOPs it admits."""
    if budget.cost_model.name == BOPS:
        return budget.limit
    bits = best_policy(bops_model(costs).branch_costs, costs, budget)
    return cost_lib.bops(costs, bits) / cost_lib.GIGA


def spend(
    values: Mapping[str, Sequence[float]],
    costs: Mapping[str, Sequence[float]],
    limit: float,
    least: float = 0.0,
    further: Sequence[Room] = (),
) -> dict[str, int]:
    """Returns the choice with the greatest total value such that least <= total cost <= limit.

    A dynamic program, because a lower bound on the sum makes branch and bound extremely slow.
    Choices are compared at costs rounded to 1/GRID of the limit, so a slightly better one may be
    missed; the result itself satisfies both bounds. With further limits it is branch and bound
    after all, up to FURTHER_GAP of the best value.

    Raises:
      ValueError: no choice was found within the bounds.
    """
    if further:
        return _solve(values, [(costs, limit), *further], least, FURTHER_GAP)
    cells = GRID + len(costs) + 1  # rounded costs can add up to more than the limit
    best, picks = np.full(cells, -np.inf), []
    best[0] = 0.0
    for path, row in costs.items():
        options = np.full((len(row), cells), -np.inf)
        for k, cost in enumerate(row):
            width = round(cost / limit * GRID)
            if width < cells:
                options[k, width:] = best[: cells - width] + values[path][k]
        picks.append(options.argmax(axis=0))
        best = options.max(axis=0)
    for end in np.argsort(-best, kind="stable"):
        if best[end] == -np.inf:
            break
        choice, cell = {}, end
        for (path, row), pick in zip(reversed(costs.items()), reversed(picks), strict=True):
            choice[path] = int(pick[cell])
            cell -= round(row[choice[path]] / limit * GRID)
        total = sum(costs[path][k] for path, k in choice.items())
        if least - TOLERANCE * limit <= total and within(total, limit):
            return {path: choice[path] for path in costs}
    raise ValueError(f"found no choice that costs {least} to {limit}")


def maximise(
    values: Mapping[str, Sequence[float]],
    costs: Mapping[str, Sequence[float]],
    limit: float,
    further: Sequence[Room] = (),
) -> dict[str, int]:
    """Returns the choice per layer with the greatest total value at a total cost <= limit.

    The total is optimal to about 1e-9 of the greatest spread of a layer's values. Layers with a far
    smaller spread are then optimized by themselves within the remaining cost.

    Args:
      values: layer -> value of each candidate, of any scale.
      costs: layer -> cost of each candidate, same layers and lengths.
      limit: greatest total cost.
      further: other costs, and the greatest total of each.

    Raises:
      ValueError: every choice costs more than a limit.
    """
    rooms = [(costs, limit), *further]
    spreads = {path: float(np.ptp(row)) for path, row in values.items()}
    widest = max(spreads.values())
    scale = 1e3 / max(widest, 1e-300)  # the solver stops within 1e-6 of the optimum
    scaled = {path: (np.asarray(row, float) - max(row)) * scale for path, row in values.items()}
    choice = _solve(scaled, rooms)
    fine = [path for path, spread in spreads.items() if spread < RESOLUTION * widest]
    if any(spreads[path] > 0 for path in fine):
        left = [
            (
                {path: table[path] for path in fine},
                most - sum(table[path][k] for path, k in choice.items() if path not in fine),
            )
            for table, most in rooms
        ]
        if not further:  # the cheapest may exceed the remainder by rounding
            left = [(left[0][0], max(left[0][1], sum(map(min, left[0][0].values()))))]
        choice |= maximise({path: values[path] for path in fine}, *left[0], left[1:])
    return choice


def _solve(
    values: Mapping[str, Sequence[float]],
    rooms: Sequence[Room],
    least: float | None = None,
    gap: float = 0.0,
) -> dict[str, int]:
    """Returns the choice of the greatest total value; `least` bounds the first cost from below."""
    # Imported here because the import is slow and a run's first steps do not need it.
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import block_diag, csr_array

    paths = list(values)
    value = np.concatenate([np.asarray(values[path], float) for path in paths])
    tables = [
        np.concatenate([np.asarray(costs[path], float) for path in paths]) for costs, _ in rooms
    ]
    limits = [limit for _, limit in rooms]
    one_each = csr_array(block_diag([np.ones((1, len(values[path]))) for path in paths]))
    constraints = [
        LinearConstraint(one_each, 1, 1),
        *(
            LinearConstraint(table[None] / limit, -np.inf, 1 + TOLERANCE)
            for table, limit in zip(tables, limits, strict=True)
        ),
    ]
    if least is not None:
        constraints.append(LinearConstraint(tables[0][None] / limits[0], least / limits[0], np.inf))
    while True:
        result = milp(
            -value,
            integrality=np.ones_like(value),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"mip_rel_gap": gap},
        )
        if result.x is None:
            costs = ", ".join(map(str, limits))
            raise ValueError(f"no choice costs {costs} or less: {result.message}")
        picked = np.round(result.x)
        if all(within(table @ picked, limit) for table, limit in zip(tables, limits, strict=True)):
            break
        # Admitted only by the solver's tolerance: exclude this choice and solve again.
        constraints.append(LinearConstraint(picked[None], -np.inf, len(paths) - 1))
    ends = np.cumsum([len(values[path]) for path in paths])[:-1]
    picks = np.split(picked, ends)
    return {path: int(np.argmax(pick)) for path, pick in zip(paths, picks, strict=True)}
