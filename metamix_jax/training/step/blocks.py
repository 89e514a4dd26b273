"""Blocks of training steps: one compiled program runs all steps of a block.

On an accelerator, a step as several small programs is bound by launching them. In one program with
a loop over steps, XLA also records the step as a graph, which the device replays by itself.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from metamix_jax.data.splits import MemorySplit, Split
from metamix_jax.training.step.state import Batch, Metrics, TrainState

MOST_STEPS = 16  # of a block that is not configured
MOST_RESIDENT_BYTES = 2**30  # of a training split that is kept on the device


def block_steps(config: ConfigDict, split: Split) -> int:
    """Returns the number of steps of a block; 0: each step is several programs.

    config.steps_per_dispatch, or if that is 0: none on CPU; on accelerators as many steps as fit
    evenly between logs, checkpoints and evaluations, if the split fits on the device, else 1.
    """
    if config.steps_per_dispatch:
        return config.steps_per_dispatch
    if jax.default_backend() == "cpu":
        return 0
    common = math.gcd(*intervals(config))
    most = MOST_STEPS if fits_on_device(split) else 1
    return next(steps for steps in range(most, 0, -1) if common % steps == 0)


def intervals(config: ConfigDict) -> tuple[int, ...]:
    """Returns the intervals at which a run does something between two steps."""
    found = config.log_every_steps, config.checkpoint_every_steps, config.eval.every_steps
    return tuple(interval for interval in found if interval)


def block_lengths(start: int, stop: int, steps: int, every: Sequence[int]) -> Iterator[int]:
    """Yields the lengths of the blocks that cover steps start to stop - 1.

    A block ends at every multiple of an interval in `every`. All are `steps` long or, where that
    does not fit, 1, so that at most two programs are compiled.
    """
    while start < stop:
        end = min(stop, *(start + interval - start % interval for interval in every))
        length = steps if end - start >= steps else 1
        yield length
        start += length


def fits_on_device(split: Split) -> bool:
    """Returns whether a split is kept on the device: decoded, small, and in a single process."""
    return (
        isinstance(split, MemorySplit)
        and split.images.nbytes <= MOST_RESIDENT_BYTES
        and jax.process_count() == 1
    )


def in_blocks(
    train_step: Callable[..., tuple[TrainState, Metrics]],
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Returns `run(state, batches, resident, branches, teacher_variables) -> (state, metrics)`.

    It is one compiled program and consumes (donates) the given state.

    Args:
      train_step: a step of `make_train_step` with `scan`.

    `batches` are those of the block, stacked [steps, ...]; where `resident` has the training
    split's `image` [n, h, w, c] and `label` [n], they need only `index` and `epoch`. Metrics are
    [steps].
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def run(
        state: TrainState,
        batches: Batch,
        resident: Batch,
        branches: Mapping[str, jax.Array],
        teacher_variables: Any,
    ) -> tuple[TrainState, Metrics]:
        def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
            rows = {
                name: whole.at[batch["index"]].get(mode="promise_in_bounds")
                for name, whole in resident.items()
            }
            return train_step(state, {**batch, **rows}, branches, teacher_variables)

        return jax.lax.scan(step, state, batches)

    return run
