"""OMPQ: wider bits for layers unlike the others (Ma et al., AAAI 2023).

How alike the outputs of two layers are is their linear CKA over the images of one batch. A layer's
importance is theta = exp(-beta gamma), gamma its likeness to all others together, and what a bit is
worth there is the mean theta of that layer and all after it.

The paper chooses weight bits for a model size: that is done where weight bits alone are searched
and the budget is in mebibytes. Anything else here is an adaptation of ours: the same worth of a bit
of the activations (or of the weights), under the run's budget, by the exact knapsack. Features are
ours as well: the outputs of the convolutions, where the paper takes those of its blocks' parts.
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
    """Returns the policy that gives the bits to the layers where they are worth most."""
    grams = gram_matrices(context)
    if context.budget.cost_model.name == WEIGHTS:
        return _choose_for_size(context, grams)
    values = {}
    for path, worth in zip(grams, _worths(context, grams), strict=True):
        cost = context.costs[path]
        kind = "act" if len(cost.act_bits) > 1 else "weight"
        values[path] = [worth * getattr(bits, kind) / 8 for bits in cost.candidates]
    return knapsack.best_policy(values, context.costs, context.budget)


def _choose_for_size(context: SearchContext, grams: Mapping[str, np.ndarray]) -> dict[str, Bits]:
    """The paper's own setting: a linear program over weight bits, then rounding."""
    costs, budget, room = context.costs, context.budget, context.budget.room
    architecture = registry.architecture_of(context.model)
    units = merge_shortcuts(grams, architecture.shortcut)
    worths = _worths(context, {path: grams[path] for path in units})
    widths = costs[next(iter(units))].weight_bits  # everywhere the same
    branch_costs = budget.cost_model.branch_costs
    sizes = np.array([sum(branch_costs[path][0] for path in unit) for unit in units.values()])
    sizes /= widths[0]
    continuous = continuous_bits(worths, sizes, (min(widths), max(widths)), room)
    if architecture.ompq_rounds_below:
        rounded = round_below(continuous, widths, sizes)
    else:
        rounded = round_nearest(continuous, widths)
    if not within(sizes @ rounded, room):
        logging.info("rounded to the nearest widths, the policy is above the budget; projected")
        rounded = _projected(worths, widths, sizes, room)
    fixed = {path: cost.candidates[0] for path, cost in costs.items()}
    bits = fixed | {
        path: fixed[path]._replace(weight=int(width))
        for unit, width in zip(units.values(), rounded, strict=True)
        for path in unit
    }
    logging.info(
        "%.4f MiB of weights; %.4f MiB as the published code counts, with batch norm",
        budget.cost(bits), published_size(context.variables["params"], bits),
    )  # fmt: skip
    return bits


def _worths(context: SearchContext, grams: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns what a bit is worth in each layer."""
    return suffix_means(importances(linear_cka(grams), context.config.ompq.beta))


def gram_matrices(context: SearchContext) -> dict[str, np.ndarray]:
    """Returns searched layer -> centred inner products [n, n] of its outputs on the first batch.

    The network runs at full precision and, as in the published code, in training mode.
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
    """Returns the similarities [layers, layers], 0 to 1, of centred Gram matrices [n, n].

    <K_i, K_j> / (|K_i| |K_j|) in the Frobenius sense (Kornblith et al., ICML 2019): the paper's
    orthogonality metric.
    """
    rows = np.stack([np.asarray(gram, float).ravel() for gram in grams.values()])
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    rows /= np.where(norms > 0, norms, 1)  # outputs that do not vary resemble nothing
    return rows @ rows.T


def importances(similarity: np.ndarray, beta: float) -> np.ndarray:
    """Returns theta of each layer divided by the greatest, which keeps it from underflowing."""
    gamma = similarity.sum(axis=1) - np.diag(similarity)
    return np.exp(-beta * (gamma - gamma.min()))


def suffix_means(theta: np.ndarray) -> np.ndarray:
    """Returns mean(theta_i, ..., theta_last) for each i."""
    return np.cumsum(theta[::-1])[::-1] / np.arange(len(theta), 0, -1)


def merge_shortcuts(paths: Iterable[str], shortcut: str | None) -> dict[str, list[str]]:
    """Returns what shares a width: shortcut convolutions go with the layer before them."""
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
    """Returns the bits, within the bounds, of greatest sum(worths * bits) at sizes @ bits <= room.

    The optimum of this linear program is to raise the layers in the order of worth per size; the
    last of them stays in between. Unlike a solver's, it is exact for worths of any scale.
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
    """Returns the next widths below or above whose size is closest to that of `bits`, not above.

    The published code finds them depth first, from the last layer. It is a knapsack.
    """
    table = {}
    for k, (value, size) in enumerate(zip(bits, sizes, strict=True)):
        around = {max(w for w in widths if w <= value), min(w for w in widths if w >= value)}
        table[k] = {width: width * size for width in sorted(around, reverse=True)}
    rows = {k: list(row.values()) for k, row in table.items()}
    choice = knapsack.maximise(rows, rows, float(sizes @ bits))
    return np.array([list(table[k])[index] for k, index in choice.items()])


def round_nearest(bits: np.ndarray, widths: Sequence[int]) -> np.ndarray:
    """Returns the nearest widths, the narrower in a tie."""
    table = np.sort(widths)
    return table[np.abs(bits[:, None] - table).argmin(axis=1)]


def _projected(
    worths: np.ndarray, widths: Sequence[int], sizes: np.ndarray, room: float
) -> np.ndarray:
    """Returns the widths of greatest worth inside the budget."""
    table = np.array(widths)
    values = {k: worth * table for k, worth in enumerate(worths)}
    choice = knapsack.maximise(values, {k: size * table for k, size in enumerate(sizes)}, room)
    return table[[choice[k] for k in range(len(worths))]]


def published_size(params: Mapping[str, Any], bits: Mapping[str, Bits]) -> float:
    """Returns the MiB of a network as the published code counts them.

    A layer's bias, or batch norm's scale and bias where it has none, are as wide as its weights.
    """
    flat, total = flatten_dict(params, sep="/"), 0
    for path, layer in bits.items():
        kernel = flat[f"{path}/kernel"]
        vectors = 1 if f"{path}/bias" in flat else 2
        total += (kernel.size + vectors * kernel.shape[-1]) * layer.weight
    return total / 8 / 2**20


def check(config: ConfigDict) -> None:
    """Raises UserError where activation and weight bits are searched together."""
    act_bits, weight_bits = tuple(config.quant.act_bits), tuple(config.quant.weight_bits)
    require(
        min(len(act_bits), len(weight_bits)) == 1,
        "quant.weight_bits", weight_bits, "one, or one of quant.act_bits, for searcher ompq",
    )  # fmt: skip


SEARCHER = Searcher(
    name="ompq",
    summary="layers whose outputs resemble the others' least get the bits (Ma et al., AAAI 2023): "
    "the paper's linear program over weight bits for a size in `mebibytes`; for BOPs, our "
    "adaptation by exact knapsack",
    phases=FINE_TUNING,
    choose=choose,
    fields=(
        Field(
            "ompq.beta",
            10.0,
            "How strongly a layer's likeness to the others counts. Published for ResNet-18: 10, "
            "after training 100; for ResNet-50: 3.3.",
            at_least(0),
        ),
    ),
    check=check,
)
