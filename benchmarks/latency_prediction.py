"""How well a table of latencies predicts what networks at mixed widths take.

    python -m benchmarks.latency_prediction CONFIG TABLE [--policies=8]

TABLE was written by --mode=profile with the same recipe. Random policies are exported with random
weights and timed in onnxruntime, interleaved. Prints a row for each and one line of JSON.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from metamix_jax.commands.profile import stand_in_graph, stand_ins
from metamix_jax.exporters import integer_runtime
from metamix_jax.recipes import load_config
from metamix_jax.selection.cost import bits_at
from metamix_jax.selection.cost_models import latency_model
from metamix_jax.selection.latency import read_latencies
from metamix_jax.training import setup


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config")
    parser.add_argument("table", type=Path)
    parser.add_argument("--policies", default=8, type=int)
    options = parser.parse_args()
    config = load_config(options.config)
    model, costs = setup.make_model(config)
    shape = setup.image_shape(config.data)
    predicted = latency_model(costs, read_latencies(options.table, costs, "TABLE"))
    generator, variables = np.random.default_rng(0), stand_ins(model, shape)
    pixels = generator.integers(0, 256, (8, *shape), np.uint8)
    files, expected = {}, {}
    for number in range(options.policies):
        branches = {
            path: int(generator.integers(len(layer.candidates))) for path, layer in costs.items()
        }
        bits = bits_at(costs, branches)
        graph = stand_in_graph(model, variables, costs, shape, bits)
        files[str(number)] = integer_runtime.integer_files(graph, pixels)[0]
        expected[str(number)] = predicted.cost(bits)
    measured = integer_runtime.milliseconds(files, graph)
    rows = [
        {"predicted": expected[name], "measured": measured[name],
         "error": expected[name] / measured[name] - 1} for name in files
    ]  # fmt: skip
    for row in rows:
        print("  ".join(f"{name} {value:.4f}" for name, value in row.items()))
    print(json.dumps({"config": options.config, "rows": rows}))


if __name__ == "__main__":
    main()
