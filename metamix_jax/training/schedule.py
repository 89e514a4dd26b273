"""The schedule of a run: which phase covers which steps."""

import dataclasses
import math
from collections.abc import Sequence

from metamix_jax.errors import UserError
from metamix_jax.selection.phases import Phase

MOST_STEPS = 2**28  # per phase; steps are counted as int32


@dataclasses.dataclass(frozen=True)
class Span:
    """A phase and its steps, start to stop - 1."""

    phase: Phase
    start: int
    stop: int
    calibrates_acts: bool  # the first phase with quantized activations
    calibrates_weights: bool  # quantized weights, unlike the previous phase

    @property
    def steps(self) -> int:
        """Number of steps."""
        return self.stop - self.start


def make_spans(phases: Sequence[Phase], steps_per_epoch: float) -> tuple[Span, ...]:
    """Returns the spans of all phases with more than 0 epochs, in order.

    Raises:
      UserError: a phase has more than MOST_STEPS steps.
    """
    spans, start, calibrated, weights_quantized = [], 0, False, False
    for phase in phases:
        if not phase.epochs * steps_per_epoch < MOST_STEPS:
            raise UserError(
                f"{phase.name}: {phase.epochs:g} epochs are {phase.epochs * steps_per_epoch:g} "
                f"steps, expected at most {MOST_STEPS}; lower the epochs"
            )
        # Rounded before ceil: 51 / 390.625 epochs are 51 steps, not 52.
        steps = math.ceil(round(phase.epochs * steps_per_epoch, 6))
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


def phase_at(step: int, schedule: Sequence[Span]) -> Span:
    """Returns the span that contains step `step`, counted from 0."""
    for span in schedule:
        if span.start <= step < span.stop:
            return span
    raise IndexError(f"step {step} is outside the schedule's {schedule[-1].stop} steps")
