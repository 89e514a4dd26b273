"""--mode=profile: how long every layer takes at every candidate, in onnxruntime on this machine.

It needs no data and no trained weights: the time of integer kernels does not depend on values.
"""

import csv
import io
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from metamix_jax.config import validate
from metamix_jax.errors import UserError
from metamix_jax.exporters import integer_runtime
from metamix_jax.exporters.build import build_graph
from metamix_jax.exporters.graph import Graph
from metamix_jax.exporters.layer_times import Times, layer_times
from metamix_jax.networks import registry
from metamix_jax.networks.precision import Bits
from metamix_jax.report import tables
from metamix_jax.runtime.progress import waiting
from metamix_jax.selection.cost import LayerCosts
from metamix_jax.selection.latency import COLUMNS, REST
from metamix_jax.selection.policy import make_policy
from metamix_jax.training import setup
from metamix_jax.workdir.files import make_workdir, write_text_atomic

TABLE = "latencies.csv"
STEP = 0.05  # of all quantizers
IMAGES = 8  # random, for the ranges of streams


def run(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Writes latencies.csv, for config.budget.latencies; returns the RESULT line's content.

    Raises:
      UserError: onnxruntime is not installed, or the network cannot be exported.
    """
    validate(config)
    model, costs = setup.make_model(config)
    shape, options = setup.image_shape(config.data), config.profile
    with waiting("exporting the network at every candidate"):
        graphs = _graphs(model, costs, shape)
        if reason := integer_runtime.obstacle():
            raise UserError(f"--mode=profile measures network.int8.onnx, but {reason}")
        make_workdir(workdir)
        pixels = np.random.default_rng(0).integers(0, 256, (IMAGES, *shape), np.uint8)
        files = {
            name: integer_runtime.integer_files(graph, pixels)[0] for name, graph in graphs.items()
        }
    times = layer_times(
        graphs, files,
        rounds=options.rounds, batch_size=options.batch_size, threads=options.threads,
    )  # fmt: skip
    rows = _rows(costs, times)
    write_text_atomic(workdir / TABLE, _csv(rows))
    whole = {name: found.whole for name, found in times.items()}
    print(tables.latency_table(rows, whole))
    return {
        "mode": "profile", "model": registry.label(config.model), "table": str(workdir / TABLE),
        "milliseconds": whole, "threads": options.threads, "batch_size": options.batch_size,
    }  # fmt: skip


def _graphs(
    model: nn.Module, costs: LayerCosts, image_shape: tuple[int, int, int]
) -> dict[str, Graph]:
    """Returns the network with all searched layers at one candidate: its name -> the graph."""
    variables = stand_ins(model, image_shape)
    candidates = {layer.candidates for layer in costs.values() if layer.searched}
    return {
        _name(pair): stand_in_graph(model, variables, costs, image_shape, {
            path: pair if pair in layer.candidates else layer.candidates[0]
            for path, layer in costs.items()
        })
        for pair in sorted(set().union(*candidates), reverse=True)
    }  # fmt: skip


def stand_in_graph(
    model: nn.Module,
    variables: Mapping[str, Any],
    costs: LayerCosts,
    image_shape: tuple[int, int, int],
    bits: Mapping[str, Bits],
) -> Graph:
    """Returns the network with random weights at the given widths: times do not depend on values.

    Args:
      model: the network.
      variables: its `stand_ins`.
      costs: of its layers.
      image_shape: (height, width, channels).
      bits: layer -> activation and weight bits.

    Raises:
      UserError: the network cannot be exported.
    """
    facts = {"model": "profile", "image_size": image_shape[0], "searcher": "uniform", "seed": 0}
    policy = make_policy(costs, bits, budget_gbops=0.0, **facts)
    return build_graph(model, variables, policy, image_shape=image_shape, mean=(0.5,), std=(0.25,))


def stand_ins(model: nn.Module, image_shape: tuple[int, int, int]) -> dict[str, Any]:
    """Returns random weights, neutral batch norm, and steps of the same size everywhere."""
    keys = {"params": jax.random.key(0), "quant": jax.random.key(0)}
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    shapes, rng = jax.eval_shape(model.init, keys, images), np.random.default_rng(0)

    def weights(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        return rng.normal(0, 2 * STEP, leaf.shape).astype(np.float32)

    return {
        "params": jax.tree.map(weights, shapes["params"]),
        "batch_stats": jax.tree.map(
            lambda leaf: np.ones(leaf.shape, np.float32), shapes.get("batch_stats", {})
        ),
        "quant": jax.tree.map(lambda leaf: np.full(leaf.shape, STEP, np.float32), shapes["quant"]),
    }


def _name(bits: Bits) -> str:
    return f"{bits.act}/{bits.weight}"


def _rows(costs: LayerCosts, times: Mapping[str, Times]) -> list[dict[str, Any]]:
    """Returns {layer, act_bits, weight_bits, milliseconds, spread} of every layer at every pair."""
    rows = []
    for path, layer in costs.items():
        for pair in layer.candidates:
            measured = [times[_name(pair)]] if layer.searched else list(times.values())
            rows.append(
                {
                    "layer": path, "act_bits": pair.act, "weight_bits": pair.weight,
                    "milliseconds": statistics.median(found.layers[path] for found in measured),
                    "spread": statistics.median(found.spread[path] for found in measured),
                }
            )  # fmt: skip
    rest = statistics.median(found.rest for found in times.values())
    return [*rows, {"layer": REST, "act_bits": "", "weight_bits": "", "milliseconds": rest,
                    "spread": 0.0}]  # fmt: skip


def _csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=[*COLUMNS, "spread"], lineterminator="\n")
    writer.writeheader()
    numbers = ("milliseconds", "spread")
    writer.writerows({**row, **{name: f"{row[name]:.6g}" for name in numbers}} for row in rows)
    return text.getvalue()
