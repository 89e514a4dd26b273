"""The training state and the compiled step: what one batch does in one phase."""

from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from metamix_jax import data
from metamix_jax.budget import Budget, chosen_cost
from metamix_jax.phases import Span, Update, passes
from metamix_jax.precision import Precision, bit_candidates

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]


@struct.dataclass
class TrainState:
    """Everything that training changes."""

    step: jax.Array  # int32 scalar, steps made so far over all phases
    params: Any  # kernels, biases, batch norm's scale and bias
    batch_stats: Any  # running mean and variance
    quant: Any  # step sizes and architecture logits, see layers.py
    opt_states: dict[str, optax.OptState]  # update name -> state, of the current phase
    rng: jax.Array  # key for dropout

    @property
    def variables(self) -> dict[str, Any]:
        """The collections that `model.apply` takes."""
        return {"params": self.params, "batch_stats": self.batch_stats, "quant": self.quant}


def label(path: str, leaf: jax.Array) -> str:
    """Returns what kind of trained thing lies at `path`, e.g. `params/conv1/kernel`."""
    name = path.rsplit("/", 1)[-1]
    if path.startswith("quant/"):
        return {"act_step": "act_steps", "weight_step": "weight_steps", "logits": "logits"}[name]
    # Weight decay applies to convolution kernels alone.
    return "kernels" if name == "kernel" and leaf.ndim == 4 else "weights"


def make_optimizer(update: Update, steps: int, config: ConfigDict) -> optax.GradientTransformation:
    """Returns the optimizer of an update: one transformation per label that it trains.

    Args:
      update: a row's update.
      steps: length of the phase, for the cosine schedules.
      config: optimizer, and the phase's own section for learning rates.
    """
    options = config.optimizer
    rate = _learning_rate(update, steps, config)

    def base() -> optax.GradientTransformation:
        if options.name == "sgd":
            return optax.sgd(rate, momentum=options.b1, nesterov=True)
        return optax.adam(rate, b1=options.b1, b2=options.b2, eps=options.eps)

    search = config.bit_search
    transforms = {
        "kernels": optax.chain(optax.add_decayed_weights(options.weight_decay), base()),
        "weights": base(),
        "act_steps": base(),
        "weight_steps": base(),
        "logits": optax.chain(
            optax.add_decayed_weights(search.weight_decay),
            optax.adam(search.learning_rate, b1=search.b1, b2=search.b2, eps=options.eps),
        ),
    }
    # Sorted: a set's order differs from process to process, and the compiled program with it.
    split = optax.multi_transform(
        {name: transforms[name] for name in sorted(update.trains)},
        lambda flat: {path: label(path, leaf) for path, leaf in flat.items()},
    )
    clip = optax.masked(
        optax.clip_by_global_norm(options.clip_norm),
        lambda flat: {path: label(path, leaf) != "logits" for path, leaf in flat.items()},
    )
    return optax.chain(clip, split)


def _learning_rate(update: Update, steps: int, config: ConfigDict) -> optax.Schedule:
    if update.name in ("bit_meta", "bit_search"):
        return optax.constant_schedule(config.bit_meta.learning_rate)
    section = {"act_training": "weight_training"}.get(update.name, update.name)
    return optax.cosine_decay_schedule(config[section].learning_rate, steps)


def training_images(batch: Batch, config: ConfigDict) -> jax.Array:
    """Returns the batch's images [b, h, w, c] as the network sees them in training."""
    options = config.data
    images = data.augment(
        batch["image"], batch["index"], batch["epoch"], seed=config.seed, kind=options.augment
    )
    return data.preprocess(images, mean=options.mean, std=options.std)


def split_by_label(state: TrainState, labels: Set[str]) -> tuple[dict, dict]:
    """Returns params and quant with one of `labels`, and the rest, as flat dicts by path."""
    flat = flatten_dict({"params": state.params, "quant": state.quant}, sep="/")
    chosen = {path: leaf for path, leaf in flat.items() if label(path, leaf) in labels}
    return chosen, {path: leaf for path, leaf in flat.items() if path not in chosen}


def enter_phase(state: TrainState, span: Span, config: ConfigDict) -> TrainState:
    """Returns the state with the optimizer states of a phase.

    An update that the phase before had too (bit-meta in the alternation) goes on with its own.
    """
    opt_states = {}
    for update in span.phase.updates:
        fresh = make_optimizer(update, span.steps, config).init(
            split_by_label(state, update.trains)[0]
        )
        opt_states[update.name] = state.opt_states.get(update.name, fresh)
    return state.replace(opt_states=opt_states)


def make_train_step(
    model: nn.Module,
    span: Span,
    config: ConfigDict,
    budget: Budget | None,
    teacher: nn.Module | None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Returns `step(state, batch, branches, teacher_variables) -> (state, metrics)`, to be jitted.

    Args:
      model: the network.
      span: the phase and its length.
      config: the run's configuration.
      budget: for updates with a budget term.
      teacher: network that gives the soft targets, or None.
    """
    updates = [
        (update, make_update(model, update, span.steps, config, budget))
        for update in span.phase.updates
    ]

    def train_step(
        state: TrainState, batch: Batch, branches: Mapping[str, jax.Array], teacher_variables: Any
    ) -> tuple[TrainState, Metrics]:
        images = training_images(batch, config)
        soft_targets = None
        if teacher is not None:
            soft_targets = jax.nn.softmax(teacher.apply(teacher_variables, images, train=False))
        metrics = {}
        for update, apply_update in updates:
            state, numbers = apply_update(state, images, batch["label"], soft_targets, branches)
            # Of the alternation, the search's numbers are the phase's own.
            prefix = "" if update.name == span.phase.name else f"{update.name}_"
            metrics |= {prefix + name: value for name, value in numbers.items()}
        return state.replace(step=state.step + 1), metrics

    return train_step


def make_update(
    model: nn.Module,
    update: Update,
    steps: int,
    config: ConfigDict,
    budget: Budget | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Returns `apply(state, images, labels, soft_targets, branches) -> (state, metrics)`."""
    optimizer = make_optimizer(update, steps, config)
    candidates = bit_candidates(config.quant.act_bits, config.quant.weight_bits)
    commit = update.name != "bit_search" or config.bit_search.commit_batch_stats

    def loss_of(trained, frozen, batch_stats, inputs, precision):
        images, labels, soft_targets, rng = inputs
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
            spent = chosen_cost(budget, logits, form)
            gap = jnp.abs(spent - budget.limit) / budget.reference
            metrics |= {"cost": spent, "budget_term": config.bit_search.budget_weight * gap}
            loss += metrics["budget_term"]
        return loss, (moved["batch_stats"], metrics)

    gradient_of = jax.value_and_grad(loss_of, has_aux=True)

    def apply_update(state, images, labels, soft_targets, branches):
        trained, frozen = split_by_label(state, update.trains)
        runs = passes(update, candidates, branches)
        batch_stats, gradients, rows = state.batch_stats, [], []
        for number, precision in enumerate(runs):
            rng = jax.random.fold_in(jax.random.fold_in(state.rng, state.step), number)
            inputs = (images, labels, soft_targets, rng)
            (_, (batch_stats, metrics)), gradient = gradient_of(
                trained, frozen, batch_stats, inputs, precision
            )
            gradients.append(gradient)
            rows.append(metrics)
        if update.name == "bit_meta" and config.bit_meta.loss == "last":
            gradient = gradients[-1]
        else:
            gradient = jax.tree.map(lambda *parts: sum(parts) / len(parts), *gradients)
        changes, opt_state = optimizer.update(gradient, state.opt_states[update.name], trained)
        tree = unflatten_dict({**frozen, **optax.apply_updates(trained, changes)}, sep="/")
        state = state.replace(
            params=tree["params"],
            quant=tree["quant"],
            batch_stats=batch_stats if commit else state.batch_stats,
            opt_states=state.opt_states | {update.name: opt_state},
        )
        metrics = jax.tree.map(lambda *values: sum(values) / len(values), *rows)
        return state, metrics | {"gradient_norm": optax.tree.norm(gradient)}

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


def branch_logits(flat: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns searched layer path -> logits [branches], from a flat dict by path."""
    return {
        path.removeprefix("quant/").removesuffix("/logits"): leaf
        for path, leaf in flat.items()
        if path.endswith("/logits")
    }


def make_calibrate(
    model: nn.Module, precisions: Sequence[Precision], config: ConfigDict, *, train: bool
) -> Callable[[TrainState, Batch], TrainState]:
    """Returns the function that initialises step sizes from a batch, in passes at `precisions`.

    `train`: normalises with the batch's statistics instead of the running ones, which stay as they
    are in either case.
    """

    def calibrate(state: TrainState, batch: Batch) -> TrainState:
        images = training_images(batch, config)
        for precision in precisions:
            _, moved = model.apply(
                state.variables, images, train=train, mutable=["quant", "batch_stats"],
                precision=precision, rngs={"dropout": state.rng},
            )  # fmt: skip
            state = state.replace(quant=moved["quant"])
        return state

    return calibrate


def calibrations(config: ConfigDict, *, acts: bool, weights: bool) -> tuple[Precision, ...]:
    """Returns the passes that initialise the step sizes of activations and of weights."""
    lowest = "_lowest" if config.quant.init_pass == "lowest_bits" else ""
    found = []
    if acts:
        found.append(Precision(activations="calibrate" + lowest))
    if weights:
        found.append(Precision(weights="calibrate"))
    return tuple(found)
