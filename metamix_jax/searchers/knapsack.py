"""Multiple-choice knapsack: the exact best choice per layer inside a budget."""

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import block_diag, csr_array

TOLERANCE = 1e-9  # of the limit, for sums that are equal but for rounding


def maximise(
    values: Mapping[str, Sequence[float]], costs: Mapping[str, Sequence[float]], limit: float
) -> dict[str, int]:
    """Returns the choice per layer with the greatest total value at a total cost <= limit.

    Args:
      values: layer -> value of each candidate.
      costs: layer -> cost of each candidate, same layers and lengths.
      limit: greatest total cost.

    Raises:
      ValueError: no choice costs as little as `limit`.
    """
    paths = list(values)
    value = np.concatenate([np.asarray(values[path], float) for path in paths])
    cost = np.concatenate([np.asarray(costs[path], float) for path in paths])
    one_each = csr_array(block_diag([np.ones((1, len(values[path]))) for path in paths]))
    constraints = [
        LinearConstraint(one_each, 1, 1),
        LinearConstraint(cost[None] / limit, -np.inf, 1 + TOLERANCE),
    ]
    while True:
        result = milp(
            -value,
            integrality=np.ones_like(value),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"mip_rel_gap": 0.0},
        )
        if result.x is None:
            raise ValueError(f"no choice costs {limit} or less: {result.message}")
        picked = np.round(result.x)
        if cost @ picked <= limit * (1 + TOLERANCE):
            break
        # The solver's own tolerance let this choice through: forbid it and solve again.
        constraints.append(LinearConstraint(picked[None], -np.inf, len(paths) - 1))
    ends = np.cumsum([len(values[path]) for path in paths])[:-1]
    picks = np.split(picked, ends)
    return {path: int(np.argmax(pick)) for path, pick in zip(paths, picks, strict=True)}
