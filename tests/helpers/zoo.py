"""Networks of the zoo, their products quantized; tracing takes seconds, so it is done once."""

import functools

from ml_collections import ConfigDict

from metamix_jax.networks import registry
from metamix_jax.networks.precision import QuantSettings
from metamix_jax.selection import cost


@functools.cache
def make(name, settings=None, image_shape=(32, 32, 3), classes=10, **fields):
    """Returns a network; `fields` are those of config.model."""
    config_model = ConfigDict({"name": name, **fields})
    return registry.make(config_model, classes, settings or QuantSettings(), image_shape)


@functools.cache
def layer_costs(name, settings=None, image_shape=(32, 32, 3), classes=10, **fields):
    """Returns the costs of the layers of `make`'s network; do not modify."""
    return cost.layer_costs(make(name, settings, image_shape, classes, **fields), image_shape)
