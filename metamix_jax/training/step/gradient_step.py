"""One gradient step on a batch, as a row of the phase table describes it."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.traverse_util import unflatten_dict
from ml_collections import ConfigDict

from metamix_jax.networks.precision import bit_candidates
from metamix_jax.selection.budget import Budget, chosen_cost
from metamix_jax.selection.phases import Update, passes
from metamix_jax.training.step.optimizer import make_optimizer
from metamix_jax.training.step.state import GAP, Metrics, TrainState, branch_logits, split_by_label


def make_update(
    model: nn.Module,
    update: Update,
    steps: int,
    config: ConfigDict,
    budget: Budget | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Returns `apply(state, parts, branches, limit) -> (state, metrics)`.

    As `make_train_step`, it calls compiled parts and consumes the state. `parts` are the batch's
    micro-batches, each (images, labels, soft targets or None): the gradient is the mean of theirs,
    and each moves the running statistics on from where the one before left them. `limit` is by
    default the budget's.
    """
    optimizer = make_optimizer(update, steps, config)
    candidates = bit_candidates(config.quant.act_bits, config.quant.weight_bits)
    commit = update.name != "bit_search" or config.bit_search.commit_batch_stats
    last_only = update.name == "bit_meta" and config.bit_meta.loss == "last"

    def loss_of(trained, frozen, batch_stats, inputs, precision):
        images, labels, soft_targets, limit, rng = inputs
        variables = unflatten_dict({**frozen, **trained}, sep="/") | {"batch_stats": batch_stats}
        scores, moved = model.apply(
            variables, images, train=True, precision=precision,
            mutable=["batch_stats"], rngs={"dropout": rng},
        )  # fmt: skip
        loss = task_loss(scores, labels, soft_targets, config.loss)
        metrics = {"loss": loss, "accuracy": jnp.mean(jnp.argmax(scores, -1) == labels)}
        if update.budget_term:
            form = config.bit_search.budget_form
            logits = branch_logits({**frozen, **trained})
            spent = chosen_cost(budget.cost_model, logits, form)
            gap = jnp.abs(spent - limit) / budget.cost_model.reference
            metrics |= {"cost": spent, "budget_term": config.bit_search.budget_weight * gap}
            loss += metrics["budget_term"]
        return loss, (moved["batch_stats"], metrics)

    gradient_of = jax.value_and_grad(loss_of, has_aux=True)

    @jax.jit
    def zeros(state: TrainState) -> dict[str, jax.Array]:
        return jax.tree.map(jnp.zeros_like, split_by_label(state, update.trains)[0])

    @functools.partial(jax.jit, donate_argnums=0)
    def add_part(gradient, state, batch_stats, inputs, precision, number):
        trained, frozen = split_by_label(state, update.trains)
        rng = jax.random.fold_in(jax.random.fold_in(state.rng, state.step), number)
        (_, (batch_stats, metrics)), part = gradient_of(
            trained, frozen, batch_stats, (*inputs, rng), precision
        )
        share = 1 / config.accumulation_steps
        gradient = jax.tree.map(lambda total, part: total + share * part, gradient, part)
        return gradient, batch_stats, metrics

    def add_pass(gradient, state, batch_stats, parts, limit, precision, number):
        rows = []
        for part in parts:
            inputs, key = (*part, limit), np.int32(number * len(parts) + len(rows))
            gradient, batch_stats, metrics = add_part(
                gradient, state, batch_stats, inputs, precision, key
            )
            rows.append(metrics)
        return gradient, batch_stats, rows

    @functools.partial(jax.jit, donate_argnums=0)
    def descend(state, gradient, rows):
        count = len(rows) // config.accumulation_steps
        count = 1 if last_only else 2 if update.sharpness_aware else count
        gradient = jax.tree.map(lambda total: total / count, gradient)
        trained, frozen = split_by_label(state, update.trains)
        changes, opt_state = optimizer.update(gradient, state.opt_states[update.name], trained)
        tree = unflatten_dict({**frozen, **optax.apply_updates(trained, changes)}, sep="/")
        state = state.replace(
            params=tree["params"],
            quant=tree["quant"],
            opt_states=state.opt_states | {update.name: opt_state},
        )
        metrics = jax.tree.map(lambda *values: sum(values) / len(values), *rows)
        return state, metrics | {"gradient_norm": optax.tree.norm(gradient)}

    @jax.jit
    def climb(state, gradient):
        """Returns the state with its weights moved to where the loss is about greatest."""
        weights = {path: leaf for path, leaf in gradient.items() if path.startswith("params/")}
        radius = jnp.minimum(config.asga.max_radius, jnp.log1p(state.opt_states[GAP]))
        # Less a step downhill: aligns the two gradients without ever multiplying them.
        factor = radius / (optax.tree.norm(weights) + 1e-12) - config.asga.alignment
        trained, frozen = split_by_label(state, update.trains)
        moved = {path: trained[path] + factor * weights[path] for path in weights}
        return state.replace(params=unflatten_dict(frozen | trained | moved, sep="/")["params"])

    def apply_update(state, parts, branches, limit=None):
        if limit is None:
            limit = budget.limit if budget else 0.0
        limit = np.float32(limit)
        searched = branch_logits(split_by_label(state, {"logits"})[0])
        gradient, batch_stats, rows = zeros(state), state.batch_stats, []
        for number, precision in enumerate(passes(update, candidates, branches, searched)):
            if last_only:
                gradient = zeros(state)
            gradient, batch_stats, found = add_pass(
                gradient, state, batch_stats, parts, limit, precision, number
            )
            rows += found
        if update.sharpness_aware:
            # The second pass moves no running statistics, and its loss is not the step's.
            copy, perturbed = jax.tree.map(jnp.copy, gradient), climb(state, gradient)
            gradient, _, above = add_pass(
                copy, perturbed, state.batch_stats, parts, limit, precision, 0
            )
            rises = [up["loss"] - row["loss"] for up, row in zip(above, rows, strict=True)]
            gap = jnp.maximum(sum(rises) / len(rises), 0.0)
            state = state.replace(opt_states=state.opt_states | {GAP: gap})
        if commit:
            state = state.replace(batch_stats=batch_stats)
        return descend(state, gradient, rows)

    return apply_update


def task_loss(
    scores: jax.Array, labels: jax.Array, soft_targets: jax.Array | None, kind: str
) -> jax.Array:
    """Returns the batch's mean loss: cross-entropy, distillation (T = 1), or their sum."""
    loss = jnp.float32(0)
    if kind != "distillation":
        loss += optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()
    if kind != "cross_entropy":
        loss += optax.softmax_cross_entropy(scores, soft_targets).mean()
    return loss
