"""Multiple-choice knapsack: the exact best choice per layer inside a budget."""

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import block_diag, csr_array


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
    # Scaled so that the solver's absolute tolerance is far below any layer's cost; the sliver
    # taken off keeps that tolerance from letting a policy out of its budget.
    result = milp(
        -value,
        integrality=np.ones_like(value),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(cost[None] / limit, -np.inf, 1 + 1e-9),
        ],
        options={"mip_rel_gap": 0.0},
    )
    if result.x is None:
        raise ValueError(f"no choice costs {limit} or less: {result.message}")
    ends = np.cumsum([len(values[path]) for path in paths])[:-1]
    picks = np.split(result.x, ends)
    return {path: int(np.argmax(pick)) for path, pick in zip(paths, picks, strict=True)}
