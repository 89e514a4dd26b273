"""The network as serialized StableHLO, through jax.export.

What it computes is the fake-quantized float network, with its weights inside; any batch size. A
file can be read with `jax.export.deserialize` by the JAX that wrote it, by later ones for six
months, and by earlier ones for three weeks: the window that jax.export promises.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from metamix_jax.networks.precision import Precision

PLATFORMS = ("cpu", "cuda", "tpu")


def stablehlo(
    model: nn.Module,
    variables: Mapping[str, Any],
    precision: Precision,
    image_shape: tuple[int, int, int],
) -> bytes:
    """Returns the function from normalised float32 images [n, h, w, c] to scores, serialized."""
    from jax import export

    # The file is for any device: the way it was trained is not asked of it.
    settings = dataclasses.replace(model.settings, compute_dtype="float32")
    model = model.clone(settings=settings)
    variables = jax.device_get(dict(variables))  # constants, on no device in particular

    def scores(images: jax.Array) -> jax.Array:
        return model.apply(variables, images, train=False, precision=precision)

    (batch,) = export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *image_shape), jnp.float32)
    return bytes(export.export(jax.jit(scores), platforms=PLATFORMS)(images).serialize())
