"""Time, compile time and peak memory of training steps, ours and PyTorch's, side by side.

    python benchmarks/steps.py [--networks=cifar10_resnet20] [--batch_size=128] [--image_size=32]
        [--act_bits=8,4,3] [--frameworks=ours,torch] [--kinds=bit_meta,...] [--cores=1]
        [--repetitions=5] [--steps=2] [--json=FILE]

A network is a configuration of `configs/`; several batch sizes may be given. All frameworks start
from the same random weights and calibrated step sizes, on random images that are already on the
device, so only the steps are measured, not the input. `torch` is pytorch_metamix.py with
pytorch_networks.py (needs torch), `torch_compiled` the same with torch.compile; `ours_bfloat16`
sets config.compute_dtype; `ours_plain_malloc` and `torch_kept_malloc` show the effect of cpu.py's
reuse of freed memory; `ours_one_device` does not split the CPU into devices. `bit_search` is the
update of the logits alone, without the bit-meta step that precedes it in a run.

Every kind of step has its own process. On CPU all wait while one runs, and repetitions are
interleaved, so that other work slows all of them. On an accelerator all compile at once, then each
has the device to itself for its repetitions and frees it; --compile_seconds ends the waiting.
Medians are reported; ratios are within one run. "CPU ms" is the time of all cores together, which
other programs disturb less, least of all with --cores=1, because PyTorch's threads wait for each
other by spinning. "compile s" is the time until the step could run; MiB is the peak growth of the
process (on a GPU, of device memory). Prints a table, and with --json writes all numbers.

That both compute the same is checked in float64, where no rounding flips: losses and gradients of
every kind of pass on --check_images images, to 1e-6 (0 skips the check; see step_worker.py's
`check`). In float32, a flipped level changes a step's loss by about 1e-3 (more with the
lower-precision products of accelerators); first losses must agree to 5e-2.
"""

import argparse
import concurrent.futures
import contextlib
import functools
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

WORKER = Path(__file__).with_name("step_worker.py")
Run = tuple[str, int, str, str]  # network, batch size, kind of step, framework
CALIBRATION_IMAGES = 16
KINDS = ("full_precision", "weight_training", "bit_meta", "bit_search")


HEADER = (
    f"{'network':18} {'batch':>5} {'step':16} {'by':14} {'ms':>8} {'CPU ms':>8} {'img/s':>8} "
    f"{'x FP':>6} {'x torch':>8} {'compile s':>9} {'MiB':>7}"
)


def main() -> None:
    options = parse_options()
    runs = [
        (network, size, kind, by)
        for network in options.networks
        for size in options.batch_sizes
        for kind in options.kinds
        for by in options.frameworks
    ]
    with tempfile.TemporaryDirectory() as folder:
        rows, losses = measure(runs, options, Path(folder))
    compare(rows)
    print(HEADER)
    for row in rows:
        ratios = [row[key] or float("nan") for key in ("over_full_precision", "rate_over_torch")]
        print(
            f"{row['network']:18} {row['batch_size']:5} {row['step']:16} {row['by']:14} "
            f"{row['milliseconds']:8.2f} {row['cpu_milliseconds']:8.1f} "
            f"{row['images_per_second']:8.0f} {ratios[0]:6.2f} {ratios[1]:8.2f} "
            f"{row['compile_seconds']:9.1f} {row['mebibytes']:7.0f}"
        )
    if options.json:
        Path(options.json).write_text(json.dumps(facts(options) | {"rows": rows}) + "\n", "utf-8")
    missing = [run for run in runs if run not in losses]
    if missing:
        sys.exit(f"not compiled within {options.compile_seconds} s: {missing}")
    check_same(losses, options.apart)


def facts(options: argparse.Namespace) -> dict[str, Any]:
    """Returns date, machine and versions."""
    names = ("jax", "jaxlib", "flax", "torch")
    versions = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} x {platform.processor() or platform.machine()}",
        "accelerator": accelerator(),
        "load": os.getloadavg()[0],
        **versions,
        **{name: getattr(options, name) for name in ("image_size", "act_bits", "steps", "cores")},
    }


@functools.cache
def accelerator() -> str:
    """Returns the kind of accelerator that JAX finds, in a process of its own; "" for none."""
    program = "import jax; d = jax.devices()[0]; print(d.device_kind * (d.platform != 'cpu'))"
    return subprocess.check_output([sys.executable, "-c", program], text=True).strip()


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    listed = {"type": lambda text: text.split(",")}
    parser.add_argument("--networks", default=["cifar10_resnet20"], **listed)
    parser.add_argument("--frameworks", default=["ours", "torch"], **listed)
    parser.add_argument("--kinds", default=list(KINDS), **listed)
    parser.add_argument("--batch_size", default=["128"], dest="batch_sizes", **listed)
    parser.add_argument("--image_size", default=32, type=int)
    parser.add_argument("--act_bits", default="8,4,3")
    parser.add_argument("--steps", default=2, type=int, help="per repetition")
    parser.add_argument("--repetitions", default=5, type=int)
    parser.add_argument("--cores", default=0, type=int, help="cores per process; 0 = all")
    parser.add_argument("--check_images", default=4, type=int)
    parser.add_argument("--apart", default=5e-2, type=float, help="most between first losses")
    parser.add_argument("--compile_seconds", default=3600, type=int)
    parser.add_argument("--json", default="", help="file for the line of JSON")
    options = parser.parse_args()
    options.batch_sizes = [int(size) for size in options.batch_sizes]
    return options


def measure(
    runs: list[Run], options: argparse.Namespace, folder: Path
) -> tuple[list[dict[str, Any]], dict[Run, dict[str, float]]]:
    """Returns a row per run that was compiled in time, and its first loss and gradient norm."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(functools.partial(prepare, options, folder), options.networks))
    workers, compiled = {}, {}

    def start(run: Run) -> None:
        workers[run] = subprocess.Popen(
            command(options, run, run[-1], folder),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip
        if line := workers[run].stdout.readline():
            compiled[run] = json.loads(line)["seconds"]

    pool = concurrent.futures.ThreadPoolExecutor(len(runs) if accelerator() else 1)
    concurrent.futures.wait(
        [pool.submit(start, run) for run in runs], timeout=options.compile_seconds
    )
    pool.shutdown(wait=False, cancel_futures=True)
    for run, worker in list(workers.items()):
        if run not in compiled:
            worker.kill()
    ready = [run for run in runs if run in compiled]
    groups = [[run] for run in ready] if accelerator() else [ready]
    answers, memory = {run: [] for run in ready}, {}
    for group in groups:
        for _ in range(options.repetitions + 1):
            for run in group:
                answers[run].append(ask(workers[run], "steps"))
        for run in group:
            memory[run] = ask(workers[run], "memory")
            workers[run].communicate()
            show(run, answers[run], options.steps)
    rows = []
    for run in ready:
        spent = [answer["spent"] for answer in answers[run][1:]]  # the first is a warm-up
        times = [[1000 * each / options.steps for each in pair] for pair in spent]
        wall, busy = (statistics.median(column) for column in zip(*times, strict=True))
        rows.append(
            dict(zip(("network", "batch_size", "step", "by"), run, strict=True))
            | {
                "milliseconds": wall,
                "cpu_milliseconds": busy,
                "images_per_second": 1000 * run[1] / wall,
                "compile_seconds": compiled[run],
                "mebibytes": memory[run],
                "all_milliseconds": times,  # [wall, CPU]
            }
        )
    return rows, {run: answers[run][0] for run in ready}


def prepare(options: argparse.Namespace, folder: Path, network: str) -> None:
    """Writes a network's start weights; compares our steps with PyTorch's if it takes part."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    few = (network, CALIBRATION_IMAGES, "full_precision", "")
    subprocess.run(command(options, few, "prepare", folder), check=True, env=environment)
    if "torch" in options.frameworks and options.check_images:
        subprocess.run(command(options, few, "check", folder), check=True, env=environment)


def show(run: Run, answers: list[dict[str, Any]], steps: int) -> None:
    times = [1000 * answer["spent"][0] / steps for answer in answers[1:]]
    first = answers[0]
    print(
        f"{' '.join(map(str, run))}: {statistics.median(times):.2f} ms ({min(times):.2f} to "
        f"{max(times):.2f}), first loss {first['loss']:.6f}, gradient {first['norm']:.5f}",
        file=sys.stderr, flush=True,
    )  # fmt: skip


def compare(rows: list[dict[str, Any]]) -> None:
    """Adds the ratios to full precision of the same framework, and to PyTorch's same step."""
    found = {
        (row["network"], row["batch_size"], row["step"], row["by"]): row["milliseconds"]
        for row in rows
    }
    for row in rows:
        network, size = row["network"], row["batch_size"]
        full = found.get((network, size, "full_precision", row["by"]))
        theirs = found.get((network, size, row["step"], "torch"))
        row["over_full_precision"] = row["milliseconds"] / full if full else None
        row["rate_over_torch"] = theirs / row["milliseconds"] if theirs else None


def check_same(first: dict[Run, dict[str, float]], apart: float) -> None:
    """Compares the losses of the first steps of each kind between frameworks."""
    wanted = {}
    for run, numbers in first.items():
        loss = wanted.setdefault(run[:-1], numbers["loss"])
        assert abs(numbers["loss"] - loss) < apart, f"{run}: loss {numbers['loss']}, not {loss}"


def command(options: argparse.Namespace, run: Run, by: str, folder: Path) -> list[str]:
    """Returns the command of a worker; weights are shared by all runs of a network."""
    network, batch_size, kind, _ = run
    arrays = folder / f"{network}.npz"
    keys = ("image_size", "steps", "check_images", "act_bits", "cores")
    passed = [f"--{key}={getattr(options, key)}" for key in keys]
    passed.append(f"--batch_size={batch_size}")
    return [sys.executable, str(WORKER), by, network, kind, str(arrays), *passed]


def ask(worker: subprocess.Popen, question: str) -> Any:
    worker.stdin.write(question + "\n")
    return json.loads(worker.stdout.readline())


if __name__ == "__main__":
    main()
