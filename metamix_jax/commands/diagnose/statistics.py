"""Pure functions of a diagnosis: distances, variance traces and rank correlations."""

import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from metamix_jax.networks.quantizers import fake_quant, init_step

WIDTHS = (8, 4, 3, 2)  # of the paper's Fig. 8
STEP_SAMPLES = 2**16


def distance(first: np.ndarray, second: np.ndarray) -> float:
    """Returns the 1-Wasserstein distance between two samples of equal size, in their unit."""
    return float(np.mean(np.abs(np.sort(first) - np.sort(second))))


def pairwise_distances(samples: Mapping[int, np.ndarray], deviation: float) -> dict[str, float]:
    """Returns the distance between each pair of widths, {"8-4": ..., ...}, and their "mean".

    Args:
      samples: bit-width -> sample, all of equal size.
      deviation: the standard deviation used as the unit of distances.
    """
    # A dead layer's constant activations have zero deviation, and are equal at every width.
    unit = deviation if deviation > 0 else 1.0
    found = {
        f"{a}-{b}": distance(samples[a], samples[b]) / unit
        for a, b in itertools.combinations(samples, 2)
    }
    return found | {"mean": sum(found.values()) / len(found)}


def summarise(
    distances: Mapping[str, Mapping[str, Any]], layers: Sequence[str]
) -> list[dict[str, Any]]:
    """Returns the mean distance over `layers`, one row per statistics and weights.

    Args:
      distances: {statistics: {state: {weights: {layer: {"mean": ...}}}}}.
      layers: the searched ones.

    Returns:
      Rows {statistics, weights, before, after, closer, layers}: `closer` of the `layers` layers
      with a nonzero distance have a smaller one after than before; None without both states.
    """
    rows = []
    for kind, states in distances.items():
        for weights in next(iter(states.values())):
            means = {
                state: [found[weights][path]["mean"] for path in layers]
                for state, found in states.items()
            }
            row = {"statistics": kind, "weights": weights, "closer": None, "layers": None}
            for state in ("before", "after"):
                row[state] = float(np.mean(means[state])) if state in means else None
            if len(means) == 2:
                # Skip the first searched layer: its input is the same at every width.
                moved = [(a, b) for a, b in zip(*means.values(), strict=True) if a or b]
                row["layers"] = len(moved)
                row["closer"] = sum(after < before for before, after in moved)
            rows.append(row)
    return rows


def running_trace(variances: np.ndarray, momentum: float, start: np.ndarray) -> np.ndarray:
    """Returns batch norm's running variance after each step, [steps, channels].

    Args:
      variances: batch variances, [steps, channels].
      momentum: the fraction of the running variance kept at each step.
      start: the running variance before the first step, [channels].
    """
    trace, running = [], start
    for variance in variances:
        running = momentum * running + (1 - momentum) * variance
        trace.append(running)
    return np.stack(trace)


def trace_summary(
    variances: Mapping[int, np.ndarray], drawn: Sequence[int], momentum: float
) -> dict[str, Any]:
    """Returns how the variance after a layer follows the layer's bit-width (Fig. 2).

    Args:
      variances: bit-width -> batch variance with the layer at that width, [steps, channels].
      drawn: the width of each step.
      momentum: batch norm's.

    Returns:
      drawn; batch_variance and running_variance at each step (mean over channels); correlation_*
      with the drawn width (None if either is constant); variation_* (standard deviation / mean);
      variation_widest and mean_widest, of the batch variance at the widest width throughout, where
      only the images vary; and ratio, {width: its mean variance / mean_widest}.
    """
    batch = np.stack([variances[bits][step] for step, bits in enumerate(drawn)])
    # Start at the expected level, so that the trace needs no burn-in.
    start = np.mean([values.mean(axis=0) for values in variances.values()], axis=0)
    batch_mean = batch.mean(axis=1)
    running_mean = running_trace(batch, momentum, start).mean(axis=1)
    widest = variances[max(variances)].mean(axis=1)
    return {
        "drawn": list(drawn),
        "batch_variance": batch_mean.tolist(),
        "running_variance": running_mean.tolist(),
        "correlation_batch": _correlation(drawn, batch_mean),
        "correlation_running": _correlation(drawn, running_mean),
        "variation_batch": _variation(batch_mean),
        "variation_running": _variation(running_mean),
        "variation_widest": _variation(widest),
        "mean_widest": float(widest.mean()),
        "ratio": {
            str(bits): float(np.mean(values.mean(axis=1)) / np.mean(widest))
            for bits, values in variances.items()
        },
    }


def _correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    return _coefficient(scipy.stats.pearsonr, first, second)


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Returns Spearman's rho with ties averaged; None if either is constant."""
    return _coefficient(scipy.stats.spearmanr, first, second)


def _coefficient(function, first: Sequence[float], second: Sequence[float]) -> float | None:
    if len(set(first)) < 2 or len(set(second)) < 2:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SciPy warns of nearly constant input; handled as NaN
        value = float(function(first, second).statistic)
    return value if math.isfinite(value) else None


def _variation(values: np.ndarray) -> float:
    return float(values.std() / values.mean())


def quantized_variances(sample: np.ndarray) -> list[dict[str, Any]]:
    """Returns the variance of a sample after quantization, by clip rule (Fig. 8).

    Args:
      sample: from N(0, 1), any size.

    Returns:
      One row per rule: {rule, reference (unquantized variance), variance: {bits: quantized}}.
    """
    x = jnp.asarray(sample, jnp.float32)

    def min_max(x: jax.Array, bits: int) -> jax.Array:
        low, high = x.min(), x.max()
        step = (high - low) / ((1 << bits) - 1)
        return jnp.round((x - low) / step) * step + low

    def lsq(x: jax.Array, bits: int, *, signed: bool, rule: str) -> jax.Array:
        # "mse" searches for the step; a part of the sample is enough for that.
        part = x[:STEP_SAMPLES] if rule == "mse" else x
        step = init_step(part, bits, signed=signed, rule=rule)
        return fake_quant(x, step, bits, signed=signed)

    rules = {
        "min-max: one range for all widths": (x, min_max),
        "LSQ init, signed": (x, lambda x, b: lsq(x, b, signed=True, rule="shifted")),
        "least squared error, signed": (x, lambda x, b: lsq(x, b, signed=True, rule="mse")),
        "LSQ init, ReLU, unsigned": (
            jax.nn.relu(x), lambda x, b: lsq(x, b, signed=False, rule="shifted")
        ),
        "least squared error, ReLU, unsigned": (
            jax.nn.relu(x), lambda x, b: lsq(x, b, signed=False, rule="mse")
        ),
    }  # fmt: skip
    return [
        {
            "rule": name,
            "reference": _variance(values),
            "variance": {str(b): _variance(quantize(values, b)) for b in WIDTHS},
        }
        for name, (values, quantize) in rules.items()
    ]


def _variance(x: jax.Array) -> float:
    return float(np.var(np.asarray(x, np.float64)))


def sensitivity(
    bits: Mapping[str, int], macs: Mapping[str, int], traces: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """Returns Spearman's rho between the bits and possible explanations (Fig. 7 and 9).

    Args:
      bits: searched layer -> chosen activation bits.
      macs: layer -> multiply-accumulates.
      traces: layer -> trace of the Hessian; None if not computed.

    Returns:
      {"layers": {path: {act_bits, macs, trace, trace_per_mac}}, "spearman": {macs, trace,
      trace_per_mac: rho, or None}}.
    """
    layers = {}
    for path in bits:
        trace = None if traces is None else float(traces[path])
        per_mac = None if trace is None else trace / macs[path]
        layers[path] = {"act_bits": bits[path], "macs": macs[path], "trace": trace,
                        "trace_per_mac": per_mac}  # fmt: skip
    rho = {}
    for name in ("macs", "trace", "trace_per_mac"):
        values = [row[name] for row in layers.values()]
        known = None not in values
        rho[name] = rank_correlation(list(bits.values()), values) if known else None
    return {"layers": layers, "spearman": rho}
