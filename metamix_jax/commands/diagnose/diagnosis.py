"""Runs a diagnosis: loads the states, measures, writes diagnostics.json, charts and tables."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from metamix_jax.commands.diagnose import probes, statistics
from metamix_jax.commands.diagnose.states import State, load_states
from metamix_jax.errors import UserError
from metamix_jax.report import diagnostic_charts, diagnostic_tables
from metamix_jax.runtime import sharding
from metamix_jax.runtime.progress import waiting
from metamix_jax.selection.policy import read_policy
from metamix_jax.selection.searchers import hessian
from metamix_jax.training import setup
from metamix_jax.training.step.batch_step import training_images
from metamix_jax.workdir.files import make_workdir, write_json

GAUSSIAN_SAMPLES = 1_000_000

Batches = Sequence[Mapping[str, jax.Array]]


def measure(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Writes diagnostics.json and charts to `workdir`, prints tables; returns the RESULT content.

    Raises:
      UserError: no weights to diagnose, or config.diagnose.layer is not usable.
    """
    network = setup.make_network(config, searches=False)
    layer = probes.pick_layer(config.diagnose.layer, network.costs)
    norm = probes.norm_after(layer, setup.abstract_variables(network)["batch_stats"])
    if norm is None:
        raise UserError(
            f"config.diagnose.layer={layer!r}: not followed by batch norm; choose another layer"
        )
    mesh = sharding.make_mesh()
    dataset = setup.load_dataset(config, mesh)
    schedule = setup.make_schedule(config, len(dataset.train))
    first, second = setup.train_batches(config, dataset, mesh, 0, 2)
    with waiting("loading weights"):
        states = load_states(config, workdir, network, schedule, first, mesh)
    make_workdir(workdir)
    variables = {name: state.variables for name, state in states.items()}
    samplers = {
        kind: probes.make_sampler(
            network.model, config, tuple(network.costs), train=kind == "batch"
        )
        for kind in probes.STATISTICS
    }
    with waiting("comparing activations"):
        # Not the batch used to calibrate step sizes.
        activations = probes.activation_distances(samplers, variables, second, network.costs, layer)
    with waiting(f"tracing the variance after {layer}"):
        traces = probes.variance_traces(
            probes.make_batch_variance(network.model, config, norm),
            variables,
            setup.train_batches(config, dataset, mesh, 0, config.diagnose.batches),
            network.costs,
            layer,
            momentum=network.model.bn_momentum,
            seed=config.seed,
        )
    gaussian = np.random.default_rng(config.seed).standard_normal(GAUSSIAN_SAMPLES)
    found = {
        "model": network.label,
        "layer": layer,
        "batch_norm": norm,
        "batch_size": config.batch_size,
        "states": {name: state.facts for name, state in states.items()},
        "summary": statistics.summarise(activations["distances"], _searched(network)),
        **activations,
        "variance_traces": traces,
        "quantized_variances": statistics.quantized_variances(gaussian),
        "sensitivity": _sensitivity(
            config, workdir, network, next(iter(states.values())), (first, second)
        ),
    }
    write_json(workdir / "diagnostics.json", found)
    diagnostic_charts.draw_all(found, workdir)
    print(diagnostic_tables.all_tables(found))
    return {
        "mode": "diagnose",
        **{name: found[name] for name in ("model", "layer", "states", "summary")},
        "spearman": found["sensitivity"] and found["sensitivity"]["spearman"],
    }


def _searched(network: setup.Network) -> list[str]:
    return [path for path, cost in network.costs.items() if len(cost.act_bits) > 1]


def _sensitivity(
    config: ConfigDict, workdir: Path, network: setup.Network, state: State, batches: Batches
) -> dict[str, Any] | None:
    """Returns the rank correlations of the workdir's policy; None without a policy."""
    path = workdir / "policy.json"
    if not path.exists():
        return None
    bits = read_policy(path, network.costs).bits
    searched, traces = _searched(network), None
    if config.diagnose.hessian:
        weights = {name: state.variables[name] for name in ("params", "batch_stats")}
        batches = [(training_images(batch, config), batch["label"]) for batch in batches]
        key = jax.random.key(config.seed)
        found = hessian.mean_traces(network.model, weights, batches, "act", key)
        traces = {path: found[f"{path}/act"] for path in searched}
    return statistics.sensitivity(
        {path: bits[path].act for path in searched},
        {path: network.costs[path].macs for path in searched},
        traces,
    )
