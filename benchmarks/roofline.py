"""How close the fake quantizer and a training step come to the machine's limits.

    python benchmarks/roofline.py [--network=cifar10_resnet20] [--batch_size=128] [--image_size=32]

The quantizer, forward and backward, has to read its input and write the levels, then read input and
cotangent and write the input's gradient; its time is compared with copying as many bytes. A
full-precision step has 6 operations per multiply-accumulate of the network; its time is compared
with a matrix product of as many operations. Repetitions are interleaved; medians are reported.
Prints one line of JSON; arrays have --mebibytes.
"""

import argparse
import functools
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from metamix_jax.runtime import cpu

SIDE = 2048  # of the matrices
QUANTIZER_ARRAYS, COPY_ARRAYS = 5, 2  # read or written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--network", default="cifar10_resnet20")
    parser.add_argument("--batch_size", default=128, type=int)
    parser.add_argument("--image_size", default=32, type=int)
    parser.add_argument("--mebibytes", default=64, type=int)
    parser.add_argument("--repetitions", default=15, type=int)
    options = parser.parse_args()
    options.act_bits = (8, 4, 3)
    cpu.keep_freed_memory()
    import jax
    import jax.numpy as jnp
    import step_worker

    from metamix_jax.networks.quantizers import fake_quant
    from metamix_jax.selection import cost
    from metamix_jax.training import setup

    config = step_worker.configuration(argparse.Namespace(**vars(options)))
    macs = cost.totals(setup.make_network(config).costs)["macs"] * options.batch_size
    x = jax.random.normal(jax.random.key(0), (options.mebibytes * 2**18 // 64, 64))
    side = jax.random.normal(jax.random.key(1), (SIDE, SIDE))
    quantize = functools.partial(fake_quant, bits=4, signed=True)

    @jax.jit
    def quantizer(x, step):
        levels, pull = jax.vjp(quantize, x, step)
        return levels, pull(x)

    runs = {
        "copy": (jax.jit(jnp.negative), x),
        "quantizer": (quantizer, x, jnp.float32(0.3)),
        "product": (jax.jit(jnp.matmul), side, side),
    }
    seconds = {name: [] for name in runs}
    for _ in range(options.repetitions + 1):
        for name, (run, *inputs) in runs.items():
            started = time.perf_counter()
            jax.block_until_ready(run(*inputs))
            seconds[name].append(time.perf_counter() - started)
    median = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    rate = 2 * SIDE**3 / median["product"]
    moved = COPY_ARRAYS * x.nbytes / median["copy"]
    ratio = median["quantizer"] / median["copy"] * COPY_ARRAYS / QUANTIZER_ARRAYS
    numbers = {
        "device": jax.devices()[0].device_kind,
        "copy_gigabytes_per_second": moved / 1e9,
        "product_gigaflops": rate / 1e9,
        "quantizer_over_copy": ratio,
        "network": options.network,
        "full_precision_step_at_product_rate_ms": 1000 * 6 * macs / rate,
    }
    print(json.dumps(numbers))


if __name__ == "__main__":
    main()
