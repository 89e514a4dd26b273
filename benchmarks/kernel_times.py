"""Which kernels of onnxruntime an exported network spends its time in, beside float32.

    python -m benchmarks.kernel_times RECIPE [--bits=8] [--batch=1] [--rounds=30] [FIELD=VALUE ...]

The network has random weights, all searched layers at BITS. One thread. Kernels of all nodes of a
kind are added up, the median of the rounds. Prints a table and one line of JSON. Reading the clock
lengthens every kernel by the same few microseconds, so kinds with many nodes look slower than they
are.
"""

import argparse
import collections
import json
import statistics
import tempfile
from pathlib import Path

import numpy as np

from metamix_jax.commands.profile import stand_in_graph, stand_ins
from metamix_jax.exporters import card, integer_runtime, onnx_files
from metamix_jax.exporters.graph import IMAGE
from metamix_jax.networks.precision import Bits
from metamix_jax.recipes import load_config, parse_fields
from metamix_jax.training import setup

WARM_UP = 3


def kernel_times(content: bytes, images: np.ndarray, rounds: int) -> dict[str, tuple[int, float]]:
    """Returns kind of kernel -> how many of them run, and their milliseconds in one call."""
    with tempfile.TemporaryDirectory() as folder:
        run = integer_runtime.session(content, 1, profile=f"{folder}/profile")
        for _ in range(rounds + WARM_UP):
            run.run(None, {IMAGE: images})
        events = json.loads(Path(run.end_profiling()).read_text(encoding="utf-8"))
    durations = collections.defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            durations[event["args"]["op_name"], event["name"]].append(event["dur"])
    found = collections.defaultdict(lambda: [0, 0.0])
    for (kind, _), times in durations.items():
        found[kind][0] += 1
        found[kind][1] += statistics.median(times[WARM_UP:]) / 1e3
    return {kind: tuple(row) for kind, row in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("--bits", type=int, default=8)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("fields", nargs="*")
    options = parser.parse_intermixed_args()
    config = load_config(options.recipe, **parse_fields(options.fields))
    model, costs = setup.make_model(config)
    image_shape, generator = setup.image_shape(config.data), np.random.default_rng(0)
    bits = {
        path: Bits(options.bits, layer.weight_bits[0]) if layer.searched else layer.candidates[0]
        for path, layer in costs.items()
    }
    graph = stand_in_graph(model, stand_ins(model, image_shape), costs, image_shape, bits)
    pixels = generator.integers(0, 256, (8, *image_shape), np.uint8)
    images = generator.normal(size=(options.batch, *image_shape)).astype(np.float32)
    images = integer_runtime.channels_first(images)
    files = {
        "float32": onnx_files.float_model(graph),
        card.INT8: integer_runtime.integer_files(graph, pixels)[0],
    }
    report = {}
    for name, content in files.items():
        found = report[name] = kernel_times(content, images, options.rounds)
        total = sum(milliseconds for _, milliseconds in found.values())
        print(f"\n{name}: {total / options.batch:.3g} ms an image in kernels")
        for kind, (count, milliseconds) in sorted(found.items(), key=lambda row: -row[1][1]):
            share = 100 * milliseconds / total
            print(
                f"{kind:28} {count:4d} nodes {milliseconds / options.batch:9.3f} ms {share:5.1f} %"
            )
    print(json.dumps({"batch": options.batch, "kernels": report}))


if __name__ == "__main__":
    main()
