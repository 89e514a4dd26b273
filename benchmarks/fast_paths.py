"""Do the forms that are fast on CPUs train as well as the plain forms?

    python benchmarks/fast_paths.py [--seeds=0,1,2] [--config=configs/digits.py] [main.py's flags]

Runs all phases once per seed and form, and prints the number of correct images at the end: `plain`
uses XLA's convolutions, quantizers with autodiff's residuals and one device; `fast` uses
convolution.py and xla_cpu.py unchanged; `two devices` also splits the CPU. Sums are computed in
different orders, so single runs diverge; the question is whether forms differ by more than seeds.
One line of JSON at the end.
"""

import argparse
import json
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
FORMS = {"plain": 1, "fast": 1, "two devices": 2}  # form -> devices


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="configs/digits.py")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--inside", default="", help="form of the run that this process is")
    options, flags = parser.parse_known_args()
    if options.inside:
        run(options, flags)
    print(f"{'form':12} {'seed':>4} {'correct':>12} {'top-1 %':>8} {'GBOPs':>9} {'seconds':>8}")
    found = {form: [] for form in FORMS}
    with tempfile.TemporaryDirectory() as folder:
        for seed in options.seeds.split(","):
            for form, devices in FORMS.items():
                started = time.perf_counter()
                result = start(form, devices, seed, folder, sys.argv[1:])
                found[form].append(result["top1"])
                print(
                    f"{form:12} {seed:>4} {result['correct']:>5} of {result['examples']} "
                    f"{result['top1']:8.2f} {result['gbops']:9.6f} "
                    f"{time.perf_counter() - started:8.0f}",
                    flush=True,
                )
    for form, scores in found.items():
        print(
            f"{form:12} mean {statistics.mean(scores):.2f}, {min(scores):.2f} to {max(scores):.2f}"
        )
    print(json.dumps({"config": options.config, "flags": flags, "top1": found}))


def start(form: str, devices: int, seed: str, folder: str, arguments: list[str]) -> dict:
    command = [
        sys.executable, __file__, *arguments, f"--inside={form}",
        f"--workdir={folder}/{form}-{seed}", f"--config.seed={seed}",
        f"--config.cpu_devices={devices}", f"--config.compilation_cache={folder}/cache",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout.splitlines()[-1].removeprefix("RESULT "))


def run(options: argparse.Namespace, flags: list[str]) -> None:
    """Does the same as main.py, with the plain forms if selected."""
    from metamix_jax.networks import intercepted, layers
    from metamix_jax.networks.kernels.convolution import plain_convolve

    if options.inside == "plain":
        intercepted.convolve = plain_convolve
        layers.keeping_arguments = lambda function: function
    sys.argv = ["main.py", f"--config={options.config}", *flags]
    runpy.run_path("main.py", run_name="__main__")


if __name__ == "__main__":
    main()
