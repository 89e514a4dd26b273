"""The network as serialized StableHLO, through jax.export.

It contains the fake-quantized float network with its weights, for any batch size. Read it with
`jax.export.deserialize` in the JAX version that wrote it, later ones for six months and earlier
ones for three weeks: jax.export's compatibility window.
"""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from metamix_jax.networks.intercepted import InterceptedNetwork
from metamix_jax.networks.precision import Precision

PLATFORMS = ("cpu", "cuda", "tpu")


def stablehlo(
    model: nn.Module,
    variables: Mapping[str, Any],
    precision: Precision,
    image_shape: tuple[int, int, int],
) -> bytes:
    """Returns the serialized function from normalized float32 images [n, h, w, c] to scores."""
    from jax import export

    # The file is for any device, whatever compute_dtype it was trained with.
    settings = dataclasses.replace(model.settings, compute_dtype="float32")
    model = model.clone(settings=settings)
    variables = jax.device_get(dict(variables))  # constants, not placed on any device

    def scores(images: jax.Array) -> jax.Array:
        return model.apply(variables, images, train=False, precision=precision)

    def exported(batch: Any) -> bytes:
        images = jax.ShapeDtypeStruct((batch, *image_shape), jnp.float32)
        return bytes(export.export(jax.jit(scores), platforms=PLATFORMS)(images).serialize())

    try:
        return exported(*export.symbolic_shape("batch"))
    except (TypeError, jax.errors.InconclusiveDimensionOperation) as error:
        if not isinstance(model, InterceptedNetwork):
            raise
        logging.warning(
            "network.stablehlo takes one image at a time: the network's code asks how many there "
            "are (%s)", str(error).splitlines()[0],
        )  # fmt: skip
        return exported(1)
