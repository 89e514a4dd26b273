"""Runs main.py with one number of one gradient not finite at some steps.

    python -m tests.helpers.inject 3,5 --config=FILE --workdir=DIR ...

Steps count from 0. They are told by their labels, because the gradient does not know the number.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from metamix_jax import command_line
from metamix_jax.data import batching, datasets
from tests.helpers.processes import tiny_config


def labels_of(steps):
    """Returns the labels [steps, batch] of the batches of some steps."""
    config = tiny_config()
    split = datasets.load(config.data).train
    options = {"seed": config.seed, "batch_size": config.batch_size}
    indices = (batching.train_indices(len(split), step=step, **options)[0] for step in steps)
    return np.stack([split.labels_at(rows) for rows in indices])


def poisoned(value_and_grad, bad_labels, end=""):
    """Returns `value_and_grad` that sets a number to NaN in the gradient of the task's loss.

    Args:
      value_and_grad: that of JAX.
      bad_labels: labels [n, batch] of the batches to do that at.
      end: of the path of the array, the first such one; without one nothing is changed.
    """

    def make(function, **options):
        original = value_and_grad(function, **options)
        if function.__name__ != "loss_of":
            return original

        def gradient_of(trained, frozen, batch_stats, inputs, precision):
            found, gradient = original(trained, frozen, batch_stats, inputs, precision)
            bad = jnp.any(jnp.all(inputs[1][None] == bad_labels, axis=1))
            paths = [path for path in gradient if path.endswith(end)]
            if not paths:
                return found, gradient
            path = min(paths)
            first = (0,) * gradient[path].ndim
            number = jnp.where(bad, jnp.nan, gradient[path][first])
            return found, gradient | {path: gradient[path].at[first].set(number)}

        return gradient_of

    return make


if __name__ == "__main__":
    bad_labels = labels_of([int(step) for step in sys.argv.pop(1).split(",")])
    jax.value_and_grad = poisoned(jax.value_and_grad, bad_labels)
    command_line.run()
