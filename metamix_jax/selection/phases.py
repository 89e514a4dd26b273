"""Training phases as a table (MetaMix, Algorithm 1 and weight training).

A phase is a row: the gradient steps made on each batch, and how the network is evaluated. A
searcher names the rows it needs; the loop in loop.py knows none of them.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from metamix_jax.errors import UserError
from metamix_jax.networks.precision import FULL, Bits, Precision, bit_candidates

MOST_STEPS = 2**28  # of a phase; all are counted as int32
WEIGHTS = frozenset({"kernels", "weights"})  # labels of optimizer.label


@dataclasses.dataclass(frozen=True)
class Update:
    """One gradient step on a batch."""

    name: str  # also the key of its optimizer state
    trains: frozenset[str]  # labels of what moves; everything else stays bitwise as it is
    precision: Precision
    every_branch: bool = False  # one pass for each branch in place of precision.activations, Eq. 1
    budget_term: bool = False  # adds the BOPs regulariser, Eq. 3 and 4
    sharpness_aware: bool = False  # a second gradient where the loss is about greatest, ASGA

    def passes(self, branches: int) -> int:
        """Returns how many forward and backward passes a step makes."""
        return branches if self.every_branch else 1 + self.sharpness_aware


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stretch of training steps of one kind."""

    name: str
    updates: tuple[Update, ...]
    evaluation: Precision  # how the network is judged during and after it
    needs_policy: bool = False

    @property
    def quantizes(self) -> bool:
        """Whether activations are quantized, so that their step sizes must be initialised."""
        return self.evaluation.activations != "full"

    @property
    def quantizes_weights(self) -> bool:
        """The same for weights."""
        return self.evaluation.weights != "full"


_ACTS_CHOSEN = Precision(activations="chosen")
_ALL_CHOSEN = Precision(activations="chosen", weights="quantized")

FULL_PRECISION = Update("full_precision", WEIGHTS, FULL)
BIT_META = Update("bit_meta", WEIGHTS | {"act_steps"}, FULL, every_branch=True)
BIT_SEARCH = Update(
    "bit_search", frozenset({"logits"}), Precision(activations="mixture"), budget_term=True
)
# The ablation without a fixed meta-state (Fig. 7a): the same loss trains everything.
BIT_SEARCH_UNFIXED = dataclasses.replace(BIT_SEARCH, trains=WEIGHTS | {"act_steps", "logits"})
JOINT_SEARCH = dataclasses.replace(BIT_SEARCH_UNFIXED, name="joint_search")
SHARPNESS_SEARCH = dataclasses.replace(
    BIT_SEARCH_UNFIXED, name="sharpness_search", sharpness_aware=True
)
ACT_TRAINING = Update("act_training", WEIGHTS | {"act_steps"}, _ACTS_CHOSEN)
WEIGHT_TRAINING = Update("weight_training", WEIGHTS | {"act_steps", "weight_steps"}, _ALL_CHOSEN)

PHASES = {
    phase.name: phase
    for phase in (
        Phase("full_precision", (FULL_PRECISION,), FULL),
        Phase("bit_meta", (BIT_META,), _ACTS_CHOSEN),
        Phase("bit_search", (BIT_META, BIT_SEARCH), _ACTS_CHOSEN),
        Phase("joint_search", (JOINT_SEARCH,), _ACTS_CHOSEN),
        Phase("sharpness_search", (SHARPNESS_SEARCH,), _ACTS_CHOSEN),
        Phase("act_training", (ACT_TRAINING,), _ACTS_CHOSEN, needs_policy=True),
        Phase("weight_training", (WEIGHT_TRAINING,), _ALL_CHOSEN, needs_policy=True),
    )
}


@dataclasses.dataclass(frozen=True)
class Span:
    """A phase in place: it makes the steps start, ..., stop - 1."""

    phase: Phase
    start: int
    stop: int
    calibrates_acts: bool  # the first phase with quantized activations
    calibrates_weights: bool  # with quantized weights, and none in the phase before

    @property
    def steps(self) -> int:
        """Number of steps."""
        return self.stop - self.start


def make_schedule(
    config: ConfigDict, searcher_phases: Sequence[str], steps_per_epoch: float
) -> tuple[Span, ...]:
    """Returns the spans of all phases of more than 0 epochs, in order.

    Searches without a meta-state get as many forward passes as MetaMix's two phases together.
    """
    branches = len(bit_candidates(config.quant.act_bits, config.quant.weight_bits))
    passes_of_metamix = config.bit_meta.epochs * branches + config.bit_search.epochs * (
        branches + 1
    )
    epochs = {
        "full_precision": config.full_precision.epochs,
        "bit_meta": config.bit_meta.epochs,
        "bit_search": config.bit_search.epochs,
        "joint_search": passes_of_metamix,
        "sharpness_search": passes_of_metamix / 2,
        "act_training": config.weight_training.act_epochs,
        "weight_training": config.weight_training.epochs,
    }
    spans, start, calibrated, weights_quantized = [], 0, False, False
    for name in ("full_precision", *searcher_phases):
        phase = _configured(PHASES[name], config)
        if not epochs[name] * steps_per_epoch < MOST_STEPS:
            raise UserError(
                f"{name}: {epochs[name]:g} epochs are {epochs[name] * steps_per_epoch:g} steps, "
                f"expected at most {MOST_STEPS}; lower the epochs"
            )
        # Rounded first: 51 / 390.625 epochs are 51 steps, not 52.
        steps = math.ceil(round(epochs[name] * steps_per_epoch, 6))
        if steps == 0:
            continue
        spans.append(
            Span(
                phase,
                start,
                start + steps,
                calibrates_acts=phase.quantizes and not calibrated,
                calibrates_weights=phase.quantizes_weights and not weights_quantized,
            )
        )
        calibrated |= phase.quantizes
        weights_quantized = phase.quantizes_weights
        start += steps
    return tuple(spans)


def _configured(phase: Phase, config: ConfigDict) -> Phase:
    """Returns a row with the configuration's ablations, and quantized weights if searched."""
    if phase.name == "bit_search":
        options = config.bit_search
        search = BIT_SEARCH if options.fixed_meta_state else BIT_SEARCH_UNFIXED
        updates = (BIT_META, search) if options.alternate else (search,)
        phase = dataclasses.replace(phase, updates=updates)
    searching = phase.quantizes and not phase.needs_policy
    if searching and len(config.quant.weight_bits) > 1:
        phase = dataclasses.replace(
            phase,
            updates=tuple(map(_with_quantized_weights, phase.updates)),
            evaluation=phase.evaluation.replace(weights="quantized"),
        )
    return phase


def _with_quantized_weights(update: Update) -> Update:
    trains = update.trains | ({"weight_steps"} if "act_steps" in update.trains else set())
    precision = update.precision.replace(weights="quantized")
    return dataclasses.replace(update, trains=trains, precision=precision)


def phase_at(step: int, schedule: Sequence[Span]) -> Span:
    """Returns the span that makes step number `step`, counted from 0."""
    for span in schedule:
        if span.start <= step < span.stop:
            return span
    raise IndexError(f"step {step} is outside the schedule's {schedule[-1].stop} steps")


def passes(
    update: Update,
    candidates: Sequence[Bits],
    branches: Mapping[str, jax.Array],
    searched: Iterable[str],
) -> tuple[Precision, ...]:
    """Returns how the network runs in each forward and backward pass of an update.

    Args:
      update: a row's update.
      candidates: what the branches stand for.
      branches: the policy's, where there is one.
      searched: paths of the searched layers.

    Bit-meta goes from the narrowest candidate to the widest, so that the running statistics see
    the widths in the order of the published code.
    """
    if update.every_branch:
        narrow_first = sorted(
            range(len(candidates)), key=lambda k: (math.prod(candidates[k]), candidates[k])
        )
        return tuple(
            # As a chosen branch, and not as a fixed one, so that one compiled pass serves all.
            update.precision.replace(
                activations="chosen", branches={path: np.int32(k) for path in searched}
            )
            for k in narrow_first
        )
    return (update.precision.replace(branches=branches),)
