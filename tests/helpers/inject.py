"""Runs main.py with one gradient entry set to NaN at some steps.

    python -m tests.helpers.inject 3,5 --config=FILE --workdir=DIR ...

Steps count from 0. They are recognized by their labels: gradient functions do not get the step.
"""

import sys

import jax.numpy as jnp
import numpy as np

from metamix_jax import command_line
from metamix_jax.data import batching, datasets
from metamix_jax.training.step import gradient_step
from tests.helpers.processes import tiny_config


def labels_of(steps):
    """Returns the labels [steps, batch] of the batches of some steps."""
    config = tiny_config()
    split = datasets.load(config.data).train
    options = {"seed": config.seed, "batch_size": config.batch_size}
    indices = (batching.train_indices(len(split), step=step, **options)[0] for step in steps)
    return np.stack([split.labels_at(rows) for rows in indices])


def poisoned(pass_gradient, bad_labels, end=""):
    """Returns gradient_step.pass_gradient with one gradient entry set to NaN.

    Args:
      pass_gradient: the original function.
      bad_labels: labels [n, batch] of the batches to poison.
      end: suffix of the array's path; the first match is poisoned, if any.
    """

    def found(loss, trained, frozen, batch_stats, inputs, precision):
        arguments = (trained, frozen, batch_stats, inputs, precision)
        gradient, batch_stats, metrics = pass_gradient(loss, *arguments)
        bad = jnp.any(jnp.all(inputs[1][None] == bad_labels, axis=1))
        for path in sorted(path for path in gradient if path.endswith(end))[:1]:
            first = (0,) * gradient[path].ndim
            number = jnp.where(bad, jnp.nan, gradient[path][first])
            gradient = gradient | {path: gradient[path].at[first].set(number)}
        return gradient, batch_stats, metrics

    return found


if __name__ == "__main__":
    bad_labels = labels_of([int(step) for step in sys.argv.pop(1).split(",")])
    gradient_step.pass_gradient = poisoned(gradient_step.pass_gradient, bad_labels)
    command_line.run()
