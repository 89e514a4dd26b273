"""Forward passes that record quantizer inputs and the variance after a layer."""

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from metamix_jax.commands.diagnose import statistics
from metamix_jax.errors import UserError, suggestion
from metamix_jax.networks.precision import FULL, Precision
from metamix_jax.selection import cost
from metamix_jax.selection.cost import LayerCosts
from metamix_jax.selection.policy import branches
from metamix_jax.training.step.batch_step import training_images

SAMPLES = 2**14  # sampled values per layer input; the same positions at every width
BINS = 40  # histogram bins
STATISTICS = ("running", "batch")  # batch norm's statistics: as in evaluation, as in training

Sampler = Callable[..., dict[str, jax.Array]]


def pick_layer(name: str, costs: LayerCosts) -> str:
    """Returns the layer to plot: `name`, or the middle one of the searched layers.

    Raises:
      UserError: `name` is not a searched layer, or activations are not searched.
    """
    several = [path for path, layer in costs.items() if len(layer.act_bits) > 1]
    if not several:
        raise UserError("config.quant.act_bits: expected two or more widths with --mode=diagnose")
    if name and name not in several:
        raise UserError(
            f"config.diagnose.layer={name!r}: not a searched layer; {suggestion(name, several)}"
        )
    return name or several[len(several) // 2]


def weight_rows(costs: LayerCosts, layer: str) -> dict[str, int | None]:
    """Returns row name -> weight bits: None (full precision) and each candidate width."""
    return {"full": None} | {f"{bits}-bit": bits for bits in costs[layer].weight_bits}


def precision_at(
    costs: LayerCosts, act: int, weight: int | None, own: tuple[str, int] | None = None
) -> Precision:
    """Returns the precision of a forward pass at uniform widths.

    Args:
      costs: the network's layers.
      act: activation bits.
      weight: weight bits; None for full precision.
      own: a layer and its activation bits, different from all others.
    """
    narrowest = min(min(layer.weight_bits) for layer in costs.values() if layer.searched)
    bits = cost.uniform_bits(costs, act, weight or narrowest)
    if own is not None:
        layer, own_act = own
        bits[layer] = bits[layer]._replace(act=own_act)
    kind = "full" if weight is None else "quantized"
    return Precision("chosen", kind, branches(bits, costs))


def make_sampler(
    model: nn.Module, config: ConfigDict, paths: Iterable[str], *, train: bool
) -> Sampler:
    """Returns `sample(variables, batch, precision) -> {layer: [SAMPLES or fewer]}`.

    These are sampled values of the layers' inputs before the quantizer, real units.
    """

    @jax.jit
    def sample(variables, batch, precision):
        _, kept = model.apply(
            variables, training_images(batch, config), train=train, precision=precision,
            mutable=["intermediates", "batch_stats"], rngs={"dropout": jax.random.key(0)},
        )  # fmt: skip
        inputs = flatten_dict(kept["intermediates"], sep="/")
        return {path: _subsample(inputs[f"{path}/quantizer_input"][0]) for path in paths}

    return sample


def _subsample(x: jax.Array) -> jax.Array:
    # Random, because a spacing divisible by the number of channels would sample only one.
    generator = np.random.default_rng(0)
    places = generator.choice(x.size, min(SAMPLES, x.size), replace=False, shuffle=False)
    return x.reshape(-1)[places]


def activation_distances(
    samplers: Mapping[str, Sampler],
    states: Mapping[str, Mapping[str, Any]],
    batch: Mapping[str, jax.Array],
    costs: LayerCosts,
    layer: str,
) -> dict[str, Any]:
    """Returns distances between quantizer inputs at different uniform widths (Fig. 1, 6).

    Args:
      samplers: a sampler for each of STATISTICS.
      states: "before" and "after" -> variables.
      batch: images.
      costs: the network's layers.
      layer: the one to plot histograms of.

    Returns:
      {"distances": {statistics: {state: {weights: {layer: {full_deviation, "8-4", ..., mean}}}}},
      "histograms": {"edges": {state: [BINS + 1]}, "density": {state: {weights: {width: [BINS]}}}}}.
      Distances are in standard deviations of the layer's full-precision input in the same state.
    """
    widths = costs[layer].act_bits
    distances: dict[str, Any] = {kind: {} for kind in samplers}
    drawn: dict[str, Any] = {}
    for (kind, sample), (state, variables) in itertools.product(samplers.items(), states.items()):
        full = jax.device_get(sample(variables, batch, FULL))
        deviations = {path: float(values.std()) for path, values in full.items()}
        distances[kind][state] = {}
        for weights, weight in weight_rows(costs, layer).items():
            found = {
                act: jax.device_get(sample(variables, batch, precision_at(costs, act, weight)))
                for act in widths
            }
            distances[kind][state][weights] = {
                path: {"full_deviation": deviations[path]}
                | statistics.pairwise_distances(
                    {act: inputs[path] for act, inputs in found.items()}, deviations[path]
                )
                for path in costs
            }
            if kind == "running":
                rows = {str(act): inputs[layer] for act, inputs in found.items()}
                drawn.setdefault(state, {})[weights] = rows | {"full": full[layer]}
    return {"distances": distances, "histograms": _histograms(drawn)}


def _histograms(drawn: Mapping[str, Any]) -> dict[str, Any]:
    """Returns densities over bins shared by all rows and widths of a state."""
    edges, density = {}, {}
    for state, rows in drawn.items():
        values = np.concatenate([sample for row in rows.values() for sample in row.values()])
        bins = np.linspace(values.min(), np.quantile(values, 0.999), BINS + 1)
        edges[state] = bins.tolist()
        density[state] = {
            weights: {
                name: (np.histogram(sample, bins)[0] / (sample.size * np.diff(bins))).tolist()
                for name, sample in row.items()
            }
            for weights, row in rows.items()
        }
    return {"edges": edges, "density": density}


def norm_after(layer: str, batch_stats: Any) -> str | None:
    """Returns the path of the batch norm that follows a layer, or None."""
    *parents, name = layer.split("/")
    known = {path.rpartition("/")[0] for path in flatten_dict(batch_stats, sep="/")}
    # The networks' naming scheme: conv1 and bn1, expand and expand_bn, head_conv and head_bn.
    for norm in (name.replace("conv", "bn"), f"{name}_bn"):
        path = "/".join((*parents, norm))
        if norm != name and path in known:
            return path
    return None


def make_batch_variance(
    model: nn.Module, config: ConfigDict, norm: str
) -> Callable[..., jax.Array]:
    """Returns `variance(variables, batch, precision) -> [channels]`, the input variance of `norm`.

    Later layers are not computed: XLA removes them as dead code.
    """

    @jax.jit
    def variance(variables, batch, precision):
        # Starting from zeros, a training pass yields (1 - momentum) * the batch's statistics.
        zeros = jax.tree.map(jnp.zeros_like, variables["batch_stats"])
        _, moved = model.apply(
            {**variables, "batch_stats": zeros}, training_images(batch, config), train=True,
            precision=precision, mutable=["batch_stats"], rngs={"dropout": jax.random.key(0)},
        )  # fmt: skip
        return flatten_dict(moved["batch_stats"], sep="/")[f"{norm}/var"] / (1 - model.bn_momentum)

    return variance


def variance_traces(
    variance: Callable[..., jax.Array],
    states: Mapping[str, Mapping[str, Any]],
    batches: Iterable[Mapping[str, jax.Array]],
    costs: LayerCosts,
    layer: str,
    *,
    momentum: float,
    seed: int,
) -> dict[str, Any]:
    """Returns {state: {weights: statistics.trace_summary}} of the batch norm after `layer`.

    The layer's activation width is redrawn at every step, identically in all rows; the other
    layers stay at the widest, and the weights do not change. A training pass does not depend on
    the running variance, so each batch runs at all widths, and the trace is assembled from the
    drawn ones.
    """
    widths = costs[layer].act_bits
    rows = {
        (state, weights, act): precision_at(costs, max(widths), weight, own=(layer, act))
        for state in states
        for weights, weight in weight_rows(costs, layer).items()
        for act in widths
    }
    values: dict[tuple, list[np.ndarray]] = {key: [] for key in rows}
    for batch in batches:
        for key, precision in rows.items():
            seen = variance(states[key[0]], batch, precision)
            values[key].append(np.asarray(seen, np.float64))
    steps = len(next(iter(values.values())))
    drawn = np.random.default_rng(seed).choice(widths, steps).tolist()
    found: dict[str, Any] = {state: {} for state in states}
    for state, weights in dict.fromkeys(key[:2] for key in rows):
        by_width = {act: np.stack(values[state, weights, act]) for act in widths}
        found[state][weights] = statistics.trace_summary(by_width, drawn, momentum)
    return found
