"""Images per second, compile time and memory of a training step, by network and phase.

    python benchmarks/step_rates.py [--networks=resnet18,mbv2,mbv3] [--batch_size=64]

Networks are configurations of `configs/`, with random weights and random images that lie on the
device already: the steps alone are measured, not the input. Repetitions of the phases are
interleaved, so that whatever else runs slows all of them; the median counts, and the ratio is to
the full-precision step of the same run. Prints a table, then one line of JSON.
"""

import argparse
import importlib
import importlib.metadata
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from metamix_jax import cost, experiment
from metamix_jax import policy as policy_lib
from metamix_jax.state import enter_phase
from metamix_jax.train_step import make_train_step

PHASES = ("full_precision", "bit_meta", "bit_search", "weight_training")


def main() -> None:
    options = parse_options()
    results = [row for name in options.networks for row in measure(name, options)]
    print(f"{'network':10} {'phase':16} {'img/s':>8} {'x FP':>6} {'compile s':>10} {'MiB':>8}")
    for row in results:
        print(
            f"{row['network']:10} {row['phase']:16} {row['images_per_second']:8.1f} "
            f"{row['step_ratio']:6.2f} {row['compile_seconds']:10.1f} {row['mebibytes']:8.0f}"
        )
    facts = {"device": jax.devices()[0].device_kind, "batch_size": options.batch_size}
    facts |= {"image_size": options.image_size, "jax": importlib.metadata.version("jax")}
    print(json.dumps(facts | {"rows": results}))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--networks", default="resnet18,mbv2,mbv3", type=lambda t: t.split(","))
    parser.add_argument("--batch_size", default=64, type=int)
    parser.add_argument("--image_size", default=224, type=int)
    parser.add_argument("--steps", default=10, type=int, help="per repetition")
    parser.add_argument("--repetitions", default=5, type=int)
    return parser.parse_args()


def measure(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns one row per phase of a network."""
    runs = {phase: compiled_phase(name, phase, options) for phase in PHASES}
    seconds = {phase: [] for phase in PHASES}
    for repetition in range(options.repetitions + 1):
        for phase, run in runs.items():
            started = time.perf_counter()
            for _ in range(options.steps):
                run["state"], _ = run["step"](run["state"], *run["inputs"])
            jax.block_until_ready(run["state"])
            if repetition:  # the first warms up
                seconds[phase].append((time.perf_counter() - started) / options.steps)
    median = {phase: statistics.median(times) for phase, times in seconds.items()}
    return [
        {
            "network": name,
            "phase": phase,
            "images_per_second": options.batch_size / median[phase],
            "step_ratio": median[phase] / median["full_precision"],
            "compile_seconds": run["compile_seconds"],
            "mebibytes": run["mebibytes"],
        }
        for phase, run in runs.items()
    ]


def compiled_phase(name: str, phase: str, options: argparse.Namespace) -> dict[str, Any]:
    """Returns a phase's compiled step with its state and inputs."""
    config = importlib.import_module(f"configs.{name}").get_config()
    config.loss = "cross_entropy"
    config.batch_size = options.batch_size
    config.data.image_size = options.image_size
    config.budget.unit, config.budget.value = "fraction", 1.0
    config.full_precision.epochs = 1
    network = experiment.make_network(config)
    schedule = experiment.make_schedule(config, train_examples=100 * options.batch_size)
    span = next(span for span in schedule if span.phase.name == phase)
    state = enter_phase(experiment.init_state(config, network), span, config)
    branches = policy_lib.branches(
        cost.uniform_bits(network.costs, config.search.uniform_bits), network.costs
    )
    rng = np.random.default_rng(0)
    shape = (options.batch_size, options.image_size, options.image_size, 3)
    batch = {
        "image": rng.integers(0, 256, shape, np.uint8),
        "label": rng.integers(0, config.data.num_classes, options.batch_size, np.int32),
        "index": np.arange(options.batch_size, dtype=np.int32),
        "epoch": np.zeros(options.batch_size, np.int32),
    }
    inputs = (jax.device_put(batch), branches, {})
    step = make_train_step(network.model, span, config, network.budget, None)
    started = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=0).lower(state, *inputs).compile()
    seconds = time.perf_counter() - started
    memory = compiled.memory_analysis()
    needed = memory.temp_size_in_bytes + memory.argument_size_in_bytes
    return {
        "step": compiled,
        "state": state,
        "inputs": inputs,
        "compile_seconds": seconds,
        "mebibytes": needed / 2**20,
    }


if __name__ == "__main__":
    main()
