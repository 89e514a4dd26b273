"""What a policy is worth, in seconds and without training: the loss of the network at its bits.

Batch norm takes the statistics of each batch, since running statistics fit no single width. Weights
are quantized, as they will be.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from metamix_jax.networks.precision import Precision
from metamix_jax.selection.context import SearchContext

PolicyLoss = Callable[[Mapping[str, int]], float]  # of the branch of every searched layer


def policy_loss(context: SearchContext, batches: int, *, weight_steps: bool) -> PolicyLoss:
    """Returns the mean cross-entropy on training batches, as a function of the chosen branches.

    Args:
      context: the network after the search.
      batches: how many; the first ones.
      weight_steps: whether the search trained the step sizes of weights; they are initialized here
        if it did not.
    """
    model, data = context.model, list(context.batches(batches))
    variables = dict(context.variables)
    dropout = {"dropout": jax.random.key(0)}
    if not weight_steps:
        calibrate = Precision(weights="calibrate")
        _, moved = jax.jit(
            lambda variables, images: model.apply(
                variables, images, precision=calibrate, mutable=["quant"]
            )
        )(variables, data[0][0])
        variables |= moved

    @jax.jit
    def loss(
        variables: Mapping[str, dict],
        branches: Mapping[str, jax.Array],
        images: jax.Array,
        labels: jax.Array,
    ) -> jax.Array:
        scores, _ = model.apply(
            variables, images, train=True, precision=Precision("chosen", "quantized", branches),
            mutable=["batch_stats"], rngs=dropout,
        )  # fmt: skip
        return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()

    def mean(choice: Mapping[str, int]) -> float:
        branches = {path: jnp.int32(branch) for path, branch in choice.items()}
        return float(sum(loss(variables, branches, *batch) for batch in data)) / len(data)

    return mean
