"""MetaMix: bit-meta training, bit-search on the frozen meta-state, policy by argmax."""

import logging
from collections.abc import Mapping

import jax
import numpy as np
from ml_collections import ConfigDict

from metamix_jax.budget import Budget
from metamix_jax.cost import LayerCosts
from metamix_jax.precision import Bits
from metamix_jax.searchers import knapsack

PHASES = ("bit_meta", "bit_search", "act_training", "weight_training")


def choose(
    logits: Mapping[str, jax.Array], costs: LayerCosts, budget: Budget, config: ConfigDict
) -> dict[str, Bits]:
    """Returns layer path -> bits: the argmax of the logits, inside the budget.

    The search loss is two-sided (Eq. 4), so the argmax can end above the budget; the most probable
    policy inside it (multiple-choice knapsack over log-probabilities) then takes its place.
    """
    del config
    # Fixed layers have one candidate; the searched ones follow.
    fixed = {path: cost.candidates[0] for path, cost in costs.items()}
    argmax = fixed | {
        path: costs[path].candidates[int(np.argmax(np.asarray(row)))]
        for path, row in logits.items()
    }
    spent = budget.cost(argmax, costs)
    if spent <= budget.limit * (1 + 1e-9):
        return argmax
    log_shares = {path: np.asarray(jax.nn.log_softmax(row), float) for path, row in logits.items()}
    choice = knapsack.maximise(log_shares, budget.branch_costs, budget.limit - budget.fixed_cost)
    projected = fixed | {path: costs[path].candidates[index] for path, index in choice.items()}
    changed = [
        f"{path} {argmax[path].act}/{argmax[path].weight}->"
        f"{projected[path].act}/{projected[path].weight}"
        for path in logits
        if argmax[path] != projected[path]
    ]
    logging.info(
        "the search ended at %.4f %s, above the budget of %.4f; projected to %.4f by changing "
        "%d layers: %s",
        spent, budget.unit, budget.limit, budget.cost(projected, costs), len(changed),
        ", ".join(changed),
    )  # fmt: skip
    return projected
