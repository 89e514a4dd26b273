"""The training state, and what it is made of from phase to phase."""

from collections.abc import Mapping, Set
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from metamix_jax.selection.phases import Span, Update
from metamix_jax.training.step.optimizer import label, make_optimizer

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]
# Beside the optimizer states:
GAP = "surrogate_gap"  # of the last sharpness-aware step
SKIPPED = "skipped_steps"  # over all phases, with config.max_skipped_steps


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

        def new_optimizer_state(update: Update = update) -> optax.OptState:
            optimizer = make_optimizer(update, span.steps, config)
            return optimizer.init(split_by_label(state, update.trains)[0])

        opt_states[update.name] = state.opt_states.get(update.name, new_optimizer_state())
        if update.sharpness_aware:
            # The gap whose radius, ln(gap + 1), is the one to start with.
            opt_states[GAP] = jnp.expm1(jnp.float32(config.asga.start_radius))
        for key in further_searches(config) if update.name == "bit_search" else ():
            logits = split_by_label(state, update.trains)[0]
            copy = {"logits": jax.tree.map(jnp.copy, logits), "optimizer": new_optimizer_state()}
            opt_states[key] = state.opt_states.get(key, copy)
    if config.max_skipped_steps:
        opt_states[SKIPPED] = state.opt_states.get(SKIPPED, jnp.int32(0))
    return state.replace(opt_states=opt_states)


def further_searches(config: ConfigDict) -> dict[str, float]:
    """Returns the budgets searched beside config.budget.value: key -> value."""
    return {f"budget_{value:g}": value for value in config.search.budgets}


def branch_logits(flat: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns searched layer path -> logits [branches], from a flat dict by path."""
    return {
        path.removeprefix("quant/").removesuffix("/logits"): leaf
        for path, leaf in flat.items()
        if path.endswith("/logits")
    }


def swap_search(state: TrainState, key: str) -> TrainState:
    """Exchanges the search's logits and optimizer state for those kept under `key`."""
    logits, rest = split_by_label(state, {"logits"})
    kept = state.opt_states[key]
    return state.replace(
        quant=unflatten_dict(rest | kept["logits"], sep="/")["quant"],
        opt_states=state.opt_states
        | {"bit_search": kept["optimizer"]}
        | {key: {"logits": logits, "optimizer": state.opt_states["bit_search"]}},
    )
