"""Calibration: step sizes initialized from data."""

from collections.abc import Callable, Sequence

from flax import linen as nn
from ml_collections import ConfigDict

from metamix_jax.networks.precision import Precision
from metamix_jax.training.step.batch_step import training_images
from metamix_jax.training.step.state import Batch, TrainState


def make_calibrate(
    model: nn.Module, precisions: Sequence[Precision], config: ConfigDict, *, train: bool
) -> Callable[[TrainState, Batch], TrainState]:
    """Returns a function that initializes step sizes from a batch, in passes at `precisions`.

    With `train`, batch norm uses the batch's statistics instead of the running ones, which are
    unchanged in either case.
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
    """Returns the passes that initialize the step sizes of activations and of weights."""
    lowest = "_lowest" if config.quant.init_pass == "lowest_bits" else ""
    passes = []
    if acts:
        passes.append(Precision(activations="calibrate" + lowest))
    if weights:
        passes.append(Precision(weights="calibrate"))
    return tuple(passes)
