"""The training step: what one batch does in one phase."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import linen as nn
from ml_collections import ConfigDict

from metamix_jax import data
from metamix_jax.budget import Budget
from metamix_jax.phases import Span
from metamix_jax.state import Batch, Metrics, TrainState, swap_search
from metamix_jax.update import make_update


def training_images(batch: Batch, config: ConfigDict) -> jax.Array:
    """Returns the batch's images [b, h, w, c] as the network sees them in training."""
    options = config.data
    images = data.augment(
        batch["image"], batch["index"], batch["epoch"], seed=config.seed, kind=options.augment
    )
    return data.preprocess(images, mean=options.mean, std=options.std)


def make_train_step(
    model: nn.Module,
    span: Span,
    config: ConfigDict,
    budget: Budget | None,
    teacher: nn.Module | None,
    further_budgets: Mapping[str, Budget] | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Returns `step(state, batch, branches, teacher_variables) -> (state, metrics)`.

    It calls compiled parts and consumes the state it is given. All branches go through the same
    compiled pass, one after the other, so that neither compile time nor memory grow with their
    number.

    Args:
      model: the network.
      span: the phase and its length.
      config: the run's configuration.
      budget: for updates with a budget term.
      teacher: network that gives the soft targets, or None.
      further_budgets: of searches beside the first, by the keys that `enter_phase` gave them.
    """
    updates = [
        (update, make_update(model, update, span.steps, config, budget))
        for update in span.phase.updates
    ]

    @jax.jit
    def prepare(batch: Batch, teacher_variables: Any) -> tuple[jax.Array, jax.Array | None]:
        images = training_images(batch, config)
        if teacher is None:
            return images, None
        return images, jax.nn.softmax(teacher.apply(teacher_variables, images, train=False))

    @functools.partial(jax.jit, donate_argnums=0)
    def count(step: jax.Array) -> jax.Array:
        return step + 1

    def train_step(
        state: TrainState, batch: Batch, branches: Mapping[str, jax.Array], teacher_variables: Any
    ) -> tuple[TrainState, Metrics]:
        images, soft_targets = prepare(batch, teacher_variables)
        metrics = {}
        for update, apply_update in updates:
            inputs = (images, batch["label"], soft_targets, branches)
            state, numbers = apply_update(state, *inputs)
            # Of the alternation, the search's numbers are the phase's own.
            prefix = "" if update.name == span.phase.name else f"{update.name}_"
            metrics |= {prefix + name: value for name, value in numbers.items()}
            for key, other in (further_budgets or {}).items() if update.budget_term else ():
                state, numbers = apply_update(swap_search(state, key), *inputs, limit=other.limit)
                state = swap_search(state, key)
                metrics[f"cost_{key}"] = numbers["cost"]
        return state.replace(step=count(state.step)), metrics

    return train_step
