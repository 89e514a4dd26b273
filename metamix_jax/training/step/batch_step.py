"""The training step: all updates of a phase on one batch."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from metamix_jax.data import batching
from metamix_jax.selection.budget import Budget
from metamix_jax.training.schedule import Span
from metamix_jax.training.step.gradient_step import make_update
from metamix_jax.training.step.state import Batch, Metrics, TrainState, swap_search

Part = tuple[jax.Array, jax.Array, jax.Array | None]  # images, labels, soft targets


def training_images(batch: Batch, config: ConfigDict) -> jax.Array:
    """Returns the batch's images [b, h, w, c], augmented and normalized for training."""
    options = config.data
    images = batching.augment(
        batch["image"], batch["index"], batch["epoch"], seed=config.seed, kind=options.augment
    )
    return batching.preprocess(images, mean=options.mean, std=options.std)


def micro_batch(rows: jax.Array, number: jax.Array, parts: int) -> jax.Array:
    """Returns every `parts`-th of `rows` from `number`: an equal share of each device's rows."""
    return rows.reshape(-1, parts, *rows.shape[1:])[:, number]


def make_train_step(
    model: nn.Module,
    span: Span,
    config: ConfigDict,
    budget: Budget | None,
    teacher: nn.Module | None,
    further_budgets: Mapping[str, Budget] | None = None,
    *,
    scan: bool = False,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Returns `step(state, batch, branches, teacher_variables) -> (state, metrics)`.

    The step calls several compiled functions and consumes (donates) the given state. All branches
    run through the same compiled pass, one after the other, so neither compile time nor memory
    grows with their number. With config.accumulation_steps > 1, so do the micro-batches of a batch.
    Gradients are averaged over micro-batches; batch norm normalizes each micro-batch by its own
    statistics, and each updates the running statistics in turn.

    Args:
      model: the network.
      span: the phase and its length.
      config: the run's configuration.
      budget: for updates with a budget term.
      teacher: network that provides the soft targets, or None.
      further_budgets: of additional searches, by the keys used in `enter_phase`.
      scan: run the passes in `lax.scan`, for a step that is compiled as a whole (blocks.py); in it,
        XLA's CPU convolutions are many times slower.
    """
    updates = [
        (
            update,
            make_update(model, update, span.steps, config, budget, start=span.start, scan=scan),
        )
        for update in span.phase.updates
    ]
    parts = config.accumulation_steps

    @jax.jit
    def prepare(batch: Batch, number: jax.Array, teacher_variables: Any) -> Part:
        batch = {name: micro_batch(rows, number, parts) for name, rows in batch.items()}
        images = training_images(batch, config)
        if teacher is None:
            return images, batch["label"], None
        scores = teacher.apply(teacher_variables, images, train=False)
        return images, batch["label"], jax.nn.softmax(scores)

    @functools.partial(jax.jit, donate_argnums=0)
    def count(step: jax.Array) -> jax.Array:
        return step + 1

    def train_step(
        state: TrainState, batch: Batch, branches: Mapping[str, jax.Array], teacher_variables: Any
    ) -> tuple[TrainState, Metrics]:
        inputs = [prepare(batch, np.int32(i), teacher_variables) for i in range(parts)]
        metrics = {}
        for update, apply_update in updates:
            state, numbers = apply_update(state, inputs, branches)
            # When updates alternate, the last one's metrics are the phase's own, without a prefix.
            prefix = "" if update is span.phase.updates[-1] else f"{update.name}_"
            metrics |= {prefix + name: value for name, value in numbers.items()}
            for key, other in (further_budgets or {}).items() if update.budget_term else ():
                state, numbers = apply_update(
                    swap_search(state, key, update), inputs, branches, limit=other.limit
                )
                state = swap_search(state, key, update)
                metrics[f"cost_{key}"] = numbers["cost"]
        return state.replace(step=count(state.step)), metrics

    return _skipping(train_step) if config.max_skipped_steps else train_step


def _skipping(
    train_step: Callable[..., tuple[TrainState, Metrics]],
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Returns a step that only advances the step number if any value is non-finite.

    Skipped steps are counted in the state and in the metric `skipped_steps`.
    """

    @functools.partial(jax.jit, donate_argnums=1)
    def choose(
        before: TrainState, after: TrainState, metrics: Metrics
    ) -> tuple[TrainState, Metrics]:
        leaves = jax.tree.leaves((metrics, after.replace(rng=None)))
        finite = jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]).all()
        kept = jax.tree.map(functools.partial(jnp.where, finite), after, before)
        skipped = before.skipped_steps + (~finite).astype(jnp.int32)
        kept = kept.replace(step=after.step, skipped_steps=skipped)
        return kept, metrics | {"skipped_steps": skipped}

    def step(state: TrainState, *inputs: Any) -> tuple[TrainState, Metrics]:
        before = jax.tree.map(jnp.copy, state)  # the step consumes its state
        return choose(before, *train_step(state, *inputs))

    return step
