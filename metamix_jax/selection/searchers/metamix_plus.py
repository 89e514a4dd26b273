"""MetaMix with a better choice: its budget spent, then exchanges of bits (ours).

The logits hear little of what single widths cost, because the mixture averages their errors. So the
policy that they choose is only the start: it spends the budget, and layers then trade bits as long
as the network at the chosen bits gets better on training batches (selection/policy_loss.py).
"""

import itertools
import logging
from collections.abc import Iterator, Mapping

import numpy as np

from metamix_jax.fields import Field, at_least
from metamix_jax.networks.precision import Bits
from metamix_jax.selection import knapsack
from metamix_jax.selection.budget import Budget
from metamix_jax.selection.context import SearchContext
from metamix_jax.selection.cost import LayerCosts, bits_at
from metamix_jax.selection.policy_loss import PolicyLoss, policy_loss
from metamix_jax.selection.searcher import Searcher
from metamix_jax.selection.searchers import metamix

LEAST_SPENT = 0.99
TRIES = 12  # moves whose loss is computed, of those that look best
Choice = Mapping[str, int]


def choose(context: SearchContext) -> dict[str, Bits]:
    """Returns the improved policy; it costs no more than the budget and its limits."""
    options = context.config.search
    start = metamix.choose(context, least_spent=LEAST_SPENT)
    trained = len(context.config.quant.weight_bits) > 1
    loss = policy_loss(context, options.exchange_batches, weight_steps=trained)
    choice = {path: context.costs[path].candidates.index(start[path]) for path in context.logits}
    found = improved(choice, loss, context.costs, context.budget, options.exchange_rounds)
    return bits_at(context.costs, found)


def improved(
    choice: Choice, loss: PolicyLoss, costs: LayerCosts, budget: Budget, rounds: int
) -> dict[str, int]:
    """Returns a choice that costs about the same, and whose loss is at most that of the given one.

    In each round every layer's change of loss at every width is measured, alone. Of the moves that
    look best by their sum (the best policy of all, one layer, two layers) some are tried; the best
    is made if the loss falls.

    Args:
      choice: searched layer -> branch, within the budget.
      loss: of a choice.
      costs: the network's layers.
      budget: with its limits.
      rounds: at most.
    """
    choice, now = dict(choice), loss(choice)
    first, model = now, budget.cost_model
    # Fewer bits may seem better by chance; without them the budget is not spent.
    least = LEAST_SPENT * model.cost_of(choice) if model.worth_spending else 0.0
    for number in range(rounds):
        change = {
            path: np.array([
                0.0 if k == choice[path] else loss(choice | {path: k}) - now
                for k in range(len(costs[path].candidates))
            ])
            for path in choice
        }  # fmt: skip
        moves = itertools.islice(_moves(choice, change, costs, budget, least), TRIES)
        tried = [(loss(choice | move), move) for move in moves]
        best, move = min(tried, key=lambda pair: pair[0], default=(now, {}))
        if best >= now:
            break
        candidates = {path: costs[path].candidates for path in move}
        steps = ", ".join(
            f"{path} {_name(row[choice[path]])}->{_name(row[move[path]])}"
            for path, row in candidates.items()
        )
        logging.info("exchange %d: loss %.4f -> %.4f, %s", number + 1, now, best, steps)
        choice, now = choice | move, best
    logging.info("exchanges took the loss of the meta-state from %.4f to %.4f", first, now)
    return choice


def _name(bits: Bits) -> str:
    return f"{bits.act}/{bits.weight}"


def _moves(
    choice: Choice,
    change: Mapping[str, np.ndarray],
    costs: LayerCosts,
    budget: Budget,
    least: float,
) -> Iterator[dict[str, int]]:
    """Yields moves to choices that cost from `least` to the budget, best sum of changes first."""
    values, model = {path: -row for path, row in change.items()}, budget.cost_model
    if any(np.ptp(row) for row in values.values()):
        best = knapsack.spend(
            values, model.branch_costs, budget.room, least - model.fixed_cost, budget.further_rooms
        )
        yield {path: k for path, k in best.items() if k != choice[path]}
    single = [
        {path: k} for path, row in change.items() for k in range(len(row)) if k != choice[path]
    ]
    pairs = [
        one | other
        for one, other in itertools.combinations(single, 2)
        if one.keys() != other.keys()
    ]
    moves = single + pairs
    sums = [sum(change[path][k] for path, k in move.items()) for move in moves]
    for place in np.argsort(sums, kind="stable"):
        if sums[place] >= 0:
            return
        moved = choice | moves[place]
        if model.cost_of(moved) >= least and budget.admits(bits_at(costs, moved)):
            yield moves[place]


SEARCHER = Searcher(
    name="metamix_plus",
    summary="`metamix` with its budget spent, then exchanges of bits between layers while the loss "
    "of the meta-state at the chosen bits falls (ours)",
    phases=metamix.SEARCHER.phases,
    choose=choose,
    fields=(
        Field("search.exchange_rounds", 8, "Most exchanges of searcher `metamix_plus`; without "
              "any it would be `metamix_spent`.", at_least(1)),
        Field("search.exchange_batches", 4, "Training batches on which `metamix_plus` measures the "
              "loss.", at_least(1)),
    ),
    check=metamix.check_epochs,
)  # fmt: skip
