"""Cost of saving a checkpoint: how long the loop waits, and the share of digests in it.

    python benchmarks/checkpoint_cost.py [CONFIG_FILE, default configs/mbv2.py]

The state is that of weight training with Adam; Orbax's writing in the background is not counted.
"""

import importlib.util
import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from metamix_jax.training import nonfinite, setup
from metamix_jax.training.checkpoints import Checkpoints
from metamix_jax.workdir import digests

REPEATS = 5


def main(path="configs/mbv2.py"):
    specification = importlib.util.spec_from_file_location("recipe", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    config = module.get_config()
    network = setup.make_network(config)
    span = setup.make_schedule(config, 1_281_167)[-1]
    shapes = setup.abstract_state(config, network, span).replace(rng=None)
    seconds = {"digests": [], "finite check": [], "save, all in all": []}
    with tempfile.TemporaryDirectory() as folder, Checkpoints(Path(folder), create=True) as found:
        for step in range(REPEATS):
            state = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.1, leaf.dtype), shapes)
            state = jax.block_until_ready(state.replace(rng=jax.random.key(0)))
            for name, act in (
                ("finite check", lambda state=state: nonfinite.broken_leaves(state)),
                ("digests", lambda state=state: digests.of_arrays(state)),
                ("save, all in all", lambda state=state, step=step: found.save(step, state, {})),
            ):
                started = time.perf_counter()
                act()
                seconds[name].append(time.perf_counter() - started)
            found.wait()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state.replace(rng=None))) / 2**20
    print(f"{network.label}: {size:.1f} MiB in {len(jax.tree.leaves(state))} arrays")
    for name, values in seconds.items():
        print(f"{name}: median {1000 * statistics.median(values):.0f} ms")


if __name__ == "__main__":
    main(*sys.argv[1:])
