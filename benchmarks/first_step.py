"""Time from the start of Python to the end of the first training step, without and with a cache.

    python benchmarks/first_step.py [--network=cifar10_resnet20] [--kind=bit_meta] [--runs=5]

Every run is a separate process that does the same as main.py before its first step, except for
data, files and evaluation: imports, the network, its state from given weights, one step on a random
batch. The first run fills an empty compilation cache; the others find it filled. Prints wall and
CPU seconds (all cores together), medians over the other runs, then one line of JSON.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
STAGES = ("Python", "imports", "network", "state", "first step", "to first step", "second step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--network", default="cifar10_resnet20")
    parser.add_argument("--kind", default="bit_meta")
    parser.add_argument("--batch_size", default=128, type=int)
    parser.add_argument("--image_size", default=32, type=int)
    parser.add_argument("--runs", default=5, type=int)
    parser.add_argument("--inside", default="", help="of a run: when it was started, and the cache")
    options = parser.parse_args()
    if options.inside:
        print(json.dumps(run(options)))
        return
    with tempfile.TemporaryDirectory() as cache:
        found = [start(cache) for _ in range(options.runs + 1)]
    cold, warm = found[0], found[1:]
    rows = {
        stage: cold[stage] + [statistics.median(row[stage][i] for row in warm) for i in (0, 1)]
        for stage in STAGES
    }
    print(f"{'seconds':14} {'cold':>7} {'CPU':>7} {'warm':>7} {'CPU':>7}")
    for stage, seconds in rows.items():
        print(f"{stage:14} " + " ".join(f"{value:7.2f}" for value in seconds))
    print(json.dumps({"network": options.network, "kind": options.kind, "seconds": rows}))


def start(cache: str) -> dict[str, list[float]]:
    command = [sys.executable, __file__, *sys.argv[1:], f"--inside={time.time()},{cache}"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def run(options: argparse.Namespace) -> dict[str, list[float]]:
    """Runs two steps; returns wall and CPU seconds of every stage."""
    started, cache = options.inside.split(",")
    marks = [(float(started), 0.0)]

    def mark() -> None:
        marks.append((time.time(), time.process_time()))

    mark()
    gc.set_threshold(100_000)  # as in main.py
    sys.path.insert(0, str(ROOT))
    from metamix_jax.runtime import cpu

    cpu.keep_freed_memory()
    import step_worker

    options.act_bits = (8, 4, 3)
    config = step_worker.configuration(options)
    config.compilation_cache = cache
    cpu.use_cores(config)
    cpu.keep_compiled(config)
    import jax
    import numpy as np

    from metamix_jax.runtime import sharding
    from metamix_jax.selection import cost, policy
    from metamix_jax.training import setup
    from metamix_jax.training.step.batch_step import make_train_step
    from metamix_jax.training.step.state import enter_phase

    mark()
    network, mesh = setup.make_network(config), sharding.make_mesh()
    schedule = setup.make_schedule(config, train_examples=10_000 * config.batch_size)
    span = next(span for span in schedule if span.phase.name == options.kind)
    mark()
    shapes = setup.abstract_variables(network)
    weights = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.1, leaf.dtype), shapes)
    state = enter_phase(setup.init_state(config, network, weights), span, config)
    state = sharding.replicate(state, mesh)
    mark()
    bits = cost.uniform_bits(network.costs, 4)
    branches = sharding.replicate(policy.branches(bits, network.costs), mesh)
    batch = sharding.shard_batch(step_worker.random_batch(config), mesh)
    train_step = make_train_step(network.model, span, config, network.budget, None)
    for _ in range(2):
        state, metrics = train_step(state, batch, branches, {})
        jax.block_until_ready(metrics)
        mark()
    spent = [
        [after - before for before, after in zip(*pair, strict=True)]
        for pair in zip(marks, marks[1:], strict=False)
    ]
    whole = [last - first for first, last in zip(marks[0], marks[-2], strict=True)]
    return dict(zip(STAGES, [*spent[:-1], whole, spent[-1]], strict=True))


if __name__ == "__main__":
    main()
