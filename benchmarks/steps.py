"""Time, compile time and peak memory of training steps, ours and PyTorch's, side by side.

    python benchmarks/steps.py [--networks=cifar10_resnet20] [--batch_size=128] [--image_size=32]
        [--act_bits=8,4,3] [--frameworks=ours,torch] [--cores=1] [--repetitions=5]
        [--steps=2] [--json=FILE]

A network is a configuration of `configs/`. All frameworks start from the same random weights and
calibrated step sizes, on random images that are already on the device, so only the steps are
measured, not the input. `torch` is pytorch_metamix.py with pytorch_networks.py (needs torch),
`torch_compiled` the same with torch.compile; `ours_bfloat16` sets config.compute_dtype;
`ours_plain_malloc` and `torch_kept_malloc` show the effect of cpu.py's reuse of freed memory;
`ours_one_device` does not split the CPU into devices. `bit_search` is the update of the logits
alone, without the bit-meta step that precedes it in a run.

Every kind of step has its own process, which waits while the others run; repetitions are
interleaved, so that other work slows all of them. Medians are reported; ratios are within one run.
"CPU ms" is the time of all cores together, which other programs disturb less, least of all with
--cores=1, because PyTorch's threads wait for each other by spinning. "first s" is the first step,
including compilation; MiB is the peak growth of the process (on a GPU, of device memory). Prints a
table, then one line of JSON.

That both compute the same is checked in float64, where no rounding flips: losses and gradients of
every kind of pass on --check_images images, to 1e-6 (0 skips the check; see step_worker.py's
`check`). In float32, a flipped level changes a step's loss by about 1e-3 (more with the
lower-precision products of accelerators); first losses are printed, and must agree to 5e-2.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

WORKER = Path(__file__).with_name("step_worker.py")
KINDS = ("full_precision", "weight_training", "bit_meta", "bit_search")


def main() -> None:
    options = parse_options()
    rows = [row for name in options.networks for row in measure(name, options)]
    print(
        f"{'network':18} {'step':16} {'by':14} {'ms':>8} {'CPU ms':>8} {'img/s':>8} {'x FP':>6} "
        f"{'x torch':>8} {'first s':>8} {'MiB':>7}"
    )
    for row in rows:
        ratio = row["rate_over_torch"] or float("nan")
        print(
            f"{row['network']:18} {row['step']:16} {row['by']:14} {row['milliseconds']:8.1f} "
            f"{row['cpu_milliseconds']:8.1f} {row['images_per_second']:8.1f} "
            f"{row['over_full_precision']:6.2f} {ratio:8.2f} {row['first_step_seconds']:8.1f} "
            f"{row['mebibytes']:7.0f}"
        )
    names = ("jax", "jaxlib", "torch") if "torch" in options.frameworks else ("jax", "jaxlib")
    facts = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} x {platform.processor() or platform.machine()}",
        "load": os.getloadavg()[0],
        **{name: importlib.metadata.version(name) for name in names},
        **{
            name: getattr(options, name)
            for name in ("batch_size", "image_size", "act_bits", "cores")
        },
    }
    line = json.dumps(facts | {"rows": rows})
    print(line)
    if options.json:
        Path(options.json).write_text(line + "\n", encoding="utf-8")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    listed = {"type": lambda text: text.split(",")}
    parser.add_argument("--networks", default=["cifar10_resnet20"], **listed)
    parser.add_argument("--frameworks", default=["ours", "torch"], **listed)
    parser.add_argument("--kinds", default=list(KINDS), **listed)
    parser.add_argument("--batch_size", default=128, type=int)
    parser.add_argument("--image_size", default=32, type=int)
    parser.add_argument("--act_bits", default="8,4,3")
    parser.add_argument("--steps", default=2, type=int, help="per repetition")
    parser.add_argument("--repetitions", default=5, type=int)
    parser.add_argument("--cores", default=0, type=int, help="cores per process; 0 = all")
    parser.add_argument("--check_images", default=4, type=int)
    parser.add_argument("--json", default="", help="file for the line of JSON")
    return parser.parse_args()


def measure(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns one row per kind of step and framework for a network."""
    with tempfile.TemporaryDirectory() as folder:
        arrays = Path(folder) / "arrays.npz"
        subprocess.run(command(options, "prepare", name, "", arrays), check=True)
        if "torch" in options.frameworks and options.check_images:
            subprocess.run(command(options, "check", name, "", arrays), check=True)
        keys = [(kind, by) for kind in options.kinds for by in options.frameworks]
        workers, first = {}, {}
        for kind, by in keys:
            workers[kind, by] = subprocess.Popen(
                command(options, by, name, kind, arrays),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
            )  # fmt: skip
            first[kind, by] = json.loads(workers[kind, by].stdout.readline())
    check_same(first, options)
    times = {key: [] for key in keys}
    for repetition in range(options.repetitions + 1):
        for key, worker in workers.items():
            spent = ask(worker, "steps")
            if repetition:  # the first is a warm-up
                times[key].append([1000 * each / options.steps for each in spent])
    memory = {key: ask(worker, "memory") for key, worker in workers.items()}
    for worker in workers.values():
        worker.communicate()
    median = {key: statistics.median(wall for wall, _ in found) for key, found in times.items()}
    cpu = {key: statistics.median(cpu for _, cpu in found) for key, found in times.items()}
    return [
        {
            "network": name,
            "step": kind,
            "by": by,
            "milliseconds": median[kind, by],
            "cpu_milliseconds": cpu[kind, by],
            "images_per_second": 1000 * options.batch_size / median[kind, by],
            "over_full_precision": median[kind, by] / median.get(("full_precision", by), np.nan),
            "rate_over_torch": (
                median[kind, "torch"] / median[kind, by] if "torch" in options.frameworks else None
            ),
            "first_step_seconds": first[kind, by]["seconds"],
            "mebibytes": memory[kind, by],
            "all_milliseconds": times[kind, by],  # [wall, CPU]
        }
        for kind, by in keys
    ]


def check_same(first: dict[tuple[str, str], dict], options: argparse.Namespace) -> None:
    """Compares the losses of the first steps of each kind between frameworks."""
    for (kind, by), numbers in first.items():
        wanted = first[kind, options.frameworks[0]]["loss"]
        line = f"{kind} by {by}: loss {numbers['loss']:.6f}, gradient {numbers['norm']:.5f}"
        print(line, file=sys.stderr)
        assert abs(numbers["loss"] - wanted) < 5e-2, f"{line}, not {wanted:.6f}"


def command(options: argparse.Namespace, by: str, name: str, kind: str, arrays: Path) -> list[str]:
    keys = ("batch_size", "image_size", "steps", "check_images", "act_bits", "cores")
    passed = [f"--{key}={getattr(options, key)}" for key in keys]
    return [sys.executable, str(WORKER), by, name, kind, str(arrays), *passed]


def ask(worker: subprocess.Popen, question: str) -> Any:
    worker.stdin.write(question + "\n")
    return json.loads(worker.stdout.readline())


if __name__ == "__main__":
    main()
