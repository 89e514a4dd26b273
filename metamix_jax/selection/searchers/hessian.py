"""Hessian-aware bits: fewer bits where the loss curves less (HAWQ-V2, Dong et al., NeurIPS 2020).

HAWQ-V2 considers weights; here the same is done for a layer's input, and for its kernel where
weight bits are searched. A quantizer that adds an error e to a tensor of n elements raises the loss
by e^T H e / 2, which for an error without preferred direction is Tr(H) |e|^2 / (2 n). The
sensitivity of a branch is

    Omega = Tr(H_input) * mean e_input^2 + Tr(H_kernel) * mean e_kernel^2,

twice that increase: HAWQ-V2's Tr(H) / n * |e|^2, with n and |e|^2 over the same elements. H is the
Hessian of the batch's mean cross-entropy with respect to the inputs of the whole batch; its trace
is the mean of the traces per image, whatever the batch size.
"""

import logging
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
import optax
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from metamix_jax.networks.precision import Bits
from metamix_jax.selection import knapsack
from metamix_jax.selection.context import SearchContext
from metamix_jax.selection.cost import LayerCosts
from metamix_jax.selection.phases import FINE_TUNING
from metamix_jax.selection.searcher import Searcher

IMAGES = 512  # at least, in whole batches
PROBES = 50  # at most
FEWEST_PROBES = 5
PRECISION = 0.05  # relative standard error of every trace at which probing ends
LEAST = 1e-6  # lower bound of a trace, relative to the greatest
KEY = 3  # folded into the seed's key; 0 to 2 are for initialization and dropout


def choose(context: SearchContext) -> dict[str, Bits]:
    """Returns the policy with the smallest total Omega within the budget."""
    values = {path: -row for path, row in omegas(context).items()}
    return knapsack.best_policy(values, context.costs, context.budget)


def omegas(context: SearchContext) -> dict[str, np.ndarray]:
    """Returns searched layer -> Omega of each branch, on the first training images."""
    config = context.config
    variables = {name: context.variables[name] for name in ("params", "batch_stats")}
    batches = list(context.batches(-(-IMAGES // config.batch_size)))
    errors = mean_errors(context.model, variables, [images for images, _ in batches])
    traces = {}
    for number, kind in enumerate(sorted({name.rsplit("/", 1)[1] for name in errors})):
        key = jax.random.fold_in(jax.random.key(config.seed), KEY + number)
        traces |= mean_traces(context.model, variables, batches, kind, key)
    return sensitivities(context.costs, traces, errors)


def sensitivities(
    costs: LayerCosts, traces: dict[str, float], errors: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Returns searched layer -> Omega of each branch.

    Args:
      costs: the network's layers.
      traces: LAYER/act and LAYER/weight, if their widths are searched -> trace of the Hessian.
      errors: the same keys -> mean squared error of each width.

    Widths that are not searched would add a constant, and are left out.
    """
    found = {}
    for path, cost in costs.items():
        if not cost.searched:
            continue
        omega = np.zeros((len(cost.act_bits), len(cost.weight_bits)))
        for kind, shape in (("act", (-1, 1)), ("weight", (1, -1))):
            name = f"{path}/{kind}"
            if name in traces:
                # With a negative trace (noise, or negative curvature) greater errors would seem
                # better; with the lower bound, the layer gets the bits that the others leave.
                least = LEAST * max(traces.values())
                omega += max(traces[name], least) * errors[name].reshape(shape)
        found[path] = omega.ravel()
    return found


def mean_errors(
    model: nn.Module, variables: Any, batches: Iterable[jax.Array]
) -> dict[str, np.ndarray]:
    """Returns LAYER/act and LAYER/weight -> mean squared error of each width.

    Step sizes are initialized on each batch by quant.init_rule, from full-precision activations;
    those in the state are not calibrated yet.
    """

    @jax.jit
    def measure(variables: Any, images: jax.Array) -> Any:
        return model.apply(variables, images, mutable=["errors"])[1]["errors"]

    errors = [
        flatten_dict(jax.device_get(measure(variables, images)), sep="/") for images in batches
    ]
    return {name: np.mean([row[name] for row in errors], axis=0) for name in errors[0]}


def mean_traces(
    model: nn.Module,
    variables: Any,
    batches: list[tuple[jax.Array, jax.Array]],
    kind: str,
    key: jax.Array,
) -> dict[str, float]:
    """Returns LAYER/kind -> trace of the loss's Hessian, by Hutchinson's estimator.

    Args:
      model: run at full precision in evaluation mode.
      variables: params and batch_stats.
      batches: images and labels.
      kind: "act" or "weight".
      key: for the probes.
    """
    probe, rows = jax.jit(make_probe(model, kind)), []
    for number in range(PROBES):
        keys = jax.random.split(jax.random.fold_in(key, number), len(batches))
        samples = [
            jax.device_get(probe(variables, *batch, batch_key))
            for batch, batch_key in zip(batches, keys, strict=True)
        ]
        names = list(samples[0])
        rows.append(np.mean([[sample[name] for name in names] for sample in samples], axis=0))
        traces = np.mean(rows, axis=0)
        errors = np.full_like(traces, np.inf)
        if len(rows) >= FEWEST_PROBES:
            errors = np.std(rows, axis=0, ddof=1) / len(rows) ** 0.5
        if np.all(errors <= PRECISION * np.abs(traces)):
            break
    logging.info(
        "traces of the Hessian, +- standard error over %d probes on %d images each: %s",
        len(rows), sum(len(labels) for _, labels in batches),
        ", ".join(
            f"{name} {trace:.3g} +- {error:.1g}"
            for name, trace, error in zip(names, traces, errors, strict=True)
        ),
    )  # fmt: skip
    return dict(zip(names, traces.tolist(), strict=True))


def make_probe(model: nn.Module, kind: str) -> Callable[..., dict[str, jax.Array]]:
    """Returns `probe(variables, images, labels, key) -> {LAYER/kind: v_l^T (H v)_l}`.

    v are random signs, and H is the Hessian of the batch's mean cross-entropy with respect to the
    inputs (kind "act") or kernels ("weight") of all layers together. The parts of v are
    independent, so blocks between layers cancel in the mean over v, and one product gives
    E[v_l^T (H v)_l] = Tr(H_ll) for all l. These blocks add noise; those between inputs and kernels
    would add most of it, hence one kind at a time.
    """

    def probe(
        variables: Any, images: jax.Array, labels: jax.Array, key: jax.Array
    ) -> dict[str, jax.Array]:
        def loss(flat: dict[str, jax.Array]) -> jax.Array:
            perturbed = variables | {"perturbations": unflatten_dict(flat, sep="/")}
            scores = model.apply(perturbed, images)
            return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()

        _, found = model.apply(variables, images, mutable=["perturbations"])
        zeros = flatten_dict(found["perturbations"], sep="/")
        signs = {}
        for number, (name, zero) in enumerate(zeros.items()):
            draw = jax.random.rademacher(jax.random.fold_in(key, number), zero.shape, zero.dtype)
            signs[name] = draw if name.endswith(f"/{kind}") else zero
        product = jax.jvp(jax.grad(loss), (zeros,), (signs,))[1]
        return {
            name: (signs[name] * product[name]).sum() for name in zeros if name.endswith(f"/{kind}")
        }

    return probe


SEARCHER = Searcher(
    name="hessian",
    summary="least sum of Hessian trace x squared quantization error at the layers' inputs, by "
    "exact knapsack (after HAWQ-V2)",
    phases=FINE_TUNING,
    choose=choose,
)
