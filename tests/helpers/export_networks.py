"""Networks ready for export, without training or initializing them."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from metamix_jax.exporters import quantized_network
from metamix_jax.exporters.build import build_graph
from metamix_jax.networks import own
from metamix_jax.networks.architecture import Architecture
from metamix_jax.networks.drawing import IMAGE
from metamix_jax.networks.layers import HSWISH_SHIFT, QuantConv, QuantDense
from metamix_jax.networks.precision import FULL, Precision, QuantSettings
from metamix_jax.selection import cost, policy
from metamix_jax.training import setup
from tests.helpers.tiny_network import compiled

CLASSES = 5


class Pieces(nn.Module):
    """Has every kind of layer once: signed, unsigned, shifted; dense, grouped, depthwise; SE."""

    num_classes: int
    settings: QuantSettings
    padding: str = "torch"
    stride: int = 2
    kernel_size: int = 3

    @nn.compact
    def __call__(self, x, train=False, precision=FULL):
        def conv(name, features, size=self.kernel_size, **fields):
            return QuantConv(
                features, self.settings, kernel_size=size, padding=self.padding, name=name, **fields
            )

        def norm(name):
            return nn.BatchNorm(use_running_average=not train, epsilon=1e-3, name=name)

        stem = QuantConv(8, self.settings.stem(), signed=True, padding=self.padding, name="stem")
        x = nn.hard_swish(norm("stem_bn")(stem(x, precision)))
        grouped = conv("grouped", 12, groups=4, shift=HSWISH_SHIFT, stride=self.stride)
        x = nn.relu6(norm("grouped_bn")(grouped(x, precision)))
        y = conv("signed", 12, 1, signed=True, use_bias=True)(x, precision)
        x = x + y
        depthwise = conv("depthwise", 12, groups=12, signed=True, stride=self.stride)
        x = nn.hard_swish(norm("depthwise_bn")(depthwise(x, precision)))
        gate = jnp.mean(x, axis=(1, 2), keepdims=True)
        gate = conv("gate", 12, 1, shift=HSWISH_SHIFT, use_bias=True)(gate, precision)
        x = jnp.mean(x * nn.hard_sigmoid(gate), axis=(1, 2))
        x = QuantDense(16, self.settings, shift=HSWISH_SHIFT, name="hidden")(x, precision)
        return QuantDense(self.num_classes, self.settings.ends(), name="fc")(nn.relu(x), precision)


def draw_pieces(model, drawing):
    x = drawing.layer(IMAGE, "stem", "stem_bn", "hswish")
    x = drawing.layer(x, "grouped", "grouped_bn", "relu6")
    x = drawing.node("add", x, drawing.layer(x, "signed"))
    x = drawing.layer(x, "depthwise", "depthwise_bn", "hswish")
    gate = drawing.layer(drawing.node("mean", x), "gate", activation="hsigmoid")
    x = drawing.node("flatten", drawing.node("mean", drawing.node("multiply", x, gate)))
    drawing.layer(drawing.layer(x, "hidden", activation="relu"), "fc")


PIECES = {"pieces": Architecture("pieces", Pieces, draw=draw_pieces)}  # for the registry


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
