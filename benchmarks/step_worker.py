"""A worker process of steps.py: builds a training step and runs it on request.

    python benchmarks/step_worker.py BY NETWORK KIND ARRAYS

BY is one of steps.py's --frameworks; `prepare`, which writes start weights to ARRAYS; or `check`,
which compares our steps with PyTorch's in float64.
"""

import argparse
import ctypes
import importlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # processes share a device

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from metamix_jax.runtime import cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("by", "network", "kind", "arrays"):
        parser.add_argument(name)
    for name in ("batch_size", "image_size", "steps", "check_images", "cores"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--act_bits", type=lambda text: tuple(map(int, text.split(","))))
    options = parser.parse_args()
    config = configuration(options)
    if options.by == "ours_bfloat16":
        config.compute_dtype = "bfloat16"
    if options.by == "prepare":
        prepare(config, options.arrays)
    elif options.by == "check":
        config.batch_size = options.check_images
        check(config, options.arrays)
    else:
        if options.cores:
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
        if options.by in ("ours", "ours_bfloat16", "ours_one_device", "torch_kept_malloc"):
            cpu.keep_freed_memory()
        if options.by in ("ours", "ours_bfloat16", "ours_plain_malloc"):
            cpu.use_cores(config)
        make = our_steps if options.by.startswith("ours") else torch_steps
        answer(options.steps, *make(config, options))


def answer(steps: int, run: Callable, device_bytes: Callable, before: int, seconds: float) -> None:
    """Tells how many seconds compiling took, then answers questions, line by line.

    "steps": wall and CPU seconds of that many steps, loss and gradient norm of their first.
    "memory": peak MiB since compilation.
    """
    print(json.dumps({"seconds": seconds}), flush=True)
    reset_peak()
    for question in sys.stdin:
        if question.strip() == "memory":
            peak = device_bytes() or resident("VmHWM") - before
            print(json.dumps(peak / 2**20), flush=True)
            continue
        wall, busy = time.perf_counter(), time.process_time()
        loss, norm = (float(value) for value in run(steps))
        spent = [time.perf_counter() - wall, time.process_time() - busy]
        print(json.dumps({"spent": spent, "loss": loss, "norm": norm}), flush=True)


def resident(field: str) -> int:
    """Returns this process's memory in bytes: VmRSS, or VmHWM, its peak since `reset_peak`."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    found = next((line for line in status.splitlines() if line.startswith(field)), None)
    return int(found.split()[1]) * 1024 if found else resource.getrusage(0).ru_maxrss * 1024


def reset_peak() -> None:
    """Resets the peak, to exclude memory used by compilation."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def configuration(options: argparse.Namespace) -> Any:
    config = importlib.import_module(f"configs.{options.network}").get_config()
    config.loss = "cross_entropy"
    config.batch_size = options.batch_size
    config.data.image_size = options.image_size
    config.data.augment = "none"
    config.quant.act_bits = options.act_bits
    config.budget.unit, config.budget.value = "fraction", 1.0
    config.bit_search.alternate = False
    config.bit_search.budget_form = "argmax"
    for phase in ("full_precision", "bit_meta", "bit_search", "weight_training"):
        config[phase].epochs = 1.0
        if phase != "bit_search":
            config[phase].learning_rate = 1e-4
    return config


def random_batch(config: Any) -> dict[str, np.ndarray]:
    rng, size = np.random.default_rng(0), config.data.image_size
    batch = config.batch_size
    return {
        "image": rng.integers(0, 256, (batch, size, size, 3), np.uint8),
        "label": rng.integers(0, config.data.num_classes, batch, np.int32),
        "index": np.arange(batch, dtype=np.int32),
        "epoch": np.zeros(batch, np.int32),
    }


def prepare(config: Any, path: str) -> None:
    """Writes weights and calibrated step sizes by path to an .npz."""
    import jax
    from flax.traverse_util import flatten_dict

    from metamix_jax.training import setup
    from metamix_jax.training.calibrate import calibrations, make_calibrate

    network = setup.make_network(config)
    passes = calibrations(config, acts=True, weights=True)
    calibrate = jax.jit(make_calibrate(network.model, passes, config, train=True))
    state = calibrate(setup.init_state(config, network), random_batch(config))
    flat = flatten_dict({"params": state.params, "quant": state.quant}, sep="/")
    np.savez(path, **jax.device_get(flat))


def check(config: Any, path: str) -> None:
    """Compares losses and gradients of every kind of pass with PyTorch's, in float64.

    Biases are random: if they were 0, a channel whose sums are all equal would be on the kink of
    its ReLU up to rounding. The maximum of a pooling window can be attained at several equal
    outputs of a quantized stem, so the stem's gradients are left out of that pass.
    """
    import jax
    import optax
    import pytorch_metamix
    import torch
    from flax.traverse_util import unflatten_dict

    from metamix_jax.networks.precision import Precision
    from metamix_jax.networks.zoo import mobilenet
    from metamix_jax.training import setup

    jax.config.update("jax_enable_x64", True)
    mobilenet.DROPOUT = 0.0
    network, arrays = setup.make_network(config), dict(np.load(path))
    random = np.random.default_rng(1)
    for name, array in arrays.items():
        noise = random.normal(size=array.shape) if name.endswith("/bias") else 0.0
        arrays[name] = array.astype(np.float64) + 0.3 * noise
    batch = random_batch(config)
    images = (batch["image"] / 255 - config.data.mean) / config.data.std
    reference = torch_network(config, path).double()
    pytorch_metamix.load(reference, arrays)

    @jax.jit(static_argnums=1)
    def ours(flat, precision):
        scores, _ = network.model.apply(
            unflatten_dict(flat, sep="/"), images, train=True, precision=precision,
            mutable=["batch_stats"],
        )  # fmt: skip
        return optax.softmax_cross_entropy_with_integer_labels(scores, batch["label"]).mean()

    for acts, weights in ((0, "quantized"), ("mixture", "full")):
        loss, slopes = jax.value_and_grad(ours)(arrays, Precision(acts, weights))
        reference.zero_grad()
        inputs = torch.tensor(images).permute(0, 3, 1, 2)
        scores = reference(inputs, (acts, weights == "quantized"))
        theirs = torch.nn.functional.cross_entropy(scores, torch.tensor(batch["label"]).long())
        theirs.backward()
        found = pytorch_metamix.gradients(reference, arrays)
        tied = config.model.name == "resnet18" and weights == "quantized"
        error = max(
            np.max(np.abs(found[name] - slope)) / max(np.max(np.abs(slope)), 1e-3)
            for name, slope in slopes.items()
            if not (tied and name.split("/")[1] == "conv1")
        )
        off = abs(float(loss) - theirs.item())
        print(f"float64, {acts} {weights}: loss {loss:.9f}, differs by {off:.1e}, gradients by "
              f"{error:.1e}", file=sys.stderr)  # fmt: skip
        assert off < 1e-6 and error < 1e-6, "not the same computation"


def our_steps(config: Any, options: argparse.Namespace) -> tuple[Callable, Callable, int, float]:
    """Returns a function that runs steps, one that returns peak bytes, bytes before, seconds.

    On an accelerator, all steps of a call are one block, as in a run.
    """
    import jax
    from flax.traverse_util import unflatten_dict

    from metamix_jax.networks.zoo import mobilenet
    from metamix_jax.runtime import sharding
    from metamix_jax.selection import cost
    from metamix_jax.selection import policy as policy_lib
    from metamix_jax.training import setup
    from metamix_jax.training.step import blocks
    from metamix_jax.training.step.batch_step import make_train_step
    from metamix_jax.training.step.state import enter_phase

    mobilenet.DROPOUT = 0.0  # otherwise losses could not be compared
    device = jax.devices()[0]
    whole = device.platform != "cpu"
    before = resident("VmRSS")
    network = setup.make_network(config)
    schedule = setup.make_schedule(config, train_examples=10_000 * config.batch_size)
    span = next(span for span in schedule if span.phase.name == options.kind)
    leaves = np.load(options.arrays).items()
    trees = unflatten_dict({path: jax.device_put(leaf) for path, leaf in leaves}, "/")
    state = setup.init_state(config, network).replace(**trees)
    mesh = sharding.make_mesh()
    kept = [sharding.replicate(enter_phase(state, span, config), mesh)]
    branches = policy_lib.branches(cost.uniform_bits(network.costs, 4), network.costs)
    branches, batch = sharding.replicate(branches, mesh), random_batch(config)
    train_step = make_train_step(network.model, span, config, network.budget, None, scan=whole)
    started = time.perf_counter()
    if whole:
        split = sharding.replicate({key: batch.pop(key) for key in ("image", "label")}, mesh)
        block = {name: np.stack([rows] * options.steps) for name, rows in batch.items()}
        block = sharding.shard_batch(block, mesh, axis=1)
        run_block = blocks.in_blocks(train_step)
        program = run_block.lower(kept[0], block, split, branches, {}).compile()
    else:
        batch = sharding.shard_batch(batch, mesh)
        copy = jax.tree.map(jax.numpy.copy, kept[0])
        jax.block_until_ready(train_step(copy, batch, branches, {}))
    seconds = time.perf_counter() - started

    def run(steps: int) -> tuple[Any, Any]:
        if whole:
            kept[0], metrics = program(kept[0], block, split, branches, {})
        else:
            rows = []
            for _ in range(steps):
                kept[0], found = train_step(kept[0], batch, branches, {})
                rows.append(found)
            jax.block_until_ready(rows)
            metrics = rows[0]
        return tuple(np.ravel(metrics[name])[0] for name in ("loss", "gradient_norm"))

    statistics = device.memory_stats if whole else dict
    return run, lambda: statistics().get("peak_bytes_in_use", 0), before, seconds


def torch_network(config: Any, arrays: str) -> Any:
    import pytorch_metamix
    import pytorch_networks

    network = pytorch_networks.make_network(
        config.model.name,
        config.data.num_classes,
        tuple(config.quant.act_bits),
        config.quant.weight_bits[0],
    )
    pytorch_metamix.load(network, dict(np.load(arrays)))
    return network


def torch_steps(config: Any, options: argparse.Namespace) -> tuple[Callable, Callable, int, float]:
    """The same for pytorch_metamix.py."""
    import pytorch_metamix
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    before = resident("VmRSS")
    network = torch_network(config, options.arrays)
    network = network.to(device, memory_format=torch.channels_last)
    batch = random_batch(config)
    images = torch.tensor(batch["image"]).permute(0, 3, 1, 2).to(device)  # stays channels-last
    labels = torch.tensor(batch["label"]).long().to(device)
    constants = {
        name: torch.tensor(config.data[name], device=device).reshape(1, -1, 1, 1)
        for name in ("mean", "std")
    }
    constants |= {"act_bits": tuple(config.quant.act_bits), "clip_norm": config.optimizer.clip_norm}
    constants |= {"budget_weight": config.bit_search.budget_weight}
    trainer = pytorch_metamix.Trainer(network, options.kind, constants)
    started = time.perf_counter()
    if options.by == "torch_compiled":
        compiled = torch.compile(network)
        trainer.network = compiled
        trainer.step(images, labels)
        # Again from the start, so that first losses can be compared.
        pytorch_metamix.load(network, dict(np.load(options.arrays)))
        trainer = pytorch_metamix.Trainer(network, options.kind, constants)
        trainer.network = compiled
        torch.cuda.empty_cache()

    def run(steps: int) -> tuple[Any, Any]:
        first, *rest = [trainer.step(images, labels) for _ in range(steps)]
        return [value.item() for pair in (*rest, first) for value in pair][-2:]

    peak = torch.cuda.max_memory_allocated if device == "cuda" else int
    return run, peak, before, time.perf_counter() - started


if __name__ == "__main__":
    main()
