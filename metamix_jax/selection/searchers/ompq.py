"""OMPQ: more bits for layers whose outputs differ from the others' (Ma et al., AAAI 2023).

The similarity of two layers is the linear CKA of their outputs over the images of one batch. A
layer's importance is theta = exp(-beta gamma), with gamma the sum of its similarities to all other
layers, and the value of a bit in a layer is the mean theta of that layer and all later ones.

The paper chooses weight bits for a model size; so does this searcher if only weight bits are
searched and the budget is in mebibytes. Everything else is our adaptation: the same value for a bit
of the activations (or weights), under the run's budget, by exact knapsack. So are the features: we
use the outputs of the convolutions, the paper those of parts of its blocks.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from metamix_jax.errors import require
from metamix_jax.fields import Field, at_least
from metamix_jax.networks import registry
from metamix_jax.networks.precision import Bits
from metamix_jax.selection import knapsack
from metamix_jax.selection.budget import within
from metamix_jax.selection.context import SearchContext
from metamix_jax.selection.cost_models import WEIGHTS
from metamix_jax.selection.phases import FINE_TUNING
from metamix_jax.selection.searcher import Searcher


def choose(context: SearchContext) -> dict[str, Bits]:
    """Returns the policy with the greatest total value of its bits."""
    grams = gram_matrices(context)
    if context.budget.cost_model.name == WEIGHTS and not context.budget.further:
        return _choose_for_size(context, grams)
    values = {}
    for path, worth in zip(grams, _worths(context, grams), strict=True):
        cost = context.costs[path]
        kind = "act" if len(cost.act_bits) > 1 else "weight"
        values[path] = [worth * getattr(bits, kind) / 8 for bits in cost.candidates]
    return knapsack.best_policy(values, context.costs, context.budget)


def _choose_for_size(context: SearchContext, grams: Mapping[str, np.ndarray]) -> dict[str, Bits]:
    """The paper's setting: a linear program over weight bits, then rounding."""
    costs, budget, room = context.costs, context.budget, context.budget.room
    architecture = registry.architecture_of(context.model)
    units = merge_shortcuts(grams, architecture.shortcut)
    worths = _worths(context, {path: grams[path] for path in units})
    widths = costs[next(iter(units))].weight_bits  # the same in all layers
    branch_costs = budget.cost_model.branch_costs
    sizes = np.array([sum(branch_costs[path][0] for path in unit) for unit in units.values()])
    sizes /= widths[0]
    continuous = continuous_bits(worths, sizes, (min(widths), max(widths)), room)
    if architecture.ompq_rounds_below:
        rounded = round_below(continuous, widths, sizes)
    else:
        rounded = round_nearest(continuous, widths)
    if not within(sizes @ rounded, room):
        logging.info("policy above the budget after rounding to the nearest widths; projected")
        rounded = _projected(worths, widths, sizes, room)
    fixed = {path: cost.candidates[0] for path, cost in costs.items()}
    bits = fixed | {
        path: fixed[path]._replace(weight=int(width))
        for unit, width in zip(units.values(), rounded, strict=True)
        for path in unit
    }
    logging.info(
        "%.4f MiB of weights; %.4f MiB as counted by the published code, with batch norm",
        budget.cost(bits), published_size(context.variables["params"], bits),
    )  # fmt: skip
    return bits


def _worths(context: SearchContext, grams: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns the value of a bit in each layer."""
    return suffix_means(importances(linear_cka(grams), context.config.ompq.beta))


def gram_matrices(context: SearchContext) -> dict[str, np.ndarray]:
    """Returns searched layer -> centered Gram matrix [n, n] of its outputs on the first batch.

    The network runs at full precision and in training mode, as in the published code.
    """
    searched = [path for path, cost in context.costs.items() if cost.searched]

    def kept(module: Any, method: str) -> bool:
        return method == "__call__" and "/".join(module.path) in searched

    @jax.jit
    def measure(variables: Any, images: jax.Array) -> dict[str, jax.Array]:
        _, found = context.model.apply(
            variables, images, train=True, mutable=["batch_stats", "intermediates"],
            capture_intermediates=kept, rngs={"dropout": jax.random.key(context.config.seed)},
        )  # fmt: skip
        flat = flatten_dict(found["intermediates"], sep="/")
        return {path: _gram(flat[f"{path}/__call__"][0]) for path in searched}

    images, _ = next(iter(context.batches(1)))
    variables = {name: context.variables[name] for name in ("params", "batch_stats")}
    grams = jax.device_get(measure(variables, images))
    return {path: grams[path] for path in searched}  # jit sorts


def _gram(features: jax.Array) -> jax.Array:
    rows = features.reshape(features.shape[0], -1)
    rows -= rows.mean(axis=0, keepdims=True)
    return jnp.matmul(rows, rows.T, precision="highest")


def linear_cka(grams: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns the similarities [layers, layers], 0 to 1, of centered Gram matrices [n, n].

    <K_i, K_j> / (|K_i| |K_j|) with Frobenius products and norms (Kornblith et al., ICML 2019): the
    paper's orthogonality metric.
    """
    rows = np.stack([np.asarray(gram, float).ravel() for gram in grams.values()])
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    rows /= np.where(norms > 0, norms, 1)  # constant outputs resemble nothing
    return rows @ rows.T


def importances(similarity: np.ndarray, beta: float) -> np.ndarray:
    """Returns the theta of each layer, divided by the greatest to prevent underflow."""
    gamma = similarity.sum(axis=1) - np.diag(similarity)
    return np.exp(-beta * (gamma - gamma.min()))


def suffix_means(theta: np.ndarray) -> np.ndarray:
    """Returns mean(theta_i, ..., theta_last) for each i."""
    return np.cumsum(theta[::-1])[::-1] / np.arange(len(theta), 0, -1)


def merge_shortcuts(paths: Iterable[str], shortcut: str | None) -> dict[str, list[str]]:
    """Returns groups of layers that share a width: shortcut convolutions join the layer before."""
    units = {}
    for path in paths:
        if path.rsplit("/", 1)[-1] == shortcut:
            units[next(reversed(units))].append(path)
        else:
            units[path] = [path]
    return units


def continuous_bits(
    worths: np.ndarray, sizes: np.ndarray, bounds: tuple[int, int], room: float
) -> np.ndarray:
    """Returns the bits within `bounds` with greatest worths @ bits and sizes @ bits <= room.

    The optimum of this linear program raises layers in order of worth per size, the last one only
    in part. Unlike a solver's result, it is exact for worths of any scale.
    """
    low, high = bounds
    bits = np.full(len(worths), float(low))
    left = max(room - sizes.sum() * low, 0.0)
    for k in np.argsort(-worths / sizes, kind="stable"):
        if left < (high - low) * sizes[k]:
            bits[k] += left / sizes[k]
            break
        bits[k] = high
        left -= (high - low) * sizes[k]
    return bits


def round_below(bits: np.ndarray, widths: Sequence[int], sizes: np.ndarray) -> np.ndarray:
    """Returns the adjacent widths whose total size is closest to that of `bits`, but not above.

    The published code finds them depth first, from the last layer; this is a knapsack.
    """
    table = {}
    for k, (value, size) in enumerate(zip(bits, sizes, strict=True)):
        around = {max(w for w in widths if w <= value), min(w for w in widths if w >= value)}
        table[k] = {width: width * size for width in sorted(around, reverse=True)}
    rows = {k: list(row.values()) for k, row in table.items()}
    choice = knapsack.maximise(rows, rows, float(sizes @ bits))
    return np.array([list(table[k])[index] for k, index in choice.items()])


def round_nearest(bits: np.ndarray, widths: Sequence[int]) -> np.ndarray:
    """Returns the nearest widths, the narrower one in a tie."""
    table = np.sort(widths)
    return table[np.abs(bits[:, None] - table).argmin(axis=1)]


def _projected(
    worths: np.ndarray, widths: Sequence[int], sizes: np.ndarray, room: float
) -> np.ndarray:
    """Returns the widths of greatest worth within the budget."""
    table = np.array(widths)
    values = {k: worth * table for k, worth in enumerate(worths)}
    choice = knapsack.maximise(values, {k: size * table for k, size in enumerate(sizes)}, room)
    return table[[choice[k] for k in range(len(worths))]]


def published_size(params: Mapping[str, Any], bits: Mapping[str, Bits]) -> float:
    """Returns the MiB of a network as counted by the published code.

    A layer's bias, or else batch norm's scale and bias, are counted at the width of its weights.
    """
    flat, total = flatten_dict(params, sep="/"), 0
    for path, layer in bits.items():
        kernel = flat[f"{path}/kernel"]
        vectors = 1 if f"{path}/bias" in flat else 2
        total += (kernel.size + vectors * kernel.shape[-1]) * layer.weight
    return total / 8 / 2**20


def check(config: ConfigDict) -> None:
    """Raises UserError if activation and weight bits are searched together."""
    act_bits, weight_bits = tuple(config.quant.act_bits), tuple(config.quant.weight_bits)
    require(
        min(len(act_bits), len(weight_bits)) == 1,
        "quant.weight_bits", weight_bits,
        "one width, or one in quant.act_bits, for searcher ompq",
    )  # fmt: skip


SEARCHER = Searcher(
    name="ompq",
    summary="more bits for the layers whose outputs resemble the others' least (Ma et al., AAAI "
    "2023): the paper's linear program over weight bits for a size in `mebibytes`; for BOPs, our "
    "adaptation by exact knapsack",
    phases=FINE_TUNING,
    choose=choose,
    fields=(
        Field(
            "ompq.beta",
            10.0,
            "How strongly a layer's similarity to the others counts. Published values: 10 for "
            "ResNet-18 (after training 100), 3.3 for ResNet-50.",
            at_least(0),
        ),
    ),
    check=check,
)
