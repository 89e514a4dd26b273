"""MetaMix: bit-meta training, bit search on the frozen meta-state, policy by argmax."""

import logging

import jax
import numpy as np
from ml_collections import ConfigDict

from metamix_jax.errors import require
from metamix_jax.networks.precision import Bits
from metamix_jax.selection import knapsack, phases
from metamix_jax.selection.budget import TOLERANCE
from metamix_jax.selection.context import SearchContext
from metamix_jax.selection.cost import bits_at
from metamix_jax.selection.searcher import Searcher


def choose(context: SearchContext, least_spent: float | None = None) -> dict[str, Bits]:
    """Returns layer path -> bits: the argmax of the logits, or its projection into the budget.

    The search loss is two-sided (Eq. 4), so the argmax can end above the budget; it is then
    replaced by the most probable policy within the budget (multiple-choice knapsack over
    log-probabilities). The same happens if the argmax spends less than a share of the budget, our
    addition: `least_spent`, or config.search.least_spent if that is None.
    """
    if least_spent is None:
        least_spent = context.config.search.least_spent
    logits, costs, budget = context.logits, context.costs, context.budget
    argmax = bits_at(costs, {path: int(np.argmax(row)) for path, row in logits.items()})
    spent, least = budget.cost(argmax), least_spent * budget.limit
    least *= budget.cost_model.worth_spending
    excess = budget.excess(argmax)
    if not excess and spent >= least * (1 - TOLERANCE):
        return argmax
    branch_costs = budget.cost_model.branch_costs
    log_shares = {path: np.asarray(jax.nn.log_softmax(row), float) for path, row in logits.items()}
    further = budget.further_rooms
    if excess and not least:
        choice = knapsack.maximise(log_shares, branch_costs, budget.room, further)
    else:
        # No policy may cost exactly this much, so at most the greatest feasible cost is required.
        least = min(least, knapsack.dearest(budget)) - budget.cost_model.fixed_cost
        choice = knapsack.spend(log_shares, branch_costs, budget.room, least, further)
    projected = bits_at(costs, choice)
    changed = [
        f"{path} {argmax[path].act}/{argmax[path].weight}->"
        f"{projected[path].act}/{projected[path].weight}"
        for path in logits
        if argmax[path] != projected[path]
    ]
    below = f"{spent:.4f} {budget.cost_model.unit}, far below the budget of {budget.limit:.4f}"
    logging.info(
        "the search ended at %s; projected to %.4f %s by changing %d layers: %s",
        excess or below,
        budget.cost(projected), budget.cost_model.unit, len(changed), ", ".join(changed),
    )  # fmt: skip
    return projected


def check_epochs(config: ConfigDict) -> None:
    """Raises UserError unless the logits are trained at all."""
    epochs = config.bit_search.epochs
    expected = f"more than 0 for searcher {config.search.searcher}"
    require(epochs > 0, "bit_search.epochs", epochs, expected)


def check(config: ConfigDict) -> None:
    """Raises UserError if there is no search, or if further searches would disturb it."""
    check_epochs(config)
    options, budgets = config.bit_search, tuple(config.search.budgets)
    require(
        not budgets or (options.fixed_meta_state and not options.commit_batch_stats),
        "search.budgets", budgets,
        "none, unless the meta-state is fixed and keeps its batch norm statistics",
    )  # fmt: skip


SEARCHER = Searcher(
    name="metamix",
    summary="the paper's method: the most probable policy on the frozen meta-state",
    phases=(phases.bit_meta, phases.bit_search, *phases.FINE_TUNING),
    choose=choose,
    exclusive=("search.budgets",),
    check=check,
    variants={
        "metamix_spent": {"search.least_spent": 0.99},
        "metamix_annealed": {"search.least_spent": 0.99, "bit_search.last_temperature": 0.1},
        "metamix_unfixed": {"bit_search.fixed_meta_state": False},
        "metamix_no_meta": {"bit_meta.epochs": 0.0, "bit_search.alternate": False},
        "metamix_last_loss": {"bit_meta.loss": "last"},
    },
)
