"""Training phases as rows (MetaMix, Algorithm 1 and weight training).

A phase is a row: its length, the gradient steps on each batch, and how the network is evaluated. A
row is built from the configuration by a function named after it, the only place where ablations
are read from the configuration; training code depends on the row's fields, never on its name. A
searcher lists the rows it needs and may define its own (searchers/joint.py, asga.py).
"""

import dataclasses
from collections.abc import Callable

from ml_collections import ConfigDict

from metamix_jax.networks.precision import FULL, Precision, bit_candidates

WEIGHTS = frozenset({"kernels", "weights"})  # labels that an update trains, see optimizer.py
ACT_STEPS, WEIGHT_STEPS, LOGITS = (
    frozenset({label}) for label in ("act_steps", "weight_steps", "logits")
)


@dataclasses.dataclass(frozen=True)
class Update:
    """One gradient step on a batch."""

    name: str  # also the key of the optimizer state
    trains: frozenset[str]  # labels of the trained leaves; all others stay bitwise unchanged
    precision: Precision  # how the network runs
    learning_rate: float  # of weights and step sizes; logits use config.bit_search.learning_rate
    schedule: str = "constant"  # "cosine": from learning_rate to 0 over the phase
    every_branch: bool = False  # one pass per branch instead of precision.activations, Eq. 1
    gradient: str = "mean"  # over the passes; "last": of the last pass alone
    budget_term: bool = False  # adds the budget regularizer to the loss, Eq. 3 and 4
    last_temperature: float = 1.0  # of the mixture's softmax, falling to it from 1 over the phase
    sharpness_aware: bool = False  # a second pass at about the greatest loss nearby, ASGA
    commits_statistics: bool = True  # the passes update batch norm's running statistics

    def passes(self, branches: int) -> int:
        """Returns the number of forward and backward passes per step."""
        return branches if self.every_branch else 1 + self.sharpness_aware


@dataclasses.dataclass(frozen=True)
class Phase:
    """Consecutive training steps of the same kind."""

    name: str
    epochs: float  # of the training split; 0 skips the phase
    updates: tuple[Update, ...]  # applied in turn to each batch; the last is the phase's own
    evaluation: Precision  # how the network is evaluated during and after it
    needs_policy: bool = False

    @property
    def quantizes(self) -> bool:
        """Whether activations are quantized, so that their step sizes must be calibrated."""
        return self.evaluation.activations != "full"

    @property
    def quantizes_weights(self) -> bool:
        """Whether weights are quantized, so that their step sizes must be calibrated."""
        return self.evaluation.weights != "full"


Row = Callable[[ConfigDict], Phase]


def full_precision(config: ConfigDict) -> Phase:
    """Full-precision training, for runs without pretrained weights."""
    options = config.full_precision
    update = Update("full_precision", WEIGHTS, FULL, options.learning_rate, schedule="cosine")
    return Phase("full_precision", options.epochs, (update,), FULL)


def bit_meta(config: ConfigDict) -> Phase:
    """Bit-meta training: the loss averaged over all candidate bit-widths (Eq. 1)."""
    update = _bit_meta_update(config)
    return Phase("bit_meta", config.bit_meta.epochs, (update,), search_evaluation(config))


def bit_search(config: ConfigDict) -> Phase:
    """Bit-search training, alternating with bit-meta on the same batch (Eq. 2 to 5)."""
    options = config.bit_search
    # The ablation without a fixed meta-state (Fig. 7a) trains everything on the same loss.
    search = search_update(config, "bit_search", fixed_meta_state=options.fixed_meta_state)
    search = dataclasses.replace(search, commits_statistics=options.commit_batch_stats)
    updates = (_bit_meta_update(config), search) if options.alternate else (search,)
    return Phase("bit_search", options.epochs, updates, search_evaluation(config))


def act_training(config: ConfigDict) -> Phase:
    """First stage of weight training: activations at the chosen bits, full-precision weights."""
    options, precision = config.weight_training, Precision(activations="chosen")
    update = Update(
        "act_training", WEIGHTS | ACT_STEPS, precision, options.learning_rate, schedule="cosine"
    )
    return Phase("act_training", options.act_epochs, (update,), precision, needs_policy=True)


def weight_training(config: ConfigDict) -> Phase:
    """Second stage of weight training: activations and weights at the chosen bits."""
    options, precision = config.weight_training, Precision("chosen", "quantized")
    trains = WEIGHTS | ACT_STEPS | WEIGHT_STEPS
    update = Update("weight_training", trains, precision, options.learning_rate, schedule="cosine")
    return Phase("weight_training", options.epochs, (update,), precision, needs_policy=True)


FINE_TUNING: tuple[Row, ...] = (act_training, weight_training)


def search_update(config: ConfigDict, name: str, *, fixed_meta_state: bool) -> Update:
    """Returns the step on the softmax mixture that trains the logits (Eq. 2 to 5).

    Without a fixed meta-state, the same loss also trains weights and step sizes.
    """
    trains = LOGITS if fixed_meta_state else LOGITS | _meta_state(config)
    precision = Precision(activations="mixture", weights=_searched_weights(config))
    return Update(
        name,
        trains,
        precision,
        config.bit_meta.learning_rate,
        budget_term=True,
        last_temperature=config.bit_search.last_temperature,
    )


def search_evaluation(config: ConfigDict) -> Precision:
    """Returns how the network is evaluated before the policy is known."""
    return Precision(activations="chosen", weights=_searched_weights(config))


def passes_per_batch(phase: Phase, config: ConfigDict) -> int:
    """Returns the number of forward and backward passes of a phase on each batch."""
    branches = len(bit_candidates(config.quant.act_bits, config.quant.weight_bits))
    searches = 1 + len(config.search.budgets)
    return sum(
        update.passes(branches) * (searches if "logits" in update.trains else 1)
        for update in phase.updates
    )


def metamix_passes(config: ConfigDict) -> float:
    """Returns the number of passes over the training split in MetaMix's two search phases.

    Searches without a meta-state get the same number.
    """
    branches = len(bit_candidates(config.quant.act_bits, config.quant.weight_bits))
    return config.bit_meta.epochs * branches + config.bit_search.epochs * (branches + 1)


def _bit_meta_update(config: ConfigDict) -> Update:
    return Update(
        "bit_meta",
        _meta_state(config),
        Precision(weights=_searched_weights(config)),
        config.bit_meta.learning_rate,
        every_branch=True,
        gradient=config.bit_meta.loss,
    )


def _meta_state(config: ConfigDict) -> frozenset[str]:
    searched = _searched_weights(config) == "quantized"
    return WEIGHTS | ACT_STEPS | (WEIGHT_STEPS if searched else frozenset())


def _searched_weights(config: ConfigDict) -> str:
    """Returns Precision.weights before the policy: quantized if weight bits are searched."""
    return "quantized" if len(config.quant.weight_bits) > 1 else "full"
