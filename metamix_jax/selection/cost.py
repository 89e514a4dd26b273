"""MACs and BOPs.

The convention reproduces the figures of MetaMix and of the methods it is compared with: BOPs of a
layer = MACs * activation bits * weight bits, for convolutions and dense layers; biases, batch norm,
additions, pooling and activation functions are free; the first and last layer count at their own
fixed widths.
"""

import csv
import io
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict

from metamix_jax.networks.intercepted import InterceptedNetwork
from metamix_jax.networks.lifetimes import Moment, moments
from metamix_jax.networks.precision import FULL_BITS, Bits, LayerCost, Precision
from metamix_jax.networks.tracing import traced

LayerCosts = Mapping[str, LayerCost]  # layer path -> sizes and candidates, in network order
LayerBits = Mapping[str, Bits]  # layer path -> its widths, for all layers
GIGA = 1e9


def layer_costs(model: nn.Module, image_shape: tuple[int, int, int]) -> dict[str, LayerCost]:
    """Returns the LayerCost recorded by every quantized layer of `model`, without computing.

    Args:
      model: a network of `metamix_jax.networks.registry`.
      image_shape: (height, width, channels).
    """
    recorded = []

    def init() -> None:
        keys = {"params": jax.random.key(0), "quant": jax.random.key(0)}
        # Not from eval_shape's result, which is sorted by name.
        recorded.append(model.init(keys, jnp.zeros((1, *image_shape)))["costs"])

    jax.eval_shape(init)
    return {path.removesuffix("/cost"): cost for path, cost in _flat(recorded[0]).items()}


def live_activations(
    model: InterceptedNetwork, image_shape: tuple[int, int, int]
) -> tuple[Moment, ...]:
    """Returns what is kept while each layer of `model` runs, without computing."""
    keys = {"params": jax.random.key(0), "quant": jax.random.key(0)}
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    shapes = jax.eval_shape(model.init, keys, image)
    variables = {name: shapes[name] for name in ("params", "batch_stats") if name in shapes}
    trace = traced(model.network, variables, image, False, None)
    own = [False] * len(jax.tree.leaves(variables))
    return moments(trace, [*own, True], math.prod(image_shape))


def bops(costs: LayerCosts, bits: LayerBits) -> int:
    """Returns the bit operations per image, Eq. 6."""
    return sum(cost.macs * math.prod(bits[path]) for path, cost in costs.items())


def gbops_at(costs: LayerCosts, bits: LayerBits, precision: Precision) -> float:
    """Returns the GBOPs of a forward pass; unquantized tensors count as 32 bits."""
    acts_full, weights_full = precision.activations == "full", precision.weights == "full"
    return (
        sum(
            cost.macs
            * (FULL_BITS if acts_full else bits[path].act)
            * (FULL_BITS if weights_full else bits[path].weight)
            for path, cost in costs.items()
        )
        / GIGA
    )


def uniform_bits(costs: LayerCosts, act: int, weight: int | None = None) -> dict[str, Bits]:
    """Returns the same widths wherever they are searched, the only candidate elsewhere.

    `weight` defaults to `act`.
    """
    weight = act if weight is None else weight
    return {
        path: Bits(
            act if len(cost.act_bits) > 1 else cost.act_bits[0],
            weight if len(cost.weight_bits) > 1 else cost.weight_bits[0],
        )
        for path, cost in costs.items()
    }


def widest_bits(costs: LayerCosts) -> dict[str, Bits]:
    """Returns, for every layer, the candidate with the most bit operations."""
    return {path: max(cost.candidates, key=math.prod) for path, cost in costs.items()}


def narrowest_bits(costs: LayerCosts) -> dict[str, Bits]:
    """Returns, for every layer, the candidate with the fewest bit operations."""
    return {path: min(cost.candidates, key=math.prod) for path, cost in costs.items()}


def bits_at(costs: LayerCosts, choice: Mapping[str, int]) -> dict[str, Bits]:
    """Returns the widths of all layers, given the branch of every searched layer."""
    return {path: cost.candidates[choice.get(path, 0)] for path, cost in costs.items()}


def uniform_4_4(costs: LayerCosts) -> int:
    """Returns the BOPs with 4-bit activations and weights in all searched layers."""
    return sum(
        cost.macs * (16 if cost.searched else math.prod(cost.candidates[0]))
        for cost in costs.values()
    )


def average_act_bits(costs: LayerCosts, bits: LayerBits) -> float:
    """Returns the mean activation bits of the searched layers, weighted by their input sizes."""
    sizes = {path: cost.act_elements for path, cost in costs.items() if cost.searched}
    return sum(bits[path].act * sizes[path] for path in sizes) / sum(sizes.values())


def average_weight_bits(costs: LayerCosts, bits: LayerBits) -> float:
    """Returns the mean weight bits of the searched layers, weighted by their kernel sizes."""
    sizes = {path: cost.weight_elements for path, cost in costs.items() if cost.searched}
    return sum(bits[path].weight * sizes[path] for path in sizes) / sum(sizes.values())


def totals(costs: LayerCosts) -> dict[str, Any]:
    """Returns the MACs, the GBOPs of uniform networks and the reachable range of GBOPs."""
    candidates = (cost.act_bits + cost.weight_bits for cost in costs.values() if cost.searched)
    widths = sorted({8, 4}.union(*candidates), reverse=True)
    return {
        "macs": sum(cost.macs for cost in costs.values()),
        "gbops_uniform": {str(b): bops(costs, uniform_bits(costs, b)) / GIGA for b in widths},
        "gbops_min": bops(costs, narrowest_bits(costs)) / GIGA,
        "gbops_max": bops(costs, widest_bits(costs)) / GIGA,
    }


def rows(costs: LayerCosts, reference_bits: int = 4) -> list[dict[str, Any]]:
    """Returns one table row per layer, with the MBOPs of the uniform `reference_bits` network."""
    bits = uniform_bits(costs, reference_bits)
    return [
        {
            "layer": path,
            "macs": cost.macs,
            "act_bits": bits[path].act,
            "weight_bits": bits[path].weight,
            "candidates": _candidate_names(cost),
            "mbops": cost.macs * math.prod(bits[path]) / 1e6,
        }
        for path, cost in costs.items()
    ]


def _candidate_names(cost: LayerCost) -> tuple[str, ...]:
    if len(cost.weight_bits) == 1:
        return tuple(str(bits) for bits in cost.act_bits)
    return tuple(f"{bits.act}/{bits.weight}" for bits in cost.candidates)


def to_csv(table: list[dict[str, Any]]) -> str:
    """Returns `rows` as CSV; candidates are separated by spaces."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=table[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "candidates": " ".join(row["candidates"])} for row in table)
    return text.getvalue()


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    return flatten_dict(tree, sep="/", is_leaf=lambda _, x: isinstance(x, LayerCost))
