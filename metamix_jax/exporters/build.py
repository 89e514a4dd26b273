"""Builds the exported graph from a trained network and its policy."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metamix_jax.errors import UserError
from metamix_jax.exporters.graph import Graph
from metamix_jax.exporters.lowering import lower
from metamix_jax.exporters.recognise import recognised
from metamix_jax.networks.intercepted import InterceptedNetwork
from metamix_jax.selection.cost import LayerCosts
from metamix_jax.selection.policy import Policy


def build_graph(
    model: InterceptedNetwork,
    variables: Mapping[str, Any],
    policy: Policy,
    *,
    image_shape: tuple[int, int, int],
    mean: Sequence[float],
    std: Sequence[float],
) -> Graph:
    """Returns the network at its policy's widths, with integer kernels and batch norm folded.

    Args:
      model: a network of `metamix_jax.networks.registry`.
      variables: params, batch_stats and quant.
      policy: the bits of all layers.
      image_shape: (height, width, channels).
      mean: of pixels in [0, 1], one per channel or one for all.
      std: standard deviation, likewise.

    Raises:
      UserError: the network cannot be exported.
    """
    nodes = lower(model, variables, policy.bits, image_shape)
    return Graph(
        model=policy.model,
        image_shape=tuple(image_shape),
        num_classes=model.num_classes,
        mean=tuple(mean),
        std=tuple(std),
        policy=policy.to_json(),
        nodes=recognised(nodes, image_shape),
    )


def obstacle(
    model: InterceptedNetwork, costs: LayerCosts, image_shape: tuple[int, int, int]
) -> str:
    """Returns why a network cannot be exported, "" if it can; needs no trained variables."""
    keys = {"params": jax.random.key(0), "quant": jax.random.key(0)}
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    shapes = jax.eval_shape(model.init, keys, images)
    variables = {
        name: jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes.get(name, {}))
        for name in ("params", "batch_stats", "quant")
    }
    bits = {path: layer.candidates[0] for path, layer in costs.items()}
    try:
        lower(model, variables, bits, image_shape, values=False)
    except UserError as error:
        return str(error)
    return ""
