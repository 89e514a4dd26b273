"""One gradient step on a batch, as described by an `Update` of the phase table.

The gradient is accumulated over passes and micro-batches (`accumulate`), then applied
(`apply_gradient`). By default these are small compiled functions, so that all passes share one of
them; blocks.py compiles them together, with a loop over the passes inside.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.traverse_util import unflatten_dict
from ml_collections import ConfigDict

from metamix_jax.networks.precision import Bits, Precision, bit_candidates
from metamix_jax.selection.budget import Budget, chosen_cost
from metamix_jax.selection.phases import Update
from metamix_jax.training.step.optimizer import label, make_optimizer
from metamix_jax.training.step.state import Metrics, TrainState, branch_logits, split_by_label

Gradient = dict[str, jax.Array]  # by path, as returned by split_by_label


def make_update(
    model: nn.Module,
    update: Update,
    steps: int,
    config: ConfigDict,
    budget: Budget | None = None,
    *,
    start: int = 0,
    scan: bool = False,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Returns `apply(state, parts, branches, limit) -> (state, metrics)`.

    Like `make_train_step`'s, it calls several compiled functions and consumes the state. `parts`
    are the batch's micro-batches, each (images, labels, soft targets or None): the gradient is the
    mean of theirs, and each updates the running statistics in turn. `limit` defaults to the
    budget's. The phase has `steps` steps, the first of them at `start`. With `scan`, passes and
    micro-batches are one `lax.scan`, for callers that compile the whole update.
    """
    optimizer = make_optimizer(update, steps, config)
    candidates = bit_candidates(config.quant.act_bits, config.quant.weight_bits)
    loss = functools.partial(objective, model=model, update=update, config=config, budget=budget)
    micro_batches = config.accumulation_steps

    @jax.jit
    def zeros(state: TrainState) -> Gradient:
        return jax.tree.map(jnp.zeros_like, split_by_label(state, update.trains)[0])

    @functools.partial(jax.jit, donate_argnums=0)
    def add_part(gradient, batch_stats, state, inputs, precision, number):
        if update.gradient == "last":  # starts again with every pass
            first = number % micro_batches == 0
            gradient = jax.tree.map(lambda total: jnp.where(first, 0, total), gradient)
        trained, frozen = split_by_label(state, update.trains)
        rng = jax.random.fold_in(jax.random.fold_in(state.rng, state.step), number)
        if update.last_temperature != 1:
            passed = (state.step - start) / steps
            precision = precision.replace(temperature=update.last_temperature**passed)
        part, batch_stats, metrics = pass_gradient(
            loss, trained, frozen, batch_stats, (*inputs, rng), precision
        )
        part = of_whole_batch(part, micro_batches)
        return accumulate(gradient, part, 1 / micro_batches), batch_stats, metrics

    def add_one_by_one(gradient, batch_stats, state, parts, limit, precisions):
        rows = []
        for precision, part in itertools.product(precisions, parts):
            gradient, batch_stats, metrics = add_part(
                gradient, batch_stats, state, (*part, limit), precision, np.int32(len(rows))
            )
            rows.append(metrics)
        return gradient, batch_stats, rows

    def add_in_scan(gradient, batch_stats, state, parts, limit, precisions):
        count = len(precisions) * micro_batches
        if count == 1:
            return add_one_by_one(gradient, batch_stats, state, parts, limit, precisions)
        pick_part, pick_precision = _picker(parts), _picker(precisions)

        def add(carry, number):
            part = pick_part(number % micro_batches)
            precision = pick_precision(number // micro_batches)
            *carry, metrics = add_part(*carry, state, (*part, limit), precision, number)
            return tuple(carry), metrics

        carry = gradient, batch_stats
        carry, rows = jax.lax.scan(add, carry, jnp.arange(count, dtype=jnp.int32))
        return *carry, [jax.tree.map(lambda row, i=i: row[i], rows) for i in range(count)]

    add_all = add_in_scan if scan else add_one_by_one

    @functools.partial(jax.jit, donate_argnums=0)
    def descend(state, gradient, rows):
        count = 1 if update.gradient == "last" else len(rows) // micro_batches
        gradient = jax.tree.map(lambda total: total / (count + update.sharpness_aware), gradient)
        state = apply_gradient(state, gradient, update, optimizer)
        metrics = jax.tree.map(lambda *values: sum(values) / len(values), *rows)
        return state, metrics | {"gradient_norm": optax.tree.norm(gradient)}

    ascend = jax.jit(functools.partial(sharpness_ascent, update=update, config_asga=config.asga))

    def apply_update(state, parts, branches, limit=None):
        if limit is None:
            limit = budget.limit if budget else 0.0
        limit = np.float32(limit)
        searched = branch_logits(split_by_label(state, {"logits"})[0])
        precisions = passes(update, candidates, branches, searched)
        gradient, batch_stats, rows = add_all(
            zeros(state), state.batch_stats, state, parts, limit, precisions
        )
        if update.sharpness_aware:
            # The second pass leaves the running statistics alone, and its loss is not reported.
            copy, perturbed = jax.tree.map(jnp.copy, gradient), ascend(state, gradient)
            gradient, _, above = add_all(
                copy, state.batch_stats, perturbed, parts, limit, precisions
            )
            state = state.replace(surrogate_gap=mean_rise(above, rows))
        if update.commits_statistics:
            state = state.replace(batch_stats=batch_stats)
        return descend(state, gradient, rows)

    return apply_update


def _picker(trees: Sequence[Any]) -> Callable[[jax.Array], Any]:
    """Returns a function from a traced number to that one of `trees`, which are alike."""
    if len(trees) == 1:
        return lambda number: trees[0]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
    return lambda number: jax.tree.map(lambda rows: rows[number], stacked)


def passes(
    update: Update,
    candidates: Sequence[Bits],
    branches: Mapping[str, jax.Array],
    searched: Iterable[str],
) -> tuple[Precision, ...]:
    """Returns how the network runs in each forward and backward pass of an update.

    Args:
      update: an update of a phase.
      candidates: the bit-widths of the branches.
      branches: the policy's branches, if there is one.
      searched: paths of the searched layers.

    Bit-meta runs from the narrowest candidate to the widest, so that the running statistics are
    updated in the order of the published code.
    """
    if update.every_branch:
        narrow_first = sorted(
            range(len(candidates)), key=lambda k: (math.prod(candidates[k]), candidates[k])
        )
        return tuple(
            # A chosen branch rather than a fixed one, so that all share one compiled pass.
            update.precision.replace(
                activations="chosen", branches={path: np.int32(k) for path in searched}
            )
            for k in narrow_first
        )
    return (update.precision.replace(branches=branches),)


def objective(
    trained: Gradient,
    frozen: Gradient,
    batch_stats: Any,
    inputs: tuple[Any, ...],
    precision: Precision,
    *,
    model: nn.Module,
    update: Update,
    config: ConfigDict,
    budget: Budget | None,
) -> tuple[jax.Array, tuple[Any, Metrics]]:
    """Returns the loss of one pass (Eq. 3 if there is a budget term), statistics and metrics.

    Args:
      trained: leaves to differentiate with respect to, by path.
      frozen: the other leaves.
      batch_stats: running statistics before the pass.
      inputs: images, labels, soft targets or None, budget limit, dropout key.
      precision: how the layers run.
      model: the network.
      update: whether the loss has a budget term.
      config: loss, form and weight of the budget term.
      budget: its cost model gives the cost in the budget term.
    """
    images, labels, soft_targets, limit, rng = inputs
    variables = unflatten_dict({**frozen, **trained}, sep="/") | {"batch_stats": batch_stats}
    scores, updated = model.apply(
        variables, images, train=True, precision=precision,
        mutable=["batch_stats"], rngs={"dropout": rng},
    )  # fmt: skip
    loss = task_loss(scores, labels, soft_targets, config.loss)
    metrics = {"loss": loss, "accuracy": jnp.mean(jnp.argmax(scores, -1) == labels)}
    if update.budget_term:
        options = config.bit_search
        logits = jax.tree.map(precision.at_temperature, branch_logits({**frozen, **trained}))
        spent = chosen_cost(budget.cost_model, logits, options.budget_form)
        # Two-sided as in the paper, unless what costs more is not better.
        distance = jnp.abs if budget.cost_model.worth_spending else jax.nn.relu
        gap = distance(spent - limit) / budget.cost_model.reference
        for other in budget.further:  # only as far as they are exceeded
            excess = chosen_cost(other.cost_model, logits, options.budget_form) - other.limit
            gap += jax.nn.relu(excess) / other.cost_model.reference
        metrics |= {"cost": spent, "budget_term": options.budget_weight * gap}
        loss += metrics["budget_term"]
        if precision.temperature is not None:
            metrics["temperature"] = precision.temperature
    return loss, (updated.get("batch_stats", {}), metrics)


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


def pass_gradient(
    loss: Callable[..., Any], trained: Gradient, *inputs: Any
) -> tuple[Gradient, Any, Metrics]:
    """Returns the gradient, running statistics and metrics of one pass over a micro-batch."""
    (_, (batch_stats, metrics)), gradient = jax.value_and_grad(loss, has_aux=True)(trained, *inputs)
    return gradient, batch_stats, metrics


def accumulate(total: Gradient, part: Gradient, share: float) -> Gradient:
    """Returns total + share * part."""
    return jax.tree.map(lambda total, part: total + share * part, total, part)


def of_whole_batch(part: Gradient, micro_batches: int) -> Gradient:
    """Returns a micro-batch's gradient with LSQ's scale of the whole batch.

    The gradient of an activation's step size is scaled by 1 / sqrt(N * Qp), N the number of
    quantized elements: those of all micro-batches together.
    """
    if micro_batches == 1:
        return part
    return {
        path: leaf / micro_batches**0.5 if label(path, leaf) == "act_steps" else leaf
        for path, leaf in part.items()
    }


def apply_gradient(
    state: TrainState, gradient: Gradient, update: Update, optimizer: optax.GradientTransformation
) -> TrainState:
    """Returns the state after the optimizer's step; leaves not trained by it are unchanged."""
    trained, frozen = split_by_label(state, update.trains)
    changes, opt_state = optimizer.update(gradient, state.opt_states[update.name], trained)
    tree = unflatten_dict({**frozen, **optax.apply_updates(trained, changes)}, sep="/")
    return state.replace(
        params=tree["params"],
        quant=tree["quant"],
        opt_states=state.opt_states | {update.name: opt_state},
    )


def sharpness_ascent(
    state: TrainState, gradient: Gradient, *, update: Update, config_asga: ConfigDict
) -> TrainState:
    """Returns the state with its weights moved to approximately the greatest loss nearby (ASGA).

    w + g (radius / |g| - alignment), radius = min(max_radius, ln(surrogate gap + 1)), with g the
    gradient of the weights; step sizes and logits are unchanged.
    """
    weights = {path: leaf for path, leaf in gradient.items() if path.startswith("params/")}
    radius = jnp.minimum(config_asga.max_radius, jnp.log1p(state.surrogate_gap))
    # The alignment is a step downhill; it aligns the two gradients without computing their product.
    factor = radius / (optax.tree.norm(weights) + 1e-12) - config_asga.alignment
    trained, frozen = split_by_label(state, update.trains)
    moved = {path: trained[path] + factor * weights[path] for path in weights}
    return state.replace(params=unflatten_dict(frozen | trained | moved, sep="/")["params"])


def mean_rise(above: Sequence[Metrics], rows: Sequence[Metrics]) -> jax.Array:
    """Returns the surrogate gap: the mean increase of the loss, at least 0."""
    rises = [up["loss"] - row["loss"] for up, row in zip(above, rows, strict=True)]
    return jnp.maximum(sum(rises) / len(rises), 0.0)
