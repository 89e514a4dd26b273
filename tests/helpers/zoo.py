"""Networks of the zoo, their products quantized."""

from ml_collections import ConfigDict

from metamix_jax.networks import registry
from metamix_jax.networks.precision import QuantSettings


def make(name, settings=None, image_shape=(32, 32, 3), classes=10, **fields):
    """Returns a network; `fields` are those of config.model."""
    config_model = ConfigDict({"name": name, **fields})
    return registry.make(config_model, classes, settings or QuantSettings(), image_shape)
