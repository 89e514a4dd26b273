"""Time of an exported network in JAX: on integers, with quantizers in floats, and without them.

    python benchmarks/integer_speed.py [--network=resnet18] [--image_size=224] [--batch_size=32]

Weights are random. Calls are interleaved; prints a table of medians, then one line of JSON.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from metamix_jax.commands.profile import stand_ins
from metamix_jax.data import batching
from metamix_jax.exporters.build import build_graph
from metamix_jax.exporters.integer_jax import IntegerNetwork
from metamix_jax.networks import registry
from metamix_jax.networks.precision import FULL, Precision, QuantSettings
from metamix_jax.selection import cost
from metamix_jax.selection.policy import make_policy

MEAN, STD = (0.5,), (0.25,)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--network", default="resnet18")
    parser.add_argument("--image_size", default=224, type=int)
    parser.add_argument("--batch_size", default=32, type=int)
    parser.add_argument("--bits", default=8, type=int, help="of the activations")
    parser.add_argument("--repetitions", default=10, type=int)
    return parser.parse_args()


def forms(options: argparse.Namespace) -> dict[str, Callable[[np.ndarray], Any]]:
    """Returns the name of a form -> scores of uint8 images."""
    shape = (options.image_size, options.image_size, 3)
    settings = QuantSettings(act_bits=(8, 4), weight_bits=(4,))
    name = ConfigDict({"name": options.network})
    model = registry.make(name, 1000, settings, shape)
    costs, variables = cost.layer_costs(model, shape), stand_ins(model, shape)
    bits = cost.uniform_bits(costs, options.bits, 4)
    facts = {"model": options.network, "image_size": shape[0], "searcher": "uniform", "seed": 0}
    policy = make_policy(costs, bits, budget_gbops=0.0, **facts)
    graph = build_graph(model, variables, policy, image_shape=shape, mean=MEAN, std=STD)
    chosen = Precision("chosen", "quantized", policy.branches(costs))

    def in_floats(precision: Precision) -> Callable[[np.ndarray], jax.Array]:
        @jax.jit
        def run(variables: Any, pixels: jax.Array) -> jax.Array:
            images = batching.preprocess(pixels, mean=MEAN, std=STD)
            return model.apply(variables, images, precision=precision)

        return lambda pixels: run(variables, pixels)

    return {
        "float32": in_floats(FULL), "fake quantization": in_floats(chosen),
        "integers": IntegerNetwork(graph).scores,
    }  # fmt: skip


def main() -> None:
    options = parse_options()
    shape = (options.batch_size, options.image_size, options.image_size, 3)
    pixels = jax.device_put(np.random.default_rng(0).integers(0, 256, shape, np.uint8))
    runs = forms(options)
    scores = {name: np.asarray(run(pixels)) for name, run in runs.items()}
    times = {name: [] for name in runs}
    for _ in range(options.repetitions):
        for name, run in runs.items():
            began = time.perf_counter()
            jax.block_until_ready(run(pixels))
            times[name].append(time.perf_counter() - began)
    found = {name: 1e3 * statistics.median(row) / len(pixels) for name, row in times.items()}
    same = np.mean(scores["integers"].argmax(-1) == scores["fake quantization"].argmax(-1))
    for name, milliseconds in found.items():
        print(f"{name:18} {milliseconds:9.4f} ms an image")
    device = jax.devices()[0].device_kind
    print(json.dumps({"device": device, "milliseconds": found, "same class": float(same),
                      **vars(options)}))  # fmt: skip


if __name__ == "__main__":
    main()
