"""From a state to a policy: builds the searcher's context and a policy from its choice."""

from collections.abc import Callable, Iterable

import jax
import numpy as np
from ml_collections import ConfigDict

from metamix_jax.selection import knapsack
from metamix_jax.selection.budget import Budget
from metamix_jax.selection.context import SearchContext
from metamix_jax.selection.policy import Policy, make_policy
from metamix_jax.selection.searchers import SEARCHERS
from metamix_jax.training.setup import Network
from metamix_jax.training.step.batch_step import training_images
from metamix_jax.training.step.state import Batch, TrainState, branch_logits, split_by_label


def choose_policy(
    config: ConfigDict,
    network: Network,
    state: TrainState,
    budget: Budget,
    batches: Callable[[int, int], Iterable[Batch]],
) -> Policy:
    """Returns the policy of config.search.searcher within `budget`.

    `batches(start, stop)` yields the batches of these training steps, for searchers that use data.
    """
    name = config.search.searcher
    context = SearchContext(
        model=network.model,
        costs=network.costs,
        budget=budget,
        config=config,
        variables=state.variables,
        logits=logits_of(state),
        batches=lambda count: (
            (training_images(batch, config), batch["label"]) for batch in batches(0, count)
        ),
    )
    return make_policy(
        network.costs,
        SEARCHERS[name].choose(context),
        model=network.label,
        image_size=config.data.image_size,
        searcher=name,
        seed=config.seed,
        budget_gbops=knapsack.most_gbops(network.costs, budget),
    )


def logits_of(state: TrainState) -> dict[str, np.ndarray]:
    """Returns searched layer -> logits [branches]."""
    logits = branch_logits(split_by_label(state, {"logits"})[0])
    return {path: jax.device_get(row) for path, row in logits.items()}
