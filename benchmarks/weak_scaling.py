"""Sharding on virtual CPU devices: equality of results, overhead, communication.

    python benchmarks/weak_scaling.py [--devices=1,2,4,8] [--steps=20]

All devices share the cores of one machine, so nothing gets faster: the batch stays the same, and
the extra time compared with one device is the cost of sharding. Losses are for the same batches.
Then the all-reduces of a step of ResNet-18 and MobileNet-v2 are read from the compiled program;
their number and bytes do not depend on the image or batch size.
"""

import argparse
import importlib
import math
import os
import re
import statistics
import sys
import time
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import numpy as np

from metamix_jax.runtime import sharding
from metamix_jax.training import setup
from metamix_jax.training.step.batch_step import make_train_step
from metamix_jax.training.step.state import enter_phase


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--devices", default="1,2,4,8")
    parser.add_argument("--steps", default=20, type=int)
    options = parser.parse_args()
    config = importlib.import_module("configs.digits").get_config()
    network = setup.make_network(config)
    reference = None
    print(f"{'devices':>7} {'ms a step':>9} {'x one':>6} {'losses apart, relative':>23}")
    for devices in map(int, filter(None, options.devices.split(","))):
        losses, seconds = train(config, network, devices, options.steps)
        if reference is None:
            reference = losses, seconds
        apart = max(abs(a / b - 1) for a, b in zip(losses, reference[0], strict=True))
        ratio = seconds / reference[1]
        print(f"{devices:>7} {1000 * seconds:>9.1f} {ratio:>6.2f} {apart:>23.1e}", flush=True)
    for name in ("resnet18", "mbv2"):
        count, size = all_reduces(name)
        print(f"{name}: {count} arrays all-reduced a step, {size / 2**20:.1f} MiB")


def first_span(config, network):
    return next(
        span for span in setup.make_schedule(config, 10_000) if span.phase.name == "full_precision"
    )


def mesh_of(devices):
    return jax.make_mesh(
        (devices,), ("data",), devices=jax.devices()[:devices],
        axis_types=(jax.sharding.AxisType.Auto,),
    )  # fmt: skip


def make_batch(config, step):
    random, size = np.random.default_rng(step), config.data.image_size
    shape = (config.batch_size, size, size, config.data.channels)
    return {
        "image": random.integers(0, 256, shape, np.uint8),
        "label": random.integers(0, config.data.num_classes, config.batch_size, np.int32),
        "index": np.arange(config.batch_size, dtype=np.int32),
        "epoch": np.zeros(config.batch_size, np.int32),
    }


def train(config, network, devices, steps):
    """Returns the losses of full-precision steps on one sequence of batches, and median seconds."""
    mesh, span = mesh_of(devices), first_span(config, network)
    state = enter_phase(setup.init_state(config, network), span, config)
    state = sharding.replicate(state, mesh)
    step = make_train_step(network.model, span, config, None, None)
    losses, seconds = [], []
    for number in range(steps):
        batch = sharding.shard_batch(make_batch(config, number), mesh)
        started = time.perf_counter()
        state, metrics = step(state, batch, {}, {})
        losses.append(float(metrics["loss"]))
        seconds.append(time.perf_counter() - started)
    return losses, statistics.median(seconds[1:])  # the first one compiles


def all_reduces(name):
    """Returns the number of arrays all-reduced in a full-precision step, and their bytes."""
    config = importlib.import_module(f"configs.{name}").get_config("")
    config.data.image_size, config.batch_size = 32, 4
    config.full_precision.epochs, config.loss = 1.0, "cross_entropy"
    config.data.eval_resize, config.data.augment = 0, "none"
    config.search.searcher = "none"  # the budget is for images of 224 x 224
    network = setup.make_network(config)
    mesh, span = mesh_of(2), first_span(config, network)
    shapes = setup.abstract_state(config, network, span)
    state = sharding.replicated_target(shapes, mesh)
    step = make_train_step(network.model, span, config, None, None)
    batch = sharding.shard_batch(make_batch(config, 0), mesh)
    options = {"xla_backend_optimization_level": 0}
    lowered = jax.jit(step, compiler_options=options).lower(state, batch, {}, {})
    return count_all_reduces(lowered.compile().as_text())


def count_all_reduces(text):
    shapes = [
        shape
        for line in text.splitlines()
        if (found := re.search(r"= (.*?) all-reduce(?:-start)?\(", line))
        for shape in re.findall(r"[fs]32\[([\d,]*)\]", found[1])
    ]
    return len(shapes), sum(4 * math.prod(int(n) for n in s.split(",") if n) for s in shapes)


if __name__ == "__main__":
    main()
