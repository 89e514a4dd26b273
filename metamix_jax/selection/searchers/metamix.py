"""MetaMix: bit-meta training, bit-search on the frozen meta-state, policy by argmax."""

import logging

import jax
import numpy as np

from metamix_jax.networks.precision import Bits
from metamix_jax.selection import knapsack, phases
from metamix_jax.selection.context import SearchContext

PHASES = (phases.bit_meta, phases.bit_search, *phases.FINE_TUNING)


def choose(context: SearchContext) -> dict[str, Bits]:
    """Returns layer path -> bits: the argmax of the logits, inside the budget.

    The search loss is two-sided (Eq. 4), so the argmax can end above the budget; the most probable
    policy inside it (multiple-choice knapsack over log-probabilities) then takes its place. So it
    does where the argmax leaves more of the budget unspent than config.search.least_spent allows,
    which is ours.
    """
    logits, costs, budget = context.logits, context.costs, context.budget
    # Fixed layers have one candidate; the searched ones follow.
    fixed = {path: cost.candidates[0] for path, cost in costs.items()}
    argmax = fixed | {
        path: costs[path].candidates[int(np.argmax(np.asarray(row)))]
        for path, row in logits.items()
    }
    spent, least = budget.cost(argmax, costs), context.config.search.least_spent * budget.limit
    if least * (1 - 1e-9) <= spent <= budget.limit * (1 + 1e-9):
        return argmax
    log_shares = {path: np.asarray(jax.nn.log_softmax(row), float) for path, row in logits.items()}
    room = budget.limit - budget.fixed_cost
    if spent > budget.limit and not least:
        choice = knapsack.maximise(log_shares, budget.branch_costs, room)
    else:
        # Not every sum is the cost of a policy, so no more is asked than the dearest one's.
        least = min(least, knapsack.dearest(budget)) - budget.fixed_cost
        choice = knapsack.spend(log_shares, budget.branch_costs, room, least)
    projected = fixed | {path: costs[path].candidates[index] for path, index in choice.items()}
    changed = [
        f"{path} {argmax[path].act}/{argmax[path].weight}->"
        f"{projected[path].act}/{projected[path].weight}"
        for path in logits
        if argmax[path] != projected[path]
    ]
    logging.info(
        "the search ended at %.4f %s, %s the budget of %.4f; projected to %.4f by changing "
        "%d layers: %s",
        spent, budget.unit, "above" if spent > budget.limit else "far below", budget.limit,
        budget.cost(projected, costs), len(changed), ", ".join(changed),
    )  # fmt: skip
    return projected
