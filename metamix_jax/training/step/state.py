"""The training state, and how it changes between phases."""

from collections.abc import Mapping, Set
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from metamix_jax.selection.phases import Update
from metamix_jax.training.schedule import Span
from metamix_jax.training.step.optimizer import label, make_optimizer

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]


@struct.dataclass
class Search:
    """Logits trained alongside the state's own, for a further budget."""

    logits: dict[str, jax.Array]  # path -> [branches]
    opt_state: optax.OptState


@struct.dataclass
class TrainState:
    """Everything that training changes."""

    step: jax.Array  # int32 scalar, steps taken so far in all phases
    params: Any  # kernels, biases, batch norm's scale and bias
    batch_stats: Any  # running mean and variance
    quant: Any  # step sizes and architecture logits, see layers.py
    rng: jax.Array  # key for dropout
    opt_states: dict[str, optax.OptState] = struct.field(default_factory=dict)  # by update's name
    # Key of a further budget -> its search; only in phases that search.
    searches: dict[str, Search] = struct.field(default_factory=dict)
    surrogate_gap: jax.Array | None = None  # float32 scalar, of the last sharpness-aware step
    skipped_steps: jax.Array | None = None  # int32 scalar, with config.max_skipped_steps

    @property
    def variables(self) -> dict[str, Any]:
        """The collections that `model.apply` takes."""
        return {"params": self.params, "batch_stats": self.batch_stats, "quant": self.quant}

    def to_tree(self) -> dict[str, Any]:
        """Returns the state as saved in checkpoints: the collections, and "training".

        Everything but step and key is saved among the optimizer states, as in version 0.1.
        """
        others = {
            key: {"logits": search.logits, "optimizer": search.opt_state}
            for key, search in self.searches.items()
        }
        for name in ("surrogate_gap", "skipped_steps"):
            if getattr(self, name) is not None:
                others[name] = getattr(self, name)
        opt_states = self.opt_states | others
        training = {"opt_states": opt_states, "step": self.step, "rng": self.rng}
        return self.variables | {"training": training}

    def from_tree(self, tree: Mapping[str, Any]) -> "TrainState":
        """Returns a state of the same structure with the arrays of a tree from `to_tree`."""
        training = tree["training"]
        saved = training["opt_states"]
        searches = {
            key: Search(saved[key]["logits"], saved[key]["optimizer"]) for key in self.searches
        }
        return self.replace(
            **{name: tree[name] for name in self.variables},
            step=training["step"],
            rng=training["rng"],
            opt_states={name: saved[name] for name in self.opt_states},
            searches=searches,
            surrogate_gap=saved.get("surrogate_gap"),
            skipped_steps=saved.get("skipped_steps"),
        )


def split_by_label(state: TrainState, labels: Set[str]) -> tuple[dict, dict]:
    """Returns the leaves of params and quant with one of `labels`, and the rest, by path."""
    flat = flatten_dict({"params": state.params, "quant": state.quant}, sep="/")
    chosen = {path: leaf for path, leaf in flat.items() if label(path, leaf) in labels}
    return chosen, {path: leaf for path, leaf in flat.items() if path not in chosen}


def enter_phase(state: TrainState, span: Span, config: ConfigDict) -> TrainState:
    """Returns the state with the optimizer states of a phase.

    An update that the previous phase had too (bit-meta in the alternation) keeps its own.
    """

    def new_optimizer_state(update: Update) -> optax.OptState:
        optimizer = make_optimizer(update, span.steps, config)
        return optimizer.init(split_by_label(state, update.trains)[0])

    def new_search(update: Update) -> Search:
        logits = split_by_label(state, update.trains)[0]
        return Search(jax.tree.map(jnp.copy, logits), new_optimizer_state(update))

    opt_states, searches, gap, skipped = {}, {}, None, state.skipped_steps
    for update in span.phase.updates:
        opt_states[update.name] = state.opt_states.get(update.name) or new_optimizer_state(update)
        if update.budget_term:
            for key in further_searches(config):
                searches[key] = state.searches.get(key) or new_search(update)
        if update.sharpness_aware:
            # The gap whose radius, ln(gap + 1), is start_radius.
            gap = jnp.expm1(jnp.float32(config.asga.start_radius))
    if config.max_skipped_steps and skipped is None:
        skipped = jnp.int32(0)
    return state.replace(
        opt_states=opt_states, searches=searches, surrogate_gap=gap, skipped_steps=skipped
    )


def further_searches(config: ConfigDict) -> dict[str, float]:
    """Returns the budgets searched alongside config.budget.value: key -> value."""
    return {f"budget_{value:g}": value for value in config.search.budgets}


def branch_logits(flat: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns searched layer path -> logits [branches], from a flat dict by path."""
    return {
        path.removeprefix("quant/").removesuffix("/logits"): leaf
        for path, leaf in flat.items()
        if path.endswith("/logits")
    }


def with_logits(state: TrainState, logits: Mapping[str, jax.Array]) -> TrainState:
    """Returns the state with the given logits, path -> [branches]."""
    _, rest = split_by_label(state, {"logits"})
    return state.replace(quant=unflatten_dict(rest | dict(logits), sep="/")["quant"])


def swap_search(state: TrainState, key: str, update: Update) -> TrainState:
    """Swaps the logits and optimizer state of a search update with those of a further budget."""
    logits, _ = split_by_label(state, {"logits"})
    here, there = Search(logits, state.opt_states[update.name]), state.searches[key]
    return with_logits(state, there.logits).replace(
        opt_states=state.opt_states | {update.name: there.opt_state},
        searches=state.searches | {key: here},
    )
