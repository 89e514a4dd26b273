"""Networks ready for export, without training or initializing them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from metamix_jax.exporters import quantized_network
from metamix_jax.exporters.build import build_graph
from metamix_jax.networks import own
from metamix_jax.networks.precision import Precision
from metamix_jax.networks.torch_layers import batch_norm, conv
from metamix_jax.selection import cost, policy
from metamix_jax.training import setup
from tests.helpers.tiny_network import compiled

CLASSES = 5


class Pieces(nn.Module):
    """Has every kind of layer once: signed, unsigned, shifted; dense, grouped, depthwise; SE."""

    num_classes: int
    padding: str = "torch"
    stride: int = 2
    kernel_size: int = 3

    @nn.compact
    def __call__(self, x, train=False):
        def layer(name, features, size=self.kernel_size, **fields):
            return conv(features, size, padding=self.padding, name=name, **fields)

        def norm(name):
            return batch_norm(train, name, epsilon=1e-3)

        x = nn.hard_swish(norm("stem_bn")(layer("stem", 8, 3)(x)))
        x = layer("grouped", 12, groups=4, stride=self.stride)(x)
        x = nn.relu6(norm("grouped_bn")(x))
        x = x + layer("signed", 12, 1, use_bias=True)(x)
        x = layer("depthwise", 12, groups=12, stride=self.stride)(x)
        x = nn.hard_swish(norm("depthwise_bn")(x))
        gate = layer("gate", 12, 1, use_bias=True)(jnp.mean(x, axis=(1, 2), keepdims=True))
        x = jnp.mean(x * nn.hard_sigmoid(gate), axis=(1, 2))
        x = nn.relu(nn.Dense(16, name="hidden")(x))
        return nn.Dense(self.num_classes, name="fc")(x)


def pieces(settings, image_shape, **fields):
    """Returns `Pieces` with its products quantized, layer "signed" as its name says."""
    settings = dataclasses.replace(settings, rules=("signed=signed",))
    model = Pieces(CLASSES, **fields)
    return own.make("pieces", {}, CLASSES, settings, image_shape, model=model)


def quantized(model, image_shape, *, seed=0):
    """Returns a network with random weights and statistics at randomly chosen candidates."""
    generator = np.random.default_rng(seed)
    costs = cost.layer_costs(model, image_shape)
    keys = {"params": jax.random.key(0), "quant": jax.random.key(0)}
    shapes = jax.eval_shape(lambda: model.init(keys, jnp.zeros((1, *image_shape))))
    variables = {
        collection: random_leaves(shapes[collection], generator)
        for collection in ("params", "batch_stats")
    }
    variables["quant"] = steps(variables["params"], shapes["quant"], costs)
    return _at_random_bits(model, image_shape, costs, variables, generator)


def intercepted(name, settings, image_shape):
    """Returns a network of own_networks.py, its products quantized."""
    return own.make(f"tests.helpers.own_networks:{name}", {}, CLASSES, settings, image_shape)


def calibrated(model, images, seed=0):
    """Returns a network with steps calibrated on images, at random bits."""
    generator = np.random.default_rng(seed)
    shape = images.shape[1:]
    costs = cost.layer_costs(model, shape)
    keys = {"params": jax.random.key(0), "quant": jax.random.key(2)}
    shapes = jax.eval_shape(model.init, keys, images)
    variables = {
        name: random_leaves(shapes[name], generator) if name in shapes else {}
        for name in ("params", "batch_stats")
    }
    variables["quant"] = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), shapes["quant"])
    for precision in (Precision("calibrate"), Precision(weights="calibrate")):
        run = compiled(
            lambda v, precision=precision: model.apply(
                v, images, mutable=["quant"], precision=precision
            )[1]
        )
        variables["quant"] = run(variables)["quant"]
    return _at_random_bits(model, shape, costs, variables, generator)


def _at_random_bits(model, image_shape, costs, variables, generator):
    bits = {
        path: layer.candidates[generator.integers(len(layer.candidates))]
        for path, layer in costs.items()
    }
    facts = {"model": "tiny", "image_size": image_shape[0], "searcher": "file", "seed": 0}
    chosen = policy.make_policy(costs, bits, budget_gbops=1.0, **facts)
    config = ConfigDict({"data": {"mean": (0.0,), "std": (1.0,)}})
    network = setup.Network(model, "tiny", image_shape, costs, None, {})
    return quantized_network.QuantizedNetwork(config, network, variables, chosen)


def random_leaves(shapes, generator):
    """Returns variance-preserving kernels and near-identity batch norm."""
    found = {}
    for path, leaf in flatten_dict(shapes).items():
        noise = generator.normal(size=leaf.shape).astype(np.float32)
        if path[-1] == "kernel":
            found[path] = noise * np.float32(np.prod(leaf.shape[:-1]) ** -0.5)
        elif path[-1] in ("scale", "var"):
            found[path] = np.float32(1) + np.abs(noise) / 2
        else:
            found[path] = noise / 4
    return unflatten_dict(found)


def steps(params, shapes, costs):
    """Returns step sizes suitable for the kernels and for inputs of about unit variance."""
    params, found = flatten_dict(params, sep="/"), {}
    for path, leaf in flatten_dict(shapes, sep="/").items():
        layer, _, name = path.rpartition("/")
        if name == "act_step":
            widths = np.float32([2**bits for bits in costs[layer].act_bits])
            found[path] = np.float32(3) / widths
        elif name == "weight_step":
            kernel = params[f"{layer}/kernel"].reshape(-1, leaf.shape[1])
            highs = np.float32([[2 ** (bits - 1) - 1] for bits in costs[layer].weight_bits])
            found[path] = 2 * np.abs(kernel).mean(axis=0, keepdims=True) / highs**0.5
        else:
            found[path] = np.zeros(leaf.shape, np.float32)
    return unflatten_dict(found, sep="/")


def random_images(image_shape, count=3, seed=1):
    return np.random.default_rng(seed).normal(size=(count, *image_shape)).astype(np.float32)


def graph_of(network):
    return build_graph(
        network.network.model,
        network.variables,
        network.policy,
        image_shape=network.network.image_shape,
        mean=(0.0,),
        std=(1.0,),
    )
